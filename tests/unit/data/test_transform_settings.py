from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms import (
    Compose,
    Lambdad,
    LoadImaged,
    RandFlipd,
    Resized,
    ScaleIntensityd,
    Spacingd,
)

from pipeline.data.transform_settings import digest
from pipeline.errors import ConfigurationError


def resized(mode: str = "bilinear") -> Resized:
    return Resized(keys=["image", "label"], spatial_size=(4, 4), mode=[mode, "nearest"])


PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "a mode": (resized, lambda: resized("area")),
    "a number": (lambda: ScaleIntensityd("a", 0.0, 1.0), lambda: ScaleIntensityd("a", 0.0, 2.0)),
    "a type": (lambda: LoadImaged("a", dtype=np.float32), lambda: LoadImaged("a", dtype=np.uint8)),
    "a reader": (lambda: LoadImaged("a", "PILReader"), lambda: LoadImaged("a", "NumpyReader")),
    "a spacing": (lambda: Spacingd("a", (1, 1, 1)), lambda: Spacingd("a", (1, 1, 2))),
    "a lambda": (lambda: Lambdad("a", lambda x: x + 1), lambda: Lambdad("a", lambda x: x + 2)),
    "a partial": (lambda: functools.partial(max, 1), lambda: functools.partial(max, 2)),
    "an array": (lambda: np.arange(3), lambda: np.arange(3)[::-1]),
    "a type of array": (lambda: np.zeros(3, "f4"), lambda: np.zeros(3, "i4")),
    "a tensor": (lambda: torch.arange(3), lambda: torch.arange(1, 4)),
    "the order": (
        lambda: Compose([resized(), LoadImaged("a")]),
        lambda: Compose([LoadImaged("a"), resized()]),
    ),
    "one and true": (lambda: {"a": "1"}, lambda: {"a": 1}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equal_settings_have_one_digest_and_others_another(name: str) -> None:
    one, other = PAIRS[name]
    assert digest(one()) == digest(one())
    assert digest(one()) != digest(other())


def adding(number: int) -> Callable[[int], int]:
    return lambda value: value + number


def test_what_a_function_remembers_is_a_setting() -> None:
    assert digest(adding(1)) == digest(adding(1))
    assert digest(adding(1)) != digest(adding(2))


def test_equal_text_is_equal_wherever_it_is_kept() -> None:
    """MONAI's `pickle_hashing` tells one string used twice from two equal strings."""
    text = "x" * 30
    assert digest({"a": text, "b": text}) == digest({"b": "".join(["x"] * 30), "a": text})


def test_use_is_no_setting() -> None:
    chain = Compose([resized(), RandFlipd(["image", "label"], prob=0.5)])
    before = digest(chain)
    chain.set_random_state(7)
    chain({"image": torch.ones(1, 8, 8), "label": torch.ones(1, 8, 8)})
    assert digest(chain) == before


def test_another_process_finds_the_same_digest() -> None:
    code = (
        "import functools, json\n"
        "from pipeline.data.transform_settings import digest\n"
        "settings = [functools.partial(json.dumps, indent=2), {'x', 'y', 'z'}]\n"
        "print(digest(settings))\n"
    )
    run = [sys.executable, "-W", "ignore", "-c", code]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    settings = [functools.partial(json.dumps, indent=2), {"x", "y", "z"}]
    assert done.stdout == digest(settings) + "\n"


def test_an_edit_of_a_transform_is_another_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for place, body in enumerate(("1", "1", "2")):
        path = tmp_path / f"{place}.py"
        path.write_text(f"class Own:\n    def __call__(self): return {body}\n")
        spec = importlib.util.spec_from_file_location("own", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "own", module)
        spec.loader.exec_module(module)
        found.append(digest(module.Own()))
    assert found[0] == found[1] != found[2]


def test_an_object_without_settings_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="shows no settings"):
        digest([object()])
