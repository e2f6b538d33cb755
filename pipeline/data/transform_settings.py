"""What a chain of transforms does, as text: equal for equal settings, in every process."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import threading
from collections.abc import Mapping, Sequence
from enum import Enum
from importlib import metadata
from pathlib import Path, PurePath
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch

from pipeline.errors import ConfigurationError

__all__ = ["described", "digest"]

# Their code changes with a version, which `digest` includes; any other module is read.
_RELEASED = ("monai", "torch", "numpy")
_PLAIN = (float, complex, bytes, range, slice, torch.dtype, torch.device, np.dtype)
# Kept by objects, but no setting: MONAI makes the last one at the first call.
_STATE = (np.random.RandomState, np.random.Generator, torch.Generator, threading.local)


def digest(value: Any) -> str:
    """Return 40 hexadecimal digits that follow from `described(value)` and the versions in use."""
    text = json.dumps([_versions(), described(value)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def described(value: Any) -> Any:
    """Return `value` as lists, strings and numbers: settings, and the code they are settings of.

    Objects are told by their class and attributes, functions by where they are written; classes
    and functions outside MONAI also by the text of their module, so that an edit shows. Generators
    of random numbers that an object holds do not count.

    Raises:
        ConfigurationError: an object shows nothing to tell it by.
    """
    return _described(value, ())


def _described(value: Any, inside: tuple[int, ...]) -> Any:
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Enum | PurePath):
        return str(value.value if isinstance(value, Enum) else value)
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return _array(value)
    if isinstance(value, type | FunctionType | MethodType | CodeType):
        return _code(value, inside)
    if id(value) in inside:
        return "itself"
    inside = (*inside, id(value))
    if isinstance(value, Mapping):
        pairs = [[_described(k, inside), _described(v, inside)] for k, v in value.items()]
        return ["mapping", sorted(pairs, key=repr)]
    if isinstance(value, set | frozenset):
        return ["set", sorted((_described(item, inside) for item in value), key=repr)]
    if isinstance(value, Sequence):
        return [_described(item, inside) for item in value]
    if isinstance(value, functools.partial):
        return [_described(part, inside) for part in (value.func, value.args, value.keywords)]
    return _object(value, inside)


def _array(value: Any) -> list[str]:
    plain = value.detach().cpu().contiguous() if isinstance(value, torch.Tensor) else value
    array = np.ascontiguousarray(plain)
    content = repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
    return [str(array.dtype), str(array.shape), hashlib.sha256(content).hexdigest()]


def _object(value: Any, inside: tuple[int, ...]) -> list[Any]:
    state = getattr(value, "__dict__", None)
    if state is None:
        text = repr(value)
        if " at 0x" in text:
            raise ConfigurationError(
                f"{text}: a transform holds an object that shows no settings; "
                "a cache on disk cannot tell it from another: use CacheDataset"
            )
        return [type(value).__qualname__, text]
    settings = {key: item for key, item in state.items() if not isinstance(item, _STATE)}
    return [_code(type(value), inside), _described(settings, inside)]


def _code(value: Any, inside: tuple[int, ...]) -> Any:
    """Return where a class or function is written and, outside MONAI, what is written there."""
    if isinstance(value, MethodType):
        owner = None if id(value.__self__) in inside else value.__self__
        return [_code(value.__func__, inside), _described(owner, inside)]
    if isinstance(value, CodeType):
        constants = [_described(constant, inside) for constant in value.co_consts]
        return [value.co_code.hex(), list(value.co_names), constants]
    module = value.__module__ or ""
    name = f"{module}.{value.__qualname__}"
    if module.split(".")[0] in (*_RELEASED, "builtins"):
        return name
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        bound = [value.__defaults__, value.__kwdefaults__, cells]
        return [name, _code(value.__code__, inside), _described(bound, inside), _source(value)]
    return [name, _source(value)]


def _source(value: Any) -> str | None:
    """Return the digest of the module that `value` is written in, None without a file."""
    try:
        path = inspect.getsourcefile(value)
    except TypeError:
        return None
    return _file_digest(path) if path and Path(path).is_file() else None


@functools.cache
def _versions() -> list[str]:
    return [metadata.version(name) for name in _RELEASED]


@functools.cache
def _file_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
