"""A first manifest for a folder, from the names in it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.data.dataset_paths import walk_files
from pipeline.data.images import IMAGE_SUFFIXES, image_stem
from pipeline.data.manifests import find_samples, load_manifest
from pipeline.data.shipped import shipped_folder
from pipeline.data.strict_yaml import read_yaml
from pipeline.errors import InputError, InputErrors, LaminaError

__all__ = ["guess_manifest"]

# From the most particular layout to the most general: the first that finds labelled images wins.
_KNOWN = ("drive", "chase_db1", "stare", "hrf", "les_av", "fives", "vessel_pairs")
_CLASSES = ("ip102", "split_lists", "image_table")
_CLASS_IN_SPLIT = re.compile(r"(train|val|test)/[^/]+/")
_IMAGE_FOLDERS = ("image", "images", "img", "imgs", "original", "photos", "input", "inputs")
_LABEL_FOLDERS = (
    "label", "labels", "mask", "masks", "manual", "manual1", "1st_manual", "gt", "groundtruth",
    "ground truth", "ground_truth", "truth", "vessel", "vessels", "annotation", "annotations",
)  # fmt: skip
_LABEL_SUFFIXES = ("", "_mask", "_label", "_manual1", "_manual", "_gt", "_vessels", "_1stHO")


def guess_manifest(dataset_dir: Path | str) -> dict[str, Any]:
    """Return the content of a manifest for the files in `dataset_dir`.

    Args:
        dataset_dir: a folder in a layout that a shipped manifest describes, with an image and a
            label folder of other names, or with images alone.

    Returns:
        What a manifest file holds; `name`, `licence`, `source` and `citation` of a folder that is
        no known dataset are to be filled in by its owner.

    Raises:
        InputError: there is no image in it.
    """
    root = Path(dataset_dir)
    for name in _KNOWN:
        if _fits(name, root):
            return _content(name)
    for name in _CLASSES:
        if _fits(name, root):
            return _content(name)
    paths = _image_paths(root) if root.is_dir() else []
    if not paths:
        raise InputError(
            f"{root}: no images found; expected {', '.join(IMAGE_SUFFIXES[:6])} or the like"
        )
    files = _pairs(paths)
    if not files and any(map(_CLASS_IN_SPLIT.match, paths)) and _fits("image_folders", root):
        return _content("image_folders")
    if not files:
        return _content("images")
    content = _content("vessel_pairs")
    content.update(name="my_data", title=f"images and labels in {root.name}", files=files)
    content["notes"] = "Guessed from the names; check split, subject, labels, licence and source."
    return content


def _image_paths(root: Path) -> list[str]:
    """Return the image files below `root` by their suffix, as sorted POSIX paths below it."""
    found = walk_files(root.resolve(), follow_symlinks=False)
    return sorted(path for path in found if path.lower().endswith(IMAGE_SUFFIXES))


def _fits(name: str, root: Path) -> bool:
    """Return whether the shipped manifest finds images that have labels."""
    try:
        samples = find_samples(load_manifest(name), root)
    except InputErrors:
        return True  # the layout, with files missing: the check will list them
    except LaminaError:
        return False
    return any(sample.label is not None or sample.category is not None for sample in samples)


def _content(name: str) -> dict[str, Any]:
    content: dict[str, Any] = read_yaml(shipped_folder("data_manifests") / f"{name}.yaml")
    return content


def _pairs(paths: list[str]) -> list[dict[str, str]]:
    """Return file patterns for folders that look like images beside labels."""
    folders = {str(PurePosixPath(path).parent) for path in paths}
    files = []
    for folder in sorted(folders):
        if PurePosixPath(folder).name.lower() not in _IMAGE_FOLDERS:
            continue
        beside = str(PurePosixPath(folder).parent)
        for other in sorted(folders - {folder}):
            same_place = str(PurePosixPath(other).parent) == beside
            if same_place and PurePosixPath(other).name.lower() in _LABEL_FOLDERS:
                ending = _label_ending(paths, folder, other)
                if ending is not None:
                    files.append(
                        {
                            "split": _split(folder),
                            "image": f"{folder}/{{name}}{{_ext}}",
                            "label": f"{other}/{{name}}{ending}{{_ext}}",
                        }
                    )
                    break
    return files


def _label_ending(paths: Iterable[str], images: str, labels: str) -> str | None:
    """Return what label names add to image names, None where too few pair."""
    names: dict[str, set[str]] = {images: set(), labels: set()}
    for path in paths:
        folder = str(PurePosixPath(path).parent)
        if folder in names:
            names[folder].add(image_stem(path))
    counts = Counter(
        {
            ending: sum(f"{name}{ending}" in names[labels] for name in names[images])
            for ending in _LABEL_SUFFIXES
        }
    )
    ending, count = counts.most_common(1)[0]
    return ending if count * 2 > len(names[images]) else None


def _split(folder: str) -> str:
    for part in folder.lower().split("/"):
        for split, pattern in (("train", "train"), ("val", "val"), ("test", "test")):
            if re.match(pattern, part):
                return split
    return "train"
