from __future__ import annotations

from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.transforms import Activationsd, Compose
from torch import Tensor, nn

from pipeline.training.epoch_metrics import BatchMetrics, ValidationLoss

IGNORED = 255


def batches(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in range(1, count + 1):
        label = torch.randint(0, 2, (size, 1, 6, 5), generator=generator).float()
        label[torch.rand(label.shape, generator=generator) < 0.2] = IGNORED
        logits = torch.randn(label.shape, generator=generator)
        loss = torch.rand((), generator=generator, requires_grad=True)
        made.append({"pred": logits, "label": label, "loss": loss})
    return made


def epoch_of(outputs: list[Any], epochs: int = 1) -> dict[str, float]:
    engine = Engine(lambda _engine, batch: batch)
    BatchMetrics().attach(engine)
    return dict(engine.run(outputs, max_epochs=epochs).metrics)


@pytest.mark.parametrize("epochs", [1, 2])
def test_figures_equal_brute_force_over_the_pixels_that_count(epochs: int) -> None:
    made = batches(4)
    both = predicted = truth = 0
    for batch in made:
        for logit, label in zip(
            batch["pred"].ravel().tolist(), batch["label"].ravel().tolist(), strict=True
        ):
            if label != IGNORED:
                both += logit > 0 and label == 1
                predicted += logit > 0
                truth += label == 1
    assert epoch_of(made, epochs) == pytest.approx(
        {
            "train_loss": sum(float(batch["loss"].detach()) for batch in made) / len(made),
            "train_dice": 2 * both / (predicted + truth),
            "train_iou": both / (predicted + truth - both),
        }
    )


def test_ignored_pixels_change_nothing() -> None:
    made = batches(3)
    changed = [{**batch, "pred": batch["pred"].clone()} for batch in made]
    for batch in changed:
        batch["pred"][batch["label"] == IGNORED] *= -100
    assert epoch_of(changed) == epoch_of(made)


def test_decollated_outputs_give_the_same_figures() -> None:
    made = batches(3)
    items = [
        [
            {"pred": pred, "label": label, "loss": batch["loss"].detach()}
            for pred, label in zip(batch["pred"], batch["label"], strict=True)
        ]
        for batch in made
    ]
    assert epoch_of(items) == pytest.approx(epoch_of(made))


def test_perfect_and_empty_epochs_have_finite_figures() -> None:
    loss = torch.tensor(0.5)
    label = torch.tensor([[[[0.0, 1.0]]]])
    perfect = epoch_of([{"pred": label * 2 - 1, "label": label, "loss": loss}])
    assert perfect == {"train_loss": 0.5, "train_dice": 1.0, "train_iou": 1.0}
    nothing = torch.zeros_like(label)
    empty = epoch_of([{"pred": nothing - 1, "label": nothing, "loss": loss}])
    assert empty == {"train_loss": 0.5, "train_dice": 0.0, "train_iou": 0.0}


def cases(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "image": torch.randn(1, 4, 4, generator=generator) * 3,
            "label": torch.randint(0, 2, (1, 4, 4), generator=generator).float(),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_validation_loss_is_the_mean_over_cases_of_raw_logits(batch_size: int) -> None:
    data, loss = cases(5), nn.BCEWithLogitsLoss()
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(data, batch_size=batch_size),
        network=nn.Identity(),
        postprocessing=Compose([Activationsd(keys="pred", sigmoid=True)]),
        val_handlers=[ValidationLoss(loss)],
    )
    for epoch in (1, 2):
        evaluator.run(epoch)
        expected = sum(float(loss(case["image"], case["label"])) for case in data) / len(data)
        assert evaluator.state.metrics["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_batch_metrics_read_what_monais_trainer_leaves() -> None:
    torch.manual_seed(0)
    network = nn.Conv2d(1, 1, 1)
    nn.init.ones_(network.bias)  # foreground somewhere, whatever the weight
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader(cases(4), batch_size=2),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=nn.BCEWithLogitsLoss(),
        decollate=False,
        train_handlers=[BatchMetrics()],
    )
    trainer.run()
    metrics = trainer.state.metrics
    assert set(metrics) == {"train_loss", "train_dice", "train_iou"}
    assert metrics["train_loss"] > 0
    assert 0 < metrics["train_iou"] < metrics["train_dice"] < 1
