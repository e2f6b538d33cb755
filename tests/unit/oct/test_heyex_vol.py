from __future__ import annotations

import logging
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.oct.heyex_vol import (
    FIRST_BSCAN_NOTES,
    display_scale,
    first_bscan_notes,
    read_vol,
    write_vol,
)

PATIENT_ID = b"ZQX-19700229-SECRET"
HEADER_BYTES, SLO_BYTES = 2048, 16 * 16


def drawn(count: int = 3, rows: int = 24, columns: int = 20) -> np.ndarray:
    return np.random.default_rng(0).random((count, rows, columns)).astype(np.float32)


def boundaries(count: int = 3, columns: int = 20) -> dict[str, np.ndarray]:
    ilm = np.linspace(3, 6, count * columns).reshape(count, columns)
    layers = {"ILM": ilm, "BM": ilm + 9.25}
    layers["BM"][0, 4:8] = np.nan
    return {name: rows.astype(np.float32) for name, rows in layers.items()}


@pytest.fixture
def vol(tmp_path: Path) -> Path:
    return write_vol(tmp_path / "eye.vol", drawn(), boundaries(), spacing_um=120)


def patched(path: Path, offset: int, kind: str, *values: float) -> Path:
    content = bytearray(path.read_bytes())
    struct.pack_into(kind, content, offset, *values)
    path.write_bytes(bytes(content))
    return path


def test_what_is_written_is_read_back(vol: Path) -> None:
    volume = read_vol(vol)
    assert volume.bscans.shape == (3, 24, 20)
    assert volume.bscans.dtype == np.float32
    assert volume.white == 1.0
    np.testing.assert_allclose(volume.bscans[:], drawn(), atol=1e-6)
    for name, rows in boundaries().items():
        np.testing.assert_array_equal(volume.layers[name], rows)
        assert volume.layers[name].dtype == np.float32
    assert np.isnan(volume.layers["RNFL"]).all()
    assert (volume.laterality, volume.scan_pattern) == ("OD", "volume")
    assert volume.scale_x_um == pytest.approx(11.6)
    assert volume.scale_y_um == pytest.approx(3.87)
    assert volume.spacing_um == pytest.approx(120)
    assert list(volume.names) == ["eye_000", "eye_001", "eye_002"]
    assert list(volume.subjects) == ["", "", ""]


@settings(max_examples=20)
@given(
    count=st.integers(1, 3),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    spare=st.integers(0, 5000),
    trailing=st.integers(0, 200),
)
def test_sizes_are_read_and_never_assumed(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    rows: int,
    columns: int,
    spare: int,
    trailing: int,
) -> None:
    path = tmp_path_factory.mktemp("sizes") / "a.vol"
    bscans, layers = drawn(count, rows, columns), boundaries(count, columns)
    header_bytes = 256 + 12 * columns + spare
    write_vol(path, bscans, layers, header_bytes=header_bytes, trailing_bytes=trailing)
    volume = read_vol(path)
    np.testing.assert_allclose(volume.bscans[:], bscans, atol=1e-6)
    np.testing.assert_array_equal(volume.layers["ILM"], layers["ILM"])


def test_bscans_are_indexed_as_an_array_is(vol: Path) -> None:
    bscans = read_vol(vol).bscans
    whole = bscans[:]
    np.testing.assert_array_equal(bscans[-1], whole[-1])
    np.testing.assert_array_equal(bscans[::-2], whole[::-2])
    assert bscans[2:2].shape == (0, 24, 20)
    with pytest.raises(IndexError):
        bscans[3]


def test_bscans_are_pickled_as_a_place_and_not_as_pixels(vol: Path) -> None:
    bscans = read_vol(vol).bscans
    packed = pickle.dumps(bscans)
    assert len(packed) < 2000
    np.testing.assert_array_equal(pickle.loads(packed)[1], bscans[1])


def test_bscans_are_read_when_asked_for(vol: Path) -> None:
    volume = read_vol(vol)
    vol.write_bytes(vol.read_bytes()[:-1])
    volume.bscans[1]
    with pytest.raises(InputError, match=r"eye\.vol: cut short: \d+ bytes found, at least \d+"):
        volume.bscans[2]


def test_intensity_is_shown_by_its_fourth_root_and_invalid_is_black() -> None:
    largest = np.finfo(np.float32).max
    stored = np.float32([[0, 1, 0.0625, 4, -1], [largest, np.nan, 1e-4, 0.5, np.inf]])
    expected = [[0, 1, 0.5, 1, 0], [0, 0, 0.1, 0.5**0.25, 0]]
    np.testing.assert_allclose(display_scale(stored), expected, rtol=1e-6)
    assert display_scale(stored).dtype == np.float32


@pytest.mark.parametrize("value", [3.1e38, 3.4028235e38, np.inf, np.nan, -np.inf])
def test_invalid_rows_are_nan(tmp_path: Path, value: float) -> None:
    path = write_vol(tmp_path / "a.vol", drawn(1), {"ILM": np.full((1, 20), 5.0)})
    patched(path, HEADER_BYTES + SLO_BYTES + 256 + 4 * 7, "<f", np.float32(value))
    ilm = read_vol(path).layers["ILM"][0]
    assert np.flatnonzero(np.isnan(ilm)).tolist() == [7]


@pytest.mark.parametrize("keep", [0, 5, 2047, 2048, 2500, -1])
def test_a_file_that_ends_early_is_refused_with_both_sizes(vol: Path, keep: int) -> None:
    content = vol.read_bytes()
    vol.write_bytes(content[:keep])
    with pytest.raises(InputError, match=rf"cut short: {len(content[:keep])} bytes found.* \d+"):
        read_vol(vol)
    if keep > HEADER_BYTES:
        with pytest.raises(InputError, match=f"{len(content)} expected"):
            read_vol(vol)


@pytest.mark.parametrize(
    ("offset", "kind", "value"),
    [
        (12, "<i", 2**31 - 1),  # columns
        (12, "<i", 0),
        (16, "<i", -1),  # B-scans
        (16, "<i", 60000),
        (20, "<i", 65536),  # rows
        (48, "<i", -5),  # fundus image
        (52, "<i", 2**31 - 1),
        (100, "<i", -4),  # header of a B-scan
        (100, "<i", 40),
        (100, "<i", 2**31 - 1),
        (HEADER_BYTES + SLO_BYTES + 48, "<i", 2**31 - 1),  # boundaries
        (HEADER_BYTES + SLO_BYTES + 48, "<i", -1),
        (HEADER_BYTES + SLO_BYTES + 52, "<i", 10**9),  # their place
        (HEADER_BYTES + SLO_BYTES + 52, "<i", -8),
    ],
)
def test_a_header_that_cannot_be_true_is_refused(
    vol: Path, offset: int, kind: str, value: int
) -> None:
    with pytest.raises(InputError, match=r"eye\.vol") as caught:
        read_vol(patched(vol, offset, kind, value))
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_a_bscan_over_the_budget_is_refused(vol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_MAX_DECODED_BYTES", "1000")
    with pytest.raises(InputError, match=r"a B-scan: .*LAMINA_MAX_DECODED_BYTES"):
        read_vol(vol)


@pytest.mark.parametrize(("content", "message"), [(b"PK" * 2000, "begins with"), (None, "No such")])
def test_no_vol_file_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.vol"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_vol(path)


def test_nothing_of_the_patient_is_read(vol: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = bytearray(vol.read_bytes())
    content[88:96] = b"EXAMTIME"
    content[104:108] = b"7160"
    content[140 : 140 + len(PATIENT_ID)] = PATIENT_ID
    content[164:172] = b"BIRTHDAY"
    content[176:190] = b"#VISIT-SECRET!"
    vol.write_bytes(bytes(content))
    with caplog.at_level(logging.DEBUG):
        volume = read_vol(vol)
    told = pickle.dumps(volume) + repr(volume).encode() + caplog.text.encode()
    told += volume.bscans[:].tobytes()
    for secret in (PATIENT_ID, b"EXAMTIME", b"BIRTHDAY", b"SECRET"):
        assert secret not in told


def test_an_error_does_not_tell_the_patient(vol: Path) -> None:
    content = bytearray(vol.read_bytes())
    content[140 : 140 + len(PATIENT_ID)] = PATIENT_ID
    vol.write_bytes(bytes(content[:4000]))
    with pytest.raises(InputError) as caught:
        read_vol(vol)
    assert "SECRET" not in repr(caught.value)


@pytest.mark.parametrize("first", ["superior", "inferior"])
def test_the_end_at_which_a_volume_begins_is_noted(tmp_path: Path, first: str) -> None:
    path = write_vol(tmp_path / "a.vol", drawn(), spacing_um=100, first_bscan=first)
    assert FIRST_BSCAN_NOTES[first] in read_vol(path).notes


@pytest.mark.parametrize("places", [[(0, 0, 1, 1)] * 3, [(0, 0, 0, 5), (1, 0, 1, 5)], [(0,) * 4]])
def test_no_end_is_claimed_where_bscans_are_not_horizontal(
    places: list[tuple[float, ...]],
) -> None:
    assert first_bscan_notes(places) == []


@pytest.mark.parametrize(("number", "pattern"), [(1, "line"), (2, "circle"), (5, None), (9, None)])
def test_only_a_raster_has_a_distance_between_bscans(
    vol: Path, number: int, pattern: str | None
) -> None:
    volume = read_vol(patched(vol, 96, "<i", number))
    assert volume.scan_pattern == pattern
    assert volume.spacing_um is None


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 1e9])
def test_a_scale_that_cannot_be_is_unknown(vol: Path, scale: float) -> None:
    assert read_vol(patched(vol, 40, "<d", scale)).scale_y_um is None


def test_the_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layers must be"):
        write_vol(tmp_path / "a.vol", drawn(), {"ILM": np.zeros((3, 19))})
    with pytest.raises(ValueError, match="header_bytes is 300"):
        write_vol(tmp_path / "a.vol", drawn(), header_bytes=300)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "pattern", "valid"),
    [("Willis_B_716_0", "line", (0.988, 0.824)), ("Willis_B_716_2", "circle", (1, 1))],
)
def test_device_files_are_read(
    lamina_data: Path, name: str, pattern: str, valid: tuple[float, float]
) -> None:
    path = lamina_data / "oct" / "heyex_vol" / f"{name}.vol"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    volume = read_vol(path)
    assert volume.bscans.shape == (1, 496, 768)
    assert (volume.scan_pattern, volume.laterality) == (pattern, "OD")
    assert volume.scale_y_um == pytest.approx(3.8717, abs=1e-3)
    assert volume.spacing_um is None
    for layer, fraction in zip(("ILM", "BM"), valid, strict=True):
        rows = volume.layers[layer]
        assert np.isfinite(rows).mean() == pytest.approx(fraction, abs=1e-3)
        assert np.nanmin(rows) > 0
        assert np.nanmax(rows) < 496
    thickness = volume.layers["BM"] - volume.layers["ILM"]
    assert 100 < np.nanmedian(thickness) * volume.scale_y_um < 500
    bscan = volume.bscans[0]
    ilm = volume.layers["ILM"][0]
    columns = np.flatnonzero(np.isfinite(ilm) & (ilm > 10))
    at = ilm[columns].round().astype(int)
    assert bscan[at + 4, columns].mean() > 2 * bscan[at - 6, columns].mean()  # brighter below
