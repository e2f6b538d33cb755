"""The cases of a run: found, checked and split before anything is trained."""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.data.cases import Cases, as_cases, found
from pipeline.data.folds import split_samples
from pipeline.data.integrity import check_samples
from pipeline.data.manifests import find_samples, load_manifest
from pipeline.errors import InputErrors
from pipeline.fundus.phantom import write_phantom_dataset

__all__ = ["training_cases"]

logger = logging.getLogger(__name__)

_PHANTOM_MANIFEST = "vessel_pairs"
_PHANTOM_SEED = 42


def training_cases(
    dataset_dir: str | None,
    manifest: str,
    phantom_dir: str,
    fold: int | None = None,
    fold_seed: int | None = None,
    check: bool = True,
    verify: bool = True,
    follow_symlinks: bool = False,
) -> Cases:
    """Find, check and split the cases of a training or evaluation run.

    Args:
        dataset_dir: the data folder; None makes the phantom and uses it.
        manifest: name or path of the manifest that describes the folder.
        phantom_dir: where the phantom's files go.
        fold: which of the manifest's folds validates; None takes the manifest's own validation set.
        fold_seed: of the folds; None: the manifest's.
        check: read every file first, so that all problems are listed before training starts.
        verify: where the manifest records checksums, refuse files that have changed.
        follow_symlinks: accept links that lead out of `dataset_dir`.

    Raises:
        InputErrors: files are missing, unreadable or do not fit; all are listed.
    """
    facts = []
    if dataset_dir is None:
        dataset_dir, manifest = (
            str(write_phantom_dataset(Path(phantom_dir), seed=_PHANTOM_SEED)),
            _PHANTOM_MANIFEST,
        )
        facts.append("no dataset_dir: training on the PHANTOM (drawn photographs, not real ones)")
        logger.warning(facts[0])
    described = load_manifest(manifest)
    samples = find_samples(
        described, Path(dataset_dir), verify=verify, follow_symlinks=follow_symlinks
    )
    if check and (problems := check_samples(samples, described)):
        raise InputErrors(problems, f"found wrong in {dataset_dir}")
    split = split_samples(samples, described, fold, fold_seed)
    sides = (split.train, split.val, split.test)
    fovs = sum(sample.fov is not None for side in sides for sample in side)
    counted = found(described, dataset_dir, fold, *sides)
    facts.append(f"{counted}; FOV masks: {fovs} given, others derived")
    train, val, test = map(as_cases, sides)
    return Cases(train, val, test, tuple(facts))
