"""Retinal layers in OCT B-scans: formats, frames, extraction, networks, metrics, a phantom."""
