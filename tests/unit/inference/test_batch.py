from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from torch import nn

from pipeline.data.atomic import write_bytes
from pipeline.errors import ConfigurationError, InputError, InputErrors, ResourceError
from pipeline.inference.batch import BatchRun

FILES = {"a.png": b"1", "b/a.png": b"2", "b/eye 2.tif": b"3", "c.ppm.gz": b"4"}


def broken_is_bad(case: Mapping[str, Any]) -> str:
    content = Path(case["image"]).read_bytes()
    return f"{case['image']}: damaged; copy it again" if content == b"broken" else ""


@dataclass
class Folder:
    """A folder of tiny inputs, a model file, and how a run over them is configured."""

    root: Path
    settings: dict[str, Any] = field(default_factory=lambda: {"threshold": 0.5})
    computed: list[str] = field(default_factory=list)
    fail_on: str = ""
    error: BaseException = field(default_factory=lambda: ZeroDivisionError("as planned"))

    def __post_init__(self) -> None:
        self.put(FILES)
        write_bytes(self.root / "model.pt", b"weights")

    @property
    def output(self) -> Path:
        return self.root / "out"

    def put(self, files: Mapping[str, bytes]) -> None:
        for name, content in files.items():
            write_bytes(self.root / "in" / name, content)

    def cases(self) -> list[dict[str, Any]]:
        source = self.root / "in"
        paths = sorted(path for path in source.rglob("*") if path.is_file())
        return [{"image": str(p), "name": p.relative_to(source).as_posix()} for p in paths]

    def batch(self, cases: Sequence[Mapping[str, Any]] | None = None, **changes: Any) -> BatchRun:
        return BatchRun(
            **{
                "cases": self.cases() if cases is None else cases,
                "output_dir": str(self.output),
                "check": broken_is_bad,
                "settings": self.settings,
                "model_path": str(self.root / "model.pt"),
                "bundle": "fundus_vessels",
                **changes,
            }
        )

    def evaluator(self, batch: BatchRun) -> SupervisedEvaluator:
        data = [{"image": torch.zeros(1, 2, 2), "name": case["name"]} for case in batch.pending]
        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(Dataset(data), batch_size=1),
            network=nn.Identity(),
        )

        def write(engine: Any) -> None:
            name = engine.state.batch[0]["name"]
            if name == self.fail_on:
                raise self.error
            write_bytes(batch.path(name, "_vessels.png"), b"picture")
            result = batch.path(name, "_vessels.png")
            batch.record(name, [result], {"vessel_density": 0.25}, {"shape": [2, 2]})
            self.computed.append(name)

        evaluator.add_event_handler(Events.ITERATION_COMPLETED, write)
        return evaluator

    def run(self, cases: Sequence[Mapping[str, Any]] | None = None, **changes: Any) -> list[str]:
        """Run as a bundle's configuration does and return the inputs that were computed."""
        self.computed.clear()
        batch = self.batch(cases, **changes)
        batch.run(self.evaluator(batch))
        batch.finish()
        return list(self.computed)

    def table(self, name: str) -> list[dict[str, str]]:
        with (self.output / name).open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream))

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.output / "summary.json").read_text("utf-8"))
        return found

    def sidecar(self, name: str) -> Path:
        return self.output / name

    def counts(self) -> tuple[int, int, int, int, int]:
        found = self.summary()
        keys = ("inputs", "done", "skipped", "rejected", "exit_code")
        counts: tuple[int, int, int, int, int] = tuple(found[key] for key in keys)  # type: ignore[assignment]
        return counts


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_a_result_whose_file_is_gone_is_computed_again(folder: Folder) -> None:
    folder.run()
    next(folder.output.glob("**/*_vessels.png")).unlink()
    assert len(folder.run()) == 1


def test_results_keep_the_folders_of_their_inputs(folder: Folder) -> None:
    assert folder.run() == list(FILES)
    stems = ["a", "b/a", "b/eye 2", "c"]
    made = {
        p.relative_to(folder.output).as_posix() for p in folder.output.rglob("*") if p.is_file()
    }
    assert made == {
        *(f"{stem}{suffix}" for stem in stems for suffix in (".json", "_vessels.png")),
        "per_image.csv", "failures.csv", "summary.json",
    }  # fmt: skip


def test_tables_and_summary_say_what_was_done(folder: Folder) -> None:
    folder.run()
    assert folder.table("per_image.csv") == [
        {"image": name, "vessel_density": "0.25"} for name in FILES
    ]
    assert folder.table("failures.csv") == []
    assert folder.counts() == (4, 4, 0, 0, 0)
    assert folder.summary()["bundle"] == "fundus_vessels"
    assert folder.summary()["settings"] == {"threshold": 0.5}


def test_sidecar_says_where_a_result_is_from(folder: Folder) -> None:
    folder.run()
    sidecar = json.loads((folder.output / "b" / "a.json").read_text("utf-8"))
    assert sidecar["input"] == str(folder.root / "in" / "b" / "a.png")
    assert {"input_sha256", "model_sha256", "settings_sha256", "lamina"} <= set(sidecar)
    assert sidecar["settings"] == {"threshold": 0.5}
    assert sidecar["shape"] == [2, 2]
    assert sidecar["row"] == {"image": "b/a.png", "vessel_density": 0.25}


def test_second_run_computes_nothing_and_tells_the_same(folder: Folder) -> None:
    folder.run()
    before = folder.table("per_image.csv")
    assert folder.run() == []
    assert folder.table("per_image.csv") == before
    assert folder.counts() == (4, 0, 4, 0, 0)


def change_input(folder: Folder) -> None:
    folder.put({"b/a.png": b"other"})


def change_model(folder: Folder) -> None:
    write_bytes(folder.root / "model.pt", b"other weights")


def change_settings(folder: Folder) -> None:
    folder.settings = {"threshold": 0.4}


def remove_sidecar(folder: Folder) -> None:
    (folder.output / "b" / "a.json").unlink()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_input, ["b/a.png"]),
        (remove_sidecar, ["b/a.png"]),
        (change_model, list(FILES)),
        (change_settings, list(FILES)),
    ],
)
def test_what_changed_is_computed_again(
    folder: Folder, change: Callable[[Folder], None], expected: list[str]
) -> None:
    folder.run()
    change(folder)
    assert folder.run() == expected
    assert folder.run() == []


def test_everything_is_computed_again_on_request(folder: Folder) -> None:
    folder.run()
    assert folder.run(overwrite=True) == list(FILES)


def test_a_moved_input_folder_changes_nothing(folder: Folder) -> None:
    folder.run()
    (folder.root / "in").rename(folder.root / "elsewhere")
    source = folder.root / "elsewhere"
    assert folder.run([{"image": str(source / name), "name": name} for name in FILES]) == []


@pytest.mark.parametrize("length", [0, 1, 40, -2])
def test_half_written_sidecar_does_not_count(folder: Folder, length: int) -> None:
    folder.run()
    sidecar = folder.output / "b" / "a.json"
    sidecar.write_bytes(sidecar.read_bytes()[:length])
    assert folder.run() == ["b/a.png"]


@pytest.mark.parametrize("text", ["null", "[]", "3", "{}", '{"row": {}}', '"\\ud800"'])
def test_foreign_sidecar_does_not_count(folder: Folder, text: str) -> None:
    folder.run()
    (folder.output / "b" / "a.json").write_text(text, "utf-8")
    assert folder.run() == ["b/a.png"]


def test_sidecar_without_its_row_does_not_count(folder: Folder) -> None:
    folder.run()
    sidecar = folder.output / "a.json"
    content = json.loads(sidecar.read_text("utf-8"))
    sidecar.write_text(json.dumps({k: v for k, v in content.items() if k != "row"}), "utf-8")
    assert folder.run() == ["a.png"]


def test_further_files_of_a_case_count_too(folder: Folder) -> None:
    mask = write_bytes(folder.root / "mask.png", b"mask")

    def run(*, masked: bool) -> list[str]:
        fov = str(mask) if masked else None
        return folder.run([{**case, "fov": fov} for case in folder.cases()], files=["fov"])

    assert run(masked=True) == list(FILES)
    assert run(masked=True) == []
    mask.write_bytes(b"other mask")
    assert run(masked=True) == list(FILES)
    assert run(masked=False) == list(FILES)
    assert run(masked=False) == []


def test_bad_input_is_listed_and_the_rest_is_done(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.put({"b/bad.png": b"broken"})
    with pytest.raises(InputErrors, match="1 of 5 inputs rejected, the rest is done") as caught:
        folder.run()
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert folder.computed == list(FILES)
    assert folder.table("failures.csv") == [
        {"path": "b/bad.png", "stage": "read", "code": "3", "message": "damaged; copy it again"}
    ]
    assert folder.counts() == (5, 4, 0, 1, 3)
    assert f"rejected: {folder.root / 'in' / 'b' / 'bad.png'}: damaged" in caplog.text


def test_bad_input_is_listed_again_by_the_next_run(folder: Folder) -> None:
    folder.put({"bad.png": b"broken"})
    for skipped in (0, 4):
        with pytest.raises(InputErrors):
            folder.run()
        assert folder.counts() == (5, 4 - skipped, skipped, 1, 3)
    folder.put({"bad.png": b"good"})
    assert folder.run() == ["bad.png"]
    assert folder.table("failures.csv") == []


def test_vanished_input_is_listed_and_the_rest_is_done(folder: Folder) -> None:
    cases = folder.cases()
    (folder.root / "in" / "a.png").unlink()
    with pytest.raises(InputErrors, match=r"a\.png: cannot be read"):
        folder.run(cases)
    assert folder.computed == list(FILES)[1:]


def test_tables_are_written_where_every_input_is_bad(folder: Folder) -> None:
    folder.put(dict.fromkeys(FILES, b"broken"))
    with pytest.raises(InputErrors, match="4 of 4 inputs rejected"):
        folder.run()
    assert folder.counts() == (4, 0, 0, 4, 3)
    assert folder.table("per_image.csv") == []
    assert (folder.output / "per_image.csv").read_text("utf-8") == "image\n"
    assert len(folder.table("failures.csv")) == 4


def test_no_input_at_all_is_an_input_error_with_a_summary(folder: Folder) -> None:
    with pytest.raises(InputError, match="found no input, expected at least one") as caught:
        folder.run([])
    assert caught.value.exit_code == 3
    assert folder.counts() == (0, 0, 0, 0, 3)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ZeroDivisionError("as planned"), 1),
        (ResourceError("disk full"), 5),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device"), 5),
    ],
    ids=["bug", "resource", "interrupt", "disk"],
)
def test_tables_are_written_where_the_run_stops_half_way(
    folder: Folder, error: BaseException, code: int
) -> None:
    folder.fail_on, folder.error = "b/eye 2.tif", error
    with pytest.raises(type(error)):
        folder.run()
    assert folder.counts() == (4, 2, 0, 0, code)
    assert [row["image"] for row in folder.table("per_image.csv")] == ["a.png", "b/a.png"]
    folder.fail_on = ""
    assert folder.run() == ["b/eye 2.tif", "c.ppm.gz"]
    assert folder.counts() == (4, 2, 2, 0, 0)


def test_old_sidecar_does_not_vouch_for_a_result_half_overwritten(folder: Folder) -> None:
    folder.run()
    change_settings(folder)
    folder.fail_on = "b/a.png"
    with pytest.raises(ZeroDivisionError):
        folder.run()
    folder.fail_on, folder.settings = "", {"threshold": 0.5}
    assert folder.run() == list(FILES)


def test_half_a_sidecar_never_has_the_final_name(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = folder.batch()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(ResourceError, match=r"a\.json: cannot be written"):
        batch.record("a.png", [], {}, {})
    assert not (folder.output / "a.json").exists()


@pytest.mark.parametrize("other", ["a.tif", "A.png", "a.png.gz"])
def test_two_inputs_of_one_result_are_refused_before_anything_is_done(
    folder: Folder, other: str
) -> None:
    folder.put({other: b"5"})
    with pytest.raises(ConfigurationError, match="results of different inputs would have one name"):
        folder.run()
    assert folder.computed == []


def test_one_input_listed_twice_is_refused(folder: Folder) -> None:
    with pytest.raises(ConfigurationError, match=r"listed twice: a\.png$"):
        folder.run([*folder.cases(), folder.cases()[0]])


def test_input_whose_sidecar_would_be_the_summary_is_refused(folder: Folder) -> None:
    folder.put({"b/summary.png": b"5"})
    folder.run()
    folder.put({"summary.png": b"6"})
    with pytest.raises(ConfigurationError, match=r"^summary\.png: its result would be named like"):
        folder.run()


def test_log_tells_what_is_to_do(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder.run()
    folder.put({"a.png": b"other", "bad.png": b"broken"})
    folder.batch()
    assert "4 inputs: 4 to do, 0 done before, 0 rejected" in caplog.text
    assert "4 done, 0 skipped, 0 rejected" in caplog.text
    assert "5 inputs: 1 to do, 3 done before, 1 rejected" in caplog.text


def test_finished_inputs_are_not_read_again(folder: Folder) -> None:
    folder.run()
    seen: list[str] = []

    def check(case: Mapping[str, Any]) -> str:
        seen.append(str(case["name"]))
        return ""

    folder.put({"new.png": b"5"})
    folder.batch(check=check)
    assert seen == ["new.png"]


def test_file_in_place_of_the_output_folder_is_a_resource_error(folder: Folder) -> None:
    folder.output.write_bytes(b"")
    with pytest.raises(ResourceError, match="a file stands where a folder is needed") as caught:
        folder.batch()
    assert caught.value.exit_code == 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_cannot_be_written_is_a_resource_error(folder: Folder) -> None:
    folder.output.mkdir(mode=0o500)
    with pytest.raises(ResourceError, match="make the folder writable") as caught:
        folder.batch()
    assert caught.value.exit_code == 5
