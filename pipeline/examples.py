"""Something to apply a bundle to, where a person has no image at hand: real, or drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.arguments import EXAMPLES
from pipeline.data.writers import write_png, write_tiff
from pipeline.errors import ConfigurationError

__all__ = ["EXAMPLE_OF", "write_example"]

EXAMPLE_OF = {  # the bundles that have a demonstration, and what it is applied to
    "fundus_vessels": "fundus",
    "oct_layers": "oct",
    "vesuvius_surface": "scroll",
    "insect_pests": "insects",
    "multiscale_classifier": "insects",
}
_UNSEEN = 90_000  # seeds from here on are in no phantom data set


def write_example(name: str, folder: Path | str) -> Path:
    """Write an example input below `folder` and return the path to give to `predict`.

    Args:
        name: a key of `EXAMPLES`.
        folder: made where it is missing.

    Raises:
        ConfigurationError: there is no such example.
        ResourceError: the folder cannot be written.
    """
    if name not in _WRITERS:
        raise ConfigurationError(f"no example {name!r}, expected one of {', '.join(EXAMPLES)}")
    return _WRITERS[name](Path(folder))


def _fundus(folder: Path) -> Path:
    import skimage.data

    path = folder / "retina.png"
    write_png(path, skimage.data.retina())
    return path


def _oct(folder: Path) -> Path:
    from pipeline.oct.heyex_vol import write_vol
    from pipeline.oct.phantom import oct_phantom

    drawn = [oct_phantom(_UNSEEN + n, eye_seed=_UNSEEN, offset_mm=0.6 * n - 0.6) for n in range(3)]
    bscans = np.stack([one.image for one in drawn]) / np.float32(255)
    folder.mkdir(parents=True, exist_ok=True)
    return write_vol(folder / "eye.vol", bscans, spacing_um=600.0)


def _scroll(folder: Path) -> Path:
    from pipeline.vesuvius.phantom import scroll_phantom

    path = folder / "scroll.tif"
    write_tiff(path, scroll_phantom(_UNSEEN, (64, 96, 96), difficulty="medium").image)
    return path


def _insects(folder: Path) -> Path:
    from pipeline.classification.phantom import insect_phantom

    for n in range(6):
        drawn = insect_phantom(seed=_UNSEEN + n, label=n, size_px=160)
        write_png(folder / f"insect_{n}.png", drawn.image)
    return folder


_WRITERS: dict[str, Callable[[Path], Path]] = {
    "fundus": _fundus,
    "oct": _oct,
    "scroll": _scroll,
    "insects": _insects,
}
