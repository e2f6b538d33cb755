"""Every command in the documents is one that the program, MONAI or make would take.

Verb, bundle, overlays, ids, manifests, files and targets are looked up with the program's own
parser and key check, without running anything; what is cheap is run.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.arguments import parser, split_overrides
from pipeline.bundles import bundle_configs, bundle_names, find_bundle_root, prepare_run
from pipeline.cli import main
from pipeline.configs import check_overrides, parse_value, read_config
from pipeline.data.manifests import load_manifest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bundles/*/docs/*.md")]
)
WORKFLOWS = {
    "train": "train", "demo": "train", "evaluate": "evaluate",
    "predict": "inference", "ensemble": "inference", "export": "inference",
}  # fmt: skip
RUN = {"doctor", "data list"}  # verbs that need no data and no network
MONAI_OPTIONS = {"config_file", "meta_file", "logging_file", "tracking"}
OTHER_PROGRAMS = {
    "cd",
    "conda",
    "export",
    "git",
    "pip",
    "ssh",
    "tensorboard",
    ".venv/bin/pre-commit",
}
OTHER_OPTIONS = {"shutdown-timeout", "gpus-per-task"}  # of torchrun and Slurm
LAUNCHED = re.compile(r"^(?:torchrun|srun) .*? -m (?=pipeline|monai)")
FORM = re.compile(r"\b(BUNDLE|VERB)\b|^python -m (pipeline|monai\.bundle run)$")  # not a command


@dataclass(frozen=True)
class Command:
    """A command line of a document."""

    document: Path
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}: {self.text}"

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def home(self) -> Path:
        """Where its relative files are: a bundle's for the page of a bundle, else the root's."""
        inside = "bundles" in self.document.relative_to(ROOT).parts
        return self.document.parents[1] if inside else ROOT


def fenced(text: str) -> list[tuple[str, str]]:
    """Return language and content of the fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def indented(text: str) -> list[str]:
    """Return the lines of the indented blocks, which follow an empty line and are in no list."""
    found, inside, before = [], False, ""
    for line in re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines():
        inside = line.startswith("    ") and (inside or not before.strip())
        found += [line[4:]] if inside else []
        before = line
    return found


def command_lines(text: str) -> list[str]:
    """Return the command lines of a document: of its blocks, and those told in the text.

    What a launcher starts stands for the whole line; scripts of a shell are left out.
    """
    blocks = [content for language, content in fenced(text) if language in ("bash", "sh")]
    blocks = [content for content in blocks if not content.startswith("#!")]
    lines = "\n".join([*indented(text), *blocks]).replace("\\\n", " ").splitlines()
    whole = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    told = re.findall(r"`((?:python -m|python benchmarks/|make |torchrun )[^`]+)`", text)
    whole += [line for line in told if not FORM.search(line)]
    return [LAUNCHED.sub("python -m ", " ".join(line.split())).rstrip("'") for line in whole]


COMMANDS = [
    Command(path, line) for path in DOCUMENTS for line in command_lines(path.read_text("utf-8"))
]


def of(*start: str) -> list[Any]:
    """Return the commands that begin so, as parameters of a test."""
    chosen = [command for command in COMMANDS if command.words[: len(start)] == [*start]]
    return [pytest.param(command, id=str(command)) for command in dict.fromkeys(chosen)]


def parsed(command: Command) -> tuple[Namespace, dict[str, Any]]:
    arguments, overrides = split_overrides(command.words[3:])
    return parser().parse_args(arguments), overrides


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_documents_have_commands_of_every_kind() -> None:
    """Or the tests below would test nothing."""
    assert len(of("python", "-m", "pipeline")) > 50
    assert len(of("python", "-m", "monai.bundle")) > 10
    assert len(of("make")) > 5


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    tested = {("python", "-m", "pipeline"), ("python", "-m", "monai.bundle")}
    programs = {"make", *OTHER_PROGRAMS}
    unknown = [
        str(command)
        for command in COMMANDS
        if (words := command.words)[0] not in programs
        and tuple(words[:3]) not in tested
        and not (words[0] == "python" and (ROOT / words[1]).is_file())
    ]
    assert unknown == []


@pytest.mark.parametrize("command", of("python", "-m", "pipeline"))
def test_the_program_takes_the_command(command: Command) -> None:
    try:
        options, overrides = parsed(command)
    except SystemExit as refused:
        pytest.fail(f"{command}: refused with {refused.code}")
    settings = {key: value for key, value in overrides.items() if value != "all"}
    if options.verb in WORKFLOWS:
        overlays = getattr(options, "overlays", ["quick"] if options.verb == "demo" else [])
        prepare_run(options.bundle, WORKFLOWS[options.verb], overlays, settings)
    manifest = overrides.get("manifest", getattr(options, "manifest", None))
    if manifest is not None and not manifest.endswith(".yaml"):  # of the reader's own
        load_manifest(manifest)


@pytest.mark.parametrize("command", of("python", "-m", "monai.bundle"))
def test_monai_takes_the_command(command: Command) -> None:
    words = command.words[3:]
    assert words.pop(0) == "run"
    id = words.pop(0) if not words[0].startswith("--") else "run"
    settings = dict(zip(words[::2], map(parse_value, words[1::2]), strict=True))
    settings = {key.removeprefix("--"): value for key, value in settings.items()}
    files = settings["config_file"]
    config = read_config(
        [command.home / file for file in ([files], files)[isinstance(files, list)]]
    )
    check_overrides(config, {k: v for k, v in settings.items() if k not in MONAI_OPTIONS})
    assert id in config


@pytest.mark.parametrize("command", of("make"))
def test_make_has_the_target_and_the_variables(command: Command) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for word in command.words[1:]:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} \?=" if is_variable else rf"^{name}:"
        assert re.search(pattern, makefile, re.MULTILINE), word


@pytest.mark.parametrize(
    "command", [command for command in of("python") if "benchmarks/" in command.values[0].text]
)
def test_the_benchmark_has_the_options(command: Command) -> None:
    script = (ROOT / command.words[1]).read_text("utf-8")
    options = [word for word in command.words[2:] if word.startswith("--")]
    assert [option for option in options if f'"{option}"' not in script] == []


@pytest.mark.parametrize("verb", sorted(RUN))
def test_the_command_runs(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert any(c.text == f"python -m pipeline {verb}" for c in COMMANDS)
    assert main(verb.split()) == 0
    assert capsys.readouterr().out.strip()


PYTHON = [
    pytest.param(content, id=f"{path.relative_to(ROOT)}: {content.splitlines()[0]}")
    for path in DOCUMENTS
    for language, content in fenced(path.read_text("utf-8"))
    if language == "python"
]


@pytest.mark.parametrize("text", PYTHON)
def test_python_code_is_python_and_imports_what_there_is(text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline"):
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_python_code_of_the_readme_runs() -> None:
    from pipeline.fundus.phantom import fundus_phantom

    codes = [
        code for kind, code in fenced((ROOT / "README.md").read_text("utf-8")) if kind == "python"
    ]
    assert codes
    photograph = fundus_phantom(seed=1, size_px=(96, 128)).image
    for code in codes:
        names: dict[str, Any] = {"photograph": photograph}
        exec(code, names)
        assert names["result"]["mask"].shape == photograph.shape[:2]


@pytest.mark.parametrize("name", bundle_names())
def test_a_bundle_is_told_of(name: str) -> None:
    for document in ("README.md", "CHANGELOG.md"):
        assert f"`{name}`" in (ROOT / document).read_text("utf-8"), document


@pytest.mark.parametrize("name", bundle_names())
def test_the_page_of_a_bundle_names_its_overlays(name: str) -> None:
    text = (Path(find_bundle_root(name)) / "docs" / "README.md").read_text("utf-8")
    assert [
        overlay for overlay in bundle_configs(name)["overlays"] if f"`{overlay}`" not in text
    ] == []


@pytest.mark.parametrize("name", bundle_names())
def test_options_told_in_the_page_of_a_bundle_are_its_ids(name: str) -> None:
    text = (Path(find_bundle_root(name)) / "docs" / "README.md").read_text("utf-8")
    told = {word for code in re.findall(r"`(--[^`]+)`", text) for word in code.split()}
    ids = {word.removeprefix("--").partition("=")[0] for word in told if word.startswith("--")}
    configs = bundle_configs(name)
    config = read_config([configs["train"], configs["evaluate"]]) | read_config(
        configs["inference"]
    )
    tops = {id.removeprefix("+").partition("::")[0] for id in ids}
    assert sorted(top for top in tops - OTHER_OPTIONS if top not in config) == []


def test_the_readme_names_every_verb() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    actions = next(a for a in parser()._actions if a.choices)  # argparse has no public way
    assert [verb for verb in actions.choices or () if f"`{verb}`" not in text] == []
