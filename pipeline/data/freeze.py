"""Freeze a dataset: write down every file with its content, subject, split and fold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.atomic import write_yaml
from pipeline.data.checksums import file_sha256
from pipeline.data.folds import assign_folds, deal_as_sklearn
from pipeline.data.images import IMAGE_SUFFIXES, read_header
from pipeline.data.manifests import Manifest, find_samples
from pipeline.data.samples import Sample
from pipeline.errors import ConfigurationError

__all__ = ["freeze"]


def freeze(
    manifest: Manifest,
    dataset_dir: Path | str,
    output: Path | str,
    folds: int = 5,
    seed: int | None = None,
) -> Path:
    """Write a manifest that lists the samples found instead of patterns for them.

    `load_manifest` reads it like any other; with `verify` the content of the files is compared.

    Args:
        manifest: the layout.
        dataset_dir: the data.
        output: the YAML file to write.
        folds: number of folds to deal; 0 for none.
        seed: of the folds; by default the manifest's, else 0.

    Returns:
        The path written.

    Raises:
        InputError: a file is missing or cannot be read.
        ConfigurationError: more folds than subjects, or folds of a table, each with test images of
            its own, which a list of samples cannot tell.
    """
    samples = find_samples(manifest, dataset_dir)
    splits = list(manifest.folds.get("splits", ("train", "val")))
    if seed is None:
        seed = int(manifest.folds.get("seed", 0))
    dealt = {sample.id: sample.subject for sample in samples if sample.split in splits}
    fold_of = _dealt(manifest, dealt, folds, seed) if folds and dealt else {}
    content = {
        "name": manifest.name,
        "title": manifest.title,
        "task": manifest.task,
        "licence": manifest.licence,
        "source": manifest.source,
        "citation": manifest.citation,
        "image": manifest.image,
        "intensity": manifest.intensity,
        "labels": manifest.labels,
        "classes": manifest.classes or None,
        "subject": manifest.subject,
        "stratum": manifest.stratum,
        "validation": manifest.validation or None,
        "folds": {"k": folds, "seed": seed, "splits": splits} if fold_of else None,
        "notes": manifest.notes,
        "records": [_record(sample, fold_of.get(sample.id)) for sample in samples],
    }
    return write_yaml(output, content)


def _dealt(
    manifest: Manifest, subjects: Mapping[str, str], folds: int, seed: int
) -> dict[str, int]:
    dealt = manifest.folds.get("dealt")
    if dealt == "by_table":
        raise ConfigurationError(
            f"manifest {manifest.name}: its folds stand in the table {manifest.folds['table']}; "
            "freeze it without folds (--folds 0), and keep that table for them"
        )
    if dealt == "as_sklearn":
        return deal_as_sklearn(sorted(subjects), folds, seed)
    return assign_folds(subjects, folds, seed)


def _record(sample: Sample, fold: int | None) -> Mapping[str, Any]:
    return {
        "id": sample.id,
        "subject": sample.subject,
        "split": sample.split,
        "stratum": sample.stratum,
        "category": sample.category,
        "fold": fold,
        "files": {role: _file(path, sample.root) for role, path in sample.roles.items()},
    }


def _file(path: Path, root: Path) -> Mapping[str, Any]:
    shape, dtype = None, None
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        header = read_header(path)
        shape, dtype = list(header.shape), str(header.dtype)
    return {
        "path": path.relative_to(root).as_posix(),
        "sha256": file_sha256(path),
        "bytes": path.stat().st_size,
        "shape": shape,
        "dtype": dtype,
    }
