"""What is seen of a network: its layers, their outputs, its graph."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigurationError
from pipeline.training.activations import (
    HISTOGRAM_VALUES,
    ActivationRecorder,
    select_layers,
    summarise,
    unwrap,
    write_graph,
)


def blocks(count: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict((f"block{n}", nn.Conv2d(1, 1, 1)) for n in range(count)))


class Listed(nn.Module):
    """Holds its blocks in a list, as encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)])
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(2, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        for block in self.encoder:
            image = block(image)
        return self.head(self.pool(image))


class Refusing(nn.Module):
    """Accepts one size only."""

    def __init__(self, side: int | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        self.side = side

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[-1] != self.side:
            raise RuntimeError(f"expected side {self.side}, got {image.shape[-1]}\nand more")
        return self.conv(image)


class Drawing(nn.Module):
    """Draws random numbers, also in evaluation."""

    def forward(self, image: Tensor) -> Tensor:
        return image + 0 * torch.rand_like(image)


class Writer:
    """Traces as a SummaryWriter does, and keeps the graph."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def add_graph(self, network: nn.Module, inputs: Tensor, use_strict_trace: bool) -> None:
        from torch.utils.tensorboard._pytorch_graph import graph

        graph(network, inputs, use_strict_trace=use_strict_trace)
        self.shapes.append(tuple(inputs.shape))


# --- choosing layers


def test_auto_takes_the_blocks_with_parameters_and_opens_lists() -> None:
    assert list(select_layers(Listed(), "auto")) == ["encoder.0", "encoder.1", "head"]


def test_auto_looks_through_a_block_that_holds_all_others() -> None:
    wrapped = nn.Sequential(OrderedDict(model=blocks(3)))
    assert list(select_layers(wrapped, "auto")) == ["model.block0", "model.block1", "model.block2"]


@pytest.mark.parametrize("count", [12, 13, 40])
def test_auto_takes_at_most_twelve_blocks_from_first_to_last(count: int) -> None:
    names = list(select_layers(blocks(count), "auto"))
    assert len(names) == len(set(names)) == 12
    assert names[0] == "block0"
    assert names[-1] == f"block{count - 1}"


def test_a_network_of_one_layer_is_watched_as_a_whole() -> None:
    network = nn.Conv2d(1, 1, 1)
    assert select_layers(network, "auto") == {"network": network}


def test_named_layers_come_in_the_order_of_the_network() -> None:
    assert list(select_layers(Listed(), ["head", "encoder.1"])) == ["encoder.1", "head"]


def test_null_chooses_no_layer() -> None:
    assert select_layers(Listed(), None) == {}


def test_an_unknown_layer_is_refused_with_the_closest_name() -> None:
    with pytest.raises(ConfigurationError, match=r"no module 'encoder\.7'.*'encoder\.[01]'"):
        select_layers(Listed(), ["encoder.7"])


@pytest.mark.parametrize("wrong", ["all", [3]], ids=["word", "number"])
def test_anything_but_auto_list_or_null_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected auto, a list of module names or null"):
        select_layers(Listed(), wrong)


def test_data_parallelism_is_unwrapped() -> None:
    network = Listed()
    assert unwrap(nn.DataParallel(network)) is network
    assert list(select_layers(nn.DataParallel(network), ["head"])) == ["head"]


# --- recording


def test_statistics_are_those_of_all_values() -> None:
    found = summarise(torch.tensor([[0.0, 0.0], [3.0, -5.0]]))
    assert found.statistics == pytest.approx(
        {"mean": -0.5, "std": 8.25**0.5, "zeros_share": 0.5, "max_abs": 5.0}
    )
    assert sorted(found.values) == [-5.0, 0.0, 0.0, 3.0]


def test_statistics_show_nan_and_the_histogram_leaves_it_out() -> None:
    found = summarise(torch.tensor([1.0, torch.nan, torch.inf]))
    assert found.mean != found.mean
    assert found.values.tolist() == [1.0]


def test_the_sample_is_bounded_and_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    assert summarise(torch.randn(1, generator=torch.Generator()).expand(10**6)).values.size == (
        HISTOGRAM_VALUES
    )
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_recorder_keeps_the_first_output_only() -> None:
    network = blocks(1)
    nn.init.ones_(network.block0.weight)
    nn.init.zeros_(network.block0.bias)
    with ActivationRecorder(select_layers(network, "auto")) as recorder:
        network(torch.full((1, 1, 2, 2), 3.0))
        network(torch.full((1, 1, 2, 2), 9.0))
    assert recorder.records["block0"].mean == 3.0


def test_the_recorder_takes_the_first_tensor_of_a_structure() -> None:
    lstm = nn.LSTM(2, 3)
    with ActivationRecorder({"lstm": lstm}) as recorder:
        lstm(torch.zeros(4, 1, 2))
    assert recorder.records["lstm"].values.size == 12


def test_no_hook_stays_after_an_error() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1), Refusing(side=4))
    with (
        pytest.raises(RuntimeError, match="expected side"),
        ActivationRecorder(dict(network.named_children())),
    ):
        network(torch.zeros(1, 1, 8, 8))
    assert not any(module._forward_hooks for module in network.modules())


# --- the graph


def test_the_graph_is_traced_on_one_small_item() -> None:
    writer = Writer()
    assert write_graph(writer, Listed(), torch.zeros(2, 1, 96, 40))
    assert writer.shapes == [(1, 1, 64, 40)]


def test_a_network_of_fixed_size_is_traced_at_that_size() -> None:
    writer = Writer()
    assert write_graph(writer, Refusing(side=96), torch.zeros(2, 1, 96, 96))
    assert writer.shapes == [(1, 1, 96, 96)]


def test_an_untraceable_network_costs_one_log_line(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        assert not write_graph(Writer(), Refusing(side=None), torch.zeros(1, 1, 8, 8))
    assert [record.getMessage() for record in caplog.records] == [
        "tensorboard: no graph, Refusing cannot be traced: expected side None, got 8"
    ]
    assert capsys.readouterr().out == ""


def test_tracing_changes_neither_modes_nor_buffers_nor_the_random_state() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), Drawing())
    network.train()
    network[1].eval()  # as in a frozen encoder
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    before = torch.random.get_rng_state()
    assert write_graph(Writer(), network, torch.ones(2, 1, 8, 8))
    assert [module.training for module in network] == [True, False, True]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(dict(network.named_buffers()), buffers, rtol=0, atol=0)
