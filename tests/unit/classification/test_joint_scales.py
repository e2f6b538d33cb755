from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pipeline.classification.consistency import ConsistencyLoss
from pipeline.classification.joint_scales import JointScales
from pipeline.classification.losses import ClassificationLoss
from pipeline.classification.networks import SmallResNet
from pipeline.classification.scales import resize
from pipeline.errors import ConfigurationError
from pipeline.hardware.fake_tensors import without_data
from pipeline.hardware.storages import LiveStorages
from pipeline.training.block_checkpointing import checkpoint_blocks
from pipeline.training.objective import Part, plain_objective

SCALES = (16, 12, 8)
TOLERANCE = 1e-12
NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch_equal_mean": lambda: nn.BatchNorm2d(4, momentum=None),
    "group": lambda: nn.GroupNorm(2, 4),
    "spectral": lambda: spectral_norm(nn.Conv2d(4, 4, 1)),
}


class Classifier(nn.Module):
    """Two blocks with dropout, and a layer on the mean of the features."""

    def __init__(self, classes: int, norm: str, dropout: float = 0.3) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(channels, 4, 3, padding=1),
                    NORMS[norm](),
                    nn.Tanh(),
                    nn.Dropout(dropout),
                )
                for channels in (3, 4)
            )
        )
        self.head = nn.Linear(4, classes)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(image).mean(dim=(2, 3)))
        return logits


def make(classes: int = 3, norm: str = "batch", dropout: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    return Classifier(classes, norm, dropout).double()


def make_engine(network: nn.Module) -> Any:
    """Return what an objective sees of a trainer; it keeps the events and what they showed."""
    engine = SimpleNamespace(
        network=network,
        inferer=SimpleInferer(),
        loss_function=ClassificationLoss(),
        state=SimpleNamespace(output={}),
        told=[],
    )
    engine.fire_event = lambda event: engine.told.append((event, dict(engine.state.output)))
    return engine


def make_part(samples: int = 4, classes: int = 3, **settings: Any) -> Part:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(samples, 3, 16, 16, generator=generator, dtype=torch.float64)
    label = torch.randint(0, max(classes, 2), (samples,), generator=generator)
    return Part(
        images,
        label,
        **{"epoch": 1, "update": 0, "autocast": nullcontext, "weighted": torch.clone} | settings,
    )


def flat_gradient(network: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in network.parameters()])


def relative_error(network: nn.Module, wanted: nn.Module) -> float:
    found, expected = flat_gradient(network), flat_gradient(wanted)
    return float((found - expected).norm() / expected.norm())


def joint(
    memory_efficient: bool, target: str = "mean", kind: str = "kl", weight: float = 0.7
) -> JointScales:
    return JointScales(SCALES, ConsistencyLoss(kind, target), weight, memory_efficient)


def steps(objective: Any, network: nn.Module, part: Part, count: int = 2) -> tuple[Tensor, Tensor]:
    """Return prediction and loss of the last of some steps, whose gradients add up."""
    torch.manual_seed(2)
    for _ in range(count):
        found = objective(make_engine(network), part)
    return found


def assert_same_step(network: nn.Module, objective: Any, expected: Any, part: Part) -> None:
    """Hold gradient, prediction, loss, buffers and the next random number against each other."""
    wanted = make_like(network)
    pred, loss = steps(objective, network, part)
    drawn = torch.rand(3)
    wanted_pred, wanted_loss = steps(expected, wanted, part)
    assert torch.equal(drawn, torch.rand(3))
    assert relative_error(network, wanted) <= TOLERANCE
    torch.testing.assert_close((pred, loss), (wanted_pred, wanted_loss), rtol=0, atol=TOLERANCE)
    found, expectation = dict(network.named_buffers()), dict(wanted.named_buffers())
    torch.testing.assert_close(found, expectation, rtol=0, atol=0)


def make_like(network: Any) -> nn.Module:
    """Return the network anew, as it was made and without checkpointed blocks."""
    norm = type(network.blocks[0][1]).__name__
    names = {"BatchNorm2d": "batch", "GroupNorm": "group"}
    name = names.get(norm, "spectral")
    if name == "batch" and network.blocks[0][1].momentum is None:
        name = "batch_equal_mean"
    return make(network.head.out_features, name, network.blocks[0][3].p)


class Written:
    """The loss written down once more, in one graph and without this package's steps."""

    def __init__(self, target: str, kind: str, weight: float) -> None:
        self.consistency, self.weight = ConsistencyLoss(kind, target), weight
        self.order = sorted(SCALES, reverse=target == "largest")

    def __call__(self, engine: Any, part: Part) -> tuple[Tensor, Tensor]:
        logits = {size: engine.network(resize(part.inputs, size)) for size in self.order}
        losses = [engine.loss_function(z, part.targets) for z in logits.values()]
        agreed = self.consistency([logits[size] for size in SCALES])
        loss = sum(losses) / len(losses) + self.weight * agreed
        part.weighted(loss).backward()
        return logits[max(SCALES)].detach(), loss.detach()


# The laws


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("target", ["largest", "mean"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_step_is_the_written_formulas_whatever_it_keeps_in_memory(
    norm: str, target: str, memory_efficient: bool, checkpointed: bool
) -> None:
    network = make(norm=norm)
    if checkpointed:
        checkpoint_blocks(network, ["blocks.0", "blocks.1"])
    written = Written(target, "kl", 0.7)
    assert_same_step(network, joint(memory_efficient, target), written, make_part())


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("kind", ["kl", "mse", "cosine"])
@pytest.mark.parametrize("target", ["largest", "mean"])
def test_every_consistency_has_the_same_gradient_in_little_memory(
    target: str, kind: str, classes: int
) -> None:
    part = make_part(classes=classes)
    written = Written(target, kind, 0.7)
    assert_same_step(make(classes), joint(True, target, kind), written, part)
    # and it is not lost, as the softmax of one logit would be
    plain, pulled = make(classes), make(classes)
    steps(joint(True, target, kind, 0.0), plain, part)
    steps(joint(True, target, kind, 0.7), pulled, part)
    assert relative_error(pulled, plain) > 1e-3


@pytest.mark.parametrize("target", ["largest", "mean"])
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_without_weight_it_is_the_mean_of_plain_steps(target: str, memory_efficient: bool) -> None:
    part, network, wanted = make_part(), make(), make()
    _, loss = steps(joint(memory_efficient, target, weight=0.0), network, part, 1)
    torch.manual_seed(2)
    losses = [
        plain_objective(
            make_engine(wanted),
            make_part(weighted=lambda loss: loss / 3) if size == 16 else at_size(part, size),
        )[1]
        for size in SCALES
    ]
    assert relative_error(network, wanted) <= TOLERANCE
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def at_size(part: Part, size: int) -> Part:
    return Part(resize(part.inputs, size), part.targets, 1, 0, nullcontext, lambda loss: loss / 3)


@pytest.mark.parametrize("target", ["largest", "mean"])
def test_loss_scaling_and_shares_reach_the_gradient(target: str) -> None:
    network, scaled = make(), make()
    steps(joint(True, target), network, make_part())
    steps(joint(True, target), scaled, make_part(weighted=lambda loss: loss * 1024.0))
    torch.testing.assert_close(flat_gradient(scaled), 1024 * flat_gradient(network))


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("target", ["largest", "mean"])
def test_each_event_is_told_once_with_the_largest_scales_prediction(
    target: str, memory_efficient: bool
) -> None:
    engine = make_engine(make(norm="group", dropout=0.0))
    part = make_part()
    pred, loss = joint(memory_efficient, target)(engine, part)
    (first, with_pred), (second, with_loss) = engine.told
    assert first == IterationEvents.FORWARD_COMPLETED
    assert second == IterationEvents.LOSS_COMPLETED
    torch.testing.assert_close(with_pred["pred"], engine.network(part.inputs).detach())
    assert torch.equal(with_loss["loss"], loss)
    assert torch.equal(with_pred["pred"], pred)
    assert not pred.requires_grad


# Mixed precision


class Counted:
    """Gives autocast contexts and keeps them: each serves one forward pass."""

    def __init__(self) -> None:
        self.given: list[AbstractContextManager[Any]] = []

    def __call__(self) -> AbstractContextManager[Any]:
        self.given.append(torch.autocast("cpu", torch.bfloat16))
        return self.given[-1]


@pytest.mark.parametrize(("target", "passes"), [("largest", 3), ("mean", 5)])
def test_half_precision_differs_by_no_more_than_its_rounding(target: str, passes: int) -> None:
    """One context around both passes would serve casts that were made without gradients."""
    grads = {}
    for way in (False, True):
        network, casts = make(norm="group").float(), Counted()
        part = make_part(autocast=casts)
        part = Part(part.inputs.float(), part.targets, 1, 0, casts, torch.clone)
        pred, loss = steps(joint(way, target), network, part, 1)
        assert pred.dtype == torch.bfloat16
        assert loss.dtype == torch.float32
        assert len(casts.given) == (passes if way else 3)
        assert all(p.grad is not None and bool(p.grad.any()) for p in network.parameters())
        grads[way] = flat_gradient(network)
    assert float((grads[True] - grads[False]).norm() / grads[False].norm()) < 0.02


# Guards


class FailsLater:
    """Raises at the n-th call of a module."""

    def __init__(self, module: nn.Module, call: int) -> None:
        self.left = call
        module.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("call", [4, 5])
def test_a_second_pass_that_fails_leaves_buffers_and_generator_as_after_the_first(
    call: int,
) -> None:
    network, wanted = make(), make()
    FailsLater(network.head, call)  # type: ignore[arg-type]
    torch.manual_seed(2)
    with pytest.raises(torch.OutOfMemoryError):
        joint(True)(make_engine(network), make_part())
    drawn = torch.rand(3)
    steps(joint(False), wanted, make_part(), 1)
    assert torch.equal(drawn, torch.rand(3))
    found, expected = dict(network.named_buffers()), dict(wanted.named_buffers())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_buffers_stay_the_tensors_they_were() -> None:
    network = make()
    before = list(network.buffers())
    steps(joint(True), network, make_part())
    assert all(one is other for one, other in zip(network.buffers(), before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["largest", "mean"])
def test_a_gpus_own_generator_is_guarded_too(target: str) -> None:
    found = {}
    for way in (False, True):
        network, part = make().cuda(), make_part()
        part = Part(part.inputs.cuda(), part.targets.cuda(), 1, 0, nullcontext, torch.clone)
        steps(joint(way, target), network, part)
        found[way] = flat_gradient(network), torch.rand(3, device="cuda")
    torch.testing.assert_close(found[True], found[False], rtol=1e-9, atol=1e-12)


# Memory


def activation_peak(objective: Any, blocks: bool = False, norm: str = "group") -> int:
    """Return what one step takes above weights and images, without computing it."""
    with without_data(), LiveStorages() as live:
        network = SmallResNet(num_classes=5, norm=norm, dropout=0.1)  # type: ignore[arg-type]
        if blocks:
            checkpoint_blocks(network)
        images, label = torch.rand(8, 3, 128, 128), torch.zeros(8, dtype=torch.long)
        held = live.peak_bytes
        objective(make_engine(network), Part(images, label, 1, 0, nullcontext, torch.clone))
    return live.peak_bytes - held


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("target", ["largest", "mean"])
def test_all_scales_take_the_memory_of_the_largest(target: str, norm: str) -> None:
    sizes = (128, 96, 64)
    peak = partial(activation_peak, norm=norm)
    alone = peak(plain_objective)
    ways = {
        way: JointScales(sizes, ConsistencyLoss("kl", target), 1.0, memory_efficient=way)
        for way in (True, False)
    }
    assert peak(ways[True]) <= 1.02 * alone
    # what autograd keeps grows with the area of all scales
    assert peak(ways[False]) > 0.9 * alone * sum(s**2 for s in sizes) / max(sizes) ** 2
    assert peak(ways[True], blocks=True) < 0.9 * alone


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": [128]}, r"mode joint needs 2 scales or more, got \[128\]"),
        ({"scales": [64, 64]}, "scales must be different sizes"),
        ({"weight": -0.1}, "consistency_weight must be 0 or more, got -0.1"),
        ({"weight": float("nan")}, "consistency_weight must be 0 or more, got nan"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        JointScales(**{"scales": [128, 64], "consistency": ConsistencyLoss()} | settings)
