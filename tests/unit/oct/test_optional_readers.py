from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.errors import ConfigurationError, InputError
from pipeline.oct import optional_readers
from pipeline.oct.heyex_vol import FIRST_BSCAN_NOTES
from pipeline.oct.optional_readers import OPTIONAL_SUFFIXES, read_optional

N, H, W = 3, 20, 16
BSCANS = np.random.default_rng(0).integers(0, 256, (N, H, W), dtype=np.uint8)
SECRET = "Maria-Muster-19700229"
Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a module that behaves as a library's does in its place."""

    def put(name: str, **members: Any) -> None:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:depth]))
            monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), module)
        for key, member in members.items():
            setattr(sys.modules[name], key, member)

    return put


def file(folder: Path, name: str, size: int = 100) -> Path:
    path = folder / name
    path.write_bytes(bytes(size))
    return path


def eyepy_volume(**changes: Any) -> SimpleNamespace:
    ilm = np.full((N, W), 4.0)
    ilm[0, :3] = 3.4028235e38
    layers = {"ILM": ilm, "BM": ilm * 0 + 15.5, "GCL": ilm}
    known = {
        "data": BSCANS,
        "layers": {name: SimpleNamespace(data=data) for name, data in layers.items()},
        "scale_x": 0.0115,
        "scale_y": 0.00387,
        "scale_z": 0.12,
        "laterality": "OD",
        "meta": {"patient": SECRET},
    }
    return SimpleNamespace(**{**known, **changes})


class Series:
    """A reader of `.e2e` as eyepy's: a context whose `volume` is the first of its series."""

    series = (1, 2)
    volume = eyepy_volume(laterality="LateralityEnum.L")

    def __init__(self, path: Path) -> None:
        sys.stdout.write(SECRET)

    def __enter__(self) -> Series:
        return self

    def __exit__(self, *_: object) -> None:
        return None


@pytest.mark.parametrize("suffix", OPTIONAL_SUFFIXES)
def test_a_missing_library_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    for name in ("eyepy", "oct_converter", "pydicom"):
        monkeypatch.setitem(sys.modules, name, None)
    path = file(tmp_path, f"a{suffix.upper()}", 1024 * 512)
    with pytest.raises(ConfigurationError, match=r"a\.\w+: .*pip install 'lamina\[oct\]'"):
        read_optional(path)


def test_importing_the_readers_imports_no_library() -> None:
    source = Path(optional_readers.__file__).read_text("utf-8")
    top = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert not any(name in line for line in top for name in ("eyepy", "oct_converter", "pydicom"))


def test_e2e_tells_its_faults_and_what_it_leaves_out(
    tmp_path: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("eyepy.io.he.e2e_reader", HeE2eReader=Series)
    volume = read_optional(file(tmp_path, "a.e2e"))
    np.testing.assert_array_equal(volume.bscans[:], BSCANS)
    assert np.isnan(volume.layers["ILM"][0, :3]).all()
    assert list(volume.layers) == ["ILM", "BM"]
    assert volume.scale_x_um is None  # a guess of the library's
    assert volume.scale_y_um == pytest.approx(3.87)
    assert volume.laterality == "OS"
    notes = " ".join(volume.notes)
    for fault in ("guess", "not registered", "order of B-scans", "holds 2 scans", "device"):
        assert fault in notes
    assert SECRET not in capsys.readouterr().out
    assert SECRET.encode() not in pickle.dumps(volume)


def test_xml_has_scales_and_the_end_it_begins_at(tmp_path: Path, install: Install) -> None:
    places = [{"start_pos": (0.0, 5.0 - k), "end_pos": (6.0, 5.0 - k)} for k in range(N)]
    reader = SimpleNamespace(bscan_meta=places, volume=eyepy_volume())
    install("eyepy.io.he.xml_reader", HeXmlReader=lambda path: reader)
    volume = read_optional(file(tmp_path, "a.xml"))
    found = (volume.scale_x_um, volume.scale_y_um, volume.spacing_um)
    assert found == pytest.approx((11.5, 3.87, 120))
    assert FIRST_BSCAN_NOTES["inferior"] in volume.notes
    assert volume.laterality == "OD"
    reader.bscan_meta = places[:1]
    with pytest.raises(InputError, match="1 B-scans, and eyepy reads only volumes"):
        read_optional(tmp_path / "a.xml")


@pytest.mark.parametrize("name", ["fda", "fds"])
def test_topcon_works_without_what_numpy_dropped(
    tmp_path: Path, install: Install, name: str
) -> None:
    module = f"oct_converter.readers.{name}"

    def read_oct_volume() -> SimpleNamespace:
        stored = sys.modules[module].np.fromstring(BSCANS.tobytes(), dtype=np.uint8)
        stored = stored.reshape(BSCANS.shape)
        return SimpleNamespace(
            volume=list(stored),
            contours={"ILM": np.full((N, W), 4), "BM": np.full((N, W + 1), 4)},
            pixel_spacing=[0.01, 0.1, 0.0026],
            surname=SECRET,
        )

    reader = SimpleNamespace(read_oct_volume=read_oct_volume)
    install(module, np=np, **{name.upper(): lambda path: reader})
    volume = read_optional(file(tmp_path, f"a.{name}"))
    np.testing.assert_array_equal(volume.bscans[:], BSCANS)
    assert list(volume.layers) == ["ILM"]
    assert any("BM has shape (3, 17) and was left out" in note for note in volume.notes)
    found = (volume.scale_x_um, volume.spacing_um, volume.scale_y_um)
    assert found == pytest.approx((10, 100, 2.6))
    assert volume.laterality is None  # known to be wrong
    assert sys.modules[module].np is np
    assert SECRET.encode() not in pickle.dumps(volume)


def test_zeiss_takes_its_columns_from_the_name(tmp_path: Path, install: Install) -> None:
    asked = {}

    class Reader:
        def __init__(self, path: Path) -> None:
            self.path = path

        def read_oct_volume(self, rows: int, cols: int) -> SimpleNamespace:
            asked.update(rows=rows, cols=cols)
            return SimpleNamespace(volume=[np.zeros((rows, cols), np.uint8)])

    install("oct_converter.readers.img", IMG=Reader)
    read_optional(file(tmp_path, "cube_200x200_OD.img", 1024 * 200))
    assert asked == {"rows": 1024, "cols": 200}
    read_optional(file(tmp_path, "cube.img", 1024 * 512))
    assert asked == {"rows": 1024, "cols": 512}
    with pytest.raises(InputError, match="no whole number of B-scans of 1024 x 512"):
        read_optional(file(tmp_path, "b.img", 1000))


def dicom(**changes: Any) -> Any:
    measures = SimpleNamespace(PixelSpacing=["0.00387", "0.0115"])
    known = {
        "Rows": H,
        "Columns": W,
        "NumberOfFrames": N,
        "BitsStored": 12,
        "ImageLaterality": "L",
        "SharedFunctionalGroupsSequence": [SimpleNamespace(PixelMeasuresSequence=[measures])],
        "pixel_array": BSCANS.astype(np.uint16),
        **changes,
    }
    data = SimpleNamespace(**known)
    data.get = lambda name, default=None: known.get(name, default)
    return data


def test_dicom_asks_for_no_tag_about_the_patient(tmp_path: Path, install: Install) -> None:
    asked: list[str] = []

    def dcmread(path: Path, specific_tags: list[str]) -> Any:
        asked.extend(specific_tags)
        return dicom()

    install("pydicom", dcmread=dcmread)
    volume = read_optional(file(tmp_path, "a.dcm"))
    assert volume.bscans.shape == (N, H, W)
    assert volume.white == 4095.0
    assert (volume.scale_y_um, volume.scale_x_um) == pytest.approx((3.87, 11.5))
    assert volume.laterality == "OS"
    assert not any("Patient" in tag or "Date" in tag or "Time" in tag for tag in asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Manufacturer": "Carl Zeiss Meditec"}, "Zeiss scrambles"),
        ({"Rows": 10**9}, "LAMINA_MAX_DECODED_BYTES"),
        ({"NumberOfFrames": 7}, "expected gray B-scans"),
    ],
)
def test_dicom_that_cannot_be_taken_is_refused(
    tmp_path: Path, install: Install, changes: dict[str, Any], message: str
) -> None:
    install("pydicom", dcmread=lambda path, specific_tags: dicom(**changes))
    with pytest.raises(InputError, match=message):
        read_optional(file(tmp_path, "a.dcm"))


def test_dicom_is_read_by_the_library_itself(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.5.4"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    data = pydicom.dataset.FileDataset("a", {}, file_meta=meta, preamble=bytes(128))
    data.PatientName = SECRET
    data.Rows, data.Columns, data.NumberOfFrames, data.SamplesPerPixel = H, W, N, 1
    data.PhotometricInterpretation, data.PixelRepresentation = "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.PixelData = BSCANS.tobytes()
    data.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    volume = read_optional(tmp_path / "a.dcm")
    np.testing.assert_array_equal(volume.bscans[:], BSCANS)
    assert SECRET.encode() not in pickle.dumps(volume)


def test_what_a_library_says_of_a_damaged_file_is_not_repeated(
    tmp_path: Path, install: Install
) -> None:
    def fails(path: Path) -> None:
        raise KeyError(SECRET)

    install("eyepy.io.he.e2e_reader", HeE2eReader=fails)
    with pytest.raises(InputError, match=r"a\.e2e: eyepy cannot read it \(KeyError\)") as caught:
        read_optional(file(tmp_path, "a.e2e"))
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("bscans", [np.zeros((H, W)), np.zeros((0, H, W)), np.full((N, H, W), "a")])
def test_what_is_no_volume_is_refused(tmp_path: Path, install: Install, bscans: np.ndarray) -> None:
    class Odd(Series):
        volume = eyepy_volume(data=bscans, layers={})

    install("eyepy.io.he.e2e_reader", HeE2eReader=Odd)
    with pytest.raises(InputError, match=r"expected \(N, H, W\)"):
        read_optional(file(tmp_path, "a.e2e"))


def test_missing_files_and_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        read_optional(tmp_path / "a.e2e")
    with pytest.raises(InputError, match=r"expected one of \.e2e"):
        read_optional(file(tmp_path, "a.xyz"))


def test_a_file_over_the_budget_is_refused_before_a_library_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMINA_MAX_DECODED_BYTES", "100")
    with pytest.raises(InputError, match="LAMINA_MAX_DECODED_BYTES"):
        read_optional(file(tmp_path, "a.e2e"))


def test_dicom_is_known_by_its_mark_and_heyex_by_its_folder(
    tmp_path: Path, install: Install
) -> None:
    install("pydicom", dcmread=lambda path, specific_tags: dicom())
    path = file(tmp_path, "IM0001")
    path.write_bytes(bytes(128) + b"DICM")
    assert read_optional(path).source_format == "dicom"
    places = [{"start_pos": (0.0, 0.0), "end_pos": (6.0, 0.0)}] * N
    reader = SimpleNamespace(bscan_meta=places, volume=eyepy_volume())
    install("eyepy.io.he.xml_reader", HeXmlReader=lambda path: reader)
    folder = tmp_path / "export"
    folder.mkdir()
    with pytest.raises(InputError, match="0 XML files in it"):
        read_optional(folder)
    file(folder, "a.xml")
    assert read_optional(folder).path == folder / "a.xml"
    file(folder, "b.xml")
    with pytest.raises(InputError, match="2 XML files in it"):
        read_optional(folder)
