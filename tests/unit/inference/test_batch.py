from __future__ import annotations

import contextlib
import csv
import json
import logging
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import Dataset
from monai.engines import SupervisedEvaluator
from monai.handlers import StatsHandler
from monai.transforms import Compose, Lambdad
from torch import nn

from pipeline.data.atomic import write_bytes
from pipeline.data.checksums import file_sha256
from pipeline.data.writers import result_path
from pipeline.errors import (
    CheckpointError,
    ConfigurationError,
    InputError,
    InputErrors,
    ResourceError,
    exit_code,
)
from pipeline.hardware.environment import package_versions
from pipeline.inference.accepted import AcceptedLoader
from pipeline.inference.batch import BatchRun
from pipeline.inference.sidecars import Identity, path_sha256

FILES = {"a.png": b"1", "b/a.png": b"2", "b/eye 2.tif": b"3", "c.ppm.gz": b"4"}


def read_tiny(path: str) -> torch.Tensor:
    """Return a picture whose grey is the first byte; note in `<path>.reads` who read it."""
    with Path(f"{path}.reads").open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if content == b"broken":
        raise InputError(f"{path}: damaged; copy it again")
    if content == b"forbidden":
        raise ResourceError("memory: none left")
    if content == b"bug":
        raise ZeroDivisionError("a bug")
    return torch.full((1, 2, 2), float(content[0]))


class FailsOn(nn.Module):
    """A network that refuses some greys."""

    def __init__(self, errors: Mapping[bytes, BaseException]) -> None:
        super().__init__()
        self.errors = {float(grey[0]): error for grey, error in errors.items()}
        self.seen: list[float] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        for grey in image[:, 0, 0, 0].tolist():
            self.seen.append(grey)
            if grey in self.errors:
                raise self.errors[grey]
        return image


@dataclass
class Folder:
    """A folder of tiny inputs, a model file, and how a run over them is configured."""

    root: Path
    settings: dict[str, Any] = field(default_factory=lambda: {"threshold": 0.5})
    computed: list[str] = field(default_factory=list)
    fail_on: str = ""
    error: BaseException = field(default_factory=lambda: ZeroDivisionError("as planned"))
    network: nn.Module = field(default_factory=nn.Identity)
    loading: dict[str, Any] = field(default_factory=dict)
    handlers: list[Any] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)

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
        paths = sorted(p for p in source.rglob("*") if p.is_file() and p.suffix != ".reads")
        return [{"image": str(p), "name": p.relative_to(source).as_posix()} for p in paths]

    def batch(self, cases: Sequence[Mapping[str, Any]] | None = None, **changes: Any) -> BatchRun:
        return BatchRun(
            **{
                "cases": self.cases() if cases is None else cases,
                "output_dir": str(self.output),
                "settings": self.settings,
                "model_path": str(self.root / "model.pt"),
                "bundle": "fundus_vessels",
                **changes,
            }
        )

    def reads(self, name: str) -> list[str]:
        """The processes that read an input, one per time."""
        log = self.root / "in" / f"{name}.reads"
        return log.read_text().split() if log.exists() else []

    def evaluator(self, batch: BatchRun) -> SupervisedEvaluator:
        reading = Compose([Lambdad("image", read_tiny)])  # which wraps errors in RuntimeError
        data = [{key: case[key] for key in ("image", "name")} for case in batch.pending]
        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=AcceptedLoader(batch, Dataset(data, reading), **self.loading),
            network=self.network,
            val_handlers=self.handlers,
        )

        def write(engine: Engine) -> None:
            for item in engine.state.batch:
                name = item["name"]
                result = write_bytes(
                    batch.path(name, "_vessels.png"), b"picture of " + name.encode()
                )
                if name == self.fail_on:
                    raise self.error
                batch.record(name, [result], {"vessel_density": 0.25}, {"shape": [2, 2]})
                self.computed.append(name)

        evaluator.add_event_handler(Events.ITERATION_COMPLETED, write)
        counted = (Events.DATALOADER_STOP_ITERATION, Events.EPOCH_COMPLETED, Events.COMPLETED)
        for event in counted:
            evaluator.add_event_handler(event, self.events.update, [event.name])
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
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no power cut here, and disks are slow
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
    assert folder.summary()["started"] <= folder.summary()["ended"]
    assert folder.summary()["seconds"] >= 0


def test_sidecar_says_where_a_result_is_from(folder: Folder) -> None:
    folder.run(used=lambda: {"backend": "torch"})
    sidecar = json.loads((folder.output / "b" / "a.json").read_text("utf-8"))
    assert sidecar["input"] == str(folder.root / "in" / "b" / "a.png")
    assert sidecar["input_sha256"] == file_sha256(folder.root / "in" / "b" / "a.png")
    assert sidecar["model_sha256"] == file_sha256(folder.root / "model.pt")
    assert sidecar["identity"] == "content"
    assert sidecar["settings"] == {"threshold": 0.5}
    assert sidecar["versions"] == package_versions(("lamina", "torch", "monai"))
    assert sidecar["used"] == {"backend": "torch"}
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
    assert "rejected: b/bad.png: damaged; copy it again" in caplog.text


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
    with pytest.raises(InputErrors, match=r"a\.png: cannot be read: No such file"):
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
    assert folder.run() == ["a.png", "b/a.png"]  # the others still are what they were


def test_half_a_sidecar_never_has_the_final_name(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = folder.batch()
    batch.begin({"a.png": {}})
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


def test_no_result_goes_where_that_of_another_input_lies(folder: Folder) -> None:
    batch = folder.batch()
    first = batch.path("a.png", "_sheets.png")
    assert batch.path("a.png", "_sheets.png") == first
    with pytest.raises(
        InputError, match=r"^a_sheets\.png: its result would overwrite .* of a\.png"
    ):
        batch.path("a_sheets.png", ".png")


def test_no_result_overwrites_an_input(folder: Folder) -> None:
    batch = folder.batch(output_dir=str(folder.root / "in"))
    assert batch.path("a.png", "_vessels.png").parent == folder.root / "in"
    with pytest.raises(
        InputError, match=r"^a\.png: its result would overwrite the input .*a\.png;"
    ):
        batch.path("a.png", ".png")
    assert (folder.root / "in" / "a.png").read_bytes() == FILES["a.png"]


def test_no_result_goes_where_that_of_an_input_done_before_lies(folder: Folder) -> None:
    folder.run()
    with pytest.raises(InputError, match=r"would overwrite a_vessels\.png of a\.png"):
        folder.batch().path("a_vessels.tif", ".png")


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
    assert "4 inputs: 4 to do, 0 done before" in caplog.text
    assert "4 done, 0 skipped, 0 rejected" in caplog.text
    assert "5 inputs: 2 to do, 3 done before" in caplog.text


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


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file's content was hashed in this process."""
    counts: Counter[str] = Counter()

    def counting(path: Path | str) -> str:
        counts.update([Path(path).name])
        return file_sha256(path)

    monkeypatch.setattr("pipeline.inference.sidecars.file_sha256", counting)
    return counts


def test_every_input_is_read_once_and_hashed_once(folder: Folder, hashed: Counter[str]) -> None:
    folder.put({"bad.png": b"broken"})
    with pytest.raises(InputErrors):
        folder.run()
    assert {name: len(folder.reads(name)) for name in [*FILES, "bad.png"]} == dict.fromkeys(
        [*FILES, "bad.png"], 1
    )
    assert hashed == {"model.pt": 1, "a.png": 2, "eye 2.tif": 1, "c.ppm.gz": 1}  # two a.png


def test_an_input_is_hashed_right_behind_its_reading(folder: Folder, hashed: Counter[str]) -> None:
    """While the system still holds it in memory."""
    batch = folder.batch()
    assert hashed == {"model.pt": 1}
    for done, _ in enumerate(folder.evaluator(batch).data_loader, start=1):
        assert hashed.total() == 1 + done
        assert sum(len(folder.reads(name)) for name in FILES) == done


def test_finished_inputs_are_hashed_and_not_read_again(
    folder: Folder, hashed: Counter[str]
) -> None:
    folder.run()
    hashed.clear()
    folder.put({"new.png": b"5"})
    assert folder.run() == ["new.png"]
    assert {name: len(folder.reads(name)) for name in FILES} == dict.fromkeys(FILES, 1)
    assert hashed.total() == 6  # the model, four finished, the new one


def test_no_finished_input_is_opened_where_the_settings_differ(
    folder: Folder, hashed: Counter[str]
) -> None:
    folder.run()
    change_settings(folder)
    hashed.clear()
    assert len(folder.batch().pending) == 4
    assert hashed == {"model.pt": 1}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_bad_inputs_are_left_out_wherever_they_are_read(
    folder: Folder, workers: int, batch_size: int
) -> None:
    """At the beginning, in the middle, two in a row and at the end."""
    folder.put(dict.fromkeys(["0.png", "b/b.png", "b/c.png", "z.png"], b"broken"))
    folder.loading = {"num_workers": workers, "batch_size": batch_size}
    with pytest.raises(InputErrors, match="4 of 8 inputs rejected"):
        folder.run()
    assert folder.computed == list(FILES)
    bad = ["0.png", "b/b.png", "b/c.png", "z.png"]
    assert [row["path"] for row in folder.table("failures.csv")] == bad
    assert folder.counts() == (8, 4, 0, 4, 3)
    assert all(len(folder.reads(name)) == 1 for name in [*FILES, *bad])
    here = {str(os.getpid())} == {pid for name in FILES for pid in folder.reads(name)}
    assert here == (workers == 0)
    with pytest.raises(InputErrors):
        folder.run()
    assert folder.counts() == (8, 0, 4, 4, 3)


def test_the_engine_makes_one_round_over_the_inputs_that_are_sound(folder: Folder) -> None:
    folder.put({"b/bad.png": b"broken"})
    folder.network = FailsOn({})
    with pytest.raises(InputErrors):
        folder.run()
    assert folder.network.seen == [ord("1"), ord("2"), ord("3"), ord("4")]
    # and no DATALOADER_STOP_ITERATION, with which ignite would begin the loader anew
    assert folder.events == {"EPOCH_COMPLETED": 1, "COMPLETED": 1}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("content", "error", "code"),
    [(b"forbidden", ResourceError, 5), (b"bug", RuntimeError, 1)],
    ids=["resource", "bug"],
)
def test_what_is_no_fault_of_the_input_stops_the_reading(
    folder: Folder, content: bytes, error: type[Exception], code: int, workers: int
) -> None:
    folder.put({"b/eye 2.tif": content})
    folder.loading = {"num_workers": workers}
    before = multiprocessing.active_children()  # another test's may not have gone yet
    with pytest.raises((error, RuntimeError)) as caught:
        folder.run()
    assert exit_code(caught.value) == code
    if workers and code == 5:
        assert str(caught.value) == "memory: none left"  # one line, as in this process
    assert folder.computed == ["a.png", "b/a.png"]
    assert folder.counts() == (4, 2, 0, 0, code)
    assert set(multiprocessing.active_children()) <= set(before)


@pytest.mark.parametrize("failing", [b"1", b"3", b"4"], ids=["first", "middle", "last"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_input_that_the_network_refuses_is_listed_and_the_rest_is_done(
    folder: Folder, failing: bytes, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    name = next(name for name, content in FILES.items() if content == failing)
    folder.network = FailsOn({failing: InputError("one channel, expected three")})
    folder.loading = {"num_workers": workers}
    with pytest.raises(InputErrors, match=f"1 of 4 inputs rejected.*{name}: one channel"):
        folder.run()
    assert folder.computed == [other for other in FILES if other != name]
    assert folder.table("failures.csv") == [
        {"path": name, "stage": "predict", "code": "3", "message": "one channel, expected three"}
    ]
    assert all(len(folder.reads(each)) == 1 for each in FILES)
    assert folder.events == {"EPOCH_COMPLETED": 1, "COMPLETED": 1}
    assert not folder.sidecar(Path(name).with_suffix(".json").as_posix()).exists()
    assert "terminating" not in caplog.text  # what ignite says of every error
    assert "rejected" in caplog.text


def test_an_input_whose_writing_fails_is_listed_and_the_rest_is_done(folder: Folder) -> None:
    folder.fail_on, folder.error = "b/a.png", InputError("cannot be shown")
    with pytest.raises(InputErrors, match=r"b/a\.png: cannot be shown"):
        folder.run()
    assert folder.computed == ["a.png", "b/eye 2.tif", "c.ppm.gz"]
    assert not folder.sidecar("b/a.json").exists()
    folder.fail_on = ""
    assert folder.run() == ["b/a.png"]


def test_every_input_may_fail(folder: Folder) -> None:
    folder.network = FailsOn({content: InputError("refused") for content in FILES.values()})
    with pytest.raises(InputErrors, match="4 of 4 inputs rejected"):
        folder.run()
    assert folder.counts() == (4, 0, 0, 4, 3)
    assert folder.table("per_image.csv") == []


def test_wrapped_errors_of_transforms_are_recognised(folder: Folder) -> None:
    wrapped = RuntimeError("applying transform Invertd")
    wrapped.__cause__ = InputError("no transform to invert")
    folder.network = FailsOn({b"2": wrapped})
    with pytest.raises(InputErrors, match=r"b/a\.png: no transform to invert"):
        folder.run()
    assert len(folder.computed) == 3


def test_a_handler_that_raises_errors_again_changes_nothing(folder: Folder) -> None:
    folder.handlers = [StatsHandler(output_transform=lambda _: None)]
    folder.network = FailsOn({b"2": InputError("refused")})
    with pytest.raises(InputErrors):
        folder.run()
    assert len(folder.computed) == 3


def test_inputs_of_one_failed_step_are_rejected_together(folder: Folder) -> None:
    folder.loading = {"batch_size": 2}
    folder.network = FailsOn({b"2": InputError("refused")})
    with pytest.raises(InputErrors, match="2 of 4 inputs rejected"):
        folder.run()
    assert folder.computed == ["b/eye 2.tif", "c.ppm.gz"]


@pytest.mark.parametrize(
    ("error", "code"),
    [(CheckpointError("foreign"), 4), (ResourceError("full"), 5), (ValueError("bug"), 1)],
    ids=["checkpoint", "resource", "bug"],
)
def test_what_is_no_fault_of_the_input_stops_the_prediction(
    folder: Folder, error: Exception, code: int
) -> None:
    folder.network = FailsOn({b"3": error})
    with pytest.raises(type(error)):
        folder.run()
    assert folder.counts() == (4, 2, 0, 0, code)
    assert len(folder.table("per_image.csv")) == 2


def test_an_input_error_outside_any_input_stops_the_run(folder: Folder) -> None:
    batch = folder.batch()
    evaluator = folder.evaluator(batch)

    def fail() -> None:
        raise InputError("no such table")

    evaluator.add_event_handler(Events.EPOCH_STARTED, fail)
    with pytest.raises(InputError, match="no such table"):
        batch.run(evaluator)
    assert folder.counts() == (4, 0, 0, 0, 3)


def test_a_rejected_input_keeps_its_earlier_result_and_sidecar(folder: Folder) -> None:
    folder.run()
    before = {path: path.read_bytes() for path in folder.output.glob("b/a*")}
    folder.put({"b/a.png": b"broken"})
    with pytest.raises(InputErrors):
        folder.run()
    assert before == {path: path.read_bytes() for path in folder.output.glob("b/a*")}


def test_a_dataset_that_is_not_of_what_is_pending_is_refused(folder: Folder) -> None:
    folder.run()
    batch = folder.batch()
    with pytest.raises(ConfigurationError, match="4 items for 0 pending inputs"):
        AcceptedLoader(batch, Dataset(folder.cases()))


def test_a_result_that_was_not_begun_is_not_recorded(folder: Folder) -> None:
    with pytest.raises(ValueError, match=r"a\.png: recorded but not begun"):
        folder.batch().record("a.png", [], {}, {})


@dataclass
class Work:
    """A run that is no engine's."""

    batch: BatchRun

    def run(self) -> None:
        for case in self.batch.pending:
            with self.batch.attempt(case["name"]):
                read_tiny(case["image"])
                self.batch.begin({case["name"]: self.batch.origins(case)})
                result = write_bytes(self.batch.path(case["name"], ".out"), b"1")
                self.batch.record(case["name"], [result], {}, {})


@pytest.mark.parametrize("as_function", [True, False])
def test_any_work_may_be_run(folder: Folder, as_function: bool) -> None:
    folder.put({"bad.png": b"broken"})
    for expected in [(5, 4, 0, 1, 3), (5, 0, 4, 1, 3)]:
        batch = folder.batch(model_path=None)
        work = Work(batch)
        batch.run(work.run if as_function else work)
        assert folder.counts() == expected
    assert folder.table("failures.csv")[0]["stage"] == "predict"
    assert json.loads(folder.sidecar("a.json").read_text())["model_sha256"] is None
    assert folder.summary()["checkpoint"] == ""


def test_work_that_fails_stops_with_its_code_and_tables(folder: Folder) -> None:
    folder.put({"b/eye 2.tif": b"forbidden"})
    batch = folder.batch()
    with pytest.raises(ResourceError):
        batch.run(Work(batch))
    assert folder.counts() == (4, 2, 0, 0, 5)


def test_a_model_gone_or_come_makes_other_results(folder: Folder) -> None:
    folder.run()
    assert len(folder.batch(model_path=None).pending) == 4


@pytest.mark.parametrize(
    ("package", "again"), [("lamina", True), ("torch", True), ("monai", True), ("python", False)]
)
def test_other_versions_make_other_results(
    folder: Folder, package: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.run()
    versions = package_versions(("lamina", "torch", "monai")) | {package: "99.0"}
    monkeypatch.setattr("pipeline.inference.sidecars.package_versions", lambda _: versions)
    assert (len(folder.batch().pending) == 4) == again


def test_another_build_of_one_version_makes_the_same_results(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.run()
    versions = package_versions(("lamina", "torch", "monai"))
    versions["torch"] = f"{str(versions['torch']).partition('+')[0]}+cu130"
    monkeypatch.setattr("pipeline.inference.sidecars.package_versions", lambda _: versions)
    assert folder.batch().pending == []


def test_what_another_machine_used_makes_the_same_results(folder: Folder) -> None:
    folder.run(used=lambda: {"device": "cpu"})
    assert folder.batch(used=lambda: {"device": "cuda"}).pending == []


def test_another_member_of_an_ensemble_makes_other_results(folder: Folder) -> None:
    folder.settings = {"ensemble": {"sources": ["11", "22"]}}
    folder.run()
    assert folder.batch().pending == []
    assert json.loads(folder.sidecar("a.json").read_text())["settings"] == folder.settings
    folder.settings = {"ensemble": {"sources": ["11", "23"]}}
    assert len(folder.batch().pending) == 4


def store(folder: Folder) -> list[dict[str, Any]]:
    """A folder that is one input, such as a Zarr store."""
    root = folder.root / "scroll.zarr"
    for name, content in {"zarr.json": b"{}", "c/0/0": b"12", "c/0/1": b"34"}.items():
        write_bytes(root / name, content)
    return [{"name": "scroll.zarr", "image": str(root)}]


def rewrite(root: Path) -> None:
    write_bytes(root / "c/0/1", b"35")


def rename(root: Path) -> None:
    (root / "c/0/1").rename(root / "c/0/2")


def swap(root: Path) -> None:
    write_bytes(root / "c/0/0", b"34")
    write_bytes(root / "c/0/1", b"12")


def add(root: Path) -> None:
    write_bytes(root / "c/1/0", b"")


@pytest.mark.parametrize("identity", ["content", "listing"])
@pytest.mark.parametrize("change", [rewrite, rename, swap, add])
def test_a_folder_is_known_by_what_is_in_it(
    folder: Folder, identity: str, change: Callable[[Path], None]
) -> None:
    cases = store(folder)

    def done() -> int:
        batch = folder.batch(cases, identity=identity)
        for case in batch.pending:
            batch.begin({case["name"]: batch.origins(case)})
            batch.record(case["name"], [], {}, {})
        return len(batch.pending)

    assert [done(), done()] == [1, 0]
    change(Path(cases[0]["image"]))
    assert [done(), done()] == [1, 0]
    found = json.loads(folder.sidecar("scroll.json").read_text())
    assert found["identity"] == identity


def test_a_listing_reads_no_file_and_sees_its_time(folder: Folder, hashed: Counter[str]) -> None:
    path = folder.root / "in" / "a.png"
    first = path_sha256(path, "listing")
    assert hashed == {}
    os.utime(path, ns=(0, 0))
    assert path_sha256(path, "listing") != first
    assert path_sha256(path) == file_sha256(path)


def test_content_of_a_folder_is_the_same_elsewhere(folder: Folder) -> None:
    here = Path(store(folder)[0]["image"])
    there = Path(shutil.copytree(here, folder.root / "copy", copy_function=shutil.copyfile))
    assert path_sha256(here) == path_sha256(there)


@pytest.mark.parametrize("identity", ["content", "listing"])
def test_what_is_not_there_has_no_identity(folder: Folder, identity: Identity) -> None:
    with pytest.raises(InputError, match="gone: cannot be read: No such file"):
        path_sha256(folder.root / "gone", identity)
    (folder.root / "empty").mkdir()
    with pytest.raises(InputError, match="an empty folder"):
        path_sha256(folder.root / "empty", identity)


def test_an_unknown_identity_is_refused(folder: Folder) -> None:
    with pytest.raises(ConfigurationError, match="content or listing, got 'name'"):
        folder.batch(identity="name")


def test_a_result_may_be_a_folder(folder: Folder) -> None:
    batch = folder.batch()
    for case in batch.pending:
        (result := batch.path(case["name"], ".zarr")).mkdir(parents=True)
        batch.begin({case["name"]: batch.origins(case)})
        batch.record(case["name"], [result], {}, {})
    assert folder.batch().pending == []


def sidecar_name(name: str) -> str:
    return result_path(name, ".", "", ".json").as_posix()


def finished(folder: Folder, names: Sequence[str]) -> list[Path]:
    return [
        folder.output / result_path(name, ".", "", suffix)
        for name in names
        for suffix in (".json", "_vessels.png")
    ]


def results(folder: Folder) -> dict[str, bytes]:
    """The files that bear a final name, with what may differ between folders made equal."""
    found = {}
    for path in folder.output.rglob("*"):
        temporary = path.name.startswith(".")
        if path.is_file() and not temporary and path.name != "summary.json":
            content = path.read_bytes().replace(str(folder.root).encode(), b"")
            found[path.relative_to(folder.output).as_posix()] = content
    return found


def killed_at(moment: int, folder: Folder) -> bool:
    """Run in a process of its own that is killed at its `moment`-th step of writing.

    The steps are a file opened and still empty, written and not synced, synced and not renamed.
    """
    process = os.fork()
    if process == 0:
        steps = iter(range(moment, -1, -1))
        opened = Path.open

        def step(*_: Any, **__: Any) -> None:
            if next(steps) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def replace(self: Path, target: Path) -> None:
            step()
            self.rename(target)

        def open_(self: Path, mode: str = "r", *args: Any, **kw: Any) -> Any:
            stream = opened(self, mode, *args, **kw)
            if mode == "wb":
                step()
            return stream

        os.fsync, Path.replace, Path.open = step, replace, open_  # type: ignore[method-assign]
        with contextlib.suppress(BaseException):
            folder.run()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_goes_on_where_it_was(folder: Folder, tmp_path: Path) -> None:
    folder.run()
    expected = results(folder)
    moment, kept = 0, set()
    while killed_at(moment, fresh := Folder(tmp_path / f"killed_{moment}")):
        before = results(fresh)
        assert before.items() <= expected.items()  # nothing half-written
        skipped = [name for name in FILES if fresh.sidecar(sidecar_name(name)).exists()]
        times = {path: path.stat().st_mtime_ns for path in finished(fresh, skipped)}
        assert fresh.run() == [name for name in FILES if name not in skipped]
        assert fresh.counts() == (4, 4 - len(skipped), len(skipped), 0, 0)
        assert {path: path.stat().st_mtime_ns for path in finished(fresh, skipped)} == times
        assert results(fresh) == expected
        kept.add(len(skipped))
        moment += 1
    assert kept == {0, 1, 2, 3, 4}


def test_what_a_killed_run_left_half_written_is_swept(folder: Folder) -> None:
    process = multiprocessing.Process()
    process.start()
    process.join()
    left = folder.output / "left" / f".a_vessels.{process.pid}-{process.pid}.tmp.png"
    left.parent.mkdir(parents=True)
    left.touch()
    folder.batch()
    assert not left.exists()
