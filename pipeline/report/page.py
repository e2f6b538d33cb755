"""One self-contained HTML page: text, sortable tables, pictures and figures, nothing fetched."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.data.atomic import write_text
from pipeline.errors import InputError

__all__ = ["Page", "format_value"]

PICTURE_WIDTH_PX = 1400  # wider pictures are shrunk: a page must open on a phone
JPEG_QUALITY = 88

_STYLE = """
:root{color-scheme:light dark;--text:#1c2227;--soft:#5b6770;--page:#fbfbfa;--card:#fff;
--line:#d9dee2;--box:1px solid var(--line);--s0:#0b63b0;--s1:#c4500c;--s2:#1d7a46;--s3:#8a3ea8;
--s4:#8c6a00;--s5:#b3264a}
@media(prefers-color-scheme:dark){:root{--text:#e4e8eb;--soft:#9aa6af;--page:#14181b;
--card:#1c2125;--line:#343c43;--s0:#6db3f2;--s1:#f2a065;--s2:#6cc993;--s3:#cf9be6;--s4:#dcc063;
--s5:#f08ca5}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,sans-serif}
main{max-width:70rem;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.2rem;margin:2rem 0 .5rem}
p{margin:.4rem 0;overflow-wrap:anywhere}
.soft,figcaption,caption{color:var(--soft);font-size:.9rem}
.wide{overflow-x:auto;background:var(--card);border:var(--box);border-radius:6px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;width:100%}
caption{text-align:left;padding:.4rem .7rem}
th,td{padding:.3rem .7rem;border-bottom:var(--box);text-align:left;white-space:nowrap}
tr:last-child td{border-bottom:0}
td.n,th.n{text-align:right}
td.long{white-space:normal;min-width:16rem;overflow-wrap:anywhere}
th button{all:unset;cursor:pointer;font-weight:600}
th button:focus-visible{outline:2px solid var(--s0)}
th[aria-sort=ascending] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.5rem;
margin:.8rem 0}
.facts div{background:var(--card);border:var(--box);border-radius:6px;padding:.5rem .7rem}
.facts dt{color:var(--soft);font-size:.8rem}
.facts dd{margin:0;font-size:1.05rem;overflow-wrap:anywhere}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1rem}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(28rem,100%),1fr))}
figure{margin:.6rem 0}
img,svg{max-width:100%;height:auto;display:block}
pre{overflow-x:auto;background:var(--card);border:var(--box);border-radius:6px;padding:.7rem;
font-size:.8rem}
summary{cursor:pointer}
"""

_SORT = """
document.querySelectorAll("th button").forEach(b=>b.onclick=()=>{
const th=b.parentNode,body=th.closest("table").tBodies[0],up=th.ariaSort!=="ascending";
th.parentNode.querySelectorAll("th").forEach(o=>o.removeAttribute("aria-sort"));
th.setAttribute("aria-sort",up?"ascending":"descending");
const key=r=>r.cells[th.cellIndex].dataset.v,num=x=>x!==""&&!isNaN(x);
[...body.rows].sort((r,s)=>{const x=key(r),y=key(s);
if(x===""||y==="")return(x==="")-(y==="");
return(up?1:-1)*(num(x)&&num(y)?x-y:x.localeCompare(y))}).forEach(r=>body.append(r))});
"""


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
        self._body = [f"<h1>{html.escape(title)}</h1>"]
        if subtitle:
            self._body.append(f'<p class="soft">{html.escape(subtitle)}</p>')

    def section(self, title: str) -> None:
        """Start a section."""
        self._body.append(f"<h2>{html.escape(title)}</h2>")

    def text(self, text: str, *, soft: bool = False) -> None:
        """Add a paragraph."""
        self._body.append(f"<p{' class=soft' if soft else ''}>{html.escape(text)}</p>")

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Add short values, each with its name above it; those that are None are left out."""
        items = "".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(format_value(value))}</dd></div>"
            for name, value in facts.items()
            if value is not None
        )
        self._body.append(f'<dl class="facts">{items}</dl>')

    def table(
        self,
        rows: Sequence[Mapping[str, Any]],
        columns: Sequence[str] | None = None,
        caption: str = "",
    ) -> None:
        """Add a table that a click on a heading sorts.

        Args:
            rows: one mapping per row; an absent key is an empty cell.
            columns: which keys, in which order; all, in order of first appearance, if None.
            caption: a line above the table.
        """
        names = list(columns or dict.fromkeys(key for row in rows for key in row))
        numeric = {name for name in names if _is_numeric(row.get(name) for row in rows)}
        head = "".join(
            f'<th scope="col"{_class(name in numeric)}><button type="button">'
            f"{html.escape(name)}</button></th>"
            for name in names
        )
        body = "".join(
            "<tr>" + "".join(_cell(row.get(name), name in numeric) for name in names) + "</tr>"
            for row in rows
        )
        title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        self._body.append(
            f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def pictures(self, paths: Iterable[Path], captions: Mapping[Path, str] | None = None) -> None:
        """Add image files, embedded, side by side where there is room.

        Raises:
            InputError: a file is not a readable image.
        """
        shown = [_picture(path, (captions or {}).get(path, path.stem)) for path in paths]
        self._body.append(f'<div class="row">{"".join(shown)}</div>')

    def figures(self, drawings: Iterable[str]) -> None:
        """Add SVG drawings of this room (`figures.py`), side by side where there is room."""
        shown = "".join(f"<figure>{drawing}</figure>" for drawing in drawings)
        self._body.append(f'<div class="row charts">{shown}</div>')

    def details(self, summary: str, text: str) -> None:
        """Add preformatted text that opens on a click."""
        self._body.append(
            f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"
        )

    def html(self) -> str:
        """Return the whole page."""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>\n"
            f"<body><main>\n{chr(10).join(self._body)}\n</main>"
            f"<script>{_SORT}</script></body></html>\n"
        )

    def write(self, path: Path) -> Path:
        """Write the page, whole or not at all, and return its path."""
        write_text(path, self.html())
        return path


def format_value(value: Any) -> str:
    """Return `value` as a person reads it: four significant digits, a dash where there is none.

    Example:
        >>> [format_value(value) for value in (0.81234567, 1e-5, 12, None, float("nan"), True)]
        ['0.8123', '1e-05', '12', '-', '-', 'yes']
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(format_value(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(item)}" for key, item in value.items())
    return str(value)


def _class(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _cell(value: Any, numeric: bool) -> str:
    # the same number of decimals down a column, so that its numbers can be compared by eye
    even = isinstance(value, float) and 1e-3 <= abs(value) < 10
    text = f"{value:.4f}" if even else format_value(value)
    missing = text == "-"
    key = "" if missing else str(value)
    kind = _class(numeric) or (' class="long"' if len(text) > 40 else "")
    return f'<td{kind} data-v="{html.escape(key)}">{html.escape(text)}</td>'


def _is_numeric(values: Iterable[Any]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and all(isinstance(v, (int, float)) for v in known)


def _picture(path: Path, caption: str) -> str:
    data, kind = _embedded(path)
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    name = html.escape(caption)
    image = f'<img src="{uri}" alt="{name}" loading="lazy">'
    return f"<figure>{image}<figcaption>{name}</figcaption></figure>"


def _embedded(path: Path) -> tuple[bytes, str]:
    """Return the bytes to embed: the file's own where small, a JPEG of limited width otherwise."""
    try:
        with Image.open(path) as image:
            fits = image.format in {"PNG", "JPEG"} and image.width <= PICTURE_WIDTH_PX
            if fits and path.stat().st_size <= 400_000:
                return path.read_bytes(), str(image.format).lower()
            shown = image.convert("RGB")
    except OSError as error:
        raise InputError(f"{path}: not a readable picture ({error}): write it again") from error
    if shown.width > PICTURE_WIDTH_PX:
        height_px = max(1, round(shown.height * PICTURE_WIDTH_PX / shown.width))
        shown = shown.resize((PICTURE_WIDTH_PX, height_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue(), "jpeg"
