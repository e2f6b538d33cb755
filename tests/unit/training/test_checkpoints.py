from __future__ import annotations

import io
import os
import pickle
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.errors import CheckpointError, ResourceError
from pipeline.training import checkpoints
from pipeline.training.checkpoints import (
    check_definition,
    load_weights,
    read_checkpoint,
    write_checkpoint,
)

NETWORK = {"_target_": "pipeline.fundus.networks.UNet", "in_channels": 3, "depths": [8, 16]}
PREPROCESSING = [
    {"_target_": "LoadImaged", "keys": ["image"]},
    {"_target_": "pipeline.fundus.transforms.ScaleToFOVd", "fov_size_px": 544, "mode": "bilinear"},
]


def content(value: float = 1.0) -> dict[str, Any]:
    return {
        "bundle": "fundus_vessels",
        "architecture": "default",
        "network_def": NETWORK,
        "preprocessing": PREPROCESSING,
        "epoch": int(value),
        "model": {"weight": torch.full((2, 3), value), "bias": torch.full((2,), value)},
    }


def checksum(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def refusal(path: Path) -> CheckpointError:
    """Return the error that reading `path` raises, after what holds for every such error."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    shown = "".join(traceback.format_exception(caught.value))  # under MONAI the whole chain shows
    assert "weights_only" not in shown
    assert caught.value.exit_code == 4
    return caught.value


class Code:
    """Unpickling this would run a command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo never",)


def test_content_comes_back_as_it_was(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "new" / "best.pt", content(3.0))
    found = read_checkpoint(path)
    torch.testing.assert_close(found.pop("model"), content(3.0)["model"], rtol=0, atol=0)
    expected = {k: v for k, v in content(3.0).items() if k != "model"}
    assert found == {"format": checkpoints.FORMAT, **expected}


def test_checksum_file_is_what_sha256sum_checks(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "best.pt", content())
    digest, name = checksum(path).read_text("utf-8").split()
    assert name == "best.pt"
    assert digest == checkpoints.hashlib.sha256(path.read_bytes()).hexdigest()


def test_checkpoint_moved_without_its_checksum_is_still_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "best.pt", content(2.0))
    moved = path.rename(tmp_path / "model.pt")
    assert read_checkpoint(moved)["epoch"] == 2


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert "no such checkpoint; train first" in str(refusal(tmp_path / "best.pt"))


def test_folder_is_refused(tmp_path: Path) -> None:
    assert "no such checkpoint" in str(refusal(tmp_path))


@pytest.mark.parametrize("checksummed", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file_is_refused(tmp_path: Path, share: float, checksummed: bool) -> None:
    path = write_checkpoint(tmp_path / "best.pt", content())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    if not checksummed:
        checksum(path).unlink()
    assert "damaged" in str(refusal(path))


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "best.pt", content())
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        flipped = bytearray(whole)
        flipped[place] ^= 0xFF
        path.write_bytes(flipped)
        assert "its sha256 differs" in str(refusal(path))


def test_flipped_byte_is_noticed_or_harmless_without_a_checksum(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "best.pt", content())
    checksum(path).unlink()
    whole = path.read_bytes()
    refusals: list[str] = []
    directory = whole.index(b"PK\x01\x02")  # where a flipped bit does most harm
    for place in [*range(0, directory, 11), *range(directory, len(whole))]:
        flipped = bytearray(whole)
        flipped[place] ^= 0xFF
        path.write_bytes(flipped)
        try:
            found = read_checkpoint(path)
        except CheckpointError as error:
            refusals.append(str(error))
        else:  # padding, dates and the like
            torch.testing.assert_close(found["model"], content()["model"], rtol=0, atol=0)
    assert len(refusals) > 300
    assert all(text.startswith(f"{path}: ") and "\n" not in text for text in refusals)


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00", b"0" * 64], ids=["empty", "binary", "0"])
def test_damaged_checksum_is_a_refusal(tmp_path: Path, damage: bytes) -> None:
    path = write_checkpoint(tmp_path / "best.pt", content())
    checksum(path).write_bytes(damage)
    assert "best.pt.sha256" in str(refusal(path))


def foreign_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no tensors here")


def torchscript(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("best/constants.pkl", pickle.dumps(()))
        archive.writestr("best/data.pkl", pickle.dumps(()))
        archive.writestr("best/version", "3")


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: path.write_bytes(pickle.dumps({"model": 1})), "damaged"),
        (lambda path: path.write_bytes(pickle.dumps(Code())), "damaged"),
        (lambda path: torch.save({"model": Code()}, path), "not loaded; only use checkpoints"),
        (lambda path: torch.save(nn.Linear(2, 2), path), "not loaded; only use checkpoints"),
        (lambda path: torch.save(nn.Linear(2, 2).state_dict(), path), "found no format entry"),
        (lambda path: torch.save([1, 2], path), "found list"),
        (lambda path: torch.save({"format": "lamina-checkpoint-0"}, path), "lamina-checkpoint-0"),
        (lambda path: path.write_text("not a checkpoint"), "damaged"),
        (foreign_archive, "not a readable checkpoint"),
        (torchscript, "not a readable checkpoint"),
    ],
    ids=[
        "pickle", "malicious pickle", "malicious archive", "module", "state dict", "list", "old",
        "text", "zip", "torchscript",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*looks like a TorchScript archive:UserWarning")
def test_foreign_file_is_refused(
    tmp_path: Path, write: Callable[[Path], object], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "best.pt"
    write(path)
    assert reason in str(refusal(path))
    assert "never" not in capfd.readouterr().out


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path / "best.pt", content())

    def refuse(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "cannot be read: Permission denied" in str(refusal(path))


def test_rotation_keeps_the_one_before(tmp_path: Path) -> None:
    path, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for epoch in (1, 2, 3):
        write_checkpoint(path, content(epoch), keep_as="previous.pt")
        assert read_checkpoint(path)["epoch"] == epoch
        if epoch == 1:
            assert not previous.exists()
        else:
            assert read_checkpoint(previous)["epoch"] == epoch - 1
            assert checksum(previous).read_text("utf-8").split()[1] == "previous.pt"
    assert len(list(tmp_path.iterdir())) == 4


def test_rotation_copies_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    for epoch in (1, 2):
        write_checkpoint(tmp_path / "last.pt", content(epoch), keep_as="previous.pt")
    assert read_checkpoint(tmp_path / "previous.pt")["epoch"] == 1


class Killed(BaseException):
    """What ends a process between two system calls."""


def kill_at(monkeypatch: pytest.MonkeyPatch, call: int) -> list[str]:
    """Let the `call`-th change of a folder or file fail as a kill would; return the calls seen."""
    seen: list[str] = []

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) == call:
                raise Killed
            return original(*args, **kwargs)

        return step

    for owner, name in (
        (os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "hardlink_to"), (Path, "open"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    return seen


def test_a_kill_at_any_step_leaves_both_names_readable(tmp_path: Path) -> None:
    call, finished = 0, False
    while not finished:
        call += 1
        folder = tmp_path / str(call)
        for epoch in (1, 2):
            write_checkpoint(folder / "last.pt", content(epoch), keep_as="previous.pt")
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, call)
            try:
                write_checkpoint(folder / "last.pt", content(3), keep_as="previous.pt")
                finished = True
            except Killed:
                pass
        assert read_checkpoint(folder / "last.pt")["epoch"] in (2, 3)
        assert read_checkpoint(folder / "previous.pt")["epoch"] in (1, 2)
        # And the run that goes on from there is none the worse.
        write_checkpoint(folder / "last.pt", content(4), keep_as="previous.pt")
        assert read_checkpoint(folder / "last.pt")["epoch"] == 4
        assert read_checkpoint(folder / "previous.pt")["epoch"] in (2, 3)
        assert not list(folder.glob(".*")) or not finished
    assert call > 10


@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
def test_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    path = write_checkpoint(tmp_path / "best.pt", content(1))

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    owner: object = os if stage == "fsync" else Path
    monkeypatch.setattr(owner, {"write": "open"}.get(stage, stage), fail)
    with pytest.raises(ResourceError, match=r"best\.pt: cannot be written: No space left"):
        write_checkpoint(path, content(2))
    monkeypatch.undo()
    assert read_checkpoint(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]


def test_weights_are_copied_into_the_network(tmp_path: Path) -> None:
    network = nn.Linear(3, 2)
    load_weights(network, read_checkpoint(write_checkpoint(tmp_path / "a.pt", content(7.0))))
    assert network.weight.unique().tolist() == [7.0]


@pytest.mark.parametrize(
    ("network", "found"),
    [
        (nn.Linear(4, 2), "0 tensors missing, 0 unexpected, 1 of another shape"),
        (nn.Linear(3, 2, bias=False), "0 tensors missing, 1 unexpected, 0 of another shape"),
        (nn.Sequential(nn.Linear(3, 2)), "2 tensors missing, 2 unexpected, 0 of another shape"),
    ],
)
def test_another_architecture_is_refused_and_nothing_is_copied(
    network: nn.Module, found: str
) -> None:
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=found) as caught:
        load_weights(network, content() | {"architecture": "unet"}, "runs/best.pt")
    message = str(caught.value)
    assert message.startswith("runs/best.pt: holds another architecture")
    assert "UNet(in_channels=3, depths=[8, 16])" in message
    assert "run with configs/unet.yaml merged in" in message
    assert "\n" not in message
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_checkpoint_without_weights_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"a\.pt: holds no network weights"):
        load_weights(nn.Linear(1, 1), {"epoch": 1}, "a.pt")


def test_equal_definitions_pass_whatever_their_spelling() -> None:
    settings = {
        "bundle": "fundus_vessels",
        "network_def": {**NETWORK, "depths": (8, 16)},
        "preprocessing": tuple(PREPROCESSING),
        "not_in_the_checkpoint": 1,
    }
    check_definition(content(), source="a.pt", settings=settings)


def definition_refusal(changed: dict[str, Any], found: dict[str, Any]) -> str:
    own = {k: content()[k] for k in ("bundle", "architecture", "network_def", "preprocessing")}
    with pytest.raises(CheckpointError) as caught:
        check_definition(content() | changed, source="a.pt", settings=own | found)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_network_is_answered_with_the_overlay() -> None:
    network = {"_target_": "pipeline.fundus.networks.RoiNet", "in_channels": 3}
    message = definition_refusal({"architecture": "roinet", "network_def": network}, {})
    assert message.startswith(
        "a.pt: its architecture is 'roinet' and the configuration's is 'default': "
        "run with configs/roinet.yaml merged in, or use `python -m pipeline predict`"
    )


def test_overlay_that_the_checkpoint_does_not_know_is_to_be_left_out() -> None:
    network = {"_target_": "pipeline.fundus.networks.RoiNet", "in_channels": 3}
    settings = {"network_def": network}  # nothing says which overlay was merged
    with pytest.raises(CheckpointError, match="run without an overlay") as caught:
        check_definition(content(), source="a.pt", settings=settings)
    assert "UNet(in_channels=3, depths=[8, 16])" in str(caught.value)
    assert "RoiNet(in_channels=3)" in str(caught.value)


def test_message_names_the_one_setting_that_differs() -> None:
    other = [PREPROCESSING[0], {**PREPROCESSING[1], "fov_size_px": 600}]
    message = definition_refusal({}, {"preprocessing": other})
    assert message.startswith(
        "a.pt: its preprocessing[1] ScaleToFOVd fov_size_px is 544 and the configuration's is 600: "
        "run with the checkpoint's value, or use"
    )


def test_another_systems_checkpoint_is_answered_with_its_bundle() -> None:
    message = definition_refusal({"bundle": "oct_layers"}, {})
    assert message.endswith("run the bundle oct_layers, or use a checkpoint of fundus_vessels")


def test_checkpoint_is_plain_data_for_torch(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "best.pt", content())
    found = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
    assert found["format"] == checkpoints.FORMAT
