from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import ConfigurationError
from pipeline.fundus.networks import RoiNet, TransRoiNet, UNet, UTrans
from pipeline.fundus.networks.attention import PixelTransformer, SelfAttention, TransformerBlock

LITE = {"depths": (16, 32, 64, 64, 32, 16), "kernel_size": 5}
COUNTS = {
    "unet": (UNet, 7_763_041),
    "roinet": (RoiNet, 30_718_016),
    "roinet_k3": (partial(RoiNet, kernel_size=3), 4_685_120),
    "utrans": (UTrans, 100_300_993),
    "transroinet": (TransRoiNet, 32_297_536),
    "transroinet_4": (partial(TransRoiNet, transformer_depth=4), 33_877_056),
    "transroinet_6": (partial(TransRoiNet, transformer_depth=6), 35_456_576),
    "transroinet_10": (partial(TransRoiNet, transformer_depth=10), 38_615_616),
    "transroinet_lite": (partial(TransRoiNet, transformer_depth=1, **LITE), 2_817_824),
    "unet_small": (partial(UNet, depths=(16, 32, 64, 128)), 482_737),
    "unet_five_levels": (partial(UNet, depths=(8, 16, 32, 64, 128)), 486_553),
}
SMALL = {
    "unet": partial(UNet, depths=[4, 8, 8]),
    "roinet": partial(RoiNet, depths=[4, 4, 4, 4, 4, 4], kernel_size=3),
    "utrans": partial(UTrans, depths=[4, 8, 8], transformer_depth=1, transformer_heads=2),
    "transroinet": partial(
        TransRoiNet,
        depths=[4, 4, 4, 4, 4, 4],
        kernel_size=3,
        transformer_depth=1,
        transformer_heads=2,
    ),
}
every_network = pytest.mark.parametrize("make", SMALL.values(), ids=SMALL.keys())
hybrids = pytest.mark.parametrize("name", ["utrans", "transroinet"])


def seeded(make, **settings) -> nn.Module:
    torch.manual_seed(0)
    return make(**settings)


def image(height: int = 24, width: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("make", "expected"), COUNTS.values(), ids=COUNTS.keys())
def test_parameter_count_is_the_published_layout(make, expected):
    with torch.device("meta"):
        network = make()
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_attention_equals_its_explicit_form_on_16x16_tokens():
    attention = seeded(partial(SelfAttention, 32, 4)).eval()
    tokens = torch.randn(2, 256, 32)
    query, key, value = (
        part.reshape(2, 256, 4, 8).transpose(1, 2) for part in attention.qkv(tokens).chunk(3, dim=2)
    )
    weights = torch.softmax(query @ key.transpose(2, 3) * 8**-0.5, dim=3)
    explicit = attention.proj((weights @ value).transpose(1, 2).reshape(2, 256, 32))
    torch.testing.assert_close(attention(tokens), explicit, rtol=1e-5, atol=1e-6)


def test_block_adds_attention_then_perceptron_on_normalised_tokens():
    block = seeded(partial(TransformerBlock, 8, 2)).eval()
    tokens = torch.randn(1, 9, 8)
    middle = tokens + block.attention(block.attention_norm(tokens))
    torch.testing.assert_close(block(tokens), middle + block.mlp(block.mlp_norm(middle)))


def test_transformer_is_equivariant_to_a_permutation_of_pixels():
    transformer = seeded(partial(PixelTransformer, 8, 2, 2)).eval()
    features = torch.randn(1, 8, 4, 6)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))

    def shuffled(maps: torch.Tensor) -> torch.Tensor:
        return maps.flatten(2)[..., order].unflatten(2, (4, 6))

    expected = shuffled(transformer(features))
    torch.testing.assert_close(transformer(shuffled(features)), expected, rtol=1e-4, atol=1e-5)


def test_attention_drops_weights_only_in_training():
    attention = seeded(partial(SelfAttention, 8, 2, 0.5))
    attention.proj_dropout.p = 0.0
    tokens = torch.randn(1, 16, 8)
    assert not torch.equal(attention(tokens), attention(tokens))
    attention.eval()
    assert torch.equal(attention(tokens), attention(tokens))


@every_network
@pytest.mark.parametrize("size", [(16, 16), (37, 51), (17, 64), (3, 5)])
def test_any_size_in_gives_that_size_out(make, size):
    network = seeded(make, out_channels=2).eval()
    assert network(image(*size)).shape == (2, 2, *size)


@every_network
def test_sizes_that_do_not_divide_equal_reflecting_and_cropping_outside(make):
    network = seeded(make).eval()
    picture = image(22, 31)
    assert network.divisor == 4
    padded = nn.functional.pad(picture, (0, 1, 1, 1), mode="reflect")
    torch.testing.assert_close(network(picture), network(padded)[..., 1:-1, :-1])


@pytest.mark.parametrize(
    ("make", "divisor"), [(UNet, 16), (UTrans, 16), (RoiNet, 4), (TransRoiNet, 4)]
)
def test_divisor_of_the_full_networks(make, divisor):
    with torch.device("meta"):
        assert make().divisor == divisor


def test_image_too_small_to_reflect_is_refused_with_the_size_to_pad_to():
    with pytest.raises(ConfigurationError, match=r"1x40 px is too small.*pad it to 4x40 px"):
        seeded(SMALL["unet"])(image(1, 40))


@every_network
def test_channels_last_gives_the_same_result(make):
    network = seeded(make).eval()
    expected = network(image())
    network = network.to(memory_format=torch.channels_last)
    result = network(image().to(memory_format=torch.channels_last))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_transformer_keeps_the_memory_format(layout):
    features = torch.randn(2, 8, 4, 6).contiguous(memory_format=layout)
    result = seeded(partial(PixelTransformer, 8, 1, 2))(features)
    assert result.is_contiguous(memory_format=layout)


@every_network
def test_one_seed_gives_one_initialisation(make):
    first, second = seeded(make).state_dict(), seeded(make).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_network
def test_sigmoid_is_the_only_difference_of_final_activation(make):
    logits = seeded(make).eval()(image())
    probability = seeded(make, final_activation="sigmoid").eval()(image())
    torch.testing.assert_close(probability, torch.sigmoid(logits))
    assert logits.min() < 0


@every_network
def test_every_parameter_receives_a_gradient(make):
    network = seeded(make)
    network(image()).square().sum().backward()
    silent = [name for name, value in network.named_parameters() if value.grad is None]
    assert silent == []


@every_network
def test_it_compiles_as_one_graph(make):
    network = seeded(make).eval()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image(22, 31)), network(image(22, 31)))


@pytest.mark.parametrize("final_activation", ["none", "sigmoid"])
@every_network
def test_it_is_scripted_for_any_size(make, final_activation):
    network = seeded(make, final_activation=final_activation).eval()
    scripted = torch.jit.script(network)
    for picture in (image(16, 24), image(22, 31)):
        torch.testing.assert_close(scripted(picture), network(picture))


@pytest.mark.parametrize("name", ["unet", "transroinet"])
def test_it_exports_for_every_multiple_of_the_divisor(name):
    network = seeded(SMALL[name]).eval()
    height, width = (4 * torch.export.Dim(axis, min=2, max=64) for axis in ("rows", "columns"))
    program = torch.export.export(
        network, (image(16, 24),), dynamic_shapes=({2: height, 3: width},)
    )
    torch.testing.assert_close(program.module()(image(40, 32)), network(image(40, 32)))


@hybrids
def test_hybrid_has_all_tensors_of_the_plain_network(name):
    plain = seeded(SMALL[{"utrans": "unet", "transroinet": "roinet"}[name]]).state_dict()
    hybrid = seeded(SMALL[name]).state_dict()
    assert {key: value.shape for key, value in plain.items()}.items() <= {
        key: value.shape for key, value in hybrid.items()
    }.items()
    assert {key.split(".")[0] for key in hybrid.keys() - plain.keys()} == {"context"}


@every_network
def test_prefixes_name_parts_that_exist(make):
    network = seeded(make)
    names = list(network.state_dict())
    for prefix in (*network.encoder_prefixes, *network.stem_prefixes, *network.head_prefixes):
        assert any(name.startswith(f"{prefix}.") for name in names), prefix


@pytest.mark.parametrize("norm", ["instance", "group"])
@every_network
def test_other_norms_have_the_parameters_of_batch_norm_and_ignore_the_batch(make, norm):
    network = seeded(make, norm=norm).eval()
    own = sum(parameter.numel() for parameter in network.parameters())
    assert own == sum(parameter.numel() for parameter in seeded(make).parameters())
    whole = network(image())
    torch.testing.assert_close(network(image()[:1]), whole[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (UNet, {"depths": [16]}, r"depths must be two or more positive widths.*got \[16\]"),
        (UNet, {"depths": [16, 0]}, r"got \[16, 0\]"),
        (RoiNet, {"depths": [4, 4, 4]}, "depths must be 6 positive widths"),
        (RoiNet, {"depths": [4, 4, 4, 3, 4, 4]}, "even in the fourth and fifth place"),
        (RoiNet, {"depths": [4] * 6, "kernel_size": 4}, "kernel_size must be odd"),
        (UNet, {"depths": [4, 8], "norm": "layer"}, "norm must be .*got 'layer'"),
        (UNet, {"depths": [4, 8], "final_activation": "softmax"}, "got 'softmax'"),
        (
            UNet,
            {"depths": [4, 8], "out_channels": 0},
            "out_channels must be an integer",
        ),
        (UTrans, {"depths": [4, 8], "transformer_heads": 3}, "must divide the 8 channels"),
        (UTrans, {"depths": [4, 8], "transformer_depth": 0}, "use UNet or RoiNet"),
        (UTrans, {"depths": [4, 8], "transformer_dropout": 1.0}, r"must be in \[0, 1\)"),
        (UTrans, {"depths": [4, 8], "transformer_mlp_ratio": 0.0}, "mlp_ratio must be positive"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_a_wrong_setting_is_named(make, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        make(**settings)


def test_a_wrong_number_of_channels_is_named():
    with pytest.raises(
        ConfigurationError, match=r"expects \(B, 3, H, W\), got .* \[2, 1, 24, 32\]"
    ):
        seeded(SMALL["unet"])(image(channels=1))


def multiplications(network: nn.Module, *size: int) -> int:
    """Counted without computing anything."""
    with FlopCounterMode(display=False) as counter:
        network.eval().to("meta")(torch.empty(size, device="meta"))
    return counter.get_total_flops()


def test_roinet_costs_eighteen_times_the_unet():
    size = (1, 3, 96, 96)
    assert round(multiplications(RoiNet(), *size) / multiplications(UNet(), *size)) == 18
