from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from monai.data import Dataset
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose, Lambdad
from torch import nn

from pipeline.classification.evaluation import ClassMetrics
from pipeline.classification.results import ClassWriter, EvaluationWriter
from pipeline.data.images import read_image
from pipeline.data.writers import write_png
from pipeline.errors import ConfigurationError, InputError
from pipeline.inference.accepted import AcceptedLoader
from pipeline.inference.batch import BatchRun
from pipeline.inference.ensembles import Ensemble
from pipeline.inference.test_time import FlipsAndTurns
from pipeline.report.evaluation import evaluation_report
from pipeline.report.inference import inference_report

NAMES = ["ant", "bee, wild", "fly", "moth", "tick", "wasp"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # disks are slow


class ByGrey(nn.Module):
    """A network that knows a class by the grey of an image: 0, 40, 80, ..."""

    def __init__(self, classes: int = 6, sharpness: float = 0.1) -> None:
        super().__init__()
        self.classes, self.sharpness = classes, sharpness

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        grey = image.mean(dim=(1, 2, 3))[:, None]
        if self.classes == 1:
            return self.sharpness * (grey - 20)
        return -self.sharpness * (grey - 40 * torch.arange(self.classes)).abs()


def load(path: str) -> torch.Tensor:
    return torch.from_numpy(read_image(path).astype(np.float32))[None]


def write_photos(folder: Path, greys: Sequence[int]) -> None:
    for number, grey in enumerate(greys):
        write_png(folder / f"day_{number % 2}" / f"{number}.png", np.full((8, 9), grey, np.uint8))


def infer(
    folder: Path,
    network: nn.Module | None = None,
    names: Sequence[str] = NAMES,
    check: Callable[[BatchRun], None] | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> BatchRun:
    """Run over `folder/in` as a bundle does."""
    paths = sorted((folder / "in").rglob("*.png"))
    cases = [{"image": str(p), "name": p.relative_to(folder / "in").as_posix()} for p in paths]
    batch = BatchRun(cases, str(folder / "out"), {}, None, "insect_pests", overwrite)
    dataset = Dataset(batch.pending, Compose([Lambdad("image", load)]))
    evaluator = SupervisedEvaluator(
        device=CPU,
        val_data_loader=AcceptedLoader(batch, dataset, batch_size=2),
        network=network or ByGrey(),
        val_handlers=[ClassWriter(batch, names, **settings)],
    )
    batch.run(evaluator)
    return batch


def table(folder: Path, name: str = "predictions.csv") -> dict[str, dict[str, str]]:
    with (folder / "out" / name).open(newline="", encoding="utf-8") as file:
        return {row["image"]: row for row in csv.DictReader(file)}


def sidecar(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / name).read_text("utf-8"))
    return found


def test_every_image_has_a_row_and_a_sidecar_with_its_best_guesses(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", [40, 0, 119])
    infer(tmp_path, checkpoint={"epoch": 7})
    rows = table(tmp_path)
    assert list(rows) == ["day_0/0.png", "day_0/2.png", "day_1/1.png"]
    assert [row["class"] for row in rows.values()] == ["bee, wild", "moth", "ant"]
    for name, grey in (("day_0/0", 40), ("day_1/1", 0), ("day_0/2", 119)):
        probability = torch.softmax(ByGrey()(torch.full((1, 1, 2, 2), float(grey)))[0], 0)
        order = probability.argsort(descending=True, stable=True).tolist()[:5]
        row, said = rows[f"{name}.png"], sidecar(tmp_path, f"{name}.json")
        assert int(row["index"]) == said["index"] == order[0]
        assert [guess["index"] for guess in said["top"]] == order
        assert [said["top"][k]["class"] for k in range(5)] == [NAMES[n] for n in order]
        told = [row["probability"], *(row[f"probability_{k}"] for k in range(2, 6))]
        assert list(map(float, told)) == pytest.approx(probability[order].tolist(), rel=1e-5)
        assert row["class_2"] == NAMES[order[1]]
        assert said["checkpoint"] == {"epoch": 7}
        assert "probabilities" not in said
    brief = table(tmp_path, "per_image.csv")
    assert {key: row["class"] for key, row in brief.items()} == {
        key: row["class"] for key, row in rows.items()
    }


def test_all_probabilities_are_written_on_request_and_sum_to_1(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", [40, 90])
    infer(tmp_path, save_probabilities=True)
    for row in table(tmp_path).values():
        values = [float(row[f"p_{name}"]) for name in NAMES]
        assert sum(values) == pytest.approx(1)
        assert max(values) == float(row["probability"]) == values[int(row["index"])]


def test_one_logit_tells_two_classes(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", [0, 20, 40])
    infer(tmp_path, ByGrey(1), NAMES[:2], save_probabilities=True)
    rows = [table(tmp_path)[f"day_{n % 2}/{n}.png"] for n in range(3)]
    assert [row["class"] for row in rows] == ["ant", "ant", "bee, wild"]  # 0.5 is the first class
    second = [float(row["p_bee, wild"]) for row in rows]
    assert second == pytest.approx(torch.sigmoid(torch.tensor([-2.0, 0, 2])).tolist(), rel=1e-5)
    assert all("class_3" not in row for row in rows)


def test_a_rerun_with_nothing_to_do_still_lists_everything(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", [40, 0])
    infer(tmp_path)
    before = (tmp_path / "out" / "predictions.csv").read_text()
    (tmp_path / "out" / "predictions.csv").unlink()
    batch = infer(tmp_path)
    assert batch.skipped == 2
    assert (tmp_path / "out" / "predictions.csv").read_text() == before


def test_a_photo_added_later_joins_the_list_and_a_bad_one_stops_nothing(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", [40])
    infer(tmp_path)
    write_photos(tmp_path / "in", [40, 0])
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    batch = infer(tmp_path)
    assert batch.skipped == 1
    assert [problem.path for problem in batch.problems] == ["broken.png"]
    assert list(table(tmp_path)) == ["day_0/0.png", "day_1/1.png"]


def test_logits_that_are_not_finite_reject_the_image_by_name(tmp_path: Path) -> None:
    class Broken(ByGrey):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return super().forward(image) / (image.mean(dim=(1, 2, 3))[:, None] > 0)

    write_photos(tmp_path / "in", [0])
    write_photos(tmp_path / "in" / "fine", [40])
    batch = infer(tmp_path, Broken())
    told = str(batch.problems[0])
    assert told.startswith("day_0/0.png")
    assert "not finite" in told


def test_more_classes_than_the_checkpoint_names_are_told(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", [0])
    batch = infer(tmp_path, names=NAMES[:4])
    assert "tells 6 classes apart and the checkpoint names 4" in str(batch.problems[0])


def test_names_given_twice_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    batch = BatchRun([], str(tmp_path), {}, None, "insect_pests")
    with pytest.raises(ConfigurationError, match="class_names has ant twice"):
        ClassWriter(batch, ["ant", "ant"])


@pytest.mark.parametrize(("classes", "activation"), [(6, "softmax"), (1, "sigmoid")])
def test_an_ensemble_writes_the_mean_of_the_probabilities(
    tmp_path: Path, classes: int, activation: Any
) -> None:
    members = [ByGrey(classes, sharpness) for sharpness in (0.1, 0.02)]
    ensemble = Ensemble(members, weights=[3, 1], activation=activation)
    predictor = FlipsAndTurns(ensemble, flips=[0, 1], activation=activation)
    write_photos(tmp_path / "in", [30, 95])
    names = NAMES[: max(classes, 2)]
    infer(tmp_path, predictor, names, save_probabilities=True)
    for number, grey in ((0, 30), (1, 95)):
        photo = torch.full((1, 1, 2, 2), float(grey))
        each = []
        for member in members:
            logits = member(photo)[0].double()
            one = torch.cat([torch.zeros(1), logits]) if classes == 1 else logits
            each.append(torch.softmax(one, 0))
        row = table(tmp_path)[f"day_{number}/{number}.png"]
        found = [float(row[f"p_{name}"]) for name in names]
        assert found == pytest.approx((0.75 * each[0] + 0.25 * each[1]).tolist(), rel=1e-5)


def test_the_report_of_an_inference_run_can_be_made(tmp_path: Path) -> None:
    write_photos(tmp_path / "in", [40])
    infer(tmp_path)
    page = inference_report(tmp_path / "out").read_text("utf-8")
    assert "bee, wild" in page


def evaluate(folder: Path, greys: Sequence[int], labels: Sequence[int], **settings: Any) -> None:
    """Evaluate photos of these greys as a bundle does."""
    generator = np.random.default_rng(0)
    data = [
        {
            "image": torch.from_numpy(generator.normal(grey, 1, (3, 20, 30)).astype(np.float32)),
            "label": label,
            "name": f"sub/{number}.jpg",
            "stratum": "night" if number % 2 else "day",
        }
        for number, (grey, label) in enumerate(zip(greys, labels, strict=True))
    ]
    metric = ClassMetrics(NAMES)
    writer = EvaluationWriter(str(folder), metric, {"experiment": "default"}, **settings)
    evaluator = SupervisedEvaluator(
        device=CPU,
        val_data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        network=ByGrey(),
        key_val_metric={"test_macro_f1": metric},
        val_handlers=[writer],
    )
    evaluator.run()


LABELS = [0, 1, 2, 3, 4, 0, 1, 2]
GREYS = [40 * label for label in LABELS[:6]] + [120, 85]  # the last but one is wrong


def test_an_evaluation_leaves_tables_that_agree(tmp_path: Path) -> None:
    evaluate(tmp_path, GREYS, LABELS)
    totals = yaml.safe_load((tmp_path / "test_metrics.yaml").read_text())
    images = yaml.safe_load((tmp_path / "per_image_metrics.yaml").read_text())
    assert totals["experiment"] == "default"
    assert (totals["num_test_images"], totals["classes"]) == (8, 6)
    assert totals["pooled_metrics"]["accuracy"] == pytest.approx(7 / 8)
    wrong = [row for row in images if not row["correct"]]
    assert [(row["truth"], row["predicted"]) for row in wrong] == [("bee, wild", "moth")]
    mean = np.mean([row["truth_probability"] for row in images])
    assert totals["average_metrics"]["truth_probability"] == pytest.approx(mean)
    assert totals["strata"] == {
        "day": {"images": 4, "accuracy": 0.75},
        "night": {"images": 4, "accuracy": 1.0},
    }
    with (tmp_path / "per_class_metrics.csv").open(newline="") as file:
        classes = {row["class"]: row for row in csv.DictReader(file)}
    assert list(classes) == NAMES
    assert float(classes["bee, wild"]["recall"]) == 0.5
    assert float(classes["moth"]["precision"]) == 0.5
    assert classes["wasp"]["support"] == "0"
    assert classes["wasp"]["recall"] == "nan"
    with (tmp_path / "confusion_matrix.csv").open(newline="") as file:
        matrix = {row.pop("truth/predicted"): row for row in csv.DictReader(file)}
    assert list(matrix) == NAMES
    assert matrix["bee, wild"]["moth"] == "1"
    assert sum(int(n) for row in matrix.values() for n in row.values()) == 8
    assert read_image(tmp_path / "confusion_matrix.png").shape[0] > 300


@pytest.mark.parametrize("most", [0, 2, 50])
def test_the_hardest_images_are_drawn(tmp_path: Path, most: int) -> None:
    evaluate(tmp_path, GREYS, LABELS, most_pictures=most)
    images = yaml.safe_load((tmp_path / "per_image_metrics.yaml").read_text())
    images.sort(key=lambda row: row["truth_probability"])
    drawn = {p.relative_to(tmp_path / "pictures").stem for p in tmp_path.rglob("pictures/*/*.png")}
    assert drawn == {Path(row["image"]).stem for row in images[:most]}


def test_the_report_of_an_evaluation_shows_the_worst_first(tmp_path: Path) -> None:
    evaluate(tmp_path, GREYS, LABELS, most_pictures=3)
    page = evaluation_report(tmp_path).read_text("utf-8")
    assert "Lowest truth_probability first" in page
    assert page.index("sub/6: truth_probability") < page.index("sub/7: truth_probability")


def test_an_evaluation_that_fails_leaves_no_tables(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sub/1.jpg: label 9"):
        evaluate(tmp_path, [0, 40], [0, 9])
    assert not (tmp_path / "test_metrics.yaml").exists()
