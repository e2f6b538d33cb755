from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.writers import write_png, write_tiff
from pipeline.errors import InputError
from pipeline.oct.image_folders import read_images, rows_from_labels

H, W = 24, 16
ILM, BM = np.linspace(4, 7, W).round(3), np.linspace(15, 12.5, W).round(3)


def scan(seed: int = 0, width: int = W) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (H, width), dtype=np.uint8)


def table(path: Path, lines: list[str], header: str = "column,ILM,BM") -> Path:
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def lines() -> list[str]:
    return [f"{x},{i},{b}" for x, (i, b) in enumerate(zip(ILM, BM, strict=True))]


def octlayers(root: Path, subjects: int = 1, scans: int = 3) -> Path:
    """Draw a folder as the owner's: a line per column, a number per B-scan, rows from 1."""
    for subject in range(1, subjects + 1):
        for k in range(1, scans + 1):
            write_png(root / "images" / f"Subject{subject}_{k:02}.png", scan(k))
        (root / "data").mkdir(exist_ok=True)
        for number, rows in ((1, ILM), (8, BM)):
            columns = np.stack([rows + 1 + k for k in range(scans)], axis=1)
            np.savetxt(root / "data" / f"Subject{subject}_{number}.txt", columns, delimiter=",")
    return root


def test_an_image_alone_is_a_bscan_without_rows(tmp_path: Path) -> None:
    volume = read_images(write_png(tmp_path / "a.png", scan()))
    assert volume.bscans.shape == (1, H, W)
    np.testing.assert_array_equal(volume.bscans[0], scan())
    assert (dict(volume.layers), list(volume.names), list(volume.subjects)) == ({}, ["a"], [""])
    assert volume.white == 255.0
    assert volume.scale_y_um is None


@pytest.mark.parametrize(("dtype", "white"), [("u2", 65535.0), ("f4", 1.0)])
def test_deeper_images_keep_their_type(tmp_path: Path, dtype: str, white: float) -> None:
    image = scan().astype(dtype) / np.array(255, dtype) if dtype == "f4" else scan().astype(dtype)
    volume = read_images(write_tiff(tmp_path / "a.tif", image.astype(dtype)))
    assert volume.white == white
    np.testing.assert_array_equal(volume.bscans[0], image)


def test_gray_stored_as_colour_is_the_same_gray(tmp_path: Path) -> None:
    alpha = np.full((H, W), 7, np.uint8)
    for name, layers in (("rgb", [scan()] * 3), ("rgba", [scan()] * 3 + [alpha]),
                         ("la", [scan(), alpha])):  # fmt: skip
        volume = read_images(write_png(tmp_path / f"{name}.png", np.stack(layers, axis=-1)))
        np.testing.assert_array_equal(volume.bscans[0], scan())
        assert volume.bscans[0].dtype == np.uint8


def test_a_stack_of_pages_is_read_page_by_page(tmp_path: Path) -> None:
    pages = np.stack([scan(k) for k in range(5)])
    volume = read_images(write_tiff(tmp_path / "a.tif", pages))
    assert volume.bscans.shape == (5, H, W)
    np.testing.assert_array_equal(volume.bscans[3], pages[3])
    np.testing.assert_array_equal(volume.bscans[::-1], pages[::-1])
    assert volume.names[4] == "a_004"
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(volume.bscans))[2], pages[2])


def test_a_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    for k in (10, 9, 1):
        write_png(tmp_path / f"p_OS_1_{k}.png", scan(k))
    write_png(tmp_path / "p_OS_1_1_label.png", scan() % 3)
    volume = read_images(tmp_path)
    assert list(volume.names) == ["p_OS_1_1", "p_OS_1_9", "p_OS_1_10"]
    assert set(volume.subjects) == {"p"}
    assert volume.laterality == "OS"
    np.testing.assert_array_equal(volume.bscans[1:], [scan(9), scan(10)])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(volume.bscans))[-1], scan(10))


def test_images_of_different_sizes_are_no_volume(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", scan())
    write_png(tmp_path / "b.png", scan(width=9))
    with pytest.raises(InputError, match=r"images that differ \(a\.png \(24, 16\).*b\.png"):
        read_images(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images in it"):
        read_images(tmp_path)


def test_rows_in_a_table_are_taken_as_they_stand(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", scan())
    table(tmp_path / "a.csv", [*lines()[:5], f"5,{ILM[5]},", *lines()[8:]])
    layers = read_images(path).layers
    expected = ILM.copy()
    expected[6:8] = np.nan
    np.testing.assert_array_equal(layers["ILM"][0], expected)
    assert np.flatnonzero(np.isnan(layers["BM"][0])).tolist() == [5, 6, 7]


def test_a_table_for_pages_names_the_page(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", np.stack([scan(), scan(1)]))
    table(tmp_path / "a.csv", [f"1,{line}" for line in lines()], "bscan,column,ILM,BM")
    layers = read_images(path).layers
    np.testing.assert_array_equal(layers["BM"][1], BM)
    assert np.isnan(layers["BM"][0]).all()


def test_images_without_rows_are_counted(tmp_path: Path) -> None:
    for name in "abc":
        write_png(tmp_path / f"{name}.png", scan())
    table(tmp_path / "b.csv", lines())
    volume = read_images(tmp_path)
    assert "2 of 3 images have no rows" in volume.notes
    np.testing.assert_array_equal(volume.layers["ILM"][1], ILM)
    assert np.isnan(volume.layers["ILM"][[0, 2]]).all()


@pytest.mark.parametrize(
    ("header", "line", "message"),
    [
        ("x,ILM,BM", "0,1,2", "expected column and boundaries"),
        ("column,top,bottom", "0,1,2", "expected column and boundaries"),
        ("column,ILM,BM", "16,1,2", "line 2: column is '16', expected 0 to 15"),
        ("column,ILM,BM", "-1,1,2", "column is '-1'"),
        ("column,ILM,BM", "0,one,2", "line 2: ILM is 'one'"),
        ("column,ILM,BM", "0,inf,2", "ILM is infinite"),
        ("column,ILM,BM", "0,1,900", "BM has 1 rows outside the image"),
        ("column,ILM,BM", "0,1,2\n0,1,2", "column 0 stands twice"),
        ("column,ILM,BM", "0,9,2", "ILM lies below BM in 1 of 1"),
    ],
)
def test_a_table_that_cannot_be_is_refused(
    tmp_path: Path, header: str, line: str, message: str
) -> None:
    path = write_png(tmp_path / "a.png", scan())
    table(tmp_path / "a.csv", [line], header)
    with pytest.raises(InputError, match=message) as caught:
        read_images(path)
    assert "\n" not in str(caught.value)


def test_octlayers_text_gives_its_column_less_one(tmp_path: Path) -> None:
    root = octlayers(tmp_path)
    for k in range(3):
        volume = read_images(root / "images" / f"Subject1_{k + 1:02}.png")
        np.testing.assert_allclose(volume.layers["ILM"], ILM[None] + k, atol=1e-9)
        np.testing.assert_allclose(volume.layers["BM"], BM[None] + k, atol=1e-9)
        assert list(volume.subjects) == ["Subject1"]
        assert sum("1 subtracted" in note for note in volume.notes) == 1


def test_the_root_of_octlayers_is_its_images(tmp_path: Path) -> None:
    volume = read_images(octlayers(tmp_path, subjects=2, scans=2))
    assert list(volume.names) == ["Subject1_01", "Subject1_02", "Subject2_01", "Subject2_02"]
    assert list(volume.subjects) == ["Subject1", "Subject1", "Subject2", "Subject2"]
    np.testing.assert_allclose(volume.layers["BM"][3], BM + 1, atol=1e-9)


def test_octlayers_text_of_another_width_is_refused(tmp_path: Path) -> None:
    root = octlayers(tmp_path)
    write_png(root / "images" / "Subject1_01.png", scan(width=9))
    with pytest.raises(InputError, match=r"Subject1_1\.txt: 16 lines of 3 .*each of 9 columns"):
        read_images(root / "images" / "Subject1_01.png")
    (root / "data" / "Subject1_8.txt").unlink()
    with pytest.raises(InputError, match=r"Subject1_8\.txt: not found"):
        read_images(root / "images" / "Subject1_02.png")


def rendered(ilm: np.ndarray, bm: np.ndarray, height: int = H) -> np.ndarray:
    rows = np.arange(height)[:, None]
    return (rows >= ilm).astype(np.uint8) + (rows >= bm)


@given(
    st.lists(st.tuples(st.integers(0, H), st.integers(0, H)), min_size=1, max_size=12),
)
def test_rows_come_back_from_the_image_that_shows_them(pairs: list[tuple[int, int]]) -> None:
    ilm, bm = np.array([sorted(pair) for pair in pairs]).T
    rows, broken = rows_from_labels(rendered(ilm, bm))
    assert broken == 0
    seen = (ilm < bm) & (ilm < H)  # a retina of no height has no row of its own
    np.testing.assert_array_equal(rows["ILM"], np.where(seen, ilm, np.nan))
    np.testing.assert_array_equal(rows["BM"], np.where(bm < H, bm, np.nan))


def test_columns_out_of_order_are_nan() -> None:
    labels = rendered(np.array([3, 3]), np.array([9, 9]))
    labels[12, 1] = 1
    rows, broken = rows_from_labels(labels)
    assert broken == 1
    np.testing.assert_array_equal(rows["BM"], [9, np.nan])
    np.testing.assert_array_equal(rows["ILM"], [3, np.nan])


@pytest.mark.parametrize("place", ["a_label.png", "../label/a.png", "../labels/a.png"])
@pytest.mark.parametrize("codes", [(0, 1, 2), (0, 128, 255)])
def test_a_label_image_gives_rows(tmp_path: Path, place: str, codes: tuple[int, ...]) -> None:
    path = write_png(tmp_path / "image" / "a.png", scan())
    labels = np.uint8(codes)[rendered(np.full(W, 5), np.full(W, 14))]
    write_png(path.parent / place, labels)
    volume = read_images(path)
    np.testing.assert_array_equal(volume.layers["ILM"], np.full((1, W), 5.0))
    np.testing.assert_array_equal(volume.layers["BM"], np.full((1, W), 14.0))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (scan(3), "values found, expected three"),
        (np.where(scan() > 9, np.uint8(255), np.uint8(0)), "2 values found, expected three"),
        (rendered(np.full(9, 5), np.full(9, 14)), "label of"),
    ],
)
def test_a_label_image_of_other_values_is_refused(
    tmp_path: Path, label: np.ndarray, message: str
) -> None:
    path = write_png(tmp_path / "a.png", scan())
    write_png(tmp_path / "a_label.png", label)
    with pytest.raises(InputError, match=message):
        read_images(path)


def test_an_image_changed_in_use_is_refused(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", scan())
    bscans = read_images(path).bscans
    write_png(path, scan(width=9))
    with pytest.raises(InputError, match="it was changed"):
        bscans[0]


def test_pages_in_colour_are_refused(tmp_path: Path) -> None:
    pages = np.stack([np.stack([scan(k)] * 3, axis=-1) for k in range(2)])
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="rgb")
    with pytest.raises(InputError, match="2 pages"):
        read_images(tmp_path / "a.tif")


def test_every_octlayers_scan_is_read(lamina_data: Path) -> None:
    root = lamina_data / "oct" / "octlayers"
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    paths = sorted((root / "images").glob("*.png"))
    assert len(paths) >= 70
    for path in paths:
        volume = read_images(path)
        ilm, bm = (volume.layers[name][0] for name in ("ILM", "BM"))
        assert np.isfinite(ilm).all()
        assert np.isfinite(bm).all()
        assert 55 < (bm - ilm).mean() < 100
        assert not any("outside" in note or "below" in note for note in volume.notes)


def test_octlayers_rows_lie_on_the_edge_of_the_retina(lamina_data: Path) -> None:
    path = lamina_data / "oct" / "octlayers" / "images" / "Subject1_01.png"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    volume = read_images(path)
    bscan, ilm = volume.bscans[0].astype(float), volume.layers["ILM"][0].round().astype(int)
    profile = [bscan[ilm + step, np.arange(len(ilm))].mean() for step in range(-6, 7)]
    assert np.argmax(np.diff(profile)) in range(3, 8)  # within two rows of the boundary
