from __future__ import annotations

import copy
import logging

import pytest
import torch
from monai.networks.nets import BasicUNet
from torch import nn

from pipeline.errors import CheckpointError, ConfigurationError
from pipeline.fundus.networks import RoiNet, TransRoiNet, UNet
from pipeline.training.checkpoints import write_checkpoint
from pipeline.training.finetuning import (
    adapt_input_channels,
    freeze_parameters,
    load_pretrained,
)

DEPTHS = [4, 8, 8]
ROI_DEPTHS = [5, 4, 4, 4, 4, 4]


def trained(network: nn.Module, seed: int = 7) -> nn.Module:
    """Return `network` with values that no initialisation has, running statistics included."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            noise = 0.3 * torch.randn(value.shape, generator=generator)
            value.copy_(noise.abs() + 0.5 if "running_var" in name else noise)
    return network.eval()


def unet(**settings) -> UNet:
    torch.manual_seed(0)
    return UNet(depths=DEPTHS, **settings).eval()


def gray(channels: int) -> torch.Tensor:
    picture = torch.randn(2, 1, 16, 24, generator=torch.Generator().manual_seed(3))
    return picture.expand(-1, channels, -1, -1)


def train_one_step(network: nn.Module, channels: int = 3) -> None:
    network.train()
    trainable = [value for value in network.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    network(gray(channels) + 2.0).square().mean().backward()
    optimizer.step()


def test_the_same_network_computes_the_same_after_loading():
    source, target = trained(unet()), unet()
    report = load_pretrained(target, source.state_dict(), strict=True)
    assert torch.equal(target(gray(3)), source(gray(3)))
    assert set(report.loaded) == set(source.state_dict())
    assert report.lines() == [
        "state dict: loaded: 66 tensors (encoder 24, bottleneck 12, up 4, decoder 24, head 2)"
    ]


@pytest.mark.parametrize("as_text", [True, False])
def test_a_checkpoint_file_is_read_and_named_in_the_report(tmp_path, as_text):
    source, target = trained(unet()), unet()
    path = tmp_path / "best.pt"
    write_checkpoint(path, {"model": source.state_dict(), "epoch": 3})
    report = load_pretrained(target, str(path) if as_text else path, strict=True)
    assert report.source == str(path)
    assert torch.equal(target(gray(3)), source(gray(3)))


@pytest.mark.parametrize("key", ["model", "state_dict"])
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_wrappers_of_the_state_dict_do_not_matter(key, wrapper):
    source, target = trained(unet()), unet()
    state = {wrapper + name: value for name, value in source.state_dict().items()}
    load_pretrained(target, {key: state, "epoch": 1}, strict=True)
    assert torch.equal(target(gray(3)), source(gray(3)))


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("family", ["unet", "roinet"])
def test_a_gray_image_gives_the_same_result_through_adapted_channels(before, after, family):
    def network(channels: int) -> nn.Module:
        if family == "unet":
            return unet(in_channels=channels)
        return RoiNet(channels, depths=ROI_DEPTHS, kernel_size=3).eval()

    source, target = trained(network(before)), network(after)
    report = load_pretrained(target, source.state_dict(), strict=True, input_channels="adapt")
    torch.testing.assert_close(target(gray(after)), source(gray(before)), rtol=1e-4, atol=1e-5)
    shortcuts = 2 if family == "roinet" else 1  # a residual block has two convolutions at its door
    assert len(report.adapted) == (shortcuts if before != after else 0)


def test_whole_multiples_repeat_the_channels_in_order():
    weight = torch.arange(6.0).reshape(1, 3, 2, 1)
    expected = torch.cat([weight, weight], dim=1) / 2
    torch.testing.assert_close(adapt_input_channels(weight, 6), expected)
    torch.testing.assert_close(adapt_input_channels(weight, 1), weight.sum(1, keepdim=True))


def test_other_input_channels_are_an_error_unless_asked_for():
    target = unet(in_channels=1)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(CheckpointError, match=r"takes 3 input channels and the network 1; set in_"):
        load_pretrained(target, trained(unet()).state_dict())
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_the_head_is_reinitialised_for_other_classes():
    source, target = trained(unet()), unet(out_channels=4)
    fresh = copy.deepcopy(target.head.state_dict())
    report = load_pretrained(target, source.state_dict())
    assert report.reinitialised == ("head.weight", "head.bias")
    assert all(torch.equal(fresh[name], value) for name, value in target.head.state_dict().items())
    assert torch.equal(target.encoder[0][0].weight, source.encoder[0][0].weight)


def test_a_network_without_prefixes_is_adapted_at_its_first_and_last_layer():
    def network(inside: int, outside: int) -> nn.Module:
        return BasicUNet(2, inside, outside, features=(4, 4, 4, 4, 4, 4), norm="batch").eval()

    source = trained(network(3, 1))
    report = load_pretrained(network(1, 2), source.state_dict(), input_channels="adapt")
    assert report.adapted == ("conv_0.conv_0.conv.weight",)
    assert report.reinitialised == ("final_conv.weight", "final_conv.bias")
    assert report.mismatched + report.missing + report.unexpected == ()


def test_a_plain_network_fills_a_hybrid_but_for_its_transformer():
    source = trained(RoiNet(depths=ROI_DEPTHS, kernel_size=3))
    target = TransRoiNet(depths=ROI_DEPTHS, kernel_size=3, transformer_depth=1, transformer_heads=2)
    report = load_pretrained(target, source.state_dict())
    assert set(report.loaded) == set(source.state_dict())
    assert {name.split(".")[0] for name in report.missing} == {"context"}


def test_every_group_is_one_logged_line_with_counts(caplog):
    state = trained(unet()).state_dict() | {"aux.weight": torch.zeros(1)}
    state["decoder.1.0.weight"] = torch.zeros(3, 3)
    del state["up.0.bias"]
    with caplog.at_level(logging.INFO, logger="pipeline.training.finetuning"):
        target = unet(in_channels=1, out_channels=2)
        report = load_pretrained(target, state, freeze=["encoder"], input_channels="adapt")
    lines = [line.removeprefix("state dict: ") for line in report.lines()]
    assert lines[1:] == [
        "adapted to other input channels: 1 tensor (encoder 1)",
        "head reinitialised for other classes: 2 tensors (head 2)",
        "skipped, another shape: 1 tensor (decoder 1)",
        "not in the checkpoint, left as initialised: 1 tensor (up 1)",
        "in the checkpoint only, skipped: 1 tensor (aux 1)",
        "frozen: 18 tensors (encoder 12, bottleneck 6)",
    ]
    assert lines[0].startswith("loaded: ")
    assert caplog.messages == report.lines()


@pytest.mark.parametrize("change", ["missing", "unexpected", "head"])
def test_strict_refuses_whatever_does_not_fit_and_changes_nothing(change):
    state = trained(unet()).state_dict()
    target = unet(out_channels=2 if change == "head" else 1)
    if change == "missing":
        del state["up.0.bias"]
    if change == "unexpected":
        state["aux.weight"] = torch.zeros(1)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(CheckpointError, match=r"state dict: [12] tensors? .* do not fit"):
        load_pretrained(target, state, strict=True)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_a_foreign_checkpoint_is_refused():
    with pytest.raises(CheckpointError, match="no tensor fits the network"):
        load_pretrained(unet(), nn.Linear(2, 2).state_dict())


@pytest.mark.parametrize(
    ("freeze", "expected"),
    [
        (["encoder"], ["bottleneck", "encoder"]),
        (["decoder.0", "head"], ["decoder", "head"]),
        (["up."], ["up"]),
        ([], []),
    ],
    ids=str,
)
def test_only_the_frozen_parts_stop_learning(freeze, expected):
    network = unet()
    report = load_pretrained(network, trained(unet()).state_dict(), freeze=freeze)
    assert {name.split(".")[0] for name in report.frozen} == set(expected)
    before = copy.deepcopy(dict(network.named_parameters()))
    train_one_step(network)
    unchanged = {name for name, value in network.named_parameters() if value.equal(before[name])}
    assert unchanged == set(report.frozen)


def test_frozen_batch_norm_keeps_its_statistics_while_the_rest_trains():
    network = unet()
    load_pretrained(network, trained(unet()).state_dict(), freeze=["encoder"])
    before = copy.deepcopy(dict(network.named_buffers()))
    train_one_step(network)
    assert not network.encoder[0][1].training
    assert network.decoder[0][1].training
    moved = {
        name.split(".")[0]
        for name, value in network.named_buffers()
        if not value.equal(before[name])
    }
    assert moved == {"decoder"}


def test_a_copy_of_a_frozen_network_is_frozen_by_itself():
    network = unet()
    freeze_parameters(network, ["encoder"])
    twin = copy.deepcopy(network)
    network.encoder[0][1].training = True
    twin.train()
    assert network.encoder[0][1].training
    assert not twin.encoder[0][1].training
    assert twin.decoder[0][1].training


def test_parts_are_matched_whole():
    network = nn.ModuleDict({"conv1": nn.Linear(1, 1), "conv10": nn.Linear(1, 1)})
    assert freeze_parameters(network, ["conv1"]) == ("conv1.weight", "conv1.bias")


def test_an_unknown_part_is_named_and_nothing_is_loaded():
    target = unet()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ConfigurationError, match=r"no part 'encodr', .*did you mean encoder\?"):
        load_pretrained(target, trained(unet()).state_dict(), freeze=["head", "encodr"])
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())
    assert all(value.requires_grad for value in target.parameters())


def test_a_single_word_is_no_list_of_parts():
    with pytest.raises(ConfigurationError, match=r"must be a list of parts, got 'encoder'"):
        freeze_parameters(unet(), "encoder")


def test_a_wrong_setting_is_named():
    with pytest.raises(ConfigurationError, match="input_channels must be 'error' or 'adapt'"):
        load_pretrained(unet(), {}, input_channels="repeat")


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_that_others_saved_are_read_from_their_file(tmp_path, legacy):
    """A plain state dict, as model zoos give it, in torch's format of today or of old."""
    source, network = trained(unet()), unet()
    path = tmp_path / "weights.pth"
    torch.save(source.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    load_pretrained(network, path)
    for name, value in network.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])
