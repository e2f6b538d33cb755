"""Test-time augmentation: a network's mean over flipped and turned windows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.errors import ConfigurationError
from pipeline.inference.averages import Activation, Average, Domain, check_domain

__all__ = ["FlipsAndTurns", "Orientation", "orientations"]


@dataclass(frozen=True)
class Orientation:
    """A way to lay a window down: its spatial axes in another order, some of them reversed.

    Args:
        order: which of the window's axes stands at each place.
        reversed: whether the axis at that place runs backwards.
    """

    order: tuple[int, ...]
    reversed: tuple[bool, ...]

    def apply(self, window: Tensor) -> Tensor:
        """Return `window` `(B, C, *spatial)` so laid down."""
        turned = window.permute(0, 1, *(2 + axis for axis in self.order))
        return self._flip(turned)

    def undo(self, output: Tensor) -> Tensor:
        """Return `output`, of a window so laid down, as it would be of the window itself.

        One without spatial axes, `(B, C)`, stays as it is.
        """
        if output.ndim == 2:
            return output
        if output.ndim != 2 + len(self.order):
            raise ConfigurationError(
                f"an output of shape {list(output.shape)} cannot be turned back: expected "
                f"{len(self.order)} spatial axes behind batch and channel, or none"
            )
        places = sorted(range(len(self.order)), key=self.order.__getitem__)
        return self._flip(output).permute(0, 1, *(2 + place for place in places))

    def then(self, second: Orientation) -> Orientation:
        """Return this one followed by `second`."""
        order = tuple(self.order[place] for place in second.order)
        backwards = (self.reversed[place] for place in second.order)
        pairs = zip(backwards, second.reversed, strict=True)
        return Orientation(order, tuple(one != other for one, other in pairs))

    def _flip(self, tensor: Tensor) -> Tensor:
        axes = [2 + place for place, backwards in enumerate(self.reversed) if backwards]
        return tensor.flip(axes) if axes else tensor


class FlipsAndTurns(nn.Module):
    """A network that also sees its windows flipped and turned, and gives the mean of its answers.

    Its orientations are all that the chosen flips and quarter turns lead to, in any number and
    order, each run once: at most 8 in two dimensions and 48 in three, and that many times the work.
    So they form a group, and the mean does not depend on which of them the image came in. Without
    flips and turns the network's own output is returned.

    A window that is no cube is turned as well: the network is called with the turned shape. Turned
    back are spatial axes alone; channels are taken to mean the same in every orientation. So
    outputs whose channels are directions, such as flows, normals or gradients, must not be
    augmented. Windows are turned, further arguments are not.

    Args:
        network: from windows `(B, C, *spatial)` to logits `(B, C', *spatial)` or `(B, C')`, or a
            tuple or dictionary of such tensors.
        flips: spatial axes to reverse, counted from 0 behind batch and channel.
        turns: planes to turn by 90 degrees, as pairs of spatial axes.
        domain: what is averaged, `probability` or `logit`; see `Average`. Returned are logits.
        activation: of the network's logits, `sigmoid` or `softmax` over the channels.

    Raises:
        ConfigurationError: an axis is not a whole number from 0 on, or a plane no pair of two.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        flips: Sequence[int] = (),
        turns: Sequence[Sequence[int]] = (),
        domain: Domain = "probability",
        activation: Activation = "sigmoid",
    ) -> None:
        super().__init__()
        check_domain(domain, activation)
        planes = [tuple(plane) for plane in turns if not isinstance(plane, int)]
        if len(planes) != len(turns) or any(len(set(plane)) != 2 for plane in planes):
            raise ConfigurationError(
                f"turns must be pairs of different axes such as [0, 1], got {list(turns)}"
            )
        for axis in (*flips, *(axis for plane in planes for axis in plane)):
            if isinstance(axis, bool) or not isinstance(axis, int) or axis < 0:
                raise ConfigurationError(
                    f"flips and turns take spatial axes 0, 1, ..., got {axis!r}"
                )
        self.network = network
        self.flips = tuple(sorted(set(flips)))
        self.turns = tuple(sorted({(min(plane), max(plane)) for plane in planes}))
        self.domain = domain
        self.activation = activation

    def forward(self, window: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the mean logits of `window` `(B, C, *spatial)`, in the form the network gives."""
        ways = orientations(self.flips, self.turns, window.ndim - 2)
        if len(ways) == 1:
            return self.network(window, *args, **kwargs)
        average = Average(self.domain, self.activation)
        for way in ways:
            average.add(self.network(way.apply(window), *args, **kwargs), 1 / len(ways), way.undo)
        return average.logits()

    def settings(self) -> dict[str, Any]:
        """Return what determines the result, as plain data for a sidecar."""
        return {
            "flips": list(self.flips),
            "turns": [list(plane) for plane in self.turns],
            "domain": self.domain,
            "activation": self.activation,
        }


@functools.cache
def orientations(
    flips: tuple[int, ...], turns: tuple[tuple[int, int], ...], dimensions: int
) -> tuple[Orientation, ...]:
    """Return every orientation that flips and quarter turns lead to, the unchanged one first.

    Args:
        flips: axes to reverse.
        turns: planes to turn by 90 degrees.
        dimensions: spatial axes of a window.

    Raises:
        ConfigurationError: a window has no such axis.

    Example:
        >>> [len(orientations(*chosen, 2)) for chosen in (((0,), ()), ((0, 1), ((0, 1),)))]
        [2, 8]
    """
    largest = max((*flips, *(axis for plane in turns for axis in plane)), default=-1)
    if largest >= dimensions:
        raise ConfigurationError(
            f"flips {list(flips)} and turns {[list(plane) for plane in turns]} name axis {largest},"
            f" but a window has {dimensions} spatial axes, counted from 0"
        )
    places = range(dimensions)
    unchanged = Orientation(tuple(places), (False,) * dimensions)
    steps = [Orientation(unchanged.order, tuple(p == axis for p in places)) for axis in flips]
    for first, second in turns:
        swapped = {first: second, second: first}
        order = tuple(swapped.get(place, place) for place in places)
        steps.append(Orientation(order, tuple(place == first for place in places)))
    # An orientation is its order and directions and nothing else, so equal ones are one key.
    found = dict.fromkeys([unchanged])
    waiting = [unchanged]
    while waiting:
        current = waiting.pop()
        for reached in (current.then(step) for step in steps):
            if reached not in found:
                found[reached] = None
                waiting.append(reached)
    return tuple(found)
