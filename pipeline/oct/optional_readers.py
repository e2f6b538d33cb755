"""Further formats, through the libraries that read them: `.e2e`, HEYEX XML, Topcon, Zeiss, DICOM.

None of these formats is documented by its maker, and the libraries know them from samples. What is
known to go wrong stands in the notes of every volume read this way; look at the pictures before
trusting a number. What a library learns about the patient stays in it and is dropped.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.budget import check_decoded_bytes
from pipeline.data.volume_source import named_errors
from pipeline.errors import ConfigurationError, InputError, LaminaError
from pipeline.oct.heyex_vol import first_bscan_notes
from pipeline.oct.volume import OctVolume

__all__ = ["OPTIONAL_SUFFIXES", "read_optional"]

_LAYERS = ("ILM", "BM", "RNFL")
_INVALID = 3e38
_DICOM_MARK_AT = 128
_EYES = {"R": "OD", "L": "OS", "OD": "OD", "OS": "OS"}
_DECODED_FACTOR = 8  # decoded bytes per byte of the file, where 16 bits become float64 twice

_E2E_FAULTS = (
    "eyepy: the width of a pixel in .e2e is a guess from the scan angle and is left out",
    "eyepy: B-scans of .e2e are not registered to one another",
    "eyepy: the order of B-scans changed between releases; check which end comes first",
)
_XML_FAULTS = ("eyepy: circle and star scans are taken for volumes",)
_CONVERTER_FAULTS = (
    "oct-converter: laterality has been wrong (its issues 46, 123, 132) and is left out",
    "oct-converter: B-scans have been missing at the end of files (its issues 11, 126)",
)
_TOPCON_FAULTS = (
    *_CONVERTER_FAULTS,
    "oct-converter: rows are counted from the bottom of the image; they may be off by one",
)
_ZEISS_FAULTS = (
    *_CONVERTER_FAULTS,
    "oct-converter: .img has no header: 1024 rows and the columns in its name, or 512, are assumed",
    "oct-converter: height and width have been exchanged, and some images stand on their head "
    "(its issue 117)",
)
_DICOM_FAULTS = (
    "DICOM: pixel spacing is as stored; files by oct-converter have had it wrong (its issue 128)",
)


def read_optional(path: Path | str) -> OctVolume:
    """Return the B-scans of a file in a format that needs a further library.

    `.e2e` and HEYEX `.xml` (with its images beside it) by eyepy; `.fda`, `.fds` and `.img` by
    oct-converter; `.dcm` by pydicom, which comes with oct-converter. The whole file is decoded at
    once. Known faults are in the notes.

    Args:
        path: the file; for HEYEX XML also its folder. DICOM may have any suffix.

    Raises:
        ConfigurationError: the library is not installed.
        InputError: the file is missing, of another format, or the library cannot read it.
    """
    path = Path(path)
    if path.is_dir():
        path = _only_xml(path)
    if not path.is_file():
        raise InputError(f"{path}: not found")
    read = _read_dicom if _is_dicom(path) else _READERS.get(path.suffix.lower())
    if read is None:
        raise InputError(f"{path}: expected one of {', '.join(OPTIONAL_SUFFIXES)}")
    check_decoded_bytes(path, (path.stat().st_size,), _DECODED_FACTOR)
    return read(path)


def _only_xml(folder: Path) -> Path:
    found = sorted(one for one in folder.iterdir() if one.suffix.lower() == ".xml")
    if len(found) != 1:
        raise InputError(f"{folder}: {len(found)} XML files in it, expected one; name the file")
    return found[0]


def _is_dicom(path: Path) -> bool:
    with named_errors(path), path.open("rb") as stream:
        stream.seek(_DICOM_MARK_AT)
        return stream.read(4) == b"DICM"


def _read_e2e(path: Path) -> OctVolume:
    reader_module = _library("eyepy.io.he.e2e_reader", "eyepy", path)
    with _quietly(path, "eyepy"), reader_module.HeE2eReader(path) as reader:
        series = len(reader.series)
        volume = reader.volume
        arrays = _eyepy_arrays(volume)
        scale_y_um = _micrometres(volume.scale_y)
        laterality = _eye(volume)
    notes = [*_E2E_FAULTS]
    if series > 1:
        notes.append(f"the file holds {series} scans, of which eyepy gives one; export the others")
    return _volume(path, "e2e", *arrays, notes=notes, scale_y_um=scale_y_um, laterality=laterality)


def _read_xml(path: Path) -> OctVolume:
    reader_module = _library("eyepy.io.he.xml_reader", "eyepy", path)
    with _quietly(path, "eyepy"):
        reader = reader_module.HeXmlReader(path)
        metas = reader.bscan_meta
        if len(metas) < 2:
            raise InputError(
                f"{path}: {len(metas)} B-scans, and eyepy reads only volumes from HEYEX XML; give "
                "the image itself"
            )
        volume = reader.volume
        arrays = _eyepy_arrays(volume)
        places = [(*meta["start_pos"], *meta["end_pos"]) for meta in metas]
        scales = [_micrometres(one) for one in (volume.scale_x, volume.scale_y, volume.scale_z)]
        laterality = _eye(volume)
    return _volume(
        path,
        "heyex_xml",
        *arrays,
        notes=[*_XML_FAULTS, *first_bscan_notes(places)],
        scale_x_um=scales[0],
        scale_y_um=scales[1],
        spacing_um=scales[2],
        laterality=laterality,
        scan_pattern="volume",
    )


def _read_topcon(path: Path) -> OctVolume:
    name = path.suffix.lower()[1:]
    reader_module = _library(f"oct_converter.readers.{name}", "oct-converter", path)
    with _quietly(path, "oct-converter"), _binary_fromstring(reader_module):
        found = getattr(reader_module, name.upper())(path).read_oct_volume()
        bscans, contours = np.stack(found.volume), dict(found.contours or {})
        spacing_mm = list(found.pixel_spacing or [])
    scales = [_micrometres(one) for one in spacing_mm] if len(spacing_mm) == 3 else [None] * 3
    return _volume(
        path,
        name,
        bscans,
        contours,
        notes=_TOPCON_FAULTS,
        scale_x_um=scales[0],
        spacing_um=scales[1],
        scale_y_um=scales[2],
    )


def _read_zeiss(path: Path) -> OctVolume:
    reader_module = _library("oct_converter.readers.img", "oct-converter", path)
    sizes = re.findall(r"(\d{3,4})x\d{2,4}", path.stem)
    rows, columns = 1024, int(sizes[-1]) if sizes else 512
    if path.stat().st_size % (rows * columns) or not path.stat().st_size:
        raise InputError(
            f"{path}: {path.stat().st_size} bytes are no whole number of B-scans of {rows} x "
            f"{columns}; put the size into the name, as in cube_512x128.img"
        )
    with _quietly(path, "oct-converter"):
        found = reader_module.IMG(path).read_oct_volume(rows=rows, cols=columns)
        bscans = np.stack(found.volume)
    return _volume(path, "img", bscans, {}, notes=_ZEISS_FAULTS)


def _read_dicom(path: Path) -> OctVolume:
    pydicom = _library("pydicom", "pydicom", path)
    # Only these are read: names and dates of a patient are never in memory.
    wanted = ["Manufacturer", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "PixelData",
              "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit",
              "PixelRepresentation", "Laterality", "ImageLaterality", "PixelSpacing",
              "SharedFunctionalGroupsSequence"]  # fmt: skip
    with _quietly(path, "pydicom"):
        data = pydicom.dcmread(path, specific_tags=wanted)
        shape = (int(data.get("NumberOfFrames") or 1), int(data.Rows), int(data.Columns))
        check_decoded_bytes(path, shape, 2 * int(data.get("SamplesPerPixel") or 1))
        if str(data.get("Manufacturer", "")).startswith("Carl Zeiss"):
            raise InputError(f"{path}: Zeiss scrambles the pixels of its DICOM; export as images")
        array = np.asarray(data.pixel_array)
        shared = (data.get("SharedFunctionalGroupsSequence") or [None])[0]
        measures = (getattr(shared, "PixelMeasuresSequence", None) or [data])[0]
        spacing_mm = [float(one) for one in getattr(measures, "PixelSpacing", None) or ()]
        eye = str(data.get("ImageLaterality") or data.get("Laterality") or "")
        bits = int(data.BitsStored)
    if array.size != np.prod(shape):
        raise InputError(f"{path}: pixels {array.shape}, expected gray B-scans {shape}")
    scales = [_micrometres(one) for one in spacing_mm] if len(spacing_mm) == 2 else [None, None]
    return _volume(
        path,
        "dicom",
        array.reshape(shape),
        {},
        notes=_DICOM_FAULTS,
        white=float(2**bits - 1),
        scale_y_um=scales[0],
        scale_x_um=scales[1],
        laterality=_EYES.get(eye),
    )


_READERS: Mapping[str, Callable[[Path], OctVolume]] = {
    ".e2e": _read_e2e,
    ".sdb": _read_e2e,  # the same structure, in Heidelberg's own archive
    ".xml": _read_xml,
    ".fda": _read_topcon,
    ".fds": _read_topcon,
    ".img": _read_zeiss,
    ".dcm": _read_dicom,
    ".dicom": _read_dicom,
}
OPTIONAL_SUFFIXES: tuple[str, ...] = tuple(_READERS)


def _volume(
    path: Path,
    source_format: str,
    bscans: NDArray[Any],
    layers: Mapping[str, Any],
    *,
    notes: Sequence[str],
    white: float | None = None,
    **facts: Any,
) -> OctVolume:
    """Return a volume after looking whether the library gave what it should."""
    if bscans.ndim != 3 or 0 in bscans.shape or bscans.dtype.kind not in "uif":
        raise InputError(f"{path}: {bscans.shape} of {bscans.dtype} read, expected (N, H, W)")
    if bscans.dtype not in (np.uint8, np.uint16):
        bscans = np.nan_to_num(bscans.astype(np.float32))
    count, _, width = bscans.shape
    rows, left = {}, []
    for name in (one for one in _LAYERS if one in layers):
        given = np.asarray(layers[name], np.float64)
        if given.shape != (count, width):
            left.append(f"{name} has shape {given.shape} and was left out")
            continue
        rows[name] = np.where(np.abs(given) < _INVALID, given, np.nan)
    if rows:
        left.append("rows are the device's own segmentation, not a reference standard")
    return OctVolume(
        path=path,
        source_format=source_format,
        bscans=bscans,
        layers=rows,
        names=[path.stem] if count == 1 else [f"{path.stem}_{k:03d}" for k in range(count)],
        subjects=[""] * count,
        white=_white(bscans) if white is None else white,
        notes=(*notes, *left),
        **facts,
    )


def _eyepy_arrays(volume: Any) -> tuple[NDArray[Any], dict[str, Any]]:
    """Return the B-scans on eyepy's display scale, and its boundaries by name."""
    layers = {str(name): layer.data for name, layer in volume.layers.items()}
    return np.array(volume.data), layers


def _eye(volume: Any) -> str | None:
    """Return the eye that eyepy names, as a letter or as a member of an enumeration."""
    return _EYES.get(str(volume.laterality).rpartition(".")[2])


def _white(bscans: NDArray[Any]) -> float:
    if bscans.dtype.kind == "u":
        return float(np.iinfo(bscans.dtype).max)
    return 255.0 if bscans.max() > 1.5 else 1.0


def _micrometres(millimetres: Any) -> float | None:
    value = float(millimetres) if isinstance(millimetres, int | float | np.number) else 0.0
    return value * 1000 if 0 < value < 10 else None


def _library(module: str, package: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"{path}: reading {path.suffix} needs {package}, which is not installed or broken; "
            "pip install 'lamina[oct]'"
        ) from error


@contextmanager
def _quietly(path: Path, package: str) -> Iterator[None]:
    """Turn whatever the library raises into an InputError; keep its prints and warnings away.

    Its message is left out: it may quote what stands in the file about the patient.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (LaminaError, MemoryError):
        raise
    except Exception as error:  # the libraries have no type of their own for damaged files
        raise InputError(
            f"{path}: {package} cannot read it ({type(error).__name__}); export it again, or as "
            "another format such as .vol or images"
        ) from None


class _OlderNumpy:
    """NumPy with the binary `fromstring` that oct-converter 0.7 calls and NumPy 2.3 dropped."""

    @staticmethod
    def fromstring(data: bytes, dtype: Any) -> NDArray[Any]:
        return np.frombuffer(data, dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@contextmanager
def _binary_fromstring(module: Any) -> Iterator[None]:
    """Lend the library's module what it misses in NumPy."""
    given = module.np
    module.np = _OlderNumpy()
    try:
        yield
    finally:
        module.np = given
