"""What a result is made from, as its sidecar says it, and whether that still holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.data.checksums import file_sha256, text_sha256
from pipeline.errors import ConfigurationError, InputError
from pipeline.hardware.environment import package_versions

__all__ = ["Identity", "Origins", "path_sha256", "read_sidecar"]

Identity = Literal["content", "listing"]

_PACKAGES = ("lamina", "torch", "monai")  # another version of these makes another result


class Origins:
    """What the results of a run are made from: inputs, model, settings and versions.

    Args:
        settings: plain data that determines the results.
        model_path: the checkpoint file; None where no model is at work.
        files: keys of a case under which paths of further files stand that determine its result,
            such as a mask; an absent or empty one is no file.
        identity: what `path_sha256` looks at.

    Raises:
        ConfigurationError: no such identity.
        InputError: the model cannot be read.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        model_path: str | None = None,
        files: Sequence[str] = (),
        identity: Identity = "content",
    ) -> None:
        if identity not in ("content", "listing"):
            raise ConfigurationError(f"identity must be content or listing, got {identity!r}")
        self.files = tuple(files)
        self.identity: Identity = identity
        self.versions = package_versions(_PACKAGES)
        text = json.dumps(dict(settings), sort_keys=True, default=str)
        self.of_the_run = {
            "identity": identity,
            "model_sha256": None if model_path is None else file_sha256(model_path),
            "settings_sha256": text_sha256(text),
        }

    def __call__(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the result of `case` is made from, for its sidecar.

        Raises:
            InputError: one of its files cannot be read.
        """
        hashes = self._hashes(case)
        return {"input": str(case["image"]), **hashes, **self.of_the_run, "versions": self.versions}

    def match(self, sidecar: Mapping[str, Any], case: Mapping[str, Any]) -> bool:
        """Return whether a sidecar tells of the result that `case` would have.

        Where the input lies does not count, nor how torch was built (`+cpu`, `+cu130`). The input
        is read only where everything else agrees.

        Raises:
            InputError: one of its files cannot be read.
        """
        found = sidecar.get("versions")
        if not isinstance(found, Mapping) or _releases(found) != _releases(self.versions):
            return False
        if any(sidecar.get(key) != value for key, value in self.of_the_run.items()):
            return False
        return all(sidecar.get(key) == value for key, value in self._hashes(case).items())

    def _hashes(self, case: Mapping[str, Any]) -> dict[str, Any]:
        beside = {key: str(case[key]) for key in self.files if case.get(key)}
        return {
            "input_sha256": path_sha256(str(case["image"]), self.identity),
            "beside_sha256": {k: path_sha256(path, self.identity) for k, path in beside.items()},
        }


def path_sha256(path: Path | str, identity: Identity = "content") -> str:
    """Return one number for a file, or for a folder that is one input, such as a Zarr store.

    Args:
        path: the file or folder.
        identity: `content`: a file's SHA-256; of a folder that of its files' names and SHA-256s,
            sorted by name. `listing`: the SHA-256 of names, sizes and times of change, for inputs
            too large to be read for this alone; moving or copying them may change it.

    Returns:
        Hexadecimal digits.

    Raises:
        InputError: it cannot be read, or is an empty folder.
    """
    path = Path(path)
    try:
        if identity == "content" and not path.is_dir():
            return file_sha256(path)
        files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        lines = [
            f"{file.relative_to(path).as_posix()!a} {_file_line(file, identity)}\n"
            for file in files
        ]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if not lines:
        raise InputError(f"{path}: an empty folder, expected an image or a volume")
    return text_sha256("".join(lines))


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """Return what a sidecar says, None where it is absent, cut short or none of ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and isinstance(found.get("row"), dict)
    return found if whole and isinstance(found.get("results"), list) else None


def _file_line(file: Path, identity: Identity) -> str:
    if identity == "content":
        return file_sha256(file)
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _releases(versions: Mapping[str, Any]) -> list[str]:
    return [str(versions.get(name)).partition("+")[0] for name in _PACKAGES]
