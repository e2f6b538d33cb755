"""The memory of a training step, estimated without running it, beside that of the real step.

    python benchmarks/memory_estimate.py [--bundle fundus_vessels]

For the default network of every bundle and its larger ones, at small shapes, two samples, in
float32: what `pipeline.hardware.memory` computes from tensors without data, beside two independent
counts of the same step on a CPU. `storages` is the peak of torch's own MemTracker, which follows
storages and module hooks; `allocator` is the peak of the CPU allocator's calls that torch's
profiler records, which also sees what convolutions of oneDNN copy inside. The estimate of the
latter, `with copies`, is compared with it. Last, the full shapes of the profiles of `oct_layers`
for a GPU of 4 GB and one of 80 GB, by the estimate alone: nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pipeline.configs import read_config
from pipeline.hardware.memory import MemoryEstimate, estimate_training_memory, fit_batch
from pipeline.hardware.simulated_step import batch_of, use_channels_last
from pipeline.running_config import RunningConfig

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
STORAGES_TOLERANCE, ALLOCATOR_TOLERANCE = 0.01, 0.10
BATCH = 2

# Settings that make a step small. Below 40 voxels the deepest convolutions of the 3-D networks have
# hardly anything to do, and oneDNN's scratch memory for their weights is most of the peak.
SMALL: Mapping[str, Mapping[str, Any]] = {
    "fundus_vessels": {"patch_size": [64, 64]},
    "oct_layers": {"frame": [96, 128], "patch_columns": 64},
    "vesuvius_surface": {"patch_size": [40, 40, 40]},
    "insect_pests": {
        "image_size_px": 64, "num_classes": 102, "loss::class_counts": [10] * 102,
    },
    "multiscale_classifier": {"base_size": 64, "logits": 10},
}  # fmt: skip
NETWORKS: Mapping[str, tuple[str, ...]] = {
    "fundus_vessels": ("default", "unet", "roinet", "utrans", "transroinet"),
    "oct_layers": ("default", "hybrid_attention", "hybrid_attention_64"),
    "vesuvius_surface": ("default", "topology_aware", "residual_encoder"),
    "insect_pests": ("default", "resnet50", "seresnet50", "densenet121", "efficientnet_b0"),
    "multiscale_classifier": ("default", "resnet18", "resnet50", "efficientnet_b0"),
}
PROFILES = {
    "gpu_4gb": (("hybrid_attention", "gpu_4gb"), 4e9),
    "gpu_80gb": (("hybrid_attention_64", "gpu_80gb"), 80e9),
}


@dataclass(frozen=True)
class Step:
    """A bundle's training step: what builds it, and what it is given."""

    make_network: Callable[[], Any]
    make_loss: Callable[[], Any]
    make_optimizer: Callable[[Any], Any]
    input_shape: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def estimate(self, **settings: Any) -> MemoryEstimate:
        return estimate_training_memory(
            *self.makers(), self.input_shape, **self.settings, **settings
        )

    def makers(self) -> tuple[Callable[..., Any], ...]:
        return self.make_network, self.make_loss, self.make_optimizer


class RealStep:
    """The same step with data, on this CPU."""

    def __init__(self, step: Step) -> None:
        self.network = step.make_network().train()
        if step.settings["channels_last"]:
            use_channels_last(self.network)
        self.loss = step.make_loss()
        self.optimizer = step.make_optimizer(self.network.parameters())
        self.inputs, self.target = batch_of(step.input_shape, step.settings, torch.zeros)

    def run(self) -> None:
        """Compute one update; prediction and gradients live until its end."""
        output = self.network(self.inputs)
        self.loss(output, self.target).backward()
        self.optimizer.step()
        del output
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> list[Tensor]:
        """Return what is alive between two steps."""
        states = [part for state in self.optimizer.state.values() for part in state.values()]
        kept = [*self.network.parameters(), *self.network.buffers(), self.inputs, self.target]
        return [*kept, *(part for part in states if isinstance(part, Tensor))]


def bundle_step(bundle: str, overlays: tuple[str, ...], overrides: Mapping[str, Any]) -> Step:
    """Return the training step of a bundle's configuration, of one sample."""
    configs = BUNDLES / bundle / "configs"
    names = [name for name in overlays if name != "default"]
    parser = ConfigParser(read_config([configs / f"{name}.yaml" for name in ("train", *names)]))
    for key, value in overrides.items():
        parser[key] = value
    text = parser["optimizer"]  # without what belongs to a run: parameters, and the plan's rate
    parser["optimizer"] = {key: text[key] for key in text if key not in ("params", "lr")}
    config = RunningConfig(parser)
    settings = {
        "target_shape": tuple(parser.get_parsed_content("plan::target_shape")),
        "target_dtype": parser["plan"].get("target_dtype", "float32"),
        "channels_last": "channels_last" in parser["network"],
    }
    return Step(
        config.maker("network_def"),
        config.maker("loss"),
        config.maker("optimizer"),
        (1, *parser.get_parsed_content("plan::input_shape")),
        settings,
    )


def with_batch(step: Step, batch: int) -> Step:
    return replace(step, input_shape=(batch, *step.input_shape[1:]))


def storage_bytes(step: Step) -> int:
    """Return the peak of a real step by torch's MemTracker."""
    from torch.distributed._tools.mem_tracker import MemTracker

    real = RealStep(step)
    tracker = MemTracker()
    tracker.track_external(real.network, real.optimizer, real.inputs, real.target)
    with tracker:
        real.run()
        tracker.reset_mod_stats()
        real.run()  # in the first one the optimizer has no state yet
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def allocator_bytes(step: Step) -> int:
    """Return the peak of a real step by the CPU allocator's calls."""
    real = RealStep(step)
    real.run()
    now = highest = sum(
        size for size in {t.untyped_storage()._cdata: t.nbytes for t in real.tensors()}.values()
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        real.run()
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest


def compare(bundle: str, network: str) -> dict[str, float]:
    """Return the figures of a bundle's network at a small shape, in bytes."""
    step = with_batch(bundle_step(bundle, (network,), SMALL[bundle]), BATCH)
    estimate = step.estimate()
    return {
        "estimate": estimate.peak_bytes,
        "storages": storage_bytes(step),
        "copies": estimate.allocated_bytes,
        "allocator": allocator_bytes(step),
    }


def profile_bytes(name: str) -> tuple[int, float]:
    """Return what a profile of `oct_layers` takes by the estimate, and its limit."""
    overlays, limit = PROFILES[name]
    step = bundle_step("oct_layers", overlays, {})
    config = read_config(BUNDLES / "oct_layers" / "configs" / f"{name}.yaml")
    settings = {
        "precision": config["precision"],
        "averaged": True,
        "foreach": True,  # as on a GPU
    }
    if config.get("memory_efficient"):
        from pipeline.training.block_checkpointing import checkpoint_blocks

        settings["prepare"] = checkpoint_blocks
    growth = fit_batch(*step.makers(), step.input_shape, **step.settings, **settings)
    return growth.at(config["batch_size"], config["accumulation_steps"]), limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", choices=NETWORKS, help="one bundle alone")
    only = parser.parse_args().bundle
    met = True
    print(
        f"training step, {BATCH} samples at small shapes, float32, MiB; torch {torch.__version__}"
    )
    print(f"{'bundle':<22}{'network':<20}{'estimate':>10}{'storages':>10}{'error':>8}"
          f"{'with copies':>13}{'allocator':>11}{'error':>8}")  # fmt: skip
    for bundle in [only] if only else NETWORKS:
        for network in NETWORKS[bundle]:
            found = compare(bundle, network)
            by_storages = found["estimate"] / found["storages"] - 1
            by_allocator = found["copies"] / found["allocator"] - 1
            met &= abs(by_storages) <= STORAGES_TOLERANCE
            met &= abs(by_allocator) <= ALLOCATOR_TOLERANCE
            mib = {name: size / 2**20 for name, size in found.items()}
            print(f"{bundle:<22}{network:<20}{mib['estimate']:>10.1f}{mib['storages']:>10.1f}"
                  f"{by_storages:>8.2%}{mib['copies']:>13.1f}{mib['allocator']:>11.1f}"
                  f"{by_allocator:>8.2%}", flush=True)  # fmt: skip
    print(f"targets: {STORAGES_TOLERANCE:.0%} by storages, {ALLOCATOR_TOLERANCE:.0%} by the "
          f"allocator: {_verdict(met)}")  # fmt: skip
    for name in PROFILES if only in (None, "oct_layers") else ():
        size, limit = profile_bytes(name)
        print(f"oct_layers {name}: {size / 1e9:.2f} GB of tensors, target below "
              f"{limit / 1e9:.0f} GB: {_verdict(size < limit)}")  # fmt: skip


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


if __name__ == "__main__":
    main()
