"""Which paths belong to a dataset folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import ConfigurationError

__all__ = ["check_inside", "walk_files"]


def walk_files(root: Path, *, follow_symlinks: bool) -> Iterator[str]:
    """Yield the files below `root` as sorted POSIX paths; hidden ones are no data.

    Raises:
        ConfigurationError: a folder is a link that leaves `root`, and `follow_symlinks` is not set.
    """
    visited: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link back to a folder above it
            folders.clear()
            continue
        visited.add(real)
        for name in folders:
            path = Path(folder, name)
            if path.is_symlink() and not name.startswith("."):
                check_inside(path, root, follow_symlinks=follow_symlinks)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n != "__MACOSX")
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder, name).relative_to(root).as_posix()


def check_inside(path: Path, root: Path, *, follow_symlinks: bool) -> None:
    """Refuse a path outside `root`, and a link that leads there.

    Raises:
        ConfigurationError: it is one; `follow_symlinks` lets links pass.
    """
    inside = path.is_relative_to(root) and ".." not in path.relative_to(root).parts
    if not inside:
        raise ConfigurationError(f"{path}: leaves dataset_dir {root}; keep the data below it")
    target = path.resolve()
    if not follow_symlinks and not target.is_relative_to(root):
        raise ConfigurationError(
            f"{path}: a link that leaves dataset_dir {root} (to {target}); "
            "copy the data there or allow it with follow_symlinks: true"
        )
