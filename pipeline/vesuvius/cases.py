"""The volumes of a run: found, checked and split before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.cases import Cases, as_cases, found
from pipeline.data.folds import split_samples
from pipeline.data.manifests import find_samples, load_manifest
from pipeline.data.samples import Sample
from pipeline.data.volumes import open_volume
from pipeline.errors import InputError, InputErrors, Problem
from pipeline.vesuvius.phantom import write_phantom_dataset

__all__ = ["training_cases"]

logger = logging.getLogger(__name__)


def training_cases(
    dataset_dir: str | None,
    manifest: str,
    phantom_dir: str,
    fold: int | None = None,
    fold_seed: int | None = None,
    phantom_seed: int = 0,
) -> Cases:
    """Find, check and split the volumes of a training or evaluation run.

    Headers are checked here; values are looked at when a volume's percentiles are computed.

    Args:
        dataset_dir: the data folder; None draws phantom scrolls and uses those.
        manifest: name or path of the manifest that describes the folder.
        phantom_dir: where the phantoms' files go.
        fold: which of the manifest's folds validates; None takes the manifest's own validation set.
        fold_seed: of the folds; None: the manifest's.
        phantom_seed: of the phantoms.

    Raises:
        InputErrors: files are missing, unreadable or do not fit; all are listed.
    """
    facts = []
    if dataset_dir is None:
        dataset_dir = str(write_phantom_dataset(Path(phantom_dir), seed=phantom_seed))
        facts.append("no dataset_dir: training on the PHANTOM (drawn scrolls, not real ones)")
        logger.warning(facts[0])
    described = load_manifest(manifest)
    samples = find_samples(described, Path(dataset_dir))
    if problems := _problems(samples):
        raise InputErrors(problems, f"found wrong in {dataset_dir}")
    split = split_samples(samples, described, fold, fold_seed)
    facts.append(found(described, dataset_dir, fold, split.train, split.val, split.test))
    return Cases(as_cases(split.train), as_cases(split.val), as_cases(split.test), tuple(facts))


def _problems(samples: Sequence[Sample]) -> list[Problem]:
    """Return every volume that cannot be opened, and every label of another size."""
    problems = []
    for sample in samples:
        shapes = {}
        for role, path in (("image", sample.image), ("label", sample.label)):
            if path is None:
                continue
            try:
                with open_volume(path) as volume:
                    shapes[role] = volume.shape
            except InputError as error:
                name = path.relative_to(sample.root).as_posix()
                problems.append(Problem(name, "read", str(error).removeprefix(f"{path}: ")))
        if len(set(shapes.values())) > 1:
            message = f"image {shapes['image']} and label {shapes['label']} differ in size"
            problems.append(Problem(sample.relative.as_posix(), "read", message))
    return problems
