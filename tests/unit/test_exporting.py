from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from torch import nn

from pipeline import cli
from pipeline.errors import CheckpointError, ConfigurationError, ResourceError
from pipeline.exporting import export_bundle
from pipeline.fundus.networks import UNet
from pipeline.training.checkpoints import read_checkpoint, write_checkpoint

BUNDLE, SIZE = "fundus_vessels", (32, 24)


@pytest.fixture
def checkpoint(tmp_path, repository, monkeypatch):
    """A small network with random weights, as if the bundle had trained it."""
    monkeypatch.chdir(repository)
    torch.manual_seed(0)
    settings = {"in_channels": 3, "out_channels": 1, "depths": [2, 4, 4]}
    content = {
        "bundle": BUNDLE,
        "architecture": "default",
        "epoch": 1,
        "iteration": 1,
        "model": UNet(**settings).state_dict(),
        "network_def": {"_target_": "pipeline.fundus.networks.UNet", **settings},
        "preprocessing": [],
        "threshold": 0.5,
    }
    return write_checkpoint(tmp_path / "weights" / "small.pt", content)


@pytest.fixture(autouse=True)
def _no_handlers_of_earlier_runs(monkeypatch):
    """A bundle's logging.conf leaves handlers behind, whose streams end with their test."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger("pipeline"), "handlers", [])


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_the_formats_of_the_command_line_are_those_there_are():
    from pipeline.arguments import EXPORT_SUFFIXES
    from pipeline.exporting import TOLERANCES
    from pipeline.network_files import WRITERS

    assert set(EXPORT_SUFFIXES) == set(TOLERANCES) == set(WRITERS)


def test_export_answers_people_and_programs(checkpoint, out, capsys):
    words = ["export", BUNDLE, "--ckpt_path", str(checkpoint), "-o", str(out / "a.ts")]
    assert cli.main([*words, "--size", "32x24"]) == 0
    said = capsys.readouterr().out
    assert "agrees with torch on windows 1x3x32x24" in said
    assert "windows 1x3x32x23: agrees" in said
    assert cli.main([*words, "--size", "32x24", "--json"]) == 0
    export = json.loads(capsys.readouterr().out)
    assert export["paths"] == [str(out / "a.ts"), str(out / "a.ts.json")]
    assert export["about"]["bundle"] == BUNDLE
    assert export["agreement"]["relative"] <= 1e-5


def test_without_a_size_the_window_of_inference_is_the_example(checkpoint, out, monkeypatch):
    made = {}

    def note(network, window, about):
        made["shape"] = tuple(window.shape)
        raise ConfigurationError("enough")

    from pipeline import network_files

    monkeypatch.setitem(network_files.WRITERS, "onnx", note)
    with pytest.raises(ConfigurationError, match="enough"):
        export_bundle(BUNDLE, out / "a.onnx", ckpt_path=checkpoint)
    assert made["shape"] == (1, 3, 768, 768)


def test_a_network_that_disagrees_is_not_written(checkpoint, out, monkeypatch):
    from pipeline import network_files

    honest = network_files.WRITERS["torchscript"]

    def spoilt(network, window, about):
        other = copy.deepcopy(network)
        with torch.no_grad():
            list(other.parameters())[-1].add_(0.01)
        return honest(other, window, about)

    monkeypatch.setitem(network_files.WRITERS, "torchscript", spoilt)
    with pytest.raises(ConfigurationError, match=r"not written, torchscript disagrees .* 1e-05"):
        export_bundle(BUNDLE, out / "a.ts", size=SIZE, ckpt_path=checkpoint)
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("name", "error", "leftover"),
    [("a.onnx", "no space for the graph", set()), ("a.xml", "no space for the weights", set())],
)
def test_a_write_that_fails_leaves_no_file_to_open(
    checkpoint, out, monkeypatch, name, error, leftover
):
    def refuse(path, data):
        raise ResourceError(error)

    monkeypatch.setattr("pipeline.data.atomic.write_bytes", refuse)
    with pytest.raises(ResourceError, match=error):
        export_bundle(BUNDLE, out / name, size=SIZE, ckpt_path=checkpoint)
    assert not (out / name).exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-o", "a.bin"], 2, "its suffix names no format"),
        (["-o", "a.onnx", "--format", "onx"], 2, "did you mean onnx"),
        (["-o", "a.onnx", "--format", "openvino"], 2, "must end in .xml"),
        (["-o", "a.ts", "--size", "64"], 2, "--size: 64 has 1 sides"),
        (["-o", "a.ts", "--size", "big"], 2, "'big' is no size"),
        (["-o", "a.ts", "--overlap", "0.5"], 2, "give --ckpt_path alone"),
        (["-o", "a.ts", "--ckpt_pth", "x.pt"], 2, "did you mean ckpt_path"),
        (["-o", "a.ts", "--ckpt_path", "absent.pt"], 4, "absent.pt: no such checkpoint"),
    ],
)
def test_a_wrong_word_is_one_line(repository, monkeypatch, capsys, words, code, said):
    monkeypatch.chdir(repository)
    assert cli.main(["export", BUNDLE, *words]) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_checkpoint_of_another_bundle_is_refused(checkpoint, out):
    foreign = {**read_checkpoint(checkpoint), "bundle": "insect_pests"}
    path = write_checkpoint(out.parent / "foreign.pt", foreign)
    with pytest.raises(CheckpointError, match="insect_pests"):
        export_bundle(BUNDLE, out / "a.ts", size=SIZE, ckpt_path=path)
    assert not list(out.iterdir())


class Guarded(nn.Module):
    """TorchScript compiles no `try`."""

    def forward(self, image):
        try:
            return 2 * image
        finally:
            pass


def test_a_network_that_torchscript_cannot_compile_is_traced_and_that_is_said(caplog):
    from pipeline.network_files import network_file

    window = torch.rand(1, 1, 4, 4)
    file = network_file("torchscript", Guarded(), window, "{}")
    assert "by a trace, for its size alone" in caplog.text
    torch.testing.assert_close(file.run(window)[0], 2 * window)
