"""Small datasets on disk."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.writers import write_png

MakePairs = Callable[..., Path]


@pytest.fixture(scope="session")
def itk() -> Any:
    """The library by which ITK-SNAP and 3D Slicer read; none of what writes here."""
    return pytest.importorskip("SimpleITK", reason="SimpleITK reads volumes back independently")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all examples of a property."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture
def make_pairs(tmp_path: Path) -> MakePairs:
    """A function that writes image/label folders: `make_pairs("a", "b", split="train")`."""

    def make(*names: str, split: str = "", size: tuple[int, int] = (12, 16)) -> Path:
        root = tmp_path / "data"
        for name in names:
            seed = zlib.crc32(f"{split}/{name}".encode())
            generator = np.random.default_rng(seed)
            image = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            label = np.uint8(255) * (generator.random(size) > 0.8)
            write_png(root / split / "image" / f"{name}.png", image)
            write_png(root / split / "label" / f"{name}.png", label.astype(np.uint8))
        return root

    return make


@pytest.fixture
def manifest_content() -> dict[str, Any]:
    """The content of a small valid manifest."""
    return {
        "name": "tiny",
        "title": "tiny pairs",
        "task": "vessels",
        "licence": "none",
        "source": None,
        "citation": None,
        "labels": {"foreground": "> 127", "allowed": [0, 255]},
        "fields": {"name": r"[^/]+"},
        "files": [
            {"split": "train", "image": "image/{name}.png", "label": "label/{name}.png"},
        ],
        "subject": "{name}",
        "validation": {"fraction": 0.25, "seed": 0},
        "folds": {"k": 2, "seed": 0},
    }
