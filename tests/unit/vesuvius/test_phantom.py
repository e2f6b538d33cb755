from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import marching_cubes, mesh_surface_area

from pipeline.data.folds import split_samples
from pipeline.data.images import read_image
from pipeline.data.manifests import find_samples, load_manifest
from pipeline.data.volumes import open_volume
from pipeline.errors import ConfigurationError
from pipeline.vesuvius import phantom
from pipeline.vesuvius.phantom import FRAME_VX, ScrollPhantom, scroll_phantom, write_phantom_dataset
from pipeline.vesuvius.phantom_difficulty import DIFFICULTIES

SEEDS = (0, 1, 3, 18)  # the last one has the axis of the scroll in the box
SMALL = (48, 48, 48)
EVERYWHERE = np.ones((3, 3, 3), bool)
Drawn = dict[str, list[ScrollPhantom]]


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return {name: [scroll_phantom(s, (72, 72, 72), name) for s in SEEDS] for name in DIFFICULTIES}


def every(drawn: Drawn) -> list[ScrollPhantom]:
    return [piece for pieces in drawn.values() for piece in pieces]


def air_of(piece: ScrollPhantom) -> NDArray[np.uint8]:
    return piece.image[ndimage.distance_transform_edt(piece.sheets == 0) > 10]


def contrast(piece: ScrollPhantom) -> float:
    return float(piece.image[piece.sheets > 0].mean() - np.median(air_of(piece)))


def air_noise(piece: ScrollPhantom) -> float:
    """The papyrus of a sheet whose surface is cut off may lie in what counts as air."""
    air = air_of(piece)
    return float(np.percentile(air, 50) - np.percentile(air, 16))


def test_arrays_are_as_promised() -> None:
    piece = scroll_phantom(5, (32, 40, 48), "hard")
    for array, dtype in ((piece.image, "uint8"), (piece.label, "uint8"), (piece.sheets, "int16")):
        assert array.shape == (32, 40, 48)
        assert array.dtype == dtype
    assert piece.origin_zyx == (0, 0, 0)


def test_same_seed_gives_the_same_bits_whatever_the_global_state() -> None:
    first = scroll_phantom(7, SMALL, "medium")
    np.random.seed(3)  # noqa: NPY002 - the legacy state is what must not matter
    second = scroll_phantom(7, SMALL, "medium")
    for name in ("image", "label", "sheets"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_truth_of_a_seed_is_the_same_on_every_machine() -> None:
    digest = hashlib.sha256(scroll_phantom(42, SMALL, "hard").label.tobytes()).hexdigest()
    assert digest == "f11083a89817ab1c680cb13f54a06fec8eddc1ab1bfce9b85e0de8bf722007c2"


def test_seeds_and_difficulties_give_different_pieces(drawn: Drawn) -> None:
    assert len({piece.image.tobytes() for piece in every(drawn)}) == len(every(drawn))


def test_labels_are_background_surface_and_unlabelled(drawn: Drawn) -> None:
    for piece in every(drawn):
        assert set(np.unique(piece.label)) == {0, 1, 2}


def test_frame_and_blocks_inside_are_not_labelled(drawn: Drawn) -> None:
    inside = (slice(FRAME_VX, -FRAME_VX),) * 3
    for piece in every(drawn):
        frame = np.ones(piece.label.shape, bool)
        frame[inside] = False
        assert (piece.label[frame] == 2).all()
        assert 0 < (piece.label[inside] == 2).mean() < 0.2


def test_label_is_the_truth_wherever_it_is_labelled(drawn: Drawn) -> None:
    for piece in every(drawn):
        labelled = piece.label != 2
        np.testing.assert_array_equal((piece.sheets > 0)[labelled], piece.label[labelled] == 1)


def test_surface_takes_the_share_that_it_takes_in_real_volumes(drawn: Drawn) -> None:
    for piece in every(drawn):
        share = (piece.label == 1).sum() / (piece.label != 2).sum()
        assert 0.02 < share < 0.08


def test_surface_is_about_two_voxels_thick(drawn: Drawn) -> None:
    for piece in every(drawn):
        surface = piece.sheets > 0
        depth = ndimage.distance_transform_edt(surface)
        assert 1 <= np.median(depth[surface]) < 1.5  # of a layer of two voxels each is 1 deep
        assert np.percentile(depth[surface], 99) <= 2
        # Half of the boundary is one side; volume over that area is the mean thickness.
        vertices, faces, _, _ = marching_cubes(np.pad(surface, 1).astype(np.float32), 0.5)
        thickness = 2 * surface.sum() / mesh_surface_area(vertices, faces)
        assert 1.6 < thickness < 2.3


def test_sheets_are_the_components_of_the_surface(drawn: Drawn) -> None:
    for piece in every(drawn):
        labels, count = ndimage.label(piece.sheets > 0, EVERYWHERE)
        assert count == piece.sheets.max()
        pairs = labels.astype(np.int64) * 1000 + piece.sheets
        assert len(np.unique(pairs)) == count + 1


def test_several_sheets_lie_in_a_box_beside_the_axis(drawn: Drawn) -> None:
    for pieces in drawn.values():
        assert all(piece.sheets.max() >= 2 for piece in pieces[:3])


def test_surface_is_the_side_that_faces_the_axis() -> None:
    """Beyond the surface, seen from the axis, comes papyrus; before it comes air."""
    piece = scroll_phantom(18, (96, 96, 96), "easy")
    # In a spiral around the middle the outward direction is away from it.
    middle = np.argwhere(piece.sheets[48] == 1).mean(axis=0)
    outward = inward = 0.0
    for y, x in np.argwhere(piece.sheets[48] == 1)[::5]:
        step = np.array([y, x]) - middle
        step *= 4 / np.hypot(*step)
        for sign in (1, -1):
            row, column = np.clip(np.rint([y, x] + sign * step).astype(int), 0, 95)
            value = float(piece.image[48, row, column])
            outward, inward = (outward + value, inward) if sign > 0 else (outward, inward + value)
    assert outward > 1.5 * inward


def test_contrast_falls_and_noise_rises_from_easy_to_hard(drawn: Drawn) -> None:
    contrasts = [np.mean([contrast(p) for p in drawn[name]]) for name in DIFFICULTIES]
    noises = [np.mean([air_noise(p) for p in drawn[name]]) for name in DIFFICULTIES]
    assert contrasts[0] > contrasts[1] + 10 > contrasts[2] + 20
    assert noises[0] < noises[1] - 2 < noises[2] - 4


def test_grey_values_fill_the_range_without_being_cut(drawn: Drawn) -> None:
    for piece in every(drawn):
        assert piece.image.max() > 120
        assert np.isin(piece.image, (0, 255)).mean() < 0.002


def test_difficulties_differ_in_every_promised_way() -> None:
    easy, medium, hard = DIFFICULTIES.values()
    for falls in ("spacing_vx", "least_spacing_vx", "contrast"):
        assert getattr(easy, falls) > getattr(medium, falls) > getattr(hard, falls)
    for rises in ("wave_vx", "holes", "tears", "noise", "ring", "blur_vx", "brightness", "fibre"):
        assert getattr(easy, rises) < getattr(medium, rises) < getattr(hard, rises)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size_vx": (96, 96, 31)}, "size_vx is 96 x 96 x 31; .* at least 32 voxels"),
        ({"size_vx": (96, 96)}, "size_vx is 96 x 96; .* three sides"),
        ({"seed": -1}, "seed of the scroll phantom is -1"),
        ({"difficulty": "harder"}, "'harder'; expected easy, medium, hard"),
        ({"origin_zyx": (0, 0, 0)}, "origin_zyx is given without a surface"),
    ],
    ids=["small", "flat", "seed", "difficulty", "origin"],
)
def test_impossible_phantoms_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        scroll_phantom(**{"seed": 0, **arguments})


COUNTS = {"train": 3, "val": 1, "test": 1}


def write(folder: Path, counts: dict[str, int] = COUNTS, **settings: Any) -> Path:
    return write_phantom_dataset(folder, counts, **{"size_vx": 32, "seed": 3, **settings})


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("phantoms") / "data")


def files_of(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_data_set_has_the_layout_of_the_competition(data_set: Path) -> None:
    ids = {"train": ["train_000", "train_001", "train_002", "val_000"], "test": ["test_000"]}
    expected = {
        f"{folder}_{kind}/phantom_{name}.tif"
        for folder, names in ids.items()
        for name in names
        for kind in ("images", "labels")
    }
    assert set(files_of(data_set)) == expected | {"train.csv", "test.csv", "phantom.json"}


def test_data_set_reads_back_bit_for_bit(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def listening(*arguments: Any) -> ScrollPhantom:
        drawn.append(scroll_phantom(*arguments))
        return drawn[-1]

    monkeypatch.setattr(phantom, "scroll_phantom", listening)
    root = write(data_set.parent / "again")
    for piece, name in zip(drawn, ("test_000", "train_000", "train_001"), strict=False):
        folder = name.split("_")[0]
        for kind, array in (("images", piece.image), ("labels", piece.label)):
            path = root / f"{folder}_{kind}" / f"phantom_{name}.tif"
            np.testing.assert_array_equal(read_image(path), array)
            with open_volume(path) as volume:
                assert volume.dtype == np.uint8
                np.testing.assert_array_equal(volume[:], array)
    assert files_of(root) == files_of(data_set)


def test_volumes_are_lzw_stacks_of_a_page_per_plane(data_set: Path) -> None:
    with tifffile.TiffFile(data_set / "train_labels/phantom_train_000.tif") as stack:
        assert len(stack.pages) == 32
        assert stack.pages[0].compression == tifffile.COMPRESSION.LZW


def test_scrolls_have_several_volumes_and_no_two_splits(data_set: Path) -> None:
    with (data_set / "train.csv").open(encoding="utf-8") as table:
        scroll = {row["id"]: row["scroll_id"] for row in csv.DictReader(table)}
    train = [scroll[f"phantom_train_{i:03d}"] for i in range(3)]
    assert train[0] == train[1] != train[2]
    assert scroll["phantom_val_000"] not in train


def test_manifest_of_the_competition_finds_and_groups_the_volumes(data_set: Path) -> None:
    manifest = load_manifest("vesuvius_surface")
    samples = find_samples(manifest, data_set)
    assert len(samples) == 5
    split = split_samples(samples, manifest, None)
    assert len(split.test) == 1
    sides = [{sample.subject for sample in side} for side in (split.train, split.val)]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_a_mixed_data_set_holds_every_difficulty_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def listening(seed: int, size: Any, difficulty: str) -> ScrollPhantom:
        asked.append(difficulty)
        return scroll_phantom(seed, size, difficulty)

    monkeypatch.setattr(phantom, "scroll_phantom", listening)
    write(tmp_path, {"train": 4}, difficulty="mixed")
    assert asked == ["medium", "hard", "easy", "medium"]


def test_finished_data_set_is_used_again(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_of(data_set)
    monkeypatch.setattr(phantom, "scroll_phantom", None)  # drawing would fail
    assert write(data_set) == data_set
    assert files_of(data_set) == before


def test_incomplete_data_set_is_written_again(tmp_path: Path) -> None:
    counts = {"train": 1}
    before = files_of(write(tmp_path, counts))
    (tmp_path / "train_labels/phantom_train_000.tif").write_bytes(b"cut")
    (tmp_path / "train.csv").unlink()
    assert files_of(write(tmp_path, counts)) == before


def test_interrupted_writing_is_taken_up(
    data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[ScrollPhantom] = []

    def stop_after_one(*arguments: Any) -> ScrollPhantom:
        if drawn:
            raise KeyboardInterrupt
        drawn.append(scroll_phantom(*arguments))
        return drawn[0]

    monkeypatch.setattr(phantom, "scroll_phantom", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    monkeypatch.undo()
    assert not json.loads((tmp_path / "phantom.json").read_text())["complete"]
    assert files_of(write(tmp_path)) == files_of(data_set)


def test_other_settings_replace_the_volumes_and_leave_none_behind(
    data_set: Path, tmp_path: Path
) -> None:
    write(tmp_path, {"test": 2})
    larger, smaller = files_of(data_set), files_of(write(tmp_path, {"train": 1}))
    kept = {f"train_{kind}/phantom_train_000.tif" for kind in ("images", "labels")}
    assert set(smaller) == kept | {"train.csv", "phantom.json"}
    assert all(smaller[name] == larger[name] for name in kept)  # counts change no volume


@pytest.mark.parametrize("name", ["scan.tif", "phantom.json"])
def test_folder_of_something_else_is_refused_and_untouched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ConfigurationError, match="choose another folder"):
        write(tmp_path)
    assert files_of(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("counts", [{"train": -1}, {"holdout": 1}], ids=["negative", "unknown"])
def test_impossible_counts_are_refused_before_anything_is_written(
    tmp_path: Path, counts: dict[str, int]
) -> None:
    with pytest.raises(ConfigurationError, match="expected a seed of 0 or more"):
        write(tmp_path / "data", counts)
    assert not (tmp_path / "data").exists()
