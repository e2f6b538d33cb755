"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from pipeline.errors import ResourceError

__all__ = [
    "atomic_path",
    "check_free_bytes",
    "check_writable",
    "remove_stale",
    "resource_errors",
    "sync_folder",
    "to_plain",
    "whole_folder",
    "write_bytes",
    "write_csv",
    "write_json",
    "write_text",
    "write_yaml",
]

logger = logging.getLogger(__name__)

_REMEDIES = {
    errno.ENOSPC: "free space on that disk or choose another output folder",
    errno.EDQUOT: "free space within the quota or choose another output folder",
    errno.EACCES: "make the folder writable or choose another output folder",
    errno.EPERM: "make the folder writable or choose another output folder",
    errno.EROFS: "the disk is read-only; choose another output folder",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another output folder",
    errno.EEXIST: "a file stands where a folder is needed; choose another output folder",
    errno.EISDIR: "a folder stands under that name; remove it or choose another output folder",
    errno.ENAMETOOLONG: "choose a shorter output folder",
}

# A file server's clock, which dates the files, and that of a machine, which dates its processes.
_CLOCKS_DIFFER_S = 60.0


@contextmanager
def atomic_path(final: Path | str) -> Iterator[Path]:
    """Give a temporary path beside `final` and move what was written there into place.

    The suffixes are kept, because some writers choose the format by them. The data reach the disk
    before the name does, so `final` is either the old file or the new one, whole.

    Args:
        final: where the file belongs; missing folders above it are made.

    Yields:
        The path to write to.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written.
    """
    final = Path(final)
    temporary = _temporary_name(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        temporary.replace(final)
        sync_folder(final.parent)
    except OSError as error:
        _unlink(temporary)
        mapped = _as_resource_error(error, final, temporary)
        if mapped is None:
            raise
        raise mapped from error
    except BaseException:  # a KeyboardInterrupt must not leave the temporary file either
        _unlink(temporary)
        raise


@contextmanager
def whole_folder(final: Path | str) -> Iterator[Path]:
    """Give a new folder to fill and move it to `final`, in place of a folder that is there.

    What a killed run left is removed by the next one for the same result.

    Args:
        final: where the folder belongs.

    Yields:
        The folder to fill.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written.
    """
    final = Path(final)
    partial = final.with_name(f".{final.name}.partial")
    old = final.with_name(f".{final.name}.removed")
    with resource_errors(final):
        for left in (partial, old):
            if left.exists():
                shutil.rmtree(left)
        partial.mkdir(parents=True)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if final.exists():
            final.replace(old)
        partial.replace(final)
        sync_folder(final.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def resource_errors(path: Path | str) -> Iterator[None]:
    """Say that the disk is full, or that a folder cannot be written, in one line.

    Args:
        path: what is being written to by the body.

    Raises:
        ResourceError: the body failed for such a reason.
    """
    try:
        yield
    except OSError as error:
        mapped = _as_resource_error(error, Path(path), Path(error.filename or path))
        if mapped is None:
            raise
        raise mapped from error


def write_bytes(path: Path | str, data: bytes) -> Path:
    """Write `data` to `path` atomically and return the path."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(data)
    return Path(path)


def write_text(path: Path | str, text: str) -> Path:
    """Write `text` to `path` as UTF-8 with newlines as they are, atomically."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, obj: object) -> Path:
    """Write `obj` as indented JSON; numbers that are not finite become null."""
    plain = to_plain(obj, finite=True)
    return write_text(path, json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_yaml(path: Path | str, obj: object) -> Path:
    """Write `obj` as YAML in the order given, without tags or aliases."""
    text = yaml.safe_dump(to_plain(obj), sort_keys=False, allow_unicode=True, width=100)
    return write_text(path, text)


def write_csv(
    path: Path | str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None
) -> Path:
    """Write `rows` as CSV with a header line.

    Args:
        path: the file to write.
        rows: one mapping per line; absent values are left empty.
        columns: the columns and their order; by default all keys in the order they first appear.

    Returns:
        The path.
    """
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: to_plain(value) for key, value in row.items()} for row in rows)
    return write_text(path, stream.getvalue())


def to_plain(obj: object, *, finite: bool = False) -> Any:
    """Return `obj` in the types that YAML and JSON know.

    Args:
        obj: mappings, sequences, arrays, numpy scalars, paths and plain values, nested.
        finite: turn NaN and infinities into None.

    Returns:
        New dicts, lists, strings, numbers, bools and None; anything else as its string.
    """
    if isinstance(obj, Mapping):
        return {
            key if isinstance(key, str | int) else str(key): to_plain(value, finite=finite)
            for key, value in obj.items()
        }
    if isinstance(obj, np.ndarray | np.generic):
        return to_plain(obj.tolist(), finite=finite)
    if isinstance(obj, list | tuple | set | frozenset):
        items = sorted(obj, key=str) if isinstance(obj, set | frozenset) else obj
        return [to_plain(item, finite=finite) for item in items]
    if isinstance(obj, float):
        return None if finite and not math.isfinite(obj) else float(obj)
    if obj is None or isinstance(obj, bool):
        return obj
    if isinstance(obj, int):
        return int(obj)
    return str(obj)


def check_writable(folder: Path | str) -> Path:
    """Make `folder` if need be and prove that a file can be written there.

    Raises:
        ResourceError: it cannot.
    """
    folder = Path(folder)
    probe = _temporary_name(folder / "probe")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"probe")
    except OSError as error:
        mapped = _as_resource_error(error, folder, probe)
        if mapped is None:
            raise
        raise mapped from error
    finally:
        _unlink(probe)
    return folder


def check_free_bytes(folder: Path | str, needed_bytes: int) -> None:
    """Refuse to start work whose result would not fit on the disk.

    Args:
        folder: where it will be written; the nearest folder above it that exists is asked.
        needed_bytes: what will be written; a tenth is added.

    Raises:
        ResourceError: less than that is free.
    """
    existing = Path(folder).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    wanted = needed_bytes + needed_bytes // 10
    if free < wanted:
        raise ResourceError(
            f"{folder}: {free / 1e6:.0f} MB free, {wanted / 1e6:.0f} MB needed; "
            f"{_REMEDIES[errno.ENOSPC]}"
        )


def remove_stale(folder: Path | str) -> list[Path]:
    """Delete temporary files under `folder` whose process is gone; return what was deleted.

    A process that began after a file was written only has the same number: after a restart of the
    machine, and in a container, where it is often the same one. Call it under the lock of the run:
    a process id means nothing on another machine.
    """
    removed = []
    for path in sorted(Path(folder).rglob(".*.tmp*")):
        match = re.fullmatch(r"\..+\.(\d+)(-\d+)?\.tmp(\..*)?", path.name)
        if match and path.is_file() and not _is_being_written(path, int(match[1])):
            _unlink(path)
            removed.append(path)
    if removed:
        logger.info("%s: removed %d unfinished files of an earlier run", folder, len(removed))
    return removed


def _is_being_written(path: Path, process_id: int) -> bool:
    """Return whether the process that has this number may be the one that writes `path`."""
    try:
        began_s = psutil.Process(process_id).create_time()
        return path.stat().st_mtime > began_s - _CLOCKS_DIFFER_S
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
    except (psutil.Error, OSError):  # a process of somebody else, on some systems
        return True


def _temporary_name(final: Path) -> Path:
    """Return a name that no other process or thread writes to at the same time."""
    suffixes = "".join(final.suffixes)
    stem = final.name[: len(final.name) - len(suffixes)] if suffixes else final.name
    writer = f"{os.getpid()}-{threading.get_native_id()}"
    return final.with_name(f".{stem}.{writer}.tmp{suffixes}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)  # Windows refuses to sync what is open for reading only
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut, where the system can (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot; the file itself is complete and in place.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _as_resource_error(error: OSError, final: Path, temporary: Path) -> ResourceError | None:
    """Return the ResourceError for `error`, or None where it is not about writing `final`."""
    if isinstance(error, ResourceError) or error.errno not in _REMEDIES:
        return None
    about = {str(temporary), str(final), *map(str, final.parents)}
    if isinstance(error.filename, str | Path) and str(error.filename) not in about:
        return None  # the body failed on some other file, an input for instance
    reason = os.strerror(error.errno)
    return ResourceError(f"{final}: cannot be written: {reason}; {_REMEDIES[error.errno]}")
