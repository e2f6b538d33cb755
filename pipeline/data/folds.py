"""Folds and splits by subject: disjoint, covering, the same on every machine."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from pipeline.data.checksums import file_sha256
from pipeline.data.manifests import Manifest
from pipeline.data.samples import Sample
from pipeline.data.tables import Table, read_tables
from pipeline.errors import ConfigurationError, InputErrors, Problem

__all__ = ["Split", "assign_folds", "deal_as_sklearn", "leaks", "shuffled", "split_samples"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """The samples of a run."""

    train: list[Sample]
    val: list[Sample]
    test: list[Sample]


def assign_folds(subjects: Mapping[str, str], k: int, seed: int) -> dict[str, int]:
    """Deal samples into `k` folds, all samples of a subject into one.

    Subjects are ordered by size, then by a hash of seed and name, and each goes to the smallest
    fold: no random generator, so the result is the same wherever it is computed.

    Args:
        subjects: sample id -> subject.
        k: number of folds.
        seed: another seed deals differently.

    Returns:
        Sample id -> fold, `0` to `k - 1`.

    Raises:
        ConfigurationError: `k` is below 2 or above the number of subjects.

    Example:
        >>> assign_folds({"a": "1", "b": "1", "c": "2", "d": "3"}, k=2, seed=0)
        {'a': 0, 'b': 0, 'c': 1, 'd': 1}
    """
    sizes: dict[str, int] = defaultdict(int)
    for subject in subjects.values():
        sizes[subject] += 1
    if not 2 <= k <= len(sizes):
        raise ConfigurationError(
            f"folds.k is {k}, expected 2 to the number of subjects, which is {len(sizes)}"
        )
    filled = [0] * k
    fold_of: dict[str, int] = {}
    for subject in sorted(shuffled(sizes, seed), key=lambda name: -sizes[name]):
        fold = min(range(k), key=filled.__getitem__)
        fold_of[subject] = fold
        filled[fold] += sizes[subject]
    return {sample: fold_of[subject] for sample, subject in subjects.items()}


def deal_as_sklearn(ids: Sequence[str], k: int, seed: int) -> dict[str, int]:
    """Deal samples as scikit-learn's `KFold(k, shuffle=True, random_state=seed)` does.

    For comparison with work that split at random; samples of one subject part.

    Args:
        ids: of the samples, sorted.
        k: number of folds.
        seed: of the shuffle.

    Returns:
        Sample id -> fold, `0` to `k - 1`.

    Raises:
        ConfigurationError: `k` is below 2 or above the number of samples.
    """
    if not 2 <= k <= len(ids):
        raise ConfigurationError(
            f"folds.k is {k}, expected 2 to the number of samples, which is {len(ids)}"
        )
    order = np.arange(len(ids))
    np.random.RandomState(seed).shuffle(order)  # the legacy stream is the point
    parts = np.array_split(order, k)
    return {ids[index]: fold for fold, part in enumerate(parts) for index in part}


def split_samples(
    samples: Sequence[Sample],
    manifest: Manifest,
    fold: int | None = None,
    seed: int | None = None,
) -> Split:
    """Return the samples to train on, to validate on and to test on.

    Args:
        samples: of the whole dataset.
        manifest: its own validation list, cut and folds.
        fold: None for the manifest's validation list or cut; a number for that fold of the splits
            that the manifest deals (train and val unless it says otherwise). Where a table deals
            them, None is fold 0.
        seed: in place of the manifest's; a fold recorded in a frozen manifest stays as it is.

    Raises:
        ConfigurationError: there is no such fold, or no sample of the validation list.
        InputErrors: a subject or an image stands on two sides.
    """
    if manifest.folds.get("dealt") == "by_table":
        train, val, test = _cut_by_table(samples, manifest, fold or 0)
    elif fold is None:
        train = [sample for sample in samples if sample.split == "train"]
        val = [sample for sample in samples if sample.split == "val"]
        if not val and train:
            train, val = _cut_validation(train, manifest, seed)
        test = [sample for sample in samples if sample.split == "test"]
    else:
        train, val, test = _cut_fold(samples, manifest, fold, seed)
    sides = {"train": train, "val": val, "test": test}
    problems, copies = _shared_subjects(sides), _copies(sides)
    if manifest.copies == "refuse":
        problems += copies
    elif copies:
        logger.warning("%d images stand on two sides: %s", len(copies), copies[0])
    if problems:
        raise InputErrors(problems, "samples on two sides of a split")
    return Split(train, val, test)


def leaks(sides: Mapping[str, Sequence[Sample]]) -> list[Problem]:
    """Return a problem for every subject and every image content on more than one side."""
    return _shared_subjects(sides) + _copies(sides)


def _shared_subjects(sides: Mapping[str, Sequence[Sample]]) -> list[Problem]:
    problems = []
    by_subject = {
        name: {sample.subject: sample for sample in samples} for name, samples in sides.items()
    }
    for (one, first), (other, second) in combinations(by_subject.items(), 2):
        for subject in sorted(first.keys() & second.keys()):
            message = (
                f"subject {subject!r} is in {one} and in {other} "
                f"({second[subject].relative.as_posix()}); keep a subject on one side"
            )
            problems.append(Problem(first[subject].relative.as_posix(), "split", message))
    return problems


def _copies(sides: Mapping[str, Sequence[Sample]]) -> list[Problem]:
    problems = []
    side_of = {sample.image: name for name, samples in sides.items() for sample in samples}
    for copies in _equal_images(sample for samples in sides.values() for sample in samples):
        found = sorted({side_of[sample.image] for sample in copies})
        if len(found) > 1:
            message = (
                f"the same image as {', '.join(c.relative.as_posix() for c in copies[1:])} "
                f"({' and '.join(found)}); remove the copy"
            )
            problems.append(Problem(copies[0].relative.as_posix(), "split", message))
    return problems


def _equal_images(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Return groups of samples whose image files have the same content.

    Only files of equal size are read. Samples of one and the same file, as B-scans of several
    people are, are no copies.
    """
    by_size: dict[int, list[Sample]] = defaultdict(list)
    for sample in {sample.image: sample for sample in samples}.values():
        by_size[sample.image.stat().st_size].append(sample)
    groups = []
    for candidates in by_size.values():
        if len(candidates) > 1:
            by_content: dict[str, list[Sample]] = defaultdict(list)
            for sample in candidates:
                by_content[file_sha256(sample.image)].append(sample)
            groups += [group for group in by_content.values() if len(group) > 1]
    return groups


def _cut_validation(
    train: list[Sample], manifest: Manifest, seed: int | None
) -> tuple[list[Sample], list[Sample]]:
    """Return train and val by the manifest's list of subjects or fraction of them."""
    rule = manifest.validation
    present = {sample.subject for sample in train}
    if "subjects" in rule:
        chosen = present & set(rule["subjects"])
        if not chosen or chosen == present:
            raise ConfigurationError(
                f"manifest {manifest.name}: validation.subjects {rule['subjects']} must be some, "
                f"not all and not none, of the {len(present)} subjects found; change the list or "
                "choose a fold"
            )
    elif "fraction" in rule and len(present) > 1:
        chosen = _fraction(train, rule["fraction"], rule["seed"] if seed is None else seed)
    else:
        chosen = set()
    return (
        [sample for sample in train if sample.subject not in chosen],
        [sample for sample in train if sample.subject in chosen],
    )


def _fraction(train: Sequence[Sample], fraction: float, seed: int) -> set[str]:
    """Return that part of the subjects; where samples have classes, of each class's subjects.

    A subject counts for the class of its first sample. One subject at least stays on either side,
    so the only subject of a class is trained on.
    """
    by_class: dict[str | None, set[str]] = defaultdict(set)
    for subject, category in {s.subject: s.category for s in reversed(train)}.items():
        by_class[category].add(subject)
    chosen: set[str] = set()
    for subjects in by_class.values():
        order = shuffled(subjects, seed)
        count = min(max(round(fraction * len(order)), 1), len(order) - 1)
        chosen.update(order[:count])
    return chosen


def _cut_by_table(
    samples: Sequence[Sample], manifest: Manifest, fold: int
) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Return train, val and test as the table beside the manifest has them."""
    k, name = manifest.folds["k"], manifest.folds["table"]
    if not 0 <= fold < k:
        raise ConfigurationError(
            f"fold is {fold}, expected 0 to {k - 1} (manifest {manifest.name})"
        )
    if manifest.path is None:
        raise ConfigurationError(f"manifest {manifest.name}: save it beside its table {name}")
    table = Table(name, "subject", "subject", {"split": f"split_{fold}"})
    rows = read_tables([table], manifest.path.parent)[name]
    sides: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    for sample in samples:
        side = rows.get(sample.subject, {}).get("split", "")
        if side not in sides:
            raise ConfigurationError(
                f"{manifest.path.parent / name}: split_{fold} of subject {sample.subject!r} "
                f"({sample.relative.as_posix()}) is {side or 'missing'}; "
                f"expected one of {', '.join(sides)}"
            )
        sides[side].append(sample)
    return sides["train"], sides["val"], sides["test"]


def _cut_fold(
    samples: Sequence[Sample], manifest: Manifest, fold: int, seed: int | None
) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Return train, val and test where `fold` of the dealt samples is val."""
    if not manifest.folds:
        raise ConfigurationError(f"fold is {fold}, but manifest {manifest.name} has no folds")
    k, splits = manifest.folds["k"], manifest.folds["splits"]
    if not 0 <= fold < k:
        raise ConfigurationError(
            f"fold is {fold}, expected 0 to {k - 1} (manifest {manifest.name})"
        )
    dealt = [sample for sample in samples if sample.split in splits]
    recorded = {sample.id: sample.fold for sample in dealt}
    if dealt and None not in recorded.values():
        folds: Mapping[str, int | None] = recorded
    elif manifest.folds.get("dealt") == "as_sklearn":
        folds = deal_as_sklearn(
            [sample.id for sample in dealt], k, manifest.folds["seed"] if seed is None else seed
        )
    else:
        subjects = {sample.id: sample.subject for sample in dealt}
        folds = assign_folds(subjects, k, manifest.folds["seed"] if seed is None else seed)
    return (
        [sample for sample in dealt if folds[sample.id] != fold],
        [sample for sample in dealt if folds[sample.id] == fold],
        [sample for sample in samples if sample.split == "test" and sample.split not in splits],
    )


def shuffled(names: Iterable[str], seed: int) -> list[str]:
    """Return `names` in an order that depends on the seed and nothing else."""

    def rank(name: str) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{int(seed)}:{name}".encode(), digest_size=8).digest(), name

    return sorted(names, key=rank)
