from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.errors import ConfigurationError
from pipeline.training.any_size import (
    AnySizeNetwork,
    check_shape,
    cropped,
    pad_to_multiple,
    positive_widths,
)

SIZES = st.lists(st.integers(4, 12), min_size=2, max_size=3)


class Halves(AnySizeNetwork):
    """Its logits are the image, which it needs in multiples of 4."""

    def __init__(self) -> None:
        super().__init__(2, 2, 4)

    def logits(self, image: Tensor) -> Tensor:
        assert not any([size % self.divisor for size in image.shape[2:]])  # noqa: C419
        return image


class Negated(Halves):
    def activated(self, logits: Tensor) -> Tensor:
        return -logits


def ramp(*sizes: int) -> Tensor:
    return torch.arange(2.0 * torch.Size(sizes).numel()).reshape(1, 2, *sizes)


@given(SIZES, st.sampled_from([1, 2, 4]))
def test_padding_reflects_least_on_both_sides_and_is_cropped_away(
    sizes: list[int], divisor: int
) -> None:
    image = ramp(*sizes)
    padded, before = pad_to_multiple(image, divisor)
    for axis, (size, first) in enumerate(zip(sizes, before, strict=True), start=2):
        after = padded.shape[axis] - size - first
        assert padded.shape[axis] % divisor == 0
        assert first + after < divisor
        assert after - first in (0, 1)
        inner = padded.narrow(axis, first, size)
        mirrored = inner.narrow(axis, 1, first).flip(axis)
        torch.testing.assert_close(padded.narrow(axis, 0, first), mirrored, rtol=0, atol=0)
    torch.testing.assert_close(cropped(padded, before, sizes), image, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(8, 4), (4, 8, 12)], ids=str)
def test_sizes_that_divide_are_left_alone(sizes: tuple[int, ...]) -> None:
    image = ramp(*sizes)
    padded, before = pad_to_multiple(image, 4)
    assert padded is image
    assert before == [0] * len(sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 40), "image of 1x40 px is too small.*multiples of 4; pad it to 4x40 px first"),
        ((9, 1, 8), "volume of 9x1x8 voxels is too small.*pad it to 12x4x8 voxels first"),
    ],
    ids=["image", "volume"],
)
def test_what_is_too_small_to_reflect_is_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        pad_to_multiple(ramp(*sizes), 4)


@pytest.mark.parametrize("size", [(8, 8), (7, 5)], ids=str)
def test_a_network_for_multiples_takes_any_size(size: tuple[int, int]) -> None:
    torch.testing.assert_close(Halves()(ramp(*size)), ramp(*size))


def test_what_stands_behind_the_logits_sees_no_padding() -> None:
    torch.testing.assert_close(Negated()(ramp(7, 5)), -ramp(7, 5))


@pytest.fixture(scope="module")
def scripted_padding() -> torch.jit.ScriptFunction:
    return torch.jit.script(pad_to_multiple)


@given(sizes=SIZES, divisor=st.sampled_from([1, 2, 4]))
def test_a_script_pads_as_python_does(
    scripted_padding: torch.jit.ScriptFunction, sizes: list[int], divisor: int
) -> None:
    padded, before = scripted_padding(ramp(*sizes), divisor)
    expected, first = pad_to_multiple(ramp(*sizes), divisor)
    assert before == first
    torch.testing.assert_close(padded, expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", [Halves, Negated])
def test_a_scripted_network_takes_any_size(make: type[Halves]) -> None:
    scripted = torch.jit.script(make())
    for size in ((8, 8), (7, 5), (5, 10)):
        torch.testing.assert_close(scripted(ramp(*size)), make()(ramp(*size)), rtol=0, atol=0)


def test_a_scripted_network_refuses_as_the_plain_one() -> None:
    scripted = torch.jit.script(Halves())
    for wrong in (torch.zeros(1, 3, 8, 8), ramp(1, 40)):
        with pytest.raises(ConfigurationError) as plain:
            Halves()(wrong)
        with pytest.raises(torch.jit.Error) as error:
            scripted(wrong)
        assert str(plain.value) in str(error.value)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 8, 8), (1, 2, 8, 8, 8)], ids=str)
def test_another_shape_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"expects \(B, 2, H, W\), got .*set in_chan"):
        Halves()(torch.zeros(shape))


def test_another_shape_of_a_volume_is_named() -> None:
    check_shape(torch.zeros(1, 2, 8, 8, 8), 2, axes=3)
    with pytest.raises(
        ConfigurationError, match=r"\(B, 1, D, H, W\), got a volume of shape \[1, 2, 8, 8, 8\]"
    ):
        check_shape(torch.zeros(1, 2, 8, 8, 8), 1, axes=3)


def test_a_network_without_logits_is_none() -> None:
    class Empty(AnySizeNetwork):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Empty(1, 1, 4)  # type: ignore[abstract]
    assert issubclass(Empty, nn.Module)


@pytest.mark.parametrize("channels", [0, 1.5])
def test_channels_that_make_no_sense_are_named(channels: float) -> None:
    class Two(Halves):
        def __init__(self) -> None:
            AnySizeNetwork.__init__(self, 2, channels, 4)  # type: ignore[arg-type]

    with pytest.raises(ConfigurationError, match="out_channels must be an integer of at least 1"):
        Two()


def test_widths_are_two_or_more_positive_integers_or_as_many_as_asked_for() -> None:
    assert positive_widths("widths", [8, 4]) == (8, 4)
    assert positive_widths("widths", [8], levels=1) == (8,)
    for widths, levels in (([8], None), ([8, 0], None), ([8, 4.0], None), ([8, 4], 3)):
        with pytest.raises(ConfigurationError, match=r"depths must be .* positive widths"):
            positive_widths("depths", widths, levels)  # type: ignore[arg-type]
