"""Small matplotlib panels as SVG that lives inside a page: its colours are the page's, its text is text.

Panels are drawn in sentinel colours, and each becomes a CSS class (`s-` for strokes, `f-` for fills), so one drawing
follows light, dark and print.  Nothing in the markup needs an inline style, which the page's security policy forbids.
Equal inputs give equal bytes: ids are counted, not random, and there is no date.
"""

from __future__ import annotations

import html
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from bnfctl.report.sources import Method, Sources
from bnfctl.report.table import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 360, 240
"""Of a panel, in the units of its viewBox: what fits a phone at its natural size, so that ticks stay legible."""
INK, MUTED, GRID, PAPER = "#000101", "#000102", "#000103", "#000104"
_NAMED = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"}
DRAWABLE = 1e100
"""No axis reaches the ends of float64: larger numbers are left out."""
SERIES = 8
"""Colours before they repeat; from then on only line style and marker tell."""
DASHES: tuple[Any, ...] = (
    "solid", (0, (6, 2)), (0, (2, 1.4)), (0, (7, 2, 1.5, 2)), (0, (4, 1.5)), (0, (6, 1.5, 1.5, 1.5, 1.5, 1.5)),
    (0, (1, 1.6)), (0, (10, 2.5)),
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h")
Draw = Callable[["Axes"], None]
"""Draws a panel."""
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_KEPT = {
    "stroke-width", "stroke-dasharray", "stroke-dashoffset", "stroke-linecap", "stroke-linejoin", "opacity",
    "fill-opacity", "stroke-opacity", "text-anchor", "font-weight",
}  # fmt: skip
"""CSS of matplotlib's inline styles that is an attribute in SVG too."""
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "text.usetex": False, "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True, "font.family": ["DejaVu Sans"], "font.size": 11, "axes.labelsize": 11,
    "axes.titlesize": 12, "axes.titlelocation": "left", "xtick.labelsize": 11, "ytick.labelsize": 11,
    "text.color": INK, "axes.labelcolor": MUTED, "axes.titlecolor": INK, "xtick.color": MUTED, "ytick.color": MUTED,
    "axes.edgecolor": MUTED, "axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7,
    "xtick.major.size": 3, "xtick.major.pad": 5, "ytick.major.size": 3, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.facecolor": "none",
    "figure.facecolor": "none", "savefig.facecolor": "none", "axes.xmargin": 0.03, "axes.ymargin": 0.08,
    "axes.formatter.limits": (-4, 5), "axes.formatter.useoffset": False, "path.simplify": True,
    "figure.constrained_layout.use": True, "figure.constrained_layout.h_pad": 0.04,
    "figure.constrained_layout.w_pad": 0.04,
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A figure with everything that the page says about it."""

    id: str
    title: str
    caption: str
    alt: str
    """What a reader who can't see it is told: the numbers in words."""
    svg: str
    """HTML: one or more inline <svg>, and a legend where there are several methods."""
    section: str
    """ "shifts", "training" or "builds"."""
    numbers: tuple[tuple[str, ...], ...] = ()
    """The drawn numbers as a table, its header first."""
    wide: bool = False
    """Several panels: takes the whole width of the page."""


@dataclass(frozen=True, eq=False)
class Line:
    """A method as the figures show it."""

    label: str
    index: int
    """Decides colour, line style and marker; the same in every figure of the page."""
    method: Method


def by_base(sources: Sources) -> list[tuple[str, str, list[Line]]]:
    """The methods of each base model, with (end of their figures' ids, end of their titles), both empty for one base.

    Equal labels have equal colours whatever the base; BNF has the first one, a solid line, whoever else is there.
    """
    methods = [method for method in sources.methods if not method.is_base]
    labels = sorted(dict.fromkeys(method.label for method in methods), key=lambda label: not label.startswith("BNF"))
    numbers = {label: number for number, label in enumerate(labels)}
    bases: dict[str, list[Line]] = {}
    for method in methods:
        bases.setdefault(method.base, []).append(Line(method.label, numbers[method.label], method))
    if len(bases) == 1:
        return [("", "", lines) for lines in bases.values()]
    return [(f"-{place}", f" ({base or 'other models'})", lines) for place, (base, lines) in enumerate(bases.items())]


def series(index: int) -> str:
    """The sentinel colour of a method."""
    return f"#0002{index % SERIES:02x}"


def short(text: str, width: int = 22) -> str:
    """A label on one line, with what can't be shown escaped."""
    line = printable(text)
    return line if len(line) <= width else line[: width - 1] + "…"


def panel(name: str, draw: Draw, label: str, *, height: float = HEIGHT, width: float = WIDTH) -> str:
    """One <svg>.  name: of the panel, unique on the page; label: what a screen reader says."""
    with _quiet():
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # a user's matplotlibrc must not change the page
            settings: Any = {**_STYLE, "svg.hashsalt": name}
            matplotlib.rcParams.update(settings)
            figure = Figure(figsize=(width / 72, height / 72), dpi=72)
            FigureCanvasSVG(figure)
            draw(figure.add_subplot())
            out = io.StringIO()
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(out.getvalue(), name, label)


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither the first import's word about fonts, nor one for every character that the measuring font lacks."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            warnings.filterwarnings("ignore", message=".*font cache.*")
            yield
    finally:
        logger.setLevel(level)


def _inline(text: str, name: str, label: str) -> str:
    root = ElementTree.fromstring(text)
    view = root.get("viewBox", f"0 0 {WIDTH} {HEIGHT}")
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'xlink:href="#([^"]+)"', text))
    ids = {old: f"{name}-{number}" for number, old in enumerate(sorted(used, key=text.find))}
    inner = "".join(_markup(child, ids) for child in root)
    return f'<svg viewBox="{view}" role="img" aria-label="{html.escape(label)}">{inner}</svg>'


def _markup(element: ElementTree.Element, ids: dict[str, str]) -> str:
    tag = element.tag.removeprefix(_SVG)
    if tag in ("metadata", "style") or tag.startswith("{"):
        return ""
    inner = html.escape(element.text or "", quote=False) if tag == "text" else ""
    inner += "".join(_markup(child, ids) for child in element)
    attributes = _attributes(element, ids)
    if tag in ("g", "defs") and not attributes.strip():
        return inner if tag == "g" or not inner else f"<defs>{inner}</defs>"
    return f"<{tag}{attributes}>{inner}</{tag}>" if inner else f"<{tag}{attributes}/>"


def _attributes(element: ElementTree.Element, ids: dict[str, str]) -> str:
    found: dict[str, str] = {}
    classes: list[str] = []
    for key, value in element.attrib.items():
        if key == "style":
            _restyle(value, found, classes)
        elif key == "id":
            if value in ids:
                found["id"] = ids[value]
        elif key == _LINK:
            found["href"] = f"#{ids[value[1:]]}"
        elif key == "clip-path":
            found[key] = f"url(#{ids[value[5:-1]]})"
        elif key == "transform":
            kept = re.sub(r"rotate\(-?0 [^)]*\)|rotate\(-?0\)", "", _rounded(value)).strip()
            found |= {key: kept} if kept else {}
        else:
            found[key] = _rounded(value.replace("\n", ""))
    if classes:
        found["class"] = " ".join(classes)
    return "".join(f' {key}="{html.escape(value)}"' for key, value in found.items())


def _restyle(style: str, found: dict[str, str], classes: list[str]) -> None:
    for part in style.split(";"):
        name, _, value = (piece.strip() for piece in part.partition(":"))
        if name in ("fill", "stroke"):
            if value == "none":
                found[name] = value
            else:
                classes.append(f"{name[0]}-{_class(value)}")
        elif name in ("font", "font-size"):
            size = re.search(r"([\d.]+)px", value)
            found |= {"font-size": size[1]} if size else {}
            found |= {"font-weight": "bold"} if re.search(r"\b(bold|[6-9]00)\b", value) else {}
        elif name in _KEPT:
            found[name] = _rounded(value)


def _class(colour: str) -> str:
    """Any colour but the sentinels is one that would not follow the page's mode: a mistake of ours."""
    return _NAMED[colour] if colour in _NAMED else str(_SERIES[colour])


_SERIES = {series(index): index for index in range(SERIES)}


def _rounded(value: str) -> str:
    """Two decimals of a 360-unit panel are a hundredth of a pixel."""
    return re.sub(
        r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip(".").replace("-0", "-0"), value
    )


def legend(entries: Sequence[tuple[str, int | None]], markers: bool = True) -> str:
    """HTML beside the panels, so that it wraps on a phone: (label, index of the method; None is the muted line)."""
    items = "".join(f"<li>{_sample(index, markers)}{html.escape(short(label, 60))}</li>" for label, index in entries)
    return f'<ul class="legend">{items}</ul>'


def _sample(index: int | None, markers: bool) -> str:
    """A piece of the method's line with its marker."""
    name = "muted" if index is None else index % SERIES
    dashes = DASHES[0 if index is None else index % len(DASHES)]
    pieces = () if isinstance(dashes, str) else dashes[1]
    dash = f' stroke-dasharray="{" ".join(f"{1.6 * piece:g}" for piece in pieces)}"' if pieces else ""
    line = f'<path d="M1 6h32" fill="none" stroke-width="2"{dash} class="s-{name}"/>'
    marker = (
        f'<path d="{_MARKS[MARKERS[index % len(MARKERS)]]}" class="f-{name}"/>' if markers and index is not None else ""
    )
    return f'<svg viewBox="0 0 34 12" width="34" height="12" aria-hidden="true">{line}{marker}</svg>'


def panels(parts: Sequence[str]) -> str:
    """Panels beside each other, as many in a row as the page has room for; two and four make even rows."""
    return f'<div class="panels{" two" if len(parts) in (2, 4) else ""}">{"".join(parts)}</div>'


_MARKS = {
    "o": "M13 6a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "s": "M13.5 2.5h7v7h-7z", "^": "M17 1.5l4.5 8h-9z",
    "D": "M17 1l5 5l-5 5l-5-5z", "v": "M17 10.5l4.5-8h-9z", "P": "M15.5 1.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "X": "M14.5 1.5l2.5 2.5l2.5-2.5l2 2l-2.5 2.5l2.5 2.5l-2 2l-2.5-2.5l-2.5 2.5l-2-2l2.5-2.5l-2.5-2.5z",
    "p": "M17 1.5l4.6 3.4l-1.8 5.4h-5.6l-1.8-5.4z", "<": "M12.5 6l8-4.5v9z", ">": "M21.5 6l-8-4.5v9z",
    "h": "M17 1.3l4 2.3v4.8l-4 2.3l-4-2.3v-4.8z",
}  # fmt: skip
