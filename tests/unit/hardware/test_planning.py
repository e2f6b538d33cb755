from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CheckpointError, ConfigurationError, ResourceError, exit_code
from pipeline.hardware import machine_settings, processors, tiers
from pipeline.hardware.batch_memory import BatchMemory
from pipeline.hardware.planning import Plan, apply_plan, learning_rate_for, plan
from pipeline.hardware.tiers import DeviceProfile, device_profile, tier_for

GB = 10**9
CPU = DeviceProfile("cpu", "cpu", "CPU", 16 * GB, 8 * GB)


def gpu(total: float = 24, title: str = "A10G", capability: tuple[int, int] = (8, 6)) -> Any:
    return DeviceProfile(
        "cuda:0", "cuda", title, int(total * GB), int(0.9 * total * GB), capability
    )


def one_gb_each(precision: str, memory_efficient: bool) -> BatchMemory:
    """A step takes 1 GB and 1 GB for each sample, a quarter with blocks computed again."""
    return BatchMemory.affine(GB, GB // 4 if memory_efficient else GB)


def planned(**settings: Any) -> Plan:
    """Return the plan of a run of 32 samples per update on a CPU, unless `settings` differ."""
    defaults = {"device": CPU, "effective_batch_size": 32, "estimate": one_gb_each}
    return plan(**{**defaults, "learning_rate": 0.001, **settings})


# The batch


@given(
    effective=st.integers(1, 200),
    limit=st.integers(2 * GB, 300 * GB),
    processes=st.integers(1, 4),
)
def test_the_effective_batch_and_the_rate_are_those_asked_for_whatever_the_memory(
    effective: int, limit: int, processes: int
) -> None:
    made = planned(
        effective_batch_size=effective * processes, memory_limit_bytes=limit, processes=processes
    )
    assert made.batch_size * made.accumulation_steps * processes == effective * processes
    assert made.effective_batch_size == effective * processes
    assert made.learning_rate == 0.001
    assert made.estimated_bytes <= limit


@given(limits=st.tuples(st.integers(2 * GB, 80 * GB), st.integers(2 * GB, 80 * GB)))
def test_more_memory_never_gives_a_smaller_batch(limits: tuple[int, int]) -> None:
    small, large = (
        planned(memory_limit_bytes=limit, effective_batch_size=60, memory_efficient=False)
        for limit in sorted(limits)
    )
    assert small.batch_size <= large.batch_size


@pytest.mark.parametrize(("limit_gb", "batch"), [(40, 32), (20, 16), (12, 8), (5, 4), (2, 1)])
def test_the_batch_is_the_largest_divisor_that_fits(limit_gb: int, batch: int) -> None:
    made = planned(memory_limit_bytes=limit_gb * GB)
    assert (made.batch_size, made.accumulation_steps) == (batch, 32 // batch)


def test_several_steps_are_planned_with_what_they_hold() -> None:
    """Gradients and inputs of earlier steps stay: the single step fits, its repetition does not."""
    memory = BatchMemory(((0, GB),), ((GB, GB),), held_bytes=GB // 10)
    made = planned(effective_batch_size=8, estimate=lambda *_: memory, memory_limit_bytes=4 * GB)
    assert made.batch_size == 2
    assert made.estimated_bytes == memory.at(2, 4) == int(3.4 * GB)


def test_one_sample_that_does_not_fit_is_an_error_with_advice() -> None:
    with pytest.raises(
        ResourceError, match=r"one sample .* 1\.25 GB .* 1\.00 GB; set .*patch"
    ) as found:
        planned(memory_limit_bytes=GB)
    assert exit_code(found.value) == 5


def test_blocks_are_computed_again_only_where_a_sample_does_not_fit_otherwise() -> None:
    assert not planned(memory_limit_bytes=2 * GB).memory_efficient
    made = planned(memory_limit_bytes=int(1.5 * GB))
    assert (made.memory_efficient, made.batch_size) == (True, 2)


def test_on_the_smallest_devices_blocks_are_computed_again_before_a_batch_is_divided() -> None:
    made = planned(device=gpu(3.9), memory_limit_bytes=3 * GB)
    assert (made.tier, made.memory_efficient, made.batch_size) == ("gpu_4gb", True, 8)
    whole = planned(device=gpu(3.9), memory_limit_bytes=3 * GB, effective_batch_size=2)
    assert (whole.memory_efficient, whole.batch_size) == (False, 2)


@pytest.mark.parametrize("switch", [True, False])
def test_memory_efficient_that_is_set_stays(switch: bool) -> None:
    asked: list[bool] = []

    def estimate(precision: str, memory_efficient: bool) -> BatchMemory:
        asked.append(memory_efficient)
        return one_gb_each(precision, memory_efficient)

    made = planned(memory_efficient=switch, estimate=estimate, device=gpu(3.9))
    assert made.memory_efficient is switch
    assert asked == [switch]


def test_numbers_are_kept_and_nothing_is_estimated() -> None:
    def estimate(precision: str, memory_efficient: bool) -> BatchMemory:
        raise AssertionError

    made = planned(batch_size=8, estimate=estimate)
    assert (made.batch_size, made.accumulation_steps, made.estimated_bytes) == (8, 4, None)
    both = planned(batch_size=6, accumulation_steps=3, estimate=estimate)
    assert (both.batch_size, both.accumulation_steps, both.effective_batch_size) == (6, 3, 18)
    alone = plan(device=CPU, batch_size=5, learning_rate=1.0)
    assert (alone.accumulation_steps, alone.effective_batch_size) == (1, 5)


def test_fixed_accumulation_fixes_the_batch_or_does_not_fit() -> None:
    made = planned(accumulation_steps=8, memory_limit_bytes=40 * GB)
    assert (made.batch_size, made.accumulation_steps) == (4, 8)
    with pytest.raises(ResourceError, match=r"a batch of 16 .* accumulation_steps: auto"):
        planned(accumulation_steps=2, memory_limit_bytes=3 * GB)


def test_without_an_estimate_the_whole_batch_is_computed_at_once() -> None:
    assert planned(estimate=None).batch_size == 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 5}, "does not divide effective_batch_size 32; set one of 1, 2, 4"),
        ({"accumulation_steps": 3}, "accumulation_steps 3 does not divide effective_batch_size 32"),
        ({"processes": 3}, "32 cannot be shared evenly by 3 processes; set a multiple of 3"),
        ({"effective_batch_size": None}, "effective_batch_size is not set"),
        ({"batch_size": 0}, "at least 1, or auto, got 0"),
        ({"effective_batch_size": True}, "at least 1, or auto, got True"),
        ({"batch_size": 2.5}, "at least 1, or auto, got 2.5"),
        ({"precision": "half"}, "precision must be auto or one of .*, got 'half'"),
        ({"profile": "huge"}, "profile must be auto or one of gpu, gpu_8gb, .*, got 'huge'"),
        ({"memory_share": 1.5}, "memory_share must be above 0 and at most 1, got 1.5"),
        ({"memory_limit_bytes": 0}, "memory_limit_bytes must be positive, got 0"),
        ({"num_workers": -1}, "num_workers must be auto or at least 0, got -1"),
        ({"threads": 0}, "threads must be null or at least 1, got 0"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_told_with_a_remedy(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        planned(**settings)


# The learning rate


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        ("sgd", 0.004),
        (torch.optim.SGD, 0.004),
        (torch.optim.SGD([torch.zeros(1)], lr=1.0), 0.004),
        ("torch.optim.AdamW", 0.002),
        (torch.optim.Adam, 0.002),
    ],
    ids=["sgd", "SGD class", "SGD instance", "AdamW", "Adam class"],
)
def test_the_rate_follows_the_effective_batch(optimizer: object, rate: float) -> None:
    made = planned(optimizer=optimizer, reference_batch_size=8)
    assert made.learning_rate == pytest.approx(rate)
    smaller = planned(optimizer=optimizer, reference_batch_size=8, memory_limit_bytes=2 * GB)
    assert smaller.learning_rate == made.learning_rate


def test_the_rate_of_the_reference_batch_is_untouched() -> None:
    assert (
        learning_rate_for(0.1, "sgd", 32, 32)[0]
        == learning_rate_for(0.1, "sgd", 32, None)[0]
        == 0.1
    )


# Devices


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        (CPU, "float32"),
        (gpu(), "bfloat16"),
        (gpu(capability=(9, 0)), "bfloat16"),
        (gpu(title="Tesla T4", capability=(7, 5)), "float16"),
        (gpu(title="Tesla V100", capability=(7, 0)), "float16"),
        (gpu(title="NVIDIA GeForce GTX 1660 Ti", capability=(7, 5)), "float32"),
        (gpu(title="GTX 1080", capability=(6, 1)), "float32"),
        (DeviceProfile("mps", "mps", "Apple GPU"), "float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.title} {value.capability}",
)
def test_precision_is_what_a_device_is_fast_in(device: DeviceProfile, precision: str) -> None:
    assert planned(device=device, estimate=None).precision == precision
    assert planned(device=device, estimate=None, precision="bfloat16").precision == "bfloat16"


@pytest.mark.parametrize(
    ("device", "tier"),
    [(CPU, "cpu"), (gpu(8.4), "gpu"), (gpu(6), "gpu_8gb"), (gpu(3.9), "gpu_4gb"),
     (DeviceProfile("privateuseone:0", "privateuseone"), "gpu_4gb")],
    ids=["cpu", "8.4 GB", "6 GB", "3.9 GB", "unknown"],
)  # fmt: skip
def test_a_tier_is_that_of_the_memory(device: DeviceProfile, tier: str) -> None:
    assert tier_for(device)[0].name == tier
    assert tier_for(device, "gpu_8gb")[0].name == "gpu_8gb"


def test_a_simulated_small_memory_takes_the_tier_of_a_small_device() -> None:
    assert planned(device=gpu(80), memory_limit_bytes=3 * GB).tier == "gpu_4gb"
    assert planned(device=CPU, memory_limit_bytes=3 * GB).tier == "cpu"


def test_a_share_of_the_free_memory_is_taken() -> None:
    assert planned(device=gpu(10)).limit_bytes == pytest.approx(0.8 * 9 * GB)
    assert planned().limit_bytes == 4 * GB
    assert planned(memory_share=0.25).limit_bytes == 2 * GB
    assert planned(processes=2).limit_bytes == 2 * GB  # they share one CPU


def test_memory_that_cannot_be_read_is_assumed_and_said() -> None:
    made = planned(device=DeviceProfile("privateuseone:0", "privateuseone"))
    assert made.limit_bytes == int(0.8 * 2 * GB)
    assert any("2.0 GB assumed, as the free memory cannot be read" in line for line in made.lines())


def test_processes_agree_on_the_smallest_memory() -> None:
    assert planned(agree=lambda own: min(own, 3 * GB)).batch_size == 2


@pytest.mark.parametrize(
    ("cores", "workers"), [(1, 0), (2, 0), (3, 2), (9, 8), (64, 8)], ids=lambda value: str(value)
)
def test_workers_leave_a_processor_free(
    cores: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_settings, "usable_processors", lambda: cores)
    made = planned(device=gpu())
    assert made.num_workers == workers
    assert made.persistent_workers is (workers > 0)
    assert (made.prefetch_factor is None) is (workers == 0)
    assert made.pin_memory
    assert not planned().pin_memory


def test_processes_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine_settings, "usable_processors", lambda: 8)
    monkeypatch.setattr(machine_settings.os, "cpu_count", lambda: 8)
    made = planned(processes=2)
    assert (made.num_workers, made.threads) == (3, 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert planned(processes=2).threads is None


def test_loader_settings_that_are_set_stay() -> None:
    made = planned(num_workers=3, pin_memory=True, threads=5)
    assert (made.num_workers, made.pin_memory, made.threads) == (3, True, 5)


def test_kernels_follow_the_device() -> None:
    old = planned(device=gpu(capability=(7, 0)))
    new = planned(device=gpu())
    assert (old.tf32, old.cudnn_benchmark) == (False, True)
    assert (new.tf32, new.cudnn_benchmark) == (True, True)
    assert (planned().tf32, planned().cudnn_benchmark) == (False, False)


def test_the_machine_itself_is_profiled() -> None:
    found = device_profile("cpu")
    assert found.kind == "cpu"
    assert 0 < found.free_bytes <= found.total_bytes
    assert device_profile(torch.device("cpu")).name == "cpu"


def test_a_cpu_whose_memory_cannot_be_read_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable() -> int:
        raise OSError("/proc/meminfo")

    monkeypatch.setattr(tiers, "memory_bytes", unreadable)
    assert device_profile("cpu").free_bytes is None


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({}, None),
    ],
    ids=["no limit", "2.5", "half", "old, none", "old, 4", "no container"],
)
def test_a_containers_share_of_the_processors_is_read(
    files: dict[str, str], limit: int | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert processors._container_processors(tmp_path) == limit


def test_a_small_container_limits_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "_container_processors", lambda root: 1)
    assert processors.usable_processors() == 1


# A plan that is kept


def test_a_stored_plan_is_taken_whole() -> None:
    before = planned(memory_limit_bytes=5 * GB, reference_batch_size=8)
    again = planned(stored=before.as_dict(), reference_batch_size=8, memory_limit_bytes=2 * GB)
    for name in ("batch_size", "accumulation_steps", "effective_batch_size", "learning_rate"):
        assert getattr(again, name) == getattr(before, name)
    assert again.num_workers == before.num_workers


def test_a_stored_learning_rate_stays_and_another_one_configured_is_told() -> None:
    before = planned(learning_rate=1e-3)
    again = planned(stored=before.as_dict(), learning_rate=2e-3)
    assert again.learning_rate == before.learning_rate
    assert "0.002 as configured is another run: resume: false" in again.reasons["learning rate"]
    same = planned(stored=before.as_dict(), learning_rate=1e-3)
    assert "configured" not in same.reasons["learning rate"]


def test_a_stored_plan_survives_yaml() -> None:
    before = planned()
    assert yaml.safe_load(yaml.safe_dump(before.as_dict())) == before.as_dict()


def test_on_another_device_precision_stays_and_the_loader_is_planned_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine_settings, "usable_processors", lambda: 16)
    before = planned(device=gpu(), num_workers=1)
    again = planned(stored=before.as_dict())
    assert (again.precision, again.batch_size) == ("bfloat16", before.batch_size)
    assert (again.num_workers, again.pin_memory) == (8, False)
    same = planned(device=gpu(), stored=before.as_dict())
    assert (same.num_workers, same.pin_memory) == (1, True)


def test_more_processes_share_a_stored_batch() -> None:
    before = planned(memory_limit_bytes=9 * GB)
    again = planned(stored=before.as_dict(), processes=2)
    assert (before.batch_size, again.batch_size) == (8, 4)
    assert again.accumulation_steps == before.accumulation_steps


@pytest.mark.parametrize(
    "settings",
    [{"effective_batch_size": 64}, {"batch_size": 2}, {"accumulation_steps": 2}, {"processes": 16}],
    ids=lambda settings: next(iter(settings)),
)
def test_a_stored_plan_that_is_not_the_one_asked_for_is_refused(settings: dict[str, int]) -> None:
    before = planned(memory_limit_bytes=9 * GB)
    with pytest.raises(ConfigurationError, match="set them back, or begin anew with resume: false"):
        planned(stored=before.as_dict(), **settings)


@pytest.mark.parametrize("name", ["batch_size", "learning_rate", "precision"])
def test_a_stored_plan_with_something_missing_is_refused(name: str) -> None:
    stored = planned().as_dict()
    del stored[name]
    with pytest.raises(CheckpointError, match=f"no valid {name}"):
        planned(stored=stored)


def test_the_lines_tell_each_decision_with_its_reason() -> None:
    text = "\n".join(planned(memory_limit_bytes=9 * GB, reference_batch_size=8).lines())
    assert "batch 32 = 8 x 4: estimated 9.00 GB of 9.00 GB (memory_limit_bytes)" in text
    assert "learning rate 0.002: 0.001 x sqrt(32 / 8)" in text
    assert "precision float32: the default on cpu" in text
    shared = "\n".join(planned(processes=2, batch_size=4).lines())
    assert "batch 32 = 4 x 4 x 2: as asked, not estimated" in shared


def test_applying_a_plan_sets_threads_and_kernels() -> None:
    threads = torch.get_num_threads()
    try:
        apply_plan(planned(threads=1))
        assert torch.get_num_threads() == 1
        apply_plan(planned(device=gpu()))
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.benchmark
    finally:
        apply_plan(planned(threads=threads))
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.benchmark
