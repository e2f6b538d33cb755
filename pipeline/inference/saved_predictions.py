"""Ensembles of predictions that are on disk already."""

from __future__ import annotations

import fnmatch
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from pipeline.data.atomic import (
    atomic_path,
    check_free_bytes,
    check_writable,
    write_csv,
    write_json,
)
from pipeline.data.checksums import file_sha256
from pipeline.data.images import read_header, read_image
from pipeline.data.rasters import ImageHeader
from pipeline.data.volumes import open_volume
from pipeline.data.writers import check_result_paths, result_path, write_png
from pipeline.errors import ConfigurationError, InputError, InputErrors, Problem
from pipeline.hardware.environment import package_versions
from pipeline.inference.averages import Domain, check_domain, normalised_weights

__all__ = ["average_predictions"]

logger = logging.getLogger(__name__)

_SUFFIXES = (".png", ".tif", ".tiff")
_CLASSIC_TIFF_BYTES = 2**32 - 2**25  # offsets of 32 bits reach no further


def average_predictions(
    folders: Sequence[Path | str],
    output: Path | str,
    weights: Sequence[float] | None = None,
    domain: Domain = "probability",
    files: str = "*_probability.*",
) -> list[Path]:
    """Write the mean of the probabilities that several runs wrote for the same inputs.

    Files of one relative name belong together. Their probability is a float between 0 and 1, or a
    whole number of which the largest of its type (255, 65535) is 1; the mean is written in the same
    type and format. A stack is read and written plane by plane. A file that is missing or differs
    in one of the folders is left out and listed in `failures.csv`, the others are done.

    Beside each result stands a sidecar, as inference writes it: the sha256 of what it was made
    from, settings and version.

    Args:
        folders: what the runs wrote.
        output: where the means go, with the folders' own structure; in none of them.
        weights: one per folder; None: all count the same. What has weight 0 must be there as well.
        domain: the mean of the `probability` or of its `logit`. For the latter 0 and 1 count as
            half a step from it (a 131070th in uint16; 2**-25 in float32).
        files: which PNG and TIFF files are predictions, as a pattern of their names.

    Returns:
        The files written.

    Raises:
        ConfigurationError: folders, weights or domain that make no sense.
        InputErrors: files were left out; everything else is done.
        InputError: a folder or every file is missing.
        ResourceError: the output cannot be written.
    """
    check_domain(domain)
    sources = _checked_folders(folders, Path(output))
    shares = normalised_weights(weights, len(sources))
    names = _names(sources, files)
    check_result_paths(names, ".")
    target = check_writable(Path(output))
    started = time.monotonic()
    written, problems = [], []
    for name in names:
        try:
            written.append(_average_file(name, sources, target, shares, domain))
        except InputError as error:
            logger.warning("left out: %s: %s", name, error)
            problems.append(Problem(name, "read", str(error)))
    rows = [vars(problem) for problem in problems]
    write_csv(target / "failures.csv", rows, columns=["path", "stage", "code", "message"])
    logger.info(
        "%s: %d predictions of %d folders averaged, %d left out, in %.1f s", target, len(written),
        len(sources), len(problems), time.monotonic() - started,
    )  # fmt: skip
    if problems:
        raise InputErrors(problems, f"of {len(names)} predictions left out, the rest is done")
    return written


def _checked_folders(folders: Sequence[Path | str], output: Path) -> list[Path]:
    if isinstance(folders, str) or not folders:
        raise ConfigurationError(f"folders must be a list of at least one folder, got {folders!r}")
    sources = [Path(folder) for folder in folders]
    if missing := [str(folder) for folder in sources if not folder.is_dir()]:
        raise InputError(f"{', '.join(missing)}: no such folder, expected one with predictions")
    if len({folder.resolve() for folder in sources}) < len(sources):
        raise ConfigurationError(
            f"a folder is given twice: {', '.join(map(str, sources))}; use weights instead"
        )
    for folder in sources:
        if output.resolve().is_relative_to(folder.resolve()):
            raise ConfigurationError(
                f"{output}: lies in {folder}, whose predictions are averaged; choose another output"
            )
    return sources


def _names(sources: Sequence[Path], files: str) -> list[str]:
    """Return the relative names, with `/`, of all predictions in any of the folders."""
    found = {
        path.relative_to(folder).as_posix()
        for folder in sources
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES
        and fnmatch.fnmatchcase(path.name, files)
        and not path.name.startswith(".")  # what a killed run left
        and path.is_file()
    }
    if not found:
        raise InputError(
            f"{', '.join(map(str, sources))}: no PNG or TIFF named {files}; "
            "run inference with save_probability, or give the names by `files`"
        )
    return sorted(found)


def _average_file(
    name: str, sources: Sequence[Path], target: Path, shares: Sequence[float], domain: Domain
) -> Path:
    """Average the files `name` of all folders; return the file written."""
    paths = [folder / name for folder in sources]
    if absent := [str(path) for path in paths if not path.is_file()]:
        raise InputError(f"not found: {', '.join(absent)}; expected a prediction in every folder")
    header = _common_header(paths)
    mean = _Mean(header.dtype, paths, shares, domain)
    result, sidecar = target / name, result_path(name, ".", target, ".json")
    hashes = [file_sha256(path) for path in paths]
    sidecar.unlink(missing_ok=True)  # an old one must not vouch for a result half overwritten
    check_free_bytes(target, header.decoded_bytes)
    with ExitStack() as stack:
        if len(header.shape) == 3:
            volumes = [stack.enter_context(open_volume(path)) for path in paths]
            cuts = (slice(z, z + 1) for z in range(header.shape[0]))
            _write_tiff(result, header, (mean(v[cut][0] for v in volumes) for cut in cuts))
        elif header.format == "tiff":
            _write_tiff(result, header, [mean(map(read_image, paths))])
        else:
            write_png(result, mean(map(read_image, paths)))
    write_json(
        sidecar,
        {
            "inputs": [str(path) for path in paths],
            "inputs_sha256": hashes,
            "settings": {"weights": list(shares), "domain": domain},
            "lamina": package_versions(("lamina",))["lamina"] or "not installed",
            "shape": list(header.shape),
            "dtype": str(header.dtype),
            "results": [name],
        },
    )
    return result


def _common_header(paths: Sequence[Path]) -> ImageHeader:
    """Return the header that all the files have."""
    headers = [read_header(path) for path in paths]
    first = headers[0]
    for path, header in zip(paths, headers, strict=True):
        found = (header.shape, header.dtype, header.format)
        if found != (first.shape, first.dtype, first.format):
            raise InputError(
                f"{path}: {header.format} {header.shape} of {header.dtype}, but {paths[0]} is "
                f"{first.format} {first.shape} of {first.dtype}; expected predictions of one kind"
            )
    if first.format not in ("png", "tiff") or first.channels != 1:
        raise InputError(
            f"{paths[0]}: {first.format} with {first.channels} channels, expected a gray PNG or "
            "TIFF of probabilities"
        )
    if first.dtype.kind != "f" and first.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{paths[0]}: {first.dtype}, expected uint8, uint16 or floats")
    return first


def _write_tiff(path: Path, header: ImageHeader, planes: Iterable[NDArray[Any]]) -> None:
    """Write planes as LZW-compressed TIFF as they come."""
    with atomic_path(path) as temporary:
        tifffile.imwrite(
            temporary,
            iter(planes),
            shape=header.shape,
            dtype=header.dtype,
            bigtiff=header.decoded_bytes > _CLASSIC_TIFF_BYTES,
            photometric="minisblack",
            compression="lzw",
            metadata={"axes": "ZYX"[-len(header.shape) :]},
        )


@dataclass(frozen=True)
class _Mean:
    """The weighted mean of stored probabilities, stored again.

    Args:
        dtype: in which they are stored.
        paths: of the files, for messages.
        shares: weights with the sum 1.
        domain: what is averaged.
    """

    dtype: np.dtype[Any]
    paths: Sequence[Path]
    shares: Sequence[float]
    domain: Domain

    def __call__(self, planes: Iterable[NDArray[Any]]) -> NDArray[Any]:
        total: Any = 0.0
        for plane, path, share in zip(planes, self.paths, self.shares, strict=True):
            total = total + share * self._term(plane, path)
        if self.domain == "logit":
            total = 1 / (1 + np.exp(-total))
        if self.dtype.kind != "f":
            total = (total * np.iinfo(self.dtype).max).round()
        stored: NDArray[Any] = total.astype(self.dtype)
        return stored

    def _term(self, plane: NDArray[Any], path: Path) -> NDArray[np.float64]:
        """Return what is summed for a stored plane."""
        values = plane.astype(np.float64)
        if self.dtype.kind != "f":
            values /= np.iinfo(self.dtype).max
        elif not (values.min() >= 0 and values.max() <= 1):  # NaN is neither
            raise InputError(
                f"{path}: values from {values.min():g} to {values.max():g}, "
                "expected probabilities between 0 and 1"
            )
        if self.domain == "probability":
            return values
        values = values.clip(self._half_step, 1 - self._half_step)
        logits: NDArray[np.float64] = np.log(values) - np.log1p(-values)
        return logits

    @property
    def _half_step(self) -> float:
        if self.dtype.kind != "f":
            return 0.5 / float(np.iinfo(self.dtype).max)
        return float(np.finfo(self.dtype).epsneg) / 2
