"""The manifests of OCT data: B-scans of one person are never separated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.data.folds import split_samples
from pipeline.data.manifests import find_samples, load_manifest
from pipeline.oct.image_folders import read_images

LAYOUTS = {
    "chiu_dme": {f"2015_BOE_Chiu/Subject_{k:02}.mat": f"{k:02}" for k in range(1, 11)},
    "duke_amd": {
        "AMD1/Farsiu_Ophthalmology_2013_AMD_Subject_1001.mat": "AMD_1001",
        "AMD2/Farsiu_Ophthalmology_2013_AMD_Subject_1100.mat": "AMD_1100",
        "Farsiu_Ophthalmology_2013_Control_Subject_1001.mat": "Control_1001",
    },
    "heyex_vol": {
        "p07_OD_1.vol": "p07",
        "p07_OS_2.vol": "p07",
        "p08/right.vol": "p08",
        "p08/visit2/left.VOL": "p08",
        "scan_1.vol": "scan",
        "scan_2.vol": "scan",
    },
    "oct_hdf5": {
        "all.h5": "train/all",
        "train/a.hdf5": "train/a",
        "val/b.h5": "val/b",
        "test/c.h5": "test/c",
    },
}


def draw(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_is_a_case_and_names_whose_it_is(tmp_path: Path, name: str) -> None:
    manifest = load_manifest(name)
    samples = find_samples(manifest, draw(tmp_path, list(LAYOUTS[name])))
    found = {sample.relative.as_posix(): sample.subject for sample in samples}
    assert found == LAYOUTS[name]
    assert all(sample.label == sample.image for sample in samples)
    split = split_samples(samples, manifest)
    sides = [{one.subject for one in side} for side in (split.train, split.val, split.test)]
    assert sum(len(side) for side in sides) == len(set(LAYOUTS[name].values()))


def test_octlayers_keeps_subjects_together_and_the_last_five_for_the_end(tmp_path: Path) -> None:
    scans = [f"images/Subject{s}_{k:02}.png" for s in range(1, 11) for k in range(1, 11)]
    texts = [f"data/Subject{s}_{k}.txt" for s in range(1, 11) for k in range(1, 9)]
    manifest = load_manifest("octlayers")
    samples = find_samples(manifest, draw(tmp_path, scans + texts))
    assert len(samples) == 100
    split = split_samples(samples, manifest)
    assert {sample.subject for sample in split.test} == {f"Subject{s}" for s in range(6, 11)}
    held_out = set()
    for fold in range(5):
        split = split_samples(samples, manifest, fold=fold)
        (subject,) = {sample.subject for sample in split.val}
        assert len(split.val) == 10
        assert subject not in {sample.subject for sample in split.train}
        held_out.add(subject)
    assert held_out == {f"Subject{s}" for s in range(1, 6)}


def test_subjects_of_the_reader_are_those_of_the_manifest(lamina_data: Path) -> None:
    root = lamina_data / "oct" / "octlayers"
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    samples = find_samples(load_manifest("octlayers"), root)
    assert len(samples) == 70
    for sample in samples[::10]:
        assert set(read_images(sample.image).subjects) == {sample.subject}


@pytest.mark.parametrize("name", ["chiu_dme", "duke_amd"])
def test_public_data_name_owner_licence_and_paper(name: str) -> None:
    manifest = load_manifest(name)
    assert manifest.source is not None
    assert manifest.citation is not None
    assert re.match(r"@article\{\w+,", manifest.citation)
    assert "doi " in manifest.citation
    assert manifest.citation.count("{") == manifest.citation.count("}")
