"""Data folders that are drawn from settings: used again where complete, else drawn anew."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.data.atomic import write_json
from pipeline.errors import ConfigurationError

__all__ = ["MARKER_NAME", "draw_folder"]

logger = logging.getLogger(__name__)

MARKER_NAME = "phantom.json"


def draw_folder(
    folder: Path | str,
    settings: Mapping[str, Any],
    draw: Callable[[Path], Iterable[Path]],
    patterns: Iterable[str],
) -> Path:
    """Draw a phantom data set, unless the folder holds the one of these settings already.

    `phantom.json` stands in the folder from before the first file, and says after the last one that
    the data set is complete, with the settings and the size of each file. A folder in which
    anything of that differs, as after an interruption, is emptied of phantoms and drawn again.

    Args:
        folder: the data folder; made where it is missing.
        settings: whatever decides what is drawn, as JSON keeps it (lists, no tuples), with a
            version of the drawings themselves.
        draw: writes the files into the folder and gives their paths.
        patterns: of the files that `draw` writes with any settings, relative to the folder; what an
            earlier data set left under them is deleted first, and nothing else.

    Returns:
        The data folder.

    Raises:
        ConfigurationError: the folder holds something else than a phantom data set.
        ResourceError: the folder cannot be written.
    """
    root = Path(folder)
    if _is_complete(root, settings):
        logger.info("%s: phantom data set found, with the same settings", root)
        return root
    _clear(root, patterns)
    write_json(root / MARKER_NAME, {"complete": False, "settings": settings, "files": {}})
    sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in draw(root)}
    write_json(root / MARKER_NAME, {"complete": True, "settings": settings, "files": sizes})
    logger.info("%s: phantom data set written, %d files", root, len(sizes))
    return root


def _is_complete(root: Path, settings: Mapping[str, Any]) -> bool:
    """Return whether the marker is there with these settings and each file as long as it says."""
    marker = _read_marker(root)
    if not marker.get("complete") or marker.get("settings") != settings:
        return False
    files: Mapping[str, int] = marker["files"]
    paths = {root / name: size for name, size in files.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def _read_marker(root: Path) -> dict[str, Any]:
    """Return what the marker says, nothing where there is none."""
    path = root / MARKER_NAME
    if not path.is_file():
        return {}
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigurationError(
            f"{path}: not the marker of a phantom data set ({error}); choose another folder, "
            "or delete this one"
        ) from error
    return marker if isinstance(marker, dict) else {}


def _clear(root: Path, patterns: Iterable[str]) -> None:
    """Delete the files of an earlier phantom data set; refuse a folder of anything else."""
    if not root.exists():
        return
    if not root.is_dir() or (any(root.iterdir()) and not _read_marker(root)):
        raise ConfigurationError(
            f"{root}: holds no phantom data set (no {MARKER_NAME}) and is not empty; "
            "choose another folder for the phantoms"
        )
    for path in [path for pattern in patterns for path in root.glob(pattern)]:
        path.unlink(missing_ok=True)
