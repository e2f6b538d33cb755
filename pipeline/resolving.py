"""A configuration with its checkpoint's settings in it, and its parts built without wrapped errors.

MONAI and torch are imported inside functions, as in `bundles`, which this serves.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.definitions import check_definitions
from pipeline.errors import ConfigurationError, lamina_cause
from pipeline.running_config import RunningConfig

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

__all__ = ["build", "unwrapped", "with_checkpoint"]

Result = TypeVar("Result")
_CHECKPOINT_KEYS = {  # id in the configuration: key in the checkpoint
    "architecture": "architecture",
    "network_def": "network_def",
    "deterministic_transforms": "preprocessing",
    "threshold": "threshold",
}

logger = logging.getLogger(__name__)


def unwrapped(action: Callable[[], Result]) -> Result:
    """Return what `action` gives, and raise our own error out of MONAI's and ignite's wrapping."""
    failure: Exception | None = None
    try:
        return action()
    except Exception as error:  # they wrap anything, so anything is searched; all of it is raised
        failure = lamina_cause(error)
        if failure is None:
            raise
    raise failure


def build(parser: ConfigParser, ids: Sequence[str]) -> dict[str, Any]:
    """Return what stands at `ids`, and what that refers to, built.

    Raises:
        LaminaError: what was wrong, without MONAI's wrapping.
    """
    return unwrapped(lambda: {id: parser.get_parsed_content(id) for id in ids})


def with_checkpoint(
    config: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return `settings` on top of what the checkpoint at `ckpt_path` fixes, and the checkpoint.

    Raises:
        CheckpointError: it cannot be read.
        ConfigurationError: an override would change what the network was trained with.
    """
    from monai.bundle import ConfigParser

    from pipeline.training.checkpoints import check_definition, read_checkpoint

    parser = ConfigParser(deepcopy(dict(config)))
    parser.update(dict(settings))
    # the path may be an expression over other ids
    path = parser.get_parsed_content("ckpt_path") if "ckpt_path" in config else None
    if not path:
        return dict(settings), None
    checkpoint = read_checkpoint(path)
    own = (config.get("definition") or {}).get("bundle")
    if own is not None:
        check_definition(checkpoint, source=path, settings={"bundle": own})
    logger.info("network, preprocessing and threshold from %s", path)
    fixed: dict[str, Any] = {}
    for id, key in _CHECKPOINT_KEYS.items():
        if id not in config or checkpoint.get(key) is None:
            continue
        check_definitions(checkpoint[key], path)
        fixed[id] = checkpoint[key]
        used = set(re.findall(r"@(\w+)", json.dumps(config[id], default=str)))
        changed = [name for name in settings if name.split("::", 1)[0] in used]
        if changed and RunningConfig(parser).plain(id) != checkpoint[key]:
            raise ConfigurationError(
                f"--{changed[0]}: {path} was trained with another value in its {id}, and a network "
                f"is used as it was trained: leave --{changed[0]} out, or train with it"
            )
    return {**fixed, **settings}, checkpoint
