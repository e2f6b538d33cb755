"""Papyrus sheets in micro-CT volumes: networks, transforms, metrics and a phantom."""
