"""The cases of a run: found, checked and split before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.folds import split_samples
from pipeline.data.integrity import check_samples
from pipeline.data.manifests import Manifest, find_samples, load_manifest
from pipeline.data.samples import Sample
from pipeline.errors import ConfigurationError, InputErrors
from pipeline.fundus.phantom import write_phantom_dataset

__all__ = ["Cases", "inference_cases", "training_cases"]

logger = logging.getLogger(__name__)

_PHANTOM_MANIFEST = "vessel_pairs"


@dataclass(frozen=True)
class Cases:
    """The cases of a run, as MONAI's data lists, and what there is to say about them.

    Attributes:
        train, val, test: dictionaries with `image`, `label`, `fov` (paths; absent ones None),
            `name` (the image relative to the data folder), `subject` and `stratum`.
        facts: lines for the head of the log.
    """

    train: list[dict[str, Any]]
    val: list[dict[str, Any]]
    test: list[dict[str, Any]]
    facts: tuple[str, ...]

    def split(self, name: str) -> list[dict[str, Any]]:
        """Return the labelled cases of `train`, `val`, `test` or `all`.

        Raises:
            ConfigurationError: no such split, or it has no labelled case.
        """
        splits = {"train": self.train, "val": self.val, "test": self.test}
        splits["all"] = self.train + self.val + self.test
        if name not in splits:
            raise ConfigurationError(f"split is {name!r}; expected one of {', '.join(splits)}")
        labelled = [case for case in splits[name] if case["label"] is not None]
        if not labelled:
            counts = ", ".join(
                f"{key} {sum(case['label'] is not None for case in cases)}"
                for key, cases in splits.items()
            )
            raise ConfigurationError(
                f"split {name!r} has no labelled case (labelled: {counts}); choose another split"
            )
        return labelled


def training_cases(
    dataset_dir: str | None,
    manifest: str,
    phantom_dir: str,
    fold: int | None = None,
    seed: int = 0,
    check: bool = True,
) -> Cases:
    """Find, check and split the cases of a training or evaluation run.

    Args:
        dataset_dir: the data folder; None makes the phantom and uses it.
        manifest: name or path of the manifest that describes the folder.
        phantom_dir: where the phantom's files go.
        fold: which of the manifest's folds validates; None takes the manifest's own validation set.
        seed: of the folds and of the phantom.
        check: read every file first, so that all problems are listed before training starts.

    Raises:
        InputErrors: files are missing, unreadable or do not fit; all are listed.
    """
    facts = []
    if dataset_dir is None:
        dataset_dir, manifest = (
            str(write_phantom_dataset(Path(phantom_dir), seed=seed)),
            _PHANTOM_MANIFEST,
        )
        facts.append("no dataset_dir: training on the PHANTOM (drawn photographs, not real ones)")
        logger.warning(facts[0])
    described = load_manifest(manifest)
    samples = find_samples(described, Path(dataset_dir))
    if check and (problems := check_samples(samples, described)):
        raise InputErrors(problems, f"found wrong in {dataset_dir}")
    split = split_samples(samples, described, fold, seed)
    facts.append(_found(described, dataset_dir, fold, split.train, split.val, split.test))
    return Cases(_listed(split.train), _listed(split.val), _listed(split.test), tuple(facts))


def inference_cases(
    dataset_dir: str | None, manifest: str, output_dir: str
) -> list[dict[str, Any]]:
    """List the photographs to segment.

    Args:
        dataset_dir: a photograph, or a folder that `manifest` describes.
        manifest: name or path of the manifest; `images` takes every image below the folder.
        output_dir: where results go: not below `dataset_dir`, where the next run would find them.

    Raises:
        ConfigurationError: dataset_dir is not set, or holds output_dir.
        InputError: there is no photograph.
    """
    if dataset_dir is None:
        raise ConfigurationError(
            "dataset_dir is not set: give a photograph or a folder of photographs"
        )
    source = Path(dataset_dir)
    if source.is_file():
        return [{"image": str(source), "label": None, "fov": None, "name": source.name}]
    if Path(output_dir).resolve().is_relative_to(source.resolve()):
        raise ConfigurationError(
            f"output_dir {output_dir} lies in dataset_dir {dataset_dir}: the next run would take "
            "results for photographs; choose a folder outside"
        )
    samples = find_samples(load_manifest(manifest), source)
    return [{**case, "label": None} for case in _listed(samples)]


def _found(manifest: Manifest, folder: str, fold: int | None, *splits: Sequence[Sample]) -> str:
    counts = " / ".join(str(len(samples)) for samples in splits)
    subjects = len({sample.subject for samples in splits for sample in samples})
    fovs = sum(sample.fov is not None for samples in splits for sample in samples)
    chosen = "the manifest's validation set" if fold is None else f"fold {fold}"
    return (
        f"{manifest.name} in {folder}: train / val / test {counts} images of {subjects} subjects "
        f"({chosen}); FOV masks: {fovs} given, others derived"
    )


def _listed(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    return [
        {
            "image": str(sample.image),
            "label": None if sample.label is None else str(sample.label),
            "fov": None if sample.fov is None else str(sample.fov),
            "name": sample.relative.as_posix()
            if isinstance(sample.relative, Path)
            else str(sample.relative),
            "subject": sample.subject,
            "stratum": sample.stratum or "",
        }
        for sample in samples
    ]
