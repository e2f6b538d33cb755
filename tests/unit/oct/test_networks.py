from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import ConfigurationError
from pipeline.inference.export import export_onnx
from pipeline.oct.networks import HybridAttentionUNet, SmallUNet
from pipeline.oct.networks.hybrid_attention import EdgeGate
from pipeline.oct.networks.sobel import SobelMagnitude
from pipeline.training.block_checkpointing import checkpoint_blocks

COUNTS = {
    "hybrid_64": (HybridAttentionUNet, 37_688_975),
    "hybrid_32": (partial(HybridAttentionUNet, base_channels=32), 9_429_839),
    "hybrid_16": (partial(HybridAttentionUNet, base_channels=16), 2_361_263),
    "hybrid_8": (partial(HybridAttentionUNet, base_channels=8), 592_223),
    "small": (SmallUNet, 124_195),
}
SMALL = {
    "hybrid": partial(HybridAttentionUNet, base_channels=2),
    "small": partial(SmallUNet, widths=[2, 3, 4, 4, 4]),
}
every_network = pytest.mark.parametrize("make", SMALL.values(), ids=SMALL.keys())


def seeded(make, **settings) -> nn.Module:
    torch.manual_seed(0)
    return make(**settings)


def image(height: int = 48, width: int = 64) -> torch.Tensor:
    return torch.rand(2, 1, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("make", "expected"), COUNTS.values(), ids=COUNTS.keys())
def test_parameter_count_is_the_published_layout(make, expected):
    with torch.device("meta"):
        network = make()
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
    assert network.divisor == 16


@every_network
@pytest.mark.parametrize("size", [(48, 64), (49, 61), (31, 40), (17, 19)])
def test_any_size_in_gives_logits_of_that_size(make, size):
    logits = seeded(make).eval()(image(*size))
    assert logits.shape == (2, 3, *size)
    assert logits.min() < 0


@every_network
def test_sizes_that_do_not_divide_equal_reflecting_and_cropping_outside(make):
    network, bscan = seeded(make).eval(), image(46, 61)
    padded = nn.functional.pad(bscan, (1, 2, 1, 1), mode="reflect")
    torch.testing.assert_close(network(bscan), network(padded)[..., 1:-1, 1:-2])


def test_a_bscan_too_small_to_reflect_is_refused_with_the_size_to_pad_to():
    with pytest.raises(ConfigurationError, match=r"5x40 px is too small.*pad it to 16x48 px"):
        seeded(SMALL["small"])(image(5, 40))


def test_a_ramp_has_an_edge_of_its_slope_and_the_border_is_none():
    ramp = (0.5 * torch.arange(12.0)).expand(1, 2, 9, 12)
    edges = SobelMagnitude()(ramp)
    assert edges.shape == (1, 1, 9, 12)
    torch.testing.assert_close(edges[..., 1:-1], torch.full((1, 1, 9, 10), 0.5))
    assert SobelMagnitude()(torch.ones(1, 3, 6, 6)).max() < 1e-3


def test_edges_are_no_parameters_and_no_part_of_the_state():
    edges = SobelMagnitude()
    assert not list(edges.parameters())
    assert not edges.state_dict()


def test_edges_of_a_flat_image_have_a_finite_gradient_in_half_precision():
    flat = torch.ones(1, 2, 6, 6, dtype=torch.bfloat16, requires_grad=True)
    SobelMagnitude()(flat).sum().backward()
    assert flat.grad.isfinite().all()


def test_edges_reach_only_the_two_upper_skips():
    with torch.device("meta"):
        network = HybridAttentionUNet(base_channels=8)
    kinds = [type(gate).__name__ for gate in network.gates]  # the lowest first
    assert kinds == ["SpatialGate", "SpatialGate", "EdgeGate", "EdgeGate"]


@every_network
def test_every_parameter_receives_a_gradient(make):
    network = seeded(make)
    network(image()).square().sum().backward()
    silent = [name for name, value in network.named_parameters() if value.grad is None]
    assert silent == []


@every_network
def test_one_seed_gives_one_initialisation(make):
    first, second = seeded(make).state_dict(), seeded(make).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def gate_inputs(height: int = 16, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    skip = torch.rand(1, 4, height, width, generator=generator)
    return skip, torch.rand(1, 8, height // 2, width // 2, generator=generator)


def test_the_edge_gate_compiles_as_one_graph():
    gate = seeded(partial(EdgeGate, 4, 8)).eval()
    compiled = torch.compile(gate, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*gate_inputs()), gate(*gate_inputs()))


def test_the_edge_gate_exports_for_every_even_size():
    gate = seeded(partial(EdgeGate, 4, 8)).eval()
    half = {2: torch.export.Dim("rows", min=2, max=64), 3: torch.export.Dim("columns", min=2)}
    whole = {axis: 2 * size for axis, size in half.items()}
    program = torch.export.export(gate, gate_inputs(), dynamic_shapes=(whole, half))
    torch.testing.assert_close(program.module()(*gate_inputs(20, 14)), gate(*gate_inputs(20, 14)))


@pytest.mark.slow
@every_network
def test_it_compiles_as_one_graph(make):
    network = seeded(make).eval()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image(46, 61)), network(image(46, 61)))


@pytest.mark.slow
@every_network
def test_it_exports_for_every_multiple_of_the_divisor(make):
    network = seeded(make).eval()
    height, width = (16 * torch.export.Dim(axis, min=2, max=64) for axis in ("rows", "columns"))
    program = torch.export.export(network, (image(),), dynamic_shapes=({2: height, 3: width},))
    torch.testing.assert_close(program.module()(image(64, 96)), network(image(64, 96)))


@every_network
def test_it_is_scripted_for_any_size(make):
    network = seeded(make).eval()
    scripted = torch.jit.script(network)
    for bscan in (image(), image(46, 61)):
        torch.testing.assert_close(scripted(bscan), network(bscan))


@every_network
def test_an_onnx_graph_gives_the_same_logits_at_other_sizes(make):
    runtime = pytest.importorskip("onnxruntime")
    network = seeded(make).eval()
    graph = export_onnx(network, image())
    session = runtime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    other = image(32, 96)
    (logits,) = session.run(None, {"windows": other.numpy()})
    np.testing.assert_allclose(logits, network(other).detach(), rtol=1e-3, atol=1e-4)


@every_network
def test_memory_efficient_training_has_the_same_gradients(make):
    plain, efficient = seeded(make), seeded(make)
    assert checkpoint_blocks(efficient)
    for network in (plain, efficient):
        network(image()).square().mean().backward()
    for one, other in zip(plain.parameters(), efficient.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@every_network
def test_prefixes_name_parts_that_exist(make):
    network = seeded(make)
    names = list(network.state_dict())
    for prefix in (*network.encoder_prefixes, *network.stem_prefixes, *network.head_prefixes):
        assert any(name.startswith(f"{prefix}.") for name in names), prefix


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (SmallUNet, {"widths": [16]}, r"widths must be two or more positive widths.*\[16\]"),
        (SmallUNet, {"widths": [16, 0]}, r"got \[16, 0\]"),
        (SmallUNet, {"out_channels": 0}, "out_channels must be an integer of at least 1"),
        (HybridAttentionUNet, {"base_channels": 0}, "base_channels must be an integer of at"),
    ],
)
def test_a_wrong_setting_is_named(make, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        make(**settings)


def test_a_wrong_number_of_channels_is_named():
    with pytest.raises(ConfigurationError, match=r"expects \(B, 1, H, W\), got .*\[1, 3, 32, 32\]"):
        seeded(SMALL["small"])(torch.zeros(1, 3, 32, 32))
