from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.hardware.batch_memory import BatchMemory
from pipeline.hardware.memory import MemoryEstimate, estimate_training_memory
from pipeline.hardware.memory_table import log_memory_profile, memory_table, size_text
from pipeline.hardware.tiers import DeviceProfile

GB = 10**9
GPU = DeviceProfile("cuda:0", "cuda", "A10G", 24 * GB, 20 * GB, (8, 6))
CPU = DeviceProfile("cpu", "cpu", "CPU", 16 * GB, 8 * GB)
MB = 10**6
ESTIMATE = MemoryEstimate(
    peak_bytes=6 * GB,
    categories={"activations": 5 * GB, "parameters": GB},
    largest={
        "parameters": GB, "buffers": 2 * MB, "gradients": GB, "optimizer": 2 * GB, "averaged": 0,
        "activations": 5 * GB, "inputs": 0,
    },
    allocated_bytes=7 * GB,
    layers=tuple((f"layer {number}", (30 - number) * MB) for number in range(20)),
)  # fmt: skip


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))


MAKERS: Any = (network, lambda: torch.mean, partial(torch.optim.AdamW, lr=0.001))


def test_the_table_tells_device_model_optimizer_activations_total_and_batch() -> None:
    text = "\n".join(memory_table(ESTIMATE, GPU, 4, BatchMemory.affine(2 * GB, GB)))
    for part in (
        "device cuda:0 (A10G): 24.00 GB in all, 4.00 GB used or not ours, 20.00 GB free",
        "network 1.00 GB: parameters 1.00 GB, buffers 2.0 MB",
        "gradients 1.00 GB",
        "optimizer 2.00 GB",
        "activations 5.00 GB with a batch of 4",
        "total at the peak 6.00 GB, 25.0% of the device (tensors in eager mode: activations 5.00",
        "largest safe batch 14: 16.00 GB (80% of 20.0 GB free), 3.00 GB with one sample and 1.00",
    ):
        assert part in text
    assert "averaged" not in text
    assert "copy inside" not in text


def test_on_a_cpu_copies_of_convolutions_are_told() -> None:
    text = "\n".join(memory_table(ESTIMATE, CPU, 4, BatchMemory.affine(2 * GB, GB)))
    assert "with what convolutions copy inside on a CPU 7.00 GB" in text


def test_without_activations_only_what_depends_on_the_network_is_told() -> None:
    text = "\n".join(memory_table(ESTIMATE, GPU, 4))
    assert "optimizer 2.00 GB" in text
    for absent in ("activations", "total", "batch", "layer"):
        assert absent not in text


def test_the_largest_fifteen_layers_are_told() -> None:
    lines = memory_table(ESTIMATE, GPU, 4, detailed=True)
    assert sum("layer " in line for line in lines) == 15
    assert any("layer 0" in line and "30.0 MB" in line for line in lines)
    assert any("15 of 20 layers" in line for line in lines)


def test_a_device_that_does_not_tell_its_memory_is_said_to() -> None:
    unknown = DeviceProfile("privateuseone:0", "privateuseone", "DirectML device")
    text = "\n".join(memory_table(ESTIMATE, unknown, 4, BatchMemory.affine(GB, GB)))
    assert "its memory cannot be read" in text
    assert "assumed, as the free memory cannot be read" in text


def test_the_profile_is_written_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pipeline.hardware"):
        lines = log_memory_profile(
            *MAKERS, (2, 1, 32, 32), device=CPU, detailed_memory=True, averaged=True
        )
    assert [record.getMessage() for record in caplog.records] == list(lines)
    found = estimate_training_memory(*MAKERS, (2, 1, 32, 32), averaged=True)
    text = "\n".join(lines)
    assert f"total at the peak {size_text(found.peak_bytes)}" in text
    assert "averaged weights" in text


def test_a_measured_step_needs_cuda_and_says_so() -> None:
    lines = log_memory_profile(
        *MAKERS, (1, 1, 8, 8), device="cpu", estimate_activations=False, profile_training_step=True
    )
    assert lines[-1] == "memory: a measured step needs CUDA, and the device is cpu"


@pytest.mark.gpu
def test_a_measured_step_agrees_with_the_estimate() -> None:
    big = partial(nn.Sequential, *[nn.Conv2d(32, 32, 3, padding=1) for _ in range(8)])
    makers: Any = (big, *MAKERS[1:])
    shape = (8, 32, 256, 256)
    lines = log_memory_profile(
        *makers, shape, device="cuda:0", profile_training_step=True, foreach=True
    )
    measured = [line for line in lines if "measured" in line]
    assert [line.split()[2] for line in measured] == [
        "forward:",
        "backward:",
        "optimizer:",
        "reserve",
    ]
    found = max(float(line.split()[3]) for line in measured[:3])
    estimate = estimate_training_memory(*makers, shape, foreach=True).peak_bytes / 1e9
    assert found == pytest.approx(estimate, rel=0.25)
