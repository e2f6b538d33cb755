from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.data.manifests import (
    Manifest,
    find_samples,
    list_manifests,
    load_manifest,
    manifest_from_mapping,
)
from pipeline.data.shipped import shipped_folder
from pipeline.errors import ConfigurationError, InputError, InputErrors

EXPECTED = {
    "chase_db1", "drive", "fives", "fives_512", "hrf", "images", "les_av", "stare", "vessel_pairs",
}  # fmt: skip


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def changed(content: dict[str, Any], **changes: Any) -> Manifest:
    return manifest_from_mapping({**content, **changes})


def test_shipped_manifests_are_valid_and_named_like_their_files() -> None:
    manifests = {manifest.name: manifest for manifest in list_manifests()}
    assert set(manifests) >= EXPECTED
    for name, manifest in manifests.items():
        assert manifest.path is not None
        assert manifest.path.stem == name


@pytest.mark.parametrize("name", sorted(EXPECTED - {"images", "vessel_pairs"}))
def test_public_datasets_name_owner_licence_and_paper(name: str) -> None:
    manifest = load_manifest(name)
    assert manifest.source is not None
    assert manifest.source.startswith("https://")
    assert manifest.citation is not None
    assert re.match(r"@(article|inproceedings)\{\w+,", manifest.citation)
    assert "doi " in manifest.citation or "doi=" in manifest.citation.replace(" ", "")
    assert manifest.citation.count("{") == manifest.citation.count("}")
    assert manifest.licence


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_intensity_is_measured_for_each_channel_or_says_why_not(name: str) -> None:
    manifest = load_manifest(name)
    if manifest.intensity["mean"] is None:
        assert manifest.intensity["std"] is None
        assert manifest.intensity["note"]
    else:
        assert len(manifest.intensity["mean"]) == manifest.image["channels"]
        assert len(manifest.intensity["std"]) == manifest.image["channels"]
        assert all(0 < value < 1 for value in manifest.intensity["mean"])


def test_unknown_name_is_answered_with_the_closest() -> None:
    with pytest.raises(ConfigurationError, match=r"'driv': .*did you mean drive\?"):
        load_manifest("driv")


@pytest.mark.parametrize("name", ["../drive", "/etc/passwd_", "sub/drive"])
def test_name_is_no_path_into_the_shipped_folder(name: str) -> None:
    with pytest.raises(ConfigurationError, match="neither a file nor a known name"):
        load_manifest(name)


def test_path_of_a_file_is_loaded(tmp_path: Path, manifest_content: dict[str, Any]) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(manifest_content))
    assert load_manifest(path).name == "tiny"
    assert load_manifest(str(path)).path == path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"licence": None}, "licence: None is not of type 'string'"),
        ({"subjet": "x"}, "did you mean 'subject'"),
        ({"validation": {"subjects": [37]}}, "validation"),
        ({"folds": {"k": 1, "seed": 0}}, "folds.k: 1 is less than the minimum"),
        ({"files": [{"split": "dev", "image": "a"}]}, "files.0.split: 'dev' is not one of"),
        ({"files": [{"split": "test", "image": "a/{x}", "labels": "optional"}]}, "field 'x'"),
        ({"files": [{"split": "train", "image": "{name}.png"}]}, "no `label` pattern"),
        (
            {"files": [{"split": "train", "image": "../{name}", "label": "b/{name}"}]},
            "'../{name}' leaves dataset_dir",
        ),
        ({"files": [{"split": "train", "image": "/{name}", "label": "b/{name}"}]}, "files.0.image"),
        ({"fields": {"name": "("}}, "fields.name: '(' is no expression"),
        ({"fields": {"name": "(a|b)"}}, "captures a group"),
        ({"subject": "{child}"}, "subject: unknown field 'child'"),
        ({"stratum": "{grade}"}, "stratum: unknown field 'grade'"),
        ({"labels": {"foreground": "over 127", "allowed": None}}, "labels.foreground"),
        (
            {
                "fields": {"name": r"\d+", "eye": "[LR]"},
                "files": [{"split": "train", "image": "a/{name}", "label": "b/{name}{eye}"}],
            },
            "field 'eye' is not in the image pattern",
        ),
    ],
)
def test_what_is_wrong_is_named_by_its_key(
    manifest_content: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)) as caught:
        changed(manifest_content, **changes)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_missing_key_is_named(manifest_content: dict[str, Any]) -> None:
    del manifest_content["subject"]
    with pytest.raises(ConfigurationError, match="'subject' is a required property"):
        manifest_from_mapping(manifest_content)


@pytest.mark.parametrize("content", [None, [], "text", 3])
def test_file_that_is_no_mapping_is_refused(content: object) -> None:
    with pytest.raises(ConfigurationError, match="manifest: top level"):
        manifest_from_mapping(content)


def test_pairs_agree_in_their_fields_and_not_in_their_order(
    tmp_path: Path, manifest_content: dict[str, Any]
) -> None:
    # In sorted order the labels are 1, 10, 2 and the images 1_x, 10_x, 2_x after renaming.
    touch(tmp_path, "image/1.png", "image/10.png", "image/2.png", "image/02.png")
    touch(tmp_path, "label/10_m.png", "label/2_m.png", "label/1_m.png", "label/02_m.png")
    files = [{"split": "train", "image": "image/{name}.png", "label": "label/{name}_m.png"}]
    samples = find_samples(changed(manifest_content, files=files), tmp_path)
    assert [sample.id for sample in samples] == ["image/02", "image/1", "image/10", "image/2"]
    for sample in samples:
        assert sample.label is not None
        assert sample.label.name == f"{sample.image.stem}_m.png"


def test_fields_that_vary_between_roles_do_not_pair(
    tmp_path: Path, manifest_content: dict[str, Any]
) -> None:
    touch(tmp_path, "image/a.png", "label/a.tif", "image/b.TIF", "label/b.png.gz")
    manifest = load_manifest("vessel_pairs")
    assert {s.id: s.label.name for s in find_samples(manifest, tmp_path) if s.label} == {
        "image/a": "a.tif",
        "image/b": "b.png.gz",
    }


def test_sample_knows_its_files_subject_stratum_and_place(tmp_path: Path) -> None:
    touch(tmp_path, "train/Original/7_D.png", "train/Ground truth/7_D.png")
    touch(tmp_path, "test/Original/7_D.png", "test/Ground truth/7_D.png")
    test, train = find_samples(load_manifest("fives"), tmp_path)
    assert (train.split, train.subject, train.stratum) == ("train", "train/7_D", "D")
    assert (test.split, test.subject) == ("test", "test/7_D")
    assert train.relative == Path("train/Original/7_D.png")
    assert list(train.roles) == ["image", "label"]
    assert len({train, test}) == 2


def test_further_roles_are_kept_by_name(tmp_path: Path, manifest_content: dict[str, Any]) -> None:
    touch(tmp_path, "image/a.png", "label/a.png", "layers/a.txt")
    entry = {**manifest_content["files"][0], "extra": {"layers": "layers/{name}.txt"}}
    (sample,) = find_samples(changed(manifest_content, files=[entry]), tmp_path)
    assert sample.files == {"layers": tmp_path.resolve() / "layers/a.txt"}
    assert sample.roles["layers"].name == "a.txt"


def test_every_missing_label_and_image_is_listed_at_once(
    tmp_path: Path, manifest_content: dict[str, Any]
) -> None:
    touch(tmp_path, "image/a.png", "image/b.png", "image/c.png", "label/c.png", "label/d.png")
    with pytest.raises(InputErrors) as caught:
        find_samples(manifest_from_mapping(manifest_content), tmp_path)
    assert {problem.path for problem in caught.value.problems} == {
        "image/a.png",
        "image/b.png",
        "label/d.png",
    }
    assert "no label; expected label/a.png" in str(caught.value)
    assert "label without an image" in str(caught.value)
    assert caught.value.exit_code == 3


def test_labels_may_be_absent_where_the_manifest_says_so(tmp_path: Path) -> None:
    touch(tmp_path, "test/images/01_test.tif", "test/mask/01_test_mask.gif")
    (sample,) = find_samples(load_manifest("drive"), tmp_path)
    assert (sample.label, sample.split) == (None, "test")
    assert sample.fov is not None


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_empty_folder_says_what_was_expected(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        InputError, match=r"no files matching .* under .*; expected layout: "
    ) as error:
        find_samples(load_manifest(name), tmp_path)
    assert error.value.exit_code == 3


def test_missing_folder_and_file_in_its_place_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none: dataset_dir not found.*expected layout"):
        find_samples(load_manifest("drive"), tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        find_samples(load_manifest("drive"), tmp_path / "file")


def test_hidden_files_are_no_data(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "._a.png", ".a.12.tmp.png", "__MACOSX/a.png", ".cache/b.png")
    assert [sample.id for sample in find_samples(load_manifest("images"), tmp_path)] == ["a"]


@pytest.mark.parametrize("names", [("a.png", "a.tif"), ("d/a.png", "d/a.png.gz")])
def test_two_images_of_one_name_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    touch(tmp_path, *names)
    with pytest.raises(ConfigurationError, match="two samples of one name") as caught:
        find_samples(load_manifest("images"), tmp_path)
    assert all(name in str(caught.value) for name in names)


def test_two_labels_for_one_image_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "image/a.png", "label/a.png", "label/a.gif")
    with pytest.raises(ConfigurationError, match=r"label/a\.gif and label/a\.png claim the same"):
        find_samples(load_manifest("vessel_pairs"), tmp_path)


def test_equal_names_in_different_folders_are_different_samples(tmp_path: Path) -> None:
    touch(tmp_path, "A/scan.png", "B/scan.png")
    samples = find_samples(load_manifest("images"), tmp_path)
    assert [sample.id for sample in samples] == ["A/scan", "B/scan"]


def test_spaces_and_both_spellings_of_an_accent_pair(
    tmp_path: Path, manifest_content: dict[str, Any]
) -> None:
    composed = unicodedata.normalize("NFC", "späte Ähre")
    touch(tmp_path, f"image/{composed}.png")
    touch(tmp_path, f"label/{unicodedata.normalize('NFD', composed)}.png")
    (sample,) = find_samples(manifest_from_mapping(manifest_content), tmp_path)
    assert sample.label is not None
    assert sample.label.exists()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_link_out_of_the_folder_is_refused_unless_allowed(tmp_path: Path, what: str) -> None:
    outside = touch(tmp_path / "outside", "b.png")
    root = touch(tmp_path / "data", "a.png")
    if what == "file":
        (root / "b.png").symlink_to(outside / "b.png")
    else:
        (root / "more").symlink_to(outside, target_is_directory=True)
    with pytest.raises(ConfigurationError, match="a link that leaves dataset_dir") as caught:
        find_samples(load_manifest("images"), root)
    assert caught.value.exit_code == 2
    assert len(find_samples(load_manifest("images"), root, follow_symlinks=True)) == 2


def test_link_inside_the_folder_and_link_to_the_folder_are_followed(tmp_path: Path) -> None:
    root = touch(tmp_path / "data", "a.png")
    (root / "b.png").symlink_to(root / "a.png")
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    assert len(find_samples(load_manifest("images"), tmp_path / "link")) == 2


def test_link_to_a_folder_above_ends(tmp_path: Path) -> None:
    root = touch(tmp_path / "data", "d/a.png")
    (root / "d" / "up").symlink_to(root, target_is_directory=True)
    assert [sample.id for sample in find_samples(load_manifest("images"), root)] == ["d/a"]


def records(manifest_content: dict[str, Any], *paths: str) -> Manifest:
    del manifest_content["files"], manifest_content["fields"]
    manifest_content["records"] = [
        {"id": str(n), "subject": str(n), "split": "train", "files": {"image": {"path": path}}}
        for n, path in enumerate(paths)
    ]
    return manifest_from_mapping(manifest_content)


@pytest.mark.parametrize("path", ["../../secret.png", "a/../../secret.png", "/etc/hostname"])
def test_recorded_path_that_leaves_the_folder_is_refused(
    tmp_path: Path, manifest_content: dict[str, Any], path: str
) -> None:
    root = touch(tmp_path / "x" / "data", "a/a.png")
    touch(tmp_path, "secret.png", "x/secret.png")
    with pytest.raises(ConfigurationError, match="leaves dataset_dir") as caught:
        find_samples(records(manifest_content, path), root)
    assert caught.value.exit_code == 2


def test_every_recorded_file_that_is_missing_is_listed(
    tmp_path: Path, manifest_content: dict[str, Any]
) -> None:
    touch(tmp_path, "a.png")
    with pytest.raises(InputErrors) as caught:
        find_samples(records(manifest_content, "a.png", "b.png", "c.png"), tmp_path)
    assert [problem.path for problem in caught.value.problems] == ["b.png", "c.png"]


def test_two_records_of_one_image_are_refused(
    tmp_path: Path, manifest_content: dict[str, Any]
) -> None:
    touch(tmp_path, "a.png")
    with pytest.raises(ConfigurationError, match="two samples of one name"):
        find_samples(records(manifest_content, "a.png", "a.png"), tmp_path)


def test_chase_is_split_between_children(tmp_path: Path) -> None:
    for child in range(1, 15):
        for eye in "LR":
            name = f"Image_{child:02}{eye}"
            touch(tmp_path, f"{name}.jpg", f"{name}_1stHO.png", f"{name}_2ndHO.png")
    samples = find_samples(load_manifest("chase_db1"), tmp_path)
    assert [sum(s.split == split for s in samples) for split in ("train", "test")] == [20, 8]
    assert len({sample.subject for sample in samples}) == 14
    assert all(sample.observer2 is not None for sample in samples)
    assert not any(sample.image.name.endswith("HO.png") for sample in samples)


def test_hrf_and_les_av_layouts_are_found(tmp_path: Path) -> None:
    for number in (1, 6, 15):
        for group in ("h", "dr", "g"):
            name = f"{number:02}_{group}"
            touch(tmp_path / "hrf", f"images/{name}.JPG", f"manual1/{name}.tif")
            touch(tmp_path / "hrf", f"mask/{name}_mask.tif")
    hrf = find_samples(load_manifest("hrf"), tmp_path / "hrf")
    assert [sum(s.split == split for s in hrf) for split in ("train", "test")] == [3, 6]
    assert {sample.stratum for sample in hrf} == {"h", "dr", "g"}
    for number in (12, 119, 224, 586):
        touch(tmp_path / "les", f"images/{number}.png", f"vessel-segmentations/{number}.png")
        touch(tmp_path / "les", f"arteries-and-veins/{number}.png", f"masks/{number}_mask.gif")
    les = find_samples(load_manifest("les_av"), tmp_path / "les")
    assert {sample.subject: sample.split for sample in les} == {
        "12": "train",
        "119": "train",
        "224": "test",
        "586": "test",
    }
    assert all(sample.fov and sample.label for sample in les)


def test_shipped_folder_is_found_beside_the_package_or_in_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    from pipeline.data import shipped

    assert shipped_folder("data_manifests") == repository / "data_manifests"
    installed = tmp_path / "site-packages" / "pipeline"
    (installed / "_shipped" / "data_manifests").mkdir(parents=True)
    monkeypatch.setattr(shipped, "__file__", str(installed / "data" / "shipped.py"))
    assert shipped_folder("data_manifests") == installed / "_shipped" / "data_manifests"
    with pytest.raises(ConfigurationError, match="bundles: not found at"):
        shipped_folder("bundles")


def test_samples_do_not_depend_on_the_order_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest_content: dict[str, Any]
) -> None:
    for name in "dbca":
        touch(tmp_path, f"image/{name}.png", f"label/{name}.png")
    manifest = manifest_from_mapping(manifest_content)
    expected = find_samples(manifest, tmp_path)
    real = os.scandir

    class Backwards:
        def __init__(self, path: Any) -> None:
            with real(path) as entries:
                self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

        def __enter__(self) -> Backwards:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def __iter__(self) -> Any:
            return self.entries

        def __next__(self) -> Any:
            return next(self.entries)

    monkeypatch.setattr(os, "scandir", Backwards)
    assert find_samples(manifest, tmp_path) == expected
