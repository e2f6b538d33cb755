"""The cases of a run as data lists of MONAI: found, checked and split before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.manifests import Manifest, find_samples, load_manifest
from pipeline.data.samples import Sample
from pipeline.errors import ConfigurationError, InputError

__all__ = ["Cases", "as_cases", "found", "inputs_below"]


@dataclass(frozen=True)
class Cases:
    """The cases of a run, and what there is to say about them.

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


def as_cases(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return samples as a data list."""
    return [
        {
            "image": str(sample.image),
            "label": None if sample.label is None else str(sample.label),
            "fov": None if sample.fov is None else str(sample.fov),
            "name": sample.relative.as_posix(),
            "subject": sample.subject,
            "stratum": sample.stratum or "",
        }
        for sample in samples
    ]


def found(manifest: Manifest, folder: str, fold: int | None, *splits: Sequence[Sample]) -> str:
    """Return in one line what train, val and test hold."""
    counts = " / ".join(str(len(samples)) for samples in splits)
    subjects = len({sample.subject for samples in splits for sample in samples})
    chosen = "the manifest's validation set" if fold is None else f"fold {fold}"
    return (
        f"{manifest.name} in {folder}: train / val / test {counts} images of {subjects} subjects "
        f"({chosen})"
    )


def inputs_below(
    dataset_dir: str | None, manifest: str, output_dir: str, follow_symlinks: bool = False
) -> list[dict[str, Any]]:
    """List the inputs of an inference run.

    Args:
        dataset_dir: one file, or a folder that `manifest` describes.
        manifest: name or path of the manifest.
        output_dir: where results go: not below `dataset_dir`, where the next run would find them.
        follow_symlinks: accept links that lead out of `dataset_dir`.

    Raises:
        ConfigurationError: dataset_dir is not set, or holds output_dir.
        InputError: there is no input.
    """
    if dataset_dir is None:
        raise ConfigurationError("dataset_dir is not set: give a file or a folder of files")
    source = Path(dataset_dir)
    if not source.exists():
        raise InputError(f"{source}: not found, expected a file or a folder of files")
    if Path(output_dir).resolve().is_relative_to(source.resolve()):
        raise ConfigurationError(
            f"output_dir {output_dir} lies in dataset_dir {dataset_dir}: the next run would take "
            "results for inputs; choose a folder outside"
        )
    if source.is_file() or source.suffix == ".zarr":
        return [{"image": str(source), "label": None, "fov": None, "name": source.name}]
    samples = find_samples(load_manifest(manifest), source, follow_symlinks=follow_symlinks)
    return [{**case, "label": None} for case in as_cases(samples)]
