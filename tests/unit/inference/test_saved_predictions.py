from __future__ import annotations

import csv
import json
import logging
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from pipeline.data.atomic import write_bytes
from pipeline.data.checksums import file_sha256
from pipeline.data.images import read_image
from pipeline.data.writers import write_png, write_tiff
from pipeline.errors import ConfigurationError, InputError, InputErrors
from pipeline.inference.averages import Domain
from pipeline.inference.batch import BatchRun
from pipeline.inference.ensembles import Ensemble
from pipeline.inference.saved_predictions import average_predictions

DTYPES = ("uint8", "uint16", "float16", "float32")


def drawn(seed: int, *shape: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).random(shape)


def stored(probability: NDArray[Any], dtype: str) -> NDArray[Any]:
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return probability.astype(kind)
    return (probability * np.iinfo(kind).max).round().astype(kind)


def shown(array: NDArray[Any]) -> NDArray[np.float64]:
    """Return the probability that a file's values mean."""
    largest = 1 if array.dtype.kind == "f" else np.iinfo(array.dtype).max
    return array.astype(np.float64) / largest


def step(dtype: str) -> float:
    kind = np.dtype(dtype)
    return float(np.finfo(kind).eps) if kind.kind == "f" else 1 / np.iinfo(kind).max


def folders(
    root: Path, name: str, arrays: list[NDArray[Any]], write: Callable[..., Any]
) -> list[Path]:
    """Write an array per folder under the same name; return the folders."""
    for index, array in enumerate(arrays):
        write(root / f"run_{index}" / name, array)
    return [root / f"run_{index}" for index in range(len(arrays))]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs over three photographs."""
    for index in range(2):
        for number, name in enumerate(["a", "left/b", "left/c"]):
            levels = stored(drawn(10 * index + number, 4, 5), "uint16")
            write_png(tmp_path / f"run_{index}" / f"{name}_probability.png", levels)
            write_png(tmp_path / f"run_{index}" / f"{name}_vessels.png", levels > 32767)
            write_bytes(tmp_path / f"run_{index}" / f"{name}.json", b"{}")
    return [tmp_path / "run_0", tmp_path / "run_1"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 7), (3, 6, 7)], ids=["image", "volume"])
def test_probability_mean_is_the_mean_of_the_files(
    tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    arrays = [stored(drawn(seed, *shape), dtype) for seed in range(3)]
    given_in = folders(tmp_path, "a/x_probability.tif", arrays, write_tiff)
    (path,) = average_predictions(given_in, tmp_path / "mean", [1, 2, 5])
    found = read_image(path)
    expected = (shown(arrays[0]) + 2 * shown(arrays[1]) + 5 * shown(arrays[2])) / 8
    assert path == tmp_path / "mean" / "a" / "x_probability.tif"
    assert (found.shape, found.dtype) == (shape, np.dtype(dtype))
    np.testing.assert_allclose(shown(found), expected, rtol=0, atol=0.5001 * step(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("domain", ["probability", "logit"])
def test_mean_of_equal_files_is_that_file(tmp_path: Path, dtype: str, domain: Domain) -> None:
    array = stored(np.concatenate([[[0.0, 1.0, 0.5]], drawn(0, 5, 3)]), dtype)
    given_in = folders(tmp_path, "x_probability.tif", [array] * 3, write_tiff)
    (path,) = average_predictions(given_in, tmp_path / "mean", domain=domain)
    if domain == "logit" and np.dtype(dtype).kind == "f":  # 0 and 1 move by half a step
        np.testing.assert_allclose(read_image(path), array, atol=step(dtype))
    else:
        shift = np.abs(read_image(path).astype(float) - array.astype(float)).max()
        assert shift <= (domain == "logit" and np.dtype(dtype).kind != "f")


def test_weights_1_and_0_give_the_first(runs: list[Path], tmp_path: Path) -> None:
    for path in average_predictions(runs, tmp_path / "mean", [1, 0]):
        first = runs[0] / path.relative_to(tmp_path / "mean")
        assert np.array_equal(read_image(path), read_image(first))


def test_logit_mean_is_the_brute_force_mean(tmp_path: Path) -> None:
    arrays = [stored(drawn(seed, 5, 6), "float32") for seed in range(2)]
    given_in = folders(tmp_path, "x_probability.tif", arrays, write_tiff)
    (path,) = average_predictions(given_in, tmp_path / "mean", [3, 1], "logit")
    logits = [np.log(shown(array) / (1 - shown(array))) for array in arrays]
    expected = 1 / (1 + np.exp(-(0.75 * logits[0] + 0.25 * logits[1])))
    np.testing.assert_allclose(read_image(path), expected, rtol=1e-6)


def test_certainty_of_one_prediction_leaves_the_logit_mean_finite(tmp_path: Path) -> None:
    arrays = [stored(np.array([[p, p]]), "uint16") for p in (0.0, 1.0)]
    given_in = folders(tmp_path, "x_probability.png", arrays, write_png)
    (path,) = average_predictions(given_in, tmp_path / "mean", domain="logit")
    assert np.abs(read_image(path).astype(int) - 32768).max() <= 1


@settings(max_examples=20)
@given(
    seed=st.integers(0, 999),
    weights=st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    dtype=st.sampled_from(DTYPES),
)
def test_ensemble_from_disk_is_the_live_one_within_the_files_quantisation(
    tmp_path_factory: pytest.TempPathFactory, seed: int, weights: list[float], dtype: str
) -> None:
    torch.manual_seed(seed)
    networks = [nn.Conv2d(1, 1, 3, padding=1).requires_grad_(False) for _ in range(3)]
    image = 3 * torch.randn(1, 1, 6, 7)
    root = tmp_path_factory.mktemp("live")
    each = [torch.sigmoid(network(image))[0, 0].numpy() for network in networks]
    arrays = [stored(probability, dtype) for probability in each]
    given_in = folders(root, "x_probability.tif", arrays, write_tiff)
    (path,) = average_predictions(given_in, root / "mean", weights)
    live = torch.sigmoid(Ensemble(networks, weights)(image))[0, 0].numpy()
    # Half a step where the members were rounded and half where the mean was.
    np.testing.assert_allclose(shown(read_image(path)), live, rtol=0, atol=step(dtype) + 3e-7)


def test_names_and_folders_are_kept_and_other_files_left_alone(
    runs: list[Path], tmp_path: Path
) -> None:
    found = average_predictions(runs, tmp_path / "mean")
    names = ["a", "left/b", "left/c"]
    assert found == [tmp_path / "mean" / f"{name}_probability.png" for name in names]
    files = {p.relative_to(tmp_path / "mean").as_posix() for p in (tmp_path / "mean").rglob("*.*")}
    sidecars = {f"{name}_probability.json" for name in names}
    tables = {"failures.csv", "per_image.csv", "summary.json"}
    assert files == {f"{name}_probability.png" for name in names} | sidecars | tables


def test_files_of_another_name_may_be_asked_for(runs: list[Path], tmp_path: Path) -> None:
    found = average_predictions(runs, tmp_path / "mean", files="b_vessels.png")
    assert [path.name for path in found] == ["b_vessels.png"]


def test_sidecar_tells_what_a_result_was_made_from(runs: list[Path], tmp_path: Path) -> None:
    average_predictions(runs, tmp_path / "mean", [3, 1], "logit")
    sidecar = json.loads((tmp_path / "mean" / "left" / "b_probability.json").read_text("utf-8"))
    inputs = [run / "left" / "b_probability.png" for run in runs]
    assert sidecar["inputs"] == [str(path) for path in inputs]
    hashes = [sidecar["input_sha256"], *sidecar["beside_sha256"].values()]
    assert hashes == [file_sha256(path) for path in inputs]
    assert sidecar["model_sha256"] is None
    assert sidecar["settings"] == {"weights": [0.75, 0.25], "domain": "logit"}
    assert sidecar["results"] == ["left/b_probability.png"]
    assert (sidecar["shape"], sidecar["dtype"]) == ([4, 5], "uint16")


def test_results_may_be_averaged_again(runs: list[Path], tmp_path: Path) -> None:
    average_predictions(runs, tmp_path / "mean")
    found = average_predictions([tmp_path / "mean", runs[0]], tmp_path / "again")
    assert len(found) == 3


def truncate(path: Path) -> None:
    write_bytes(path, path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "not found: .*run_1"),
        (truncate, "run_1"),
        (lambda path: write_png(path, np.zeros((5, 4), np.uint16)), r"png \(5, 4\) of uint16, but"),
        (lambda path: write_png(path, np.zeros((4, 5), np.uint8)), r"\(4, 5\) of uint8, but .*16"),
        (lambda path: write_tiff(path, np.zeros((4, 5), np.uint16)), "tiff .* but .* is png"),
    ],
    ids=["missing", "cut short", "shape", "type", "format"],
)
def test_a_file_that_does_not_fit_is_listed_and_the_others_are_done(
    runs: list[Path], tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(runs[1] / "left" / "b_probability.png")
    with pytest.raises(InputErrors, match=message) as raised:
        average_predictions(runs, tmp_path / "mean")
    assert raised.value.exit_code == 3
    assert [problem.path for problem in raised.value.problems] == ["left/b_probability.png"]
    done = sorted(path.name for path in (tmp_path / "mean").rglob("*.png"))
    assert done == ["a_probability.png", "c_probability.png"]
    with (tmp_path / "mean" / "failures.csv").open(encoding="utf-8") as stream:
        assert [row["path"] for row in csv.DictReader(stream)] == ["left/b_probability.png"]


@pytest.mark.parametrize("value", [np.nan, -0.1, 1.5, np.inf])
def test_values_that_are_no_probability_are_listed_and_nothing_is_left(
    tmp_path: Path, value: float
) -> None:
    arrays = [stored(drawn(seed, 3, 4, 5), "float32") for seed in range(2)]
    arrays[1][2, 0, 0] = value
    given_in = folders(tmp_path, "x_probability.tif", arrays, write_tiff)
    with pytest.raises(InputErrors, match=r"run_1.*expected probabilities between 0 and 1"):
        average_predictions(given_in, tmp_path / "mean")
    left = sorted(path.name for path in (tmp_path / "mean").iterdir())
    assert left == ["failures.csv", "per_image.csv", "summary.json"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4, 3), np.uint8), "png with 3 channels, expected a gray PNG or TIFF"),
        (np.zeros((4, 4), np.int32), "int32, expected uint8, uint16 or floats"),
    ],
    ids=["colour", "integers"],
)
def test_files_that_are_no_probabilities_are_refused(
    tmp_path: Path, array: NDArray[Any], message: str
) -> None:
    write = write_png if array.ndim == 3 else write_tiff
    given_in = folders(tmp_path, "x_probability.png", [array] * 2, write)
    with pytest.raises(InputErrors, match=message):
        average_predictions(given_in, tmp_path / "mean")


def test_an_old_sidecar_does_not_vouch_for_a_new_result(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    average_predictions(runs, tmp_path / "mean")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BatchRun, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        average_predictions(runs, tmp_path / "mean", [3, 1])
    assert [path.name for path in (tmp_path / "mean").glob("a_*")] == ["a_probability.png"]


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*_probability.*")}


def test_what_is_averaged_already_is_left_as_it_is(runs: list[Path], tmp_path: Path) -> None:
    first = average_predictions(runs, tmp_path / "mean")
    before = times(tmp_path / "mean")
    assert average_predictions(runs, tmp_path / "mean") == first
    assert times(tmp_path / "mean") == before
    summary = json.loads((tmp_path / "mean" / "summary.json").read_text("utf-8"))
    counts = [summary[key] for key in ("inputs", "done", "skipped", "rejected", "exit_code")]
    assert counts == [3, 0, 3, 0, 0]


@pytest.mark.parametrize("changed", ["weights", "domain", "second"])
def test_what_is_made_from_something_else_is_averaged_again(
    runs: list[Path], tmp_path: Path, changed: str
) -> None:
    average_predictions(runs, tmp_path / "mean")
    if changed == "second":
        path = runs[1] / "left" / "b_probability.png"
        write_png(path, stored(drawn(99, 4, 5), "uint16"))
    other: dict[str, Any] = {"weights": {"weights": [3, 1]}, "domain": {"domain": "logit"}}
    average_predictions(runs, tmp_path / "mean", **other.get(changed, {}))
    summary = json.loads((tmp_path / "mean" / "summary.json").read_text("utf-8"))
    assert summary["done"] == (1 if changed == "second" else 3)


def test_a_file_left_out_keeps_its_earlier_result_and_sidecar(
    runs: list[Path], tmp_path: Path
) -> None:
    average_predictions(runs, tmp_path / "mean")
    before = {path: path.read_bytes() for path in (tmp_path / "mean").glob("a_*")}
    (runs[1] / "a_probability.png").unlink()
    with pytest.raises(InputErrors):
        average_predictions(runs, tmp_path / "mean", [3, 1])
    assert before == {path: path.read_bytes() for path in (tmp_path / "mean").glob("a_*")}


def test_memory_does_not_grow_with_the_depth_of_a_volume(tmp_path: Path) -> None:
    peaks = []
    for depth in (8, 64):
        root = tmp_path / str(depth)
        volume = np.full((depth, 128, 128), 0.25, np.float32)
        given_in = folders(root, "x_probability.tif", [volume, volume], write_tiff)
        tracemalloc.start()
        average_predictions(given_in, root / "mean")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    plane = 128 * 128 * 8
    assert peaks[1] < 1.5 * peaks[0] + plane  # the volume is 32 such planes, read twice


def test_volumes_are_written_page_by_page_as_others_are(tmp_path: Path) -> None:
    arrays = [stored(drawn(seed, 3, 40, 50), "uint8") for seed in range(2)]
    given_in = folders(tmp_path, "x_probability.tif", arrays, write_tiff)
    (path,) = average_predictions(given_in, tmp_path / "mean")
    with tifffile.TiffFile(path) as tiff:
        assert (len(tiff.pages), tiff.series[0].axes) == (3, "ZYX")
        assert tiff.pages[0].compression.name == "LZW"


def test_the_end_is_told(
    runs: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pipeline"):
        average_predictions(runs, tmp_path / "mean")
    assert "3 done, 0 skipped, 0 rejected" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folders": []}, "at least one folder"),
        ({"folders": "runs"}, "a list of at least one folder, got 'runs'"),
        ({"weights": [1]}, "1 weights for 2 predictions"),
        ({"domain": "odds"}, "domain must be probability or logit"),
    ],
)
def test_settings_are_checked(
    runs: list[Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        average_predictions(**{"folders": runs, "output": tmp_path / "mean", **changes})
    assert not (tmp_path / "mean").exists()


def test_output_in_an_input_folder_is_refused(runs: list[Path]) -> None:
    with pytest.raises(ConfigurationError, match=r"mean: lies in .*run_1"):
        average_predictions(runs, runs[1] / "mean")


def test_a_folder_given_twice_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="given twice"):
        average_predictions([runs[0], runs[0] / ".." / "run_0"], tmp_path / "mean")


def test_missing_folders_are_listed(runs: list[Path], tmp_path: Path) -> None:
    shutil.rmtree(runs[1])
    with pytest.raises(InputError, match=r"run_1, .*run_2: no such folder"):
        average_predictions([*runs, tmp_path / "run_2"], tmp_path / "mean")


def test_folders_without_predictions_are_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no PNG or TIFF named \*_surface\.\*"):
        average_predictions(runs, tmp_path / "mean", files="*_surface.*")


def test_files_that_share_a_sidecar_are_refused(runs: list[Path], tmp_path: Path) -> None:
    for run in runs:
        write_tiff(run / "a_probability.tif", np.zeros((4, 5), np.uint16))
    with pytest.raises(ConfigurationError, match="would have one name"):
        average_predictions(runs, tmp_path / "mean")
