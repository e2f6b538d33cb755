"""What makes two jobs parts of one streamed run, and what the result says of its making."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.data.atomic import to_plain
from pipeline.data.checksums import text_sha256
from pipeline.data.volumes import Volume
from pipeline.inference.finishing import Finish
from pipeline.inference.sliding_window import SlidingWindow
from pipeline.inference.stream_plan import StreamPlan

__all__ = ["agreement_of", "differences", "made_with", "now"]

_FORMAT = "lamina-stream-1"
# They do not change a voxel: a whole result is the same one however it was cut.
_NOT_COMPARED = {"blocks", "record"}


def agreement_of(
    source: Volume,
    mask: Volume | None,
    inferer: SlidingWindow,
    finish: Finish,
    plan: StreamPlan,
    layout: Mapping[str, Any],
    identity: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return what all jobs of a run must have in common, as plain data.

    It holds what was asked for, and nothing that differs between machines.

    Args:
        source: the volume; told by name, size and time, since a hash of terabytes takes hours.
        mask: where windows are run, or None.
        inferer: the windows.
        finish: the last step.
        plan: the blocks.
        layout: of the result: chunks, shards, levels, ...
        identity: what stands for the network and its preparation.
    """
    edges = json.dumps(plan.edges)
    plain: dict[str, Any] = to_plain(
        {
            "format": _FORMAT,
            "source": _described(source),
            "mask": None if mask is None else _described(mask),
            "inferer": {**inferer.settings(), "backend": inferer.backend.request()},
            "finish": finish.settings(),
            "channels": plan.channels_out,
            "identity": identity or {},
            # Thousands of blocks would be a long list.
            "blocks": {"count": plan.count, "sha256": text_sha256(edges)},
            **layout,
        }
    )
    # As it comes back from a file: JSON has no whole numbers among keys.
    returned: dict[str, Any] = json.loads(json.dumps(plain))
    return returned


def differences(found: Any, wanted: Mapping[str, Any], *, whole: bool = False) -> list[str]:
    """Return the settings in which `found` is not `wanted`, by name, `a.b` where they are nested.

    Args:
        found: an agreement, or anything else.
        wanted: an agreement.
        whole: leave out what does not matter once a result is whole.
    """
    if not isinstance(found, Mapping):
        return ["format"]
    left_out = _NOT_COMPARED if whole else {"record"}
    return [name for name in _different(found, wanted) if name.partition(".")[0] not in left_out]


def made_with(inferer: SlidingWindow) -> dict[str, Any]:
    """Return what computes here: versions, and the backend in use."""
    made: dict[str, Any] = to_plain(
        {
            "lamina": importlib.metadata.version("lamina"),
            "torch": str(torch.__version__),
            "backend": inferer.backend.settings(),
        },
        finite=True,
    )
    return made


def now() -> str:
    """Return the time, in UTC and seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _described(volume: Volume) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": volume.path.name,
        "key": volume.key,
        "shape": volume.shape,
        "channels": volume.channels,
        "dtype": str(volume.dtype),
    }
    return {**described, **_file_facts(volume.path)}


def _file_facts(path: Path) -> dict[str, Any]:
    """Return size and time of a file; those of a folder change with what else lies in it."""
    if path.is_dir():
        return {}
    found = path.stat()
    modified = datetime.datetime.fromtimestamp(int(found.st_mtime), datetime.UTC)
    return {"bytes": found.st_size, "modified": modified.isoformat()}


def _different(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    names = []
    for key in dict.fromkeys([*wanted, *found]):
        one, other = found.get(key), wanted.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            names += [f"{key}.{name}" for name in _different(one, other)]
        elif one != other:
            names.append(str(key))
    return names
