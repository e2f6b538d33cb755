"""The volumes of a run: found, checked and split before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.cases import Cases, as_cases, found
from pipeline.data.file_constants import FileConstants
from pipeline.data.folds import split_samples
from pipeline.data.manifests import find_samples, load_manifest
from pipeline.data.samples import Sample
from pipeline.data.volume_statistics import intensity_problems
from pipeline.data.volumes import open_volume
from pipeline.errors import InputError, InputErrors, Problem
from pipeline.vesuvius.phantom import write_phantom_dataset
from pipeline.vesuvius.transforms import IGNORE_LABEL, label_fault

__all__ = ["training_cases"]

logger = logging.getLogger(__name__)


def training_cases(
    dataset_dir: str | None,
    manifest: str,
    phantom_dir: str,
    fold: int | None = None,
    fold_seed: int | None = None,
    phantom_seed: int = 0,
    intensities: FileConstants | None = None,
    places: FileConstants | None = None,
    verify: bool = True,
    follow_symlinks: bool = False,
) -> Cases:
    """Find, check and split the volumes of a training or evaluation run.

    Headers are always checked, values with the caches, in which a later run finds what was read.

    Args:
        dataset_dir: the data folder; None draws phantom scrolls and uses those.
        manifest: name or path of the manifest that describes the folder.
        phantom_dir: where the phantoms' files go.
        fold: which of the manifest's folds validates; None takes the manifest's own validation set.
        fold_seed: of the folds; None: the manifest's.
        phantom_seed: of the phantoms.
        intensities: the volumes' `percentile_cache`, which is filled; None does not look at grey
            values.
        places: the labels' `class_index_cache`, likewise.
        verify: where the manifest records checksums, refuse files that have changed.
        follow_symlinks: accept links that lead out of `dataset_dir`.

    Raises:
        InputErrors: files are missing, unreadable or do not fit; all are listed.
    """
    facts = []
    if dataset_dir is None:
        dataset_dir = str(write_phantom_dataset(Path(phantom_dir), seed=phantom_seed))
        facts.append("no dataset_dir: training on the PHANTOM (drawn scrolls, not real ones)")
        logger.warning(facts[0])
    described = load_manifest(manifest)
    samples = find_samples(
        described, Path(dataset_dir), verify=verify, follow_symlinks=follow_symlinks
    )
    if intensities is not None or places is not None:
        logger.info("looking at all values of %d volumes, which is done once", len(samples))
    if problems := _problems(samples, intensities, places):
        raise InputErrors(problems, f"found wrong in {dataset_dir}")
    split = split_samples(samples, described, fold, fold_seed)
    facts.append(found(described, dataset_dir, fold, split.train, split.val, split.test))
    return Cases(as_cases(split.train), as_cases(split.val), as_cases(split.test), tuple(facts))


def _problems(
    samples: Sequence[Sample], intensities: FileConstants | None, places: FileConstants | None
) -> list[Problem]:
    """Return what is wrong with volumes and labels; where headers are sound, the values too."""
    problems = []
    for sample in samples:
        found = _header_faults(sample) or _value_faults(sample, intensities, places)
        for path, fault in found.items():
            message = fault.removeprefix(f"{path}: ")
            problems.append(Problem(path.relative_to(sample.root).as_posix(), "read", message))
    return problems


def _header_faults(sample: Sample) -> dict[Path, str]:
    """Return the files that cannot be opened as a volume, or a label of another size."""
    faults, shapes = {}, {}
    for role, path in (("image", sample.image), ("label", sample.label)):
        if path is None:
            continue
        try:
            with open_volume(path) as volume:
                shapes[role] = volume.shape
                if volume.channels not in (None, 1):
                    faults[path] = f"{volume.channels} channels, expected one; split the file"
        except InputError as error:
            faults[path] = str(error)
    if sample.label is not None and len(set(shapes.values())) > 1:
        faults[sample.label] = (
            f"label of {shapes['label']}, its image {sample.relative.as_posix()} has "
            f"{shapes['image']}; expected one size: cut both alike"
        )
    return faults


def _value_faults(
    sample: Sample, intensities: FileConstants | None, places: FileConstants | None
) -> dict[Path, str]:
    """Return the files whose voxels cannot be decoded, scaled or learned from."""
    faults = {}
    if intensities is not None:
        for problem in intensity_problems(intensities, [sample.image]):
            faults[sample.image] = problem.message
    if places is not None and sample.label is not None:
        try:
            values = places(sample.label)["values"]
        except InputError as error:
            faults[sample.label] = str(error)
        else:
            fault = label_fault(values)
            if not fault and set(values) == {IGNORE_LABEL}:
                fault = f"no voxel is labelled, all are {IGNORE_LABEL}; leave the volume out"
            if fault:
                faults[sample.label] = fault
    return faults
