from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.volumes import open_volume
from pipeline.errors import ConfigurationError, InputError
from pipeline.vesuvius import reading
from pipeline.vesuvius.reading import ReadVolume, is_streamed
from pipeline.vesuvius.transforms import LoadVolumed, ScalePercentilesd

TRANSFORMS: list[Callable[[Any], Any]] = [LoadVolumed(), ScalePercentilesd("image")]
STAGES = ["read", "scale"]


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "v.npy"
    np.save(path, np.random.default_rng(0).integers(0, 255, (8, 9, 10), np.uint8))
    return path


def test_a_case_is_what_its_transforms_make_and_the_seconds_they_took(volume: Path) -> None:
    case = ReadVolume(TRANSFORMS, STAGES, stream=False)({"image": str(volume), "label": None})
    expected = TRANSFORMS[1](TRANSFORMS[0]({"image": str(volume)}))
    np.testing.assert_array_equal(case["image"], expected["image"])
    assert list(case["stages"]["seconds"]) == list(case["stages"]["cpu_seconds"]) == STAGES


def test_a_streamed_case_is_not_read(volume: Path) -> None:
    case = {"image": str(volume), "name": "v.npy", "label": None}
    found = ReadVolume(TRANSFORMS, STAGES, stream=True)(case)
    assert found == {"image": str(volume), "name": "v.npy", "streamed": True}


def test_an_array_is_never_streamed() -> None:
    array = np.random.default_rng(0).random((8, 9, 10)).astype(np.float32)
    assert ReadVolume(TRANSFORMS, STAGES, stream=True)({"image": array})["image"].shape[0] == 1


def test_auto_streams_what_takes_more_than_half_of_the_memory(
    volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_needed = 8 * 9 * 10 * (1 + reading._BYTES_PER_VOXEL)
    for memory, expected in ((2 * bytes_needed, False), (2 * bytes_needed - 2, True)):
        monkeypatch.setattr(reading, "_memory_bytes", lambda memory=memory: memory)
        assert is_streamed(open_volume(volume), "auto") is expected


def test_auto_streams_what_would_be_refused_for_its_size(
    volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_streamed(open_volume(volume))
    monkeypatch.setenv("LAMINA_MAX_DECODED_BYTES", "719")
    assert is_streamed(open_volume(volume))
    assert not is_streamed(open_volume(volume), False)


def test_a_limit_on_this_process_is_a_limit_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    without = reading._memory_bytes()
    held = reading.psutil.Process().memory_info().data
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (held + 10**6, -1))
    assert reading._memory_bytes() < 2 * 10**6 < without


@pytest.mark.parametrize("stream", ["auto", True])
def test_a_file_that_is_no_volume_is_an_input_error(tmp_path: Path, stream: Any) -> None:
    path = tmp_path / "v.tif"
    path.write_bytes(b"no volume")
    with pytest.raises(InputError, match="no volume"):
        ReadVolume(TRANSFORMS, STAGES, stream)({"image": str(path)})


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="1 stages for 2 transforms"):
        ReadVolume(TRANSFORMS, ["read"])
    with pytest.raises(ConfigurationError, match="stream must be auto, true or false"):
        ReadVolume(TRANSFORMS, STAGES, "always")  # type: ignore[arg-type]
