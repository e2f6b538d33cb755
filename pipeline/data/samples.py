"""Samples: an image and the files that belong to it, found on disk by a manifest."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.checksums import file_sha256
from pipeline.data.dataset_paths import check_inside, walk_files
from pipeline.data.images import image_stem
from pipeline.data.lists import read_lists
from pipeline.data.path_patterns import Matches, fill, match_paths, partner
from pipeline.data.tables import read_tables
from pipeline.errors import ConfigurationError, InputError, InputErrors, Problem

if TYPE_CHECKING:
    from pipeline.data.manifests import FilePattern, Manifest, Record

__all__ = ["Sample", "find_by_lists", "find_by_patterns", "find_by_records"]

_Rows = Mapping[str, Mapping[str, Mapping[str, str]]]  # table -> key -> field -> value


@dataclass(frozen=True)
class Sample:
    """An image with what belongs to it.

    Args:
        id: image path below `root` without its suffix; unique in the dataset.
        image: the image.
        label: its truth, or None.
        fov: its field of view, or None.
        observer2: a second truth, or None.
        subject: samples of one subject are never separated.
        split: `train`, `val` or `test`.
        stratum: group with a row of its own in tables, or None.
        root: the dataset folder.
        files: further files by role.
        fold: validation fold, where a frozen manifest records it.
        category: its class, as a name or a number in the owner's words, or None.
    """

    id: str
    image: Path
    label: Path | None
    fov: Path | None
    observer2: Path | None
    subject: str
    split: str
    stratum: str | None
    root: Path
    files: Mapping[str, Path] = field(default_factory=dict, hash=False)
    fold: int | None = None
    category: str | None = None

    @property
    def relative(self) -> Path:
        """Return the path of the image below the dataset folder."""
        return self.image.relative_to(self.root)

    @property
    def roles(self) -> dict[str, Path]:
        """Return every file of the sample by role, the image first."""
        named = {
            "image": self.image,
            "label": self.label,
            "fov": self.fov,
            "observer2": self.observer2,
            **self.files,
        }
        return {role: path for role, path in named.items() if path is not None}


def find_by_patterns(
    manifest: Manifest,
    root: Path,
    *,
    follow_symlinks: bool,
    incomplete: list[Problem] | None = None,
) -> list[Sample]:
    """Return the samples whose paths below `root` match the patterns of `manifest`.

    Raises:
        InputError: no image matches.
        InputErrors: images without label or labels without image, all of them, unless they are to
            go to `incomplete`.
        ConfigurationError: a path leaves `root`, or two files claim one place.
    """
    paths = list(walk_files(root, follow_symlinks=follow_symlinks))
    rows = read_tables(manifest.tables, root)
    samples: list[Sample] = []
    problems: list[Problem] = []
    images = 0
    for entry in manifest.files:
        matched = {
            role: match_paths(pattern, {**manifest.fields, **entry.where}, paths)
            for role, pattern in entry.roles.items()
        }
        images += len(matched["image"])
        samples += _pair(manifest, entry, matched, root, rows, problems)
    if not images:
        orphans = f" ({len(problems)} labels without image)" if problems else ""
        patterns = " or ".join(dict.fromkeys(entry.roles["image"] for entry in manifest.files))
        raise InputError(
            f"no files matching {patterns} under {root}{orphans}; "
            f"expected layout: {manifest.expected_layout}"
        )
    if problems and incomplete is None:
        raise InputErrors(problems, f"incomplete samples under {root}")
    if incomplete is not None:
        incomplete += problems
    _check_texts(samples)
    _check_unique(samples)
    for sample in samples:
        for path in sample.roles.values():
            check_inside(path, root, follow_symlinks=follow_symlinks)
    return samples


def find_by_lists(manifest: Manifest, root: Path, *, follow_symlinks: bool) -> list[Sample]:
    """Return the samples that the lists of `manifest` name.

    Raises:
        InputError: a list is missing or empty.
        InputErrors: every bad line, or every listed image that is missing.
        ConfigurationError: a path leaves `root`.
    """
    samples: list[Sample] = []
    problems: list[Problem] = []
    present = {
        unicodedata.normalize("NFC", p): p
        for p in walk_files(root, follow_symlinks=follow_symlinks)
    }
    for one in read_lists(manifest.lists, root, manifest.fields):
        path = present.get(unicodedata.normalize("NFC", one.image))
        if path is None:
            if one.image.startswith("/") or ".." in one.image.split("/"):
                check_inside(root / one.image, root, follow_symlinks=follow_symlinks)
            problems.append(Problem(one.image, "find", f"not found, listed in {one.where}"))
            continue
        samples.append(_sample(manifest, root, path, {"image": root / path}, one.values))
    if problems:
        raise InputErrors(problems, f"listed images missing under {root}")
    if not samples:
        raise InputError(f"{root}: the lists name no image; expected {manifest.expected_layout}")
    _check_unique(samples)
    for sample in samples:
        if sample.image.is_symlink():  # the folders were walked, so they lie inside
            check_inside(sample.image, root, follow_symlinks=follow_symlinks)
    return samples


def find_by_records(
    manifest: Manifest, root: Path, *, verify: bool, follow_symlinks: bool
) -> list[Sample]:
    """Return the samples of a frozen manifest after checking that every file is there.

    Raises:
        InputErrors: every file that is missing or, with `verify`, changed.
        ConfigurationError: a path leaves `root`, or two records claim one place.
    """
    samples = [_recorded_sample(record, root) for record in manifest.records]
    problems = []
    for sample, record in zip(samples, manifest.records, strict=True):
        for role, path in sample.roles.items():
            check_inside(path, root, follow_symlinks=follow_symlinks)
            expected = record.files[role]
            if not path.is_file():
                problems.append(Problem(expected.path, "find", f"not found under {root}"))
            elif verify and expected.bytes not in (None, path.stat().st_size):
                found = f"{path.stat().st_size} bytes found, {expected.bytes} recorded"
                problems.append(Problem(expected.path, "verify", f"changed: {found}"))
            elif verify and expected.sha256 not in (None, file_sha256(path)):
                problems.append(
                    Problem(expected.path, "verify", "changed: its SHA-256 is not the recorded one")
                )
    if problems:
        raise InputErrors(
            problems,
            f"files of manifest {manifest.name} missing or changed (restore them or freeze the "
            "folder anew; verify: false takes changed ones as they are)",
        )
    _check_unique(samples)
    return samples


def _pair(
    manifest: Manifest,
    entry: FilePattern,
    matched: Mapping[str, Matches],
    root: Path,
    rows: _Rows,
    problems: list[Problem],
) -> Iterator[Sample]:
    """Yield the whole samples of one entry; what cannot be paired goes to `problems`."""
    used: set[str] = set()
    for key, (relative, captured) in matched["image"].items():
        found: dict[str, Path] = {}
        before = len(problems)
        for role, candidates in matched.items():
            path = relative if role == "image" else partner(key, candidates)
            if path is not None:
                found[role] = root / path
                used.add(path)
        if "label" not in found and entry.labels_required:
            expected = fill(entry.roles["label"], captured)
            problems.append(Problem(relative, "find", f"no label; expected {expected}"))
        values = {**captured, "split": entry.split}
        for table in manifest.tables:
            row = rows.get(table.file, {}).get(captured[table.field])
            if row is None:
                if table.file in rows and entry.split != "test":
                    message = f"{table.field} {captured[table.field]!r} is not in {table.file}"
                    problems.append(Problem(relative, "find", f"{message}; add its row"))
                row = dict.fromkeys(table.columns, captured[table.field])
            values |= row
        if len(problems) == before:
            yield _sample(manifest, root, relative, found, values)
    for relative, _ in matched.get("label", {}).values():
        if relative not in used:
            message = f"label without an image; expected one at {entry.roles['image']}"
            problems.append(Problem(relative, "find", message))


def _sample(
    manifest: Manifest,
    root: Path,
    relative: str,
    found: dict[str, Path],
    values: Mapping[str, str],
) -> Sample:
    values = {**values, **_blocks(manifest, relative, values)}
    of_class = manifest.classes.get("of")
    image, label, fov, observer2 = (
        found.pop(role, None) for role in ("image", "label", "fov", "observer2")
    )
    return Sample(
        id=_id(relative),
        image=image or root / relative,
        label=label,
        fov=fov,
        observer2=observer2,
        subject=fill(manifest.subject, values),
        split=values["split"],
        stratum=fill(manifest.stratum, values) if manifest.stratum else None,
        root=root,
        files=found,
        category=fill(of_class, values) if of_class else None,
    )


def _blocks(manifest: Manifest, relative: str, values: Mapping[str, str]) -> dict[str, str]:
    """Return the fields that number the blocks, such as those of a video's frames."""
    found = {}
    for name, block in manifest.blocks.items():
        value = values[block["field"]]
        if not value.isdecimal():
            raise InputError(f"{relative}: {block['field']} is {value!r}, expected a number")
        found[name] = str(int(value) // block["size"])
    return found


def _recorded_sample(record: Record, root: Path) -> Sample:
    found = {role: root / file.path for role, file in record.files.items()}
    image, label, fov, observer2 = (
        found.pop(role, None) for role in ("image", "label", "fov", "observer2")
    )
    return Sample(
        id=record.id,
        image=image or root,
        label=label,
        fov=fov,
        observer2=observer2,
        subject=record.subject,
        split=record.split,
        stratum=record.stratum,
        root=root,
        files=found,
        fold=record.fold,
        category=record.category,
    )


def _id(relative: str) -> str:
    folder, _, name = relative.rpartition("/")
    return f"{folder}/{image_stem(name)}" if folder else image_stem(name)


def _check_texts(samples: list[Sample]) -> None:
    """Refuse names that no table or sidecar can hold: bytes that are no text in UTF-8."""
    relative = [str(path.relative_to(one.root)) for one in samples for path in one.roles.values()]
    problems = [
        Problem(ascii(name), "find", "its name is not UTF-8; rename the file or its folder")
        for name in relative
        if any("\ud800" <= letter <= "\udfff" for letter in name)
    ]
    if problems:
        raise InputErrors(problems, "names that are no text")


def _check_unique(samples: list[Sample]) -> None:
    """Refuse two samples of one id and one image in two samples."""
    for what in ("id", "image"):
        seen: dict[object, Sample] = {}
        clashes = []
        for sample in samples:
            other = seen.setdefault(getattr(sample, what), sample)
            if other is not sample:
                clashes.append(f"{other.image} ({other.split}) and {sample.image} ({sample.split})")
        if clashes:
            raise ConfigurationError(
                f"two samples of one name: {'; '.join(clashes[:20])}; rename or remove one of each"
            )
