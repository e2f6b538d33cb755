from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import BasicUNet
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigurationError, ResourceError
from pipeline.fundus.networks import RoiNet, TransRoiNet, UNet, UTrans
from pipeline.inference import exported
from pipeline.inference.backends import Backend
from pipeline.inference.export import BackendError


def runtime(name: str, extra: str) -> Any:
    missing = [p for p in (name, "onnx") if importlib.util.find_spec(p) is None]
    reason = f"{', '.join(missing)} is not installed: pip install 'lamina[{extra}]'"
    return pytest.param(name, marks=pytest.mark.skipif(bool(missing), reason=reason))


OPENVINO = runtime("openvino", "openvino")
ONNXRUNTIME = runtime("onnxruntime", "onnx")
needs_openvino = OPENVINO.marks[0]
RUNTIMES = [OPENVINO, ONNXRUNTIME]


class TwoOutputs(nn.Module):
    """Gives its two outputs in the form asked for."""

    def __init__(self, form: type = tuple) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.form = form

    def forward(self, windows: Tensor) -> Any:
        features = self.conv(windows)
        parts = features[:, :1], torch.sigmoid(features[:, 1:])
        return dict(zip("ab", parts, strict=True)) if self.form is dict else self.form(parts)


class DecidesBySize(nn.Module):
    """Takes another way where the height is odd, which tracing cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, windows: Tensor) -> Tensor:
        features: Tensor = self.conv(windows)
        return features if windows.shape[2] % 2 else -features


class CannotBeExported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, windows: Tensor) -> Tensor:
        features: Tensor = self.conv(windows)
        return torch.special.erfcx(features)


def ready(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ready(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_agree(found: Any, expected: Any, tolerance: float = 1e-3) -> None:
    if isinstance(expected, Tensor):
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= tolerance * expected.norm()
        assert found.shape == expected.shape
    else:
        pairs = zip(
            *(o.values() if isinstance(o, dict) else o for o in (found, expected)), strict=True
        )
        for one, other in pairs:
            assert_agree(one, other, tolerance)


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the windows that are exported from now on."""
    shapes: list[tuple[int, ...]] = []
    export = exported.export_onnx

    def counted(network: nn.Module, windows: Tensor) -> bytes:
        shapes.append(tuple(windows.shape))
        return export(network, windows)

    monkeypatch.setattr(exported, "export_onnx", counted)
    return shapes


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "UNet": lambda: (UNet(3, 1, depths=(4, 8, 16)), noise(1, 3, 32, 48)),
    "RoiNet": lambda: (RoiNet(3, 1, depths=(4, 4, 8, 8, 4, 4)), noise(1, 3, 32, 48)),
    "UTrans": lambda: (UTrans(3, 1, depths=(8, 16)), noise(1, 3, 32, 48)),
    "TransRoiNet": lambda: (TransRoiNet(3, 1, depths=(8,) * 6), noise(1, 3, 32, 48)),
    "BasicUNet": lambda: (BasicUNet(3, 1, 2, features=(4, 4, 8, 8, 8, 4)), noise(1, 1, 32, 32, 32)),
}


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_runtime_gives_what_the_network_gives(
    make: Callable[[], tuple[nn.Module, Tensor]], name: str
) -> None:
    torch.manual_seed(0)
    network, window = make()
    ready(network)
    run = Backend(name).prepare(network, window)
    other = torch.cat([window, window.flip(-1)]) + 0.1
    with torch.inference_mode():
        assert_agree(run(window), network(window))
        assert_agree(run(other), network(other))


def test_torch_alone_is_the_network_itself() -> None:
    network = small()
    assert Backend().prepare(network, noise(1, 1, 8, 8)) is network


@pytest.mark.parametrize("make", [NETWORKS["UNet"], NETWORKS["BasicUNet"]], ids=["2-D", "3-D"])
def test_channels_last_changes_the_result_by_rounding_alone(
    make: Callable[[], tuple[nn.Module, Tensor]],
) -> None:
    network, window = make()
    ready(network)
    strides = [parameter.stride() for parameter in network.parameters()]
    run = Backend(channels_last=True).prepare(network, window)
    assert_agree(run(window), network(window), 1e-5)
    assert [parameter.stride() for parameter in network.parameters()] == strides


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["torch", OPENVINO])
def test_a_lower_precision_gives_float32_that_is_near(name: str, precision: Any) -> None:
    network, window = small(), noise(1, 1, 32, 32)
    before = copy.deepcopy(network.state_dict())
    backend = Backend(name, precision)
    assert_agree(backend.prepare(network, window)(window), network(window), 5e-2)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert 0 <= backend.settings()["agreement"]["relative"] < 5e-2


def test_bfloat16_is_really_used() -> None:
    network, window = small(), noise(1, 1, 32, 32)
    backend = Backend("torch", "bfloat16")
    assert not torch.equal(backend.prepare(network, window)(window), network(window))
    assert backend.settings()["agreement"]["relative"] > 1e-4


def test_where_compiling_fails_the_network_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile_in_vain(network: Any) -> Any:
        def fail(windows: Tensor) -> Tensor:
            raise torch._dynamo.exc.TorchDynamoException("no compiler")

        return fail

    import torch._dynamo

    monkeypatch.setattr(torch, "compile", compile_in_vain)
    network, window = small(), noise(1, 1, 8, 8)
    backend = Backend(compile=True)
    run = backend.prepare(network, window)
    for _ in range(2):
        torch.testing.assert_close(run(window), network(window), rtol=0, atol=0)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert backend.settings()["compile"] is False


def test_what_is_compiled_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_quickly(network: Any) -> Any:
        return lambda windows: network(windows) * (1 + 1e-4)

    monkeypatch.setattr(torch, "compile", compile_quickly)
    network, window = small(), noise(1, 1, 8, 8)
    backend = Backend(compile=True)
    assert torch.equal(backend.prepare(network, window)(window), network(window) * (1 + 1e-4))
    assert backend.settings()["compile"] is True
    assert backend.settings()["agreement"]["relative"] == pytest.approx(1e-4, rel=0.01)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compiler of this machine has to say
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_network_agrees_for_every_size(precision: Any) -> None:
    network = small()
    backend = Backend("torch", precision, compile=True)
    run = backend.prepare(network, noise(1, 1, 16, 16))
    tolerance = 1e-5 if precision == "float32" else 5e-2
    with torch.inference_mode():
        for shape in [(1, 1, 16, 16), (2, 1, 16, 16), (3, 1, 24, 9)]:
            assert_agree(run(noise(*shape)), network(noise(*shape)), tolerance)


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("form", [tuple, list, dict])
def test_several_outputs_keep_their_form(name: str, form: type) -> None:
    network, window = ready(TwoOutputs(form)), noise(2, 1, 8, 12)
    found = Backend(name).prepare(network, window[:1])(window)
    assert_agree(found, network(window))
    assert list(found) == ["a", "b"] if form is dict else isinstance(found, tuple)


@pytest.mark.parametrize("name", RUNTIMES)
def test_outputs_lie_in_memory_of_their_own(name: str) -> None:
    network, first, second = small(), noise(1, 1, 16, 16), noise(1, 1, 16, 16, seed=2)
    run = Backend(name).prepare(network, first)
    output = run(first)
    kept = output.clone()
    run(second)
    assert torch.equal(output, kept)
    output.zero_()
    assert torch.equal(run(first), kept)


@pytest.mark.parametrize("name", RUNTIMES)
def test_one_export_serves_any_number_and_size_of_windows(
    name: str, exports: list[tuple[int, ...]]
) -> None:
    network = small()
    run = Backend(name).prepare(network, noise(1, 1, 16, 16))
    for shape in [(1, 1, 16, 16), (3, 1, 16, 16), (2, 1, 24, 9), (1, 1, 9, 24)]:
        assert_agree(run(noise(*shape)), network(noise(*shape)))
    assert len(exports) == 1


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_network_that_decides_by_size_is_exported_for_each_way(
    name: str, exports: list[tuple[int, ...]], tmp_path: Path
) -> None:
    network = ready(DecidesBySize())
    for _ in range(2):  # the second time from the cache
        run = Backend(name, cache_dir=str(tmp_path)).prepare(network, noise(1, 1, 8, 8))
        for height in (8, 9, 10, 11):
            assert_agree(run(noise(1, 1, height, 8)), network(noise(1, 1, height, 8)))
        assert exports == [(1, 1, 8, 8), (1, 1, 9, 8)]


@needs_openvino
def test_an_odd_photograph_runs_as_in_torch() -> None:
    """The fundus networks pad sizes that do not divide, and by how much depends on the size."""
    torch.manual_seed(0)
    network = ready(UNet(3, 1, depths=(4, 8, 16)))
    run = Backend("openvino").prepare(network, noise(1, 3, 32, 48))
    for size in [(32, 48), (33, 50), (37, 41)]:
        assert_agree(run(noise(1, 3, *size)), network(noise(1, 3, *size)))


@needs_openvino
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_modes_of_the_caller_do_not_matter(mode: Any) -> None:
    network, window = small(), noise(1, 1, 16, 16)
    with mode(), torch.autocast("cpu", torch.bfloat16):
        found = Backend("openvino").prepare(network, window)(window)
    assert_agree(found, network(window), 1e-5)


@needs_openvino
def test_windows_may_carry_metadata_and_gradients_and_be_views() -> None:
    network = small()
    image = MetaTensor(noise(1, 1, 20, 20)).requires_grad_()
    view = image[..., 2:18:2, 3:19]
    found = Backend("openvino").prepare(network, view)(view)
    assert_agree(found, network(view.as_tensor()).detach())
    assert type(found) is Tensor


# A pytest process has signal stacks of its own (faulthandler's), so this needs a fresh one.
_SIGNAL_AFTER_TWO_NETWORKS = """
import gc, os, signal
import torch
from torch import nn
from pipeline.inference.backends import Backend

signal.signal(signal.SIGTERM, lambda *_: print("heard", flush=True))
window = torch.zeros(1, 1, 8, 8)
runs = [Backend("openvino").prepare(nn.Conv2d(1, 1, 3).eval(), window) for _ in range(2)]
while runs:
    runs.pop(0)
    gc.collect()
os.kill(os.getpid(), signal.SIGTERM)
"""


@needs_openvino
def test_signals_are_heard_after_several_networks_are_gone() -> None:
    """A released core took the memory of the stack that signal handlers run on."""
    command = [sys.executable, "-c", _SIGNAL_AFTER_TWO_NETWORKS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


@needs_openvino
def test_the_caller_keeps_the_network_as_it_was() -> None:
    network = small()
    network[1].train()  # a part in another mode
    Backend("openvino").prepare(network, noise(1, 1, 16, 16))
    assert [part.training for part in network.modules()] == [False, False, True, False]


@needs_openvino
def test_windows_of_one_value_are_no_evidence() -> None:
    class Fails(nn.Conv2d):
        """Right for zeros alone once it is exported."""

        def forward(self, windows: Tensor) -> Tensor:
            factor = 2 if torch.onnx.is_in_onnx_export() else 1
            return functional.conv2d(windows, self.weight, None) * factor

    with pytest.raises(BackendError, match="disagrees"):
        Backend("openvino").prepare(ready(Fails(1, 1, 1)), torch.zeros(1, 1, 8, 8))


def test_a_second_run_takes_the_export_from_disk(
    exports: list[tuple[int, ...]], tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime")
    window = noise(1, 1, 16, 16)
    for name in ("openvino", "openvino", "onnxruntime"):  # one file serves both
        run = Backend(name, cache_dir=str(tmp_path)).prepare(small(), window)
        assert_agree(run(window), small()(window))
    assert len(exports) == 1


@needs_openvino
@pytest.mark.parametrize("harm", ["cut", "flip", "no checksum", "empty checksum"])
def test_a_damaged_export_is_made_again(
    harm: str, exports: list[tuple[int, ...]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    window = noise(1, 1, 16, 16)
    backend = {"name": "openvino", "cache_dir": str(tmp_path)}
    Backend(**backend).prepare(small(), window)
    (path,) = tmp_path.glob("*.onnx")
    (checksum,) = tmp_path.glob("*.sha256")
    whole = path.read_bytes()
    if harm == "cut":
        path.write_bytes(whole[:-7])
    elif harm == "flip":
        path.write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    elif harm == "no checksum":
        checksum.unlink()
    else:
        checksum.write_text("")
    assert_agree(Backend(**backend).prepare(small(), window)(window), small()(window))
    assert len(exports) == 2
    Backend(**backend).prepare(small(), window)
    assert len(exports) == 2
    assert len(list(tmp_path.iterdir())) == 2


@needs_openvino
def test_other_weights_and_another_network_are_other_entries(
    exports: list[tuple[int, ...]], tmp_path: Path
) -> None:
    window = noise(1, 1, 16, 16)
    sharper = small()
    sharper[1] = nn.LeakyReLU()
    for network in (small(0), small(1), small(2), sharper) * 2:  # the second time from disk
        run = Backend("openvino", cache_dir=str(tmp_path)).prepare(network, window)
        assert_agree(run(window), network(window))
    assert len(exports) == len(list(tmp_path.glob("*.onnx"))) == 4


@needs_openvino
def test_a_stale_export_is_found_by_its_output(
    exports: list[tuple[int, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code may change behind an unchanged definition."""
    monkeypatch.setattr(exported, "network_digest", lambda network, windows: "same")
    window = noise(1, 1, 16, 16)
    for seed in (0, 1, 2, 2):
        run = Backend("openvino", cache_dir=str(tmp_path)).prepare(small(seed), window)
        assert_agree(run(window), small(seed)(window))
    assert len(exports) == 3


@needs_openvino
def test_exports_lie_beside_the_checkpoint_by_default(tmp_path: Path) -> None:
    Backend("openvino", checkpoint=str(tmp_path / "model.pt")).prepare(small(), noise(1, 1, 16, 16))
    (path,) = tmp_path.glob("backend_cache/*.onnx")
    assert path.with_name(path.name + ".sha256").is_file()


@needs_openvino
def test_without_a_writable_folder_one_export_serves_the_process(
    exports: list[tuple[int, ...]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    window = noise(1, 1, 16, 16)
    with caplog.at_level(logging.INFO):
        backend = Backend("openvino", checkpoint=str(blocked / "model.pt"))
        for _ in range(2):
            backend.prepare(small(), window)
    assert len(exports) == 1
    assert caplog.text.count("not kept on disk") == 1
    with pytest.raises(ResourceError):
        Backend("openvino", cache_dir=str(blocked / "cache")).prepare(small(), window)


@needs_openvino
@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_model_folder_is_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    Backend("openvino", checkpoint=str(tmp_path / "model.pt")).prepare(small(), noise(1, 1, 8, 8))
    assert not list(tmp_path.iterdir())


@needs_openvino
def test_auto_takes_openvino_and_says_so_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    backend, network, window = Backend("auto"), small(), noise(1, 1, 16, 16)
    with caplog.at_level(logging.INFO, "pipeline.inference.backends"):
        assert_agree(backend.prepare(network, window)(window), network(window))
    assert backend.settings()["name"] == "openvino"
    (line,) = caplog.messages
    assert "openvino" in line
    assert "relative difference" in line


UNSUITABLE: dict[str, Callable[[], Callable[..., Any]]] = {
    "a function": lambda: torch.sigmoid,
    "training mode": lambda: small().train(),
    "float64": lambda: small().double(),
    "cannot be exported": lambda: ready(CannotBeExported()),
}


@needs_openvino
@pytest.mark.parametrize("case", UNSUITABLE)
def test_auto_runs_in_torch_what_openvino_cannot(case: str) -> None:
    network = UNSUITABLE[case]()
    window = noise(1, 1, 8, 8).to(torch.float64 if case == "float64" else torch.float32)
    backend = Backend("auto")
    run = backend.prepare(network, window)
    assert run is network
    assert backend.settings()["name"] == "torch"
    assert case in backend.settings()["reason"]


@needs_openvino
@pytest.mark.parametrize("case", UNSUITABLE)
def test_a_runtime_by_name_refuses_what_it_cannot_run(case: str) -> None:
    window = noise(1, 1, 8, 8).to(torch.float64 if case == "float64" else torch.float32)
    with pytest.raises(ConfigurationError, match=f"{case}.*set backend: torch"):
        Backend("openvino").prepare(UNSUITABLE[case](), window)


@needs_openvino
def test_disagreement_is_an_error_by_name_and_torch_in_auto() -> None:
    network, window = small(), noise(1, 1, 16, 16)
    tight: dict[str, Any] = {"precision": "bfloat16", "tolerance": 1e-9}
    with pytest.raises(ConfigurationError, match=r"difference .* expected at most 1\.0e-09"):
        Backend("openvino", **tight).prepare(network, window)
    with pytest.raises(ConfigurationError, match=r"torch in bfloat16 disagrees"):
        Backend("torch", **tight).prepare(network, window)


@needs_openvino
def test_auto_goes_on_in_torch_where_a_later_size_disagrees(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class RightWhenSmall(nn.Conv2d):
        def forward(self, windows: Tensor) -> Tensor:
            wrong = torch.onnx.is_in_onnx_export() and windows.shape[2] > 8
            return functional.conv2d(windows, self.weight, None) * (2 if wrong else 1)

    class Larger(nn.Module):
        """Decides by size, so that the larger one is exported, and wrongly."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = RightWhenSmall(1, 1, 1)

        def forward(self, windows: Tensor) -> Tensor:
            inner: Tensor = self.inner(windows)
            return -inner if windows.shape[2] > 8 else inner

    network, backend = ready(Larger()), Backend("auto")
    run = backend.prepare(network, noise(1, 1, 8, 8))
    assert backend.settings()["name"] == "openvino"
    for size in (16, 8, 16):
        assert_agree(run(noise(1, 1, size, size)), network(noise(1, 1, size, size)))
    assert backend.settings()["name"] == "torch"
    assert "disagrees" in backend.settings()["reason"]


@needs_openvino
def test_an_error_of_the_network_itself_comes_through() -> None:
    class Picky(nn.Conv2d):
        def forward(self, windows: Tensor) -> Tensor:
            if windows.shape[2] > 8:
                raise ConfigurationError("too large")
            return super().forward(windows)

    backend = Backend("auto")
    run = backend.prepare(ready(Picky(1, 1, 1)), noise(1, 1, 8, 8))
    with pytest.raises(ConfigurationError, match="too large"):
        run(noise(1, 1, 9, 9))
    assert backend.settings()["name"] == "openvino"


@pytest.mark.parametrize(("name", "extra"), [("openvino", "openvino"), ("onnxruntime", "onnx")])
def test_a_missing_package_names_its_extra(
    name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(exported, "export_onnx", lambda network, windows: b"")
    network, window = small(), noise(1, 1, 8, 8)
    with pytest.raises(ConfigurationError, match=rf"{name}.*pip install 'lamina\[{extra}\]'"):
        Backend(name).prepare(network, window)
    if name == "openvino":
        backend = Backend("auto")
        assert backend.prepare(network, window) is network
        assert "not installed" in backend.settings()["reason"]


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_without_the_exporter_a_message_names_the_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigurationError, match="the package onnx is not installed"):
        Backend(name).prepare(small(), noise(1, 1, 8, 8))


@pytest.mark.parametrize("name", ["torch", OPENVINO, ONNXRUNTIME, "auto"])
def test_settings_are_plain_and_say_what_ran(name: str) -> None:
    backend = Backend(name)
    asked = backend.request()
    before = backend.settings()
    backend.prepare(small(), noise(1, 1, 16, 16))
    used = backend.settings()
    assert json.loads(json.dumps(used)) == used
    assert set(used) == set(before)
    assert used["requested"] == name
    assert {"torch", used["name"]} == set(used["versions"])
    assert backend.request() == asked
    if used["name"] != "torch":
        assert 0 <= used["agreement"]["relative"] < 1e-3


@needs_openvino
def test_openvino_computes_in_float32_unless_asked() -> None:
    backend = Backend("openvino")
    backend.prepare(small(), noise(1, 1, 16, 16))
    assert backend.settings()["precision"] == "float32"
    assert backend.settings()["agreement"]["relative"] < 1e-5  # bfloat16 gives 1e-3 and more


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "tensorrt"}, "backend must be one of"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"name": "onnxruntime", "precision": "bfloat16"}, "onnxruntime computes in float32"),
        ({"name": "openvino", "compile": True}, "belong to torch"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"tolerance": -1.0}, "tolerance must not be negative"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Backend(**wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_stays_with_torch_on_a_gpu() -> None:
    network = small().cuda()
    backend = Backend("auto")
    assert backend.prepare(network, noise(1, 1, 8, 8).cuda()) is network
    assert backend.settings()["name"] == "torch"
