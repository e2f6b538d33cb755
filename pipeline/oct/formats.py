"""The door to files of B-scans: whatever the format, one form comes out.

What a file is, its first bytes say; its suffix is asked only where they do not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.data.images import IMAGE_SUFFIXES, image_stem
from pipeline.data.volume_source import named_errors
from pipeline.errors import InputError
from pipeline.oct.prediction_files import read_predictions, write_predictions
from pipeline.oct.volume import OctVolume

__all__ = ["oct_format", "read_oct", "read_predictions", "write_predictions"]

_HDF5 = b"\x89HDF\r\n\x1a\n"
_HDF5_USER_BLOCK = 512  # where MATLAB writes its own header before
_DICOM = (128, b"DICM")
_SUFFIXES = {
    "hdf5": (".h5", ".hdf5", ".hdf", ".he5"),
    "vol": (".vol",),
    "mat": (".mat",),
    "images": IMAGE_SUFFIXES,
    "optional": (".e2e", ".sdb", ".xml", ".fda", ".fds", ".img", ".dcm", ".dicom"),
}


def read_oct(path: Path | str) -> OctVolume:
    """Return the B-scans of a file or folder, with the rows, names and scale that it gives.

    Args:
        path: HDF5 in either spelling or as exported, HEYEX `.vol`, `.mat` of Duke or Chiu, an image
            or a folder of images with their rows; with `lamina[oct]` also `.e2e`, HEYEX XML,
            `.fda`, `.img` and DICOM.

    Raises:
        InputError: there is no such file, it is none of these, or it is damaged.
        ConfigurationError: it needs a package that is not installed.
    """
    path = Path(path)
    return _reader(oct_format(path))(path)


def oct_format(path: Path | str) -> str:
    """Return which reader a file or folder is for: `hdf5`, `vol`, `mat`, `images`, `optional`.

    Raises:
        InputError: there is no such file, or it is none that can be read.
    """
    path = Path(path)
    if path.is_dir():
        with named_errors(path):
            has_xml = any(one.suffix.lower() == ".xml" for one in path.iterdir())
        return "optional" if has_xml else "images"  # HEYEX exports XML beside its images
    with named_errors(path), path.open("rb") as stream:
        head = stream.read(_HDF5_USER_BLOCK + len(_HDF5))
    if head.startswith(b"HSF-OCT-"):
        return "vol"
    if head.startswith(b"MATLAB "):
        return "mat"
    if _HDF5 in (head[: len(_HDF5)], head[_HDF5_USER_BLOCK:]):
        return "mat" if path.suffix.lower() == ".mat" else "hdf5"
    if head[_DICOM[0] :].startswith(_DICOM[1]):
        return "optional"
    return _by_suffix(path, head)


def _by_suffix(path: Path, head: bytes) -> str:
    if not head:
        raise InputError(f"{path}: is empty, expected B-scans; copy the file again")
    suffix = path.name[len(image_stem(path)) :].lower()
    for kind, suffixes in _SUFFIXES.items():
        if suffix in suffixes:
            return kind
    raise InputError(
        f"{path}: begins with {head[:8]!r} and ends in {suffix or 'no suffix'}, which is no format "
        "known here; expected HDF5, .vol, .mat, .e2e, .fda, .img, DICOM, HEYEX XML, or images"
    )


def _reader(kind: str) -> Callable[[Path], OctVolume]:
    """Return the function that reads a format; what it needs is imported only then."""
    if kind == "hdf5":
        from pipeline.oct.hdf5_files import read_hdf5

        return read_hdf5
    if kind == "vol":
        from pipeline.oct.heyex_vol import read_vol

        return read_vol
    if kind == "mat":
        from pipeline.oct.mat_files import read_mat

        return read_mat
    if kind == "images":
        from pipeline.oct.image_folders import read_images

        return read_images
    from pipeline.oct.optional_readers import read_optional

    return read_optional
