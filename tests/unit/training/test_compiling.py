from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from pipeline.errors import ConfigurationError
from pipeline.training.activations import write_graph
from pipeline.training.averaging import AveragedNetwork
from pipeline.training.block_checkpointing import checkpoint_blocks
from pipeline.training.compiling import compile_network
from pipeline.training.step import TrainingStep

TOLERANCE = 1e-6


@pytest.fixture(autouse=True)
def _compiler_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what was compiled, and put back the setting that compiling needs."""
    from torch._functorch import config

    torch.compiler.reset()
    before = config.force_non_lazy_backward_lowering
    yield
    config.force_non_lazy_backward_lowering = before
    torch.compiler.reset()


class Small(nn.Module):
    """Two blocks with normalisation and dropout."""

    def __init__(self, norm: Callable[[], nn.Module], dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, 4, 3, padding=1), norm(), nn.ReLU(), nn.Dropout(dropout)
            )
            for channels in (1, 4)
        )
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        features = image
        for block in self.blocks:
            features = block(features)
        result: Tensor = self.head(features)
        return result


BATCH_NORM = partial(nn.BatchNorm2d, 4)


def make(norm: Callable[[], nn.Module] = BATCH_NORM, dropout: float = 0.3) -> Small:
    torch.manual_seed(0)
    return Small(norm, dropout)


def images(number: int = 4) -> Tensor:
    return torch.randn(number, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(network: nn.Module, modes: Sequence[bool] = (True, False, True)) -> list[Tensor]:
    """Return what training (True) and evaluation give in turn: losses, gradients and buffers."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    found: list[Tensor] = []
    torch.manual_seed(2)
    for training in modes:
        network.train(training)
        with torch.set_grad_enabled(training):
            loss = network(images()).square().mean()
        if training:
            optimizer.zero_grad()
            loss.backward()
            found += [p.grad.clone() for p in network.parameters()]
            optimizer.step()
        found += [loss.detach(), *(buffer.clone() for buffer in network.buffers())]
    return found


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


def fails(graph: Any, inputs: Any) -> Any:
    raise OSError("no compiler here\nand much more text")


def fails_backward() -> Callable[..., Any]:
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=fails)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.message for entry in caplog.records if entry.levelno >= logging.WARNING]


class Graphs:
    """A backend that counts the graphs it was given and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


# The same results


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_results_are_those_without_in_training_and_evaluation(backend: str) -> None:
    network = make()
    assert compile_network(network, backend=backend)
    assert_same(trained(network), trained(make()))


def test_it_is_compiled_anew_for_evaluation_and_not_for_every_call() -> None:
    network, backend = make(), Graphs()
    compile_network(network, backend=backend)
    trained(network)
    trained(network)
    assert backend.count == 2


def test_blocks_that_are_computed_again_can_be_compiled() -> None:
    network = make()
    checkpoint_blocks(network)
    compile_network(network, backend="aot_eager")
    assert_same(trained(network), trained(make()))


def test_names_in_the_state_dict_stay() -> None:
    network = make()
    compile_network(network, backend="eager")
    trained(network)
    assert list(network.state_dict()) == list(make().state_dict())


def test_a_copy_is_not_compiled_and_runs_its_own_weights() -> None:
    network, backend = make(), Graphs()
    compile_network(network, backend=backend)
    trained(network)
    alike = copy.deepcopy(network).eval()
    nn.init.zeros_(alike.head.weight)
    nn.init.ones_(alike.head.bias)
    graphs = backend.count
    assert torch.equal(alike(images()), torch.ones(4, 1, 8, 8))
    assert backend.count == graphs
    assert not torch.equal(network.eval()(images()), torch.ones(4, 1, 8, 8))


@pytest.mark.parametrize("averaged_first", [True, False])
def test_averaged_weights_follow_whichever_was_made_first(averaged_first: bool) -> None:
    network, plain = make(), make()
    if averaged_first:
        average = AveragedNetwork(network)
        compile_network(network, backend="aot_eager")
    else:
        compile_network(network, backend="aot_eager")
        average = AveragedNetwork(network)
    expected = AveragedNetwork(plain)
    for one, its_average in ((network, average), (plain, expected)):
        trained(one)
        its_average.update_parameters(one)
        its_average.eval()
    assert_same([average.module(images())], [expected.module(images())])


def test_tensorboards_graph_can_still_be_drawn() -> None:
    class Writer:
        def add_graph(self, network: nn.Module, inputs: Tensor, use_strict_trace: bool) -> None:
            torch.jit.trace(network, inputs, strict=use_strict_trace)

    network = make()
    compile_network(network, backend="eager")
    trained(network)
    assert write_graph(Writer(), network, images())


# Where it cannot be done


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_compiler_that_fails_is_told_once_and_done_without(
    part: str, caplog: pytest.LogCaptureFixture
) -> None:
    network = make()
    compile_network(network, backend=fails if part == "forward" else fails_backward())
    assert_same(trained(network), trained(make()))
    assert warnings_of(caplog) == [
        "Small is not compiled and runs as without: OSError: no compiler here"
    ]


def test_a_missing_cpp_compiler_is_told_and_done_without(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    network = make()
    with inductor.patch({"cpp.cxx": (str(tmp_path / "g++"),), "compile_threads": 1}):
        compile_network(network)
        found = trained(network)
    assert_same(found, trained(make()))
    assert len(warnings_of(caplog)) == 1
    assert "No working C++ compiler found" in caplog.text


def test_a_system_that_cannot_compile_is_told_and_done_without(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Dynamo is not supported on Python 3.99+")

    monkeypatch.setattr(torch, "compile", refuse)
    network = make()
    assert not compile_network(network, backend="eager")
    assert_same(trained(network), trained(make()))
    assert "RuntimeError: Dynamo is not supported on Python 3.99+" in caplog.text


def test_a_wrong_call_raises_the_networks_own_error(caplog: pytest.LogCaptureFixture) -> None:
    network = make()
    compile_network(network, backend="eager")
    with pytest.raises(RuntimeError, match="expected input"):
        network(torch.randn(1, 3, 8, 8))
    assert not [text for text in warnings_of(caplog) if "not compiled" in text]


def test_an_error_of_the_compiled_network_is_no_failure_to_compile(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def without_memory(graph: Any, inputs: Any) -> Any:
        def run(*_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    network = make()
    compile_network(network, backend=without_memory)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            network(images())
    assert warnings_of(caplog) == []


# Settings


def test_switched_off_it_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    network, backend = make(), Graphs()
    assert not compile_network(network, enabled=False, backend=backend)
    network(images())
    assert backend.count == 0
    assert caplog.messages == []


def test_what_is_about_to_be_compiled_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    compile_network(make(), backend="aot_eager")
    assert "Small is compiled by aot_eager when it is first called" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "inducter"}, "no backend 'inducter'; did you mean 'inductor'"),
        ({"mode": "fast"}, "one of default, .*max-autotune, got 'fast'"),
        ({"mode": "default", "backend": "eager"}, "'default' belongs to inductor, .* is eager"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        compile_network(make(), **settings)


# In a trainer


class Labelled(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 7  # the second batch is smaller

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = images(7)[index]
        return {"image": image, "label": (image > 0).float()}


def run_trainer(network: nn.Module, accumulation_steps: int = 1) -> TrainingStep:
    step = TrainingStep(accumulation_steps, batch_size=4, samples=7)
    torch.manual_seed(3)
    SupervisedTrainer(
        device="cpu",
        max_epochs=2,
        train_data_loader=DataLoader(Labelled(), batch_size=4),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=nn.BCEWithLogitsLoss(),
        iteration_update=step,
        decollate=False,
    ).run()
    return step


@pytest.mark.parametrize("lean", [False, True], ids=["compiled", "lean"])
def test_a_trainer_ends_with_the_same_weights(lean: bool, caplog: pytest.LogCaptureFixture) -> None:
    network, plain = make(), make()
    if lean:
        checkpoint_blocks(network)
    compile_network(network, backend="aot_eager")
    for one in (network, plain):
        run_trainer(one)
    assert_same(list(network.state_dict().values()), list(plain.state_dict().values()))
    assert warnings_of(caplog) == []


def test_memory_that_runs_out_makes_smaller_pieces(caplog: pytest.LogCaptureFixture) -> None:
    def small(graph: Any, inputs: Any) -> Any:
        def run(*values: Any) -> Any:
            if any(isinstance(value, Tensor) and value.shape in large for value in values):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return graph(*values)

        return run

    large = [(number, 1, 8, 8) for number in (3, 4)]
    network, plain = (make(partial(nn.GroupNorm, 2, 4), dropout=0.0) for _ in range(2))
    compile_network(network, backend=small)
    assert run_trainer(network).pieces == 2
    run_trainer(plain)
    assert_same(list(network.parameters()), list(plain.parameters()))
    assert not [text for text in warnings_of(caplog) if "not compiled" in text]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler: no g++")
@pytest.mark.parametrize(
    "lean", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["compiled", "lean"]
)
def test_inductor_gives_the_same_results(
    lean: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    network = make(dropout=0.0)  # inductor draws in a way of its own
    if lean:
        checkpoint_blocks(network)
    modes = (True, False, True) if lean else (True,)  # every graph takes seconds to compile
    with inductor.patch({"compile_threads": 1}):  # no processes of its own
        compile_network(network)
        found = trained(network, modes)
    assert_same(found, trained(make(dropout=0.0), modes))
    assert warnings_of(caplog) == []
