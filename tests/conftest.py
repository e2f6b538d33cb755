"""What every test shares: one thread, none of the user's settings, real images if any.

Nothing here imports torch, so that tests of NumPy code start at once.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before NumPy or torch are imported, and inherited by every process a test starts. One thread: the
# tensors of a test are too small for more, and sums then come out the same on every machine.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ["MONAI_FAIL_ON_DUPLICATE_CONFIG"] = "1"  # MONAI's default lets the last duplicate win
os.environ["MPLBACKEND"] = "Agg"
for variable in ("LAMINA_DEBUG", "LAMINA_MAX_DECODED_BYTES", "MONAI_ALLOW_PICKLE"):
    os.environ.pop(variable, None)

settings.register_profile(
    "lamina",
    max_examples=50,
    deadline=None,  # a busy machine is not a wrong result
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lamina")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what reads real images, so that `-m "not real_data"` always means it.

    Under `pytest -n 2 --dist loadgroup`, keep together what shares fixtures: the tests of one
    bundle, whose session fixtures train it, and those of one file.
    """
    parallel = config.pluginmanager.hasplugin("xdist")
    for item in items:
        if "lamina_data" in getattr(item, "fixturenames", ()):
            item.add_marker("real_data")
        if parallel:
            given = item.callspec.params if hasattr(item, "callspec") else {}
            bundle = given.get("bundle")
            group = getattr(bundle, "name", None) or item.nodeid.partition("::")[0]
            item.add_marker(pytest.mark.xdist_group(group))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `gpu` where torch sees no CUDA device."""
    if item.get_closest_marker("gpu") is not None:
        import torch  # only when somebody asked for the GPU tests

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def lamina_data() -> Path:
    """The folder with real images; a test skips where it, or the part it needs, is absent."""
    value = os.environ.get("LAMINA_DATA", "")
    if not value:
        pytest.skip("LAMINA_DATA is not set: it names the folder with real images")
    folder = Path(value).resolve()
    if not folder.is_dir():
        pytest.skip(f"LAMINA_DATA is {value!r}, which is not a folder")
    return folder
