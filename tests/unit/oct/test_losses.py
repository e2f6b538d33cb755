from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pipeline.errors import ConfigurationError
from pipeline.oct.losses import IGNORE_LABEL, BoundaryLoss, LayerLoss, expected_rows
from pipeline.oct.transforms import RenderLabeld, render_label
from pipeline.training.equality import equality_notes

HEIGHT, WIDTH = 12, 6


def rows() -> tuple[Tensor, Tensor]:
    """Rows of three B-scans: with fractions, with gaps, and without any annotation."""
    ilm = torch.tensor([[3.2, 3.7, 4.0, 4.4, 5.0, 5.3]]).repeat(3, 1)
    bm = ilm + 4.25
    ilm[1, 2:4], bm[1, 3:5] = torch.nan, torch.nan
    ilm[2] = torch.nan
    return ilm, bm


def label(with_rows: bool = True) -> Tensor:
    draw = RenderLabeld(with_rows=with_rows)
    bscan = torch.zeros(1, HEIGHT, WIDTH)
    cases = [draw({"image": bscan, "ilm": ilm, "bm": bm}) for ilm, bm in zip(*rows(), strict=True)]
    return torch.stack([case["label"] for case in cases])


def random_logits(samples: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 3, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)


def certain(classes: Tensor, size: float = 40.0) -> Tensor:
    known = classes.clone().long()
    known[known == IGNORE_LABEL] = 0
    return size * torch.nn.functional.one_hot(known, 3).movedim(-1, 1).double()


LOSSES = {
    "layers": LayerLoss(),
    "boundary": BoundaryLoss(),
    "all": LayerLoss(0.4, 0.4, 0.2),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@every_loss
def test_ignored_columns_add_to_neither_value_nor_gradient(loss):
    truth = label()
    unknown = (truth[:, :, :1] == IGNORE_LABEL).expand(-1, 3, HEIGHT, -1)
    logits = random_logits().requires_grad_()
    value = loss(logits, truth)
    value.backward()
    both_missing = truth[:, :, HEIGHT:].isnan().all(dim=2, keepdim=True).expand(-1, 3, HEIGHT, -1)
    silent = both_missing if isinstance(loss, BoundaryLoss) or loss.weights["boundary"] else unknown
    assert silent.any()
    assert not logits.grad[silent].any()
    assert logits.grad[~unknown].any()
    spoilt = logits.detach().masked_fill(silent, torch.nan).requires_grad_()
    again = loss(spoilt, truth)
    again.backward()
    torch.testing.assert_close(again, value)
    assert spoilt.grad.isfinite().all()


@every_loss
def test_a_sample_without_annotation_adds_nothing(loss):
    logits, truth = random_logits(), label()
    truth[2, :, :HEIGHT], truth[2, :, HEIGHT:] = IGNORE_LABEL, torch.nan
    expected = (loss(logits[:1], truth[:1]) + loss(logits[1:2], truth[1:2])) / 3
    torch.testing.assert_close(loss(logits, truth), expected)
    assert loss(logits[2:], truth[2:]) == 0


@every_loss
def test_a_batch_in_pieces_has_the_loss_of_the_batch(loss):
    logits, truth = random_logits(), label()
    pieces = torch.stack([loss(logits[k : k + 1], truth[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(loss(logits, truth), pieces.mean())
    assert equality_notes(torch.nn.Identity(), loss) == ()


def test_the_perfect_prediction_costs_nothing():
    truth = label(with_rows=False)
    logits = certain(truth[:, 0])
    assert LayerLoss()(logits, truth) < 1e-6
    assert LayerLoss()(logits.flip(1), truth) > 1


def test_half_of_each_term_by_hand():
    """Logits of 0: cross-entropy is log 3, every probability a third."""
    truth = label(with_rows=False)[:1]
    shares = torch.stack([(truth == k).double().mean() for k in range(3)])
    dice = 1 - (2 * shares / 3 / (shares + 1 / 3)).mean()
    value = LayerLoss()(torch.zeros(1, 3, HEIGHT, WIDTH, dtype=torch.float64), truth)
    torch.testing.assert_close(value, 0.5 * torch.log(torch.tensor(3.0)).double() + 0.5 * dice)


def test_weights_are_linear():
    logits, truth = random_logits(), label()
    parts = [LayerLoss(*weights)(logits, truth) for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    mixed = LayerLoss(0.3, 0.6, 0.1)(logits, truth)
    torch.testing.assert_close(mixed, 0.3 * parts[0] + 0.6 * parts[1] + 0.1 * parts[2])


def test_expected_rows_are_the_mean_over_all_ordered_pairs():
    logits = random_logits(1)
    above, between, below = logits.log_softmax(dim=1)[0]
    for column in range(WIDTH):
        weights, ilms, bms = [], [], []
        for ilm, bm in itertools.combinations_with_replacement(range(HEIGHT + 1), 2):
            parts = above[:ilm, column], between[ilm:bm, column], below[bm:, column]
            weights.append(torch.stack([part.sum() for part in parts]).sum())
            ilms.append(ilm)
            bms.append(bm)
        chance = torch.stack(weights).softmax(0)
        brute = [(chance * torch.tensor(found).double()).sum() for found in (ilms, bms)]
        torch.testing.assert_close(expected_rows(logits)[0, :, column], torch.stack(brute))


def test_expected_rows_of_a_certain_prediction_are_its_boundaries():
    ilm, bm = torch.tensor([3.0, 0.0, 12.0]), torch.tensor([7.0, 0.0, 12.0])
    found = expected_rows(certain(render_label(ilm, bm, HEIGHT)[None]))
    torch.testing.assert_close(found[0], torch.stack([ilm, bm]).double())


def test_boundary_loss_is_the_mean_error_in_pixels_of_annotated_rows():
    truth = label()[:2]
    whole = render_label(torch.full((WIDTH,), 3.0), torch.full((WIDTH,), 8.0), HEIGHT)
    logits = certain(whole[None].repeat(2, 1, 1))
    errors = (torch.tensor([3.0, 8.0])[:, None] - torch.stack(rows())[:, :2].movedim(1, 0)).abs()
    torch.testing.assert_close(
        BoundaryLoss()(logits, truth), errors.nanmean(dim=(1, 2)).mean().double()
    )


def test_boundary_loss_pulls_the_rows_to_their_fractions():
    truth = label()[:1].double()
    logits = torch.zeros(1, 3, HEIGHT, WIDTH, dtype=torch.float64, requires_grad=True)
    optimizer, loss = torch.optim.Adam([logits], lr=0.3), BoundaryLoss()
    for _ in range(100):
        optimizer.zero_grad()
        loss(logits, truth).backward()
        optimizer.step()
    assert loss(logits, truth) < 0.1


def test_half_precision_is_summed_in_single():
    logits, truth = random_logits(), label()
    half = LayerLoss(0.4, 0.4, 0.2)(logits.bfloat16(), truth)
    assert half.dtype == torch.float32
    torch.testing.assert_close(
        half, LayerLoss(0.4, 0.4, 0.2)(logits, truth).float(), atol=0.05, rtol=0
    )


def test_a_label_without_rows_is_told_to_the_boundary_loss():
    with pytest.raises(ConfigurationError, match="with_rows: true"):
        LayerLoss(boundary=0.1)(random_logits(), label(with_rows=False))


@pytest.mark.parametrize(
    ("logits", "truth"), [((1, 2, 12, 6), (1, 1, 12, 6)), ((1, 3, 12, 6), (1, 1, 11, 6))]
)
def test_shapes_that_disagree_are_named(logits, truth):
    with pytest.raises(ConfigurationError, match=r"the network gives \(1, .*the label has"):
        LayerLoss()(torch.zeros(logits), torch.zeros(truth))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cross_entropy": -1.0}, "cross_entropy must be zero or positive"),
        ({"cross_entropy": 0, "dice": 0}, "are all 0"),
        ({"smooth": 0.0}, "smooth must be positive"),
    ],
)
def test_a_wrong_weight_is_named(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        LayerLoss(**settings)


def test_a_wrong_temperature_is_named():
    with pytest.raises(ConfigurationError, match="temperature must be positive"):
        BoundaryLoss(0.0)
