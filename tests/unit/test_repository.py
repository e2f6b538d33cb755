"""What a reader and a release rely on: the files at the root, and what they promise each other."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
VERSION: str = PYPROJECT["project"]["version"]
BUNDLES = sorted(path.parent.parent for path in ROOT.glob("bundles/*/configs/metadata.json"))
MAX_FILE_BYTES = 5_000_000
# The text as the Apache Software Foundation publishes it.
APACHE_2_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def files_of_the_repository() -> list[Path]:
    """Return what git tracks or would track; skip where this is no checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in run.stdout.split("\0") if name)
    return sorted(path for path in paths if path.is_file())


def texts_of_the_repository() -> dict[Path, str]:
    found = {}
    for path in files_of_the_repository():
        content = path.read_bytes()
        if b"\0" not in content:
            found[path] = content.decode("utf-8")
    return found


def test_no_large_file_is_tracked() -> None:
    large = [path for path in files_of_the_repository() if path.stat().st_size > MAX_FILE_BYTES]
    assert large == []


def test_text_files_end_with_one_line_break() -> None:
    bad = [
        str(path.relative_to(ROOT))
        for path, text in texts_of_the_repository().items()
        if text and (not text.endswith("\n") or text.endswith("\n\n"))
    ]
    assert bad == []


def test_no_file_names_a_folder_of_one_machine() -> None:
    own = re.compile(r"(?<![\w.*~}])/(?:home|root|Users|work)/\w")
    bad = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path, text in texts_of_the_repository().items()
        if (match := own.search(text)) and path != Path(__file__).resolve()
    ]
    assert bad == []


def test_nothing_is_left_to_do_in_the_package() -> None:
    note = re.compile(r"\b(?:TODO|FIXME|XXX)\b")
    bad = [path for path in ROOT.glob("pipeline/**/*.py") if note.search(path.read_text("utf-8"))]
    assert bad == []


def test_the_licence_is_the_whole_apache_2_text() -> None:
    text = (ROOT / "LICENSE").read_bytes()
    assert hashlib.sha256(text).hexdigest() == APACHE_2_SHA256
    assert PYPROJECT["project"]["license"] == "Apache-2.0"


def test_the_changelog_names_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(rf"^## \[{re.escape(VERSION)}\]", changelog, re.MULTILINE)


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_the_changelog_names_the_version_of_each_bundle(bundle: Path) -> None:
    version = json.loads((bundle / "configs" / "metadata.json").read_text("utf-8"))["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(rf"`{bundle.name}` {re.escape(version)}\b", changelog)


def test_the_citation_names_the_version_and_the_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert str(citation["version"]) == VERSION
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_the_package_is_typed() -> None:
    assert (ROOT / "pipeline" / "py.typed").is_file()


@pytest.mark.parametrize("folder", ["bundles", "data_manifests"])
def test_the_wheel_carries_the_folder(folder: str) -> None:
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert folder in wheel["only-include"]
    assert wheel["sources"][folder] == f"pipeline/_shipped/{folder}"
    assert (ROOT / folder).is_dir()


def test_nothing_that_is_shipped_is_ignored_by_git() -> None:
    """The build leaves out what git ignores, weights included."""
    shipped = [*ROOT.glob("bundles/*/models/*"), *ROOT.glob("data_manifests/*")]
    kept = {path for path in shipped if path.name != "backend_cache"}  # made by exported networks
    missing = sorted(kept - set(files_of_the_repository()))
    assert missing == []


@pytest.mark.parametrize("target", ["demo", "test", "check", "bench", "setup"])
def test_make_knows_the_target(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert re.search(rf"^{target}: \$\(STAMP\)", makefile, re.MULTILINE)


def test_the_continuous_check_is_make_check() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text("utf-8").rstrip().endswith("\nmake check")


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/workflows/*.yml")), ids=lambda p: p.name)
def test_a_workflow_reads_as_yaml_and_may_only_read(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text("utf-8"))
    assert workflow["jobs"]
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("bundles/*/")), ids=lambda path: path.name)
def test_a_bundle_has_a_licence_and_says_what_the_terms_of_its_data_are(path: Path) -> None:
    expected = ["LICENSE", "docs/README.md", "docs/data_license.txt"]
    assert [name for name in expected if not (path / name).is_file()] == []


def test_documents_link_to_files_that_exist() -> None:
    link = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in files_of_the_repository()
        if path.suffix == ".md"
        for target in link.findall(path.read_text("utf-8"))
        if not (path.parent / target).exists()
    ]
    assert broken == []
