from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.classification import networks
from pipeline.classification.networks import SmallResNet, resnet18, timm_network
from pipeline.errors import ConfigurationError
from pipeline.training.block_checkpointing import checkpoint_blocks
from pipeline.training.finetuning import load_pretrained

Make = Callable[..., nn.Module]

# At 102 classes, and as published for the 1000 of ImageNet.
COUNTS = {
    "SmallResNet": (321_462, 437_304),
    "resnet18": (11_228_838, 11_689_512),
    "resnet50": (23_717_030, 25_557_032),
    "densenet121": (7_058_406, 7_978_856),
    "efficientnet_b0": (4_138_210, 5_288_548),
    "seresnet50": (26_248_022, 28_088_024),
}
every_network = pytest.mark.parametrize("name", COUNTS)
# What resnet50 and seresnet50 would show again, with 25 million parameters each.
light_network = pytest.mark.parametrize("name", list(COUNTS)[:2] + list(COUNTS)[3:5])


def made(name: str, num_classes: int = 3, seed: int = 0, **settings: Any) -> nn.Module:
    torch.manual_seed(seed)
    return getattr(networks, name)(num_classes, **settings)


def image(*size: int, batch: int = 2, channels: int = 3) -> torch.Tensor:
    size = size or (32, 32)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *size, generator=generator)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@every_network
def test_parameter_count_is_the_published_layout(name: str) -> None:
    counts = []
    for classes in (102, 1000):
        with torch.device("meta"):
            counts.append(parameters(getattr(networks, name)(classes)))
    assert tuple(counts) == COUNTS[name]


def test_the_small_network_for_one_logit_has_a_third_of_a_million_parameters() -> None:
    assert parameters(SmallResNet()) == 308_433


@every_network
def test_group_norm_replaces_every_batch_norm_and_keeps_the_parameters(name: str) -> None:
    with torch.device("meta"):
        groups, batches = (getattr(networks, name)(3, norm=norm) for norm in ("group", "batch"))
    assert not [m for m in groups.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m for m in batches.modules() if isinstance(m, nn.BatchNorm2d)]
    shapes = [{n: p.shape for n, p in one.named_parameters()} for one in (groups, batches)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["SmallResNet", "resnet18"])
def test_with_group_norm_an_image_does_not_depend_on_the_batch_even_in_training(name: str) -> None:
    network = made(name, norm="group").train()
    torch.testing.assert_close(network(image())[:1], network(image()[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["SmallResNet", "densenet121", "efficientnet_b0"])
def test_forward_and_backward_give_every_parameter_a_gradient_and_repeat(name: str) -> None:
    gradients = []
    for _ in range(2):
        network = made(name, dropout=0.5, norm="group").train()
        logits = network(image())
        assert logits.shape == (2, 3)
        logits.square().sum().backward()
        assert [n for n, p in network.named_parameters() if p.grad is None] == []
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert torch.equal(*gradients)
    assert torch.isfinite(gradients[0]).all()


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (48, 129)])
@every_network
def test_any_size_from_32_px_gives_logits(name: str, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        network = getattr(networks, name)(1, in_channels=1).eval()
        assert network(torch.empty(2, 1, *size)).shape == (2, 1)


@every_network
def test_the_stem_halves_twice_at_most_and_the_rest_to_a_32nd(name: str) -> None:
    """MONAI's ResNet keeps the resolution in its first convolution unless told otherwise."""
    seen: list[tuple[int, ...]] = []
    with torch.device("meta"):
        network = getattr(networks, name)(3).eval()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda m, i, out: seen.append(tuple(out.shape[2:])))
        network(torch.empty(1, 3, 128, 128))
    assert seen[0] == (64, 64)
    assert (4, 4) in seen


@light_network
def test_dropout_drops_features_before_the_last_layer_in_training_only(name: str) -> None:
    network = made(name, dropout=0.5, norm="group")
    (prefix,) = network.head_prefixes
    head = network.get_submodule(prefix)
    features = torch.ones(4, head.in_features)
    assert head.dropout == 0.5
    assert not torch.equal(head(features), head(features))
    network.eval()
    assert torch.equal(head(features), head(features))
    others = [m for m in network.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    assert others == []


@light_network
def test_weights_for_other_classes_are_loaded_but_for_the_head(name: str) -> None:
    source, target = made(name, 10, seed=5), made(name, 3)
    fresh = copy.deepcopy(target.state_dict())
    report = load_pretrained(target, source.state_dict())
    (prefix,) = target.head_prefixes
    assert report.reinitialised == (f"{prefix}.weight", f"{prefix}.bias")
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())
    given = source.state_dict()
    for key, value in target.state_dict().items():
        assert torch.equal(value, (fresh if key in report.reinitialised else given)[key]), key


@light_network
def test_weights_for_colour_are_adapted_to_gray(name: str) -> None:
    source, target = made(name, 3, seed=5), made(name, 3, in_channels=1)
    report = load_pretrained(target, source.state_dict(), strict=True, input_channels="adapt")
    (prefix,) = target.stem_prefixes
    assert [key for key in report.adapted if not key.startswith(prefix)] == []
    assert len(report.adapted) == 1


def test_weights_named_as_torchvision_names_them_fit_resnet18() -> None:
    names = set(made("resnet18", 1000).state_dict())
    assert len(names) == 122
    assert {"conv1.weight", "bn1.running_var", "layer2.0.downsample.1.weight", "fc.bias"} <= names
    assert "layer2.0.downsample.0.bias" not in names


def test_a_bare_state_dict_needs_no_lamina_around_it() -> None:
    source, target = SmallResNet(2), SmallResNet(2)
    assert load_pretrained(target, source.state_dict(), strict=True).missing == ()
    assert torch.equal(target(image()), source(image()))


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_blocks_computed_again_give_the_same_gradient(name: str) -> None:
    gradients = []
    network = made(name, dropout=0.3)
    again = copy.deepcopy(network)
    assert len(checkpoint_blocks(again)) > 3
    for one in (network, again):
        torch.manual_seed(2)
        one(image(64, 64)).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in one.parameters()]))
    assert torch.equal(*gradients)


def test_the_small_network_exports_for_any_batch_and_size() -> None:
    network = made("SmallResNet").eval()
    shapes = {0: torch.export.Dim("batch", min=1, max=64), 2: torch.export.Dim.AUTO}
    program = torch.export.export(
        network, (image(64, 64),), dynamic_shapes=(shapes | {3: torch.export.Dim.AUTO},)
    )
    other = image(48, 100, batch=3)
    torch.testing.assert_close(program.module()(other), network(other))


@pytest.mark.parametrize("name", ["SmallResNet", "resnet18"])
def test_it_is_scripted_for_any_size(name: str) -> None:
    network = made(name).eval()
    scripted = torch.jit.script(network)
    torch.testing.assert_close(scripted(image(40, 56)), network(image(40, 56)))


@pytest.mark.slow
@every_network
def test_every_network_has_a_gradient_everywhere(name: str) -> None:
    network = made(name, norm="group").train()
    network(image()).square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.slow
@every_network
def test_every_network_is_scripted_and_exported_for_any_batch(name: str) -> None:
    network = made(name).eval()
    scripted = torch.jit.script(network)
    torch.testing.assert_close(scripted(image(40, 56)), network(image(40, 56)))
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(network, (image(64, 64),), dynamic_shapes=(batch,))
    other = image(64, 64, batch=5)
    torch.testing.assert_close(program.module()(other), network(other))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"norm": "layer"}, "norm must be 'group' or 'batch', got 'layer'"),
    ],
    ids=["classes", "channels", "dropout", "norm"],
)
@pytest.mark.parametrize("make", [SmallResNet, resnet18])
def test_a_wrong_setting_is_named(make: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(**{"num_classes": 2, **settings})


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigurationError, match=r"convnext_tiny: timm cannot.*lamina\[timm\]"):
        timm_network("convnext_tiny", 3)


def test_timm_gets_plain_arguments_and_never_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def create_model(name: str, **settings: Any) -> nn.Module:
        calls.append((name, settings))
        return nn.Identity()

    fake = SimpleNamespace(
        create_model=create_model, is_model=lambda name: name != "typo", __version__="1"
    )
    monkeypatch.setitem(sys.modules, "timm", fake)
    timm_network("convnext_tiny.fb_in22k", 3, in_channels=1, dropout=0.2)
    settings = {"pretrained": False, "num_classes": 3, "in_chans": 1, "drop_rate": 0.2}
    assert calls == [("convnext_tiny.fb_in22k", settings)]
    with pytest.raises(ConfigurationError, match="typo: no network of timm 1"):
        timm_network("typo", 3)


@pytest.mark.parametrize("name", ["hf-hub:someone/net", "local-dir:/tmp/net", "../net", ""])
def test_a_name_that_is_a_place_to_load_from_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="must be the plain name of a timm network"):
        timm_network(name, 3)
