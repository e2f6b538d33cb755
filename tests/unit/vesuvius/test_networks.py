from __future__ import annotations

import copy
import importlib.util
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import ConfigurationError
from pipeline.inference.backends import Backend
from pipeline.training.block_checkpointing import checkpoint_blocks
from pipeline.vesuvius.networks import ResidualEncoderUNet, SmallUNet3D, TopologyAwareUNet3D

COUNTS = {
    "topology_aware": (TopologyAwareUNet3D, 22_575_329),
    "topology_aware_3": (partial(TopologyAwareUNet3D, initial_filters=16, depth=3), 1_400_561),
    "residual_encoder": (ResidualEncoderUNet, 102_410_561),
    "small": (SmallUNet3D, 659_857),
}
# Each halves the size twice.
SMALL = {
    "topology_aware": partial(TopologyAwareUNet3D, initial_filters=4, depth=2),
    "residual_encoder": partial(ResidualEncoderUNet, widths=[4, 6, 8], blocks=[1, 2, 1]),
    "small": partial(SmallUNet3D, widths=[4, 6, 8]),
    "small_instance": partial(SmallUNet3D, widths=[4, 6, 8], norm="instance"),
}
every_network = pytest.mark.parametrize("make", SMALL.values(), ids=SMALL.keys())
missing = [name for name in ("openvino", "onnx") if importlib.util.find_spec(name) is None]
needs_openvino = pytest.mark.skipif(
    bool(missing), reason=f"{missing} missing: pip install 'lamina[openvino]'"
)


def seeded(make, **settings) -> nn.Module:
    torch.manual_seed(0)
    return make(**settings)


def volume(depth: int = 8, height: int = 12, width: int = 16, channels: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, depth, height, width, generator=generator)


def loss_of(outputs: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    levels = outputs if isinstance(outputs, list) else [outputs]
    return torch.stack([level.square().sum() for level in levels]).sum()


def parameters_in(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("make", "expected"), COUNTS.values(), ids=COUNTS.keys())
def test_parameter_count_is_that_of_the_layout(make, expected):
    with torch.device("meta"):
        assert parameters_in(make()) == expected


def test_the_reference_network_has_its_published_parts():
    with torch.device("meta"):
        network = TopologyAwareUNet3D()
    below = [28_576, 166_016, 663_808, 2_654_720, 10_617_856]
    assert [parameters_in(block) for block in network.encoder] == below
    assert [parameters_in(block) for block in network.up] == [1_048_832, 262_272, 65_600, 16_416]
    joined = [5_308_928, 1_327_360, 331_904, 83_008]
    assert [parameters_in(block) for block in network.decoder] == joined
    assert [parameters_in(head) for head in network.heads] == [33]
    assert network.divisor == 16


@every_network
@pytest.mark.parametrize("size", [(8, 8, 8), (9, 14, 11), (5, 16, 7)])
@pytest.mark.parametrize("training", [True, False])
def test_any_size_in_gives_that_size_out(make, size, training):
    network = seeded(make, in_channels=3, out_channels=2).train(training)
    assert network(volume(*size, channels=3)).shape == (2, 2, *size)


@every_network
def test_sizes_that_do_not_divide_equal_reflecting_and_cropping_outside(make):
    network = seeded(make).eval()
    odd = volume(7, 10, 13)
    assert network.divisor == 4
    padded = nn.functional.pad(odd, (1, 2, 1, 1, 0, 1), mode="reflect")
    torch.testing.assert_close(network(odd), network(padded)[..., :-1, 1:-1, 1:-2])


def test_volume_too_small_to_reflect_is_refused_with_the_size_to_pad_to():
    with pytest.raises(ConfigurationError, match=r"1x9x8 voxels is too small.*pad it to 4x12x8 v"):
        seeded(SMALL["small"])(volume(1, 9, 8))


@every_network
def test_logits_are_not_probabilities(make):
    network = seeded(make).eval()
    with torch.no_grad():
        network.heads[0].bias -= 10
        assert network(volume()).max() < 0


@every_network
def test_every_parameter_receives_a_gradient(make):
    network = seeded(make)
    loss_of(network(volume())).backward()
    silent = [name for name, value in network.named_parameters() if value.grad is None]
    assert silent == []


@every_network
def test_a_sample_is_treated_by_itself(make):
    network = seeded(make)
    whole = network(volume())
    torch.testing.assert_close(network(volume()[1:]), whole[1:], rtol=1e-4, atol=1e-5)


@every_network
def test_one_seed_gives_one_initialisation(make):
    first, second = seeded(make).state_dict(), seeded(make).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_network
def test_channels_last_gives_the_same_result(make):
    network = seeded(make).eval()
    expected = network(volume())
    network = network.to(memory_format=torch.channels_last_3d)
    result = network(volume().to(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@every_network
def test_a_deep_copy_computes_the_same_and_shares_nothing(make):
    network = seeded(make, deep_supervision=1).eval()
    twin = copy.deepcopy(network)
    torch.testing.assert_close(twin(volume()), network(volume()), rtol=0, atol=0)
    own = {parameter.data_ptr() for parameter in network.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in twin.parameters())


@every_network
def test_a_state_dict_survives_a_file(make):
    network, other = seeded(make), make()
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other.eval()(volume()), network.eval()(volume()), rtol=0, atol=0)


@every_network
def test_its_blocks_can_be_computed_again_in_the_backward_pass(make):
    plain, frugal = seeded(make), seeded(make)
    assert len(checkpoint_blocks(frugal)) >= 5
    for network in (plain, frugal):
        loss_of(network(volume())).backward()
    for one, other in zip(plain.parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@every_network
def test_it_compiles_as_one_graph(make):
    network = seeded(make).eval()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(volume(7)), network(volume(7)))


@every_network
def test_it_is_scripted_for_any_size(make):
    network = seeded(make).eval()
    scripted = torch.jit.script(network)
    for block in (volume(), volume(7, 10, 13)):
        torch.testing.assert_close(scripted(block), network(block))


@needs_openvino
@every_network
def test_openvino_agrees_on_several_sizes(make):
    network = seeded(make).eval()
    # It raises where the graph differs from the network by more than a thousandth.
    predict = Backend("openvino").prepare(network, volume()[:1])
    for window in (volume(), volume(12, 8, 8)[:1]):
        torch.testing.assert_close(predict(window), network(window), rtol=1e-3, atol=1e-3)


@every_network
def test_prefixes_name_parts_that_exist(make):
    network = seeded(make)
    names = list(network.state_dict())
    for prefix in (*network.encoder_prefixes, *network.stem_prefixes, *network.head_prefixes):
        assert any(name.startswith(f"{prefix}.") for name in names), prefix


@every_network
def test_deep_supervision_gives_each_level_at_its_size_in_training(make):
    network = seeded(make, deep_supervision=1, out_channels=2)
    levels = network(volume())
    assert [tuple(level.shape) for level in levels] == [(2, 2, 8, 12, 16), (2, 2, 4, 6, 8)]


@every_network
def test_deep_supervision_reaches_every_parameter(make):
    network = seeded(make, deep_supervision=1)
    loss_of(network(volume())).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@every_network
def test_deep_supervision_leaves_the_full_size_as_it_is(make):
    deep, plain = seeded(make, deep_supervision=1), seeded(make)
    plain.load_state_dict(
        {name: value for name, value in deep.state_dict().items() if "heads.1" not in name}
    )
    torch.testing.assert_close(deep(volume())[0], plain(volume()), rtol=0, atol=0)
    deep, plain = deep.eval(), plain.eval()
    torch.testing.assert_close(deep(volume(7, 9, 10)), plain(volume(7, 9, 10)), rtol=0, atol=0)


def test_a_script_supervises_in_training_alone():
    network = seeded(SMALL["small"], deep_supervision=1)
    scripted = torch.jit.script(network)
    for found, expected in zip(scripted(volume()), network(volume()), strict=True):
        torch.testing.assert_close(found, expected)
    odd = volume(7, 9, 10)
    torch.testing.assert_close(scripted.eval()(odd), network.eval()(odd))


def test_deep_supervision_names_the_patch_size_that_does_not_divide():
    with pytest.raises(ConfigurationError, match=r"multiples of 4, got 7x12x16; set patch_size"):
        seeded(SMALL["small"], deep_supervision=1)(volume(7))


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (TopologyAwareUNet3D, {"depth": 0}, "depth must be an integer of at least 1, got 0"),
        (TopologyAwareUNet3D, {"initial_filters": 1.5}, r"initial_filters must be .* got 1\.5"),
        (SmallUNet3D, {"widths": [8]}, r"widths must be two or more .* got \[8\]"),
        (SmallUNet3D, {"widths": [8, 16], "norm": "batch"}, "norm must be .* got 'batch'"),
        (SmallUNet3D, {"widths": [8, 16], "out_channels": 0}, "out_channels must be at least 1"),
        (SmallUNet3D, {"widths": [8, 16], "deep_supervision": 1}, "from 0 to 0, got 1"),
        (ResidualEncoderUNet, {"widths": [8, 0], "blocks": [1, 1]}, r"got \[8, 0\]"),
        (ResidualEncoderUNet, {"widths": [8, 8], "blocks": [1]}, "blocks must be 2 positive"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_a_wrong_setting_is_named(make, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        make(**settings)


@pytest.mark.parametrize("shape", [(1, 2, 8, 8, 8), (1, 8, 8, 8), (1, 1, 8, 8)], ids=str)
def test_a_wrong_shape_is_named(shape):
    with pytest.raises(ConfigurationError, match=r"expects \(B, 1, D, H, W\), got .*in_channels"):
        seeded(SMALL["small"])(torch.zeros(shape))


def multiplications(network: nn.Module, *size: int) -> int:
    """Counted without computing anything."""
    with FlopCounterMode(display=False) as counter:
        network.eval().to("meta")(torch.empty(size, device="meta"))
    return counter.get_total_flops()


def test_the_original_network_costs_fourteen_times_the_small_one():
    size = (1, 1, 32, 32, 32)
    small = multiplications(SmallUNet3D(), *size)
    assert round(multiplications(TopologyAwareUNet3D(), *size) / small) == 14
