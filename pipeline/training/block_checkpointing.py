"""Memory-efficient training: keep what goes into a network's blocks and compute the inside again.

A network keeps the output of nearly every layer for the backward pass. A checkpointed block keeps
its input alone and runs once more when its gradient is due: one more forward pass for a fraction of
the memory, with the same gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.errors import ConfigurationError

__all__ = ["checkpoint_blocks"]

logger = logging.getLogger(__name__)


def checkpoint_blocks(
    network: nn.Module, blocks: Sequence[str] | Literal["auto"] = "auto"
) -> list[str]:
    """Let blocks of `network` compute their inside again in the backward pass.

    Only training with gradients is touched: a block in evaluation mode, or without gradients, runs
    as it did. Loss, gradients, random draws and buffers are those of a network without checkpoints:
    the second run draws the same numbers, and what it does to batch norm's statistics is dropped.
    The names in the state dict stay, and a deep copy runs its own blocks.

    A block must leave its input alone: one that begins with an in-place layer makes the backward
    pass raise torch's error; name other blocks then.

    Args:
        network: changed in place.
        blocks: names of modules as `named_modules` gives them; a list or dict of modules stands for
            its items, and of a block and its parts the block counts. `auto` takes the network's
            children that have parts with parameters, and opens those that hold a list of blocks or
            wrap a single one.

    Returns:
        The names of the blocks that were changed, in the order of the network.

    Raises:
        ConfigurationError: a name is not a module of the network; the closest one is named.
    """
    chosen = dict(_blocks_in(network)) if blocks == "auto" else _named_blocks(network, blocks)
    chosen = _not_nested(network, chosen)
    for block in chosen.values():
        # Of a partial, unlike of a closure, a deep copy refers to the copied block.
        block.forward = partial(_run, block, block.forward)
    if chosen:
        logger.info(
            "memory-efficient training: %d blocks are computed again in the backward pass",
            len(chosen),
        )
    else:
        logger.warning(
            "memory-efficient training: %s has no further block to compute again, so no memory is "
            "saved", type(network).__name__,
        )  # fmt: skip
    return list(chosen)


def _run(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
    """Run `forward` of `block`, in training as a checkpoint."""
    if not (block.training and torch.is_grad_enabled()):
        return forward(*inputs, **settings)
    if torch.compiler.is_compiling():
        # It plans the second run itself, and leaves what changes buffers in the first one.
        return checkpoint(forward, *inputs, use_reentrant=False, **settings)
    contexts = partial(_contexts, block)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **settings)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], _LentBuffers]:
    """Return what surrounds the first run of `block`, and what surrounds the second."""
    return nullcontext(), _LentBuffers(block)


class _LentBuffers:
    """Lend a block copies of the buffers it has now for a later run; its own then stay as they are.

    It can be entered again, for another backward pass through the same graph.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.kept = [(owner, name, buffer.clone()) for owner, name, buffer in _buffers(block)]
        self.own: list[tuple[nn.Module, str, Tensor]] = []

    def __enter__(self) -> None:
        self.own = list(_buffers(self.block))
        for owner, name, buffer in self.kept:
            setattr(owner, name, buffer.clone())

    def __exit__(self, *error: object) -> None:
        for owner, name, buffer in self.own:
            setattr(owner, name, buffer)
        self.own = []


def _buffers(block: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield each buffer in `block` with the module that owns it and its name there."""
    for owner in block.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            yield owner, name, buffer


def _named_blocks(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules called `names`; of lists and dicts, which nobody calls, their items."""
    known = {name: part for name, part in network.named_modules(remove_duplicate=False) if name}
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ConfigurationError(
            f"blocks to checkpoint: expected auto or a list of module names, got {names!r}"
        )
    found: dict[str, nn.Module] = {}
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=1, cutoff=0.0)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigurationError(
                f"blocks to checkpoint: {type(network).__name__} has no module {name!r}{hint}"
            )
        found.update(_items(name, known[name]))
    return found


def _items(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        for part, child in module.named_children():
            yield from _items(f"{name}.{part}", child)
    else:
        yield name, module


def _blocks_in(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks of `module` by name; a single layer is none, it would save nothing."""
    for name, part in _parts(module).items():
        if _is_opened(part):
            yield from _blocks_in(part, f"{prefix}{name}.")
        elif _has_parts(part):
            yield f"{prefix}{name}", part


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    """Return the children of `module` by name; what computes a layer's weight is no part of it."""
    return {name: child for name, child in module.named_children() if name != "parametrizations"}


def _has_parts(module: nn.Module) -> bool:
    """Return whether `module` has parts with parameters."""
    return any(True for part in _parts(module).values() for _ in part.parameters())


def _is_opened(module: nn.Module) -> bool:
    """Return whether `module` is a list, has a list of blocks as a part, or wraps one block."""
    parts = list(_parts(module).values())
    return (
        isinstance(module, nn.ModuleList | nn.ModuleDict)
        or _is_list_of_blocks(module)
        or any(_is_list_of_blocks(part) for part in parts)
        or (len(parts) == 1 and _has_parts(parts[0]))
    )


def _is_list_of_blocks(module: nn.Module) -> bool:
    # A subclass of Sequential has a name because it is meant as one block.
    listed = isinstance(module, nn.ModuleList | nn.ModuleDict) or type(module) is nn.Sequential
    return listed and any(_has_parts(part) for part in _parts(module).values())


def _not_nested(network: nn.Module, chosen: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return `chosen` in the network's order, without blocks in or around a checkpointed one."""
    wanted = set(chosen.values())
    taken = {module for module in network.modules() if _is_checkpointed(module)}
    inside = {part for module in taken for part in module.modules()}
    found: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        if module in wanted and module not in inside and taken.isdisjoint(module.modules()):
            found[name] = module
            taken.add(module)
            inside.update(module.modules())
    return found


def _is_checkpointed(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is _run
