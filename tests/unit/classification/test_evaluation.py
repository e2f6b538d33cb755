from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer

from pipeline.classification.batch_metrics import ClassBatchMetrics
from pipeline.classification.evaluation import ClassMetrics
from pipeline.classification.losses import ClassificationLoss
from pipeline.classification.metrics import classification_metrics, confusion_matrix
from pipeline.classification.networks import SmallResNet
from pipeline.errors import ConfigurationError, InputError

NAMES = ["ant", "bee", "fly", "moth", "tick", "wasp"]
SCALES = (128, 96, 48)


def items(classes: int = 6, count: int = 20, scales: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(classes)

    def logits() -> torch.Tensor:
        return 2 * torch.randn(classes, generator=generator)

    return [
        {
            "pred": logits(),
            **{f"pred_{size}": logits() for size in scales},
            "label": torch.randint(0, max(classes, 2), (), generator=generator),
            "name": f"photos/{number:03d}.jpg",
        }
        for number in range(count)
    ]


def expected(given: list[dict[str, Any]], key: str = "pred") -> dict[str, float]:
    logits = torch.stack([item[key] for item in given]).numpy()
    return classification_metrics(logits, np.array([int(item["label"]) for item in given]))


def evaluated(metric: ClassMetrics, given: list[dict[str, Any]], name: str) -> dict[str, float]:
    engine = Engine(lambda engine, batch: None)
    metric.reset()
    for item in given:
        metric.update([item])
    metric.completed(engine, name)
    found = dict(engine.state.metrics)
    assert found.pop("threshold") == found.pop("temperature") > 0
    return found


@pytest.mark.parametrize("name", ["val_accuracy", "val_macro_f1", "test_top5"])
def test_the_metrics_are_those_of_all_images_under_the_prefix_of_the_name(name: str) -> None:
    prefix = name.split("_")[0]
    found = evaluated(ClassMetrics(NAMES), items(), name)
    assert found == pytest.approx({f"{prefix}_{k}": v for k, v in expected(items()).items()})
    assert name in found


@pytest.mark.parametrize("classes", [1, 2])
def test_two_classes_may_have_one_logit_and_have_an_auc(classes: int) -> None:
    found = evaluated(ClassMetrics(NAMES[:2]), items(classes), "val_auc")
    assert found == pytest.approx({f"val_{k}": v for k, v in expected(items(classes)).items()})
    assert "val_top5" not in found


def test_every_scale_has_its_own_figures() -> None:
    given = items(scales=(96, 48))
    found = evaluated(ClassMetrics(NAMES, scales=SCALES), given, "val_accuracy_48")
    for size, key in ((128, "pred"), (96, "pred_96"), (48, "pred_48")):
        for figure in ("accuracy", "macro_f1", "nll"):
            assert found[f"val_{figure}_{size}"] == pytest.approx(expected(given, key)[figure])
    assert found["val_accuracy"] == found["val_accuracy_128"] != found["val_accuracy_48"]
    plain = evaluated(ClassMetrics(NAMES), given, "val_accuracy")
    assert plain.items() <= found.items()


def test_two_scales_without_logits_are_an_error_and_not_the_same_figure_twice() -> None:
    with pytest.raises(ConfigurationError, match=r"the items have no pred_128, pred_96"):
        ClassMetrics(NAMES, scales=SCALES).update(items(scales=(48,)))


def test_each_image_has_a_row_with_both_probabilities() -> None:
    metric, given = ClassMetrics(NAMES), items()
    given[3]["stratum"] = "night"
    metric.update(given)
    assert len(metric.per_image) == len(given)
    for row, item in zip(metric.per_image, given, strict=True):
        probability = torch.softmax(item["pred"].double(), dim=0)
        truth, guess = int(item["label"]), int(probability.argmax())
        assert row["image"] == item["name"]
        assert (row["truth"], row["predicted"]) == (NAMES[truth], NAMES[guess])
        assert row["truth_probability"] == pytest.approx(float(probability[truth]))
        assert row["predicted_probability"] == pytest.approx(float(probability[guess]))
        assert row["correct"] is (truth == guess)
    assert [row.get("stratum") for row in metric.per_image].count("night") == 1


def test_each_class_has_a_row_also_without_an_image() -> None:
    metric, given = ClassMetrics([*NAMES[:5], "never"]), items(5)
    for item in given:
        item["pred"] = torch.cat([item["pred"], torch.tensor([-9.0])])
    metric.update(given)
    rows = {row["class"]: row for row in metric.per_class()}
    assert sum(row["support"] for row in rows.values()) == len(given)
    assert rows["never"]["support"] == rows["never"]["predicted"] == 0
    assert math.isnan(rows["never"]["f1"])
    means = [row["recall"] for row in rows.values() if row["support"]]
    assert np.mean(means) == pytest.approx(metric.figures()["balanced_accuracy"])


def test_the_confusion_matrix_counts_truth_along_the_rows() -> None:
    metric, given = ClassMetrics(NAMES), items()
    metric.update(given)
    guess = np.array([int(item["pred"].argmax()) for item in given])
    truth = np.array([int(item["label"]) for item in given])
    np.testing.assert_array_equal(metric.confusion(), confusion_matrix(guess, truth, 6))


def test_a_new_run_forgets_the_last_one_and_what_it_could_measure() -> None:
    metric, engine = ClassMetrics(NAMES[:2]), Engine(lambda engine, batch: None)
    metric.update(items(2))
    metric.completed(engine, "val_accuracy")
    assert "val_auc" in engine.state.metrics
    metric.reset()
    one_class = [{**item, "label": 0} for item in items(2)]
    metric.update(one_class)
    metric.completed(engine, "val_accuracy")
    assert "val_auc" not in engine.state.metrics  # not that of the run before
    assert len(metric.per_image) == len(one_class)


def test_without_an_image_the_value_is_nan() -> None:
    found = evaluated(ClassMetrics(NAMES), [], "val_macro_f1")
    assert found == pytest.approx({"val_macro_f1": math.nan}, nan_ok=True)
    assert math.isnan(ClassMetrics(NAMES).compute())


def test_a_figure_that_these_classes_do_not_have_is_no_main_metric() -> None:
    with pytest.raises(ConfigurationError, match=r"metric val_top5: .*2 classes; .*val_accuracy"):
        evaluated(ClassMetrics(NAMES[:2]), items(2), "val_top5")


def test_watch_sees_every_item_with_its_row() -> None:
    seen: list[tuple[str, str]] = []
    metric = ClassMetrics(NAMES, watch=lambda item, row: seen.append((item["name"], row["image"])))
    metric.update(items(count=3))
    assert seen == [(f"photos/00{n}.jpg",) * 2 for n in range(3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 6}, r"photos/000.jpg: label 6, expected a class number from 0 to 5"),
        ({"label": torch.tensor([0, 1])}, "label"),
        ({"label": torch.tensor(0.5)}, "label 0.5"),
        ({"pred": torch.zeros(5)}, r"pred has the shape \(5,\) for 6 classes; set num_classes"),
        ({"pred": torch.zeros(1)}, "pred has the shape"),
        ({"pred": torch.full((6,), torch.nan)}, "photos/000.jpg: pred is not finite"),
    ],
    ids=range(6),
)
def test_an_item_that_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClassMetrics(NAMES).update([{**items(count=1)[0], **change}])


@pytest.mark.parametrize("names", [["one"], "ab", ["a", "b", "a"]], ids=str)
def test_class_names_must_tell_classes_apart(names: Any) -> None:
    with pytest.raises(ConfigurationError, match="class_names"):
        ClassMetrics(names)


def photos(count: int, classes: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "image": torch.randn(3, 32, 32, generator=generator),
            "label": number % max(classes, 2),
            "name": f"{number}.png",
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("classes", [1, 6])
def test_monais_evaluator_gives_the_same_figures_for_any_batch_size(classes: int) -> None:
    torch.manual_seed(0)
    network, found = SmallResNet(classes), []
    for batch_size in (1, 4):
        metric = ClassMetrics(NAMES[: max(classes, 2)])
        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(photos(7, classes), batch_size=batch_size),
            network=network,
            key_val_metric={"val_macro_f1": metric},
        )
        evaluator.run()
        found.append(dict(evaluator.state.metrics))
        assert [row["image"] for row in metric.per_image] == [f"{n}.png" for n in range(7)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("classes", [1, 2, 6])
def test_batch_metrics_are_means_over_samples_not_batches(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    outputs, loss = [], ClassificationLoss()
    for size in (4, 4, 1):
        pred = torch.randn(size, classes, generator=generator)
        label = torch.randint(0, max(classes, 2), (size, 1), generator=generator)
        outputs.append({"pred": pred, "label": label, "loss": loss(pred, label)})
    engine = Engine(lambda _engine, batch: batch)
    ClassBatchMetrics().attach(engine)
    found = engine.run(outputs, max_epochs=2).metrics
    logits, truth = (torch.cat([one[key] for one in outputs]) for key in ("pred", "label"))
    scores = classification_metrics(logits.numpy(), truth[:, 0].numpy())
    assert found == pytest.approx(
        {"train_loss": scores["nll"], "train_accuracy": scores["accuracy"]}, rel=1e-5
    )


def test_batch_metrics_go_on_where_an_interrupted_epoch_stopped() -> None:
    first, second = ClassBatchMetrics(), ClassBatchMetrics()
    pred, label = torch.eye(3), torch.tensor([0, 1, 0])
    engine = Engine(lambda _engine, batch: batch)
    engine.state.output = {"pred": pred, "label": label, "loss": torch.tensor(0.5)}
    first._update(engine)
    second.load_state_dict(first.state_dict())
    second._update(engine)
    second._report(engine)
    assert engine.state.metrics == pytest.approx({"train_loss": 0.5, "train_accuracy": 2 / 3})


@pytest.mark.parametrize("decollate", [False, True])
def test_batch_metrics_read_what_monais_trainer_leaves(decollate: bool) -> None:
    torch.manual_seed(0)
    network = SmallResNet(6)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader(photos(6, 6), batch_size=4),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.0),
        loss_function=ClassificationLoss(),
        decollate=decollate,
        train_handlers=[ClassBatchMetrics()],
    )
    trainer.run()
    logits = network(torch.stack([photo["image"] for photo in photos(6, 6)])).detach().numpy()
    scores = classification_metrics(logits, np.arange(6))
    assert trainer.state.metrics == pytest.approx(
        {"train_loss": scores["nll"], "train_accuracy": scores["accuracy"]}, rel=1e-4
    )


def test_a_given_temperature_changes_probabilities_and_no_prediction():
    given = items()
    plain, cooler = ClassMetrics(NAMES), ClassMetrics(NAMES, temperature=3.0)
    for metric in (plain, cooler):
        metric.update(given)
    assert plain.figures()["accuracy"] == cooler.figures()["accuracy"]
    scaled = [{**item, "pred": item["pred"] / 3} for item in given]
    assert cooler.figures()["nll"] == pytest.approx(expected(scaled)["nll"], rel=1e-5)
    assert np.mean([row["nll"] for row in cooler.per_image]) == pytest.approx(
        cooler.figures()["nll"], rel=1e-5
    )
