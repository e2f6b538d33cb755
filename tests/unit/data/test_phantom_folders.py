"""Folders that are drawn once: found, taken up, drawn again, or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data.phantom_folders import MARKER_NAME, draw_folder
from pipeline.errors import ConfigurationError

PATTERNS = ("*/drawing_*.txt", "table.csv")


class Drawer:
    """Draws `count` files and a table; stops before file `stop`; counts what it drew."""

    def __init__(self, count: int = 3, stop: int | None = None) -> None:
        self.count = count
        self.stop = stop
        self.drawn = 0

    def __call__(self, root: Path) -> Iterator[Path]:
        (root / "train").mkdir(exist_ok=True)
        for index in range(self.count):
            if index == self.stop:
                raise KeyboardInterrupt
            path = root / "train" / f"drawing_{index}.txt"
            path.write_text(f"drawing {index}")
            self.drawn += 1
            yield path
        table = root / "table.csv"
        table.write_text("id\n")
        yield table


def draw(root: Path, drawer: Drawer) -> dict[str, bytes]:
    """Draw a folder, and return its files."""
    assert draw_folder(root, {"count": drawer.count, "size": [4, 4]}, drawer, PATTERNS) == root
    return files_of(root)


def files_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_the_marker_tells_settings_and_the_size_of_each_file(tmp_path: Path) -> None:
    files = draw(tmp_path / "new", Drawer(2))
    marker = json.loads(files.pop(MARKER_NAME))
    assert marker == {
        "complete": True,
        "settings": {"count": 2, "size": [4, 4]},
        "files": {name: len(content) for name, content in files.items()},
    }
    assert set(marker["files"]) == {"train/drawing_0.txt", "train/drawing_1.txt", "table.csv"}


def test_a_complete_folder_is_not_drawn_again(tmp_path: Path) -> None:
    first, second = Drawer(), Drawer()
    assert draw(tmp_path, first) == draw(tmp_path, second)
    assert (first.drawn, second.drawn) == (3, 0)


@pytest.mark.parametrize("damage", ["missing", "cut", "unmarked"])
def test_an_incomplete_folder_is_drawn_again(tmp_path: Path, damage: str) -> None:
    whole = draw(tmp_path, Drawer())
    if damage == "missing":
        (tmp_path / "table.csv").unlink()
    elif damage == "cut":
        (tmp_path / "train/drawing_1.txt").write_text("cut")
    else:
        marker = {**json.loads((tmp_path / MARKER_NAME).read_text()), "complete": False}
        (tmp_path / MARKER_NAME).write_text(json.dumps(marker))
    again = Drawer()
    assert draw(tmp_path, again) == whole
    assert again.drawn == 3


def test_an_interrupted_drawing_is_marked_and_taken_up(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path, Drawer(stop=1))
    assert not json.loads((tmp_path / MARKER_NAME).read_text())["complete"]
    assert draw(tmp_path, Drawer()) == draw(tmp_path.parent / "undisturbed", Drawer())


def test_other_settings_leave_no_drawing_of_the_former_and_touch_nothing_else(
    tmp_path: Path,
) -> None:
    draw(tmp_path, Drawer(3))
    (tmp_path / "train/notes.txt").write_text("mine")
    assert set(draw(tmp_path, Drawer(1))) == {
        MARKER_NAME,
        "table.csv",
        "train/drawing_0.txt",
        "train/notes.txt",
    }


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("photo.png", b"mine", "holds no phantom data set"),
        (MARKER_NAME, b"mine", "not the marker of a phantom data set"),
        (MARKER_NAME, b"[1]", "holds no phantom data set"),
    ],
    ids=["other files", "no JSON", "another JSON"],
)
def test_a_folder_of_something_else_is_refused_and_untouched(
    tmp_path: Path, name: str, content: bytes, found: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"{found}.*choose another folder"):
        draw(tmp_path, Drawer())
    assert files_of(tmp_path) == {name: content}


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("mine")
    with pytest.raises(ConfigurationError, match="choose another folder"):
        draw(tmp_path / "data", Drawer())
