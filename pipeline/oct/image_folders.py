"""B-scans as image files, with rows in text, CSV or label images beside them.

Rows of an image `scan.png` are looked for, in this order, in `scan.csv`; in the text files of the
OCTLayers data (`Subject1_03.png`, `data/Subject1_8.txt`); in a label image `scan_label.png` or
`../label/scan.png`. An image without any of them is an image to be segmented.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.budget import check_decoded_bytes
from pipeline.data.images import IMAGE_SUFFIXES, ImageHeader, image_stem, read_header, read_image
from pipeline.data.labels import label_plane
from pipeline.data.volumes import Volume
from pipeline.errors import InputError
from pipeline.oct.row_checks import check_rows
from pipeline.oct.volume import OctVolume

__all__ = ["ImageBScans", "read_images", "rows_from_labels"]

BOUNDARIES = ("ILM", "NFL", "RNFL", "GCL", "IPL", "INL", "OPL", "ONL", "ELM", "PR1", "RPE",
              "RPEDC", "BM")  # fmt: skip
_OCTLAYERS = re.compile(r"(?P<subject>Subject\d+)_(?P<scan>\d+)")
_OCTLAYERS_FILES = {"ILM": 1, "BM": 8}
_NAMED = re.compile(r"(?P<subject>.+)_(?P<eye>OD|OS|R|L)_\d+_\d+", re.IGNORECASE)
_LATERALITY = {"OD": "OD", "R": "OD", "OS": "OS", "L": "OS"}
_LABEL_MARKS = ("_label", "_mask")
_LABEL_FOLDERS = ("label", "labels")
_LARGEST_TEXT_BYTES = 1 << 26
_ALPHA = {2: 1, 4: 3}  # channels with alpha -> without

Rows = dict[str, NDArray[np.float64]]


class ImageBScans:
    """Images of one size as B-scans, read when asked for.

    Colour images, as exported screens are, give the mean of their channels; alpha does not count.

    Args:
        paths: the files, or one file of several pages.
        header: of the first.
    """

    def __init__(self, paths: Sequence[Path], header: ImageHeader) -> None:
        self.paths = tuple(paths)
        self.channels = header.channels
        self.dtype: np.dtype[np.generic] = header.dtype
        self.shape = (max(len(paths), header.pages), *header.size)
        self._stack = Volume(paths[0]) if header.pages > 1 else None

    def __getitem__(self, index: int | slice) -> NDArray[np.generic]:
        """Return B-scan `(H, W)`, or B-scans `(n, H, W)`, as stored.

        Raises:
            InputError: a file is damaged, or is another one than it was.
        """
        numbers = range(self.shape[0])[index]
        if isinstance(numbers, int):
            return self._one(numbers)
        check_decoded_bytes(self.paths[0], (len(numbers), *self.shape[1:]), self.dtype.itemsize)
        stack = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        for place, number in enumerate(numbers):
            stack[place] = self._one(number)
        return stack

    def _one(self, number: int) -> NDArray[np.generic]:
        if self._stack is not None:
            page: NDArray[np.generic] = self._stack[number : number + 1][0]
            return page
        image = read_image(self.paths[number])
        if image.ndim == 3:
            colours = image[..., : _ALPHA.get(image.shape[-1], image.shape[-1])]
            mean = colours.mean(axis=-1, dtype=np.float64)
            image = (mean.round() if self.dtype.kind == "u" else mean).astype(self.dtype)
        if image.shape != self.shape[1:] or image.dtype != self.dtype:
            raise InputError(
                f"{self.paths[number]}: {image.shape} of {image.dtype} found, {self.shape[1:]} of "
                f"{self.dtype} when it was opened; it was changed, start again"
            )
        return image


def read_images(path: Path | str) -> OctVolume:
    """Return the B-scans of an image, of a TIFF of several pages or of a folder of images.

    A CSV of rows has a column `column` (from 0) and one per boundary, such as `ILM` and `BM`, with
    rows from 0, empty where nobody annotated; for several pages also `bscan` (from 0). A label
    image has three values, from the top: above ILM, between ILM and BM, below BM.

    Args:
        path: PNG, JPEG, TIFF and the like, or a folder; its images are taken in natural order.

    Raises:
        InputError: no image is there, their sizes differ, or rows do not fit.
    """
    path = Path(path)
    paths = _image_files(path) if path.is_dir() else [path]
    headers = [read_header(one) for one in paths]
    _check_alike(path, paths, headers)
    bscans = ImageBScans(paths, headers[0])
    count, height, _ = bscans.shape
    stems = [image_stem(one) for one in paths]
    names = stems if len(stems) == count else [f"{stems[0]}_{k:03d}" for k in range(count)]
    layers, notes = _layers(paths, bscans.shape)
    if headers[0].channels > 2:
        notes.append("colour images: the mean of their channels")
    found = [_owner(stem) for stem in stems for _ in range(headers[0].pages)]
    eyes = {eye for _, eye in found}
    return OctVolume(
        path=path,
        source_format="images",
        bscans=bscans,
        layers=layers,
        names=names,
        subjects=[subject for subject, _ in found],
        white=float(np.iinfo(bscans.dtype).max) if bscans.dtype.kind == "u" else 1.0,  # type: ignore[type-var]
        laterality=eyes.pop() if len(eyes) == 1 else None,
        notes=(*notes, *check_rows(path, layers, height)),
    )


def rows_from_labels(labels: NDArray[np.integer]) -> tuple[Rows, int]:
    """Return the rows of ILM and BM in an image of classes.

    Args:
        labels: `(H, W)`: 0 above ILM, 1 between ILM and BM, 2 below BM.

    Returns:
        `ILM` and `BM` `(W,)`: the first row of the lower class, NaN where a column lacks it; and in
        how many columns the classes do not follow one another downwards, which are NaN as well.

    Example:
        >>> rows, broken = rows_from_labels(np.array([[0, 0], [1, 0], [2, 1]]))
        >>> rows["ILM"], rows["BM"], broken
        (array([1., 2.]), array([ 2., nan]), 0)
    """
    broken = (np.diff(labels.astype(np.int16), axis=0) < 0).any(axis=0)
    rows = {}
    for name, lower in (("ILM", 1), ("BM", 2)):
        # A column without the class itself has no boundary of it, whatever lies further down.
        here = labels == lower
        rows[name] = np.where(here.any(axis=0) & ~broken, here.argmax(axis=0), np.nan)
    return rows, int(np.count_nonzero(broken))


def _image_files(folder: Path) -> list[Path]:
    """Return the B-scans in a folder, or in its `images`, in natural order."""
    for place in (folder, folder / "images", folder / "image"):
        if not place.is_dir():
            continue
        found = [
            one
            for one in place.iterdir()
            if one.is_file()
            and not one.name.startswith(".")
            and one.name.lower().endswith(IMAGE_SUFFIXES)
            and not image_stem(one).endswith(_LABEL_MARKS)
        ]
        if found:
            return sorted(found, key=_natural)
    raise InputError(
        f"{folder}: no images in it, expected B-scans as {', '.join(IMAGE_SUFFIXES[:5])}"
    )


def _natural(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _check_alike(path: Path, paths: Sequence[Path], headers: Sequence[ImageHeader]) -> None:
    kinds: dict[tuple[object, ...], Path] = {}
    for one, header in zip(paths, headers, strict=True):
        kinds.setdefault((header.size, str(header.dtype), header.pages, header.channels > 1), one)
        if header.dtype.kind not in "uf" or header.dtype.itemsize > 8:
            raise InputError(f"{one}: pixels of {header.dtype}, expected uint8, uint16 or floats")
        if header.pages > 1 and (len(paths) > 1 or header.channels > 1):
            raise InputError(f"{one}: {header.pages} pages; give a gray TIFF of pages by itself")
    if len(kinds) > 1:
        listed = ", ".join(
            f"{one.name} {kind[0]} {kind[1]}" for kind, one in list(kinds.items())[:4]
        )
        raise InputError(
            f"{path}: images that differ ({listed}), expected one size and type; give them one by "
            "one, or a folder of each kind"
        )


def _owner(stem: str) -> tuple[str, str | None]:
    """Return subject and eye as far as a name such as `Subject1_03` or `p07_OD_1_2` says them."""
    if match := _OCTLAYERS.fullmatch(stem):
        return match["subject"], None
    if match := _NAMED.fullmatch(stem):
        return match["subject"], _LATERALITY[match["eye"].upper()]
    return "", None


def _layers(paths: Sequence[Path], shape: tuple[int, int, int]) -> tuple[Rows, list[str]]:
    """Return the rows `(N, W)` of every boundary that any image has, and what was done to them."""
    count, _, width = shape
    layers: Rows = {}
    notes: dict[str, None] = {}
    without = 0
    for number, path in enumerate(paths):
        rows, said = _rows_of(path, shape if len(paths) == 1 else (1, *shape[1:]))
        notes |= dict.fromkeys(said)
        without += not rows
        for name, values in rows.items():
            place = slice(None) if len(paths) == 1 else slice(number, number + 1)
            layers.setdefault(name, np.full((count, width), np.nan))[place] = values
    if layers and without:
        notes[f"{without} of {len(paths)} images have no rows"] = None
    return layers, list(notes)


def _rows_of(path: Path, shape: tuple[int, int, int]) -> tuple[Rows, list[str]]:
    """Return the rows `(n, W)` of one file, and notes."""
    stem = image_stem(path)
    table = path.with_name(f"{stem}.csv")
    if table.is_file():
        return _read_table(table, shape)
    match = _OCTLAYERS.fullmatch(stem)
    if match and (folder := _octlayers_folder(path, match["subject"])) is not None:
        rows = _read_octlayers(folder, match["subject"], int(match["scan"]), shape)
        return rows, ["rows were 1-based (OCTLayers): 1 subtracted"]
    for label in _label_files(path, stem):
        return _read_label(label, shape)
    return {}, []


def _octlayers_folder(path: Path, subject: str) -> Path | None:
    """Return the folder with the subject's text files, if there is one."""
    places = (path.parent, path.parent / "data", path.parent.parent / "data")
    names = [f"{subject}_{number}.txt" for number in _OCTLAYERS_FILES.values()]
    return next((p for p in places if any((p / name).is_file() for name in names)), None)


def _read_octlayers(folder: Path, subject: str, scan: int, shape: tuple[int, int, int]) -> Rows:
    """Return the rows of a scan, counted from 1: its column of each text file."""
    rows = {}
    for name, number in _OCTLAYERS_FILES.items():
        text = folder / f"{subject}_{number}.txt"
        _check_text(text)
        try:
            table = np.loadtxt(text, delimiter=",", ndmin=2)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{text}: no table of numbers: {reason}; copy it again") from error
        if len(table) != shape[2] or not 1 <= scan <= table.shape[1]:
            raise InputError(
                f"{text}: {table.shape[0]} lines of {table.shape[1]} numbers found; expected a "
                f"line for each of {shape[2]} columns and a number for scan {scan}"
            )
        rows[name] = table[None, :, scan - 1] - 1
    return rows


def _read_table(path: Path, shape: tuple[int, int, int]) -> tuple[Rows, list[str]]:
    """Return the rows in a CSV with a line per column."""
    _check_text(path)
    count, _, width = shape
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            fields = {(name or "").strip().upper(): name for name in reader.fieldnames or ()}
            known = [name for name in BOUNDARIES if name in fields]
            needed = ["COLUMN"] + (["BSCAN"] if count > 1 else [])
            if not known or not set(needed) <= set(fields):
                raise InputError(
                    f"{path}: columns {', '.join(fields) or 'none'}; expected "
                    f"{', '.join(needed).lower()} and boundaries such as ILM and BM"
                )
            rows = {name: np.full((count, width), np.nan) for name in known}
            seen = np.zeros((count, width), bool)
            for line in reader:
                where = f"{path}: line {reader.line_num}"
                page = _index(where, line, fields.get("BSCAN"), count)
                column = _index(where, line, fields["COLUMN"], width)
                if seen[page, column]:
                    raise InputError(f"{where}: column {column} stands twice; keep one line")
                seen[page, column] = True
                for name in known:
                    rows[name][page, column] = _number(where, name, line[fields[name]])
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: no CSV in UTF-8: {error}; save it again") from error
    others = sorted(set(fields) - set(known) - {"COLUMN", "BSCAN", ""})
    return rows, [f"columns not read: {', '.join(others).lower()}"] if others else []


def _index(where: str, line: Mapping[str, str | None], field: str | None, count: int) -> int:
    text = "0" if field is None else (line[field] or "").strip()
    if not (text.isascii() and text.isdecimal() and int(text) < count):
        raise InputError(f"{where}: {field} is {text!r}, expected 0 to {count - 1}")
    return int(text)


def _number(where: str, name: str, text: str | None) -> float:
    try:
        value = float(text) if text and text.strip() else math.nan
    except ValueError as error:
        raise InputError(f"{where}: {name} is {text!r}, expected a row or nothing") from error
    if math.isinf(value):
        raise InputError(f"{where}: {name} is infinite, expected a row or nothing")
    return value


def _check_text(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: not found, though another boundary of the subject is there")
    if not 0 < path.stat().st_size <= _LARGEST_TEXT_BYTES:
        size = path.stat().st_size
        raise InputError(f"{path}: {size} bytes, expected a table of 1 byte to 64 MiB")


def _label_files(path: Path, stem: str) -> list[Path]:
    places = [(path.parent, f"{stem}{mark}") for mark in _LABEL_MARKS]
    places += [(path.parent.parent / name, stem) for name in _LABEL_FOLDERS]
    candidates = [
        folder / f"{name}{suffix}" for folder, name in places for suffix in IMAGE_SUFFIXES
    ]
    return [one for one in candidates if one.is_file() and one != path]


def _read_label(path: Path, shape: tuple[int, int, int]) -> tuple[Rows, list[str]]:
    """Return the rows `(1, W)` of a label image of three values."""
    plane = label_plane(read_image(path), path)
    values = np.unique(plane)
    if (1, *plane.shape) != shape:
        raise InputError(f"{path}: label of {plane.shape}, its image has {shape[1:]}")
    codes = np.arange(3) if values[-1] <= 2 else values
    if len(codes) != 3:
        raise InputError(
            f"{path}: {len(values)} values found, expected three: above ILM, between, below BM"
        )
    rows, broken = rows_from_labels(np.searchsorted(codes, plane))
    notes = ["rows are the borders of label images"]
    notes += [f"{path.name}: {broken} columns whose classes are out of order"] if broken else []
    return {name: values[None] for name, values in rows.items()}, notes
