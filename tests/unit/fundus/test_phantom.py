from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from pipeline.errors import ConfigurationError
from pipeline.fundus import phantom
from pipeline.fundus.fov import derive_fov
from pipeline.fundus.metrics import vessel_metrics
from pipeline.fundus.morphometry import vessel_calibre
from pipeline.fundus.phantom import FundusPhantom, fundus_phantom, write_phantom_dataset
from pipeline.fundus.phantom_render import Frame, rasterise
from pipeline.fundus.phantom_tree import Vessel, grow_vessels, place_anatomy

SEEDS = (0, 1, 2, 3, 11)


@pytest.fixture(scope="module")
def phantoms() -> list[FundusPhantom]:
    return [fundus_phantom(seed, (384, 384)) for seed in SEEDS]


def test_arrays_are_as_promised() -> None:
    drawn = fundus_phantom(5, (120, 150))
    assert (drawn.image.shape, drawn.image.dtype) == ((120, 150, 3), np.uint8)
    assert (drawn.label.shape, drawn.label.dtype) == ((120, 150), np.uint8)
    assert (drawn.fov.shape, drawn.fov.dtype) == ((120, 150), np.bool_)
    assert (drawn.observer2.shape, drawn.observer2.dtype) == ((120, 150), np.uint8)
    assert set(np.unique(drawn.label)) == set(np.unique(drawn.observer2)) == {0, 1}


@pytest.mark.parametrize("size_px", [(96, 288), (288, 96)])
def test_field_of_view_is_a_circle_in_any_frame(size_px: tuple[int, int]) -> None:
    drawn = fundus_phantom(2, size_px)
    assert drawn.fov.sum() == pytest.approx(np.pi * (0.475 * 96) ** 2, rel=0.02)
    assert drawn.image[ndimage.binary_erosion(~drawn.fov, iterations=3)].max() < 30


def test_same_seed_gives_the_same_phantom_whatever_the_global_state() -> None:
    first = fundus_phantom(7, (128, 128))
    np.random.seed(3)  # noqa: NPY002 - the legacy state is what must not matter
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr]  # noqa: NPY002
    second = fundus_phantom(7, (128, 128))
    for name in ("image", "label", "fov", "observer2"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_truth_of_a_seed_is_the_same_on_every_machine() -> None:
    drawn = fundus_phantom(42, (128, 128))
    digest = hashlib.sha256(np.packbits(drawn.label).tobytes()).hexdigest()
    assert digest == "eb47c1175deca582c18ade644d3ebecf22df8fb91390caa5a98b338ca2b8c4ce"


def test_different_seeds_give_different_eyes(phantoms: list[FundusPhantom]) -> None:
    for first, second in pairwise(phantoms):
        assert vessel_metrics(first.label, second.label)["dice"] < 0.4


def test_mirrored_eye_has_its_disc_on_the_other_side() -> None:
    left, right = (fundus_phantom(4, (128, 128), mirrored=side) for side in (False, True))
    brightness = [eye.image.sum(axis=(0, 2), dtype=np.int64) for eye in (left, right)]
    assert brightness[0][:40].sum() > brightness[0][-40:].sum()
    assert brightness[1][-40:].sum() > brightness[1][:40].sum()


def test_label_lies_in_the_field_of_view(phantoms: list[FundusPhantom]) -> None:
    for drawn in phantoms:
        assert not (drawn.label.astype(bool) & ~drawn.fov).any()
        assert not (drawn.observer2.astype(bool) & ~drawn.fov).any()


def test_field_of_view_can_be_derived_from_the_photograph(phantoms: list[FundusPhantom]) -> None:
    for drawn in phantoms:
        derived = derive_fov(drawn.image)
        assert (derived & drawn.fov).sum() / (derived | drawn.fov).sum() > 0.985


@pytest.mark.parametrize("size_px", [256, 384])
def test_second_observer_agrees_as_people_do(size_px: int) -> None:
    for seed in SEEDS:
        drawn = fundus_phantom(seed, (size_px, size_px))
        assert 0.74 <= vessel_metrics(drawn.observer2, drawn.label, drawn.fov)["dice"] <= 0.84


def test_vessels_fill_the_share_that_they_fill_in_real_eyes(phantoms: list[FundusPhantom]) -> None:
    for drawn in phantoms:
        measured = vessel_calibre(drawn.label, drawn.fov)
        assert 0.08 < measured["vessel_density"] < 0.18


def test_widths_scale_with_the_image() -> None:
    def widest(size_px: int) -> float:
        label = fundus_phantom(1, (size_px, size_px)).label
        return 2 * float(ndimage.distance_transform_edt(label).max())

    assert 6 < widest(512) < 14  # two vessels may touch
    assert widest(512) / widest(256) == pytest.approx(2, rel=0.25)


def test_one_eye_is_the_same_at_two_sizes() -> None:
    small, large = fundus_phantom(6, (192, 192)), fundus_phantom(6, (384, 384))
    reduced = large.image.reshape(192, 2, 192, 2, 3).mean(axis=(1, 3))
    assert np.abs(reduced - small.image)[small.fov].mean() < 6


def test_vessels_are_darker_and_most_of_all_in_green(phantoms: list[FundusPhantom]) -> None:
    for drawn in phantoms:
        vessel = drawn.label.astype(bool)
        near = ndimage.binary_dilation(vessel, iterations=5) & ~vessel & drawn.fov
        red, green, blue = drawn.image[vessel].mean(axis=0) / drawn.image[near].mean(axis=0)
        assert green < blue < 1
        assert green < red < 1
        assert green < 0.92


def test_photograph_is_orange_on_black(phantoms: list[FundusPhantom]) -> None:
    for drawn in phantoms:
        red, green, blue = drawn.image[drawn.fov].mean(axis=0)
        assert red > 1.4 * green > 1.4 * blue
        assert drawn.image[ndimage.binary_erosion(~drawn.fov, iterations=3)].max() < 30


def test_label_follows_the_geometry_exactly() -> None:
    frame = Frame(60, 80, (40.0, 30.0), 20.0, mirrored=False)
    line = Vessel(np.array([[-1.0, 0.1], [-0.5, 0.1], [1.0, 0.1]]), np.full(3, 0.125), "vein", 0)
    inside = rasterise([line], frame).distance <= 0
    rows, columns = np.mgrid[:60, :80].astype(float)
    off_axis = np.hypot(columns - np.clip(columns, 20, 60), rows - 32)
    np.testing.assert_array_equal(inside, off_axis <= 2.5)


def test_mirroring_mirrors_the_geometry() -> None:
    rng = np.random.default_rng(1)
    vessels = grow_vessels(rng, place_anatomy(rng))
    left, right = (
        rasterise(vessels, Frame(64, 64, (31.5, 31.5), 30.0, mirrored))
        for mirrored in (False, True)
    )
    np.testing.assert_allclose(left.distance, right.distance[:, ::-1], atol=1e-9)


def test_branches_are_thinner_than_trunks_and_vessels_taper() -> None:
    rng = np.random.default_rng(2)
    vessels = grow_vessels(rng, place_anatomy(rng))
    widest = {
        order: max(v.radius.max() for v in vessels if v.order == order) for order in (0, 1, 2)
    }
    assert widest[0] > widest[1] > widest[2]
    for vessel in vessels:
        assert vessel.radius[-1] <= vessel.radius.max()
        assert np.isfinite(vessel.points).all()


def test_avascular_centre_of_the_macula_stays_empty() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        anatomy = place_anatomy(rng)
        for vessel in grow_vessels(rng, anatomy):
            assert np.hypot(*(vessel.points - anatomy.macula).T).min() > 0.05


def test_nothing_to_draw_is_an_empty_map() -> None:
    maps = rasterise([], Frame(8, 9, (4.0, 4.0), 4.0, mirrored=False))
    assert maps.distance.shape == (8, 9)
    assert (maps.distance > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 0, "size_px": (63, 200)}, "size_px is 63 x 200; .* at least 64"),
        ({"seed": -1}, "seed of the fundus phantom is -1"),
    ],
    ids=["size", "seed"],
)
def test_impossible_phantoms_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fundus_phantom(**arguments)


COUNT = {"train": 2, "val": 1}


def files_of(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def test_data_set_has_the_layout_and_the_truth(tmp_path: Path) -> None:
    root = write_phantom_dataset(tmp_path / "data", COUNT, size_px=96, seed=3)
    pictures = {name for name in files_of(root) if name.endswith(".png")}
    expected = {("train", 0), ("train", 1), ("val", 0)}
    kinds = ("image", "label", "fov", "observer2")
    assert pictures == {f"{s}/{k}/phantom_{i:03d}.png" for s, i in expected for k in kinds}
    for split, index in expected:
        name = f"phantom_{index:03d}.png"
        image, label = read(root / split / "image" / name), read(root / split / "label" / name)
        assert image.shape == (96, 96, 3)
        assert set(np.unique(label)) == {0, 255}
        assert set(np.unique(read(root / split / "fov" / name))) == {0, 255}


def test_no_two_pictures_of_a_data_set_are_the_same(tmp_path: Path) -> None:
    files = files_of(write_phantom_dataset(tmp_path / "data", COUNT, size_px=64))
    images = [content for name, content in files.items() if "/image/" in name]
    assert len(set(images)) == 3


def test_finished_data_set_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_phantom_dataset(tmp_path, COUNT, size_px=64, seed=1)
    before = files_of(root)
    monkeypatch.setattr(phantom, "fundus_phantom", None)  # drawing would fail
    assert write_phantom_dataset(tmp_path, COUNT, size_px=64, seed=1) == root
    assert files_of(root) == before


def test_incomplete_data_set_is_written_again(tmp_path: Path) -> None:
    before = files_of(write_phantom_dataset(tmp_path, COUNT, size_px=64))
    (tmp_path / "val/label/phantom_000.png").unlink()
    (tmp_path / "train/image/phantom_001.png").write_bytes(b"cut")
    assert files_of(write_phantom_dataset(tmp_path, COUNT, size_px=64)) == before


def test_interrupted_writing_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = files_of(write_phantom_dataset(tmp_path / "whole", COUNT, size_px=64))
    drawn: list[FundusPhantom] = []

    def stop_after_one(*arguments: Any) -> FundusPhantom:
        if drawn:
            raise KeyboardInterrupt
        drawn.append(fundus_phantom(*arguments))
        return drawn[0]

    monkeypatch.setattr(phantom, "fundus_phantom", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        write_phantom_dataset(tmp_path / "cut", COUNT, size_px=64)
    monkeypatch.undo()
    assert not json.loads((tmp_path / "cut/phantom.json").read_text())["complete"]
    assert files_of(write_phantom_dataset(tmp_path / "cut", COUNT, size_px=64)) == complete


def test_other_settings_replace_the_pictures_and_leave_none_behind(tmp_path: Path) -> None:
    larger = files_of(write_phantom_dataset(tmp_path, COUNT, size_px=64))
    smaller = files_of(write_phantom_dataset(tmp_path, {"train": 1}, size_px=64))
    assert set(smaller) == {name for name in larger if "train" in name and "000" in name} | {
        "phantom.json"
    }
    kept = "train/image/phantom_000.png"
    assert smaller[kept] == larger[kept]  # counts do not change a picture


@pytest.mark.parametrize("name", ["photo.png", "phantom.json"])
def test_folder_of_something_else_is_refused_and_untouched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ConfigurationError, match="choose another folder"):
        write_phantom_dataset(tmp_path, COUNT, size_px=64)
    assert files_of(tmp_path) == {name: b"mine"}


def test_negative_count_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="expected none below 0"):
        write_phantom_dataset(tmp_path / "data", {"train": -1})
    assert not (tmp_path / "data").exists()
