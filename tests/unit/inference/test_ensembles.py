from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.data.atomic import write_bytes
from pipeline.data.checksums import file_sha256
from pipeline.errors import CheckpointError, ConfigurationError
from pipeline.inference.averages import Activation, Domain
from pipeline.inference.ensembles import Ensemble, find_checkpoints, load_ensemble
from pipeline.inference.test_time import FlipsAndTurns


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def member(seed: int, channels: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Conv2d(1, channels, 3, padding=1).requires_grad_(False)


MEMBERS = [member(seed) for seed in range(4)]
VALUES = image(2, 1, 5, 6)


def probabilities(logits: Tensor, activation: Activation) -> Tensor:
    return torch.sigmoid(logits) if activation == "sigmoid" else torch.softmax(logits, 1)


@pytest.mark.parametrize("domain", ["probability", "logit"])
def test_one_network_is_its_ensemble(domain: Domain) -> None:
    assert torch.equal(Ensemble(MEMBERS[:1], [7], domain)(VALUES), MEMBERS[0](VALUES))


@pytest.mark.parametrize("domain", ["probability", "logit"])
def test_weights_1_and_0_give_the_first_network(domain: Domain) -> None:
    assert torch.equal(Ensemble(MEMBERS[:2], [1, 0], domain)(VALUES), MEMBERS[0](VALUES))


def test_network_of_weight_0_is_not_run() -> None:
    class Broken(nn.Module):
        def forward(self, window: Tensor) -> Tensor:
            raise AssertionError

    found = Ensemble([MEMBERS[0], Broken(), MEMBERS[1]], [1, 0, 1])(VALUES)
    assert torch.equal(found, Ensemble(MEMBERS[:2])(VALUES))


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@given(weights=st.lists(st.floats(0.01, 10), min_size=4, max_size=4))
def test_probability_mean_is_the_brute_force_mean(
    activation: Activation, weights: list[float]
) -> None:
    found = Ensemble(MEMBERS, weights, activation=activation)(VALUES)
    each = [probabilities(network(VALUES).double(), activation) for network in MEMBERS]
    expected = sum(w * p for w, p in zip(weights, each, strict=True)) / sum(weights)
    torch.testing.assert_close(
        probabilities(found.double(), activation), expected, rtol=1e-5, atol=1e-7
    )


@given(weights=st.lists(st.floats(0.01, 10), min_size=4, max_size=4))
def test_logit_mean_is_the_plain_mean(weights: list[float]) -> None:
    found = Ensemble(MEMBERS, weights, "logit")(VALUES)
    each = [w * network(VALUES) for w, network in zip(weights, MEMBERS, strict=True)]
    torch.testing.assert_close(found, sum(each) / sum(weights), rtol=1e-5, atol=1e-6)


def test_order_of_the_networks_does_not_matter() -> None:
    found = Ensemble(MEMBERS[::-1], [4, 3, 2, 1])(VALUES)
    expected = Ensemble(MEMBERS, [1, 2, 3, 4])(VALUES)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_ensembles_of_ensembles_are_one_ensemble() -> None:
    halves = [Ensemble(MEMBERS[:2]), Ensemble(MEMBERS[2:])]
    torch.testing.assert_close(
        Ensemble(halves)(VALUES), Ensemble(MEMBERS)(VALUES), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("domain", ["probability", "logit"])
def test_ensembles_may_be_augmented_and_augmented_networks_averaged(domain: Domain) -> None:
    inside = Ensemble([FlipsAndTurns(one, [0], [(0, 1)], domain) for one in MEMBERS], None, domain)
    around = FlipsAndTurns(Ensemble(MEMBERS, None, domain), [0], [(0, 1)], domain)
    torch.testing.assert_close(inside(VALUES), around(VALUES), rtol=1e-5, atol=2e-6)


def test_bfloat16_networks_are_averaged_in_float32() -> None:
    halves = [member(seed).to(torch.bfloat16) for seed in range(3)]
    found = Ensemble(halves)(VALUES.to(torch.bfloat16))
    assert found.dtype == torch.float32
    logits = [half(VALUES.to(torch.bfloat16)).double() for half in halves]
    expected = torch.logit(torch.stack(logits).sigmoid().mean(0))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


class Two(nn.Module):
    """A network with two outputs, by name or in a row."""

    def __init__(self, network: nn.Module, named: bool) -> None:
        super().__init__()
        self.network = network
        self.named = named

    def forward(self, window: Tensor) -> Any:
        first = self.network(window)
        return {"fine": first, "coarse": first[:, :1]} if self.named else (first, first[:, :1])


@pytest.mark.parametrize("named", [True, False], ids=["dict", "tuple"])
def test_several_outputs_are_averaged_each_for_itself(named: bool) -> None:
    found = Ensemble([Two(network, named) for network in MEMBERS])(VALUES)
    fine, coarse = found.values() if named else found
    torch.testing.assert_close(fine, Ensemble(MEMBERS)(VALUES))
    torch.testing.assert_close(coarse, fine[:, :1])


def test_networks_of_different_outputs_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"shape \[2, 1, 5, 6\] .* \[2, 3, 5, 6\]"):
        Ensemble([MEMBERS[0], member(9, channels=1)])(VALUES)


def test_networks_move_with_the_ensemble() -> None:
    ensemble = Ensemble([member(0).train(), member(1).train()]).eval().double()
    assert not any(network.training for network in ensemble.networks)
    assert {p.dtype for p in ensemble.parameters()} == {torch.float64}
    other = Ensemble([member(2), member(3)]).double()
    other.load_state_dict(ensemble.state_dict())
    assert torch.equal(other(VALUES.double()), ensemble(VALUES.double()))


def test_settings_show_normalised_weights() -> None:
    found = Ensemble(MEMBERS[:2], [3, 1], "logit", sources=["a", "b"]).settings()
    assert found == {
        "networks": 2, "sources": ["a", "b"], "weights": [0.75, 0.25], "domain": "logit",
        "activation": "sigmoid",
    }  # fmt: skip
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"networks": []}, "an ensemble without a network"),
        ({"weights": [1.0]}, "1 weights for 2 predictions"),
        ({"weights": [1.0, -0.5]}, "at least 0"),
        ({"weights": [math.nan, 1.0]}, "finite"),
        ({"domain": "odds"}, "domain must be probability or logit"),
        ({"activation": "tanh"}, "activation must be sigmoid or softmax"),
        ({"sources": ["a"]}, "1 sources for 2 networks"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Ensemble(**{"networks": MEMBERS[:2], **settings})


def put(path: Path, content: bytes = b"weights") -> Path:
    return write_bytes(path, content)


def test_checkpoints_are_found_in_files_runs_and_folds(tmp_path: Path) -> None:
    single = put(tmp_path / "model.pt")
    run = put(tmp_path / "run" / "checkpoints" / "best.pt")
    folds = [put(tmp_path / "cv" / f"fold_{k}" / "checkpoints" / "best.pt") for k in (10, 2, 0)]
    put(tmp_path / "cv" / "fold_1.txt")
    put(tmp_path / "cv" / "fold_x" / "checkpoints" / "best.pt")
    found = find_checkpoints([single, str(run.parents[1]), tmp_path / "cv"])
    assert found == [single, run, *reversed(folds)]


@pytest.mark.parametrize("as_text", [True, False])
def test_a_single_path_needs_no_list(tmp_path: Path, as_text: bool) -> None:
    path = put(tmp_path / "model.pt")
    assert find_checkpoints(str(path) if as_text else path) == [path]


def test_everything_missing_is_listed_at_once(tmp_path: Path) -> None:
    put(tmp_path / "cv" / "fold_0" / "checkpoints" / "best.pt")
    (tmp_path / "cv" / "fold_1").mkdir()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError) as raised:
        find_checkpoints([tmp_path / "cv", tmp_path / "empty", tmp_path / "none.pt"])
    message = str(raised.value)
    assert message.startswith("3 of 4 checkpoints missing")
    for name in ("cv/fold_1/checkpoints/best.pt", "empty/checkpoints/best.pt", "none.pt"):
        assert name in message
    assert "fold_0" not in message


def test_a_checkpoint_given_twice_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "run" / "checkpoints" / "best.pt")
    with pytest.raises(ConfigurationError, match=r"given twice: .*best\.pt"):
        find_checkpoints([tmp_path / "run", path])


def test_no_checkpoint_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no checkpoint given"):
        find_checkpoints([])


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def load(network: nn.Module, content: Mapping[str, Any], source: Path) -> None:
    network.load_state_dict(content["model"])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A cross-validation of three folds."""
    for fold, network in enumerate(MEMBERS[:3]):
        path = put(tmp_path / "cv" / f"fold_{fold}" / "checkpoints" / "best.pt")
        torch.save({"model": network.state_dict(), "fold": fold}, path)
    return tmp_path / "cv"


def test_loaded_ensemble_is_that_of_the_networks(saved: Path) -> None:
    ensemble = load_ensemble(member(9), [saved], read=read, load=load, weights=[1, 2, 3])
    assert torch.equal(ensemble(VALUES), Ensemble(MEMBERS[:3], [1, 2, 3])(VALUES))


def test_loaded_ensemble_begins_with_the_given_network(saved: Path) -> None:
    network = member(9)
    ensemble = load_ensemble(network, [saved], read=read, load=load)
    assert ensemble.networks[0] is network
    assert torch.equal(network(VALUES), MEMBERS[0](VALUES))


def test_settings_tell_the_loaded_checkpoints(saved: Path) -> None:
    ensemble = load_ensemble(member(9), [saved], read=read, load=load)
    expected = [file_sha256(path) for path in find_checkpoints(saved)]
    assert len(set(expected)) == 3
    assert ensemble.settings()["sources"] == expected


def test_every_checkpoint_is_compared_with_the_configuration(saved: Path) -> None:
    def check(content: Mapping[str, Any], *, source: Any, settings: Mapping[str, Any]) -> None:
        if content["fold"] == settings["fold"]:
            raise CheckpointError(f"{source}: disagrees")

    with pytest.raises(CheckpointError, match=r"fold_2.*disagrees"):
        load_ensemble(member(9), [saved], read=read, load=load, check=check, settings={"fold": 2})


def test_weights_are_counted_before_anything_is_read(saved: Path) -> None:
    def unread(path: Path) -> dict[str, Any]:
        raise AssertionError(path)

    with pytest.raises(ConfigurationError, match="2 weights for 3 predictions"):
        load_ensemble(member(9), [saved], read=unread, load=load, weights=[1, 2])


def test_members_of_other_architectures_are_built_from_their_checkpoints(tmp_path: Path) -> None:
    """And compared in all else: a network may differ, what it was shown may not."""
    wide = nn.Sequential(nn.Conv2d(1, 5, 1), nn.Conv2d(5, 3, 1)).requires_grad_(False)
    saved = {"narrow": (MEMBERS[0], {"_target_": "narrow"}), "wide": (wide, {"_target_": "wide"})}
    for name, (network, definition) in saved.items():
        content = {"model": network.state_dict(), "network_def": definition, "sees": "grey"}
        torch.save(content, tmp_path / f"{name}.pt")
    compared: list[Mapping[str, Any]] = []

    def check(content: Mapping[str, Any], *, source: Any, settings: Mapping[str, Any]) -> None:
        compared.append(settings)

    def build(content: Mapping[str, Any], source: Any) -> nn.Module:
        assert content["network_def"] == {"_target_": "wide"}
        return nn.Sequential(nn.Conv2d(1, 5, 1), nn.Conv2d(5, 3, 1))

    ensemble = load_ensemble(
        member(9),
        [tmp_path / "narrow.pt", tmp_path / "wide.pt"],
        read=lambda path: torch.load(path, weights_only=True),
        load=lambda network, content, source: network.load_state_dict(content["model"]),
        check=check,
        settings={"network_def": {"_target_": "narrow"}, "architecture": "a", "sees": "grey"},
        build=build,
    )
    with torch.inference_mode():
        torch.testing.assert_close(ensemble(VALUES), Ensemble([MEMBERS[0], wide])(VALUES))
    assert compared[1] == {"sees": "grey"}
    assert compared[0]["network_def"] == {"_target_": "narrow"}
