from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.cases import inputs_below
from pipeline.data.writers import write_png
from pipeline.errors import ConfigurationError, InputErrors


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    write_png(tmp_path / "photographs" / "a.png", np.eye(8, dtype=np.uint8))
    return tmp_path / "photographs"


def names(folder: Path, **settings: bool) -> list[str]:
    out = str(folder.parent / "out")
    return [case["name"] for case in inputs_below(str(folder), "images", out, **settings)]


def test_a_link_out_of_the_folder_is_an_input_only_where_allowed(photographs: Path) -> None:
    outside = photographs.with_name("outside.png")
    write_png(outside, np.eye(8, dtype=np.uint8))
    (photographs / "b.png").symlink_to(outside)
    with pytest.raises(ConfigurationError, match=r"b\.png: a link that leaves .* follow_symlinks"):
        names(photographs)
    assert names(photographs, follow_symlinks=True) == ["a.png", "b.png"]


def test_a_name_that_is_no_text_is_refused_in_letters_that_can_be_shown(photographs: Path) -> None:
    name = os.fsdecode(b"eye\xff.png")
    try:
        (photographs / "a.png").rename(photographs / name)
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(InputErrors, match="not UTF-8; rename") as caught:
        names(photographs)
    assert r"eye\udcff.png" in str(caught.value)
    assert str(caught.value).isascii()
