"""Manifests: one YAML file that says where the files of a dataset lie and whose they are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.lists import ImageList
from pipeline.data.samples import Sample, find_by_lists, find_by_patterns, find_by_records
from pipeline.data.shipped import shipped_folder
from pipeline.data.strict_yaml import read_yaml
from pipeline.data.tables import Table
from pipeline.data.validation import check_schema, check_templates
from pipeline.errors import ConfigurationError, InputError, Problem

__all__ = [
    "FilePattern",
    "Manifest",
    "Record",
    "RecordedFile",
    "Sample",
    "find_samples",
    "list_manifests",
    "load_manifest",
    "manifest_from_mapping",
]

_ROLES = ("image", "label", "fov", "observer2")


@dataclass(frozen=True)
class FilePattern:
    """Where the files of one split lie.

    Args:
        split: `train`, `val` or `test`.
        roles: role -> pattern with `{field}` placeholders; `image` always, then `label`, `fov`,
            `observer2` and any further role.
        labels_required: an image without a label is an error.
        where: narrower regular expressions for some fields.
    """

    split: str
    roles: Mapping[str, str]
    labels_required: bool
    where: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordedFile:
    """One file of a frozen manifest; what is None was not recorded."""

    path: str
    sha256: str | None = None
    bytes: int | None = None
    shape: tuple[int, ...] | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Record:
    """One sample of a frozen manifest."""

    id: str
    subject: str
    split: str
    files: Mapping[str, RecordedFile]
    stratum: str | None = None
    fold: int | None = None
    category: str | None = None


@dataclass(frozen=True)
class Manifest:
    """A validated manifest.

    Args:
        name: by which it is asked for.
        title: for a person.
        task: what the labels are.
        licence: terms of the owner.
        source: address of the owner.
        citation: BibTeX.
        image: `width`, `height`, `channels`, `bit_depth`; None where it varies.
        intensity: `mean`, `std` per channel on a scale of 0 to 1, or None, and a `note`.
        labels: `foreground` rule and `allowed` values.
        fields: field -> regular expression.
        files: patterns, split by split; empty in a frozen manifest.
        subject: template for the subject of a sample.
        stratum: template for its stratum.
        validation: `fraction` and `seed`, or `subjects`, or nothing.
        folds: `k`, `seed`, `dealt`, `splits` and `table`, or nothing.
        records: the samples of a frozen manifest.
        notes: what a user should know.
        tables: CSV files that give samples further fields.
        path: the file it was read from.
        lists: files that list the images, in place of patterns.
        classes: where images have a class: `of`, the template for it, and `first`, `count`,
            `file`, `names` as far as they are given; or nothing.
        blocks: further field -> `field` and `size`: a number cut into blocks.
        copies: `refuse` the same image on two sides of a split, or `report` it only.
    """

    name: str
    title: str
    task: str
    licence: str
    source: str | None
    citation: str | None
    image: Mapping[str, int | None]
    intensity: Mapping[str, Any]
    labels: Mapping[str, Any]
    fields: Mapping[str, str]
    files: tuple[FilePattern, ...]
    subject: str
    stratum: str | None
    validation: Mapping[str, Any]
    folds: Mapping[str, Any]
    records: tuple[Record, ...] = ()
    notes: str = ""
    tables: tuple[Table, ...] = ()
    path: Path | None = None
    lists: tuple[ImageList, ...] = ()
    classes: Mapping[str, Any] = field(default_factory=dict)
    blocks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    copies: str = "refuse"

    @property
    def expected_layout(self) -> str:
        """Return the image and label patterns in one line, for messages."""
        parts = [one.layout for one in self.lists]
        for entry in self.files:
            label = entry.roles.get("label")
            optional = "" if entry.labels_required else " (optional)"
            parts.append(entry.roles["image"] + (f" with {label}{optional}" if label else ""))
        parts += [record.files["image"].path for record in self.records[:3]]
        return ", ".join(dict.fromkeys(parts))


def list_manifests() -> list[Manifest]:
    """Return the manifests that come with the package, sorted by name."""
    return [load_manifest(path) for path in sorted(shipped_folder("data_manifests").glob("*.yaml"))]


def load_manifest(name_or_path: str | Path) -> Manifest:
    """Return a manifest by the name of a shipped one or by the path of a file.

    Raises:
        ConfigurationError: there is none, or it is not valid; the message names the key.
    """
    path = _manifest_path(name_or_path)
    return manifest_from_mapping(read_yaml(path), path)


def manifest_from_mapping(content: object, path: Path | None = None) -> Manifest:
    """Return the manifest that `content`, the parsed YAML, describes.

    Raises:
        ConfigurationError: it is not valid; the message names the key.
    """
    where = str(path) if path is not None else "manifest"
    manifest = _build(check_schema(content, where), path)
    check_templates(manifest, where)
    return manifest


def find_samples(
    manifest: Manifest,
    dataset_dir: Path | str,
    *,
    verify: bool = False,
    follow_symlinks: bool = False,
    incomplete: list[Problem] | None = None,
) -> list[Sample]:
    """Return the samples of `manifest` under `dataset_dir`, sorted by id.

    Files belong together when the fields captured from their paths agree; order plays no part.

    Args:
        manifest: the layout, or the records of a frozen manifest. Where one of its lists is there,
            the lists hold and not the patterns.
        dataset_dir: the folder that the owner's archive unpacks to.
        verify: with records, compare size and SHA-256 of every file.
        follow_symlinks: accept links that lead out of `dataset_dir`.
        incomplete: where patterns find images without their label or labels without image, these
            go here, and the others are returned; None raises.

    Raises:
        InputError: the folder or any match is missing.
        InputErrors: every image without its label, label without image, changed file, bad line of
            a list and listed image that is missing.
        ConfigurationError: a path leaves `dataset_dir`, or two files claim one place.
    """
    root = Path(dataset_dir)
    if not root.is_dir():
        found = "is a file" if root.exists() else "not found"
        raise InputError(
            f"{root}: dataset_dir {found}, expected the folder of {manifest.title}; "
            f"expected layout: {manifest.expected_layout}"
        )
    root = root.resolve()
    if manifest.records:
        samples = find_by_records(manifest, root, verify=verify, follow_symlinks=follow_symlinks)
    elif any((root / one.file).is_file() for one in manifest.lists):
        samples = find_by_lists(manifest, root, follow_symlinks=follow_symlinks)
    else:
        samples = find_by_patterns(
            manifest, root, follow_symlinks=follow_symlinks, incomplete=incomplete
        )
    return sorted(samples, key=lambda sample: sample.id)


def _manifest_path(name_or_path: str | Path) -> Path:
    given = Path(name_or_path)
    if given.is_file():
        return given
    folder = shipped_folder("data_manifests")
    shipped = folder / f"{name_or_path}.yaml"
    if shipped.parent == folder and shipped.is_file():
        return shipped
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    close = difflib.get_close_matches(str(name_or_path), known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigurationError(
        f"manifest {str(name_or_path)!r}: neither a file nor a known name; "
        f"{hint}known: {', '.join(known)}"
    )


def _build(content: Mapping[str, Any], path: Path | None) -> Manifest:
    folds = dict(content["folds"] or {})
    if folds:
        folds.setdefault("splits", ["train", "val"])
        folds.setdefault("dealt", "by_subject")
    return Manifest(
        name=content["name"],
        title=content["title"],
        task=content["task"],
        licence=content["licence"],
        source=content["source"],
        citation=content["citation"],
        image=content.get("image", {}),
        intensity=content.get("intensity", {"mean": None, "std": None, "note": "not measured"}),
        labels=content["labels"],
        fields=content.get("fields", {}),
        files=tuple(
            _file_pattern(entry, "optional" if content.get("classes") else "required")
            for entry in content.get("files", ())
        ),
        subject=content["subject"],
        stratum=content.get("stratum"),
        validation=content["validation"] or {},
        folds=folds,
        records=tuple(_record(entry) for entry in content.get("records", ())),
        notes=content.get("notes", ""),
        tables=tuple(Table(**entry) for entry in content.get("tables", ())),
        path=path,
        lists=tuple(ImageList(**entry) for entry in content.get("lists", ())),
        classes=content.get("classes") or {},
        blocks=content.get("blocks", {}),
        copies=content.get("copies", "refuse"),
    )


def _file_pattern(entry: Mapping[str, Any], labels: str) -> FilePattern:
    """Return the pattern of an entry; `labels` holds where it does not say."""
    roles = {role: entry[role] for role in _ROLES if role in entry} | entry.get("extra", {})
    return FilePattern(
        split=entry["split"],
        roles=roles,
        labels_required=entry.get("labels", labels) == "required",
        where=entry.get("where", {}),
    )


def _record(entry: Mapping[str, Any]) -> Record:
    files = {}
    for role, file in entry["files"].items():
        shape = file.get("shape")
        files[role] = RecordedFile(**{**file, "shape": tuple(shape) if shape else None})
    return Record(**{**entry, "files": files})
