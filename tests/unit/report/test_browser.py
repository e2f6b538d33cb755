"""The pages in a real browser, opened from a file as a person would."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.report.comparison import compare_runs
from pipeline.report.comparison_page import comparison_report
from pipeline.report.evaluation import evaluation_report
from pipeline.report.inference import inference_report
from pipeline.report.page import Page
from pipeline.report.training import training_report

KINDS = ("training", "evaluation", "inference", "comparison", "odd")
LONG = "a_name_without_a_space_that_is_longer_than_a_phone_is_wide/" * 3
COLUMN = "Array.from(document.querySelectorAll('table:last-of-type tbody td'),c=>c.textContent)"


def picture(path: Path, width_px: int = 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, width_px, 3), dtype=np.uint8)).save(path)
    return path


def training_page(folder: Path) -> Path:
    history = [
        {"epoch": e, "train": {"loss": 1 / e}, "val": {f"val_{n}": 1 / e for n in "abcdefgh"},
         "learning_rate": 1e-3 / e, "seconds": 9.5, "new_best": e == 3,
         "speed": {"loader_share": 0.5}}
        for e in range(1, 5)
    ]  # fmt: skip
    (folder / "metrics_history.yaml").write_text(yaml.safe_dump(history))
    plan = {"device": "cpu", "batch_size": 4, "reasons": {"device": LONG}}
    environment = {"command": f"train {LONG}", "device": "cpu", "plan": plan}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "config.yaml").write_text(f"seed: 7\nname: {LONG}\n")
    picture(folder / "pictures" / "best_1.png", 2000)
    return training_report(folder)


def evaluation_page(folder: Path) -> Path:
    rows = []
    for number in range(40):
        name = f"images/{LONG if number == 0 else ''}{number:02d}"
        rows.append(
            {"image": f"{name}.png", "truth": "ant", "predicted": "bee" if number < 9 else "ant",
             "truth_probability": number / 40, "predicted_probability": 0.5 + number / 100,
             "correct": number >= 9, **{f"metric_number_{n}": n + number for n in range(12)}}
        )  # fmt: skip
        picture(folder / "pictures" / "images" / f"{number:02d}.png")
    metrics = {"experiment": "x", "dataset_dir": LONG, "pooled_metrics": {"accuracy": 31 / 40}}
    (folder / "per_image_metrics.yaml").write_text(yaml.safe_dump(rows))
    (folder / "test_metrics.yaml").write_text(yaml.safe_dump(metrics))
    (folder / "confusion_matrix.csv").write_text("truth/predicted,ant,bee\nant,31,9\nbee,0,0\n")
    (folder / "failures.csv").write_text(f"path,stage,code,message\n{LONG},read,3,{LONG}\n")
    picture(folder / "confusion_matrix.png", 900)
    return evaluation_report(folder, "truth_probability")


def inference_page(folder: Path) -> Path:
    (folder / "summary.json").write_text(json.dumps({"bundle": "x", "done": 2, "checkpoint": LONG}))
    (folder / "per_image.csv").write_text(f"image,vessel_density\na.png,0.25\n{LONG}b.png,0.5\n")
    (folder / "failures.csv").write_text(f"path,stage,code,message\n{LONG}.png,read,3,{LONG}\n")
    picture(folder / "pictures" / "a.png", 500)
    return inference_report(folder)


def comparison_page(folder: Path) -> Path:
    runs = []
    for name in ("one", LONG[:80].replace("/", "_")):
        run = folder / name
        run.mkdir()
        rows = [{"image": str(n), "mae_px": n + len(runs)} for n in range(5)]
        (run / "per_image_metrics.yaml").write_text(yaml.safe_dump(rows))
        (run / "test_metrics.yaml").write_text("manifest: m\n")
        runs.append(run)
    return comparison_report(compare_runs(runs), folder / "report.html")


def odd_page(folder: Path) -> Path:
    page = Page(f"<script>alert(1)</script>{LONG}", LONG)
    for title in ("One", LONG):
        page.section(title)
    page.facts({LONG: LONG})
    page.warning(LONG)
    page.table([{LONG: LONG}], caption=LONG)
    page.table([{f"n{n}": n for n in range(60)}])
    page.details(LONG, LONG)
    page.pictures([folder / "absent.png"])
    return page.write(folder / "report.html")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        made[kind] = globals()[f"{kind}_page"](folder)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_opens_from_a_file_alone_and_without_complaint(chromium, pages, kind, dark):
    chromium.open(pages[kind], dark=dark)
    assert chromium.run("document.querySelectorAll('h1').length") == 1
    chromium.run("document.querySelectorAll('img').forEach(i=>{i.loading='eager'})")
    loaded = "Promise.all([...document.images].map(i=>i.decode())).then(l=>l.length)"
    found = chromium.send("Runtime.evaluate", expression=loaded, awaitPromise=True)
    assert "exceptionDetails" not in found
    assert chromium.complaints() == []
    asked = chromium.requests()
    assert asked[0] == pages[kind].as_uri()
    assert all(address.startswith("data:") for address in asked[1:])


def test_a_request_and_a_complaint_would_be_seen(chromium, tmp_path):
    bad = "<img src='http://127.0.0.1:9/a.png'><script>console.log(1);fail()</script>"
    (tmp_path / "bad.html").write_text(f"<html><body>{bad}")
    chromium.open(tmp_path / "bad.html")
    assert any("127.0.0.1" in address for address in chromium.requests())
    assert any("fail" in told for told in chromium.complaints())


@pytest.mark.parametrize("width_px", [360, 390, 768, 1280])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_sticks_out_to_the_side(chromium, pages, kind, width_px):
    chromium.open(pages[kind], width_px=width_px)
    seen_px = chromium.run("[document.documentElement.scrollWidth, innerWidth]")
    assert seen_px[0] <= width_px
    assert seen_px[1] == width_px  # a phone has not zoomed out to fit a page that is too wide


def test_a_wide_table_scrolls_in_its_own_box(chromium, pages):
    chromium.open(pages["evaluation"], width_px=360)
    boxes = "Array.from(document.querySelectorAll('.wide'),b=>b.scrollWidth-b.clientWidth)"
    assert max(chromium.run(boxes)) > 100


def test_a_click_on_a_heading_sorts_numbers_as_numbers_and_keeps_gaps_last(chromium, tmp_path):
    page = Page("A")
    page.table([{"v": value} for value in (10.0, 9.0, None, 100.0, -1.0)])
    chromium.open(page.write(tmp_path / "page.html"))
    chromium.click("th button")
    assert chromium.run(COLUMN) == ["-1.0000", "9.0000", "10.0000", "100", "-"]
    assert chromium.run("document.querySelector('th').ariaSort") == "ascending"
    chromium.click("th button")
    assert chromium.run(COLUMN) == ["100", "10.0000", "9.0000", "-1.0000", "-"]


def test_a_heading_sorts_names_and_its_own_table_only(chromium, tmp_path):
    page = Page("A")
    page.table([{"v": "c"}, {"v": "a"}])
    page.table([{"v": "b"}, {"v": "10"}, {"v": "a"}])
    chromium.open(page.write(tmp_path / "page.html"))
    chromium.click(".wide:last-of-type th button")
    cells = "Array.from(document.querySelectorAll('tbody td'),c=>c.textContent)"
    assert chromium.run(cells) == ["c", "a", "10", "a", "b"]


def test_the_table_of_an_evaluation_sorts_on_a_phone(chromium, pages):
    chromium.open(pages["evaluation"], width_px=360)
    table = "[...document.querySelectorAll('table')].at(-1)"
    first = f"{table}.tBodies[0].rows[0].cells[0].textContent"
    assert "00.png" in chromium.run(first)
    chromium.run(f"{table}.id='images'")
    chromium.click("#images th:nth-child(2) button")
    chromium.click("#images th:nth-child(2) button")
    assert chromium.run(first) == "images/39.png"


def test_a_click_on_a_picture_enlarges_it_and_a_second_puts_it_back(chromium, pages):
    chromium.open(pages["evaluation"])
    chromium.click("figure button")
    assert chromium.run("document.querySelector('dialog[open] img').width") >= 600
    chromium.click("dialog img")
    assert chromium.run("document.querySelector('dialog[open]') === null")


def test_a_name_leads_to_its_picture(chromium, pages):
    chromium.open(pages["evaluation"])
    chromium.click("td a")
    target = chromium.run("location.hash")
    assert target.startswith("#p")
    top = chromium.run(f"document.querySelector('{target}').getBoundingClientRect().top")
    assert 0 <= top < 800


def test_the_colours_follow_the_system(chromium, pages):
    shades = []
    for dark in (False, True):
        chromium.open(pages["training"], dark=dark)
        colour = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        shades.append(sum(chromium.run(colour)))
    assert shades[0] > 600
    assert shades[1] < 150
