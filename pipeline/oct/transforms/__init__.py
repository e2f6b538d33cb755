"""From a file of B-scans to what a network takes, and the changes that training makes to it."""

from __future__ import annotations

from pipeline.oct.transforms.bscans import FitToFramed, LoadBScand, RenderLabeld, render_label

__all__ = ["FitToFramed", "LoadBScand", "RenderLabeld", "render_label"]
