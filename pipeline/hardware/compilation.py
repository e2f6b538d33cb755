"""Compile loops over arrays on first use, and keep the machine code on disk where that is possible.

The first call of a function compiles it; later processes load what it left in `__pycache__`, in the
user's cache folder where the installation is read-only, or in `$NUMBA_CACHE_DIR`. numba looks only
at the file a function stands in when it decides whether the stored code is still current, so a
compiled function calls compiled functions of its own module and of no other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numba

__all__ = ["compiled"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)


def compiled(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Return `function` as machine code that runs without the interpreter lock."""
    result: Callable[_Arguments, _Result]
    try:
        result = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder for the cache can be written: compile in every process
        _log.debug("%s is compiled anew: no folder for numba's cache", function.__qualname__)
        result = numba.njit(nogil=True)(function)
    return result
