"""What a checkpoint may ask to be built.

A configuration is code: MONAI calls any `_target_` and evaluates any `$` expression. Definitions
inside a checkpoint come from a file that somebody sends, so only networks and transforms of Lamina,
MONAI and torch, with plain arguments, are taken from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.errors import CheckpointError

__all__ = ["build_network", "check_definitions"]

_ALLOWED = re.compile(
    r"[A-Za-z]\w*"  # a bare name, which MONAI looks up among its own components
    r"|monai\.(networks|transforms)(\.\w+)+"
    r"|pipeline\.\w+\.(networks|transforms)(\.\w+)+"
    r"|torch\.nn\.[A-Z]\w*"
)
_MARKS = ("$", "@", "%")


def check_definitions(definitions: object, source: object) -> None:
    """Refuse definitions that could run more than a constructor with plain arguments.

    Args:
        definitions: nested lists and mappings, such as a checkpoint's `network_def`.
        source: the checkpoint, for the message.

    Raises:
        CheckpointError: a foreign `_target_`, an expression, a reference or a macro.
    """
    for found in _forbidden(definitions):
        raise CheckpointError(
            f"{source}: its definitions hold {found}; only networks and transforms of pipeline, "
            "monai and torch.nn with plain arguments are built from a checkpoint; do not use it"
        )


def build_network(content: Mapping[str, Any], source: object) -> Any:
    """Return the network that a checkpoint defines, without its weights.

    Args:
        content: what `read_checkpoint` returned.
        source: the checkpoint, for messages.

    Raises:
        CheckpointError: it defines none, or one that could run other code.
    """
    from monai.bundle import ConfigParser

    definition = content.get("network_def")
    if not isinstance(definition, Mapping):
        raise CheckpointError(f"{source}: defines no network (network_def); use another checkpoint")
    check_definitions(definition, source)
    return ConfigParser({"network_def": dict(definition)}).get_parsed_content("network_def")


def _forbidden(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in _forbidden_entry(str(key), item)]
    if isinstance(value, list | tuple):
        return [found for item in value for found in _forbidden(item)]
    if isinstance(value, str) and value.startswith(_MARKS):
        return [f"the expression {value[:60]!r}"]
    return []


def _forbidden_entry(key: str, value: Any) -> list[str]:
    if key == "_target_":
        known = isinstance(value, str) and _ALLOWED.fullmatch(value)
        return [] if known else [f"_target_: {str(value)[:60]!r}"]
    if key.startswith(("_", *_MARKS)):
        return [f"the key {key[:60]!r}"]
    return _forbidden(value)
