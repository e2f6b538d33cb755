"""Sliding windows over images of any size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from pipeline.errors import ConfigurationError
from pipeline.inference.accumulation import Slab
from pipeline.inference.backends import Backend
from pipeline.inference.blending import WEIGHTS, Weights
from pipeline.inference.passes import Passes
from pipeline.inference.prepared import PreparedNetwork
from pipeline.inference.windows import Grid, Overlap, check_overlap, make_grid

__all__ = ["SlidingWindow"]


class SlidingWindow(Inferer):
    """Run a network window by window and blend the overlaps.

    With `gaussian` weights the result is that of MONAI's SlidingWindowInferer, up to rounding. Sums
    are float32, or float64 where the network gives that, whatever the input's type; neither the
    input nor the network's outputs are written to.

    Args:
        roi_size: window, in pixels or voxels per axis.
        overlap: share of a window that its neighbour covers, in [0, 1), or a whole number of
            voxels; for all axes, or one per axis.
        weights: `gaussian`, `separable` (faster and lighter, another result near the borders of
            windows) or `constant`; see `Blending`.
        sw_batch_size: windows per forward pass; `auto`: as many as memory allows.
        even: spread the windows evenly instead of moving the last one inwards.
        small: an image smaller than a window is padded and the result cropped (`pad`), or the
            window shrinks to the image (`shrink`).
        padding_mode: of `small: pad`, as in `torch.nn.functional.pad`; `constant` pads zeros.
        skip_below: windows with no value above this are not run; None runs all.
        empty_value: what windows that are not run predict, in every channel.
        backend: what runs the network: `torch`, `openvino`, `onnxruntime`, `auto`, or a `Backend`
            with settings of its own.
        devices: several devices that share the windows; None: the input's.
        accumulate_on: device of the sums; None: the input's. Where its memory runs out, the CPU.
        tune_allocator: on a CPU, have glibc keep large blocks: twice as fast, same results, and
            memory returns to the system when the process ends.
        progress: show a bar on a terminal.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        overlap: Overlap = 0.25,
        weights: Weights = "gaussian",
        sw_batch_size: int | Literal["auto"] = 1,
        *,
        even: bool = False,
        small: Literal["pad", "shrink"] = "pad",
        padding_mode: str = "constant",
        skip_below: float | None = None,
        empty_value: float = 0.0,
        backend: str | Backend = "torch",
        devices: Sequence[str] | None = None,
        accumulate_on: str | None = None,
        tune_allocator: bool = True,
        progress: bool = False,
    ) -> None:
        if min(roi_size, default=0) < 1:
            raise ConfigurationError(f"roi_size must be positive, got {list(roi_size)}")
        if weights not in WEIGHTS:
            raise ConfigurationError(
                f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}"
            )
        if small not in ("pad", "shrink"):
            raise ConfigurationError(f"small must be pad or shrink, got {small!r}")
        check_overlap(overlap, roi_size)
        self.roi_size = tuple(roi_size)
        self.overlap = overlap
        self.weights = weights
        self.even = even
        self.small = small
        self.padding_mode = padding_mode
        self.skip_below = skip_below
        self.empty_value = empty_value
        self.accumulate_on = accumulate_on
        self.progress = progress
        self._prepared = PreparedNetwork(
            backend, sw_batch_size, devices, tune_allocator=tune_allocator
        )

    @property
    def backend(self) -> Backend:
        """What runs the network."""
        return self._prepared.backend

    def __call__(
        self,
        inputs: Tensor,
        network: Callable[..., Any],
        *args: Any,
        mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the blended output for `inputs`.

        Args:
            inputs: `(B, C, *spatial)` of any type.
            network: from windows `(N, C, *roi)` to a tensor `(N, C', *roi)`, or a tuple or
                dictionary of such tensors.
            *args: go to the network, with every window.
            mask: `(B, 1, *spatial)`; windows without a value other than 0 are not run.
            **kwargs: go to the network, with every window.

        Returns:
            Tensors `(B, C', *spatial)` in the form the network gives them.

        Raises:
            ConfigurationError: `roi_size` does not suit the image, or the network's output is not
                of the window's size.
            ResourceError: one window does not fit into memory.
        """
        spatial = tuple(inputs.shape[2:])
        grid = self.grid(spatial)
        low = [(n - s) // 2 for n, s in zip(grid.size, spatial, strict=True)]
        crop: Any = (..., *(slice(a, a + s) for a, s in zip(low, spatial, strict=True)))
        image = self._padded(torch.as_tensor(inputs), grid.size)
        where = None if mask is None else functional.pad(mask, _padding(mask, grid.size))
        corner = [slice(0, p) for p in grid.roi]
        first = image[(slice(0, 1), slice(None), *corner)]
        passes = self.passes(network, first, args, kwargs)
        blended = [
            self._blend(image[b], None if where is None else where[b], grid, passes)
            for b in range(len(image))
        ]
        outputs = [
            torch.stack(parts) if len(parts) > 1 else parts[0][None]
            for parts in zip(*blended, strict=True)
        ]
        if passes.structure is None:
            raise RuntimeError("no window was run")
        return passes.structure.restore([_like(out[crop], inputs) for out in outputs])

    def _blend(
        self, image: Tensor, mask: Tensor | None, grid: Grid, passes: Passes
    ) -> list[Tensor]:
        """Return the blended outputs `(C', *size)` of one image `(C, *size)`."""
        slab = Slab(grid, self.weights, None, self.accumulate_on or image.device, self.empty_value)
        passes.release = slab.move_to_cpu
        starts = itertools.chain.from_iterable(map(grid.row, grid.starts[0]))
        bar = tqdm(starts, total=grid.count, desc="windows", disable=not self.progress or None)
        windows = ((start, self.cut(image, start, grid.roi, mask)) for start in bar)
        for start, outputs in passes.run(windows):
            if grid.count == 1 and outputs is not None:
                return [_whole(output, image) for output in outputs]
            slab.add(start, outputs)
        if not slab.sums:  # nothing but empty windows: one tells how many channels there are
            box = tuple(slice(0, p) for p in grid.roi)
            ((_, outputs),) = passes.run([((), image[(slice(None), *box)])])
            slab.begin(outputs or ())
        return slab.take(slab.depth)

    def cut(
        self, image: Tensor, start: Sequence[int], roi: Sequence[int], mask: Tensor | None = None
    ) -> Tensor | None:
        """Return the window `(C, *roi)` at `start`; None where it is empty."""
        box = (slice(None), *(slice(s, s + p) for s, p in zip(start, roi, strict=True)))
        window = image[box]
        if mask is not None and not mask[box].any():
            return None
        if self.skip_below is not None and not bool((window > self.skip_below).any()):
            return None
        return window

    def _padded(self, image: Tensor, size: Sequence[int]) -> Tensor:
        if tuple(image.shape[2:]) == tuple(size):
            return image
        return functional.pad(image, _padding(image, size), self.padding_mode)

    def grid(self, spatial: Sequence[int]) -> Grid:
        """Return the windows over an image of `spatial` size, which may be padded to hold one."""
        if len(spatial) != len(self.roi_size):
            raise ConfigurationError(
                f"roi_size {list(self.roi_size)} has {len(self.roi_size)} axes, the image "
                f"{list(spatial)} has {len(spatial)}; give one size per axis"
            )
        if self.small == "pad":
            size = [max(pair) for pair in zip(self.roi_size, spatial, strict=True)]
            return make_grid(size, self.roi_size, self.overlap, even=self.even)
        roi = [min(pair) for pair in zip(self.roi_size, spatial, strict=True)]
        overlaps = check_overlap(self.overlap, self.roi_size)
        # Along an axis where the window shrinks it stands alone.
        shares = [o if r == n else 0 for o, r, n in zip(overlaps, roi, self.roi_size, strict=True)]
        return make_grid(spatial, roi, shares, even=self.even)

    def passes(
        self,
        network: Callable[..., Any],
        window: Tensor,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Passes:
        """Return what runs `network` on windows; see `PreparedNetwork.passes`."""
        return self._prepared.passes(network, window, args, kwargs)

    def settings(self) -> dict[str, Any]:
        """Return what was asked for and determines the result, as plain data.

        What the backend made of it stands in `backend.settings()`.
        """
        return {
            "roi_size": list(self.roi_size),
            "overlap": list(self.overlap) if isinstance(self.overlap, Sequence) else self.overlap,
            "weights": self.weights,
            "even": self.even,
            "small": self.small,
            "padding_mode": self.padding_mode,
            "skip_below": self.skip_below,
            "empty_value": self.empty_value,
            "backend": self.backend.request(),
        }


def _padding(image: Tensor, size: Sequence[int]) -> list[int]:
    """Return the padding of `image` to `size`, last axis first: half on either side."""
    lacks = [n - s for n, s in zip(size, image.shape[2:], strict=True)]
    return [side for lack in reversed(lacks) for side in (lack // 2, lack - lack // 2)]


def _whole(output: Tensor, image: Tensor) -> Tensor:
    """Return the output of a window that is the image, in a type and memory of its own."""
    own = output.to(torch.promote_types(output.dtype, torch.float32))
    aliased = own.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()
    return own.clone() if aliased else own


def _like(output: Tensor, inputs: Tensor) -> Tensor:
    """Return `output` with the metadata of `inputs`, where it has any."""
    if not isinstance(inputs, MetaTensor):
        return output
    described: MetaTensor = MetaTensor(output).copy_meta_from(inputs, copy_attr=False)
    return described
