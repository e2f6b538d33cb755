"""The content of a file as one number."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipeline.errors import InputError

__all__ = ["file_sha256", "text_sha256"]


def file_sha256(path: Path | str) -> str:
    """Return the SHA-256 of the file as hexadecimal digits.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def text_sha256(text: str) -> str:
    """Return the SHA-256 of `text` in UTF-8 as hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
