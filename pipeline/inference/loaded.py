"""A bundle's inference parts, called one after the other on an array."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import lamina_cause

__all__ = ["LoadedBundle"]


class LoadedBundle:
    """Preprocessing, network, inferer and postprocessing as one function of an image.

    Args:
        predictor: the network with its weights, or several of them.
        preprocessing: from `{"image": array}` to a tensor `(C, H, W)` under `image`.
        inferer: called with a batch and the network.
        postprocessing: from logits under `pred`, beside what `preprocessing` left, to a probability
            in the image's own frame.
        threshold: probability from which on `mask` is true; None gives no mask.
        device: where the network computes.
    """

    def __init__(
        self,
        predictor: torch.nn.Module,
        *,
        preprocessing: Any,
        inferer: Any,
        postprocessing: Any,
        device: torch.device,
        threshold: float | None = None,
    ) -> None:
        self.predictor = predictor.to(device).eval()
        self.preprocessing = preprocessing
        self.inferer = inferer
        self.postprocessing = postprocessing
        self.threshold = threshold
        self.device = device

    def __call__(self, image: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Return what is found in an image.

        Args:
            image: `(H, W)` or `(H, W, 3)`, uint8, uint16, or floats between 0 and 1.

        Returns:
            `pred`, the probability `(H, W)`, and `mask`, where it reaches the threshold; where
            there is none, `pred` alone, what postprocessing makes of the logits.

        Raises:
            InputError: the array is no image that the bundle takes.
        """
        try:
            case = self.preprocessing({"image": image})
            with torch.inference_mode():
                logits = self.inferer(case["image"][None].to(self.device), self.predictor)
                result = self.postprocessing({**case, "pred": logits[0].cpu()})
        except RuntimeError as error:  # MONAI wraps what a transform raises
            failure = lamina_cause(error)
            if failure is None:
                raise
            raise failure from None
        probability = np.asarray(result["pred"])
        if probability.shape[0] == 1:
            probability = probability[0]
        found = {"pred": probability}
        return found if self.threshold is None else {**found, "mask": probability >= self.threshold}
