"""Arrays to image files, whole or not at all, under names that never collide."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.atomic import atomic_path, write_bytes
from pipeline.data.images import image_stem
from pipeline.errors import ConfigurationError

__all__ = ["CLASSIC_TIFF_BYTES", "check_result_paths", "result_path", "write_png", "write_tiff"]

_STACK_AXES = {2: "YX", 3: "ZYX"}
CLASSIC_TIFF_BYTES = 2**32 - 2**25
"""What a TIFF with offsets of 32 bits can hold, less what is not pixels."""


def write_png(path: Path | str, array: NDArray[Any]) -> Path:
    """Write `array` as PNG, atomically.

    Args:
        path: the file.
        array: `(H, W)` or `(H, W, C)` with 2 to 4 channels, uint8 or uint16; bool becomes 0 and
            255.

    Returns:
        The path.

    Raises:
        ValueError: another shape or type; nothing is scaled or rounded here.
    """
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    shaped = array.ndim == 2 or (array.ndim == 3 and 2 <= array.shape[-1] <= 4)
    if array.dtype not in (np.uint8, np.uint16) or not shaped or 0 in array.shape:
        raise ValueError(
            f"{path}: PNG takes (H, W) or (H, W, 2..4) of uint8, uint16 or bool, "
            f"got {array.shape} of {array.dtype}"
        )
    array = np.ascontiguousarray(array)
    if array.dtype == np.uint16 and array.ndim == 3:
        return write_bytes(path, bytes(imagecodecs.png_encode(array)))
    # Into memory first: Pillow's own file writing loses the reason of a failure.
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="PNG")
    return write_bytes(path, stream.getvalue())


def write_tiff(path: Path | str, array: NDArray[Any], **kw: Any) -> Path:
    """Write `array` as LZW-compressed TIFF, atomically; from 4 GB before compression on as BigTIFF.

    Args:
        path: the file.
        array: `(H, W)` or `(D, H, W)`, any numeric type; bool becomes 0 and 255. For
            `(H, W, 3)` give `photometric="rgb"`: a stack may also end in 3.
        kw: further arguments of `tifffile.imwrite`, in place of these defaults.

    Returns:
        The path.

    Raises:
        ValueError: another number of axes.
    """
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    colour = kw.get("photometric") == "rgb"
    if array.ndim - colour not in _STACK_AXES or 0 in array.shape:
        raise ValueError(
            f"{path}: TIFF takes (H, W) or (D, H, W), with a last axis of channels for "
            f'photometric="rgb", got {array.shape}'
        )
    large = array.nbytes > CLASSIC_TIFF_BYTES  # tifffile decides only about what is not compressed
    settings: dict[str, Any] = {"photometric": "minisblack", "compression": "lzw"}
    settings |= {"bigtiff": large, **kw}
    axes = _STACK_AXES[array.ndim - colour] + ("S" if colour else "")
    settings["metadata"] = {"axes": axes, **(kw.get("metadata") or {})}
    with atomic_path(path) as temporary:
        tifffile.imwrite(temporary, array, **settings)
    return Path(path)


def result_path(
    source: Path | str, source_root: Path | str, output_dir: Path | str, suffix: str
) -> Path:
    """Return where the result for `source` belongs: the same folders, the stem and `suffix`.

    Args:
        source: an input file.
        source_root: the folder the inputs were looked for in; for a single file its parent.
        output_dir: where results go.
        suffix: what replaces the image suffix, such as `_vessels.png`.

    Raises:
        ConfigurationError: `source` is not below `source_root`.

    Example:
        >>> result_path("in/a/eye.ppm.gz", "in", "out", "_vessels.png").as_posix()
        'out/a/eye_vessels.png'
    """
    relative = _relative_stem(Path(source), Path(source_root))
    return Path(output_dir) / relative.with_name(relative.name + suffix)


def check_result_paths(sources: Iterable[Path | str], source_root: Path | str) -> None:
    """Refuse inputs whose results would have one name, before any work is done.

    Names that differ in case only collide too: on many systems they are one file.

    Raises:
        ConfigurationError: listing every clash.
    """
    by_result: dict[str, list[Path]] = defaultdict(list)
    for source in dict.fromkeys(Path(source) for source in sources):
        stem = _relative_stem(source, Path(source_root))
        by_result[stem.as_posix().casefold()].append(source)
    clashes = [" and ".join(map(str, group)) for group in by_result.values() if len(group) > 1]
    if clashes:
        more = f"; and {len(clashes) - 20} more" if len(clashes) > 20 else ""
        raise ConfigurationError(
            f"results of different inputs would have one name: {'; '.join(clashes[:20])}{more}; "
            "rename one of each or put them into different folders"
        )


def _relative_stem(source: Path, root: Path) -> Path:
    for inner, outer in ((source, root), (source.resolve(), root.resolve())):
        if inner.is_relative_to(outer) and ".." not in inner.relative_to(outer).parts:
            relative = inner.relative_to(outer)
            return relative.with_name(image_stem(relative))
    raise ConfigurationError(f"{source}: not below {root}; give a dataset_dir that holds it")
