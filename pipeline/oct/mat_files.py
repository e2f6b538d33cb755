"""MATLAB files of public OCT data: Duke 2013 (AMD), Chiu 2014 (DME), single circle scans.

Version 7.3 is HDF5 with its axes reversed, and is read B-scan by B-scan; an older file is unpacked
once, at the first B-scan that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.budget import check_decoded_bytes
from pipeline.data.volume_source import named_errors
from pipeline.errors import InputError
from pipeline.oct.hdf5_bscans import Hdf5BScans, dataset_at
from pipeline.oct.heyex_vol import display_scale
from pipeline.oct.row_checks import check_rows
from pipeline.oct.volume import OctVolume

__all__ = ["MatBScans", "read_mat"]

_HDF5 = b"\x89HDF\r\n\x1a\n"
_USER_BLOCK_BYTES = 512  # of a MATLAB 7.3 file, before the HDF5 begins
_ONE_BASED = "rows were 1-based (MATLAB): 1 subtracted"
_DUKE_LAYERS = ("ILM", "RPEDC", "BM")
_CHIU_LAYERS = {"ILM": 0, "BM": 7}
_CIRCLE_LAYERS = {"ILM": 0, "BM": 1}
# The file does not say them; per pixel column and B-scan as commonly given for the set.
_DUKE_SCALE_X_UM, _DUKE_SCALE_Y_UM, _DUKE_SPACING_UM = 6.7, 3.24, 67.0
_SPECTRALIS_SCALE_Y_UM = 3.87
Shapes = dict[str, tuple[int, ...]]


class MatBScans:
    """The images of a `.mat` file, `(H, W, N)` or `(H, W)` there, as B-scans.

    Args:
        path: the file.
        name: the variable.
        shape: `(N, H, W)`.
        dtype: of what is given.
        linear: the intensities are Heidelberg's linear ones, to be given on the display scale.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        shape: tuple[int, int, int],
        dtype: np.dtype[np.generic],
        linear: bool = False,
    ) -> None:
        self.path = path
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.linear = linear
        self._stored: Hdf5BScans | NDArray[Any] | None = None

    def __getitem__(self, index: int | slice) -> NDArray[np.generic]:
        """Return B-scan `(H, W)`, or B-scans `(n, H, W)`.

        Raises:
            InputError: the file is damaged or gone, or that many are over the budget.
        """
        count = len(range(self.shape[0])[index]) if isinstance(index, slice) else 1
        check_decoded_bytes(self.path, (count, *self.shape[1:]), self.dtype.itemsize)
        if self._stored is None:
            self._stored = self._opened()
        bscans = np.swapaxes(np.asarray(self._stored[index]), -1, -2)  # MATLAB counts rows fastest
        if self.linear:
            return display_scale(bscans)
        return np.ascontiguousarray(bscans, dtype=self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stored": None}

    def _opened(self) -> Hdf5BScans | NDArray[Any]:
        """Return the images as `(N, W, H)`: left in an HDF5 file, else unpacked."""
        if _is_hdf5(self.path) and len(_shapes(self.path)[self.name]) == 3:
            return Hdf5BScans(self.path, self.name)
        whole = _variable(self.path, self.name)
        return (whole[..., None] if whole.ndim == 2 else whole).T


def read_mat(path: Path | str) -> OctVolume:
    """Return the B-scans and boundaries of a `.mat` file of a layout that is told by its variables.

    Duke 2013: `images` `(512, 1000, 100)`, `layerMaps` `(100, 1000, 3)`. Chiu 2014: `images`
    `(496, 768, 61)`, `manualLayers1` `(8, 768, 61)`. A circle scan: `B0` `(496, 768)` with the
    device's `B0seg` `(3, 768)`, and `<stem>_0_coordinates.mat` beside it with the manual
    `interpolation` `(9, 768)`, which then counts instead of the device.

    Args:
        path: the file, of any MATLAB version.

    Raises:
        InputError: it is missing, damaged, of another layout, or its sizes do not fit each other.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: not found, expected a .mat file")
    shapes = _shapes(path)
    layouts: dict[tuple[str, str], Callable[[Path, Shapes], OctVolume]] = {
        ("images", "layerMaps"): _read_duke,
        ("images", "manualLayers1"): _read_chiu,
        ("B0", "B0seg"): _read_circle,
    }
    for names, read in layouts.items():
        if set(names) <= set(shapes):
            volume = read(path, shapes)
            odd = check_rows(path, volume.layers, volume.bscans.shape[1])
            return replace(volume, notes=(*volume.notes, *odd))
    found = ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:8]) or "nothing"
    expected = " or ".join(" and ".join(names) for names in layouts)
    raise InputError(f"{path}: holds {found}; expected {expected}")


def _read_duke(path: Path, shapes: Shapes) -> OctVolume:
    count, _, columns = shape = _bscan_shape(path, "images", shapes)
    expected = (count, columns, len(_DUKE_LAYERS))
    maps = _from_zero(_rows(path, "layerMaps", shapes, expected))
    layers = {name: maps[:, :, k] for k, name in enumerate(_DUKE_LAYERS)}
    return _volume(
        path,
        "duke_mat",
        _bscans(path, "images", shape),
        layers,
        scale_x_um=_DUKE_SCALE_X_UM,
        scale_y_um=_DUKE_SCALE_Y_UM,
        spacing_um=_DUKE_SPACING_UM,
        scan_pattern="volume",
        notes=(
            _ONE_BASED,
            f"scales ({_DUKE_SCALE_X_UM} x {_DUKE_SCALE_Y_UM} um, B-scans {_DUKE_SPACING_UM} um "
            "apart) are those given for the set, not in the file",
        ),
    )


def _read_chiu(path: Path, shapes: Shapes) -> OctVolume:
    count, _, columns = shape = _bscan_shape(path, "images", shapes)
    rows = _from_zero(_rows(path, "manualLayers1", shapes, (8, columns, count)))
    layers = {name: rows[k].T for name, k in _CHIU_LAYERS.items()}
    annotated = int(np.isfinite(layers["ILM"]).any(axis=1).sum())
    return _volume(
        path,
        "chiu_mat",
        _bscans(path, "images", shape),
        layers,
        scale_y_um=_SPECTRALIS_SCALE_Y_UM,
        scan_pattern="volume",
        notes=(
            _ONE_BASED,
            f"rows are manualLayers1: {annotated} of {count} B-scans annotated",
            f"scale_y_um {_SPECTRALIS_SCALE_Y_UM} is the Spectralis's, not in the file; "
            "scale_x_um differs from eye to eye and is unknown",
        ),
    )


def _read_circle(path: Path, shapes: Shapes) -> OctVolume:
    _, _, columns = shape = _bscan_shape(path, "B0", shapes)
    notes = ["intensities were linear: shown as clip(v, 0, 1) ** 0.25"]
    manual = path.with_name(f"{path.stem}_0_coordinates.mat")
    if manual.is_file():
        rows = _from_zero(_rows(manual, "interpolation", _shapes(manual), (9, columns)))
        layers = {"ILM": rows[None, 0], "BM": rows[None, 8]}
        notes += [_ONE_BASED, f"rows are the manual ones of {manual.name}"]
    else:
        device = _rows(path, "B0seg", shapes, (shapes["B0seg"][0], columns))
        layers = {name: device[None, k] for name, k in _CIRCLE_LAYERS.items()}
        notes += ["rows are the device's own segmentation, not a reference standard"]
    has_scale = shapes.get("ScaleZ") in ((1, 1), ())
    scale_mm = float(_variable(path, "ScaleZ").squeeze()) if has_scale else 0.0
    return _volume(
        path,
        "circle_mat",
        MatBScans(path, "B0", shape, np.dtype(np.float32), linear=True),
        layers,
        white=1.0,
        scale_y_um=scale_mm * 1000 if 0 < scale_mm < 1 else None,
        scan_pattern="circle",
        notes=notes,
    )


def _volume(
    path: Path,
    source_format: str,
    bscans: MatBScans,
    layers: dict[str, NDArray[np.floating]],
    white: float | None = None,
    **facts: Any,
) -> OctVolume:
    """Return the volume of one subject, who is known by the file alone."""
    count = bscans.shape[0]
    return OctVolume(
        path=path,
        source_format=source_format,
        bscans=bscans,
        layers=layers,
        names=[path.stem] if count == 1 else [f"{path.stem}_{k:03d}" for k in range(count)],
        subjects=[path.stem] * count,
        white=_white(bscans) if white is None else white,
        **{**facts, "notes": tuple(facts["notes"])},
    )


def _white(bscans: MatBScans) -> float:
    """Return what white is: MATLAB stores 0 to 255 as readily in floats as in bytes."""
    if bscans.dtype.kind == "u":
        return float(np.iinfo(bscans.dtype).max)  # type: ignore[type-var]
    middle = np.asarray(bscans[bscans.shape[0] // 2], np.float64)
    return 255.0 if np.nanmax(middle, initial=0.0) > 1.5 else 1.0


def _bscans(path: Path, name: str, shape: tuple[int, int, int]) -> MatBScans:
    stored = _dtypes(path)[name]
    if stored.kind not in "fiu":
        raise InputError(f"{path}: {name} is of {stored}, expected numbers")
    given = stored if stored in (np.uint8, np.uint16) else np.dtype(np.float32)
    return MatBScans(path, name, shape, given)


def _bscan_shape(path: Path, name: str, shapes: Shapes) -> tuple[int, int, int]:
    """Return `(N, H, W)` of the images `(H, W)` or `(H, W, N)`, which may be decoded whole."""
    shape = shapes[name]
    if len(shape) not in (2, 3) or 0 in shape:
        raise InputError(f"{path}: {name} has shape {shape}, expected (rows, columns, B-scans)")
    rows, columns, count = (*shape, 1)[:3]
    check_decoded_bytes(path, shape if not _is_hdf5(path) else shape[:2], 8)
    return count, rows, columns


def _rows(path: Path, name: str, shapes: Shapes, expected: tuple[int, ...]) -> NDArray[np.floating]:
    """Return the variable `name` as floats after comparing its shape with that of the images."""
    found = shapes.get(name)
    if found != expected:
        raise InputError(f"{path}: {name} has shape {found}, expected {expected} by the images")
    check_decoded_bytes(f"{path}: {name}", expected, 8)
    array = _variable(path, name)
    if array.dtype.kind not in "fiu":
        raise InputError(f"{path}: {name} is of {array.dtype}, expected numbers")
    return array.astype(np.float64)


def _from_zero(rows: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return MATLAB's rows, of which 1 is the first, counted from 0; what is no row becomes NaN."""
    return np.where(rows > 0, rows - 1, np.nan)


def _shapes(path: Path) -> Shapes:
    """Return the shapes of the arrays in the file, as MATLAB shows them."""
    return {name: shape for name, (shape, _) in _contents(path).items()}


def _dtypes(path: Path) -> dict[str, np.dtype[Any]]:
    return {name: np.dtype(dtype) for name, (_, dtype) in _contents(path).items()}


def _contents(path: Path) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return shape and type of the numeric arrays in the file; nothing is unpacked."""
    import h5py
    from scipy.io import whosmat

    if _is_hdf5(path):
        with named_errors(path), h5py.File(path, "r") as file:
            own = [n for n in file if isinstance(file.get(n, getlink=True), h5py.HardLink)]
            arrays = {name: file[name] for name in own if isinstance(file[name], h5py.Dataset)}
            return {name: (one.shape[::-1], one.dtype) for name, one in arrays.items() if one.shape}
    with _named_errors(path):
        listed = whosmat(str(path))
    types = {"double": "f8", "single": "f4", "logical": "u1"}
    return {
        name: (tuple(shape), types.get(kind, kind))
        for name, shape, kind in listed
        if kind in types or kind.removeprefix("u").startswith("int")
    }


def _variable(path: Path, name: str) -> NDArray[Any]:
    """Return one array with the axes that MATLAB shows."""
    import h5py
    from scipy.io import loadmat

    if _is_hdf5(path):
        with named_errors(path), h5py.File(path, "r") as file:
            return np.asarray(dataset_at(path, file, name)[()]).T
    with _named_errors(path):
        return np.asarray(loadmat(str(path), variable_names=[name])[name])


def _is_hdf5(path: Path) -> bool:
    """Return whether the file is HDF5, at its beginning or behind MATLAB's own header."""
    with named_errors(path), path.open("rb") as stream:
        head = stream.read(_USER_BLOCK_BYTES + len(_HDF5))
    return head.startswith(_HDF5) or head.endswith(_HDF5)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turn what scipy raises on damaged files into an InputError that names the file."""
    from scipy.io.matlab import MatReadError

    try:
        with named_errors(path):
            yield
    except (MatReadError, NotImplementedError) as error:
        raise InputError(f"{path}: damaged or no MATLAB file; copy it again") from error
