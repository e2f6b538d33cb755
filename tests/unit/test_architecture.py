"""The walls of the house, read from the source with `ast`."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pipeline"

# A room imports rooms with a lower number, and itself.
LEVELS = {
    "errors": 0,
    "data": 1,
    "hardware": 2,
    "training": 3,
    "inference": 3,
    "report": 3,
    "oct": 4,
    "fundus": 4,
    "vesuvius": 4,
    "classification": 4,
    "configs": 5,
    "definitions": 5,
    "running_config": 5,
    "commands": 5,
    "network_files": 5,
    "reports": 5,
    "training_plan": 6,
    "arguments": 6,
    "resolving": 6,
    "terminal": 7,
    "examples": 7,
    "bundles": 7,
    "crossvalidation": 8,
    "demo": 8,
    "dry_run": 8,
    "exporting": 8,
    "bundle_verbs": 9,
    "data_verbs": 9,
    "cli": 10,
    "__main__": 11,
}
DOMAINS = frozenset(room for room, level in LEVELS.items() if level == LEVELS["fundus"])

# Where a page for a person may be printed, and where the last door turns any error into one line.
SPEAKS = frozenset({"pipeline.cli"})
# MLflow speaks with databases and stores of any make, whose errors have no common kind.
FOREIGN = frozenset({"pipeline.training.tracking"})

HEAVY = frozenset(
    {"h5py", "ignite", "matplotlib", "monai", "nibabel", "numpy", "scipy", "skimage"}
    | {"cc3d", "numba", "tensorboard", "torch", "zarr"}
)
NUMPY_ONLY = (
    "errors.py",
    "data/**/*.py",
    "report/**/*.py",
    "hardware/compilation.py",
    "fundus/fov.py",
    "fundus/metrics.py",
    "fundus/morphometry.py",
    "fundus/phantom*.py",
    *(
        f"classification/{name}.py"
        for name in (
            "block_splits",
            "cases",
            "class_names",
            "metrics",
            "phantom*",
            "pictures",
        )
    ),
    *(
        f"vesuvius/{name}.py"
        for name in (
            "betti_numbers",
            "defects",
            "merge_sweeps",
            "metrics",
            "phantom*",
            "relative_cycles",
            "row_sets",
            "surface_distance",
            "topology*",
            "tunnel_cycles",
            "variation_of_information",
        )
    ),
    *(
        f"oct/{name}.py"
        for name in (
            "coordinates",
            "formats",
            "frames",
            "hdf5_*",
            "heyex_vol",
            "image_folders",
            "logits",
            "mask_metrics",
            "mat_files",
            "metrics",
            "optional_readers",
            "ordered_map",
            "phantom*",
            "pictures",
            "pixel_maps",
            "prediction_*",
            "risk_coverage",
            "row_checks",
            "tables",
            "viterbi",
            "volume",
        )
    ),
)
# These are MONAI's readers, transforms and datasets, or pack what those make.
NEEDS_TORCH = frozenset(
    f"pipeline.data.{name}"
    for name in ("cached_items", "crops", "persistent_cache", "readers", "transform_settings")
)

VAGUE = frozenset({"utils", "util", "helpers", "helper", "common", "misc", "manager"})
BROAD = frozenset({"Exception", "BaseException"})


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in SOURCES.items()}


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported_at_once(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the import statements that importing the module executes."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                if field != "body" or not is_type_checking(node):
                    yield from imported_at_once(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from imported_at_once(handler.body)


def names_imported(module: str, statement: ast.stmt) -> Iterator[str]:
    """Yield the absolute names in an import statement; `from a import b` gives `a` and `a.b`."""
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
    elif isinstance(statement, ast.ImportFrom):
        parts = module.split(".")
        if SOURCES[module].name == "__init__.py":
            parts.append("__init__")
        base = parts[: -statement.level] if statement.level else []
        origin = ".".join([*base, *filter(None, [statement.module])])
        yield origin
        yield from (f"{origin}.{alias.name}" for alias in statement.names)


def every_import(module: str) -> set[str]:
    statements = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.stmt)]
    return {name for statement in statements for name in names_imported(module, statement)}


def room_of(module: str) -> str | None:
    """Return the room of a name in the package; None for the package itself and for others."""
    parts = module.split(".")
    return parts[1] if parts[0] == "pipeline" and len(parts) > 1 else None


def loaded_by(module: str) -> set[str]:
    """Return the top-level packages that importing `module` loads, through our own modules too."""
    packages: set[str] = set()
    waiting, seen = [module], set()
    while waiting:
        current = waiting.pop()
        if current in seen or current not in TREES:
            continue
        seen.add(current)
        parts = current.split(".")
        waiting += [".".join(parts[:depth]) for depth in range(1, len(parts))]
        for statement in imported_at_once(TREES[current].body):
            for name in names_imported(current, statement):
                packages.add(name.split(".")[0])
                waiting.append(name)
    return packages


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down_only(module: str) -> None:
    room = room_of(module)
    if room is None:
        targets = {room_of(name) for name in every_import(module)} - {None}
        assert not targets, "pipeline/__init__.py imports no room"
        return
    assert room in LEVELS, f"{room} is a new room: give it a level in LEVELS, and its reason a note"
    above = sorted(
        name
        for name in every_import(module)
        if (target := room_of(name)) in LEVELS
        and target != room
        and LEVELS[str(target)] >= LEVELS[room]
    )
    assert not above, f"{module} (level {LEVELS[room]}) imports {above}"


def numpy_only_modules() -> list[str]:
    paths = {path for pattern in NUMPY_ONLY for path in PACKAGE.glob(pattern)}
    return sorted({module_name(path) for path in paths} - NEEDS_TORCH)


@pytest.mark.parametrize("module", numpy_only_modules())
def test_a_numpy_only_module_loads_no_torch(module: str) -> None:
    assert not loaded_by(module) & {"torch", "monai", "ignite"}


@pytest.mark.parametrize("module", [name for name in SOURCES if SOURCES[name].stem == "__init__"])
def test_a_room_loads_nothing_heavy_before_it_is_used(module: str) -> None:
    own = {
        name.split(".")[0]
        for statement in imported_at_once(TREES[module].body)
        for name in names_imported(module, statement)
    }
    assert not own & HEAVY


@pytest.mark.parametrize("module", ["pipeline", "pipeline.cli"])
def test_the_door_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(name for name in sys.modules if '.' not in name))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not set(run.stdout.split()) & HEAVY


@pytest.mark.cli
def test_help_takes_less_than_half_a_second_of_cpu() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "pipeline", "--help"]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize("module", [name for name in SOURCES if name not in SPEAKS])
def test_only_the_command_line_prints(module: str) -> None:
    lines = [
        node.lineno
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not lines


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_is_checked_by_assert(module: str) -> None:
    lines = [node.lineno for node in ast.walk(TREES[module]) if isinstance(node, ast.Assert)]
    assert not lines, "`python -O` drops assert statements: raise an error that says what to do"


def catches_everything(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(kind, ast.Name) and kind.id in BROAD for kind in kinds)


@pytest.mark.parametrize("module", [name for name in SOURCES if name not in SPEAKS | FOREIGN])
def test_no_handler_swallows_every_error(module: str) -> None:
    """Catching everything is for cleaning up and raising again."""
    lines = [
        node.lineno
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.ExceptHandler)
        and catches_everything(node)
        and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
    ]
    assert not lines


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_is_named_for_what_it_does(module: str) -> None:
    assert not set(module.split(".")) & VAGUE


def bundle_configs() -> list[Path]:
    return sorted(ROOT.glob("bundles/*/configs/*.yaml"))


def targets_in(config: object) -> Iterator[str]:
    if isinstance(config, dict):
        target = config.get("_target_")
        if isinstance(target, str):
            yield target
        for value in config.values():
            yield from targets_in(value)
    elif isinstance(config, list):
        for value in config:
            yield from targets_in(value)


@pytest.mark.parametrize("path", bundle_configs(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_bundle_builds_from_pipeline_monai_and_torch_alone(path: Path) -> None:
    dotted = {name for name in targets_in(yaml.safe_load(path.read_text("utf-8"))) if "." in name}
    computed = {name for name in dotted if name.startswith(("$", "@", "%"))}
    assert {name.split(".")[0] for name in dotted - computed} <= {
        "ignite",
        "monai",
        "pipeline",
        "torch",
    }


@pytest.mark.parametrize("bundle", sorted(path.name for path in ROOT.glob("bundles/*/")))
def test_a_bundle_enters_one_domain_room_at_most(bundle: str) -> None:
    texts = [path.read_text("utf-8") for path in bundle_configs() if path.parts[-3] == bundle]
    assert len({room for room in DOMAINS if any(f"pipeline.{room}" in text for text in texts)}) <= 1


def test_bundles_hold_no_python() -> None:
    assert not sorted(ROOT.glob("bundles/**/*.py"))
