"""Image files as addresses that carry the picture themselves."""

from __future__ import annotations

import base64
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.errors import InputError

__all__ = ["PICTURE_WIDTH_PX", "EmbeddedPicture", "embed_picture"]

PICTURE_WIDTH_PX = 1400  # wider pictures are shrunk: a page must open on a phone

_KEPT_BYTES = 150_000  # what is larger goes in as JPEG, a few times smaller
_JPEG_QUALITY = 88


@dataclass(frozen=True)
class EmbeddedPicture:
    """A picture as a `data:` address.

    Args:
        address: `data:image/...`.
        width_px: of the picture in the page.
        height_px: likewise.
    """

    address: str
    width_px: int
    height_px: int


def embed_picture(path: Path) -> EmbeddedPicture:
    """Return a file as a picture for a page: as it is where small, else a JPEG of limited width.

    Raises:
        InputError: the file is not a readable image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()  # a file cut short would be embedded unseen
                kept = image.format in {"PNG", "JPEG"} and image.width <= PICTURE_WIDTH_PX
                if kept and path.stat().st_size <= _KEPT_BYTES:
                    kind = str(image.format).lower()
                    return _embedded(path.read_bytes(), kind, image.size)
                shown = image.convert("RGB")
    except (
        OSError,
        SyntaxError,  # Pillow's word for a damaged PNG
        ValueError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise InputError(f"{path}: not a readable picture ({error}): write it again") from error
    if shown.width > PICTURE_WIDTH_PX:
        height_px = max(1, round(shown.height * PICTURE_WIDTH_PX / shown.width))
        shown = shown.resize((PICTURE_WIDTH_PX, height_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Colours at full resolution: the lines of an overlay are a pixel wide.
    shown.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return _embedded(buffer.getvalue(), "jpeg", shown.size)


def _embedded(data: bytes, kind: str, size: tuple[int, int]) -> EmbeddedPicture:
    text = base64.b64encode(data).decode("ascii")
    return EmbeddedPicture(f"data:image/{kind};base64,{text}", *size)
