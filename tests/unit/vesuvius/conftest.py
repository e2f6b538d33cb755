"""Machine code of these tests is that of the sources as they are.

numba looks at one file when it decides whether stored code is current; a change in a function that
is called from another file would go unnoticed. So the code is kept by the digest of all files with
compiled functions.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numba
import pytest

import pipeline.vesuvius


def pytest_configure(config: pytest.Config) -> None:
    sources = hashlib.sha256()
    for folder in pipeline.vesuvius.__path__:
        for path in sorted(Path(folder).glob("*.py")):
            source = path.read_bytes()
            if b"@compiled" in source:
                sources.update(source)
    assert config.cache is not None
    store = config.cache.mkdir(f"compiled-{sources.hexdigest()[:16]}")
    setattr(numba.config, "CACHE_DIR", str(store))  # noqa: B010 - no stub knows the attribute
