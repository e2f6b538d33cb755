"""A training step that sees every image at several sizes, in the memory of the largest one.

The loss is the mean of the scales' own losses plus a consistency term. Autograd would keep the
activations of every scale until the one backward pass. They need not coexist: what a scale must
know of the others are the logits, `B x K` numbers. So either each scale is done with before the
next one begins (where the others only follow the largest), or all logits are computed first, then
the gradient of the loss with respect to them, and then each scale once more, with its share of
that gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.classification.consistency import ConsistencyLoss
from pipeline.classification.scales import checked_scales, resize
from pipeline.errors import ConfigurationError
from pipeline.training.objective import Part, tell_loss, tell_prediction

__all__ = ["JointScales"]


class JointScales:
    """An objective: the loss at all scales at once, and a term for their consistency.

    The loss is `mean_s loss(z_s, y) + weight * consistency(z)`, where `z_s` are the logits of the
    images at scale `s`; it is computed in single precision at least. The prediction is that of
    the largest scale.

    Gradient, running statistics and random draws are the same whether `memory_efficient` or not,
    within rounding. A consistency whose target is the largest scale then costs nothing; with the
    target `mean` the smaller scales' forward passes are computed twice.

    Args:
        scales: sizes in pixels, two at least.
        consistency: called with the logits of all scales, the largest first.
        weight: of the consistency; 0 leaves it out.
        memory_efficient: keep the activations of one scale at a time, instead of all of them.

    Raises:
        ConfigurationError: there are fewer scales, or the weight is negative.
    """

    def __init__(
        self,
        scales: Sequence[int],
        consistency: ConsistencyLoss,
        weight: float = 1.0,
        memory_efficient: bool = True,
    ) -> None:
        self.sizes = checked_scales("scales", scales)
        if len(self.sizes) < 2:
            raise ConfigurationError(
                f"mode joint needs 2 scales or more, got {list(scales)}; add one, or set mode to "
                "single"
            )
        if not 0 <= weight < math.inf:
            raise ConfigurationError(f"consistency_weight must be 0 or more, got {weight!r}")
        self.consistency = consistency
        self.weight = weight
        self.memory_efficient = memory_efficient
        # Where no scale needs a smaller one, the largest is first. Else it is last: its
        # activations are kept while no others are there.
        self.apart = weight == 0 or consistency.target == "largest"
        self.order = self.sizes if self.apart else self.sizes[::-1]

    @property
    def facts(self) -> tuple[str, ...]:
        """What is trained at, and how, a line for the head of the log."""
        ways = {True: "one after another", False: "in two passes"}
        way = ways[self.apart] if self.memory_efficient else "in one graph"
        kind, target = self.consistency.kind, self.consistency.target
        term = f"consistency {kind} towards the {target} x {self.weight:g}"
        sizes = ", ".join(map(str, self.sizes))
        return (f"scales: {sizes} px in every step, {way}, {term if self.weight else 'no term'}",)

    def __call__(self, engine: Any, part: Part) -> tuple[Tensor, Tensor]:
        """Compute `part` at all scales."""
        if not self.memory_efficient:
            return self._in_one_graph(engine, part)
        if self.apart:
            return self._one_after_another(engine, part)
        return self._in_two_passes(engine, part)

    def _in_one_graph(self, engine: Any, part: Part) -> tuple[Tensor, Tensor]:
        made = {size: _logits(engine, part, size) for size in self.order}
        pred = made[self.sizes[0]].detach()
        tell_prediction(engine, pred)
        loss = self._loss(engine, {size: _single(z) for size, z in made.items()}, part.targets)
        tell_loss(engine, loss.detach())
        part.weighted(loss).backward()
        return pred, loss.detach()

    def _one_after_another(self, engine: Any, part: Part) -> tuple[Tensor, Tensor]:
        """Sum the gradients of terms that know of the largest scale no more than its logits."""
        pred, total = self._backward(engine, part, self.sizes[0], None)
        tell_prediction(engine, pred)
        for size in self.sizes[1:]:
            total = total + self._backward(engine, part, size, teacher=pred)[1]
        tell_loss(engine, total)
        return pred, total

    def _backward(
        self, engine: Any, part: Part, size: int, teacher: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Add one scale's gradient; return its logits and what it adds to the loss."""
        logits = _logits(engine, part, size)
        loss = engine.loss_function(_single(logits), part.targets).mean() / len(self.sizes)
        if teacher is not None and self.weight:
            share = self.weight / (len(self.sizes) - 1)
            loss = loss + share * self.consistency.towards(teacher, logits)
        part.weighted(loss).backward()
        return logits.detach(), loss.detach()

    def _in_two_passes(self, engine: Any, part: Part) -> tuple[Tensor, Tensor]:
        """Keep the largest scale's activations alone; compute the other scales once more."""
        largest, *small = self.sizes
        before: dict[int, _Moment] = {}
        made: dict[int, Tensor] = {}
        with torch.no_grad():
            for size in reversed(small):
                before[size] = _Moment(engine.network, part.inputs)
                made[size] = _logits(engine, part, size)
        kept = _logits(engine, part, largest)
        after = _Moment(engine.network, part.inputs)
        pred = made[largest] = kept.detach()
        tell_prediction(engine, pred)
        leaves = {size: _single(z).detach().requires_grad_() for size, z in made.items()}
        loss = self._loss(engine, leaves, part.targets)
        tell_loss(engine, loss.detach())
        found = torch.autograd.grad(part.weighted(loss), list(leaves.values()))
        gradients = dict(zip(leaves, found, strict=True))
        kept.backward(gradients[largest].to(kept.dtype))
        del kept
        try:
            for size in small:
                before[size].restore(engine.network)
                again = _logits(engine, part, size)
                again.backward(gradients[size].to(again.dtype))
                del again
        finally:
            after.restore(engine.network)
        return pred, loss.detach()

    def _loss(self, engine: Any, logits: Mapping[int, Tensor], targets: Tensor) -> Tensor:
        """Return the whole loss of all scales' logits."""
        own = [engine.loss_function(logits[size], targets).mean() for size in self.sizes]
        loss = torch.stack(own).mean()
        if self.weight:
            loss = loss + self.weight * self.consistency([logits[size] for size in self.sizes])
        return loss


def _logits(engine: Any, part: Part, size: int) -> Tensor:
    """Return the network's output for the images at one size."""
    images = resize(part.inputs, size)
    # A context for each pass: a cast of a weight made without gradients must not serve a later one.
    with part.autocast():
        logits: Tensor = engine.inferer(images, engine.network)
    return logits


def _single(logits: Tensor) -> Tensor:
    """Return logits in single precision, or in double as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _Moment:
    """The random generators and a network's buffers as they were once.

    A pass that is computed again must draw the same numbers, and must not move running statistics
    a second time. The buffers stay the tensors they are: a compiled network knows them.

    Args:
        network: whose buffers are kept.
        inputs: on the device whose generator is kept, beside the CPU's.
    """

    def __init__(self, network: nn.Module, inputs: Tensor) -> None:
        self.buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        self.on_cpu = torch.get_rng_state()
        self.device = inputs.device
        self.on_device = _device_generator(inputs.device, "get_rng_state")

    @torch.no_grad()
    def restore(self, network: nn.Module) -> None:
        """Bring it back."""
        torch.set_rng_state(self.on_cpu)
        if self.on_device is not None:
            _device_generator(self.device, "set_rng_state", self.on_device)
        present = dict(network.named_buffers())
        for name, value in self.buffers.items():
            present[name].copy_(value)


def _device_generator(device: torch.device, action: str, *values: Tensor) -> Tensor | None:
    """Get or set the state of the generator that draws on `device`; None where it is the CPU's."""
    # By name: torch's own `get_device_states` fails on MPS, which has one device and names none.
    module = None if device.type == "cpu" else getattr(torch, device.type, None)
    if module is None:
        return None
    place = () if device.type == "mps" else (device,)
    state: Tensor | None = getattr(module, action)(*values, *place)
    return state
