"""One list of dependencies: what the other files say must follow from pyproject.toml."""

from __future__ import annotations

import importlib.metadata as metadata
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CONDA: dict[str, Any] = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
PIN_LINES = [
    line
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    if line and not line.startswith("#")
]
PINS = {canonicalize_name(name): version for name, version in (p.split("==") for p in PIN_LINES)}


def pip_lines() -> list[str]:
    (nested,) = [item for item in CONDA["dependencies"] if isinstance(item, dict)]
    assert list(nested) == ["pip"]
    return list(nested["pip"])


def requirements(*extras: str) -> list[Requirement]:
    """Return the direct requirements, `lamina[...]` inside an extra taken apart."""
    found = [Requirement(text) for text in PROJECT["dependencies"]]
    for extra in extras:
        for text in PROJECT["optional-dependencies"][extra]:
            requirement = Requirement(text)
            if canonicalize_name(requirement.name) == PROJECT["name"]:
                found += requirements(*requirement.extras)
            else:
                found.append(requirement)
    return found


DIRECT = {str(requirement): requirement for requirement in requirements("all")}


def test_conda_brings_python_and_pip_alone() -> None:
    names = [re.split("[=<>]", item)[0] for item in CONDA["dependencies"] if isinstance(item, str)]

    assert names == ["python", "pip"]


def test_the_python_of_conda_is_one_the_project_admits() -> None:
    (pin,) = [item for item in CONDA["dependencies"] if str(item).startswith("python=")]

    assert f"{pin.removeprefix('python=')}.0" in SpecifierSet(PROJECT["requires-python"])


def test_conda_takes_nothing_from_the_defaults_channel() -> None:
    assert CONDA["channels"] == ["conda-forge", "nodefaults"]


def test_the_pip_half_is_one_editable_install_with_extras_that_exist() -> None:
    (line,) = pip_lines()
    match = re.fullmatch(r"-e \.\[([a-z,]+)\]", line)

    assert match is not None, line
    assert set(match[1].split(",")) <= set(PROJECT["optional-dependencies"])


def test_the_set_up_installs_the_pip_half_of_the_environment() -> None:
    script = (ROOT / ".ci" / "setup").read_text("utf-8")
    (line,) = pip_lines()
    path = line.removeprefix("-e ")

    assert re.findall(r"-e '([^']+)'", script) == [path]


def test_all_holds_what_the_tests_need() -> None:
    assert {str(requirement) for requirement in requirements("dev")} <= set(DIRECT)


@pytest.mark.parametrize("text", sorted(DIRECT))  # extras come in any order
def test_a_dependency_has_a_lower_bound_and_a_pin_within_its_bounds(text: str) -> None:
    requirement = DIRECT[text]
    version = PINS[canonicalize_name(requirement.name)]

    assert any(specifier.operator == ">=" for specifier in requirement.specifier)
    assert version in requirement.specifier


def test_pins_are_exact_sorted_and_free_of_build_labels() -> None:
    assert [line for line in PIN_LINES if not re.fullmatch(r"[\w.-]+==[\w.!]+", line)] == []
    assert sorted(PIN_LINES, key=str.lower) == PIN_LINES


@pytest.mark.parametrize(("name", "version"), [("torch", "2.13.0"), ("monai", "1.6.1")])
def test_the_stack_is_the_one_that_was_measured(name: str, version: str) -> None:
    assert PINS[canonicalize_name(name)] == version


def required_by_installed(requirements_: list[Requirement]) -> set[str]:
    """Return the names of everything the requirements bring in this environment."""
    waiting = [(requirement, "") for requirement in requirements_]
    names: set[str] = set()
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        names.add(name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                brought = metadata.distribution(name).requires or []
                waiting += [(Requirement(text), wanted) for text in brought]
    return names


def test_every_indirect_dependency_is_pinned() -> None:
    brought = required_by_installed(requirements("all"))
    # torch pins the parts of a CUDA build itself, each to one version.
    ours = {name for name in brought if not name.startswith(("nvidia-", "cuda-", "triton"))}

    assert ours - set(PINS) == set()


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11) or sys.platform != "linux",
    reason="constraints.txt is made on Python 3.11 for Linux",
)
def test_nothing_is_pinned_that_nobody_needs() -> None:
    assert set(PINS) - required_by_installed(requirements("all")) == set()
