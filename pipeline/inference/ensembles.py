"""Ensembles: the mean of several networks, such as those of a cross-validation's folds."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.data.checksums import file_sha256
from pipeline.errors import CheckpointError, ConfigurationError
from pipeline.inference.averages import (
    Activation,
    Average,
    Domain,
    check_domain,
    normalised_weights,
)

__all__ = ["Ensemble", "find_checkpoints", "load_ensemble"]

_FOLD = re.compile(r"fold_(\d+)")
_BEST = Path("checkpoints") / "best.pt"


class _Check(Protocol):
    def __call__(
        self, content: Mapping[str, Any], *, source: str | Path, settings: Mapping[str, Any]
    ) -> None: ...


class Ensemble(nn.Module):
    """Networks that are asked one after another, and the weighted mean of their answers.

    A network of weight 0 is not run. Where one alone has a weight, its own output is returned.

    Args:
        networks: from windows `(B, C, *spatial)` to logits `(B, C', ...)`, or a tuple or dictionary
            of such tensors; all of the same form.
        weights: one per network, with any sum; None: all count the same.
        domain: what is averaged, `probability` or `logit`; see `Average`. Returned are logits.
        activation: of the networks' logits, `sigmoid` or `softmax` over the channels.
        sources: what tells the networks from others, such as hashes, for the settings.

    Raises:
        ConfigurationError: no network, or weights or sources that do not fit.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        domain: Domain = "probability",
        activation: Activation = "sigmoid",
        sources: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not networks:
            raise ConfigurationError("an ensemble without a network; give at least one")
        if sources and len(sources) != len(networks):
            raise ConfigurationError(
                f"{len(sources)} sources for {len(networks)} networks; give one each"
            )
        check_domain(domain, activation)
        self.networks = nn.ModuleList(networks)
        self.weights = normalised_weights(weights, len(networks))
        self.domain = domain
        self.activation = activation
        self.sources = tuple(sources)

    def forward(self, window: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the mean logits of `window` `(B, C, *spatial)`, in the form the networks give."""
        members = zip(self.networks, self.weights, strict=True)
        asked = [(network, weight) for network, weight in members if weight]
        if len(asked) == 1:
            return asked[0][0](window, *args, **kwargs)
        average = Average(self.domain, self.activation)
        for network, weight in asked:
            average.add(network(window, *args, **kwargs), weight)
        return average.logits()

    def settings(self) -> dict[str, Any]:
        """Return what determines the result, as plain data for a sidecar."""
        return {
            "networks": len(self.networks),
            "sources": list(self.sources),
            "weights": list(self.weights),
            "domain": self.domain,
            "activation": self.activation,
        }


def load_ensemble(
    network: nn.Module,
    checkpoints: Sequence[Path | str],
    *,
    read: Callable[[Path], Mapping[str, Any]],
    load: Callable[[nn.Module, Mapping[str, Any], Path], None],
    check: _Check | None = None,
    settings: Mapping[str, Any] | None = None,
    build: Callable[[Mapping[str, Any], Path], nn.Module] | None = None,
    weights: Sequence[float] | None = None,
    domain: Domain = "probability",
    activation: Activation = "sigmoid",
) -> Ensemble:
    """Return the ensemble of `network` with the weights of each checkpoint.

    How checkpoints are read is the caller's to say, since this room does not know of training. The
    sha256 of each file stands among the ensemble's settings.

    Args:
        network: of the first one's architecture; it becomes the first member.
        checkpoints: files, folders of runs, or folders with `fold_<k>`, as `find_checkpoints` takes
            them.
        read: returns the content of a checkpoint, such as `read_checkpoint`.
        load: copies a content's weights into a network, such as `load_weights`.
        check: compares a content with `settings`, such as `check_definition`.
        settings: values of the running configuration.
        build: returns the network that a content defines, such as `build_network`; with it, further
            members may be of other architectures, and must agree in everything else.
        weights: one per checkpoint; None: all count the same.
        domain: as of `Ensemble`.
        activation: as of `Ensemble`.

    Raises:
        CheckpointError: one is missing, damaged or of another architecture.
        ConfigurationError: the weights do not fit.
    """
    paths = find_checkpoints(checkpoints)
    shares = normalised_weights(weights, len(paths))  # before gigabytes are read
    members: list[nn.Module] = []
    sources = []
    for path in paths:
        content, compared = read(path), dict(settings or {})
        own = content.get("network_def")
        if members and build is not None and own not in (None, compared.get("network_def")):
            member = build(content, path).to(_device_of(network))
            compared = {
                k: v for k, v in compared.items() if k not in ("architecture", "network_def")
            }
        else:
            member = copy.deepcopy(network) if members else network
        if check is not None:
            check(content, source=path, settings=compared)
        load(member, content, path)
        members.append(member)
        sources.append(file_sha256(path))
    return Ensemble(members, shares, domain, activation, sources)


def _device_of(network: nn.Module) -> torch.device:
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def find_checkpoints(paths: Sequence[Path | str] | Path | str) -> list[Path]:
    """Return the checkpoint files that `paths` stand for, folds in the order of their numbers.

    Args:
        paths: checkpoint files, folders of runs (their `checkpoints/best.pt`) and folders of
            cross-validations (that of each `fold_<k>`); one or several.

    Raises:
        CheckpointError: listing everything that is missing.
        ConfigurationError: no path, or one checkpoint twice.
    """
    given = [paths] if isinstance(paths, Path | str) else list(paths)
    if not given:
        raise ConfigurationError("no checkpoint given; name files or folders of runs")
    found = [path for one in given for path in _checkpoints_of(Path(one))]
    if missing := [str(path) for path in found if not path.is_file()]:
        raise CheckpointError(
            f"{len(missing)} of {len(found)} checkpoints missing: {', '.join(missing)}; train "
            "these folds first, or name the checkpoints to use"
        )
    places = [path.resolve() for path in found]
    if twice := [str(path) for n, path in enumerate(found) if places[n] in places[:n]]:
        raise ConfigurationError(
            f"checkpoints given twice: {', '.join(twice)}; give weights where one is to count more"
        )
    return found


def _checkpoints_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / _BEST).is_file():
        return [path / _BEST]
    numbered = ((_FOLD.fullmatch(child.name), child) for child in path.iterdir() if child.is_dir())
    folds = sorted((int(match[1]), child) for match, child in numbered if match)
    return [fold / _BEST for _, fold in folds] or [path / _BEST]
