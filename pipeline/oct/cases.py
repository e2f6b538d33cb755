"""The B-scans of a run: found in their files, checked and split before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.cases import Cases, as_cases, found
from pipeline.data.folds import split_samples
from pipeline.data.manifests import find_samples, load_manifest
from pipeline.data.samples import Sample
from pipeline.errors import InputError, InputErrors, Problem
from pipeline.oct.formats import read_oct
from pipeline.oct.phantom import write_phantom_dataset
from pipeline.oct.volume import OctVolume

__all__ = ["training_cases"]

logger = logging.getLogger(__name__)

BOUNDARIES = ("ILM", "BM")
_PHANTOM_MANIFEST = "oct_hdf5"


def training_cases(
    dataset_dir: str | None,
    manifest: str,
    phantom_dir: str,
    fold: int | None = None,
    fold_seed: int | None = None,
    phantom_seed: int = 0,
    verify: bool = True,
    follow_symlinks: bool = False,
) -> Cases:
    """Find, check and split the B-scans of a training or evaluation run.

    A case is one B-scan: `image` and `label` are the path of its file, `index` is its place in it,
    and `label` is None where nobody annotated a column of it. B-scans of one subject stay together,
    also where a file holds several subjects.

    Args:
        dataset_dir: the data folder; None draws phantoms and uses those.
        manifest: name or path of the manifest that describes the folder.
        phantom_dir: where the phantoms' files go.
        fold: which of the manifest's folds validates; None takes the manifest's own validation set.
        fold_seed: of the folds; None: the manifest's.
        phantom_seed: of the phantoms.
        verify: where the manifest records checksums, refuse files that have changed.
        follow_symlinks: accept links that lead out of `dataset_dir`.

    Raises:
        InputErrors: files are missing, unreadable, or those to train on have no ILM or BM; all are
            listed.
    """
    facts = []
    if dataset_dir is None:
        dataset_dir = str(write_phantom_dataset(Path(phantom_dir), seed=phantom_seed))
        manifest = _PHANTOM_MANIFEST
        facts.append("no dataset_dir: training on the PHANTOM (drawn B-scans, not real ones)")
        logger.warning(facts[0])
    described = load_manifest(manifest)
    scans: dict[str, dict[str, Any]] = {}
    samples: list[Sample] = []
    problems: list[Problem] = []
    recorded = find_samples(
        described, Path(dataset_dir), verify=verify, follow_symlinks=follow_symlinks
    )
    for sample in recorded:
        try:
            for scan, more in _bscans(sample, read_oct(sample.image)):
                samples.append(scan)
                scans[scan.id] = more
        except InputError as error:
            message = str(error).removeprefix(f"{sample.image}: ")
            problems.append(Problem(sample.relative.as_posix(), "read", message))
    if problems:
        raise InputErrors(problems, f"found wrong in {dataset_dir}")
    split = split_samples(samples, described, fold, fold_seed)
    sides = (split.train, split.val, split.test)
    facts.append(found(described, dataset_dir, fold, *sides))
    train, val, test = (_cases(side, scans) for side in sides)
    return Cases(train, val, test, tuple(facts))


def _bscans(sample: Sample, volume: OctVolume) -> Iterator[tuple[Sample, dict[str, Any]]]:
    """Yield the B-scans of a file as samples, each with what a sample cannot hold."""
    missing = [name for name in BOUNDARIES if name not in volume.layers]
    if missing and sample.split != "test":
        raise InputError(
            f"{sample.image}: has no rows of {' and '.join(missing)}, only of "
            f"{', '.join(volume.layers) or 'nothing'}; annotate it, or put it among the test files"
        )
    rows = [np.asarray(volume.layers[name]) for name in BOUNDARIES if name in volume.layers]
    several = volume.bscans.shape[0] > 1
    for index in range(volume.bscans.shape[0]):
        annotated = not missing and all(np.isfinite(layer[index]).any() for layer in rows)
        scan = replace(
            sample,
            id=f"{sample.id}#{index}",
            label=sample.image if annotated else None,
            subject=volume.subjects[index] or sample.subject,
        )
        name = f"{sample.id}/{volume.names[index]}" if several else sample.relative.as_posix()
        yield scan, {"index": index, "name": name}


def _cases(side: Sequence[Sample], scans: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    cases = as_cases(side)
    return [{**case, **scans[sample.id]} for case, sample in zip(cases, side, strict=True)]
