"""Networks that look at whole images and give one row of numbers for each, such as classifiers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from monai.inferers import Inferer
from torch import Tensor

from pipeline.inference.backends import Backend
from pipeline.inference.prepared import PreparedNetwork

__all__ = ["WholeImages"]


class WholeImages(Inferer):
    """Run a network on whole images, several at a time, as `SlidingWindow` does on windows.

    Args:
        sw_batch_size: images per pass; `auto`: as many as memory allows.
        backend: what runs the network: `torch`, `openvino`, `onnxruntime`, `auto`, or a `Backend`.
        devices: several devices that share the images; None: the input's.
        tune_allocator: on a CPU, have glibc keep large blocks.
    """

    def __init__(
        self,
        sw_batch_size: int | Literal["auto"] = 1,
        *,
        backend: str | Backend = "torch",
        devices: Sequence[str] | None = None,
        tune_allocator: bool = True,
    ) -> None:
        self._prepared = PreparedNetwork(
            backend, sw_batch_size, devices, tune_allocator=tune_allocator, spatial=False
        )

    @property
    def backend(self) -> Backend:
        """What runs the network."""
        return self._prepared.backend

    def __call__(
        self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Return rows `(B, K)` for images `(B, C, H, W)`, in the form the network gives them.

        Raises:
            ConfigurationError: the network gives something else.
            ResourceError: one image does not fit into memory.
        """
        images = torch.as_tensor(inputs).as_subclass(Tensor)
        passes = self._prepared.passes(network, images[:1], args, kwargs)
        found = [outputs for _, outputs in passes.run(enumerate(images)) if outputs is not None]
        if passes.structure is None:
            raise RuntimeError("no image was run")
        stacked = [torch.stack(parts).float() for parts in zip(*found, strict=True)]
        return passes.structure.restore(stacked)

    def settings(self) -> dict[str, Any]:
        """Return what was asked for and determines the result, as plain data."""
        return {"images": "whole", "backend": self.backend.request()}
