"""Independent counts of a real training step, which the benchmark has."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def counted(repository: Path) -> ModuleType:
    """The benchmark of the estimate: `storage_bytes` and `allocator_bytes` of a `Step`."""
    path = repository / "benchmarks" / "memory_estimate.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
