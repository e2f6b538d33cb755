from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    MapTransform,
    RandFlipd,
    RandGaussianNoised,
    RandSpatialCropd,
    ScaleIntensityd,
)
from monai.transforms.utils import reset_ops_id
from torch.utils.data import Dataset

from pipeline.data.persistent_cache import PersistentCache
from pipeline.errors import ConfigurationError
from pipeline.training.ordering import KeyedDataset

Item = dict[str, Any]


class Counted(MapTransform):
    """Counts how often cases are transformed; the count is no setting."""

    calls = 0

    def __call__(self, data: Mapping[Any, Any]) -> Item:
        type(self).calls += 1
        return dict(data)


@pytest.fixture(autouse=True)
def _none_counted() -> None:
    Counted.calls = 0


@pytest.fixture
def cases(tmp_path: Path) -> list[Item]:
    generator = np.random.default_rng(0)
    found = []
    for name in "abc":
        path = tmp_path / f"{name}.npy"
        volume = np.zeros((12, 14, 16), np.uint8)
        volume[2:-2, 1:-3, 3:] = generator.integers(1, 255, (8, 10, 13))
        np.save(path, volume)
        found.append({"image": str(path), "name": name})
    return found


def deterministic(minv: float = 0.0) -> list[Any]:
    return [
        LoadImaged(keys="image"),
        EnsureChannelFirstd(keys="image"),
        CropForegroundd(keys="image", source_key="image", allow_smaller=True),
        ScaleIntensityd(keys="image", minv=minv),
        Counted(keys="image"),
    ]


def random() -> list[Any]:
    return [
        RandSpatialCropd(keys="image", roi_size=(6, 6, 6), random_size=False),
        RandFlipd(keys="image", prob=0.5),
        RandGaussianNoised(keys="image", prob=0.5),
    ]


def assert_same(found: Any, expected: Any) -> None:
    """Equal in value and type, all the way down; MONAI's names of keys count as text."""
    if isinstance(expected, Mapping):
        assert list(map(str, found)) == list(map(str, expected))
        for mine, other in zip(found.values(), expected.values(), strict=True):
            assert_same(mine, other)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for mine, other in zip(found, expected, strict=True):
            assert_same(mine, other)
    elif isinstance(expected, torch.Tensor):
        assert type(found) is type(expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        if isinstance(expected, MetaTensor):
            assert_same(found.meta, expected.meta)
            assert_same(found.applied_operations, expected.applied_operations)
    else:
        np.testing.assert_array_equal(found, expected)


def without_ids(item: Item) -> Item:
    """Forget which objects transformed `item`, as every cache between processes must."""
    reset_ops_id(item)
    return item


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*.cache"))


def test_a_read_item_is_the_built_one_and_the_transformed_one(
    tmp_path: Path, cases: list[Item]
) -> None:
    chain = Compose(deterministic())
    cached = PersistentCache(cases, chain, tmp_path / "c")
    plain = [without_ids(chain(case)) for case in cases]
    assert Counted.calls == 3
    for _ in range(3):
        for place, expected in enumerate(plain):
            assert_same(cached[place], expected)
    again = PersistentCache(cases, Compose(deterministic()), tmp_path / "c")
    assert_same(again[1], plain[1])
    assert Counted.calls == 6
    assert len(entries(tmp_path / "c")) == 3


def test_a_read_item_can_be_inverted(tmp_path: Path, cases: list[Item]) -> None:
    chain = Compose(deterministic())
    cached = PersistentCache(cases, chain, tmp_path / "c")
    invert = Invertd(keys="image", transform=chain, orig_keys="image", nearest_interp=False)
    for _ in range(2):
        assert invert(cached[0])["image"].shape == (1, 12, 14, 16)


def test_an_item_that_is_changed_leaves_the_next_one_alone(
    tmp_path: Path, cases: list[Item]
) -> None:
    cached = PersistentCache(cases, deterministic(), tmp_path / "c")
    expected = cached[0]["image"].clone()
    for _ in range(2):
        item = cached[0]
        item["image"].zero_()
        item["image"].meta.clear()
    assert_same(cached[0]["image"].as_tensor(), expected.as_tensor())


def keyed(dataset: Dataset[Any], chain: Compose, workers: int = 0) -> list[torch.Tensor]:
    loader = DataLoader(
        KeyedDataset(dataset, chain, seed=3),
        sampler=[(epoch, index) for epoch in (1, 2) for index in range(3)],
        batch_size=1,
        num_workers=workers,
    )
    return [torch.as_tensor(batch["image"]).clone() for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_keyed_item_is_the_same_from_memory_from_disk_and_freshly_built(
    tmp_path: Path, cases: list[Item], workers: int
) -> None:
    chain = Compose(deterministic() + random())
    expected = keyed(CacheDataset(cases, chain, progress=False), chain)
    for _ in ("built", "read"):
        chain = Compose(deterministic() + random())
        found = keyed(PersistentCache(cases, chain, tmp_path / "c"), chain, workers)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)
    assert len(entries(tmp_path / "c")) == 3


def test_an_edited_file_is_not_served_from_before(tmp_path: Path, cases: list[Item]) -> None:
    cached = PersistentCache(cases, deterministic(), tmp_path / "c")
    before = cached[0]["image"]
    volume = np.load(cases[0]["image"])
    volume[5, 5, 5:] //= 2
    np.save(cases[0]["image"], volume)
    os.utime(cases[0]["image"], ns=(1, 1))
    assert not torch.equal(cached[0]["image"], before)
    cached[0]
    assert Counted.calls == 2
    assert len(entries(tmp_path / "c")) == 1


def test_another_setting_or_case_has_an_entry_of_its_own(tmp_path: Path, cases: list[Item]) -> None:
    chains = [deterministic(), deterministic(minv=-1.0), deterministic()[:-2]]
    for _ in range(2):
        for chain in chains:
            PersistentCache(cases, chain, tmp_path / "c")[0]
        PersistentCache([{**cases[0], "name": "z"}], chains[0], tmp_path / "c")[0]
        PersistentCache(cases, chains[0], tmp_path / "c", settings={"table": 2})[0]
    assert len(entries(tmp_path / "c")) == 5
    assert Counted.calls == 4


def test_another_random_part_uses_the_same_entries(tmp_path: Path, cases: list[Item]) -> None:
    PersistentCache(cases, deterministic(), tmp_path / "c")[0]
    PersistentCache(cases, deterministic() + random(), tmp_path / "c")[0]
    assert Counted.calls == 1


class Planted:
    """What a foreign pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(os.environ["PLANTED"]),))


def damaged(good: bytes, how: str) -> bytes:
    head, _, payload = good.partition(b"\n")
    data = bytearray(good)
    if how == "truncated":
        return good[: len(good) // 2]
    if how == "flipped in the pixels":
        data[len(data) // 2] ^= 0x10
    elif how == "flipped in the first line":
        data[30] ^= 0x10
    elif how == "empty":
        return b""
    elif how == "a pickle":
        return pickle.dumps(Planted())
    elif how == "a pickle in disguise":
        foreign = pickle.dumps(Planted(), protocol=2)  # of another, torch warns at once
        for old, new in ((len(payload), len(foreign)), (zlib.crc32(payload), zlib.crc32(foreign))):
            head = head.replace(str(old).encode(), str(new).encode())
        return head + b"\n" + foreign
    return bytes(data)


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "empty",
        "flipped in the pixels",
        "flipped in the first line",
        "a pickle",
        "a pickle in disguise",
    ],
)
def test_a_damaged_entry_is_deleted_and_built_anew_with_one_line(
    tmp_path: Path,
    cases: list[Item],
    how: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLANTED", str(tmp_path / "planted"))
    cached = PersistentCache(cases, deterministic(), tmp_path / "c")
    expected = cached[0]
    (entry,) = entries(tmp_path / "c")
    entry.write_bytes(damaged(entry.read_bytes(), how))
    with caplog.at_level(logging.INFO):
        assert_same(cached[0], expected)
        assert_same(cached[0], expected)
    ours = [record for record in caplog.records if record.name.startswith("pipeline.")]
    assert [record.levelname for record in ours] == ["WARNING"]
    assert f"{entry}: damaged or foreign cache entry" in caplog.text
    assert Counted.calls == 2
    assert not (tmp_path / "planted").exists()


def test_any_flipped_byte_is_noticed(tmp_path: Path, cases: list[Item]) -> None:
    cached = PersistentCache(cases, deterministic(), tmp_path / "c")
    expected = cached[0]
    (entry,) = entries(tmp_path / "c")
    good = entry.read_bytes()
    places = np.random.default_rng(0).choice(len(good), 60, replace=False)
    for place in places:
        data = bytearray(good)
        data[place] ^= 0xFF
        entry.write_bytes(data)
        assert_same(cached[0], expected)
    assert Counted.calls == 1 + len(places)


@pytest.mark.parametrize("other", ["case", "setting"])
def test_an_entry_of_another_under_this_name_is_not_served(
    tmp_path: Path, cases: list[Item], other: str
) -> None:
    cached = PersistentCache(cases, deterministic(), tmp_path / "c")
    expected = cached[0]
    (first,) = entries(tmp_path / "c")
    if other == "case":
        cached[1]
    else:
        PersistentCache(cases, deterministic(minv=-1.0), tmp_path / "c")[0]
    (second,) = set(entries(tmp_path / "c")) - {first}
    shutil.copyfile(second, first)
    assert_same(cached[0], expected)
    assert Counted.calls == 3


def killed_at_rename(cached: PersistentCache) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        cached[0]


def test_a_kill_before_the_rename_leaves_no_entry(tmp_path: Path, cases: list[Item]) -> None:
    cached = PersistentCache(cases, deterministic(), tmp_path / "c")
    worker = multiprocessing.get_context("fork").Process(target=killed_at_rename, args=(cached,))
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    assert [path.name[0] for path in (tmp_path / "c").iterdir()] == ["."]
    assert_same(cached[0], cached[0])


def test_new_data_delete_nothing(tmp_path: Path, cases: list[Item]) -> None:
    cached = PersistentCache(cases[:1], deterministic(), tmp_path)
    cached[0]
    cached.set_data(cases[1:])
    assert cached[0]["name"] == "b"
    assert Path(cases[0]["image"]).is_file()


def test_without_a_folder_nothing_is_kept(tmp_path: Path, cases: list[Item]) -> None:
    cached = PersistentCache(cases, deterministic(), None)
    assert_same(cached[0], cached[0])
    assert Counted.calls == 2
    assert not list(tmp_path.glob("**/*.cache"))


class Opaque(MapTransform):
    def __call__(self, data: Mapping[Any, Any]) -> Item:
        return {**data, "reader": object()}


def test_what_cannot_be_kept_is_named(tmp_path: Path, cases: list[Item]) -> None:
    with pytest.raises(ConfigurationError, match=r"sample\['reader'\] is a builtins.object"):
        PersistentCache(cases, [Opaque(keys="image")], tmp_path / "c")[0]
