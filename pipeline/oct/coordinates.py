"""From the logits of a network to the rows of ILM and BM in every column, with a confidence.

Rows count from 0 at the top; a boundary's row is the first row of the layer below it, in the frame
of the logits. H means below the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigurationError
from pipeline.oct.logits import as_array, on_gpu, refuse_non_finite, within_range
from pipeline.oct.ordered_map import Estimates, ordered_estimates
from pipeline.oct.pixel_maps import class_mask, first_transitions
from pipeline.oct.viterbi import bounded_paths

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Layers", "Method", "extract_layers", "original_extraction"]

Floats = NDArray[np.float64]

Method = Literal["map", "posterior_mean", "viterbi", "transition"]
"""How rows are read from logits."""


@dataclass(frozen=True)
class Layers:
    """The boundaries of some B-scans, each array `(B, W)`.

    Attributes:
        ilm_px: rows of the inner limiting membrane.
        bm_px: rows of Bruch's membrane, at or below `ilm_px`.
        ilm_sigma_px: posterior standard deviation of the ILM row.
        bm_sigma_px: posterior standard deviation of the BM row.
        ilm_valid: where `ilm_px` may be trusted; a writer puts NaN elsewhere.
        bm_valid: where `bm_px` may be trusted.
    """

    ilm_px: Floats
    bm_px: Floats
    ilm_sigma_px: Floats
    bm_sigma_px: Floats
    ilm_valid: NDArray[np.bool_]
    bm_valid: NDArray[np.bool_]


def extract_layers(
    logits: NDArray[Any] | Tensor,
    method: Method = "map",
    *,
    refine: bool = True,
    temperature: float = 1.0,
    max_step: int = 3,
    step_penalty: float = 1.0,
    cap: float = 30.0,
    max_sigma_px: float = 2.0,
    thickness_px: tuple[float, float] | None = None,
    thickness_um: tuple[float, float] | None = None,
    scale_y_um: float | Sequence[float] | None = None,
) -> Layers:
    """Return ILM and BM of every column, ordered and finite whatever the logits are.

    A row is valid where its sigma is at most `max_sigma_px`, it lies inside the frame (not at its
    first row and not below the last one), and the thickness lies in the window, if there is one.

    Args:
        logits: `(B, 3, H, W)`, array or tensor; classes above ILM, between, below BM.
        method: `map`, the most probable ordered pair of each column; `posterior_mean`, the expected
            one; `viterbi`, the best pair whose rows move by `max_step` at most from column to
            column; `transition`, as the original: NaN and crossing rows are possible.
        refine: replace the whole row of `map` and `viterbi` by the expected one among its
            neighbours, three on either side.
        temperature: divides the logits for the sigmas and for `posterior_mean`; above 1 for a
            network that is too sure of itself.
        max_step: rows, of `viterbi`.
        step_penalty: nats for a step of one row, growing with its square, of `viterbi`.
        cap: nats that one column can weigh at most, of `viterbi`.
        max_sigma_px: largest sigma of a valid row; infinity accepts all.
        thickness_px: least and largest plausible BM - ILM, in rows of the logits.
        thickness_um: the same in micrometres; needs `scale_y_um`.
        scale_y_um: height of a pixel of the logits' frame, one for all or one per image.

    Raises:
        ConfigurationError: a setting is out of its range.
        InputError: shape or type of the logits is another one, or one of them is not finite.
    """
    _check_settings(method, temperature, max_step, step_penalty, cap, max_sigma_px)
    window = _thickness_window(thickness_px, thickness_um, scale_y_um, len(logits))
    estimates, values = _estimates(logits, temperature)
    if method == "transition":
        rows = first_transitions(class_mask(values))
    elif method == "posterior_mean":
        rows = _in_order(estimates.means)
    else:
        whole, near = estimates.rows, estimates.refined
        if method == "viterbi":
            whole, near = bounded_paths(as_array(values), max_step, step_penalty, cap)
        rows = _in_order(near if refine else whole)
    height = values.shape[2]
    plausible = _plausible_thickness(rows, window)
    valid = (estimates.sigmas <= max_sigma_px) & (rows >= 0.5) & (rows <= height - 0.5) & plausible
    return Layers(*rows, *estimates.sigmas, *valid)


def original_extraction(logits: NDArray[Any] | Tensor) -> Layers:
    """Return the rows that the original read: the first change of class from the top.

    NaN where there is none; ILM and BM may cross. Arguments and errors as in `extract_layers`.
    """
    return extract_layers(logits, "transition")


def _estimates(
    logits: NDArray[Any] | Tensor, temperature: float
) -> tuple[Estimates, NDArray[Any] | Tensor]:
    """Return the estimates, and the logits that they were made of."""
    values = logits if on_gpu(logits) else as_array(logits)
    try:
        if not isinstance(values, np.ndarray):
            from pipeline.oct.ordered_map_cuda import estimates_on_device

            return estimates_on_device(values, temperature), values
        return ordered_estimates(values, temperature), values
    except FloatingPointError:  # looking at every number first would cost more than all the rest
        array = as_array(values)
        refuse_non_finite(array)
        array = within_range(array)
        return ordered_estimates(array, temperature), array


def _in_order(rows: Floats) -> Floats:
    """Return `rows` `(2, B, W)` with BM moved down to ILM where their fractions cross."""
    return np.stack([rows[0], np.maximum(rows[0], rows[1])])


def _plausible_thickness(rows: Floats, window: tuple[Floats, Floats]) -> NDArray[np.bool_]:
    thickness = rows[1] - rows[0]
    least, largest = window
    plausible: NDArray[np.bool_] = (thickness >= least) & (thickness <= largest)
    return plausible


def _thickness_window(
    thickness_px: tuple[float, float] | None,
    thickness_um: tuple[float, float] | None,
    scale_y_um: float | Sequence[float] | None,
    images: int,
) -> tuple[Floats, Floats]:
    """Return least and largest thickness in rows, `()` or one `(B, 1)` per image."""
    least, largest = thickness_um or thickness_px or (-inf, inf)
    if not least <= largest:
        raise ConfigurationError(
            f"thickness window is {least} to {largest}; expected the least thickness first"
        )
    if thickness_um is None:
        return np.asarray(least), np.asarray(largest)
    if thickness_px is not None or scale_y_um is None:
        raise ConfigurationError(
            f"thickness_um is {thickness_um} with thickness_px {thickness_px} and scale_y_um "
            f"{scale_y_um}; expected one window, and the scale for one in micrometres"
        )
    scale = np.asarray(scale_y_um, dtype=np.float64)
    if not (scale > 0).all():
        raise ConfigurationError(f"scale_y_um must be above 0 micrometres, got {scale_y_um}")
    if scale.ndim and scale.shape != (images,):
        raise ConfigurationError(
            f"scale_y_um has {scale.size} scales for {images} images; expected one for all or one "
            "per image"
        )
    scale = scale[:, None] if scale.ndim else scale
    return least / scale, largest / scale


def _check_settings(
    method: str,
    temperature: float,
    max_step: int,
    step_penalty: float,
    cap: float,
    max_sigma_px: float,
) -> None:
    if method not in get_args(Method):
        raise ConfigurationError(
            f"method of extraction is {method!r}; expected one of {', '.join(get_args(Method))}"
        )
    if not 0 < temperature < inf:
        raise ConfigurationError(f"temperature must be above 0 and finite, got {temperature}")
    if max_step != int(max_step) or max_step < 0:
        raise ConfigurationError(f"max_step must be a whole number of rows >= 0, got {max_step}")
    if not (0 <= step_penalty < inf and 0 < cap < inf):
        raise ConfigurationError(
            f"step_penalty and cap must be finite, at least 0 and above 0, got {step_penalty} and "
            f"{cap}"
        )
    if not max_sigma_px >= 0:
        raise ConfigurationError(f"max_sigma_px must be 0 rows or more, got {max_sigma_px}")
