"""Start training from the weights of another run: other channels, other classes, frozen parts."""

from __future__ import annotations

import difflib
import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from pipeline.errors import CheckpointError, ConfigurationError
from pipeline.training.checkpoints import read_state

__all__ = ["LoadReport", "adapt_input_channels", "freeze_parameters", "load_pretrained"]

logger = logging.getLogger(__name__)

WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put in front


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor when weights were loaded.

    Args:
        source: the checkpoint.
        loaded: copied as they are.
        adapted: copied with the input channels of the first convolution rescaled.
        reinitialised: the head for another number of classes; as the network made it.
        mismatched: of another shape anywhere else; as the network made them.
        missing: not in the checkpoint; as the network made them.
        unexpected: in the checkpoint only.
        frozen: parameters that will not be trained.
    """

    source: str
    loaded: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    reinitialised: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return one line per group that is not empty: what, how many tensors, in which parts."""
        groups = {
            "loaded": self.loaded,
            "adapted to other input channels": self.adapted,
            "head reinitialised for other classes": self.reinitialised,
            "skipped, another shape": self.mismatched,
            "not in the checkpoint, left as initialised": self.missing,
            "in the checkpoint only, skipped": self.unexpected,
            "frozen": self.frozen,
        }
        return [
            f"{self.source}: {what}: {_tensors(names)}" for what, names in groups.items() if names
        ]


def load_pretrained(
    network: nn.Module,
    path_or_state: str | Path | Mapping[str, Any],
    *,
    strict: bool = False,
    freeze: Sequence[str] = (),
    input_channels: Literal["error", "adapt"] = "error",
) -> LoadReport:
    """Copy the weights that fit from a checkpoint into `network`, and freeze parts of it.

    A tensor fits if name and shape agree. The head (`network.head_prefixes`, by default the last
    layer) keeps its initialisation where its shape differs. The first convolution
    (`network.stem_prefixes`, by default the first layer) takes other input channels by
    `adapt_input_channels`.

    Args:
        network: changed in place.
        path_or_state: a checkpoint file, its content, or a state dict.
        strict: refuse unless every tensor is loaded, or adapted as asked.
        freeze: parts by the start of their parameters' names; `encoder` stands for
            `network.encoder_prefixes` where the network has them. Frozen normalisation layers keep
            their running statistics.
        input_channels: whether another number of input channels is an error or adapted.

    Returns:
        What became of each tensor; also logged, one line per group.

    Raises:
        CheckpointError: nothing fits, the input channels differ and are not to be adapted, or
            `strict` is not met. The network is then unchanged.
        ConfigurationError: a part to freeze does not exist, or a setting has no such value.
    """
    if input_channels not in ("error", "adapt"):
        raise ConfigurationError(
            f"input_channels must be 'error' or 'adapt', got {input_channels!r}"
        )
    source, state = _state_of(path_or_state)
    chosen, groups = _match(network, state, source, adapt=input_channels == "adapt")
    report = LoadReport(source=source, **{what: tuple(names) for what, names in groups.items()})
    _refuse_if_useless(report, strict=strict)
    frozen = freeze_parameters(network, freeze)  # raises before any weight is changed
    network.load_state_dict(chosen, strict=False)
    report = LoadReport(**{**vars(report), "frozen": frozen})
    for line in report.lines():
        logger.info(line)
    return report


def adapt_input_channels(weight: Tensor, channels: int) -> Tensor:
    """Return a first convolution's `weight` for another number of input channels.

    Whole multiples repeat the channels in order; any other number takes their mean. Both scale, so
    that an image whose channels are all equal gives the same features as before.

    Args:
        weight: `(out, in, ...)`.
        channels: the new number of input channels.
    """
    before = weight.shape[1]
    if channels % before == 0:
        kernels = weight.repeat(1, channels // before, *[1] * (weight.ndim - 2))
    else:
        kernels = weight.mean(dim=1, keepdim=True).expand(-1, channels, *weight.shape[2:])
    return kernels * (before / channels)


def freeze_parameters(network: nn.Module, parts: Sequence[str]) -> tuple[str, ...]:
    """Stop training the parameters of some parts of `network`, and return their names.

    Normalisation layers among them stay in evaluation mode, also after `network.train()`: their
    running statistics would drift away from the frozen weights otherwise.

    Args:
        network: changed in place.
        parts: starts of parameter names at whole parts (`encoder.0`, not `enc`); `encoder` stands
            for `network.encoder_prefixes` where the network has them.

    Raises:
        ConfigurationError: a part matches no parameter; nothing is frozen.
    """
    if isinstance(parts, str):
        raise ConfigurationError(f"freeze must be a list of parts, got {parts!r}; write [{parts}]")
    prefixes: list[str] = []
    for part in parts:
        own = getattr(network, "encoder_prefixes", ()) if part == "encoder" else ()
        prefixes.extend(own or [part.rstrip(".")])
    parameters = dict(network.named_parameters())
    for prefix in prefixes:
        if not any(_is_part(name, [prefix]) for name in parameters):
            raise ConfigurationError(_unknown_part(prefix, parameters))
    frozen = tuple(name for name in parameters if _is_part(name, prefixes))
    for name in frozen:
        parameters[name].requires_grad_(False)
    for name, module in network.named_modules():
        if _is_part(name, prefixes) and getattr(module, "running_mean", None) is not None:
            # A partial and not a method or a hook: it survives the copy that weight averaging
            # takes, and `training` is right between two steps too.
            module.train = functools.partial(_stay_in_evaluation, module)
            module.eval()
    return frozen


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    """Take the place of `module.train` in a frozen layer: every mode is evaluation."""
    module.training = False
    return module


def _state_of(path_or_state: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Return a name for messages and the tensors of a checkpoint."""
    content = path_or_state
    source = "state dict"
    if isinstance(content, str | Path):
        source = str(content)
        content = read_state(content)
    for key in ("model", "state_dict"):
        content = content.get(key, content)
    state = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    for wrapper in WRAPPERS:
        if state and all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return source, state


def _match(
    network: nn.Module, state: Mapping[str, Tensor], source: str, *, adapt: bool
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Return the tensors to load, and the names of `LoadReport` by group."""
    own = network.state_dict()
    layers = [name for name, _ in network.named_modules() if f"{name}.weight" in own]
    stem = getattr(network, "stem_prefixes", ()) or layers[:1]
    head = getattr(network, "head_prefixes", ()) or layers[-1:]
    chosen: dict[str, Tensor] = {}
    groups: dict[str, list[str]] = {
        what: [] for what in ("loaded", "adapted", "reinitialised", "mismatched", "missing")
    }
    groups["unexpected"] = [name for name in state if name not in own]
    for name, target in own.items():
        given = state.get(name)
        if given is None:
            groups["missing"].append(name)
        elif given.shape == target.shape:
            chosen[name] = given
            groups["loaded"].append(name)
        elif _is_part(name, stem) and _differs_in_input_channels(given, target):
            if not adapt:
                raise CheckpointError(
                    f"{source}: {name} takes {given.shape[1]} input channels and the network "
                    f"{target.shape[1]}; set in_channels to {given.shape[1]}, or input_channels "
                    "to adapt"
                )
            chosen[name] = adapt_input_channels(given, target.shape[1])
            groups["adapted"].append(name)
        else:
            groups["reinitialised" if _is_part(name, head) else "mismatched"].append(name)
    return chosen, groups


def _refuse_if_useless(report: LoadReport, *, strict: bool) -> None:
    if not report.loaded:
        raise CheckpointError(
            f"{report.source}: no tensor fits the network ({len(report.missing)} missing, "
            f"{len(report.mismatched)} of another shape); build the network it was trained with"
        )
    left_out = [
        *report.reinitialised,
        *report.mismatched,
        *report.missing,
        *report.unexpected,
    ]
    if strict and left_out:
        raise CheckpointError(
            f"{report.source}: {_tensors(left_out)} do not fit the network, such as {left_out[0]}; "
            "build the network it was trained with, or pass strict=False"
        )


def _differs_in_input_channels(given: Tensor, target: Tensor) -> bool:
    return (
        given.ndim == target.ndim > 2
        and given.shape[0] == target.shape[0]
        and given.shape[2:] == target.shape[2:]
    )


def _is_part(name: str, prefixes: Sequence[str]) -> bool:
    """Return whether `name` is one of `prefixes` or lies below one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _unknown_part(prefix: str, parameters: Mapping[str, Tensor]) -> str:
    parts = list(dict.fromkeys(name.split(".")[0] for name in parameters))
    closest = difflib.get_close_matches(prefix, parts, n=1)
    hint = f"; did you mean {closest[0]}?" if closest else ""
    return f"freeze: the network has no part {prefix!r}, expected one of {', '.join(parts)}{hint}"


def _tensors(names: Sequence[str]) -> str:
    """Return `6 tensors (encoder 4, head 2)`."""
    parts = Counter(name.split(".")[0] for name in names)
    listed = ", ".join(f"{part} {count}" for part, count in parts.items())
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({listed})"
