from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose
from numpy.typing import NDArray
from torch import nn

from pipeline.data.images import read_image
from pipeline.errors import ConfigurationError, InputError
from pipeline.inference.batch import BatchRun
from pipeline.oct.bscan_loader import BScanLoader
from pipeline.oct.evaluation import LayerMetrics
from pipeline.oct.formats import read_oct, read_predictions
from pipeline.oct.heyex_vol import write_vol
from pipeline.oct.prediction_writer import PredictionWriter
from pipeline.oct.results import EvaluationWriter, LayerWriter
from pipeline.oct.transforms import FitToFramed, LoadBScand, RenderLabeld

HEIGHT, WIDTH = 62, 40
FRAME = (60, 48)
GREYS = (0.0, 0.5, 1.0)
PATIENT = b"ZQX-19700229-SECRET"


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # disks are slow


class Grey(nn.Module):
    """A network that knows a layer by its grey; `refuse` stops it at its nth B-scan."""

    def __init__(self, refuse: int | None = None, error: Exception | None = None) -> None:
        super().__init__()
        self.refuse, self.error, self.seen = refuse, error, 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.seen += len(image)
        if self.refuse is not None and self.seen > self.refuse:
            self.refuse = None
            raise self.error or InputError("the network refused")
        return torch.cat([-200 * (image - grey) ** 2 for grey in GREYS], dim=1)


def drawn(count: int, blind: int = 0) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    """B-scans `(count, 62, 40)` in three greys, and their rows; the first `blind` show nothing."""
    x = np.arange(WIDTH) / WIDTH
    ilm = np.stack([18 + 4 * np.sin(3 * x + k) for k in range(count)]).astype(np.float32)
    rows = {"ILM": ilm, "BM": ilm + 20}
    r = np.arange(HEIGHT)[None, :, None]
    classes = sum((r >= boundary[:, None].round()).astype(int) for boundary in rows.values())
    images = np.array(GREYS, np.float32)[classes]
    images[:blind] = 0.25  # half-way between two layers
    return images, rows


def write_h5(path: Path, count: int, blind: int = 0) -> None:
    images, rows = drawn(count, blind)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["images"] = (images * 255).round().astype(np.uint8)
        for name, values in rows.items():
            file[f"layers/{name}"] = values
        file["names"] = [f"p01_OD_1_{k}" for k in range(count)]


def write_volume(path: Path, count: int = 3) -> None:
    """A raster of a patient, as the device writes it."""
    images, rows = drawn(count)
    write_vol(path, images, rows, spacing_um=120)
    content = bytearray(path.read_bytes())
    content[140 : 140 + len(PATIENT)] = PATIENT
    path.write_bytes(bytes(content))


def infer(
    folder: Path,
    network: nn.Module | None = None,
    batch_size: int = 2,
    run: Callable[[BatchRun, Any], None] = lambda batch, work: batch.run(work),
    **settings: Any,
) -> BatchRun:
    """Run over `folder/in` as a bundle does."""
    paths = sorted(p for p in (folder / "in").rglob("*") if p.is_file())
    cases = [{"image": str(p), "name": p.relative_to(folder / "in").as_posix()} for p in paths]
    batch = BatchRun(cases, str(folder / "out"), {}, None, "oct_layers", overwrite=True)
    loader = BScanLoader(batch, Compose([LoadBScand(), FitToFramed(frame=FRAME)]), batch_size)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=loader,
        network=network or Grey(),
        val_handlers=[LayerWriter(batch, loader, settings.pop("extraction", {}), **settings)],
    )
    run(batch, evaluator)
    return batch


def results(folder: Path) -> set[str]:
    """Every file of a run but its tables."""
    tables = {"summary.json", "per_image.csv", "failures.csv"}
    found = (p.relative_to(folder / "out").as_posix() for p in (folder / "out").rglob("*"))
    return {name for name in found if (folder / "out" / name).is_file()} - tables


def sidecar(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / name).read_text("utf-8"))
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_rows_of_every_bscan_are_written_in_the_frame_of_the_file(
    tmp_path: Path, batch_size: int
) -> None:
    write_h5(tmp_path / "in" / "a" / "eye.h5", 5)
    batch = infer(tmp_path, batch_size=batch_size)
    assert not batch.problems
    stored = read_predictions(tmp_path / "out" / "a" / "eye.h5")
    source = read_oct(tmp_path / "in" / "a" / "eye.h5")
    np.testing.assert_array_equal(stored.volume.bscans[:], source.bscans[:])
    assert list(stored.volume.names) == list(source.names)
    for found, name in ((stored.rows.ilm_px, "ILM"), (stored.rows.bm_px, "BM")):
        np.testing.assert_array_equal(stored.volume.layers[name], source.layers[name])
        assert found.shape == (5, WIDTH)
        # Half a row for the drawing, the rest for resizing to 60 rows and 48 columns.
        assert abs(found - source.layers[name]).mean() < 0.5
        assert abs(found - source.layers[name]).max() < 1.5
    assert stored.masks is not None
    assert stored.confidence is not None
    assert stored.masks.shape == stored.confidence.shape == (5, *FRAME)
    assert stored.metadata["bundle"] == "oct_layers"


def test_the_size_of_a_batch_does_not_matter(tmp_path: Path) -> None:
    rows = []
    for batch_size in (1, 4):
        folder = tmp_path / str(batch_size)
        write_h5(folder / "in" / "eye.h5", 5)
        infer(folder, batch_size=batch_size)
        rows.append(read_predictions(folder / "out" / "eye.h5").rows)
    for name in vars(rows[0]):
        np.testing.assert_allclose(getattr(rows[0], name), getattr(rows[1], name), atol=1e-5)


def test_all_outputs_of_a_raster_are_there_and_agree(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_volume(tmp_path / "in" / "eye.vol")
    infer(tmp_path)
    assert results(tmp_path) == {
        "eye.h5", "eye.csv", "eye.json", "eye_inference_summary.json", "eye_thickness.csv",
        "eye_etdrs.csv", "pictures/eye.png", "pictures/eye_0.png", "pictures/eye_2.png",
        "pictures/eye_thickness.png",
    }  # fmt: skip
    said = sidecar(tmp_path, "eye.json")
    assert {*said["results"]} == results(tmp_path) - {"eye.json"}
    stored = read_predictions(tmp_path / "out" / "eye.h5")
    with (tmp_path / "out" / "eye.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * WIDTH
    written = [float(line["ILM_px"]) for line in lines]
    np.testing.assert_allclose(written, stored.rows.ilm_px.ravel(), atol=6e-4)
    thickness = (stored.rows.bm_px - stored.rows.ilm_px).mean() * 3.87
    assert said["thickness_um"] == pytest.approx(thickness, abs=0.01)
    assert said["thickness_um"] == pytest.approx(20 * 3.87, abs=2)
    summary = sidecar(tmp_path, "eye_inference_summary.json")
    assert summary["mean_thickness_um"] == pytest.approx(thickness, abs=0.01)
    assert summary["predictions"] == "eye.h5"
    assert read_image(tmp_path / "out" / "pictures" / "eye.png").shape[1] == 2 * WIDTH


def test_no_file_of_another_name_is_touched(tmp_path: Path) -> None:
    write_h5(tmp_path / "in" / "eye.h5", 1)
    other = tmp_path / "out" / "inference_summary_eye.json"  # where a writer alone would put it
    other.parent.mkdir()
    other.write_text("mine")
    infer(tmp_path, save_pictures=False)
    assert other.read_text() == "mine"
    assert sidecar(tmp_path, "eye_inference_summary.json")["predictions"] == "eye.h5"


def test_the_row_and_the_sidecar_say_how_sure_it_is(tmp_path: Path) -> None:
    write_h5(tmp_path / "in" / "eye.h5", 4)
    batch = infer(tmp_path, checkpoint={"epoch": 7}, extraction={"max_sigma_px": 3.0})
    (row,) = batch.rows
    assert (row["bscans"], row["ilm_valid"], row["bm_valid"]) == (4, 1.0, 1.0)
    assert row["flagged"] is False
    assert row["thickness_um"] is None  # no scale
    assert row["thickness_px"] == pytest.approx(20, abs=0.5)
    said = sidecar(tmp_path, "eye.json")
    assert (said["shape"], said["network_frame"]) == ([4, HEIGHT, WIDTH], list(FRAME))
    assert said["checkpoint"] == {"epoch": 7}
    assert said["extraction"] == {"max_sigma_px": 3.0}
    assert list(said["seconds"]) == list(said["cpu_seconds"])
    assert list(said["seconds"]) == ["read", "network", "extract", "write"]
    assert sum(said["seconds"].values()) > 0


def test_a_scan_that_shows_no_layers_is_flagged_and_its_rows_are_nan(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_h5(tmp_path / "in" / "blind.h5", 1, blind=1)
    write_h5(tmp_path / "in" / "partly.h5", 5, blind=1)
    with caplog.at_level(logging.WARNING):
        batch = infer(tmp_path)
    rows = {row["image"]: row for row in batch.rows}
    assert rows["blind.h5"]["flagged"] is True
    assert rows["partly.h5"]["flagged"] is False
    assert rows["partly.h5"]["flagged_bscans"] == 1
    assert sidecar(tmp_path, "partly.json")["flagged_bscans"] == [0]
    assert "blind.h5: 0 % of the ILM's and 0 % of BM's" in caplog.text
    with h5py.File(tmp_path / "out" / "blind.h5") as file:
        assert np.isnan(file["predicted_layers/ILM"][:]).all()
        assert np.isfinite(file["predicted_layers_raw/ILM"][:]).all()


def test_the_middle_and_the_least_certain_bscans_are_drawn(tmp_path: Path) -> None:
    write_h5(tmp_path / "in" / "eye.h5", 9, blind=2)
    infer(tmp_path, most_pictures=3)
    pictures = {name for name in results(tmp_path) if name.startswith("pictures/")}
    assert pictures == {"pictures/eye.png", "pictures/eye_0.png", "pictures/eye_1.png"}


def test_what_is_not_wanted_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_volume(tmp_path / "in" / "eye.vol")
    infer(tmp_path, save_masks=False, save_csv=False, save_pictures=False)
    assert results(tmp_path) == {"eye.h5", "eye.json", "eye_inference_summary.json"}
    with h5py.File(tmp_path / "out" / "eye.h5") as file:
        assert not {"prediction_masks", "confidence_maps"} & set(file)


def test_nothing_is_left_of_a_file_that_the_network_refused(tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5", "c.h5"):
        write_h5(tmp_path / "in" / name, 4)
    batch = infer(tmp_path, Grey(refuse=6))  # at the second half of b.h5
    assert [(p.path, p.stage, p.message) for p in batch.problems] == [
        ("b.h5", "predict", "the network refused")
    ]
    assert [row["image"] for row in batch.rows] == ["a.h5", "c.h5"]
    assert not [name for name in results(tmp_path) if Path(name).name.lstrip(".")[0] == "b"]


@pytest.mark.parametrize("name", ["a.h5", "z.h5"])  # before and after a sound file
def test_nothing_is_left_of_a_file_with_a_damaged_bscan(tmp_path: Path, name: str) -> None:
    write_h5(tmp_path / "in" / "m.h5", 3)
    write_h5(tmp_path / "in" / name, 5)
    with h5py.File(tmp_path / "in" / name, "r+") as file:
        images = file["images"][:].astype(np.float32) / 255
        images[4] = np.nan
        del file["images"]
        file["images"] = images
    batch = infer(tmp_path)
    assert [(p.path, p.stage) for p in batch.problems] == [(name, "read")]
    assert [row["image"] for row in batch.rows] == ["m.h5"]
    assert not [n for n in results(tmp_path) if Path(n).name.lstrip(".")[0] == name[0]]


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), KeyboardInterrupt()])
def test_a_run_that_ends_leaves_no_part_of_a_file(tmp_path: Path, error: Any) -> None:
    write_h5(tmp_path / "in" / "a.h5", 4)
    with pytest.raises(type(error)):
        infer(tmp_path, Grey(refuse=3, error=error))
    assert results(tmp_path) == set()


def test_results_of_two_inputs_never_take_one_name(tmp_path: Path) -> None:
    write_h5(tmp_path / "in" / "a.h5", 3)
    write_h5(tmp_path / "in" / "a_0.h5", 1)  # whose picture is that of B-scan 0 of a.h5
    batch = infer(tmp_path)
    assert [problem.path for problem in batch.problems] == ["a_0.h5"]
    assert "would overwrite a_0.png" in batch.problems[0].message
    assert not [name for name in results(tmp_path) if name.startswith("a_0")]


def test_logits_that_are_not_finite_reject_the_file(tmp_path: Path) -> None:
    class Overflows(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.full((len(image), 3, *image.shape[2:]), torch.nan)

    write_h5(tmp_path / "in" / "a.h5", 2)
    batch = infer(tmp_path, Overflows())
    assert "not finite" in batch.problems[0].message
    assert results(tmp_path) == set()


def test_no_patient_reaches_an_output_or_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    write_volume(tmp_path / "in" / "eye.vol")
    assert PATIENT in (tmp_path / "in" / "eye.vol").read_bytes()
    with caplog.at_level(logging.DEBUG):
        infer(tmp_path)
    check_patient(tmp_path / "out", PATIENT)
    assert PATIENT.decode() not in caplog.text


def check_patient(folder: Path, patient: bytes) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        assert patient not in path.read_bytes(), path
        assert patient.decode("latin-1") not in path.name


def test_real_files_go_from_end_to_end_without_their_patients(
    tmp_path: Path, lamina_data: Path
) -> None:
    paths = sorted((lamina_data / "oct" / "heyex_vol").glob("*.vol"))
    if not paths:
        pytest.skip("no oct/heyex_vol in LAMINA_DATA")
    (tmp_path / "in").mkdir()
    for path in paths:
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    batch = infer(tmp_path)
    assert len(batch.rows) == len(paths)
    for path in paths:
        source = read_oct(path)
        stored = read_predictions(tmp_path / "out" / f"{path.stem}.h5")
        assert stored.rows.ilm_px.shape == (1, source.bscans.shape[2])
        for name in ("ILM", "BM"):  # the device's gaps stay gaps
            np.testing.assert_array_equal(stored.volume.layers[name], source.layers[name])
        patient = path.read_bytes()[140:161].split(b"\0")[0].strip()
        if len(patient) > 3:
            check_patient(tmp_path / "out", patient)


def test_a_writer_with_another_loader_says_so(tmp_path: Path) -> None:
    write_h5(tmp_path / "in" / "a.h5", 1)
    cases = [{"image": str(tmp_path / "in" / "a.h5"), "name": "a.h5"}]
    batch = BatchRun(cases, str(tmp_path / "out"), {}, None, "oct_layers")
    transform = Compose([LoadBScand(), FitToFramed(frame=FRAME)])
    given, other = (BScanLoader(batch, transform) for _ in range(2))
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"), val_data_loader=given, network=Grey(),
        val_handlers=[LayerWriter(batch, other, {})],
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="pass the evaluator's loader"):
        batch.run(evaluator)


@pytest.mark.parametrize("wrong", [{"least_valid": 1.5}, {"most_pictures": 0}])
def test_settings_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    write_h5(tmp_path / "in" / "a.h5", 1)
    with pytest.raises(ConfigurationError, match="expected a share"):
        infer(tmp_path, **wrong)


def test_the_file_has_its_name_only_once_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    present: list[bool] = []
    append = PredictionWriter.append

    def watched(self: PredictionWriter, *given: Any, **further: Any) -> None:
        append(self, *given, **further)
        present.append(self.path.exists())

    monkeypatch.setattr(PredictionWriter, "append", watched)
    write_h5(tmp_path / "in" / "a.h5", 4)
    infer(tmp_path)
    assert present == [False, False]
    assert (tmp_path / "out" / "a.h5").exists()


class TestEvaluation:
    def evaluate(self, folder: Path, **settings: Any) -> dict[str, Any]:
        """Evaluate over three B-scans of two people, as a bundle does."""
        images, rows = drawn(3)
        network, metrics = Grey(), LayerMetrics({"max_sigma_px": 3.0}, compare_transition=True)
        writer = EvaluationWriter(str(folder), metrics, {"experiment": "x"}, **settings)
        for k in range(3):
            given: dict[Any, Any] = {
                "image": images[k],
                "ilm": rows["ILM"][k],
                "bm": rows["BM"][k].copy(),
            }
            given["bm"][:5] = np.nan
            loaded = LoadBScand()({**given, "name": f"p{k // 2}/scan_{k}", "scale_y_um": 3.87})
            truth = {f"{key}_source": loaded[key] for key in ("ilm", "bm")}
            item: dict[Any, Any] = RenderLabeld()(FitToFramed(frame=FRAME)(loaded))
            pred = network(item["image"][None])[0]
            item |= {**truth, "subject": f"p{k // 2}", "pred": pred}
            metrics.update([{str(key): value for key, value in item.items()}])
        writer.write()
        found: dict[str, Any] = yaml.safe_load((folder / "test_metrics.yaml").read_text())
        return found

    def test_the_tables_say_scan_subject_and_all(self, tmp_path: Path) -> None:
        found = self.evaluate(tmp_path)
        assert found["experiment"] == "x"
        assert (found["num_test_images"], found["max_sigma_px"]) == (3, 3.0)
        assert set(found["per_subject"]) == {"p0", "p1"}
        assert found["per_subject"]["p0"]["scans"] == 2
        assert (found["overall"]["eyes"], found["overall"]["scans"]) == (2, 3)
        rows = yaml.safe_load((tmp_path / "per_image_metrics.yaml").read_text())
        assert [row["image"] for row in rows] == ["p0/scan_0", "p0/scan_1", "p1/scan_2"]
        each = [row["ilm_mae_px"] for row in rows]
        assert found["average_metrics"]["ilm_mae_px"] == pytest.approx(np.mean(each))
        mean = found["overall"]["ilm_mae_px"]  # of the two people
        assert mean == pytest.approx((np.mean(each[:2]) + each[2]) / 2)
        assert found["overall"]["transition_ilm_mae_px"] > 0
        assert found["overall"]["dice"] > 0.9

    def test_each_scan_has_its_rows_and_its_picture(self, tmp_path: Path) -> None:
        self.evaluate(tmp_path)
        with (tmp_path / "predictions" / "p0" / "scan_1.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        truth = drawn(3)[1]["ILM"][1]
        assert len(lines) == WIDTH
        written = np.array([float(line["ILM_px"]) for line in lines])
        assert abs(written - truth).max() < 1.5
        assert [line["BM_truth_px"] for line in lines[:5]] == [""] * 5
        picture = read_image(tmp_path / "pictures" / "p0" / "scan_1.png")
        assert picture.shape[:2] == (2 * HEIGHT + 18, 2 * WIDTH)
        assert picture[: 2 * HEIGHT].std() > 20

    def test_rows_are_written_on_request_only(self, tmp_path: Path) -> None:
        self.evaluate(tmp_path, save_predictions=False)
        assert not (tmp_path / "predictions").exists()
        assert (tmp_path / "pictures" / "p1" / "scan_2.png").exists()
