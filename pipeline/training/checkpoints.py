"""Checkpoints: what a run needs to go on, to be evaluated and to be used elsewhere.

A checkpoint is a dictionary of tensors, numbers, strings, lists and dictionaries, so that
`torch.load(weights_only=True)` reads it. It is written to a temporary file and renamed, with its
sha256 beside it (`best.pt.sha256`): PyTorch's reader does not check the archive's CRCs, so a
flipped byte would otherwise load as wrong weights.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.atomic import atomic_path, write_bytes, write_text
from pipeline.errors import CheckpointError

__all__ = [
    "FORMAT",
    "check_definition",
    "load_weights",
    "read_checkpoint",
    "read_state",
    "write_checkpoint",
]

FORMAT = "lamina-checkpoint-1"

logger = logging.getLogger(__name__)

_ARCHIVE = b"PK"  # how a zip file begins
_FOLDER_BIT = 0x10  # of a zip entry's attributes, as MS-DOS had it

# What zipfile and torch raise, besides their own errors, on a file that only looks like theirs.
_UNREADABLE = (
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


def write_checkpoint(path: str | Path, content: Mapping[str, Any], *, keep_as: str = "") -> Path:
    """Write `content` under `path`, whole or not at all, and its sha256 beside it.

    Args:
        path: the final name.
        content: plain data and tensors; `format` is added.
        keep_as: a name in the same folder that the file now under `path` is kept as.
    """
    path = Path(path)
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    data = buffer.getvalue()
    if keep_as and path.exists():
        _keep(path, path.with_name(keep_as))
    # The stale checksum goes first: a kill between the two writes leaves a file without a
    # checksum (verified by the archive's CRCs), never one beside a checksum that is not its own.
    _checksum_file(path).unlink(missing_ok=True)
    write_bytes(path, data)
    write_text(_checksum_file(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n")
    return path


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the verified content of a checkpoint, tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, holds code, or is not a Lamina checkpoint.
    """
    content = _read(path, archive=True)
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: found {content.get('format', 'no format entry')}, expected a Lamina "
            f"checkpoint ({FORMAT}); point ckpt_path at a .pt file that Lamina wrote"
        )
    return content


def read_state(path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint or a file of weights by others holds, tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, holds code, or no named tensors.
    """
    return _read(path, archive=False)


def _read(path: str | Path, *, archive: bool) -> dict[str, Any]:
    """Return a file's content; without `archive` it may be in the format that torch had before."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such checkpoint; train first, or point ckpt_path at a .pt file"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; make it readable or use another checkpoint"
        ) from error
    if archive or data.startswith(_ARCHIVE) or _checksum_file(path).exists():
        _verify(path, data)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # `from None`: torch's own text advises to load without this protection.
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: holds more than tensors and plain data and was not loaded; "
            "only use checkpoints written by Lamina, from a source that you trust"
        ) from None
    except _UNREADABLE:
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({len(data)} bytes); restore it or train again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: found {type(content).__name__}, expected a Lamina checkpoint ({FORMAT}) or "
            "named tensors; use another file"
        )
    return content


def load_weights(
    network: nn.Module, content: Mapping[str, Any], source: str | Path = "checkpoint"
) -> None:
    """Copy a checkpoint's `model` into `network`; every tensor must fit.

    Raises:
        CheckpointError: names or shapes differ: this is another architecture, not damage.
    """
    if "model" not in content:
        raise CheckpointError(f"{source}: holds no network weights; use another checkpoint")
    state: Mapping[str, Tensor] = content["model"]
    own = network.state_dict()
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    reshaped = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or unexpected or reshaped:
        overlay = content.get("architecture", "default")
        raise CheckpointError(
            f"{source}: holds another architecture than the configuration builds "
            f"({len(missing)} tensors missing, {len(unexpected)} unexpected, {len(reshaped)} of "
            f"another shape); it was trained with {_described(content.get('network_def'))}: "
            f"{_merge(overlay)}, {_OTHER_DOORS}"
        )
    network.load_state_dict(dict(state))


def check_definition(
    content: Mapping[str, Any], *, source: str | Path, settings: Mapping[str, Any]
) -> None:
    """Refuse to use a checkpoint under a configuration that disagrees with it.

    Args:
        content: what `read_checkpoint` returned.
        source: the checkpoint's path, for the message.
        settings: values of the running configuration by the checkpoint's own keys, such as
            `network_def` and `preprocessing`; keys that the checkpoint does not have are skipped.

    Raises:
        CheckpointError: a value differs; the message names the overlay to merge.
    """
    for key, found in settings.items():
        expected = content.get(key)
        if expected is None or _plain(expected) == _plain(found):
            continue
        name, its, configured = _difference(key, _plain(expected), _plain(found))
        raise CheckpointError(
            f"{source}: its {name} is {_described(its)} and the configuration's is "
            f"{_described(configured)}: {_remedy(key, content, settings)}"
        )


_OTHER_DOORS = (
    "or use `python -m pipeline predict` or `evaluate`, "
    "which take network and preprocessing from the checkpoint"
)


def _remedy(key: str, content: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    if key == "bundle":
        return f"run the bundle {content[key]}, or use a checkpoint of {settings[key]}"
    overlay = content.get("architecture", "default")
    if settings.get("architecture") == overlay:
        return f"run with the checkpoint's value, {_OTHER_DOORS}"
    return f"{_merge(overlay)}, {_OTHER_DOORS}"


def _merge(overlay: str) -> str:
    if overlay == "default":
        return "run without an overlay"
    return f"run with configs/{overlay}.yaml merged in"


def _difference(name: str, its: Any, configured: Any) -> tuple[str, Any, Any]:
    """Return where two plain values differ, and both there, so that the message stays short."""
    if isinstance(its, dict) and isinstance(configured, dict):
        target = str(its.get("_target_", "")).rsplit(".", 1)[-1]
        keys = [k for k in its | configured if its.get(k) != configured.get(k)]
        if len(keys) == 1 and keys[0] != "_target_":
            inner = " ".join(filter(None, (name, target, str(keys[0]))))
            return _difference(inner, its.get(keys[0]), configured.get(keys[0]))
    if isinstance(its, list) and isinstance(configured, list) and len(its) == len(configured):
        pairs = zip(its, configured, strict=True)
        place, (one, other) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        if isinstance(one, dict):
            return _difference(f"{name}[{place}]", one, other)
    return name, its, configured


def _described(value: Any) -> str:
    if isinstance(value, Mapping) and "_target_" in value:
        arguments = ", ".join(f"{k}={v}" for k, v in value.items() if k != "_target_")
        return f"{str(value['_target_']).rsplit('.', 1)[-1]}({arguments})"
    if isinstance(value, list):
        return f"[{', '.join(_described(item) for item in value)}]"
    return repr(value)


def _plain(value: Any) -> Any:
    """Return `value` with tuples as lists, so that YAML's and Python's spelling compare equal."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _keep(path: Path, kept: Path) -> None:
    """Give the checkpoint `path` a second name; neither name is ever missing or half-written."""
    # As above: at no moment does a checkpoint stand beside a checksum of another one.
    _checksum_file(kept).unlink(missing_ok=True)
    if not (kept.exists() and kept.samefile(path)):  # as a kill right after this leaves them
        with atomic_path(kept) as temporary:
            temporary.unlink(missing_ok=True)
            try:
                temporary.hardlink_to(path)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, temporary)
    checksum = _checksum_file(path)
    if checksum.exists():
        digest = _recorded(checksum)
        write_text(_checksum_file(kept), f"{digest}  {kept.name}\n")


def _checksum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _recorded(checksum: Path) -> str:
    """Return the digest in a checksum file, an empty string where there is none."""
    words = checksum.read_text(encoding="utf-8", errors="replace").split()
    return words[0] if words else ""


def _verify(path: Path, data: bytes) -> None:
    checksum = _checksum_file(path)
    if checksum.exists():
        if _recorded(checksum) == hashlib.sha256(data).hexdigest():
            return
        problem = f"its sha256 differs from the one in {checksum.name}"
    else:
        problem = _archive_problem(data)
    if problem:
        raise CheckpointError(
            f"{path}: damaged ({problem}; {len(data)} bytes); use another checkpoint of the run"
        )


def _archive_problem(data: bytes) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            broken = archive.testzip()
            # torch reads nothing for an entry with this bit, and leaves the tensor uninitialised.
            folders = [i.filename for i in archive.infolist() if i.external_attr & _FOLDER_BIT]
    except (zipfile.BadZipFile, *_UNREADABLE) as error:
        return f"no whole archive: {str(error) or type(error).__name__}"
    if broken:
        return f"checksum of {broken} fails"
    return f"{folders[0]} is marked as a folder" if folders else ""
