from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialPad
from monai.utils import MetaKeys

from pipeline.data.cached_items import pack, unpack
from pipeline.errors import ConfigurationError


def through_a_file(value: Any) -> Any:
    stream = io.BytesIO()
    torch.save(pack(value), stream)
    stream.seek(0)
    return unpack(torch.load(stream, weights_only=True))


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 0.1, "text", b"bytes", Path("a/b"), torch.float16, (1, [2, (3,)]), {}, {1: {}}],
    ids=repr,
)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    found = through_a_file(value)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("dtype", ["u1", "u2", ">f4", "f8", "c8", "?", "U3", "M8[s]"])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_arrays_come_back_as_they_were(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.ones(shape).astype("u1").astype(dtype)
    found = through_a_file(array)
    np.testing.assert_array_equal(found, array)
    assert (found.dtype, found.shape, type(found)) == (array.dtype, shape, np.ndarray)


def test_a_numpy_scalar_comes_back_as_one() -> None:
    found = through_a_file(np.float32(0.1))
    assert found == np.float32(0.1)
    assert type(found) is np.float32


def test_keys_of_monai_become_the_equal_text() -> None:
    found = through_a_file({MetaKeys.SPACE: 1})
    assert found[MetaKeys.SPACE] == found["space"] == 1


def test_a_meta_tensor_keeps_metadata_and_history() -> None:
    tensor = MetaTensor(torch.ones(1, 3, 3), meta={"spatial_shape": np.array([3, 3]), "name": "a"})
    pad = SpatialPad((5, 4))
    padded = pad(tensor)
    found = through_a_file(padded)
    assert torch.equal(found, padded)
    assert found.meta.keys() == padded.meta.keys()
    assert torch.equal(found.affine, padded.affine)
    assert torch.equal(pad.inverse(found).as_tensor(), tensor.as_tensor())


def test_a_view_is_kept_without_what_it_was_cut_from() -> None:
    stream = io.BytesIO()
    torch.save(pack({"crop": torch.zeros(100, 100)[:2, :2]}), stream)
    assert len(stream.getvalue()) < 4000


@pytest.mark.parametrize("value", [object(), np.array([object()]), lambda: 0, {1, 2}])
def test_other_objects_are_named_with_their_place(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"sample\['a'\]\[0\] is a "):
        pack({"a": [value]})


def test_a_foreign_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match="an item of kind 'other'"):
        unpack({"kind": "other"})
