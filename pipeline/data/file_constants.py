"""What is computed once per file, such as its percentiles, kept in small files beside the run."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.atomic import to_plain, write_bytes, write_json
from pipeline.errors import InputError

__all__ = ["FORMAT", "FileConstants", "file_identity"]

FORMAT = "lamina-constants-1"

logger = logging.getLogger(__name__)

_HEADER = "header"
# What json, zipfile and numpy raise on a file that is not, or no longer, an entry.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    zlib.error,
    zipfile.BadZipFile,
)
_writing = threading.Lock()  # two threads of one process would share a temporary name


def file_identity(path: Path | str, sha256: str | None = None) -> dict[str, Any]:
    """Return what changes when the content of `path` does.

    Args:
        path: a file, or a folder that is one volume (Zarr, slices): every file in it counts.
        sha256: its content, where a frozen manifest recorded it. Place and time then do not
            matter, and `find_samples(verify=True)` is what notices a change.

    Raises:
        InputError: it cannot be read.
    """
    if sha256 is not None:
        return {"sha256": sha256}
    full = Path(path).absolute()
    try:
        if full.is_dir():
            return {"path": full.as_posix(), "files": _folder_digest(full)}
        found = full.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return {"path": full.as_posix(), "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


class FileConstants:
    """Values computed once per file and read from then on.

    An entry counts as long as the file, the settings and the version are those it was made from;
    one that is damaged or foreign is computed anew, with a line in the log. Workers and processes
    may ask at once: at worst two of them compute the same values.

    Args:
        folder: where the entries lie, such as `<output_dir>/cache/constants`.
        name: what is computed, for file names and messages.
        compute: called as `compute(path, **settings)`; returns numbers, strings and lists, kept as
            JSON, or arrays too, kept as `.npz`. Numbers that are not finite become None.
        settings: of the computation, in plain types.
        version: raise it when `compute` changes.
    """

    def __init__(
        self,
        folder: Path | str,
        name: str,
        compute: Callable[..., Mapping[str, Any]],
        settings: Mapping[str, Any] | None = None,
        version: int = 1,
    ) -> None:
        self.folder = Path(folder)
        self.name = name
        self.compute = compute
        self.settings = to_plain(settings or {})
        self.version = version
        self._known: dict[str, tuple[dict[str, Any], Mapping[str, Any]]] = {}

    def __call__(self, path: Path | str, sha256: str | None = None) -> Mapping[str, Any]:
        """Return the values of `path`, the same whether computed or read; arrays are read-only.

        Args:
            path: the file.
            sha256: as for `file_identity`.

        Raises:
            InputError: the file cannot be read.
            ResourceError: the entry cannot be written.
        """
        return self._fetch(path, sha256)[0]

    def prepare(self, paths: Iterable[Path | str]) -> None:
        """Compute what is missing for `paths` before loader workers ask for it."""
        made = [self._fetch(path, None)[1] for path in paths]
        logger.info(
            "%s: %d files, %d computed, the others read from %s",
            self.name, len(made), sum(made), self.folder,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}}  # workers read the files instead

    def _fetch(self, path: Path | str, sha256: str | None) -> tuple[Mapping[str, Any], bool]:
        """Return the values and whether they had to be computed."""
        known = self._known.get(str(path))
        # A folder is walked once per process: for every sample it would cost more than the sample.
        if known is not None and "files" in known[0]:
            return known[1], False
        identity = file_identity(path, sha256)
        if known is not None and known[0] == identity:
            return known[1], False
        header = self._header(identity)
        entry = self._entry(identity)
        values = _read_entry(entry, header)
        made = values is None
        if values is None:
            values = _write_entry(entry, header, self.compute(path, **self.settings))
        self._known[str(path)] = (identity, values)
        return values, made

    def _header(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self.name,
            "version": self.version,
            "settings": self.settings,
            "file": dict(identity),
        }

    def _entry(self, identity: Mapping[str, Any]) -> Path:
        """Return the path without suffix: one per file and settings, edited or not."""
        about = [identity.get("sha256") or identity["path"], self.version, self.settings]
        stem = identity.get("path", "").rpartition("/")[2].replace(".", "_")[:60]
        return self.folder / "-".join(filter(None, (self.name, stem, _digest(about)[:20])))


def _folder_digest(folder: Path) -> str:
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        state = path.stat()
        found.append([path.relative_to(folder).as_posix(), state.st_size, state.st_mtime_ns])
    return _digest(found)


def _digest(plain: Any) -> str:
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_entry(
    entry: Path, header: Mapping[str, Any], values: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Write `values`, and return them as they will be read."""
    arrays = {key: value for key, value in values.items() if isinstance(value, np.ndarray)}
    plain = to_plain({k: v for k, v in values.items() if k not in arrays}, finite=True)
    head = {**header, "sha256": _digest(plain), "values": plain}
    with _writing:
        if arrays:
            text = json.dumps(head, ensure_ascii=False).encode()
            stream = io.BytesIO()
            stored: dict[str, Any] = {_HEADER: np.frombuffer(text, np.uint8), **arrays}
            np.savez(stream, **stored)
            write_bytes(_with_suffix(entry, ".npz"), stream.getvalue())
        else:
            write_json(_with_suffix(entry, ".json"), head)
    return _frozen({**plain, **arrays})


def _read_entry(entry: Path, header: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the values of a valid entry, None where there is none."""
    for suffix, read in ((".json", _read_json), (".npz", _read_npz)):
        path = _with_suffix(entry, suffix)
        try:
            head, arrays = read(path)
            found = {key: head[key] for key in header}
            plain = dict(head["values"])
            intact = head["sha256"] == _digest(plain)
        except FileNotFoundError:
            continue
        except _UNREADABLE as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("%s: damaged entry (%s), computed anew", path, reason)
            return None
        if not intact or {**found, "file": None} != {**header, "file": None}:
            reason = "foreign" if intact else "damaged"
            logger.warning("%s: %s entry, computed anew", path, reason)
            return None
        if found != header:
            logger.info("%s: the file has changed, computed anew", header["file"]["path"])
            return None
        return _frozen({**plain, **arrays})
    return None


def _read_json(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return json.loads(path.read_text("utf-8")), {}


def _read_npz(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    data = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        broken = archive.testzip()  # before numpy believes a size that a damaged header gives
    if broken:
        raise ValueError(f"checksum of {broken} fails")
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    head = json.loads(arrays.pop(_HEADER).tobytes())
    return head, arrays


def _frozen(values: dict[str, Any]) -> Mapping[str, Any]:
    for value in values.values():
        if isinstance(value, np.ndarray):
            value.setflags(write=False)
    return values


def _with_suffix(entry: Path, suffix: str) -> Path:
    return entry.with_name(entry.name + suffix)
