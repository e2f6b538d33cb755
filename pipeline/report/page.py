"""One self-contained HTML page: text, sortable tables, pictures and figures, nothing fetched."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.atomic import write_text
from pipeline.errors import InputError
from pipeline.report.embedding import EmbeddedPicture, embed_picture
from pipeline.report.style import SCRIPT, STYLE
from pipeline.report.values import format_value

__all__ = ["MOST_ROWS", "Link", "Page", "format_value"]

MOST_ROWS = 1000  # of a table; a phone cannot sort more at a click

_TALL_ROWS = 15  # from here on a table scrolls in a box of its own
_SMALL_PX = 320  # pictures up to this width stand closer together


@dataclass(frozen=True)
class Link:
    """A cell of a table that leads somewhere.

    Args:
        text: what is shown and sorted by.
        target: a place on the page, `#...`, or a file relative to it; none if empty.
    """

    text: str
    target: str


class Page:
    """A page built from top to bottom; every text is escaped.

    Args:
        title: shown as heading and in the browser's tab.
        subtitle: one line under the title.

    Example:
        >>> page = Page("A run")
        >>> page.section("Scores")
        >>> page.table([{"image": "a.png", "dice": 0.81}])
        >>> "<h1>A run</h1>" in page.html()
        True
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self._subtitle = subtitle
        self._sections: list[str] = []
        self._anchors: dict[Path, str] = {}
        self._body: list[str] = []

    def section(self, title: str) -> None:
        """Start a section, which the links under the title lead to."""
        self._sections.append(title)
        self._body.append(f'<h2 id="s{len(self._sections)}">{html.escape(title)}</h2>')

    def subsection(self, title: str) -> None:
        """Start a part of a section."""
        self._body.append(f"<h3>{html.escape(title)}</h3>")

    def text(self, text: str, *, soft: bool = False) -> None:
        """Add a paragraph."""
        self._body.append(f"<p{' class=soft' if soft else ''}>{html.escape(text)}</p>")

    def warning(self, text: str) -> None:
        """Add a paragraph that is not to be overlooked."""
        self._body.append(f'<p class="warn">{html.escape(text)}</p>')

    def facts(self, facts: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> None:
        """Add short values, each with its name above it; those that are None are left out.

        Args:
            facts: by name.
            notes: a few words below a value, by its name.
        """
        said = {
            name: f"<br><small>{html.escape(text)}</small>" for name, text in (notes or {}).items()
        }
        known = {name: format_value(value) for name, value in facts.items() if value is not None}
        items = "".join(
            f"<div{' class=two' if len(value) > 26 else ''}><dt>{html.escape(name)}</dt>"
            f"<dd>{html.escape(value)}{said.get(name, '')}</dd></div>"
            for name, value in known.items()
        )
        if items:
            self._body.append(f'<dl class="facts">{items}</dl>')

    def table(
        self,
        rows: Sequence[Mapping[str, Any]],
        columns: Sequence[str] | None = None,
        caption: str = "",
    ) -> None:
        """Add a table that a click on a heading sorts; of very many rows the first.

        Args:
            rows: one mapping per row; an absent key is an empty cell, a `Link` leads somewhere.
            columns: which keys, in which order; all, in order of first appearance, if None.
            caption: a line above the table.
        """
        names = list(columns or dict.fromkeys(key for row in rows for key in row))
        shown = rows[:MOST_ROWS]
        numeric = {name for name in names if _is_numeric(row.get(name) for row in rows)}
        even = {name for name in numeric if _is_even(row.get(name) for row in rows)}
        head = "".join(
            f'<th scope="col"{_class(name in numeric)}><button type="button">'
            f"{html.escape(name).replace('_', '_<wbr>')}</button></th>"
            for name in names
        )
        body = "".join(
            "<tr>"
            + "".join(_cell(row.get(name), name in numeric, name in even) for name in names)
            + "</tr>"
            for row in shown
        )
        title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        box = "wide tall" if len(shown) > _TALL_ROWS else "wide"
        # A box that scrolls must be reachable from the keyboard too.
        self._body.append(
            f'<div class="{box}" tabindex="0"><table>{title}<thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )
        if len(rows) > len(shown):
            self.text(f"The first {len(shown)} of {len(rows)} rows.", soft=True)

    def pictures(self, paths: Iterable[Path], captions: Mapping[Path, str] | None = None) -> None:
        """Add image files, embedded, side by side where there is room; a click enlarges one.

        A file that is no readable image is named in place of its picture.
        """
        figures, widths = [], []
        for path in paths:
            caption = (captions or {}).get(path, path.stem)
            try:
                picture = embed_picture(path)
            except InputError as error:
                figures.append(f'<p class="warn">{html.escape(f"{caption}: {error}")}</p>')
                continue
            self._anchors[path] = f"p{len(self._anchors) + 1}"
            figures.append(_figure(picture, caption, self._anchors[path]))
            widths.append(picture.width_px)
        small = bool(widths) and max(widths) <= _SMALL_PX
        kind = "row one" if len(figures) == 1 else "row small" if small else "row"
        self._body.append(f'<div class="{kind}">{"".join(figures)}</div>')

    def link_to(self, path: Path) -> str:
        """Return where on the page the picture of a file stands; empty where it does not."""
        return f"#{self._anchors[path]}" if path in self._anchors else ""

    def figures(self, drawings: Iterable[str]) -> None:
        """Add SVG drawings of this room (`figures.py`), side by side where there is room."""
        shown = "".join(f"<figure>{drawing}</figure>" for drawing in drawings)
        self._body.append(f'<div class="row charts">{shown}</div>')

    @contextmanager
    def fold(self, summary: str) -> Iterator[None]:
        """Hide what is added meanwhile behind a line that opens on a click."""
        self._body.append(f"<details><summary>{html.escape(summary)}</summary>")
        yield
        self._body.append("</details>")

    def details(self, summary: str, text: str) -> None:
        """Add preformatted text that opens on a click."""
        with self.fold(summary):
            self._body.append(f'<pre tabindex="0">{html.escape(text)}</pre>')

    def html(self) -> str:
        """Return the whole page."""
        top = f"<h1>{html.escape(self.title)}</h1>"
        if self._subtitle:
            top += f'\n<p class="soft">{html.escape(self._subtitle)}</p>'
        if len(self._sections) > 1:
            links = "".join(
                f'<a href="#s{number}">{html.escape(title)}</a>'
                for number, title in enumerate(self._sections, start=1)
            )
            top += f"\n<nav>{links}</nav>"
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            '<link rel="icon" href="data:,">'  # else a browser asks for favicon.ico
            f"<title>{html.escape(self.title)}</title><style>{STYLE}</style></head>\n"
            f"<body><main>\n{top}\n{chr(10).join(self._body)}\n"
            "<footer>Made by Lamina from the files in this folder; the page needs no network."
            f"</footer></main><script>{SCRIPT}</script></body></html>\n"
        )

    def write(self, path: Path) -> Path:
        """Write the page, whole or not at all, and return its path."""
        write_text(path, self.html())
        return path


def _class(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _cell(value: Any, numeric: bool, even: bool) -> str:
    if isinstance(value, Link):
        text = html.escape(value.text)
        shown = f'<a href="{html.escape(value.target)}">{text}</a>' if value.target else text
        return f'<td data-v="{text}">{shown}</td>'
    fits = isinstance(value, float) and (value == 0 or 1e-3 <= abs(value) < 100)
    text = f"{value:.4f}" if fits and even else format_value(value)
    key = "" if text == "-" else str(value)
    kind = _class(numeric) or (' class="long"' if len(text) > 40 else "")
    return f'<td{kind} data-v="{html.escape(key)}">{html.escape(text)}</td>'


def _is_numeric(values: Iterable[Any]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in known
    )


def _is_even(values: Iterable[Any]) -> bool:
    """Return whether four decimals show a column, so that it can be compared by eye.

    They do not where all is small, as learning rates are.
    """
    known = [abs(value) for value in values if isinstance(value, float) and not math.isnan(value)]
    return max(known, default=0.0) >= 0.01 or min(filter(None, known), default=1.0) >= 1e-3


def _figure(picture: EmbeddedPicture, caption: str, anchor: str) -> str:
    name = html.escape(caption)
    size = f'width="{picture.width_px}" height="{picture.height_px}"'
    image = f'<img src="{picture.address}" alt="{name}" {size} loading="lazy">'
    return (
        f'<figure id="{anchor}"><button type="button">{image}</button>'
        f"<figcaption>{name}</figcaption></figure>"
    )
