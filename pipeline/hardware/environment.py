"""The machine and the software a run meets, for `doctor` and for a run's records."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.hardware.devices import DeviceReport, memory_bytes, probe_devices

__all__ = ["environment_report", "environment_text", "package_versions"]

PACKAGES = (
    "lamina", "torch", "monai", "numpy", "pytorch-ignite", "scipy", "scikit-image", "pillow",
    "tifffile", "PyYAML", "tensorboard", "matplotlib",
)  # fmt: skip
EXTRAS = {
    "cluster": "distributed", "dicom": "highdicom", "mlflow": "mlflow", "oct": "eyepy",
    "onnx": "onnxruntime", "openvino": "openvino", "timm": "timm",
}  # fmt: skip
"""A module of each optional extra."""
NEEDED = frozenset({"torch", "monai", "numpy", "pytorch-ignite"})


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Return the installed version per distribution, None where it is absent, and Python's."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def environment_report(folder: Path | None = None) -> dict[str, Any]:
    """Return versions, system, devices, memory and disk, and under `missing` what to do about it.

    Args:
        folder: where results will go, for the free disk space; the working directory if None.
    """
    versions = package_versions()
    missing = [
        f"{name} is not installed: run `make demo`, or `pip install -e .`"
        for name, version in versions.items()
        if version is None and name in NEEDED
    ]
    devices: list[DeviceReport] = []
    try:
        devices = probe_devices()
    except (ImportError, OSError) as error:  # a torch that does not load is what doctor is for
        missing.append(f"torch does not load: {error}: install it again")
    missing += [
        f"{report.name} ({report.title}): {report.note}" for report in devices if report.note
    ]
    return {
        "versions": versions,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "devices": [vars(report) for report in devices],
        "memory_bytes": memory_bytes(),
        "disk_free_bytes": shutil.disk_usage(folder or Path.cwd()).free,
        "extras": {name: find_spec(module) is not None for name, module in EXTRAS.items()},
        "missing": missing,
    }


def environment_text(report: Mapping[str, Any]) -> str:
    """Return the report for a person; `bundles` in it, if any, are listed too."""
    lines = [f"system   {report['system']}"]
    lines += [
        f"{name:16} {version or 'not installed'}" for name, version in report["versions"].items()
    ]
    for device in report["devices"]:
        state = "usable" if device["usable"] else f"not usable: {device['note']}"
        lines.append(f"device   {device['name']} ({device['title']}): {state}{_free(device)}")
    lines.append(f"memory   {report['memory_bytes'] / 1e9:.1f} GB available")
    lines.append(f"disk     {report['disk_free_bytes'] / 1e9:.1f} GB free here")
    for installed, label in ((True, "installed"), (False, "not installed, optional")):
        names = [name for name, there in report["extras"].items() if there == installed]
        if names:
            lines.append(f"extras   {label}: {', '.join(names)}")
    for bundle in report.get("bundles", ()):
        weights = "with weights" if bundle["weights"] else "without weights"
        lines.append(f"bundle   {bundle['name']} {bundle['version']}, {weights}: {bundle['root']}")
    lines += [f"missing  {text}" for text in report["missing"]] or ["nothing is missing"]
    return "\n".join(lines)


def _free(device: Mapping[str, Any]) -> str:
    memory = device["memory_bytes"]
    return "" if memory is None or device["name"] == "cpu" else f", {memory / 1e9:.1f} GB free"
