from __future__ import annotations

import copy
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from scipy import ndimage
from torch import nn

from pipeline.errors import ConfigurationError
from pipeline.training.equality import equality_notes
from pipeline.training.losses import DiceLoss, FocalLoss, SoftClDiceLoss
from pipeline.vesuvius.losses import (
    BoundaryLoss,
    DeepSupervision,
    MedialSurfaceRecallLoss,
    VarianceLoss,
    WeightedSum,
    shrunk_label,
)
from pipeline.vesuvius.medial_surface import medial_surface
from pipeline.vesuvius.networks import SmallUNet3D
from pipeline.vesuvius.signed_distance import signed_distance


def every_term() -> WeightedSum:
    losses = {
        "dice": DiceLoss(ignore_label=2),
        "focal": FocalLoss(ignore_label=2),
        "cldice": SoftClDiceLoss(1, ignore_label=2),
        "variance": VarianceLoss(),
        "boundary": BoundaryLoss(),
        "medial": MedialSurfaceRecallLoss(),
    }
    return WeightedSum(losses, dict.fromkeys(losses, 0.5))


def reference() -> WeightedSum:
    losses = {
        "dice": DiceLoss(ignore_label=2),
        "focal": FocalLoss(gamma=2.0, ignore_label=2),
        "variance": VarianceLoss(),
    }
    return WeightedSum(losses, {"dice": 0.4, "focal": 0.2, "variance": 0.2})


ERRORS = {  # losses that the perfect prediction brings to 0
    "boundary": BoundaryLoss,
    "medial": MedialSurfaceRecallLoss,
    "medial_per_sample": partial(MedialSurfaceRecallLoss, per_sample=True),
}
LOSSES = {
    **ERRORS,
    "variance": VarianceLoss,
    "every_term": every_term,
    "deep": lambda: DeepSupervision(every_term(), [1.0]),
}
every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())
every_error = pytest.mark.parametrize("make", ERRORS.values(), ids=ERRORS.keys())


def case(size: tuple[int, int, int] = (6, 12, 10), seed: int = 0):
    """Return random logits and a label of sheets, with a frame and a block of 2."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn((2, 1, *size), generator=generator)
    label = torch.zeros_like(logits)
    label[..., 3:5, :] = 1
    label[1, ..., 7:8, :] = 1
    label[0, :, 3:, 3:, 6:] = 2
    label[:, :, 0] = 2
    return logits, label


def value_and_gradient(loss: nn.Module, logits: torch.Tensor, label: torch.Tensor):
    logits = logits.clone().requires_grad_()
    value = loss(logits, label)
    value.backward()
    return value.detach(), logits.grad


def assert_same(one, other) -> None:
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


@every_loss
@pytest.mark.parametrize("other", [37.0, float("nan"), float("inf"), float("-inf")])
def test_logits_without_a_label_change_neither_loss_nor_gradient(make, other):
    logits, label = case()
    ignored = label == 2
    expected = value_and_gradient(make(), logits, label)
    assert_same(value_and_gradient(make(), logits.masked_fill(ignored, other), label), expected)
    assert expected[1][ignored].count_nonzero() == 0
    assert expected[1].count_nonzero() > 0


@every_loss
def test_a_label_of_integers_is_the_same_label(make):
    logits, label = case()
    expected = value_and_gradient(make(), logits, label)
    assert_same(value_and_gradient(make(), logits, label.to(torch.uint8)), expected)


@every_loss
def test_a_volume_without_labels_is_no_loss_and_no_gradient(make):
    logits, label = case()
    value, gradient = value_and_gradient(make(), logits, torch.full_like(label, 2))
    torch.testing.assert_close(value, torch.tensor(0.0), rtol=0, atol=1e-6)
    assert gradient.count_nonzero() == 0


@every_loss
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("target", ["sheets", "empty", "full"])
def test_loss_and_gradient_are_finite(make, scale, target):
    logits, label = case()
    label = {"sheets": label, "empty": 0 * label, "full": torch.ones_like(label)}[target]
    value, gradient = value_and_gradient(make(), scale * logits.sign(), label)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


@every_loss
def test_gradient_agrees_with_finite_differences(make):
    logits, label = case((3, 6, 4))
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: make()(x, label), (logits,), atol=1e-6)


@every_error
def test_the_perfect_prediction_is_the_minimum(make):
    logits, label = case()
    perfect = make()(100 * (label - 0.5), label)
    torch.testing.assert_close(perfect, torch.tensor(0.0), rtol=0, atol=1e-5)
    assert make()(logits, label) > 0.05
    assert make()(100 * (0.5 - label), label) > 0.3


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_single_precision(make, dtype):
    logits, label = case()
    half = logits.to(dtype)
    value = make()(half, label)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, make()(half.float(), label))


@every_loss
def test_twenty_steps_bring_it_down(make):
    _, label = case((8, 16, 16))
    torch.manual_seed(0)
    network = SmallUNet3D(widths=[4, 6])
    image = torch.where(label == 1, 2.0, 0.0) + 0.5 * torch.randn_like(label)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    values = []
    for _ in range(21):
        loss = make()(network(image), label)
        values.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.95 * values[0]


def test_variance_is_the_formula_of_the_reference_per_sample():
    logits, label = case()
    logits = logits.double()
    expected = []
    for sample, truth in zip(logits, label, strict=True):
        p = torch.sigmoid(sample[truth != 2])
        entropy = -(p * p.log() + (1 - p) * (1 - p).log())
        expected.append((1 - p.var()) ** 2 + max(0.0, 0.5 - float(entropy.mean())))
    torch.testing.assert_close(VarianceLoss()(logits, label), torch.stack(expected).mean())


def test_variance_by_hand():
    logits = torch.tensor([9e3, 9e3, -9e3, -9e3]).reshape(1, 1, 1, 2, 2)
    # Half of the voxels 0 and half 1: variance 4 * 0.25 / 3, entropy 0.
    expected = torch.tensor((1 - 1 / 3) ** 2 + 0.5)
    torch.testing.assert_close(VarianceLoss()(logits, torch.zeros_like(logits)), expected)
    # Undecided: no variance, entropy log 2.
    torch.testing.assert_close(VarianceLoss()(0 * logits, logits.sign()), torch.tensor(1.0))


def brute_distance(foreground: np.ndarray, background: np.ndarray, limit: float) -> np.ndarray:
    distance = np.zeros(foreground.shape)
    for own, other, sign in ((background, foreground, 1), (foreground, background, -1)):
        places = np.argwhere(other)
        for voxel in np.argwhere(own):
            steps = np.sqrt(((places - voxel) ** 2).sum(axis=1)) if len(places) else [np.inf]
            distance[tuple(voxel)] = sign * min(np.min(steps) - 0.5, limit)
    return distance


@pytest.mark.parametrize("limit", [2.0, 50.0])
def test_signed_distance_is_to_the_nearest_voxel_of_the_other_class(limit):
    _, label = case()
    volume = label[0, 0].numpy()
    found = signed_distance(volume == 1, volume == 0, limit)
    np.testing.assert_allclose(found, brute_distance(volume == 1, volume == 0, limit), atol=1e-5)


@pytest.mark.parametrize("value", [0, 1, 2])
def test_signed_distance_without_another_class_is_the_limit(value):
    volume = np.full((3, 4, 5), value)
    expected = {0: 4.0, 1: -4.0, 2: 0.0}[value]
    assert (signed_distance(volume == 1, volume == 0, 4.0) == expected).all()


def test_boundary_loss_is_the_error_times_the_distance():
    logits, label = case()
    logits = logits.double()
    expected = []
    for sample, truth in zip(logits, label, strict=True):
        volume = truth[0].numpy()
        distance = brute_distance(volume == 1, volume == 0, 3.0) / 3
        error = np.abs(torch.sigmoid(sample[0]).numpy() - volume)
        expected.append((error * np.abs(distance))[volume != 2].mean())
    found = float(BoundaryLoss(limit_voxels=3.0)(logits, label))
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-6)


def test_where_the_label_ends_is_no_boundary():
    label = torch.ones(1, 1, 4, 12, 4)
    label[..., 5:7, :] = 2
    label[..., 11:, :] = 0
    logits = torch.full_like(label, -9e3)  # all surface is missed
    # Distances of 11 - 0.5 at the far side to 0.5, cut to 4; the background is right.
    distances = [4.0] * 5 + [3.5, 2.5, 1.5, 0.5]
    expected = torch.tensor(sum(distances) / 4 / 10)
    torch.testing.assert_close(BoundaryLoss(limit_voxels=4.0)(logits, label), expected)


def brute_medial(mask: np.ndarray) -> np.ndarray:
    medial = np.zeros_like(mask)
    for voxel in np.argwhere(mask):
        runs = []
        for axis in range(3):
            line = mask[tuple(slice(None) if a == axis else voxel[a] for a in range(3))]
            start = stop = voxel[axis]
            while start > 0 and line[start - 1]:
                start -= 1
            while stop < len(line) - 1 and line[stop + 1]:
                stop += 1
            runs.append((stop - start, abs(2 * voxel[axis] - start - stop) <= 1))
        shortest = min(length for length, _ in runs)
        medial[tuple(voxel)] = any(middle for length, middle in runs if length == shortest)
    return medial


def blobs(seed: int, density: float, shape=(7, 8, 9)) -> np.ndarray:
    field = np.random.default_rng(seed).random(shape)
    return ndimage.gaussian_filter(field, 0.7) > np.quantile(
        ndimage.gaussian_filter(field, 0.7), 1 - density
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_medial_surface_equals_its_definition_voxel_by_voxel(seed, density):
    mask = blobs(seed, density)
    found = medial_surface(torch.from_numpy(mask)).numpy()
    np.testing.assert_array_equal(found, brute_medial(mask))


def test_medial_surface_turns_and_mirrors_with_the_mask():
    mask = torch.from_numpy(blobs(7, 0.5))
    expected = medial_surface(mask)
    for axes in itertools.permutations(range(3)):
        for mirrored in itertools.chain.from_iterable(
            itertools.combinations(range(3), count) for count in range(4)
        ):
            turned = medial_surface(mask.permute(axes).flip(mirrored))
            assert torch.equal(turned, expected.permute(axes).flip(mirrored))


@pytest.mark.parametrize("density", [0.05, 0.3, 0.6])
def test_every_piece_keeps_a_part_of_its_medial_surface(density):
    mask = blobs(3, density, (12, 12, 12))
    pieces, count = ndimage.label(mask)
    medial = medial_surface(torch.from_numpy(mask)).numpy()
    assert count > 0
    assert set(np.unique(pieces[medial])) == set(range(1, count + 1))


@pytest.mark.parametrize(("thickness", "kept"), [(1, 1), (2, 2), (3, 1), (4, 2), (5, 1)])
def test_the_medial_surface_of_a_flat_sheet_is_its_middle(thickness, kept):
    mask = torch.zeros(20, 11, 20, dtype=torch.bool)
    mask[:, 3 : 3 + thickness] = True
    expected = torch.zeros_like(mask)
    first = 3 + (thickness - 1) // 2
    expected[:, first : first + kept] = True
    assert torch.equal(medial_surface(mask), expected)


def test_the_medial_surface_of_a_wavy_sheet_has_no_hole():
    rows, columns = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    height = (12 + 4 * torch.sin(rows / 5) + 2 * torch.cos(columns / 4)).round()
    mask = (torch.arange(24)[:, None, None] - height).abs() <= 1
    medial = medial_surface(mask)
    assert medial.sum() < 0.6 * mask.sum()
    assert ndimage.label(medial.numpy(), np.ones((3, 3, 3)))[1] == 1
    assert medial.any(dim=0).all()


@pytest.mark.parametrize("per_sample", [False, True])
def test_medial_recall_is_its_formula(per_sample):
    logits, label = case()
    logits = logits.double()
    medial = torch.from_numpy(np.stack([[brute_medial(one[0].numpy() == 1)] for one in label]))
    probability = torch.sigmoid(logits)
    groups = [0, 1] if per_sample else [slice(None)]
    expected = [
        1 - (probability[group][medial[group]].sum() + 0.5) / (medial[group].sum() + 0.5)
        for group in groups
    ]
    found = MedialSurfaceRecallLoss(0.5, per_sample)(logits, label)
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_medial_recall_sees_a_gap_that_a_thinner_sheet_is_not():
    label = torch.zeros(1, 1, 16, 20, 16)
    label[..., 8:13, :] = 1
    thinner, torn = label.clone(), label.clone()
    thinner[..., 8, :] = 0  # 256 voxels lost, still whole
    torn[:, :, :2, 8:13] = 0  # 160 voxels lost
    recall = MedialSurfaceRecallLoss()

    def of(found: torch.Tensor) -> float:
        return float(recall(100 * (found - 0.5), label))

    assert of(thinner) == pytest.approx(0, abs=1e-6)
    assert of(torn) > 0.1


def test_reference_sum_is_its_parts_by_their_weights():
    logits, label = case()
    parts = DiceLoss(ignore_label=2), FocalLoss(ignore_label=2), VarianceLoss()
    dice, focal, variance = (part(logits, label) for part in parts)
    expected = 0.4 * dice + 0.2 * focal + 0.2 * variance
    loss = reference()
    torch.testing.assert_close(loss(logits.requires_grad_(), label), expected)
    assert loss.latest == {"dice": dice, "focal": focal, "variance": variance}
    assert not any(part.requires_grad for part in loss.latest.values())


def test_the_reference_sum_is_built_by_a_configuration():
    config = {
        "loss": {
            "_target_": "pipeline.vesuvius.losses.WeightedSum",
            "losses": {
                "dice": {"_target_": "pipeline.training.losses.DiceLoss", "ignore_label": 2},
                "focal": {"_target_": "pipeline.training.losses.FocalLoss", "ignore_label": 2},
                "variance": {"_target_": "pipeline.vesuvius.losses.VarianceLoss"},
            },
            "weights": {"dice": 0.4, "focal": 0.2, "variance": 0.2},
        }
    }
    loss = ConfigParser(config).get_parsed_content("loss")
    torch.testing.assert_close(loss(*case()), reference()(*case()))


def test_a_loss_of_weight_0_is_not_computed():
    class Unused(nn.Module):
        def forward(self, logits, label):
            raise AssertionError

    loss = WeightedSum({"used": VarianceLoss(), "unused": Unused()}, {"used": 2, "unused": 0})
    torch.testing.assert_close(loss(*case()), 2 * VarianceLoss()(*case()))
    assert list(loss.latest) == ["used"]


def test_weighted_sum_is_linear_in_its_weights():
    def of(boundary: float, medial: float):
        losses = {"boundary": BoundaryLoss(), "medial": MedialSurfaceRecallLoss()}
        loss = WeightedSum(losses, {"boundary": boundary, "medial": medial})
        return value_and_gradient(loss, *case())

    for whole, one, other in zip(of(0.3, 2.5), of(1, 0), of(0, 1), strict=True):
        torch.testing.assert_close(whole, 0.3 * one + 2.5 * other)


@every_loss
def test_a_loss_that_was_used_can_be_copied(make):
    loss = make()
    value = loss(*case())
    torch.testing.assert_close(copy.deepcopy(loss)(*case()), value)


def test_what_pools_over_a_batch_says_so():
    network = SmallUNet3D(widths=[4, 6])
    assert equality_notes(network, BoundaryLoss()) == ()
    assert equality_notes(network, MedialSurfaceRecallLoss(per_sample=True)) == ()
    (note,) = equality_notes(network, MedialSurfaceRecallLoss())
    assert "MedialSurfaceRecallLoss pools" in note


@pytest.mark.parametrize("make", [BoundaryLoss, VarianceLoss, ERRORS["medial_per_sample"]])
def test_it_is_the_mean_of_the_samples(make):
    logits, label = case()
    alone = [make()(logits[index : index + 1], label[index : index + 1]) for index in (0, 1)]
    torch.testing.assert_close(make()(logits, label), torch.stack(alone).mean())


def test_deep_supervision_by_1_0_0_is_the_plain_loss():
    _, label = case((8, 16, 8))
    torch.manual_seed(0)
    network = SmallUNet3D(widths=[4, 4, 4, 4], deep_supervision=2)
    levels = network(torch.randn_like(label))
    deep = DeepSupervision(every_term(), [1, 0, 0])
    torch.testing.assert_close(deep(levels, label), every_term()(levels[0], label))
    assert_same(value_and_gradient(deep, *case()), value_and_gradient(every_term(), *case()))


def test_deep_supervision_is_the_weighted_mean_of_the_levels():
    _, label = case((8, 16, 8))
    levels = [
        torch.randn((2, 1, 8 // step, 16 // step, 8 // step)).requires_grad_() for step in (1, 2, 4)
    ]
    plain = reference()
    values = [plain(level, shrunk_label(label, level.shape[2:])) for level in levels]
    expected = (values[0] + 0.5 * values[1] + 0.25 * values[2]) / 1.75
    deep = DeepSupervision(plain, [1.0, 0.5, 0.25])
    result = deep(levels, label)
    torch.testing.assert_close(result, expected)
    result.backward()
    assert all(level.grad.count_nonzero() > 0 for level in levels)
    full = reference()
    full(levels[0], label)
    assert plain.latest == full.latest


def test_deep_supervision_takes_levels_of_the_full_size():
    logits, label = case()
    deep = DeepSupervision(reference(), [1.0, 1.0])
    torch.testing.assert_close(deep([logits, logits], label), reference()(logits, label))


def test_a_smaller_label_has_surface_before_no_label_before_background():
    label = torch.randint(0, 3, (2, 1, 4, 6, 8), generator=torch.Generator().manual_seed(0))
    label = label * (torch.rand(label.shape, generator=torch.Generator().manual_seed(1)) < 0.2)
    small = shrunk_label(label, (2, 3, 4))
    assert set(small.unique().tolist()) == {0, 1, 2}
    for place in itertools.product(range(2), range(1), range(2), range(3), range(4)):
        sample, channel, *corner = place
        block = label[(sample, channel, *(slice(2 * at, 2 * at + 2) for at in corner))]
        expected = 1 if (block == 1).any() else 2 if (block == 2).any() else 0
        assert small[place] == expected


def test_a_smaller_label_keeps_a_thin_sheet_whole():
    label = torch.zeros(1, 1, 16, 16, 16)
    label[..., 5, :] = 1
    assert (shrunk_label(label, (4, 4, 4))[..., 1, :] == 1).all()


@every_loss
def test_shapes_that_disagree_are_named(make):
    logits, label = case()
    with pytest.raises(ConfigurationError, match=r"gives \(2, 1, 6, 12, 10\) and the label has"):
        make()(logits, label[..., 1:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(BoundaryLoss, 0), r"limit_voxels must be positive and finite, got 0\.0"),
        (partial(MedialSurfaceRecallLoss, float("nan")), "smooth must be positive .* got nan"),
        (partial(WeightedSum, {"a": VarianceLoss()}, {"b": 1}), "losses are a and weights are for"),
        (partial(WeightedSum, {"a": VarianceLoss()}, {"a": -1}), "weights of a must be zero or"),
        (partial(WeightedSum, {"a": VarianceLoss()}, {"a": 0}), "weights of a are all 0"),
        (partial(WeightedSum, {"a": DiceLoss()}, {"a": 1}), "a has ignore_label 255, .* set"),
        (partial(DeepSupervision, VarianceLoss(), [0, 0]), r"must not all be 0, got \[0, 0\]"),
        (partial(DeepSupervision, VarianceLoss(), [1, -1]), r"zero or positive .* got -1\.0"),
    ],
    ids=["limit", "smooth", "names", "negative", "all_zero", "ignore", "no_level", "level"],
)
def test_a_wrong_setting_is_named(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_a_wrong_number_of_levels_is_named():
    logits, label = case()
    with pytest.raises(ConfigurationError, match=r"2 levels and weights has 3; set deep_superv"):
        DeepSupervision(VarianceLoss())([logits, logits], label)
