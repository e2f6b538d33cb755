"""Ensembles of predictions that are on disk already."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from pipeline.data.atomic import atomic_path, check_free_bytes
from pipeline.data.images import read_header, read_image
from pipeline.data.rasters import ImageHeader
from pipeline.data.volumes import open_volume
from pipeline.data.writers import CLASSIC_TIFF_BYTES, write_png
from pipeline.errors import ConfigurationError, InputError
from pipeline.inference.averages import Domain, check_domain, normalised_weights
from pipeline.inference.batch import BatchRun

__all__ = ["average_predictions"]

_SUFFIXES = (".png", ".tif", ".tiff")


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

    It is a `BatchRun`: beside each result stands a sidecar with the sha256 of what it was made
    from, settings and versions; what is there already is left as it is; `summary.json` is last.

    Args:
        folders: what the runs wrote.
        output: where the means go, with the folders' own structure; in none of them.
        weights: one per folder; None: all count the same. What has weight 0 must be there as well.
        domain: the mean of the `probability` or of its `logit`. For the latter 0 and 1 count as
            half a step from it (a 131070th in uint16; 2**-25 in float32).
        files: which PNG and TIFF files are predictions, as a pattern of their names.

    Returns:
        The means that there are now.

    Raises:
        ConfigurationError: folders, weights or domain that make no sense.
        InputErrors: files were left out; everything else is done.
        InputError: a folder or every file is missing.
        ResourceError: the output cannot be written.
    """
    check_domain(domain)
    sources = _checked_folders(folders, Path(output))
    shares = normalised_weights(weights, len(sources))
    cases = [_case(name, sources) for name in _names(sources, files)]
    batch = BatchRun(
        cases,
        str(output),
        settings={"weights": list(shares), "domain": domain},
        model_path=None,
        bundle="average_predictions",
        files=list(cases[0])[2:],
    )

    def average() -> None:
        for case in batch.pending:
            with batch.attempt(case["name"], "read"):
                _average_file(batch, case, shares, domain)

    batch.run(average)
    batch.finish()
    return [batch.output_dir / case["name"] for case in cases]


def _case(name: str, sources: Sequence[Path]) -> dict[str, str]:
    """Return the files `name` of all folders as one input: `image` and further files beside it."""
    first, *others = (str(folder / name) for folder in sources)
    beside = {f"prediction_{number}": path for number, path in enumerate(others, start=2)}
    return {"name": name, "image": first, **beside}


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
    batch: BatchRun, case: Mapping[str, str], shares: Sequence[float], domain: Domain
) -> None:
    """Write the mean of the files of `case`."""
    name = case["name"]
    paths = [Path(path) for key, path in case.items() if key != "name"]
    if absent := [str(path) for path in paths if not path.is_file()]:
        raise InputError(f"not found: {', '.join(absent)}; expected a prediction in every folder")
    header = _common_header(paths)
    mean = _Mean(header.dtype, paths, shares, domain)
    result = batch.output_dir / name
    batch.begin({name: batch.origins(case)})
    check_free_bytes(batch.output_dir, header.decoded_bytes)
    with ExitStack() as stack:
        if len(header.shape) == 3:
            volumes = [stack.enter_context(open_volume(path)) for path in paths]
            cuts = (slice(z, z + 1) for z in range(header.shape[0]))
            _write_tiff(result, header, (mean(v[cut][0] for v in volumes) for cut in cuts))
        elif header.format == "tiff":
            _write_tiff(result, header, [mean(map(read_image, paths))])
        else:
            write_png(result, mean(map(read_image, paths)))
    details = {
        "inputs": [str(path) for path in paths],
        "shape": list(header.shape),
        "dtype": str(header.dtype),
    }
    batch.record(name, [result], {}, details)


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
            bigtiff=header.decoded_bytes > CLASSIC_TIFF_BYTES,
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
