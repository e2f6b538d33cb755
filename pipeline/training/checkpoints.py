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
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.atomic import write_bytes, write_text
from pipeline.errors import CheckpointError

__all__ = ["FORMAT", "check_definition", "load_weights", "read_checkpoint", "write_checkpoint"]

FORMAT = "lamina-checkpoint-1"

logger = logging.getLogger(__name__)


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
        for kept in (path, _checksum_file(path)):
            _keep_copy(kept, kept.with_name(kept.name.replace(path.name, keep_as, 1)))
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
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such checkpoint; train first, or point ckpt_path at a .pt file"
        )
    data = path.read_bytes()
    _verify(path, data)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors and plain data and was not loaded; "
            "only use checkpoints written by Lamina, from a source that you trust"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: not a readable PyTorch file ({len(data)} bytes); restore it or train again"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = (
            content.get("format", "no format entry") if isinstance(content, dict) else type(content)
        )
        raise CheckpointError(f"{path}: found {found}, expected a Lamina checkpoint ({FORMAT})")
    return content


def load_weights(
    network: nn.Module, content: Mapping[str, Any], source: str | Path = "checkpoint"
) -> None:
    """Copy a checkpoint's `model` into `network`; every tensor must fit.

    Raises:
        CheckpointError: names or shapes differ: this is another architecture, not damage.
    """
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
            f"{_remedy(overlay)}"
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
        overlay = content.get("architecture", "default")
        raise CheckpointError(
            f"{source}: its {key} is {_described(expected)} and the configuration's is "
            f"{_described(found)}: {_remedy(overlay)}"
        )


def _remedy(overlay: str) -> str:
    merge = (
        "without an overlay" if overlay == "default" else f"with configs/{overlay}.yaml merged in"
    )
    return (
        f"run {merge}, or use `python -m pipeline predict` or `evaluate`, "
        "which take network and preprocessing from the checkpoint"
    )


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


def _keep_copy(path: Path, copy: Path) -> None:
    """Give `path` a second name; neither name is ever missing or half-written."""
    if not path.exists():
        return
    temporary = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(path)
    except OSError:  # a file system without hard links
        shutil.copy2(path, temporary)
    temporary.replace(copy)


def _checksum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _verify(path: Path, data: bytes) -> None:
    checksum = _checksum_file(path)
    if checksum.exists():
        if checksum.read_text(encoding="utf-8").split()[:1] == [hashlib.sha256(data).hexdigest()]:
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
    except zipfile.BadZipFile as error:
        return str(error)
    return f"checksum of {broken} fails" if broken else ""
