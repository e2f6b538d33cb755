from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import CacheDataset, DataLoader
from monai.transforms import Compose
from numpy.typing import NDArray

from pipeline.errors import ConfigurationError, InputError
from pipeline.oct.transforms import FitToFramed, LoadBScand, RenderLabeld, render_label
from pipeline.oct.transforms.grey_values import BlurGaussiand, EqualizeTilesd, NormalizeGreyd

COUNT, HEIGHT, WIDTH = 3, 62, 40


def write(
    path: Path, layers: dict[str, NDArray[Any]] | None = None, images: NDArray[Any] | None = None
) -> Path:
    if images is None:
        images = np.random.default_rng(0).integers(0, 256, (COUNT, HEIGHT, WIDTH)).astype(np.uint8)
    with h5py.File(path, "w") as file:
        file["images"] = images
        for name, rows in (curves() if layers is None else layers).items():
            file[f"layers/{name}"] = rows
        names = [f"A_OD_{k}_{COUNT}" for k in range(COUNT)]
        file.create_dataset("names", data=names, dtype=h5py.string_dtype())
    return path


def curves() -> dict[str, NDArray[Any]]:
    ilm = np.random.default_rng(1).uniform(15, 20, (COUNT, WIDTH)).astype(np.float32)
    ilm[1, 5:9] = np.nan
    return {"ILM": ilm, "BM": ilm + np.float32(12.5)}


def chain(frame: tuple[int, int] | None = (60, 48)) -> Compose:
    return Compose(
        [
            LoadBScand(),
            FitToFramed(frame=frame),
            BlurGaussiand(),
            EqualizeTilesd(),
            NormalizeGreyd(),
            RenderLabeld(),
        ]
    )


def test_one_bscan_of_a_file_comes_with_its_rows_and_what_is_known(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    case = LoadBScand()({"image": str(path), "index": 1})
    with h5py.File(path) as file:
        stored = file["images"][1]
    assert case["image"].dtype == torch.float32
    np.testing.assert_allclose(case["image"], stored[None] / np.float32(255))
    for key, rows in curves().items():
        np.testing.assert_array_equal(case[key.lower()], rows[1])
    assert case["name"] == f"A_OD_1_{COUNT}"
    assert case["image_path"] == str(path)
    assert case["source_shape"].tolist() == [HEIGHT, WIDTH]
    assert (case["white"], case["crossed_columns"]) == (255, 0)
    assert np.isnan(case["scale_y_um"])


def test_a_missing_boundary_is_nan_and_a_file_without_rows_has_none(tmp_path: Path) -> None:
    only = LoadBScand()(
        {"image": str(write(tmp_path / "a.h5", {"ILM": curves()["ILM"]})), "index": 0}
    )
    assert only["bm"].isnan().all()
    assert only["ilm"].isfinite().all()
    none = LoadBScand()({"image": str(write(tmp_path / "b.h5", {})), "index": 0})
    assert not {"ilm", "bm", "label"} & RenderLabeld()(none).keys()


def test_a_file_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    first = LoadBScand()({"image": str(path), "index": 0})["ilm"]
    path.unlink()
    write(path, {name: rows + 1 for name, rows in curves().items()})
    torch.testing.assert_close(LoadBScand()({"image": str(path), "index": 0})["ilm"], first + 1)


def test_crossed_columns_are_counted_said_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layers = curves()
    layers["BM"][0, 3:6] = layers["ILM"][0, 3:6] - 2
    path = write(tmp_path / "a.h5", layers)
    with caplog.at_level(logging.WARNING):
        case = RenderLabeld(with_rows=True)(LoadBScand()({"image": str(path), "index": 0}))
    assert case["crossed_columns"] == 3
    assert "the ILM lies below BM in 3 columns" in caplog.text
    assert (case["label"][0, :HEIGHT, 3:6] == 255).all()
    assert case["label"][0, HEIGHT:, 3:6].isnan().all()


def test_an_index_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    with pytest.raises(InputError, match=r"a\.h5: B-scan 3 was asked for, expected 0 to 2"):
        LoadBScand()({"image": str(path), "index": 3})


@pytest.mark.parametrize(
    ("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1.0)]
)
def test_an_array_is_scaled_by_the_white_of_its_type(dtype: Any, white: float) -> None:
    share = np.linspace(0, 1, 12 * 10).reshape(12, 10)
    case = LoadBScand()({"image": (share * white).astype(dtype)})
    np.testing.assert_allclose(case["image"][0], share, atol=1 / 255)
    assert case["white"] == white


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 4), 200.0), "give the grey value of white"),
        (np.full((4, 4), np.nan), "NaN or infinite"),
        (np.zeros((4, 4, 3), np.uint8), r"shape \(4, 4, 3\), expected \(H, W\)"),
    ],
)
def test_an_array_that_cannot_be_a_bscan_is_named(array: NDArray[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoadBScand()({"image": array})


def test_rows_that_do_not_fit_an_array_are_named() -> None:
    with pytest.raises(InputError, match=r"ilm has shape \(3,\), expected one row for each of"):
        LoadBScand()({"image": np.zeros((4, 4), np.uint8), "ilm": np.zeros(3)})


def test_inference_on_an_array_sees_what_training_sees_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    with h5py.File(path) as file:
        array = file["images"][2]
    trained = chain()({"image": str(path), "index": 2})
    inferred = chain()({"image": array})
    assert torch.equal(trained["image"], inferred["image"])
    assert "label" not in inferred
    assert trained["label"].shape == trained["image"].shape == (1, 60, 48)


@pytest.mark.parametrize("workers", [0, 2])
def test_cases_come_in_batches_from_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    path = write(tmp_path / "a.h5")
    cases = [{"image": str(path), "index": k} for k in range(COUNT)]
    alone = [chain()(case) for case in cases]  # the parent opens the file before it forks
    dataset = CacheDataset(cases, chain(), num_workers=None, progress=False, cache_num=workers)
    (batch,) = DataLoader(dataset, batch_size=COUNT, num_workers=workers)
    assert torch.equal(batch["image"], torch.stack([case["image"] for case in alone]))
    assert batch["ilm"].shape == (COUNT, 48)
    assert batch["source_shape"].tolist() == [[HEIGHT, WIDTH]] * COUNT


@pytest.mark.parametrize("row", [3.0, 30.5, 58.0])
def test_an_edge_moves_with_its_row_when_the_frame_changes(row: float) -> None:
    """The original left 496 and 480 rows mixed, 8 pixels off at row 250: an edge must stay put."""
    image = np.repeat((np.arange(62) >= row)[:, None], 40, axis=1).astype(np.float32)
    case = {"image": torch.from_numpy(image)[None], "ilm": torch.full((40,), row)}
    fitted = FitToFramed(frame=(480, 96))(case)
    crossing = (fitted["image"][0] < 0.5).sum(dim=0).float()
    assert (crossing - fitted["ilm"]).abs().max() <= 0.5 * 480 / 62
    np.testing.assert_allclose(fitted["ilm"], (row + 0.5) * 480 / 62 - 0.5, rtol=1e-6)


def test_rows_follow_the_columns_and_spread_no_gap_further_than_a_neighbour() -> None:
    rows = torch.arange(10.0)
    rows[4] = torch.nan
    fitted = FitToFramed(frame=(8, 20))({"image": torch.zeros(1, 8, 10), "ilm": rows})["ilm"]
    assert fitted.isnan().nonzero().flatten().tolist() == [7, 8, 9, 10]
    np.testing.assert_allclose(fitted[1:7], (np.arange(1, 7) + 0.5) / 2 - 0.5)


def test_shrinking_smooths_and_no_frame_changes_nothing() -> None:
    image = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0))
    small = FitToFramed(frame=(16, 16))({"image": image})["image"]
    assert small.std() < 0.35 * image.std()  # the mean of many pixels, not of the nearest four
    case = {"image": image, "ilm": torch.rand(64)}
    same = FitToFramed(frame=None)(case)
    assert same["image"] is image
    assert same["ilm"] is case["ilm"]


def test_label_counts_the_layers_and_ignores_columns_that_nobody_annotated() -> None:
    ilm = torch.tensor([1.0, 1.4, 0.0, torch.nan, 2.0, 4.0])
    bm = torch.tensor([3.0, 2.6, 0.0, 3.0, torch.nan, 3.0])
    expected = [
        [0, 0, 2, 255, 255, 255],
        [1, 1, 2, 255, 255, 255],
        [1, 1, 2, 255, 255, 255],
        [2, 2, 2, 255, 255, 255],
        [2, 2, 2, 255, 255, 255],
    ]
    assert render_label(ilm, bm, 5).tolist() == expected


def test_bm_in_the_last_row_leaves_that_row_to_the_choroid() -> None:
    label = render_label(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([4.0, 4.4, 5.0]), 5)
    assert label[-1].tolist() == [2, 2, 1]


@given(
    rows=st.lists(st.tuples(st.floats(0, 30), st.floats(0, 30)).map(sorted), min_size=1, max_size=9)
)
def test_rows_come_back_from_the_label_up_to_rounding(rows: list[list[float]]) -> None:
    ilm, bm = torch.tensor(rows).T
    label = render_label(ilm, bm, 30)
    assert torch.equal((label < 1).sum(dim=0), ilm.round().long())
    assert torch.equal((label < 2).sum(dim=0), bm.round().long())


def test_a_label_with_rows_has_them_in_its_last_two_lines() -> None:
    case = {"image": torch.zeros(1, 6, 2), "ilm": torch.tensor([1.25, torch.nan])}
    case["bm"] = torch.tensor([3.5, 4.0])
    label = RenderLabeld(with_rows=True)(case)["label"]
    assert label.shape == (1, 8, 2)
    assert label[0, 6:, 0].tolist() == [1.25, 3.5]
    assert torch.equal(label[0, :6], RenderLabeld()(case)["label"][0].float())


def test_a_wrong_frame_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"frame must be rows and columns or null.*\[0, 8"):
        FitToFramed(frame=(0, 8))


def test_annotated_edges_of_real_bscans_stay_where_the_rows_are(lamina_data: Path) -> None:
    """In the frame of 480 x 768 too, grey values rise at the ILM."""
    images = lamina_data / "oct" / "octlayers" / "images"
    if not images.is_dir():
        pytest.skip(f"{images} is absent")
    for path in sorted(images.glob("Subject?_05.png")):
        case = LoadBScand()({"image": str(path)})
        for frame in (None, (480, 768)):
            fitted = RenderLabeld()(FitToFramed(frame=frame)(case))
            image, ilm = fitted["image"][0], fitted["ilm"].round().long()[20:-20]
            columns = torch.arange(20, image.shape[1] - 20)
            above = torch.stack([image[ilm - k, columns] for k in (3, 4, 5)]).mean()
            below = torch.stack([image[ilm + k, columns] for k in (2, 3, 4)]).mean()
            assert below > above + 0.3
            assert set(fitted["label"].unique().tolist()) == {0, 1, 2}


def test_a_real_vol_file_keeps_the_gaps_of_its_rows(lamina_data: Path) -> None:
    path = lamina_data / "oct" / "heyex_vol" / "Willis_B_716_0.vol"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    case = chain((480, 768))({"image": str(path), "index": 0})
    assert case["image"].shape == case["label"].shape == (1, 480, 768)
    assert 0.0038 < case["scale_y_um"] / 1000 < 0.0039
    missing = case["ilm"].isnan() | case["bm"].isnan()
    assert missing.any()
    assert (case["label"][0][:, missing] == 255).all()
    assert (case["label"][0][:, ~missing] < 255).all()
