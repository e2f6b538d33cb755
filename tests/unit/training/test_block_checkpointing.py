from __future__ import annotations

import copy
import io
import itertools
import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from monai.networks.nets import DynUNet
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.errors import ConfigurationError
from pipeline.fundus.networks import TransRoiNet, UNet
from pipeline.training.activations import write_graph
from pipeline.training.averaging import AveragedNetwork
from pipeline.training.batch_norm import renew_batch_norm
from pipeline.training.block_checkpointing import checkpoint_blocks
from pipeline.training.step import TrainingStep

TOLERANCE = 1e-12


class Crossing(nn.Module):
    """A block with two inputs, a setting and two outputs, one of them in a dict."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm, nn.Tanh(), nn.Dropout(0.3))
        self.gate = nn.Conv2d(4, 4, 1)

    def forward(
        self, left: Tensor, right: Tensor, *, gain: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        found = self.body(left + gain * right)
        return found, {"skip": found * self.gate(right)}


class Small(nn.Module):
    """Blocks in a list, a block of several inputs and outputs, single layers around them."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm(), nn.Tanh(), nn.Dropout(0.3))
            for _ in range(2)
        )
        self.crossing = Crossing(norm())
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        stem = features = self.stem(image)
        for block in self.blocks:
            features = block(features)
        features, more = self.crossing(features, stem, gain=0.5)
        result: Tensor = self.head(torch.cat([features, more["skip"]], dim=1))
        return result


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch_equal_mean": lambda: nn.BatchNorm2d(4, momentum=None),
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "spectral": lambda: spectral_norm(nn.Conv2d(4, 4, 1)),
}


def make(norm: str = "batch") -> Small:
    torch.manual_seed(0)
    return Small(NORMS[norm]).double()


def images(number: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 1, 8, 8, generator=generator, dtype=torch.float64)


def trained(network: nn.Module, steps: int = 3) -> list[Tensor]:
    """Return losses and gradients of a few steps, which change weights and buffers."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    found: list[Tensor] = []
    torch.manual_seed(2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = network(images()).square().mean()
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in network.parameters())]
        optimizer.step()
    return found


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


class Runs:
    """Counts how often a module runs."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        module.register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


def runs_of_a_step(network: nn.Module, module: nn.Module) -> int:
    runs = Runs(module)
    network(images()).mean().backward()
    return runs.count


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def peak_of_a_step(network: nn.Module, image: Tensor) -> int:
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)  # not what is compared
    with Live() as live:
        network(image).mean().backward()
    return live.peak


def bytes_saved(network: nn.Module, image: Tensor) -> int:
    """Return the bytes that a forward pass keeps for the backward pass outside of its blocks."""
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(image)
    assert output.requires_grad
    return sum(found.values())


# The same training


@pytest.mark.parametrize("norm", NORMS)
def test_losses_gradients_and_buffers_are_those_without(norm: str) -> None:
    plain, lean = make(norm), make(norm)
    assert checkpoint_blocks(lean) == ["blocks.0", "blocks.1", "crossing"]
    assert_same(trained(lean), trained(plain))
    assert_same(list(lean.buffers()), list(plain.buffers()))


def test_batch_norm_counts_a_step_once() -> None:
    network = make()
    checkpoint_blocks(network)
    trained(network, steps=3)
    assert int(network.blocks[0][1].num_batches_tracked) == 3
    assert int(network.crossing.body[1].num_batches_tracked) == 3


def test_buffers_stay_the_same_tensors() -> None:
    network = make()
    before = {name: buffer.data_ptr() for name, buffer in network.named_buffers()}
    checkpoint_blocks(network)
    trained(network)
    assert {name: buffer.data_ptr() for name, buffer in network.named_buffers()} == before


def test_a_second_backward_pass_adds_the_same_gradient() -> None:
    network = make("spectral")
    checkpoint_blocks(network)
    loss = network(images()).square().mean()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in network.parameters()]
    loss.backward()
    assert_same([parameter.grad / 2 for parameter in network.parameters()], once)


def test_frozen_batch_norm_is_used_as_it_is() -> None:
    plain, lean = make(), make()
    checkpoint_blocks(lean)
    for network in (plain, lean):
        network.blocks[0][1].eval()
    assert_same(trained(lean), trained(plain))
    assert int(lean.blocks[0][1].num_batches_tracked) == 0


@pytest.mark.parametrize(
    "make_network",
    [partial(UNet, depths=(4, 8, 16, 32)), partial(TransRoiNet, depths=(4, 8, 8, 8, 8, 4))],
    ids=["convolutions", "transformer"],
)
def test_real_networks_train_as_without(make_network: Callable[..., nn.Module]) -> None:
    networks = []
    for lean in (True, False):
        torch.manual_seed(0)
        networks.append(make_network(in_channels=1).double())
        if lean:
            assert len(checkpoint_blocks(networks[0])) > 5
        torch.manual_seed(1)
        networks[-1](images(2).repeat(1, 1, 4, 4)).square().mean().backward()
    lean_one, plain = networks
    gradients = [[parameter.grad for parameter in one.parameters()] for one in (lean_one, plain)]
    assert_same(gradients[0], gradients[1])
    assert_same(list(lean_one.buffers()), list(plain.buffers()))


def test_mixed_precision_is_that_of_the_first_run() -> None:
    found = []
    for lean in (True, False):
        network = make().float()
        if lean:
            checkpoint_blocks(network)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(images().float()).square().mean()
        loss.backward()  # outside, as in a training step
        found.append([parameter.grad for parameter in network.parameters()])
    assert_same(found[0], found[1])


def test_an_error_in_the_second_run_leaves_the_buffers() -> None:
    network = make()
    checkpoint_blocks(network)
    loss = network(images()).mean()
    before = copy.deepcopy(network.state_dict())

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = network.blocks[0][2].register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        loss.backward()
    handle.remove()
    assert_same(list(network.state_dict().values()), list(before.values()))
    assert_same(trained(network, 1), trained(restored(before), 1))


def restored(state: dict[str, Tensor]) -> Small:
    network = make()
    network.load_state_dict(state)
    return network


# What it is for


def test_less_is_kept_and_the_peak_is_lower() -> None:
    image = torch.randn(2, 3, 64, 64)
    plain, lean = UNet(depths=(16, 32, 64)), UNet(depths=(16, 32, 64))
    checkpoint_blocks(lean)
    assert bytes_saved(lean, image) < 0.5 * bytes_saved(plain, image)
    assert peak_of_a_step(lean, image) < 0.8 * peak_of_a_step(plain, image)


# What is not touched


def test_names_in_the_state_dict_stay() -> None:
    plain, lean = make(), make()
    checkpoint_blocks(lean)
    assert list(lean.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in lean.named_modules()] == [name for name, _ in plain.named_modules()]
    trained(lean)
    file = io.BytesIO()
    torch.save(lean.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert_same(trained(lean), trained(plain))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_only_training_with_gradients_runs_a_block_twice(training: bool, gradients: bool) -> None:
    network = make()
    checkpoint_blocks(network)
    network.train(training)
    runs = Runs(network.blocks[1][0])
    with torch.set_grad_enabled(gradients):
        loss = network(images()).mean()
    if gradients:
        loss.backward()
    assert runs.count == (2 if training and gradients else 1)


def test_batch_norm_is_renewed_as_without() -> None:
    plain, lean = make(), make()
    checkpoint_blocks(lean)
    for network in (plain, lean):
        renew_batch_norm(network, [(images(), True), (images(2), True)])
    assert_same(list(lean.buffers()), list(plain.buffers()))


def test_tensorboards_graph_can_still_be_drawn() -> None:
    class Writer:
        def add_graph(self, network: nn.Module, inputs: Tensor, use_strict_trace: bool) -> None:
            torch.jit.trace(network, inputs, strict=use_strict_trace)

    network = UNet(depths=(4, 8))
    checkpoint_blocks(network)
    assert write_graph(Writer(), network, torch.randn(1, 3, 32, 32))


# Copies


def test_a_copy_runs_its_own_blocks() -> None:
    network = make()
    checkpoint_blocks(network)
    alike = copy.deepcopy(network)
    nn.init.zeros_(alike.crossing.body[0].weight)
    own, others = Runs(alike.crossing.body[0]), Runs(network.crossing.body[0])
    wanted = make()
    wanted.load_state_dict(alike.state_dict())
    before = copy.deepcopy(network.state_dict())
    assert_same(trained(alike), trained(wanted))
    assert (own.count, others.count) == (6, 0)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert_same(list(network.state_dict().values()), list(before.values()))


@pytest.mark.parametrize("averaged_first", [True, False])
def test_averaged_weights_follow_whichever_was_made_first(averaged_first: bool) -> None:
    network, plain = make(), make()
    if averaged_first:
        average = AveragedNetwork(network, decay=None)
        checkpoint_blocks(network)
    else:
        checkpoint_blocks(network)
        average = AveragedNetwork(network, decay=None)
    expected = AveragedNetwork(plain, decay=None)
    for _ in range(2):
        trained(network, 1)
        trained(plain, 1)
        average.update_parameters(network)
        expected.update_parameters(plain)
    average.eval()
    expected.eval()
    assert_same([average.module(images())], [expected.module(images())])
    assert not torch.equal(average.module(images()), network.eval()(images()))


# Which blocks


def test_auto_takes_blocks_and_neither_lists_nor_single_layers() -> None:
    blocks = ["encoder.0", "encoder.1", "bottleneck", "decoder.0", "decoder.1"]
    assert checkpoint_blocks(UNet(depths=(4, 8, 16))) == blocks
    names = checkpoint_blocks(TransRoiNet())
    assert "context.blocks.0" in names  # of a wrapper, what it wraps
    assert "context" not in names


def test_auto_opens_sequences_of_blocks_to_any_depth() -> None:
    def layers() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())

    network = nn.Sequential(nn.Sequential(layers(), nn.Sequential(layers(), layers())), layers())
    assert checkpoint_blocks(network) == ["0.0", "0.1.0", "0.1.1", "1"]


def test_modules_that_a_network_lists_twice_are_no_nested_blocks() -> None:
    """MONAI's DynUNet holds its blocks once more in a recursion of skip layers."""
    network = DynUNet(2, 1, 1, [3, 3, 3], [1, 2, 2], [2, 2])
    names = checkpoint_blocks(network)
    assert "input_block" in names
    assert not any(name.startswith("skip_layers") for name in names)
    runs = Runs(network.input_block.conv1)
    network(torch.randn(1, 1, 16, 16)).mean().backward()
    assert runs.count == 2


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["crossing.body", "crossing"], ["crossing"]),
        (["crossing.body", "blocks.1"], ["blocks.1", "crossing.body"]),
        (["blocks"], ["blocks.0", "blocks.1"]),
        ([], []),
    ],
)
def test_named_blocks_are_taken_in_order_and_not_nested(names: list[str], taken: list[str]) -> None:
    network = make()
    assert checkpoint_blocks(network, names) == taken
    wanted = 2 if "crossing.body" in names else 1
    assert runs_of_a_step(network, network.crossing.body[0]) == wanted


@pytest.mark.parametrize("first", ["crossing", "crossing.body"])
def test_a_second_call_leaves_what_is_checkpointed(first: str) -> None:
    network = make()
    assert checkpoint_blocks(network, [first]) == [first]
    assert checkpoint_blocks(network, ["crossing", "crossing.body"]) == []
    assert runs_of_a_step(network, network.crossing.body[0]) == 2


def test_an_unknown_block_is_an_error_with_the_closest_name() -> None:
    network = make()
    with pytest.raises(ConfigurationError, match=r"no module 'crosing'; did you mean 'crossing'"):
        checkpoint_blocks(network, ["blocks.0", "crosing"])
    assert runs_of_a_step(network, network.blocks[0][0]) == 1  # nothing was changed


@pytest.mark.parametrize("blocks", ["blocks", [1]])
def test_what_is_no_list_of_names_is_an_error(blocks: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected auto or a list of module names"):
        checkpoint_blocks(make(), blocks)


def test_the_number_of_blocks_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    checkpoint_blocks(make())
    assert "3 blocks are computed again" in caplog.text


def test_a_network_without_blocks_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert checkpoint_blocks(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())) == []
    assert "Sequential has no further block" in caplog.text


def test_a_block_that_changes_its_input_is_an_error_and_no_wrong_gradient() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.Sequential(nn.Hardtanh(0, 1, inplace=True), nn.Conv2d(4, 1, 1))
    ).double()
    checkpoint_blocks(network, ["1"])
    with pytest.raises(RuntimeError, match="inplace"):
        network(images()).mean().backward()


# In a trainer


class Labelled(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = images(6)[index]
        return {"image": image, "label": (image > 0).double()}


def run_trainer(network: nn.Module, **settings: Any) -> TrainingStep:
    step = TrainingStep(batch_size=4, samples=6, **{"accumulation_steps": 1} | settings)
    torch.manual_seed(3)
    SupervisedTrainer(
        device="cpu",
        max_epochs=2,
        train_data_loader=DataLoader(Labelled(), batch_size=4),
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), lr=0.01),
        loss_function=nn.BCEWithLogitsLoss(),
        iteration_update=step,
        decollate=False,
    ).run()
    return step


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_ends_with_the_same_weights(accumulation: int) -> None:
    plain, lean = make(), make()
    checkpoint_blocks(lean)
    for network in (plain, lean):
        run_trainer(network, accumulation_steps=accumulation)
    assert_same(list(lean.state_dict().values()), list(plain.state_dict().values()))


@pytest.mark.parametrize("call", [1, 2, 4], ids=["first run", "second run", "later second run"])
def test_memory_that_runs_out_in_a_block_makes_smaller_pieces(call: int) -> None:
    plain, lean = make("group"), make("group")
    for module in [*plain.modules(), *lean.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # a group that is computed again draws again
    calls = itertools.count(1)

    def fail(*_: Any) -> None:
        if next(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    checkpoint_blocks(lean)
    lean.blocks[1][2].register_forward_hook(fail)
    assert run_trainer(lean).pieces == 2
    assert run_trainer(plain).pieces == 1
    assert_same(list(lean.parameters()), list(plain.parameters()))
