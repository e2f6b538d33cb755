from __future__ import annotations

import hashlib
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigurationError
from pipeline.oct.formats import read_oct
from pipeline.oct.phantom import OctPhantom, oct_phantom, write_phantom_dataset

SMALL = (128, 160)


@pytest.fixture(scope="module")
def drawn() -> list[OctPhantom]:
    return [oct_phantom(seed) for seed in range(8)]


def edge_offsets(phantom: OctPhantom, rows: np.ndarray, sign: int) -> np.ndarray:
    """Return how far from the row the grey values of each column change most steeply."""
    grey = phantom.image.astype(float)
    offsets = []
    for x in range(40, grey.shape[1] - 40):
        window = np.arange(-5, 6) + int(np.rint(rows[x]))
        column = grey[window[0] - 1 : window[-1] + 1, x - 3 : x + 4].mean(axis=1)
        slope = np.clip(sign * np.diff(column), 0, None)
        # A slope lies between two rows; the lower one is the first of the layer below.
        offsets.append((slope * window).sum() / max(slope.sum(), 1e-6) - 0.5 - (rows[x] - 0.5))
    return np.array(offsets)


def test_arrays_are_as_promised(drawn: list[OctPhantom]) -> None:
    for phantom in drawn:
        assert phantom.image.dtype == np.uint8
        assert phantom.image.shape == (496, 768)
        for rows in (phantom.ilm, phantom.bm, phantom.annotated_ilm, phantom.annotated_bm):
            assert rows.shape == (768,)
            assert rows.dtype == np.float64


@settings(max_examples=25)
@given(seed=st.integers(0, 10**9), height=st.integers(64, 300), width=st.integers(64, 200))
def test_all_of_the_retina_lies_in_the_frame(seed: int, height: int, width: int) -> None:
    phantom = oct_phantom(seed, (height, width))
    scale = height / 496
    assert phantom.ilm.min() > 0.02 * height
    assert phantom.bm.max() < height - 0.05 * height
    thickness = (phantom.bm - phantom.ilm) / scale
    assert thickness.min() > 30
    assert thickness.max() < 125


def test_annotation_is_the_truth_or_nothing(drawn: list[OctPhantom]) -> None:
    missing = []
    for phantom in drawn:
        for truth, rows in (
            (phantom.ilm, phantom.annotated_ilm),
            (phantom.bm, phantom.annotated_bm),
        ):
            known = np.isfinite(rows)
            np.testing.assert_array_equal(rows[known], truth[known])
            missing.append(1 - known.mean())
    assert min(missing) == 0
    assert 0 < max(missing) < 0.5


def test_the_ilm_is_where_the_grey_values_rise(drawn: list[OctPhantom]) -> None:
    """The edge lies half a pixel above the row, between the two layers: without a bias."""
    offsets = [edge_offsets(phantom, phantom.ilm, 1) for phantom in drawn]
    assert abs(np.median(np.concatenate(offsets))) < 0.5


def test_bm_is_where_the_grey_values_fall(drawn: list[OctPhantom]) -> None:
    offsets = [edge_offsets(phantom, phantom.bm, -1) for phantom in drawn]
    assert abs(np.median(np.concatenate(offsets))) < 0.5


def test_layers_have_the_grey_values_of_real_bscans(drawn: list[OctPhantom]) -> None:
    """Means over annotated Spectralis B-scans: vitreous 10-19, retina 120, deepest rows 1."""
    vitreous, retina, deep = [], [], []
    for phantom in drawn:
        row = np.arange(496)[:, None]
        lit = phantom.image > 0
        vitreous.append(phantom.image[(row < phantom.ilm - 5) & (row > phantom.ilm - 40)].mean())
        retina.append(phantom.image[(row > phantom.ilm) & (row < phantom.bm) & lit].mean())
        deep.append(phantom.image[(row > phantom.bm + 170)].mean())
    assert 3 < np.mean(vitreous) < 25
    assert 100 < np.mean(retina) < 145
    assert np.mean(deep) < 4


def test_drusen_lift_the_pigment_epithelium_and_leave_bm(drawn: list[OctPhantom]) -> None:
    from pipeline.oct.phantom_anatomy import cut_section, draw_eye

    eyes = [draw_eye(np.random.default_rng(seed), "OD") for seed in range(30)]
    with_drusen = [eye for eye in eyes if eye.drusen]
    assert 2 <= len(with_drusen) <= 15
    section = cut_section(
        np.random.default_rng(0), with_drusen[0], with_drusen[0].drusen[0].at_mm[1], 496, 768
    )
    assert (section.bm - section.rpe).max() > 4
    boundaries = [section.ilm, section.nfl, section.ipl, section.inl, section.opl, section.elm]
    boundaries += [section.segments, section.rpe, section.bm]
    assert (np.diff(boundaries, axis=0) >= -1e-9).all()


def test_the_fovea_is_a_pit_in_a_section_through_it() -> None:
    through = [oct_phantom(seed, offset_mm=0.0) for seed in range(4)]
    beside = [oct_phantom(seed, offset_mm=2.5) for seed in range(4)]
    for phantom, other in zip(through, beside, strict=True):
        assert (phantom.bm - phantom.ilm).min() < (other.bm - other.ilm).min() - 5


def test_same_seed_gives_the_same_bits_whatever_the_global_state() -> None:
    first = oct_phantom(7, SMALL)
    np.random.seed(3)  # noqa: NPY002 - the legacy state is what must not matter
    second = oct_phantom(7, SMALL)
    for name in ("image", "ilm", "bm", "annotated_ilm", "annotated_bm"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_rows_of_a_seed_are_the_same_on_every_machine() -> None:
    rows = np.round(oct_phantom(42, SMALL).bm, 3)
    digest = hashlib.sha256(rows.tobytes()).hexdigest()
    assert digest[:16] == "45ec160b1c62252a"


def test_bscans_of_an_eye_differ_and_share_its_thickness() -> None:
    one = [oct_phantom(seed, SMALL, eye_seed=5, offset_mm=2.4) for seed in range(3)]
    assert len({phantom.image.tobytes() for phantom in one}) == 3
    means = [float((phantom.bm - phantom.ilm).mean()) for phantom in one]
    assert np.ptp(means) < 2.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom_dataset(
        tmp_path_factory.mktemp("data") / "oct", {"train": 2, "val": 1}, bscans=2, size_px=SMALL
    )


def test_the_data_set_is_read_as_any_file_of_bscans(folder: Path) -> None:
    volume = read_oct(folder / "train.h5")
    assert volume.bscans.shape == (8, *SMALL)
    assert set(volume.layers) == {"ILM", "BM"}
    assert volume.white == 255
    with h5py.File(folder / "train.h5") as file:
        assert file["images"].maxshape == (None, *SMALL)
        assert file["images"].chunks == (1, *SMALL)


def test_names_tell_subject_eye_and_place_and_no_subject_is_in_two_splits(folder: Path) -> None:
    names = list(read_oct(folder / "train.h5").names)
    assert names[:4] == [f"phantom001_{eye}_{k}_2" for eye in ("OD", "OS") for k in (1, 2)]
    assert len(set(names)) == 8
    subjects = {
        split: {name.split("_")[0] for name in read_oct(folder / f"{split}.h5").names}
        for split in ("train", "val")
    }
    assert len(subjects["train"]) == 2
    assert not subjects["train"] & subjects["val"]


def test_a_finished_data_set_is_used_as_it_is_and_another_one_drawn_again(folder: Path) -> None:
    before = (folder / "train.h5").stat().st_mtime_ns
    same = {"train": 2, "val": 1}
    write_phantom_dataset(folder, same, bscans=2, size_px=SMALL)
    assert (folder / "train.h5").stat().st_mtime_ns == before
    first = np.asarray(read_oct(folder / "train.h5").bscans[0])
    write_phantom_dataset(folder, {"train": 1}, bscans=2, size_px=SMALL)
    assert not (folder / "val.h5").exists()
    assert json.loads((folder / "phantom.json").read_text())["complete"]
    np.testing.assert_array_equal(np.asarray(read_oct(folder / "train.h5").bscans[0]), first)
    write_phantom_dataset(folder, same, bscans=2, size_px=SMALL)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="holds no phantom data set"):
        write_phantom_dataset(tmp_path, {"train": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: oct_phantom(-1), "seeds of the OCT phantom are -1"),
        (lambda folder: oct_phantom(0, (32, 100)), "size_px is 32 x 100"),
        (lambda folder: write_phantom_dataset(folder, {"training": 1}), "subjects of train, val"),
        (lambda folder: write_phantom_dataset(folder, bscans=0), "0 B-scans per eye"),
    ],
    ids=["seed", "size", "split", "bscans"],
)
def test_a_wrong_setting_is_named(tmp_path: Path, call, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call(tmp_path / "new")
    assert not (tmp_path / "new").exists()
