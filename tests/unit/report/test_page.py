from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import InputError
from pipeline.report.page import PICTURE_WIDTH_PX, Page, format_value


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
    assert all(address.startswith("data:image/") for address in reader.addresses)
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
    large, kept = Reader(page.html()).addresses
    assert large.startswith("data:image/jpeg")
    assert len(large) < wide.stat().st_size
    assert PICTURE_WIDTH_PX < 3000
    assert kept.startswith("data:image/png")
    assert "the wide one" in page.html()


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"a\.png"):
        Page("A").pictures([tmp_path / "a.png"])


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


def test_a_click_on_a_heading_sorts_numbers_as_numbers_and_keeps_gaps_last(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium to click in")
    page = Page("A")
    page.table([{"v": value} for value in (10.0, 9.0, None, 100.0, -1.0)])
    click = "document.querySelector('th button').click();"
    text = page.html().replace("</body>", f"<script>{click}</script></body>")
    (tmp_path / "page.html").write_text(text)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    done = subprocess.run(
        [browser, *flags, "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert re.findall(r'data-v="([^"]*)"', done.stdout) == ["-1.0", "9.0", "10.0", "100.0", ""]
    assert 'aria-sort="ascending"' in done.stdout
