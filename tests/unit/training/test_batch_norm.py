from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from pipeline.training.averaging import AveragedNetwork
from pipeline.training.batch_norm import renew_batch_norm
from pipeline.training.finetuning import freeze_parameters


class Normalised(nn.Module):
    """A layer before and a layer behind batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.last = nn.Conv2d(2, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        output: Tensor = self.last(self.norm(self.convolution(image)))
        return output


def images(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 1, 6, 6, generator=generator) for _ in range(count)]


def whole(batches: list[Tensor]) -> list[tuple[Tensor, bool]]:
    return [(batch, True) for batch in batches]


def test_renewed_statistics_are_the_means_over_the_batches() -> None:
    network = Normalised()
    batches = images(3)
    assert renew_batch_norm(network, whole(batches)) == 1
    with torch.no_grad():
        features = [network.convolution(batch) for batch in batches]
    mean = torch.stack([f.mean((0, 2, 3)) for f in features]).mean(0)
    variance = torch.stack([f.var((0, 2, 3)) for f in features]).mean(0)
    torch.testing.assert_close(network.norm.running_mean, mean)
    torch.testing.assert_close(network.norm.running_var, variance)


def test_renewing_statistics_agrees_with_torch() -> None:
    ours, theirs = Normalised(), Normalised()
    renew_batch_norm(ours, whole(images(3)))
    torch.optim.swa_utils.update_bn(images(3), theirs)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


def test_a_layer_behind_another_sees_what_it_sees_in_training() -> None:
    ours, theirs = (nn.Sequential(Normalised(), nn.BatchNorm2d(1)) for _ in range(2))
    assert renew_batch_norm(ours, whole(images(3))) == 2
    torch.optim.swa_utils.update_bn(images(3), theirs)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


def test_a_layer_that_no_batch_reaches_keeps_its_statistics() -> None:
    network = Normalised()
    network.idle = nn.BatchNorm2d(1)
    network.idle.running_mean.fill_(2.0)
    renew_batch_norm(network, whole(images(2)))
    assert network.idle.running_mean.item() == 2.0


@pytest.mark.parametrize("training", [True, False])
def test_renewing_statistics_changes_nothing_else(training: bool) -> None:
    network = nn.Sequential(Normalised(), nn.Dropout(0.5)).train(training)
    network[0].last.eval()
    before = {k: v.clone() for k, v in network.named_parameters()}
    modes = [module.training for module in network.modules()]
    drawn = torch.get_rng_state()
    renew_batch_norm(network, whole(images(2)))
    assert [module.training for module in network.modules()] == modes
    assert network[0].norm.momentum == 0.1
    assert torch.equal(torch.get_rng_state(), drawn)  # dropout is off
    torch.testing.assert_close(dict(network.named_parameters()), before, rtol=0, atol=0)


def test_frozen_layers_keep_their_statistics() -> None:
    network = nn.Sequential(Normalised(), nn.BatchNorm2d(1))
    network[0].norm.running_mean.fill_(2.0)
    freeze_parameters(network, ["0"])
    average = AveragedNetwork(network)
    assert renew_batch_norm(average.module, whole(images(2))) == 1
    assert average.module[0].norm.running_mean.tolist() == [2.0, 2.0]
    assert average.module[1].running_mean.item() != 0.0


def test_without_batch_norm_no_batch_is_read() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, track_running_stats=True))

    def batches() -> Iterator[tuple[Tensor, bool]]:
        pytest.fail("a batch was read")
        yield torch.empty(0), True

    assert renew_batch_norm(network, batches()) == 0


def test_modes_are_put_back_after_a_batch_that_fails() -> None:
    network = Normalised()

    def batches() -> Iterator[tuple[Tensor, bool]]:
        yield images(1)[0], True
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011 - nothing but the type is ours
        renew_batch_norm(network, batches())
    assert network.norm.training
    assert not network.norm._forward_pre_hooks
