"""The images of a run: found, checked, labelled and split before anything is trained."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.classification.class_names import Classes, classes_of
from pipeline.classification.phantom import write_phantom_dataset
from pipeline.data.cases import Cases, found
from pipeline.data.folds import split_samples
from pipeline.data.manifests import Manifest, find_samples, load_manifest
from pipeline.data.photographs import read_photograph
from pipeline.data.samples import Sample
from pipeline.errors import ConfigurationError, InputError, InputErrors, Problem

__all__ = ["ClassCases", "training_cases"]

logger = logging.getLogger(__name__)

_PHANTOM_MANIFEST = "split_lists"


@dataclass(frozen=True)
class ClassCases(Cases):
    """The images of a run with their classes.

    Attributes:
        train, val, test: dictionaries with `image` (path), `label` (int), `name` (the image
            relative to the data folder), `subject` and `stratum`.
        facts: lines for the head of the log.
        class_names: in the order of their labels.
    """

    class_names: tuple[str, ...]

    @property
    def class_counts(self) -> list[int]:
        """Return the number of training images of each class."""
        return _counts(self.train, len(self.class_names))

    @property
    def train_labels(self) -> list[int]:
        """Return the labels of the training images, in their order."""
        return [case["label"] for case in self.train]


def training_cases(
    dataset_dir: str | None,
    manifest: str,
    phantom_dir: str,
    fold: int | None = None,
    seed: int | None = None,
    check: bool = True,
    val_split: float | None = None,
    class_list: str | None = None,
    phantom: Mapping[str, Any] | None = None,
    verify: bool = True,
    follow_symlinks: bool = False,
) -> ClassCases:
    """Find, check, label and split the images of a training or evaluation run.

    Args:
        dataset_dir: the data folder; None draws the phantom and uses it.
        manifest: name or path of the manifest that describes the folder.
        phantom_dir: where the phantom's files go.
        fold: which of the manifest's folds validates; None takes the manifest's own validation set.
        seed: of folds and `val_split`; None: the manifest's.
        check: read every image first, so that all problems are listed before training starts.
        val_split: share of each class's training images to validate on, of subjects where these
            have several; None: as the manifest says. Only for data without images to validate on.
        class_list: text file of class names in the order of their labels; None: the manifest's, or
            the names found, sorted.
        phantom: what `write_phantom_dataset` is told, such as `classes` and `imbalance`.
        verify: where the manifest records checksums, refuse files that have changed.
        follow_symlinks: accept links that lead out of `dataset_dir`.

    Raises:
        InputErrors: files are missing or unreadable, lines or classes unknown; all are listed.
        ConfigurationError: the manifest names no classes, or `val_split` does not fit.
    """
    facts = []
    if dataset_dir is None:
        dataset_dir = str(write_phantom_dataset(Path(phantom_dir), **(phantom or {})))
        manifest = _PHANTOM_MANIFEST
        facts.append("no dataset_dir: training on the PHANTOM (drawn insects, not real ones)")
        logger.warning(facts[0])
    described = load_manifest(manifest)
    if not described.classes:
        raise ConfigurationError(
            f"manifest {described.name} says of no image which class it has; choose one with "
            "`classes`, such as image_folders or image_table"
        )
    samples = find_samples(
        described, Path(dataset_dir), verify=verify, follow_symlinks=follow_symlinks
    )
    categories = [sample.category or "" for sample in samples]
    classes = classes_of(described, Path(dataset_dir), categories, class_list)
    if check and (problems := _unreadable(samples)):
        raise InputErrors(problems, f"found wrong in {dataset_dir}")
    if val_split is not None:
        described = _with_val_split(described, samples, val_split, fold)
    split = split_samples(samples, described, fold, seed)
    sides = (split.train, split.val, split.test)
    train, val, test = (_cases(side, classes) for side in sides)
    facts.append(found(described, dataset_dir, fold, *sides))
    facts += _balance(train, val, classes.names)
    return ClassCases(train, val, test, tuple(facts), classes.names)


def _cases(samples: Sequence[Sample], classes: Classes) -> list[dict[str, Any]]:
    return [
        {
            "image": str(sample.image),
            "label": classes.labels[sample.category or ""],
            "name": sample.relative.as_posix(),
            "subject": sample.subject,
            "stratum": sample.stratum or "",
        }
        for sample in samples
    ]


def _unreadable(samples: Sequence[Sample]) -> list[Problem]:
    """Return a problem for every image that training could not read."""

    def read(sample: Sample) -> Problem | None:
        try:
            read_photograph(sample.image)
        except InputError as error:
            message = str(error).removeprefix(f"{sample.image}: ")
            return Problem(sample.relative.as_posix(), "read", message)
        return None

    # Decoders leave the interpreter free, so threads serve.
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        return [problem for problem in pool.map(read, samples) if problem is not None]


def _with_val_split(
    manifest: Manifest, samples: Sequence[Sample], val_split: float, fold: int | None
) -> Manifest:
    """Return the manifest with another rule for cutting validation from training."""
    own = sum(sample.split == "val" for sample in samples)
    if own or fold is not None or manifest.folds.get("dealt") == "by_table":
        there = f"{own} images of its own to validate on" if own else "folds that say so"
        raise ConfigurationError(
            f"val_split is {val_split}, but {manifest.name} has {there}; leave val_split out"
        )
    if not 0 < val_split < 1:
        raise ConfigurationError(f"val_split is {val_split}, expected a share between 0 and 1")
    seed = manifest.validation.get("seed", 0)
    return replace(manifest, validation={"fraction": val_split, "seed": seed})


def _balance(
    train: Sequence[Mapping[str, Any]],
    val: Sequence[Mapping[str, Any]],
    names: Sequence[str],
) -> list[str]:
    """Say how unequal the classes are, and what it is worth to name the largest always."""
    counts = _counts(train, len(names))
    trained = [count for count in counts if count]
    if not trained:
        return [f"{len(names)} classes; no training images"]
    facts = [
        f"{len(names)} classes; training images of a class: {min(trained)} to {max(trained)} "
        f"(imbalance {max(trained) / min(trained):.1f})"
    ]
    if absent := [name for name, count in zip(names, counts, strict=True) if not count]:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        facts.append(f"no training image of {', '.join(absent[:5])}{more}")
        logger.warning(facts[-1])
    if val:
        largest = counts.index(max(counts))
        share = sum(case["label"] == largest for case in val) / len(val)
        facts.append(
            f"always answering {names[largest]!r}, the largest class, is right for {share:.1%} of "
            "the validation images"
        )
    return facts


def _counts(cases: Sequence[Mapping[str, Any]], classes: int) -> list[int]:
    counted = Counter(case["label"] for case in cases)
    return [counted[label] for label in range(classes)]
