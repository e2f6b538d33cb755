"""HEYEX `.vol`, Heidelberg's raw export: B-scans read one by one, device boundaries, scales.

Little endian: a file header of 2048 bytes, the fundus image, then per B-scan a header with the
device's boundaries and the intensities as float32. The size of those headers is read from the file.
Identifiers and birth date of the patient and times of the visit stand between the fields that are
read here; nothing interprets or keeps them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.data.atomic import atomic_path
from pipeline.data.budget import check_decoded_bytes
from pipeline.errors import InputError
from pipeline.oct.volume import OctVolume

__all__ = [
    "FIRST_BSCAN_NOTES",
    "VolBScans",
    "display_scale",
    "first_bscan_notes",
    "read_vol",
    "write_vol",
]

FIRST_BSCAN_NOTES: Mapping[str, str] = {
    "superior": "the first B-scan is the superior one",
    "inferior": "the first B-scan is the inferior one",
}

_MAGIC = b"HSF-OCT-"
_HEADER_BYTES = 2048
_BSCAN_FIELDS_BYTES = 256
_SIZES = struct.Struct("<3i")  # at 12: columns, B-scans, rows
_SCALES_MM = struct.Struct("<3d")  # at 24: column, between B-scans, row
_SLO_SIZE = struct.Struct("<2i")  # at 48
_PATTERN = struct.Struct("<2i")  # at 96: scan pattern, bytes of a B-scan's header
_POSITION_MM = struct.Struct("<4d")  # at 16 of a B-scan: start x, y, end x, y
_SEGMENTS = struct.Struct("<2i")  # at 48 of a B-scan: boundaries, their offset
_PATTERNS = {1: "line", 2: "circle", 3: "volume", 4: "volume"}
_INVALID = 3e38  # the file says float32 max
_LAYERS = ("ILM", "BM", "RNFL")
_MOST = 1 << 16  # of columns, rows, B-scans and boundaries: no scan comes near
_DISPLAY_NOTE = "intensities were linear: shown as clip(v, 0, 1) ** 0.25"


@dataclass(frozen=True)
class VolBScans:
    """The B-scans of a `.vol` file on the display scale, read when asked for.

    Args:
        path: the file.
        shape: `(N, H, W)`.
        first_byte: where the first B-scan's header begins.
        header_bytes: size of each B-scan's header.
    """

    path: Path
    shape: tuple[int, int, int]
    first_byte: int
    header_bytes: int

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Float32, from 0 to 1."""
        return np.dtype(np.float32)

    def __getitem__(self, index: int | slice) -> NDArray[np.generic]:
        """Return B-scan `(H, W)`, or B-scans `(n, H, W)`.

        Raises:
            InputError: the file has been cut short since it was opened.
        """
        count, rows, columns = self.shape
        if isinstance(index, slice):
            wanted = range(count)[index]
            check_decoded_bytes(self.path, (len(wanted), rows, columns), 4)
            stack = np.empty((len(wanted), rows, columns), np.float32)
            for place, number in enumerate(wanted):
                stack[place] = self._one(number)
            return stack
        return self._one(range(count)[index])

    def _one(self, number: int) -> NDArray[np.float32]:
        _, rows, columns = self.shape
        size = 4 * rows * columns
        offset = self.first_byte + number * (self.header_bytes + size) + self.header_bytes
        with self.path.open("rb") as stream:
            data = _read(self.path, stream, offset, size)
        return display_scale(np.frombuffer(data, "<f4").reshape(rows, columns))


def display_scale(intensity: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return Heidelberg's linear intensities as they are shown, `clip(v, 0, 1) ** 0.25`.

    Values that the file marks as invalid (float32's largest, or NaN) become 0.
    """
    valid = np.where(intensity > _INVALID, 0, np.nan_to_num(intensity, nan=0.0, posinf=0.0))
    # Two square roots, since a power is slow.
    shown: NDArray[np.float32] = np.sqrt(np.sqrt(np.clip(valid, 0, 1).astype(np.float32)))
    return shown


def read_vol(path: Path | str) -> OctVolume:
    """Return the B-scans, device boundaries and scales of a HEYEX `.vol` file.

    The device's rows count from 0; where it found no boundary they are NaN. They are its own
    segmentation, not a reference standard. Bytes behind the last B-scan are ignored.

    Args:
        path: the file.

    Raises:
        InputError: it is missing, no `.vol`, cut short, or its header cannot be true.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            return _read_open(path, stream)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _read_open(path: Path, stream: BinaryIO) -> OctVolume:
    header = _read(path, stream, 0, _HEADER_BYTES)
    if not header.startswith(_MAGIC):
        raise InputError(f"{path}: begins with {header[:8]!r}, expected a HEYEX .vol ({_MAGIC!r})")
    columns, count, rows = _SIZES.unpack_from(header, 12)
    scale_x_mm, distance_mm, scale_z_mm = _SCALES_MM.unpack_from(header, 24)
    pattern, header_bytes = _PATTERN.unpack_from(header, 96)
    first_byte = _first_byte(path, header)
    _check_sizes(path, (count, rows, columns), header_bytes)
    step = header_bytes + 4 * rows * columns
    _check_length(path, stream, first_byte + count * step)
    starts = [first_byte + number * step for number in range(count)]
    layers, positions, unread = _read_headers(path, stream, starts, header_bytes, columns)
    is_volume = _PATTERNS.get(pattern) == "volume"
    notes = [_DISPLAY_NOTE, "rows are the device's own segmentation, not a reference standard"]
    notes += [f"{unread} further boundaries of the device were not read"] if unread else []
    notes += first_bscan_notes(positions) if is_volume else []
    return OctVolume(
        path=path,
        source_format="vol",
        bscans=VolBScans(path, (count, rows, columns), first_byte, header_bytes),
        layers=layers,
        names=[path.stem] if count == 1 else [f"{path.stem}_{k:03d}" for k in range(count)],
        subjects=[""] * count,
        white=1.0,
        scale_x_um=_micrometres(scale_x_mm),
        scale_y_um=_micrometres(scale_z_mm),
        # In a star of B-scans the distance means something else.
        spacing_um=_micrometres(distance_mm) if is_volume and count > 1 else None,
        laterality=_laterality(header[84:86]),
        scan_pattern=_PATTERNS.get(pattern),
        notes=tuple(notes),
    )


def first_bscan_notes(positions_mm: Sequence[Sequence[float]]) -> list[str]:
    """Return, as a note, at which end the B-scans of a volume begin, where they are horizontal.

    Args:
        positions_mm: per B-scan start x, start y, end x, end y on the fundus image, y downwards.
    """
    places = np.asarray(positions_mm, np.float64)
    if len(places) < 2 or not np.isfinite(places).all():
        return []
    along_x, along_y = np.abs(places[:, 2:] - places[:, :2]).mean(axis=0)
    way = places[-1, 1] - places[0, 1]
    if along_y > 0.1 * along_x or way == 0:
        return []
    return [FIRST_BSCAN_NOTES["superior" if way > 0 else "inferior"]]


def _first_byte(path: Path, header: bytes) -> int:
    """Return where the B-scans begin: behind the fundus image, of a byte per pixel."""
    width, height = _SLO_SIZE.unpack_from(header, 48)
    if not (0 <= width <= _MOST and 0 <= height <= _MOST):
        raise InputError(f"{path}: its header announces a fundus image of {width}x{height} pixels")
    return _HEADER_BYTES + int(width) * int(height)


def _check_sizes(path: Path, shape: tuple[int, int, int], header_bytes: int) -> None:
    if not all(0 < size <= _MOST for size in shape) or not 0 < header_bytes <= 1 << 30:
        raise InputError(
            f"{path}: its header announces {shape[0]} B-scans of {shape[1]} x {shape[2]} with "
            f"{header_bytes} bytes of header each, expected 1 to {_MOST}; copy it again"
        )
    check_decoded_bytes(f"{path}: a B-scan", shape[1:], 4)
    check_decoded_bytes(f"{path}: its boundaries", (len(_LAYERS), shape[0], shape[2]), 4)


def _check_length(path: Path, stream: BinaryIO, expected: int) -> None:
    found = stream.seek(0, 2)
    if found < expected:
        raise InputError(
            f"{path}: cut short: {found} bytes found, {expected} expected by its header; "
            "copy it again"
        )


def _read_headers(
    path: Path, stream: BinaryIO, starts: Sequence[int], header_bytes: int, columns: int
) -> tuple[dict[str, NDArray[np.floating]], list[tuple[float, ...]], int]:
    """Return the boundaries `(N, W)`, the place of each B-scan in mm, and how many were left."""
    rows = np.full((len(_LAYERS), len(starts), columns), np.nan, np.float32)
    positions, unread = [], 0
    for number, start in enumerate(starts):
        fields = _read(path, stream, start, min(header_bytes, _BSCAN_FIELDS_BYTES))
        if len(fields) < _SEGMENTS.size + 48:
            raise InputError(f"{path}: B-scan headers of {header_bytes} bytes are too small")
        positions.append(_POSITION_MM.unpack_from(fields, 16))
        segments, offset = _SEGMENTS.unpack_from(fields, 48)
        fits = 0 <= segments <= _MOST and offset >= 56
        if segments and not (fits and offset + 4 * segments * columns <= header_bytes):
            raise InputError(
                f"{path}: B-scan {number} announces {segments} boundaries at byte {offset} of its "
                f"header of {header_bytes} bytes, where they have no room; copy it again"
            )
        used = min(segments, len(_LAYERS))
        data = _read(path, stream, start + offset, 4 * used * columns) if used else b""
        rows[:used, number] = np.frombuffer(data, "<f4").reshape(used, columns)
        unread = max(unread, segments - used)
    rows[~(np.abs(rows) < _INVALID)] = np.nan
    return dict(zip(_LAYERS, rows, strict=True)), positions, unread


def _read(path: Path, stream: BinaryIO, offset: int, size: int) -> bytes:
    stream.seek(offset)
    data = stream.read(size)
    if len(data) < size:
        raise InputError(
            f"{path}: cut short: {offset + len(data)} bytes found, at least {offset + size} "
            "expected; copy it again"
        )
    return data


def _micrometres(millimetres: float) -> float | None:
    plausible = math.isfinite(millimetres) and 0 < millimetres < 100
    return millimetres * 1000 if plausible else None


def _laterality(text: bytes) -> str | None:
    return text.decode("ascii") if text in (b"OD", b"OS") else None


def write_vol(
    path: Path | str,
    bscans: NDArray[np.floating],
    layers: Mapping[str, NDArray[np.floating]] | None = None,
    *,
    scale_x_um: float = 11.6,
    scale_y_um: float = 3.87,
    spacing_um: float = 0.0,
    laterality: str = "OD",
    scan_pattern: str | None = None,
    first_bscan: str = "inferior",
    header_bytes: int | None = None,
    trailing_bytes: int = 0,
) -> Path:
    """Write a `.vol` file without a patient, for phantoms and tests.

    Args:
        path: the file.
        bscans: `(N, H, W)` on the display scale 0 to 1; stored as its fourth power.
        layers: rows `(N, W)` of `ILM`, `BM` and `RNFL`; absent ones and NaN are stored as invalid.
        scale_x_um: width of a pixel.
        scale_y_um: height of a pixel.
        spacing_um: between neighbouring B-scans.
        laterality: `OD` or `OS`.
        scan_pattern: `line`, `circle` or `volume`; by default by the number of B-scans.
        first_bscan: `inferior`, as the device scans, or `superior`.
        header_bytes: size of each B-scan's header; by default as small as it can be.
        trailing_bytes: behind the last B-scan, as some exports have.

    Returns:
        The path.

    Raises:
        ValueError: a shape, name or size that does not fit.
    """
    count, rows, columns = bscans.shape
    known = dict(layers or {})
    if set(known) - set(_LAYERS) or any(one.shape != (count, columns) for one in known.values()):
        raise ValueError(f"layers must be ({count}, {columns}) and among {', '.join(_LAYERS)}")
    needed = _BSCAN_FIELDS_BYTES + 4 * len(_LAYERS) * columns
    room = needed if header_bytes is None else header_bytes
    if room < needed:
        raise ValueError(f"header_bytes is {room}, at least {needed} are needed")
    pattern = scan_pattern or ("line" if count == 1 else "volume")
    number = next(key for key, name in _PATTERNS.items() if name == pattern)
    absent = np.full((count, columns), np.nan)
    stored = np.stack([known.get(name, absent) for name in _LAYERS], axis=1).astype("<f4")
    stored[np.isnan(stored)] = np.finfo(np.float32).max
    side = 16  # of the fundus image, which is black
    header = bytearray(_HEADER_BYTES)
    header[:12] = b"HSF-OCT-103\0"
    _SIZES.pack_into(header, 12, columns, count, rows)
    _SCALES_MM.pack_into(header, 24, scale_x_um / 1000, spacing_um / 1000, scale_y_um / 1000)
    _SLO_SIZE.pack_into(header, 48, side, side)
    header[84:86] = laterality.encode("ascii")
    _PATTERN.pack_into(header, 96, number, room)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(bytes(header) + bytes(side * side))
        for k, bscan in enumerate(bscans):
            place = k if first_bscan == "superior" else count - 1 - k
            y_mm, width_mm = place * spacing_um / 1000, columns * scale_x_um / 1000
            stream.write(_bscan_header(room, (0.0, y_mm, width_mm, y_mm), stored[k]))
            stream.write((bscan.astype(np.float64) ** 4).astype("<f4").tobytes())
        stream.write(bytes(trailing_bytes))
    return Path(path)


def _bscan_header(
    size: int, position_mm: tuple[float, float, float, float], rows: NDArray[np.float32]
) -> bytes:
    header = bytearray(size)
    header[:11] = b"HSF-BS-103\0"
    struct.pack_into("<i", header, 12, size)
    _POSITION_MM.pack_into(header, 16, *position_mm)
    _SEGMENTS.pack_into(header, 48, len(rows), _BSCAN_FIELDS_BYTES)
    header[_BSCAN_FIELDS_BYTES : _BSCAN_FIELDS_BYTES + rows.nbytes] = rows.tobytes()
    return bytes(header)
