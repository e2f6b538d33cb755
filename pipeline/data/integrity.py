"""Everything wrong with a dataset, at once and before a run begins."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.folds import leaks
from pipeline.data.images import ImageHeader, read_header, read_image
from pipeline.data.labels import AUTO, label_classes
from pipeline.data.manifests import Manifest, Record
from pipeline.data.samples import Sample
from pipeline.data.writers import check_result_paths
from pipeline.errors import ConfigurationError, InputError, Problem

__all__ = ["check_samples"]

logger = logging.getLogger(__name__)

_MASK_ROLES = ("label", "observer2", "fov")
_IMAGE_CHANNELS = (1, 3, 4)


def check_samples(
    samples: Sequence[Sample], manifest: Manifest, *, decode: bool = True
) -> list[Problem]:
    """Return every problem of `samples`; an empty list means that a run may begin.

    Args:
        samples: what `find_samples` returned.
        manifest: its manifest.
        decode: read the pixels too; without, only names, headers and checksums.

    Returns:
        Problems with paths below the dataset folder: those of the samples in their order, then
        those of the set as a whole.
    """
    if not samples:
        return [Problem(manifest.name, "find", "no samples; expected at least one")]
    problems: list[Problem] = []
    records = {record.id: record for record in manifest.records}
    depths: dict[str, Sample] = {}
    for sample in samples:
        headers, found = _read_headers(sample)
        found += _check_presence(sample, manifest)
        found += _check_headers(sample, headers, manifest, records.get(sample.id))
        if "image" in headers:
            depths.setdefault(str(headers["image"].dtype), sample)
        if decode:
            found += _check_pixels(sample, headers, manifest)
        problems += found
    if len(depths) > 1:
        listed = ", ".join(f"{depth} ({one.relative.as_posix()})" for depth, one in depths.items())
        problems.append(Problem(manifest.name, "depth", f"images of different types: {listed}"))
    problems += _check_gaps(samples)
    problems += leaks({name: [s for s in samples if s.split == name] for name in _splits(samples)})
    problems += _check_names(samples)
    return list(dict.fromkeys(problems))


def _read_headers(sample: Sample) -> tuple[dict[str, ImageHeader], list[Problem]]:
    headers: dict[str, ImageHeader] = {}
    problems: list[Problem] = []
    for role in ("image", *_MASK_ROLES):
        path = sample.roles.get(role)
        if path is None:
            continue
        try:
            headers[role] = read_header(path)
        except InputError as error:
            problems.append(_problem(sample, role, "read", _without_path(error, path)))
    return headers, problems


def _check_presence(sample: Sample, manifest: Manifest) -> list[Problem]:
    needed = {entry.split for entry in manifest.files if entry.labels_required}
    if sample.label is None and sample.split in needed:
        return [_problem(sample, "image", "find", "no label")]
    return []


def _check_headers(
    sample: Sample,
    headers: dict[str, ImageHeader],
    manifest: Manifest,
    record: Record | None,
) -> list[Problem]:
    """Return what is wrong with sizes, channels, pages and depth."""
    problems = []
    for role, header in headers.items():
        recorded = record.files[role] if record is not None and role in record.files else None
        if recorded is not None and recorded.shape not in (None, header.shape):
            message = f"shape {header.shape} found, {recorded.shape} recorded in the manifest"
            problems.append(_problem(sample, role, "verify", message))
    image = headers.get("image")
    if image is None:
        return problems
    for message in _image_faults(image, manifest):
        problems.append(_problem(sample, "image", "header", message))
    if image.channels == 4:
        logger.warning("%s: RGBA; the alpha channel does not count", sample.relative.as_posix())
    for role, header in headers.items():
        if header.size != image.size:
            message = (
                f"{header.size[1]}x{header.size[0]} pixels, but its image "
                f"{sample.relative.as_posix()} has {image.size[1]}x{image.size[0]}; "
                "they must have one size"
            )
            problems.append(_problem(sample, role, "size", message))
    return problems


def _image_faults(image: ImageHeader, manifest: Manifest) -> list[str]:
    faults = []
    channels = manifest.image.get("channels")
    if image.channels not in _IMAGE_CHANNELS:
        faults.append(f"{image.channels} channels, expected gray, RGB or RGBA")
    elif channels == 3 and image.channels == 1:
        faults.append("gray, expected RGB by the manifest (image.channels)")
    depth, expected = image.dtype.itemsize * 8, manifest.image.get("bit_depth")
    if expected is not None and depth != max(8, 16 if expected == 12 else expected):
        faults.append(
            f"{depth} bits ({image.dtype}), expected {expected}; "
            "convert it or change image.bit_depth in the manifest"
        )
    if image.pages > 1:
        faults.append(f"{image.pages} pages, expected one image; split the file")
    return faults


def _check_pixels(
    sample: Sample, headers: dict[str, ImageHeader], manifest: Manifest
) -> list[Problem]:
    """Return what only decoding shows: damage, constant images, values that are no labels."""
    problems = []
    for role in headers:
        path = sample.roles[role]
        try:
            array = read_image(path)
            if role == "image":
                fault = _pixel_fault(array)
            elif role == "fov":
                fault = "" if label_classes(array, AUTO, path).any() else "an empty field of view"
            else:
                label_classes(array, manifest.labels, path)
                fault = ""
        except (InputError, ConfigurationError) as error:
            fault = _without_path(error, path)
        if fault:
            problems.append(_problem(sample, role, "pixels", fault))
    return problems


def _pixel_fault(array: NDArray[Any]) -> str:
    if array.dtype.kind in "fc" and not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))
        return f"{len(bad)} values are not finite, the first at {tuple(bad[0].tolist())}"
    if array.min() == array.max():
        return f"constant: every pixel is {array.flat[0]}"
    return ""


def _check_gaps(samples: Sequence[Sample]) -> list[Problem]:
    """Return a problem for every image without a file that most of its split have."""
    problems = []
    for split in _splits(samples):
        members = [sample for sample in samples if sample.split == split]
        counts = Counter(role for sample in members for role in sample.roles)
        for role, count in counts.items():
            if len(members) / 2 < count < len(members):
                problems += [
                    _problem(sample, "image", "find", f"no {role}; {count} other images have one")
                    for sample in members
                    if role not in sample.roles
                ]
    return problems


def _check_names(samples: Sequence[Sample]) -> list[Problem]:
    try:
        check_result_paths([sample.image for sample in samples], samples[0].root)
    except ConfigurationError as error:
        root = str(samples[0].root)
        return [Problem(root, "names", str(error), code=ConfigurationError.exit_code)]
    return []


def _splits(samples: Sequence[Sample]) -> list[str]:
    present = {sample.split for sample in samples}
    return [split for split in ("train", "val", "test") if split in present]


def _problem(sample: Sample, role: str, stage: str, message: str) -> Problem:
    return Problem(sample.roles[role].relative_to(sample.root).as_posix(), stage, message)


def _without_path(error: Exception, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
