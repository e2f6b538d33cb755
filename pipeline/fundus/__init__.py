"""Vessels in fundus photographs: networks, transforms, metrics and a phantom."""
