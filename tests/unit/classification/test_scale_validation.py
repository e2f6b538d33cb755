from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose
from torch import Tensor, nn

from pipeline.classification.losses import ClassificationLoss
from pipeline.classification.scale_validation import (
    ResizeToScaled,
    ScaleLosses,
    ScalesInferer,
    SplitScalesd,
    evaluation_sizes,
)
from pipeline.classification.scales import resize
from pipeline.errors import ConfigurationError

SIZES = (16, 24, 8, 6)
SAMPLES = 5


class Blurred(nn.Module):
    """Logits that depend on the size of the image, and on nothing but the image."""

    def forward(self, image: Tensor) -> Tensor:
        edges = image.diff(dim=3).abs().mean(dim=(1, 2, 3))
        return torch.stack([edges, image.mean(dim=(1, 2, 3)), edges * image.shape[2]], dim=1)


def cases() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {"image": torch.rand(3, 16, 16, generator=generator), "label": torch.tensor(i % 3)}
        for i in range(SAMPLES)
    ]


def validated(batch_size: int, loss: Any = None) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the evaluator's metrics and its items after post-processing."""
    items: list[dict[str, Any]] = []

    def keep(engine: Engine) -> None:
        items.extend(engine.state.output)  # type: ignore[arg-type]

    inferer = ScalesInferer(16, [8, 16, 24, 6, 8])
    evaluator: Any = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(cases(), batch_size=batch_size),
        network=Blurred(),
        inferer=inferer,
        postprocessing=Compose([SplitScalesd(keys="pred", sizes=inferer.sizes)]),
        val_handlers=[ScaleLosses(loss or ClassificationLoss(), inferer.sizes)],
    )
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, keep)
    for epoch in (1, 2):
        items.clear()
        evaluator.run(epoch)
    return evaluator.state.metrics, items


def logits_at(size: int, case: dict[str, Tensor]) -> Tensor:
    return Blurred()(resize(case["image"][None], size))[0]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_losses_are_means_over_samples_at_each_size(batch_size: int) -> None:
    metrics, _ = validated(batch_size)
    assert set(metrics) == {"val_loss", *(f"val_loss_{size}" for size in SIZES)}
    loss = ClassificationLoss()
    for size in SIZES:
        each = [float(loss(logits_at(size, c)[None], c["label"][None])) for c in cases()]
        assert metrics[f"val_loss_{size}"] == pytest.approx(statistics.fmean(each), rel=1e-5)
    assert metrics["val_loss"] == metrics["val_loss_16"]
    assert len(set(metrics.values())) == len(SIZES)


def test_a_loss_per_sample_is_averaged() -> None:
    assert validated(2, nn.CrossEntropyLoss(reduction="none"))[0] == pytest.approx(validated(2)[0])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_items_carry_the_logits_of_every_size(batch_size: int) -> None:
    _, items = validated(batch_size)
    assert len(items) == SAMPLES
    for item, case in zip(items, cases(), strict=True):
        torch.testing.assert_close(item["pred"].as_subclass(Tensor), logits_at(16, case))
        for size in SIZES[1:]:
            found = item[f"pred_{size}"].as_subclass(Tensor)
            torch.testing.assert_close(found, logits_at(size, case))
        assert set(item) == {"image", "label", "pred", "pred_24", "pred_8", "pred_6"}


def test_one_size_is_the_plain_inferers_result() -> None:
    images = torch.stack([case["image"] for case in cases()])
    only = ScalesInferer(16)
    assert only.sizes == (16,)
    assert torch.equal(only(images, Blurred()), Blurred()(images)[:, None])
    item = SplitScalesd(keys="pred", sizes=only.sizes)({"pred": only(images, Blurred())[0]})
    assert set(item) == {"pred"}


def test_the_evaluation_scale_comes_first_and_none_twice() -> None:
    assert evaluation_sizes(96, [128, 64, 96, 48, 64]) == (96, 128, 64, 48)
    with pytest.raises(ConfigurationError, match="evaluation_scale must be a size"):
        evaluation_sizes(0)
    with pytest.raises(ConfigurationError, match="scales must be a size"):
        evaluation_sizes(96, [-1])


def test_logits_of_another_number_of_sizes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"logits \(4, 3\) for the sizes \[16, 8\]"):
        SplitScalesd(keys="pred", sizes=(16, 8))({"pred": torch.zeros(4, 3)})


def test_an_image_is_resized_as_in_training_and_kept_at_its_own_size() -> None:
    image = torch.rand(3, 32, 32)
    at = ResizeToScaled("image", 16)({"image": image, "name": "a"})
    torch.testing.assert_close(at["image"], resize(image[None], 16)[0])
    assert ResizeToScaled("image", 32)({"image": image})["image"] is not None
    torch.testing.assert_close(ResizeToScaled("image", 32)({"image": image})["image"], image)
