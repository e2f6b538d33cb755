"""Lamina: what MONAI bundles for thin things in images need and MONAI does not have."""
