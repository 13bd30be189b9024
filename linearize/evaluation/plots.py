"""Plots of an evaluation as SVG that takes its text colour from the page, drawn by matplotlib."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

from linearize.errors import ResourceError

EXTRA = "pip install 'linearize[report]'"
INK = "#010203"  # stands for the page's text colour, in light and in dark
SIZE = (4.6, 3.1)  # inches: readable on a telephone, two or three side by side on a desk
COLOURS = ("#2f7ed8", "#e0703a", "#a95fc9", "#c29a1b", "#2fa36b", "#d6496d", "#4bb3c4", "#8c6d4f")
TEACHER = "#8a8f98"
ACROSS = 60  # letters of a title that fit across a plot
FAR_OFF = 1.5  # times the first line's perplexity: such a line would flatten all others


def need_plots() -> None:
    """ResourceError where matplotlib is missing: said before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ResourceError("a report needs matplotlib", "report", EXTRA) from None


class Figure:
    """One plot; `svg` is filled when the block ends."""

    def __init__(self, axes: Any) -> None:
        self.axes, self.svg = axes, ""

    def lines(self, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], marker: str | None = "o") -> None:
        """One line for each name: the teacher grey, bare windows dashed."""
        colours = iter(COLOURS * (len(curves) // len(COLOURS) + 1))
        for name, (x, y) in curves.items():
            colour = TEACHER if name.startswith("teacher") else next(colours)
            style = "--" if name.endswith("alone") else "-"
            self.axes.plot(x, y, style, color=colour, label=name, marker=marker, markersize=3, linewidth=1.4)
        if len(curves) > 1:
            where = {"loc": "outside lower center", "ncols": 2 if len(curves) > 2 else len(curves)}
            self.axes.figure.legend(fontsize=7, frameon=False, labelcolor=INK, **where)

    def lengths(self, at: Sequence[int]) -> None:
        """A logarithmic axis of lengths with their numbers."""
        self.axes.set_xscale("log", base=2)
        self.axes.set_xticks(list(at), [f"{x // 1024}k" if x % 1024 == 0 else str(x) for x in at])
        self.axes.minorticks_off()

    def cells(self, values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], top: float, told: bool) -> None:
        """A map of values from 0 to `top`, the first row on top, with their numbers in the cells."""
        from matplotlib import colormaps

        map_ = colormaps["viridis"]
        self.axes.pcolormesh(values, cmap=map_, vmin=0, vmax=top, linewidth=0, rasterized=False)
        self.axes.set_xticks([i + 0.5 for i in range(len(columns))], columns)
        step = max(len(rows) // 15, 1)
        self.axes.set_yticks([i + 0.5 for i in range(0, len(rows), step)], rows[::step])
        self.axes.invert_yaxis()
        self.axes.grid(False)
        for y, row in enumerate(values if told else ()):
            for x, value in enumerate(row):
                ink = "#000000" if value > 0.6 * top else "#ffffff"
                self.axes.text(x + 0.5, y + 0.5, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize=8)


@contextmanager
def figure(title: str, x: str = "", y: str = "", size: tuple[float, float] = SIZE, name: str = "") -> Iterator[Figure]:
    """Draw within the block; neither pyplot nor any global setting is touched. `name` is read out, where the title is short."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    parts = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "grid.color")
    settings: dict[str, Any] = dict.fromkeys(parts, INK)
    settings |= {"svg.fonttype": "none", "svg.hashsalt": name or title, "font.size": 8.5, "axes.grid": True, "grid.alpha": 0.15}
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5, "legend.fontsize": 7}
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        canvas = Canvas(figsize=size, layout="constrained")
        FigureCanvasSVG(canvas)
        made = Figure(canvas.add_subplot())
        made.axes.set(title=title, xlabel=x, ylabel=y)
        yield made
        out = io.StringIO()
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    made.svg = inline(out.getvalue(), name or title)


def inline(svg: str, title: str) -> str:
    """An SVG as HTML has it inside: no prologue, no names of formats, colours of the page."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    svg = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", head) + ">" + rest
    svg = svg.replace("xlink:href", "href").replace(INK, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title, quote=True)}"', 1)


# ---- what a report shows ----

Found = Mapping[str, Any]


def losses(title: str, lines: Sequence[Found]) -> str:
    """Loss by step, a line for each stage."""
    stages: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        if line.get("loss"):
            x, y = stages.setdefault(str(line["stage"]), ([], []))
            x.append(line["step"])
            y.append(line["loss"])
    if not stages:
        return ""
    with figure(title, "step", "loss") as made:
        made.lines(stages, marker=None)
        made.axes.set_yscale("log")
    return made.svg


def positions(title: str, curves: Mapping[str, Sequence[Sequence[float]]], over: str = "") -> str:
    """Perplexity by position, from nats a token in bins, or its ratio to that of the model `over`.

    A model whose perplexity is more than FAR_OFF times the first one's on the whole is named instead of drawn.
    """
    drawn = {name: points for name, points in curves.items() if points and name != over}
    if not drawn or (over and not curves.get(over)):
        return ""
    first = curves[over] if over else next(iter(drawn.values()))
    level = {name: sum(y for _, y in points) / len(points) for name, points in (("", first), *drawn.items())}
    far = [name for name in drawn if level[name] - level[""] > math.log(FAR_OFF)]
    less = {point[0]: point[1] for point in curves[over]} if over else {}
    lines = {
        name: ([x for x, _ in points], [math.exp(min(y - less.get(x, 0.0), 50)) for x, y in points])
        for name, points in drawn.items()
        if name not in far
    }
    if not lines:
        return ""
    note = "\n" + textwrap.fill(f"not drawn, far worse: {'; '.join(far)}", ACROSS) if far else ""
    unit = f"perplexity over {over}'s" if over else "perplexity"
    with figure(title + note, "position in the document", unit, name=title) as made:
        made.lines(lines)
        made.lengths([2**i for i in range(8, 20) if 2**i <= max(max(x) for x, _ in lines.values())])
        if not over:
            made.axes.set_yscale("log")
    return made.svg


def streams(title: str, layers: Sequence[Found]) -> str:
    """Relative error of the hidden states, layer by position."""
    rows = [layer for layer in layers if layer.get("stream")]
    if not rows:
        return ""
    values = [layer["stream"] for layer in rows]
    with figure(title, "position, in eighths of the text", "layer", (4.6, 4.2)) as made:
        top = max(max(map(max, values)), 1e-9)
        made.cells(values, [str(layer["index"]) for layer in rows], [str(i + 1) for i in range(len(values[0]))], top, False)
        made.axes.set_title(f"{title}: 0 dark, {top:.2g} bright")
    return made.svg


def heads(title: str, layers: Sequence[Found]) -> str:
    """Relative error of each head's output, layer by head."""
    rows = [layer for layer in layers if layer.get("heads")]
    if not rows:
        return ""
    values = [layer["heads"] for layer in rows]
    with figure(title, "head", "layer", (4.6, 4.2)) as made:
        top = min(max(map(max, values)), 1.0) or 1.0
        made.cells(values, [str(layer["index"]) for layer in rows], [str(i) for i in range(len(values[0]))], top, False)
        made.axes.set_title(f"{title}: 0 dark, {top:.2g} bright")
    return made.svg


def shares(title: str, layers: Sequence[Found]) -> str:
    """The far half's part in the weights, by layer."""
    rows = [layer for layer in layers if layer.get("far_share") is not None]
    if not rows:
        return ""
    with figure(title, "layer", "share of the weight") as made:
        made.axes.bar([layer["index"] for layer in rows], [layer["far_share"] for layer in rows], color=COLOURS[0])
    return made.svg


def recall(task: str, who: str, label: str, rows: Sequence[Found]) -> str:
    """Share of answer tokens, depth by length, of one task and model."""
    rows = [row for row in rows if row["task"] == task and who in row["scores"]]
    own = {(row["depth"], row["length"]): row["scores"][who]["accuracy"] for row in rows}
    depths, lengths = sorted({d for d, _ in own}), sorted({n for _, n in own})
    if not own:
        return ""
    values = [[own.get((d, n), math.nan) for n in lengths] for d in depths]
    with figure(label, "tokens", "depth", (2.6, 1.8), f"{task}: {label}") as made:
        made.cells(values, [f"{d:g}" for d in depths], [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths], 1, True)
    return made.svg


def against_length(title: str, unit: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Speed or memory against length."""
    if not curves:
        return ""
    with figure(title, "tokens", unit) as made:
        made.lines(curves)
        made.lengths([int(x) for x in next(iter(curves.values()))[0]])
        made.axes.set_yscale("log")
    return made.svg
