from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import InputError
from pipeline.report.embedding import PICTURE_WIDTH_PX, embed_picture
from pipeline.report.page import MOST_ROWS, Link, Page, format_value


class Reader(HTMLParser):
    """Collects the visible text, the table cells and every address."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.tags, self.addresses = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in {"src", "href"}]

    def handle_data(self, data):
        self.texts.append(data)


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1))
def test_every_text_is_shown_as_it_is(text):
    page = Page(text, text)
    page.section(text)
    page.text(text)
    page.facts({text: text})
    page.table([{text: text}], caption=text)
    page.details(text, text)
    reader = Reader(page.html())
    shown = "".join(reader.texts)
    assert shown.count(text) >= 9
    assert reader.tags.count("script") == 1


def test_a_page_fetches_nothing(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    page = Page("A")
    page.pictures([tmp_path / "a.png"])
    text = page.html()
    reader = Reader(text)
    assert reader.addresses
    assert all(address.startswith(("data:image/", "data:,")) for address in reader.addresses)
    assert not re.search(r"https?:|@import|url\(", text)
    assert 'name="viewport"' in text
    assert "prefers-color-scheme:dark" in text


def test_a_wide_picture_is_shrunk_and_a_small_one_kept(tmp_path):
    rng = np.random.default_rng(0)
    wide, small = tmp_path / "wide.png", tmp_path / "small.png"
    Image.fromarray(rng.integers(0, 255, (300, 3000, 3), dtype=np.uint8)).save(wide)
    Image.fromarray(rng.integers(0, 255, (20, 30), dtype=np.uint8)).save(small)
    page = Page("A")
    page.pictures([wide, small], {wide: "the wide one"})
    _icon, large, kept = Reader(page.html()).addresses
    assert large.startswith("data:image/jpeg")
    assert len(large) < wide.stat().st_size
    assert PICTURE_WIDTH_PX < 3000
    assert kept.startswith("data:image/png")
    assert "the wide one" in page.html()


@pytest.mark.parametrize("damage", [b"no picture", b"", 100], ids=["text", "empty", "cut short"])
def test_a_broken_picture_is_named_and_the_others_are_shown(tmp_path, damage):
    good, bad = tmp_path / "a.png", tmp_path / "b.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30), dtype=np.uint8)).save(good)
    bad.write_bytes(good.read_bytes()[:damage] if isinstance(damage, int) else damage)
    with pytest.raises(InputError, match=r"b\.png.*not a readable picture"):
        embed_picture(bad)
    page = Page("A")
    page.pictures([bad, good])
    text = page.html()
    assert "b.png: not a readable picture" in text
    assert text.count("<img") == 1
    assert page.link_to(good)
    assert page.link_to(bad) == ""


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"a\.png.*could be decompression bomb"):
        embed_picture(tmp_path / "a.png")


def test_links_lead_to_every_section_and_to_pictures(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    page = Page("A")
    page.section("One")
    page.pictures([tmp_path / "a.png"])
    page.section("Two")
    page.table([{"image": Link("<a>", page.link_to(tmp_path / "a.png"))}])
    text = page.html()
    targets = [address[1:] for address in Reader(text).addresses if address.startswith("#")]
    assert len(targets) == 3
    assert all(f'id="{target}"' in text for target in targets)
    assert 'data-v="&lt;a&gt;"' in text


def test_of_very_many_rows_the_first_are_shown_and_it_is_said():
    page = Page("A")
    page.table([{"v": value} for value in range(MOST_ROWS + 5)])
    text = page.html()
    assert text.count("<tr>") == MOST_ROWS + 1
    assert f"The first {MOST_ROWS} of {MOST_ROWS + 5} rows" in text


def test_a_table_without_rows_is_a_table():
    page = Page("A")
    page.table([])
    page.table([], ["a"])
    assert page.html().count("<table>") == 2


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.5, 0.25, 1.0], ["0.5000", "0.2500", "1.0000"]),
        ([2e-3, 8.563e-06], ["0.002", "8.563e-06"]),
        ([621.5, 0.9], ["621.5", "0.9000"]),
        ([1, 20], ["1", "20"]),
    ],
    ids=["shares", "learning rates", "mixed", "counts"],
)
def test_a_column_can_be_compared_by_eye(values, shown):
    page = Page("A")
    page.table([{"v": value} for value in values])
    assert re.findall(r"<td[^>]*>([^<]*)</td>", page.html()) == shown


def test_a_row_without_a_key_has_an_empty_cell():
    page = Page("A")
    page.table([{"a": 1}, {"b": 0.25, "c": float("nan")}])
    cells = re.findall(r'<td[^>]*data-v="([^"]*)">([^<]*)</td>', page.html())
    assert cells == [
        ("1", "1"), ("", "-"), ("", "-"),
        ("", "-"), ("0.25", "0.2500"), ("", "-"),
    ]  # fmt: skip


@given(st.floats(-1e300, 1e300))
def test_a_shown_number_is_near_the_number(value):
    assert float(format_value(value)) == pytest.approx(value, rel=1e-3)


def test_a_page_replaces_the_one_before_and_leaves_nothing_else(tmp_path):
    Page("A").write(tmp_path / "report.html")
    Page("B").write(tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "<title>B</title>" in (tmp_path / "report.html").read_text()
