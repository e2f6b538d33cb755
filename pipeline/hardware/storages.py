"""Follow the memory that tensors hold, operator by operator, by what it is held for.

Works on real tensors and on fake ones, which have shapes, types and storages of the right size but
no data.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.hooks import RemovableHandle

from pipeline.hardware.workspaces import workspace_bytes

__all__ = ["CATEGORIES", "LiveStorages"]

CATEGORIES = (
    "parameters", "buffers", "gradients", "optimizer", "averaged", "activations", "inputs",
)  # fmt: skip
OUTSIDE = "loss"  # where no module of the network is running


@dataclass
class _Held:
    size: int
    category: str
    layer: str


class LiveStorages(TorchDispatchMode):
    """Count the bytes of all storages that are alive, while it is entered.

    A storage that several tensors share, views and in-place results, counts once. What an operator
    makes belongs to `activations` until it is claimed for something else.

    Attributes:
        peak_bytes: largest sum so far.
        allocated_bytes: the same with what operators take inside.
        at_peak: bytes by category at that moment.
        largest: the most that each category has held at any moment.
        phase: name of what is computed now, set from outside.
        timeline: phase and sum, whenever something was added.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.category = "activations"  # of what operators make now
        self.peak_bytes = 0
        self.allocated_bytes = 0
        self.at_peak: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()
        self.phase = ""
        self.timeline: list[tuple[str, int]] = []
        self._live: dict[int, _Held] = {}
        self._now: Counter[str] = Counter()
        self._total = 0
        self._layers: list[str] = []  # the modules that are running, innermost last

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count what it made."""
        result = func(*args, **(kwargs or {}))
        for part in tree_iter(result):
            if isinstance(part, Tensor):
                self._count(part, self.category, claim=False)
        inside = workspace_bytes(func, args, result)
        self.allocated_bytes = max(self.allocated_bytes, self._total + inside)
        return result

    def claim(self, tensors: Iterable[Tensor | None], category: str) -> None:
        """Count the storages of `tensors` under `category` from now on."""
        for tensor in tensors:
            if tensor is not None:
                self._count(tensor, category, claim=True)

    def claim_gradients(self, network: nn.Module) -> list[RemovableHandle]:
        """Claim each parameter's gradient as soon as it is there; return the hooks."""
        return [
            parameter.register_post_accumulate_grad_hook(
                lambda owner: self.claim([owner.grad], "gradients")
            )
            for parameter in network.parameters()
            if parameter.requires_grad
        ]

    def follow_layers(self, network: nn.Module) -> list[RemovableHandle]:
        """Note for which module of `network` a storage was made; return the hooks."""
        hooks: list[RemovableHandle] = []
        for name, module in network.named_modules():
            shown = name or type(network).__name__
            hooks.append(module.register_forward_pre_hook(_Entering(self._layers, shown)))
            # also where a block that is computed again stops early, by an exception
            hooks.append(module.register_forward_hook(_Leaving(self._layers), always_call=True))
        return hooks

    def by_layer(self) -> Counter[str]:
        """Return the bytes of activations that are alive now, by the innermost module's name."""
        found: Counter[str] = Counter()
        for held in self._live.values():
            if held.category == "activations":
                found[held.layer] += held.size
        return found

    @contextmanager
    def making(self, category: str) -> Iterator[None]:
        """Count what operators make inside under `category`."""
        before, self.category = self.category, category
        try:
            yield
        finally:
            self.category = before

    def _count(self, tensor: Tensor, category: str, claim: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        held = self._live.get(key)
        if held is None:
            if size == 0:
                return
            layer = self._layers[-1] if self._layers else OUTSIDE
            self._live[key] = _Held(size, category, layer)
            weakref.finalize(storage, self._gone, key).atexit = False
            self._add(category, size)
        elif claim and held.category != category:
            self._add(held.category, -size)
            held.category = category
            self._add(category, size)

    def _gone(self, key: int) -> None:
        held = self._live.pop(key)
        self._add(held.category, -held.size)

    def _add(self, category: str, size: int) -> None:
        self._now[category] += size
        self._total += size
        if size > 0:
            self.timeline.append((self.phase, self._total))
        self.largest[category] = max(self.largest[category], self._now[category])
        if self._total > self.peak_bytes:
            self.peak_bytes, self.at_peak = self._total, Counter(self._now)
            self.allocated_bytes = max(self.allocated_bytes, self._total)


@dataclass
class _Entering:
    running: list[str]
    name: str

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        self.running.append(self.name)


@dataclass
class _Leaving:
    running: list[str]

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.running.pop()
