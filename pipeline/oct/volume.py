"""What a file of B-scans holds, whatever its format: the one form that readers give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["BScans", "OctVolume"]


class BScans(Protocol):
    """B-scans that are read when asked for."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(N, H, W)`: B-scans, rows, columns."""

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of the stored grey values."""

    def __getitem__(self, index: int | slice) -> NDArray[np.generic]:
        """Return B-scan `(H, W)`, or B-scans `(n, H, W)`, as stored."""


@dataclass(frozen=True)
class OctVolume:
    """The B-scans of one file or folder, and what it says about them.

    Rows count from 0 at the top; a boundary's row is the first row of the layer below it, in the
    frame of `bscans`, with fractions, and NaN where nobody annotated. No attribute identifies a
    patient beyond what the file's own name does.

    Attributes:
        path: where it was read.
        source_format: `hdf5`, `hdf5_layer_maps`, `vol`, `duke_mat`, `chiu_mat`, `images`, ...
        bscans: `(N, H, W)`, read lazily; `white` says which value is white.
        layers: rows `(N, W)` float per boundary, such as `ILM` and `BM`, in their stored type.
        names: one per B-scan.
        subjects: per B-scan who it belongs to: what must not be split; `""` where unknown.
        white: grey value that is shown as white: 255, 65535 or 1.
        scale_x_um, scale_y_um: size of a pixel; None where unknown.
        spacing_um: between neighbouring B-scans; None where unknown or there is one.
        laterality: `OD`, `OS`, or None.
        scan_pattern: `line`, `circle`, `volume`, or None.
        notes: what the reader did to the numbers, such as "rows were 1-based: 1 subtracted".
    """

    path: Path
    source_format: str
    bscans: BScans
    layers: Mapping[str, NDArray[np.floating]]
    names: Sequence[str]
    subjects: Sequence[str]
    white: float
    scale_x_um: float | None = None
    scale_y_um: float | None = None
    spacing_um: float | None = None
    laterality: str | None = None
    scan_pattern: str | None = None
    notes: Sequence[str] = field(default=())
