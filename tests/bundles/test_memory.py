"""The estimated memory of a step against real ones, for the networks of the bundles."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

# The default of every bundle and what of the larger ones is quick enough; the benchmark has all.
NETWORKS = [
    ("fundus_vessels", "default"),
    ("oct_layers", "default"),
    ("oct_layers", "hybrid_attention"),
    ("vesuvius_surface", "default"),
    ("insect_pests", "default"),
    ("multiscale_classifier", "default"),
]


@pytest.fixture(scope="module")
def benchmark(repository: Path) -> ModuleType:
    path = repository / "benchmarks" / "memory_estimate.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_looks_at_every_bundle(benchmark: ModuleType, repository: Path) -> None:
    bundles = {path.parents[1].name for path in repository.glob("bundles/*/configs/train.yaml")}
    assert set(benchmark.NETWORKS) == bundles == {bundle for bundle, _ in NETWORKS}


@pytest.mark.parametrize(("bundle_name", "network"), NETWORKS)
def test_the_estimate_is_the_memory_of_the_bundles_step(
    bundle_name: str, network: str, benchmark: ModuleType
) -> None:
    found = benchmark.compare(bundle_name, network)
    by_storages = benchmark.STORAGES_TOLERANCE
    assert found["estimate"] == pytest.approx(found["storages"], rel=by_storages)
    by_allocator = benchmark.ALLOCATOR_TOLERANCE
    assert found["copies"] == pytest.approx(found["allocator"], rel=by_allocator)


@pytest.mark.parametrize("profile", ["gpu_4gb", "gpu_80gb"])
def test_a_profile_of_oct_layers_fits_the_memory_it_is_named_for(
    profile: str, benchmark: ModuleType
) -> None:
    size, limit = benchmark.profile_bytes(profile)
    assert 0.1 * limit < size < 0.85 * limit  # the rest is for the GPU's own
