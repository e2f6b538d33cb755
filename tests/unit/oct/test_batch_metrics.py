from __future__ import annotations

import torch
from torch.nn.functional import one_hot

from pipeline.oct.batch_metrics import LayerBatchMetrics


def test_only_annotated_pixels_of_the_retina_count() -> None:
    classes = torch.tensor([[[0, 0, 255], [1, 1, 255], [2, 1, 255]]])
    predicted = torch.tensor([[[0, 1, 1], [1, 1, 1], [2, 2, 1]]])
    logits = one_hot(predicted, 3).movedim(-1, 1).float()
    retina, truth = LayerBatchMetrics().masks(logits, classes[:, None].float())
    assert torch.equal(truth, classes == 1)
    assert torch.equal(retina, (predicted == 1) & (classes != 255))


def test_rows_below_the_classes_change_nothing() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 8, 5)
    classes = torch.randint(0, 3, (2, 1, 8, 5)).float()
    rows = torch.full((2, 1, 2, 5), 3.5)
    plain = LayerBatchMetrics().masks(logits, classes)
    longer = LayerBatchMetrics().masks(logits, torch.cat([classes, rows], dim=2))
    assert all(torch.equal(one, other) for one, other in zip(plain, longer, strict=True))
