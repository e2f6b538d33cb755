from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from pipeline.errors import ConfigurationError
from pipeline.training.averaging import AveragedNetwork, EMAHandler


class Normalised(nn.Module):
    """A parameter of each kind, floating buffers and one that counts."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.last = nn.Conv2d(2, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        output: Tensor = self.last(self.norm(self.convolution(image)))
        return output


def perturb(network: nn.Module, generator: torch.Generator) -> None:
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator))
        else:
            tensor.add_(3)


def states(network: nn.Module, updates: int) -> Iterator[dict[str, Tensor]]:
    """Change the network again and again; yield what it is before each update."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(updates):
        perturb(network, generator)
        yield {k: v.clone() for k, v in network.state_dict().items()}


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_average_follows_the_documented_warm_up(decay: float) -> None:
    network = Normalised()
    average = AveragedNetwork(network, decay)
    expected: dict[str, Tensor] = {}
    for n, state in enumerate(states(network, 12)):
        average.update_parameters(network)
        share = min(decay, (1 + n) / (10 + n)) if n else 0.0  # the first update is a copy
        expected = {
            key: share * expected[key] + (1 - share) * value
            if n and value.is_floating_point()
            else value
            for key, value in state.items()
        }
        torch.testing.assert_close(dict(average.module.state_dict()), expected)


def test_without_a_decay_the_average_is_the_equal_mean() -> None:
    network = Normalised()
    average = AveragedNetwork(network, decay=None)
    seen = []
    for state in states(network, 7):
        average.update_parameters(network)
        seen.append(state)
    for key, found in average.module.state_dict().items():
        stacked = torch.stack([state[key] for state in seen])
        expected = stacked.mean(0) if found.is_floating_point() else stacked[-1]
        torch.testing.assert_close(found, expected)


def test_without_warm_up_the_share_is_the_stated_factor() -> None:
    network = Normalised()
    average = AveragedNetwork(network, 0.9, warm_up=False)
    expected: dict[str, Tensor] = {}
    for n, state in enumerate(states(network, 5)):
        average.update_parameters(network)
        expected = {
            key: 0.9 * expected[key] + 0.1 * value if n and value.is_floating_point() else value
            for key, value in state.items()
        }
        torch.testing.assert_close(dict(average.module.state_dict()), expected)


def test_following_is_a_copy_and_no_update() -> None:
    network = Normalised()
    average = AveragedNetwork(network, decay=None)
    for state in states(network, 3):
        average.follow(network)
        torch.testing.assert_close(dict(average.module.state_dict()), state, rtol=0, atol=0)
        assert int(average.n_averaged) == 0


def test_a_decay_of_zero_makes_the_average_the_network() -> None:
    network = Normalised()
    average = AveragedNetwork(network, 0.0)
    for state in states(network, 4):
        average.update_parameters(network)
        torch.testing.assert_close(dict(average.module.state_dict()), state, rtol=0, atol=0)


@given(decay=st.floats(0, 0.9999), updates=st.integers(1, 8))
def test_constant_weights_stay_as_they_are(decay: float, updates: int) -> None:
    network = Normalised()
    average = AveragedNetwork(network, decay)
    for _ in range(updates):
        average.update_parameters(network)
    found = dict(average.module.state_dict())
    torch.testing.assert_close(found, dict(network.state_dict()), rtol=0, atol=0)


def test_counting_buffers_are_copied_and_not_averaged() -> None:
    network = Normalised()
    average = AveragedNetwork(network, 0.99)
    for _ in states(network, 5):
        average.update_parameters(network)
    assert network.norm.num_batches_tracked == 15
    assert average.module.norm.num_batches_tracked == 15


def test_average_is_apart_from_the_network() -> None:
    network = Normalised()
    average = AveragedNetwork(network)
    before = {k: v.clone() for k, v in average.module.state_dict().items()}
    perturb(network, torch.Generator().manual_seed(2))
    torch.testing.assert_close(dict(average.module.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_decay_is_checked(decay: float) -> None:
    with pytest.raises(ConfigurationError, match=r"averaged weights must be in \[0, 1\)"):
        AveragedNetwork(Normalised(), decay)


class Counting(torch.optim.SGD):
    """Counts its steps."""

    steps = 0

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.steps += 1
        super().step()


@pytest.mark.parametrize(
    ("iterations", "accumulation"), [*itertools.product([1, 4, 5], [1, 2, 3, 7])]
)
@pytest.mark.filterwarnings("ignore:.*accumulation_steps:UserWarning")
def test_there_is_one_update_per_optimizer_step(iterations: int, accumulation: int) -> None:
    network = Normalised()
    average = AveragedNetwork(network, 0.5)
    optimizer = Counting(network.parameters(), lr=0.01)
    data = [{"image": torch.ones(1, 4, 4), "label": torch.ones(1, 4, 4)}] * iterations
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=3,
        train_data_loader=DataLoader(data, batch_size=1),
        network=network,
        optimizer=optimizer,
        loss_function=nn.MSELoss(),
        accumulation_steps=accumulation,
        train_handlers=[EMAHandler(average, network, accumulation)],
    )
    trainer.run()
    assert int(average.n_averaged) == optimizer.steps
    assert optimizer.steps == 3 * -(-iterations // accumulation)


def test_state_of_the_handler_goes_on_where_it_was() -> None:
    network = Normalised()
    whole, first = AveragedNetwork(network, 0.9), AveragedNetwork(network, 0.9)
    second = EMAHandler(AveragedNetwork(Normalised(seed=5), 0.9), network)
    for n, _ in enumerate(states(network, 6)):
        whole.update_parameters(network)
        if n < 3:
            first.update_parameters(network)
        if n == 2:
            second.load_state_dict(EMAHandler(first, network).state_dict())
        if n > 2:
            second.average.update_parameters(network)
    assert int(second.average.n_averaged) == 6
    found, expected = second.average.module.state_dict(), whole.module.state_dict()
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)


def test_handler_counts_groups_within_the_epoch() -> None:
    updates: list[int] = []

    class Recording(AveragedNetwork):
        def update_parameters(self, model: nn.Module) -> None:
            updates.append(engine.state.iteration)

    network = Normalised()
    engine = Engine(lambda *_: None)
    EMAHandler(Recording(network), network, accumulation_steps=2).attach(engine)
    engine.run([0] * 3, max_epochs=2)
    assert updates == [2, 3, 5, 6]
