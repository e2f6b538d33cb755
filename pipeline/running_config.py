"""The configuration that MONAI is building at this moment, as plain text and numbers.

MONAI gives a configuration no access to itself, yet a checkpoint must carry its network definition
and a run must write the settings it ran with. An expression such as `$running_config()` is called
from inside the resolver, so the parser that is at work stands a few frames up the stack.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from pipeline.errors import ConfigurationError

__all__ = ["RunningConfig", "running_config"]

logger = logging.getLogger(__name__)

SEPARATOR = "::"
STEPS = frozenset({"imports", "initialize", "run", "finalize"})
_OPEN = object()  # what an expression gives that has no plain value


def running_config() -> RunningConfig:
    """Return the configuration that MONAI is instantiating, called from one of its expressions.

    Raises:
        ConfigurationError: no bundle configuration is being built.

    Example:
        In a config: `network_text: $running_config().plain('network_def')`.
    """
    monai_parser = sys.modules.get("monai.bundle.config_parser")
    if monai_parser is not None:
        for owner in _owners():
            if isinstance(owner, monai_parser.ConfigParser):
                return RunningConfig(owner)
    raise ConfigurationError(
        "running_config() was called outside a bundle run: call it from an expression of a "
        "bundle's config, such as `$running_config().plain('network_def')`"
    )


class RunningConfig:
    """A configuration as written, and with what is plain in it resolved.

    Args:
        parser: the `monai.bundle.ConfigParser` that holds the merged configuration.
    """

    def __init__(self, parser: Any) -> None:
        self._parser = parser

    @property
    def raw(self) -> dict[str, Any]:
        """The merged configuration after macros, with references and expressions as text."""
        return deepcopy(dict(self._parser.get()))

    def plain(self, id: str) -> Any:
        """Return the subtree `id` with references and expressions replaced by plain values.

        Plain are None, booleans, numbers, strings, and lists and mappings of these. A reference to
        a definition is replaced by the text of the definition, so that the result can be built
        elsewhere; a reference or expression with another value (`@device`) stays as its text.

        Args:
            id: where the subtree starts, such as `network_def` or `train::trainer`.

        Raises:
            ConfigurationError: the configuration has no such id.
        """
        found = self._parser.ref_resolver.normalize_id(id)
        if found not in self._parser:
            raise ConfigurationError(f"{id}: no such id in the running configuration")
        return _Walk(self._parser, expand=True).value(found)

    def maker(self, id: str, leave_out: Sequence[str] = ()) -> Callable[..., Any]:
        """Return a function that builds the definition `id` anew at every call.

        Args:
            id: of a definition, such as `network_def`.
            leave_out: arguments that the call gives, or that do not matter.

        Raises:
            ConfigurationError: there is no such id, or an argument is not plain.

        Example:
            `make = running_config().maker('optimizer', leave_out=['params'])`, then
            `make(network.parameters())`.
        """
        self.plain(f"{id}::_target_")  # there is such an id
        # Each by itself: what is left out may stand for much that must not be built now.
        kept = [key for key in self._parser[id] if key not in leave_out]
        text = {key: self.plain(f"{id}::{key}") for key in kept}
        for key, value in text.items():
            if _is_open(value):
                raise ConfigurationError(
                    f"{id}::{key} is {value}, which has no plain value to build another {id} "
                    "from; write a number, a text or a list"
                )
        parser = type(self._parser)({"made": {**text, "_mode_": "callable"}})
        made: Callable[..., Any] = parser.get_parsed_content("made")
        return made

    def resolved(self) -> dict[str, Any]:
        """Return the whole configuration with what is plain resolved, everything else as written.

        Nothing is instantiated for it: a reference to a definition stays a reference, and an
        expression is evaluated only where all it refers to is plain. Steps (`run` and its aliases)
        and MONAI's `_meta_` are not values and stay as they are, or out.
        """
        walk = _Walk(self._parser, expand=False)
        return {key: walk.value(key) for key in self._parser.get() if key != "_meta_"}


class _Walk:
    """One pass over a parser's text.

    Args:
        parser: the parser at work.
        expand: replace references to definitions by their text and evaluate every expression,
            which builds what the expression needs; otherwise build nothing.
    """

    def __init__(self, parser: Any, *, expand: bool) -> None:
        self.parser = parser
        self.resolver = parser.ref_resolver
        self.expand = expand
        self.busy = _ids_in_progress(self.resolver)
        self.steps = set() if expand else _step_ids(parser)
        self.trail: list[str] = []

    def value(self, id: str) -> Any:
        """Return what stands at `id`, as plain as this pass makes it."""
        return self._value(id, self.parser[id])

    def _value(self, id: str, config: Any) -> Any:
        if id.split(SEPARATOR, 1)[0] in self.steps:
            return deepcopy(config)
        if isinstance(config, dict):
            return {k: self._value(f"{id}{SEPARATOR}{k}", v) for k, v in config.items()}
        if isinstance(config, (list, tuple)):
            return [self._value(f"{id}{SEPARATOR}{k}", v) for k, v in enumerate(config)]
        if isinstance(config, str) and config.startswith("$"):
            value = self._expression(id, config)
            return config if value is _OPEN else value
        if isinstance(config, str) and self.resolver.match_refs_pattern(config):
            return self._reference(config)
        value = _plain(config)
        return str(config) if value is _OPEN else value

    def _reference(self, text: str) -> Any:
        target = self.resolver.normalize_id(text[1:])
        if target in self.trail or target in self.busy or target not in self.parser:
            return text
        self.trail.append(target)
        value = self.value(target)
        self.trail.pop()
        if isinstance(value, str) and value.startswith(("$", "@")):
            return text
        return text if not self.expand and _has_open_part(value) else value

    def _expression(self, id: str, text: str) -> Any:
        if "running_config" in text:  # the configuration is not repeated inside itself
            return _OPEN
        if id in self.resolver.resolved_content:
            return _plain(self.resolver.resolved_content[id])
        if self._needs_busy(id, set()):  # what is being built right now would wait for itself
            return _OPEN
        if self.expand:
            return _plain(self.resolver.get_resolved_content(id))
        if any(
            _is_open(self._reference(f"@{ref}")) for ref in self.resolver.match_refs_pattern(text)
        ):
            return _OPEN
        try:
            return _plain(self.resolver.get_resolved_content(id))
        except RuntimeError as error:  # an id that this run does not use may not be computable
            logger.debug("%s stays as written: %s", id, error)
            return _OPEN

    def _needs_busy(self, id: str, seen: set[str]) -> bool:
        if id in self.busy:
            return True
        if id in seen or id not in self.parser:
            return False
        seen.add(id)
        needed = self.resolver.find_refs_in_config(config=self.parser[id], id=id)
        return any(self._needs_busy(ref, seen) for ref in needed)


def _plain(value: Any) -> Any:
    """Return `value` in YAML's own types, or `_OPEN` where it has no such form."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, dict):
        items = {key: _plain(item) for key, item in value.items()}
        open_part = any(item is _OPEN for item in items.values())
        return _OPEN if open_part or not all(isinstance(key, str) for key in items) else items
    if isinstance(value, (list, tuple)):
        parts = [_plain(item) for item in value]
        return _OPEN if any(item is _OPEN for item in parts) else parts
    return _OPEN


def _is_open(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("$", "@"))


def _has_open_part(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or any(_has_open_part(item) for item in value.values())
    if isinstance(value, list):
        return any(_has_open_part(item) for item in value)
    return _is_open(value)


def _frames() -> Iterator[FrameType]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


def _owners() -> Iterator[Any]:
    """Yield the objects whose methods are running, innermost first."""
    for frame in _frames():
        yield frame.f_locals.get("self")


def _ids_in_progress(resolver: Any) -> set[str]:
    """Return the ids that `resolver` is building at this moment."""
    busy: set[str] = set()
    for frame in _frames():
        names = frame.f_locals
        owner: Any = names.get("self")
        if frame.f_code.co_name == "_resolve_one_item" and owner is resolver:
            busy.update(names.get("waiting_list") or ())
            busy.add(resolver.normalize_id(names["id"]))
    return busy


def _step_ids(parser: Any) -> set[str]:
    """Return the top-level ids that are things to do: `run`, its aliases and its neighbours."""
    steps = set(STEPS)
    for owner in _owners():
        if hasattr(type(owner), "check_properties"):  # a MONAI workflow names its own step ids
            steps.update(getattr(owner, name, "run") for name in ("init_id", "run_id", "final_id"))
    config = parser.get()
    done = [config[name] for name in steps if name in config]
    aliases = {f"{sign}{name}" for name in steps for sign in "@%"}
    return steps | {
        key
        for key, value in config.items()
        if (isinstance(value, str) and value in aliases)
        or (isinstance(value, list) and value in done)
    }
