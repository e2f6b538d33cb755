"""Bad volumes, labels and checkpoints: one line that names the file, the right code, nothing half.

Training lists all of them before it starts; inference leaves them out and does the rest; evaluation
stops, since a mean over the remaining volumes would be taken for that of the split.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from pipeline.bundles import find_bundle_root, prepare_run
from pipeline.cli import main
from pipeline.data.writers import write_tiff
from pipeline.errors import CheckpointError, lamina_cause
from pipeline.training.checkpoints import read_checkpoint, write_checkpoint

BUNDLE = "vesuvius_surface"
SHAPE = (20, 18, 22)  # smaller than every window and crop below
HERE = ["--device", "cpu", "--tune_allocator", "false"]
SMALL: dict[str, Any] = {
    "threads": 1,
    "max_epochs": 1,
    "val_interval": 1,
    "patches_per_volume": 1,
    "patch_size": [24, 24, 24],
    "roi_size": [24, 24, 24],
    "thresholds": [0.5],
    "tensorboard": False,
    "network_def::widths": [2, 4],
}
IMAGE, LABEL = "train_images/b.tif", "train_labels/b.tif"
LIMIT_BYTES = 4_000_000


def volume(seed: int = 0, dtype: Any = np.uint8) -> NDArray[Any]:
    """Return noise with a bright plane; floats and 16 bits in ranges of their own."""
    drawn = np.random.default_rng(seed).integers(20, 120, SHAPE)
    drawn[:, 8:10] += 100
    scale = {np.uint16: 250, np.float32: 1 / 300}.get(dtype, 1)
    return (drawn * scale).astype(dtype)


def surface() -> NDArray[np.uint8]:
    """Return the plane, within a frame that nobody labelled."""
    label = np.full(SHAPE, 2, np.uint8)
    label[2:-2, 2:-2, 2:-2] = 0
    label[2:-2, 8:10, 2:-2] = 1
    return label


@pytest.fixture(scope="module")
def sound_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as the competition lays it out, with volumes of three types."""
    folder = tmp_path_factory.mktemp("surfaces") / "data"
    for seed, (name, dtype) in enumerate(
        {"a": np.uint8, "b": np.float32, "c": np.uint16, "d": np.uint8}.items()
    ):
        write_tiff(folder / "train_images" / f"{name}.tif", volume(seed, dtype))
        write_tiff(folder / "train_labels" / f"{name}.tif", surface())
    write_tiff(folder / "test_images/t.tif", volume(9))
    write_tiff(folder / "test_labels/t.tif", surface())
    return folder


@pytest.fixture
def data(sound_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_data, tmp_path / "data"))


def train(data: Path, output: Path, **settings: Any) -> int:
    words = [w for id, value in (SMALL | settings).items() for w in (f"--{id}", str(value))]
    folders = ["--dataset_dir", str(data), "--output_dir", str(output)]
    return main(["train", BUNDLE, *folders, *HERE, *words])


def predict(source: Path, output: Path, checkpoint: Path, *words: str) -> int:
    windows = ["--patch_size", "[24, 24, 24]", "--ckpt_path", str(checkpoint)]
    return main(["predict", BUNDLE, "-i", str(source), "-o", str(output), *HERE, *windows, *words])


def evaluate(data: Path, output: Path, checkpoint: Path) -> int:
    folders = ["--dataset_dir", str(data), "--output_dir", str(output)]
    words = ["--ckpt_path", str(checkpoint), "--tensorboard", "false", "--threads", "1"]
    return main(["evaluate", BUNDLE, *folders, *HERE, *words])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that a person is told."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def trained(sound_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on volumes of three types, all smaller than a crop."""
    output = tmp_path_factory.mktemp("trained") / "run"
    assert train(sound_data, output) == 0
    return output


@pytest.fixture(scope="module")
def checkpoint(trained: Path) -> Path:
    return trained / "checkpoints" / "best.pt"


def _flat(path: Path) -> None:
    write_tiff(path, volume()[0])


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _broken_inside(path: Path) -> None:
    """Spoil the compressed data of a page and nothing that the header tells."""
    with tifffile.TiffFile(path) as tiff:
        first = tiff.pages[0]
        start, length = first.dataoffsets[0], first.databytecounts[0]
    content = bytearray(path.read_bytes())
    content[start : start + length] = b"\xff" * length
    path.write_bytes(content)


def _bomb(path: Path) -> None:
    """Announce pages of 120000 x 120000 in a file of some kilobytes."""
    tifffile.imwrite(
        path, volume(), compression="lzw", photometric="minisblack", metadata=None, rowsperstrip=99
    )
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for page in tiff.pages:
            for tag in ("ImageWidth", "ImageLength", "RowsPerStrip"):
                page.tags[tag].overwrite(120_000)


def _with_value(value: float) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        array = volume(1, np.float32)
        array[3, 4, 5] = value
        write_tiff(path, array)

    return spoil


def _constant(path: Path) -> None:
    write_tiff(path, np.full(SHAPE, 7, np.uint8))


def _nearly_constant(path: Path) -> None:
    array = np.full(SHAPE, 7, np.uint8)
    array[0, 0, :5] = 90
    write_tiff(path, array)


def _in_colour(path: Path) -> None:
    write_tiff(path, np.stack([volume()] * 3, axis=-1), photometric="rgb")


def _text(path: Path) -> None:
    path.write_text("Please find the volume on our server.")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


BAD_VOLUMES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flat": (_flat, "expected a stack of gray pages (D, H, W)"),
    "cut_short": (_cut_short, "cut short"),
    "broken_inside": (_broken_inside, "expected a whole volume: copy it again"),
    "bomb": (_bomb, "(1, 120000, 120000) needs 14,400 MB decoded, at most 4 MB are allowed"),
    "nan": (_with_value(np.nan), "1 values are not finite"),
    "infinite": (_with_value(np.inf), "1 values are not finite"),
    "constant": (_constant, "constant: every voxel is 7; leave the file out"),
    "nearly_constant": (_nearly_constant, "nearly constant: both percentiles are 7"),
    "in_colour": (_in_colour, "expected"),
    "text": (_text, "expected a TIFF stack"),
    "empty": (_empty, "expected a TIFF stack"),
}


def _label(*changes: tuple[float, Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        label = surface().astype(np.float32 if len(changes) > 1 else np.uint8)
        for new, old in changes:
            label[label == old] = new
        write_tiff(path, label)

    return spoil


def _of_another_size(path: Path) -> None:
    write_tiff(path, surface()[:-1])


def _mask_of_255(path: Path) -> None:
    write_tiff(path, (surface() == 1) * np.uint8(255))


def _unlabelled(path: Path) -> None:
    write_tiff(path, np.full(SHAPE, 2, np.uint8))


BAD_LABELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "another_size": (
        _of_another_size,
        f"label of (19, 18, 22), its image {IMAGE} has (20, 18, 22); expected one size",
    ),
    "mask_of_255": (
        _mask_of_255,
        "values 255; expected 0, 1 and 2 (unlabelled); divide a mask of 0 and 255 by 255",
    ),
    "ignore_of_255": (_label((255, 2)), "values 255; expected 0, 1 and 2 (unlabelled); write 2"),
    "fractions": (_label((0.5, 1), (1, 2)), "0.5"),
    "unknown": (_label((7, 1)), "values 7; expected 0, 1 and 2 (unlabelled)"),
    "unlabelled": (_unlabelled, "no voxel is labelled"),
    "cut_short": (_cut_short, "cut short"),
}


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_MAX_DECODED_BYTES", str(LIMIT_BYTES))


def test_training_takes_every_type_and_volumes_smaller_than_a_crop(trained: Path) -> None:
    assert (trained / "checkpoints/best.pt").is_file()


TRAINING = [(IMAGE, *fault) for fault in BAD_VOLUMES.values()]
TRAINING += [(LABEL, *fault) for fault in BAD_LABELS.values()]


@pytest.mark.parametrize(
    ("name", "spoil", "message"), TRAINING, ids=[*BAD_VOLUMES, *(f"label_{k}" for k in BAD_LABELS)]
)
def test_training_refuses_before_it_starts(
    data: Path,
    name: str,
    spoil: Callable[[Path], None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(data / name)
    output = data.parent / "run"
    assert train(data, output) == 3
    line = error_line(capsys)
    assert f"1 found wrong in {data}: {name}: " in line
    assert message in line
    assert not (output / "checkpoints").exists()


def test_training_lists_all_that_is_wrong_at_once(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In headers, in values, in labels, and in the volumes of every split."""
    for name, (spoil, _) in zip("abcd", list(BAD_VOLUMES.values())[1:5], strict=True):
        spoil(data / f"train_images/{name}.tif")
    _unlabelled(data / "train_labels/d.tif")
    _constant(data / "test_images/t.tif")
    _label((7, 1))(data / "test_labels/t.tif")
    assert train(data, data.parent / "run") == 3
    line = error_line(capsys)
    assert f"7 found wrong in {data}: " in line
    listed = [f"train_images/{name}.tif: " for name in "abcd"]
    listed += [f"{name}.tif: " for name in ("train_labels/d", "test_images/t", "test_labels/t")]
    assert all(name in line for name in listed)


def test_values_are_read_once(
    trained: Path, sound_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kw: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr("pipeline.data.volume_statistics.intensity_percentiles", refuse)
    monkeypatch.setattr("pipeline.data.volume_statistics.class_indices", refuse)
    assert train(sound_data, trained, max_epochs=1) == 0


def test_training_refuses_a_folder_without_volumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    assert train(tmp_path / "data", tmp_path / "run") == 3
    assert "no files matching train_images/{id}{_ext}" in error_line(capsys)


@pytest.fixture(scope="module")
def mixed(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path, dict[str, str]]:
    """Predict bad volumes among sound ones: exit code, results, what is told of the bad."""
    root = tmp_path_factory.mktemp("mixed")
    for name, (spoil, _) in BAD_VOLUMES.items():
        write_tiff(root / "in" / f"{name}.tif", volume(1))
        spoil(root / "in" / f"{name}.tif")
    for name, dtype in (("first", np.uint8), ("middle", np.uint16), ("zlast", np.float32)):
        write_tiff(root / "in" / f"{name}.tif", volume(2, dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMINA_MAX_DECODED_BYTES", str(LIMIT_BYTES))
        code = predict(root / "in", root / "out", checkpoint)
    with (root / "out/failures.csv").open(encoding="utf-8") as table:
        told = {row["path"]: row["message"] for row in csv.DictReader(table)}
    return code, root / "out", told


def test_inference_does_the_rest_and_says_so(mixed: tuple[int, Path, dict[str, str]]) -> None:
    code, output, told = mixed
    assert code == 3
    assert sorted(told) == sorted(f"{name}.tif" for name in BAD_VOLUMES)
    for name in ("first", "middle", "zlast"):
        mask = tifffile.imread(output / f"{name}.tif")
        assert (mask.shape, mask.dtype) == (SHAPE, np.uint8)


@pytest.mark.parametrize("name", list(BAD_VOLUMES))
def test_inference_leaves_a_bad_volume_out(
    mixed: tuple[int, Path, dict[str, str]], name: str
) -> None:
    _, output, told = mixed
    assert BAD_VOLUMES[name][1] in told[f"{name}.tif"]
    assert not told[f"{name}.tif"].startswith("/")
    assert not [path for path in output.rglob("*") if path.name.startswith((name, "."))]


def test_one_bad_volume_of_three_stops_neither_other(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        write_tiff(tmp_path / f"in/{name}.tif", volume(3))
    _cut_short(tmp_path / "in/b.tif")
    assert predict(tmp_path / "in", tmp_path / "out", checkpoint) == 3
    line = error_line(capsys)
    assert "1 of 3 inputs rejected, the rest is done: b.tif: " in line
    assert {path.name for path in (tmp_path / "out").glob("*.tif")} == {
        f"{name}{suffix}.tif" for name in "ac" for suffix in ("", "_visualization")
    }


def test_a_value_that_is_not_finite_is_placed(mixed: tuple[int, Path, dict[str, str]]) -> None:
    assert "(z, y, x) = (3, 4, 5)" in mixed[2]["nan.tif"]


def test_a_volume_of_truth_values_is_taken(tmp_path: Path, checkpoint: Path) -> None:
    np.save(tmp_path / "v.npy", volume() > 90)
    assert predict(tmp_path / "v.npy", tmp_path / "out", checkpoint) == 0


def test_inference_refuses_an_empty_folder(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    assert predict(tmp_path / "in", tmp_path / "out", checkpoint) == 3
    assert f"no files matching {{path}}{{_ext}} under {tmp_path / 'in'}" in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_results_do_not_go_among_the_inputs(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiff(tmp_path / "in/v.tif", volume())
    assert predict(tmp_path / "in", tmp_path / "in/out", checkpoint) == 2
    assert "lies in dataset_dir" in error_line(capsys)
    assert not (tmp_path / "in/out").exists()


EVALUATION = {
    "nan": ("test_images/t.tif", BAD_VOLUMES["nan"]),
    "constant": ("test_images/t.tif", BAD_VOLUMES["constant"]),
    "cut_short": ("test_images/t.tif", BAD_VOLUMES["cut_short"]),
    "label_of_255": ("test_labels/t.tif", BAD_LABELS["mask_of_255"]),
    "label_of_another_size": ("test_labels/t.tif", (_of_another_size, "label of (19, 18, 22)")),
}


@pytest.mark.parametrize(("name", "fault"), EVALUATION.values(), ids=list(EVALUATION))
def test_evaluation_stops_without_a_score(
    data: Path,
    checkpoint: Path,
    name: str,
    fault: tuple[Callable[[Path], None], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil, message = fault
    spoil(data / name)
    output = data.parent / "run"
    assert evaluate(data, output, checkpoint) == 3
    line = error_line(capsys)
    assert name in line
    assert message in line
    assert not list(output.rglob("*_metrics.yaml"))


def _other_architecture(folder: Path, sound: Path) -> Path:
    """Return a checkpoint of the overlay `topology_aware`."""
    from pipeline.vesuvius.networks import TopologyAwareUNet3D

    size = {"in_channels": 1, "out_channels": 1, "initial_filters": 2, "depth": 1}
    target = "pipeline.vesuvius.networks.TopologyAwareUNet3D"
    content = {
        **read_checkpoint(sound),
        "architecture": "topology_aware",
        "network_def": {"_target_": target, **size},
        "model": TopologyAwareUNet3D(**size).state_dict(),
    }
    return write_checkpoint(folder / "other.pt", content)


def _foreign(folder: Path, sound: Path) -> Path:
    return write_checkpoint(
        folder / "foreign.pt", {**read_checkpoint(sound), "bundle": "fundus_vessels"}
    )


def _cut_checkpoint(folder: Path, sound: Path) -> Path:
    (folder / "cut.pt").write_bytes(sound.read_bytes()[:900])
    return folder / "cut.pt"


def _no_checkpoint(folder: Path, sound: Path) -> Path:
    write_tiff(folder / "volume.pt", volume())
    return folder / "volume.pt"


def _without_format(folder: Path, sound: Path) -> Path:
    import torch

    torch.save({"model": read_checkpoint(sound)["model"]}, folder / "plain.pt")
    return folder / "plain.pt"


BAD_CHECKPOINTS = [
    (_foreign, "its bundle is 'fundus_vessels' and the configuration's is 'vesuvius_surface'"),
    (_cut_checkpoint, "damaged (no whole archive"),
    (_no_checkpoint, "damaged (no whole archive"),
    (_without_format, "found no format entry, expected a Lamina checkpoint"),
    (lambda folder, sound: folder / "absent.pt", "no such checkpoint; train first"),
]


@pytest.mark.parametrize(
    ("make", "message"),
    BAD_CHECKPOINTS,
    ids=["other_bundle", "cut_short", "a_volume", "of_something_else", "absent"],
)
def test_a_checkpoint_that_is_none_of_ours_is_refused(
    data: Path,
    checkpoint: Path,
    make: Callable[[Path, Path], Path],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = make(data.parent, checkpoint)
    output = data.parent / "out"
    for code in (predict(data, output, given), evaluate(data, output, given)):
        assert code == 4
    lines = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert len(lines) == 2
    assert all(one.startswith(f"error: {given}: ") and message in one for one in lines)
    assert not output.exists()


def test_a_checkpoint_of_a_shipped_bundle_of_another_kind_is_refused(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = Path(find_bundle_root("fundus_vessels")) / "models/model.pt"
    assert predict(data, data.parent / "out", given) == 4
    assert "run the bundle fundus_vessels, or use a checkpoint of vesuvius_surface" in (
        error_line(capsys)
    )


def test_an_ensemble_may_be_of_two_architectures(data: Path, checkpoint: Path) -> None:
    other = _other_architecture(data.parent, checkpoint)
    output = data.parent / "out"
    assert predict(data, output, checkpoint, "--ensemble", f"['{other}']") == 0
    assert list(output.rglob("*.tif"))


def test_a_plain_run_with_another_architecture_names_the_overlay(
    data: Path, checkpoint: Path
) -> None:
    from monai.bundle import ConfigWorkflow

    given = _other_architecture(data.parent, checkpoint)
    files, settings = prepare_run(BUNDLE, "inference")
    settings |= {"dataset_dir": str(data), "output_dir": str(data.parent / "out")}
    workflow = ConfigWorkflow(
        config_file=[str(path) for path in files],
        workflow_type="infer",
        **settings,
        ckpt_path=str(given),
        device="cpu",
        tune_allocator=False,
    )
    with pytest.raises(Exception) as caught:  # noqa: PT011 - MONAI wraps it in what it likes
        workflow.initialize()
    cause = lamina_cause(caught.value)
    assert isinstance(cause, CheckpointError)
    assert "configs/topology_aware.yaml" in str(cause)


def test_a_run_does_not_go_on_with_another_architecture(
    trained: Path, sound_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(shutil.copytree(trained, tmp_path / "run"))
    before = (output / "checkpoints/best.pt").read_bytes()
    assert train(sound_data, output, max_epochs=2, **{"network_def::widths": [2, 6]}) == 4
    assert "last.pt: its network_def" in error_line(capsys)
    assert (output / "checkpoints/best.pt").read_bytes() == before
