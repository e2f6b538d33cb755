from __future__ import annotations

import random
from collections.abc import Iterator

import monai.utils
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.transforms import Compose, RandGaussianNoise

from pipeline.errors import ConfigurationError
from pipeline.training.seeding import seed_everything


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(threads)
    monai.utils.set_determinism(None)
    torch.backends.cudnn.benchmark = benchmark


def draws() -> list[float]:
    data = Dataset([torch.zeros(1, 2, 2)], transform=Compose([RandGaussianNoise(prob=1.0)]))
    return [
        random.random(),
        float(np.random.random()),  # noqa: NPY002 - the global generator is what is tested
        float(torch.rand(())),
        *(float(image.sum()) for image in DataLoader(data)),
        *torch.randperm(10).tolist(),
    ]


def test_one_seed_gives_the_same_draws_everywhere() -> None:
    seed_everything(42)
    first = draws()
    seed_everything(42)
    assert draws() == first


def test_another_seed_gives_other_draws() -> None:
    seed_everything(42)
    first = draws()
    seed_everything(43)
    assert all(one != other for one, other in zip(draws()[:4], first[:4], strict=True))


def test_threads_are_set_on_request_only() -> None:
    before = torch.get_num_threads()
    seed_everything(1)
    assert torch.get_num_threads() == before
    seed_everything(1, threads=2)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_are_checked(threads: int) -> None:
    with pytest.raises(ConfigurationError, match="threads must be null or at least 1"):
        seed_everything(1, threads=threads)
