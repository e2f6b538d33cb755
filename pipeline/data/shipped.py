"""Where the folders that come with the package lie: in a checkout or in an installed wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipeline.errors import ConfigurationError

__all__ = ["shipped_folder"]


def shipped_folder(name: Literal["bundles", "data_manifests"]) -> Path:
    """Return the folder `name`: beside the package in a checkout, inside it in a wheel.

    Raises:
        ConfigurationError: the installation has neither.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = (package / "_shipped" / name, package.parent / name)
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    looked = " and ".join(str(candidate) for candidate in candidates)
    raise ConfigurationError(f"{name}: not found at {looked}; install lamina again")
