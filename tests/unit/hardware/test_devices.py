from __future__ import annotations

import logging
import sys

import pytest
import torch

from pipeline.errors import ConfigurationError
from pipeline.hardware import devices
from pipeline.hardware.devices import choose_device, memory_bytes, probe_devices
from pipeline.hardware.environment import environment_report, environment_text, package_versions


def test_the_cpu_is_reported_usable_and_last():
    reports = probe_devices()
    assert reports[-1].name == "cpu"
    assert reports[-1].usable
    assert 0 < reports[-1].memory_bytes < 2**50


def test_auto_is_the_first_usable_device():
    usable = [report.name for report in probe_devices() if report.usable]
    assert choose_device("auto") == choose_device(None) == torch.device(usable[0])


def test_probing_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    probe_devices()
    torch.testing.assert_close(torch.rand(4), expected)


def test_a_name_is_read_whatever_its_case():
    assert choose_device(" CPU ") == torch.device("cpu")


@pytest.mark.parametrize("request_", ["tpu", "cpu!", ""])
def test_a_name_that_is_no_device_is_refused(request_):
    with pytest.raises(ConfigurationError, match="expected cpu, cuda, cuda:0, xpu, mps, dml or"):
        choose_device(request_)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("request_", ["cuda", "cuda:1"])
def test_cuda_asked_for_where_there_is_none_is_refused_with_a_remedy(request_):
    with pytest.raises(ConfigurationError, match=rf"device {request_} .*use --device cpu"):
        choose_device(request_)


def test_a_device_that_is_there_but_does_not_compute_is_not_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")

    def no_kernel(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available\nmore lines")

    real = torch.full

    def full(*sizes, device, **options):
        return no_kernel() if device.type == "cuda" else real(*sizes, device=device, **options)

    monkeypatch.setattr(torch, "full", full)
    first, cpu = [report for report in devices.probe_devices() if report.name != "mps"]
    assert (first.name, first.title, first.usable) == ("cuda:0", "Old Card", False)
    assert first.note == "CUDA error: no kernel image is available"
    assert cpu.usable
    assert choose_device("auto").type != "cuda"
    with pytest.raises(ConfigurationError, match="no kernel image is available; use --device cpu"):
        choose_device("cuda")


def broken_on(kind, monkeypatch):
    """Let every tensor on a device of `kind` fail, as on one that this torch has no kernels for."""
    real = torch.full

    def full(*sizes, device, **options):
        if device.type == kind:
            raise RuntimeError("no kernel for this device\nmore lines")
        return real(*sizes, device=device, **options)

    monkeypatch.setattr(torch, "full", full)


def test_auto_tells_why_each_device_before_the_chosen_one_is_left_out(monkeypatch, caplog):
    broken_on("xpu", monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: f"Arc {device.index}")
    with caplog.at_level(logging.INFO, logger="pipeline.hardware.devices"):
        assert choose_device("auto") == torch.device("cpu")
    assert [record.getMessage() for record in caplog.records][:2] == [
        f"device xpu:{index} (Arc {index}) is left out: no kernel for this device"
        for index in (0, 1)
    ]
    with pytest.raises(ConfigurationError, match=r"device xpu asked for.*use --device cpu"):
        choose_device("xpu")
    with pytest.raises(ConfigurationError, match="torch sees 2 XPU devices"):
        choose_device("xpu:2")


@pytest.mark.skipif(torch.xpu.is_available(), reason="this machine has an XPU")
def test_an_xpu_asked_for_where_there_is_none_is_refused():
    with pytest.raises(ConfigurationError, match="torch sees 0 XPU devices; use --device cpu"):
        choose_device("xpu")


class FakeDirectML:
    """Stands for torch_directml, whose device is the CPU here."""

    def device(self):
        return torch.device("cpu")


def test_directml_is_probed_where_it_imports(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_directml", FakeDirectML())
    assert "dml" in [report.name for report in probe_devices() if report.usable]
    assert choose_device("dml") == torch.device("cpu")


def test_directml_asked_for_where_it_is_not_installed_is_refused_with_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_directml", None)
    assert "dml" not in [report.name for report in probe_devices()]
    with pytest.raises(ConfigurationError, match="pip install torch-directml"):
        choose_device("dml")


@pytest.mark.gpu
def test_a_working_gpu_is_chosen():
    assert choose_device("auto").type == "cuda"
    assert choose_device("cuda:0") == torch.device("cuda:0")


def test_memory_is_that_of_the_container_where_it_has_less(monkeypatch):
    import pipeline.data.budget as budget

    monkeypatch.setattr(budget, "_container_available_bytes", lambda root: 1000)
    assert memory_bytes() == 1000


def test_an_absent_package_has_no_version():
    versions = package_versions(("torch", "no-such-distribution"))
    assert versions["no-such-distribution"] is None
    assert versions["torch"] == torch.__version__


def test_a_torch_that_does_not_load_is_a_line_and_no_crash(monkeypatch, tmp_path):
    import pipeline.hardware.environment as environment

    def broken():
        raise OSError("libtorch.so: cannot open shared object file")

    monkeypatch.setattr(environment, "probe_devices", broken)
    report = environment_report(tmp_path)
    assert any("libtorch.so" in line for line in report["missing"])
    assert "libtorch.so" in environment_text(report)


def test_the_text_tells_devices_memory_disk_and_bundles():
    report = environment_report()
    report["bundles"] = [
        {"name": "tiny", "version": "1", "weights": None, "root": "there"},
    ]
    text = environment_text(report)
    for part in ("device   cpu", "memory ", "disk ", "bundle   tiny 1, without weights", "torch"):
        assert part in text


def test_the_text_tells_which_extras_are_installed_and_which_are_not():
    report = {**environment_report(), "extras": {"mlflow": True, "onnx": True, "dicom": False}}
    lines = environment_text(report).splitlines()
    assert "extras   installed: mlflow, onnx" in lines
    assert "extras   not installed, optional: dicom" in lines
