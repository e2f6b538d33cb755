"""MONAI's `PersistentDataset` with entries that may be damaged, out of date or shared.

`PersistentDataset` of MONAI 1.6.1 stops at a truncated entry, serves one with a flipped byte, does
not notice an edited file or another setting, returns another type of tensor on the second pass
than on the first, and with `track_meta` finds every entry it reads corrupt. Here a sample is the
same whether it was built or read.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import torch
from monai.data import PersistentDataset
from monai.transforms import Transform
from monai.transforms.traits import RandomizableTrait

from pipeline.data.atomic import write_bytes
from pipeline.data.cached_items import pack, unpack
from pipeline.data.file_constants import file_identity
from pipeline.data.transform_settings import digest
from pipeline.errors import first_line

__all__ = ["FORMAT", "PersistentCache"]

FORMAT = "lamina-cache-1"

logger = logging.getLogger(__name__)

_ABSENT = object()
_LONGEST_LINE = 1 << 12
_PIECE_BYTES = 1 << 16
_ZARR = {"zarr.json", ".zarray", ".zgroup"}
_SLICES = (".tif", ".tiff")
# What json and torch raise on a file that is not, or no longer, an entry.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
)
_writing = threading.Lock()  # two threads of one process would share a temporary name


class PersistentCache(PersistentDataset):
    """Cases transformed up to the first random transform once, kept on disk, read from then on.

    In place of `CacheDataset` where the transformed cases do not fit the memory or the next run
    should find them. An entry belongs to the case, to size and time of every file that it names,
    and to the settings and code of the transforms; a change of any builds it anew. One that is
    damaged or foreign is deleted and built anew, with a line in the log. Every item is a new copy,
    MetaTensors keep their metadata and history (`Invertd` works), and runs and workers may share a
    folder.

    Args:
        data: the cases, dictionaries with paths of files.
        transform: a `Compose` or a sequence of transforms.
        cache_dir: where the entries lie, such as `<output_dir>/cache`; None caches nothing.
        settings: plain values that the result depends on besides, such as the content of a file
            that a transform reads.

    Raises:
        ConfigurationError: a transform holds something whose settings cannot be told.
    """

    def __init__(
        self,
        data: Sequence[Any],
        transform: Any,
        cache_dir: Path | str | None,
        settings: Any = None,
    ) -> None:
        super().__init__(data=data, transform=transform, cache_dir=None)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        chain = self.transform
        stop = chain.get_index_of_first(
            lambda one: isinstance(one, RandomizableTrait) or not isinstance(one, Transform)
        )
        self._recipe = digest([chain.transforms[:stop], chain.lazy, chain.overrides, settings])

    def set_data(self, data: Sequence[Any]) -> None:
        """Replace the cases; entries of others stay, since an entry is never out of date."""
        self.data = data

    def _cachecheck(self, item_transformed: Any) -> Any:
        """Return a case as it is before the first random transform."""
        if self.cache_dir is None:
            return self._built(item_transformed)
        name = digest([self._recipe, item_transformed])
        entry = self.cache_dir / f"{name}.cache"
        # Taken before the files are read: what changes meanwhile makes an entry out of date.
        files = digest([_identity(path) for path in _files_in(item_transformed)])
        found = _read(entry, files)
        if found is not _ABSENT:
            return found
        packed = pack(self._built(item_transformed))
        stream = io.BytesIO()
        torch.save(packed, stream)
        stream.seek(0)
        with _writing:
            write_bytes(entry, _header(entry, files, stream) + stream.getvalue())
        # Through the bytes this time too: one kind of item on the first pass and the next.
        stream.seek(0)
        return _loaded(stream)

    def _built(self, case: Any) -> Any:
        return self._pre_transform(deepcopy(case))  # type: ignore[no-untyped-call]


def _files_in(case: Any) -> Iterator[str]:
    """Yield the paths in a case that are files, or folders that are one volume."""
    if isinstance(case, Mapping):
        case = list(case.values())
    if isinstance(case, list | tuple):
        for value in case:
            yield from _files_in(value)
    # Not Path.is_file, which raises where a text is too long to be a name.
    elif isinstance(case, str | PurePath) and (
        os.path.isfile(case) or _is_volume(str(case))  # noqa: PTH113
    ):
        yield str(case)


@cache
def _is_volume(path: str) -> bool:
    """Return whether `path` is a folder that `open_volume` reads: Zarr, or slices."""
    if not os.path.isdir(path):  # noqa: PTH112 - as above
        return False
    names = {one.name for one in Path(path).iterdir()}
    return bool(names & _ZARR) or any(name.lower().endswith(_SLICES) for name in names)


def _identity(path: str) -> Any:
    return _folder_identity(path) if Path(path).is_dir() else file_identity(path)


@cache  # walked once per process: for every sample it would cost more than the sample
def _folder_identity(path: str) -> Any:
    return file_identity(path)


def _header(entry: Path, files: str, payload: BinaryIO) -> bytes:
    """Return the line before the payload, the rest of a stream; torch itself checks nothing."""
    size, checksum = 0, 0
    # Piece by piece: fresh memory for the whole would take longer than reading it.
    while piece := payload.read(_PIECE_BYTES):
        size, checksum = size + len(piece), zlib.crc32(piece, checksum)
    content = {
        "format": FORMAT,
        "entry": entry.stem,
        "files": files,
        "bytes": size,
        "crc32": checksum,
    }
    return json.dumps(content).encode() + b"\n"


def _read(entry: Path, files: str) -> Any:
    """Return the item in a valid entry, `_ABSENT` where there is none."""
    try:
        with entry.open("rb") as stream:
            head = stream.readline(_LONGEST_LINE)
            start = stream.tell()
            expected = _header(entry, files, stream)
            if head == expected:
                stream.seek(start)
                return _loaded(stream)
        if json.loads(head) != {**json.loads(expected), "files": json.loads(head)["files"]}:
            raise ValueError("it does not agree with its first line")
        logger.info("%s: a file of the case has changed, built anew", entry)
    except FileNotFoundError:
        pass
    except _UNREADABLE as error:
        reason = first_line(error)
        entry.unlink(missing_ok=True)
        logger.warning("%s: damaged or foreign cache entry (%s), built anew", entry, reason)
    return _ABSENT


def _loaded(stream: BinaryIO) -> Any:
    return unpack(torch.load(stream, map_location="cpu", weights_only=True))
