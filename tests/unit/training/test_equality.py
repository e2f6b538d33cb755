from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.losses import DiceLoss as MonaiDiceLoss
from torch import nn

from pipeline.training import losses
from pipeline.training.equality import equality_notes

PLAIN = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2))


def noted(loss: Any, network: nn.Module = PLAIN) -> str:
    return " | ".join(equality_notes(network, loss))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.SyncBatchNorm(2)])
def test_batch_norm_is_named(norm: nn.Module) -> None:
    found = noted(nn.MSELoss(), nn.Sequential(nn.Sequential(norm)))
    assert found.startswith(f"{type(norm).__name__} in Sequential normalises over")


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (losses.DiceLoss(), "DiceLoss pools"),
        (losses.DiceBCELoss(), "DiceLoss, BCELoss with ignore_label pools"),
        (losses.DiceBCELoss(ignore_label=None, per_sample=True), ""),
        (losses.DiceBCELoss(per_sample=True), "BCELoss with ignore_label pools"),
        (losses.DiceFocalLoss(per_sample=True), "FocalLoss with ignore_label pools"),
        (losses.DiceClDiceLoss(), "DiceLoss, SoftClDiceLoss pools"),
        (losses.DiceClDiceLoss(per_sample=True), ""),
        (MonaiDiceLoss(batch=True), "DiceLoss pools"),
        (MonaiDiceLoss(), ""),
        (nn.CrossEntropyLoss(), ""),
        (nn.CrossEntropyLoss(weight=torch.ones(2)), "CrossEntropyLoss with weight or ignore_index"),
        (nn.NLLLoss(ignore_index=0), "NLLLoss with weight or ignore_index"),
        (nn.functional.mse_loss, ""),
    ],
)
def test_losses_that_are_no_mean_over_samples_are_named(loss: Any, named: str) -> None:
    assert noted(loss).startswith(named)
    assert bool(noted(loss)) == bool(named)


@pytest.mark.parametrize(
    "loss",
    [
        losses.DiceLoss(),
        losses.DiceLoss(per_sample=True),
        losses.BCELoss(),
        losses.BCELoss(None),
        losses.SoftClDiceLoss(),
        losses.SoftClDiceLoss(per_sample=True),
    ],
)
def test_a_loss_is_named_exactly_where_it_is_not_the_mean_of_its_samples(loss: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)
    label = (torch.rand(logits.shape, generator=generator) < 0.2).double()
    if getattr(loss, "ignore_label", None) is not None:
        label[0, :, :5] = 255
    singly = torch.stack([loss(logits[i : i + 1], label[i : i + 1]) for i in range(3)]).mean()
    equal = torch.isclose(loss(logits, label), singly, rtol=1e-12, atol=0)
    assert bool(equal) == (not noted(loss))
