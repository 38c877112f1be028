"""The charts of the report as inline SVG that takes its colours from the page.

Every chart is drawn by matplotlib with placeholder colours, which become CSS variables (`var(--ink)`, `var(--m3)`, ...)
in the SVG, so that one picture serves a light page, a dark page and paper. Nothing here depends on the user's
matplotlibrc, on the date or on a display; equal data gives equal bytes.
"""

import io
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tisdpo.errors import InputError

INK, MUTED, GRID, CHOSEN, REJECTED, PAPER = "#010101", "#010102", "#010103", "#010104", "#010105", "#010106"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", CHOSEN: "chosen", REJECTED: "rejected", PAPER: "paper"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">")  # a second sign besides colour, for eyes and printers without it
DASHES = ("solid", (0, (5, 1.6)), (0, (1.4, 1.4)))  # changes when the colours start again
COLOURS = 10
MOST_POINTS = 80  # of one line; beyond it, neighbouring logs are averaged

PANEL = (4.3, 2.7)  # inches; small enough that its letters stay legible on a telephone
STYLE = {
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "savefig.transparent": True,
    "svg.fonttype": "none",  # letters stay letters: small, searchable, in the font of the page
}


Span = tuple[float, float]  # lowest and highest value of an axis


@dataclass(frozen=True)
class Series:
    """One method in a chart. `runs` holds, per seed, {step: (x, y)}; `index` is its place in the list of methods."""

    index: int
    runs: list[dict[int, tuple[float, float]]]

    @property
    def colour(self) -> str:
        return f"#0200{self.index % COLOURS:02x}"

    @property
    def look(self) -> dict:
        turn = self.index // COLOURS
        return {"color": self.colour, "linestyle": DASHES[turn % len(DASHES)], "marker": MARKERS[(self.index + 3 * turn) % len(MARKERS)]}

    @property
    def common(self) -> list[int]:
        """Steps that all seeds have, in order."""
        return sorted(set.intersection(*(set(run) for run in self.runs)))

    def mean(self) -> list[tuple[float, float]]:
        """Mean over seeds at the common steps."""
        return [tuple(sum(run[step][axis] for run in self.runs) / len(self.runs) for axis in (0, 1)) for step in self.common]


def frontier(series: list[Series], base: float | None, x_label: str, y_label: str, name: str = "frontier") -> str:
    """y against KL to the reference, one line per method through its checkpoints; thin lines are single seeds.

    The KL axis is a square-root axis, the customary scale for it: equal steps are about equal effort. `base` is the y of
    the reference itself, a dotted line. Charts of one page need different names.
    """
    require_matplotlib()
    from matplotlib.ticker import FixedLocator, FuncFormatter

    def draw(axes):
        axes.set_xscale("function", functions=(_signed_sqrt, _signed_square))
        if base is not None:
            axes.axhline(base, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        for one in series:
            if len(one.runs) > 1:
                for run in one.runs:
                    x, y = zip(*(run[step] for step in sorted(run)))
                    _own(axes.plot(x, y, color=one.colour, linewidth=0.8, alpha=0.3), one)
        for one in series:
            points = one.mean()
            if points:
                x, y = zip(*points)
                _own(axes.plot(x, y, **one.look, markeredgecolor=PAPER, markeredgewidth=0.6), one)
                _own(axes.plot(x[-1:], y[-1:], **{**one.look, "linestyle": "none"}, markersize=9, markeredgecolor=PAPER), one)
        reached = [x for one in series for run in one.runs for x, _ in run.values()]
        largest = max(reached)
        axes.set_xlim(left=min(-0.0004 * abs(largest), 1.06 * min(reached)), right=1.06 * largest if largest > 0 else 1.0)
        axes.xaxis.set_major_locator(FixedLocator(sqrt_ticks(largest)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return _svg(name, draw, size=(8.8, 4.9))


def compute(series: list[Series], base: float | None, x_label: str, y_label: str) -> str:
    """y against what a method costs, on a logarithmic axis: a mark per method, the range of its seeds. A run has one point, step 0."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    def draw(axes):
        axes.set_xscale("log")
        if base is not None:
            axes.axhline(base, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        for one in series:
            [(x, y)] = one.mean()
            seeds = [run[0][1] for run in one.runs]
            if len(seeds) > 1:
                _own(axes.plot([x, x], [min(seeds), max(seeds)], color=one.colour, linewidth=0.8, alpha=0.6), one)
            _own(axes.plot([x], [y], **{**one.look, "linestyle": "none"}, markersize=8, markeredgecolor=PAPER), one)
        axes.margins(x=0.06)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return _svg("compute", draw, size=(8.8, 4.9))


def curve(name: str, series: list[Series]) -> str:
    """A logged quantity against the step: mean over seeds as a line, smallest to largest seed as a band."""

    def draw(axes):
        for one in series:
            common = one.common
            if not common:  # the seeds were logged at different steps, so there is nothing to average
                for run in one.runs:
                    _own(axes.plot(*zip(*thin(run).values()), color=one.colour, linewidth=0.8), one)
                continue
            runs = [thin({step: run[step] for step in common}) for run in one.runs]
            x, y = zip(*Series(one.index, runs).mean())
            if len(runs) > 1:
                low, high = ([reach(run[step][1] for run in runs) for step in runs[0]] for reach in (min, max))
                _own([axes.fill_between(x, low, high, color=one.colour, alpha=0.13, linewidth=0)], one)
            stride = max(1, len(x) // 4)  # a few marks tell the lines apart without their colours
            marks = (one.index * stride // 5 % stride, stride)
            _own(axes.plot(x, y, **one.look, linewidth=1.4, markersize=4, markevery=marks), one)
        axes.set_xlabel("step")
        axes.margins(x=0.02)

    return _svg(f"curve-{name}", draw)


def histogram(name: str, edges: list[float], chosen: list[float], rejected: list[float], *, weights: Span, top: float) -> str:
    """Shares (0..100) of the tokens per bin of the weight, chosen and rejected; a dotted line at weight 1.

    `weights` and `top`, the ends of the axes, are the same for all constructions, so that these can be compared.
    """

    def draw(axes):
        for shares, colour, style in ((chosen, CHOSEN, DASHES[0]), (rejected, REJECTED, DASHES[1])):
            axes.stairs(shares, edges, color=colour, linewidth=1.5, linestyle=style)
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.16, linewidth=0)
        _weight_axis(axes.xaxis, axes.set_xscale, weights)
        axes.set_xlim(*weights)
        axes.axvline(1.0, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        axes.set_xlabel("weight")
        axes.set_ylabel("% of the tokens")
        axes.set_ylim(0, 1.05 * top)

    return _svg(f"histogram-{name}", draw)


def position(name: str, chosen: list[float], rejected: list[float], *, weights: Span, last: int) -> str:
    """Mean weight at every position of the response, chosen and rejected; a dotted line at weight 1.

    `weights` and `last` (the highest position), the ends of the axes, are the same for all constructions.
    """

    def draw(axes):
        for values, colour, style in ((chosen, CHOSEN, DASHES[0]), (rejected, REJECTED, DASHES[1])):
            axes.plot(range(len(values)), values, color=colour, linestyle=style, linewidth=1.5, marker="o" if len(values) == 1 else None)
        axes.axhline(1.0, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        _weight_axis(axes.yaxis, axes.set_yscale, weights)
        room = (weights[1] / weights[0]) ** 0.04 if weights[0] > 0 else 1.0
        axes.set_ylim(weights[0] / room, weights[1] * room)
        axes.set_xlim(-0.02 * last, 1.02 * last if last else 1)
        axes.set_xlabel("position in the response")
        axes.set_ylabel("mean weight")

    return _svg(f"position-{name}", draw)


def swatch(index: int) -> str:
    """A sample of a method's line for legends and tables."""
    look = Series(index, []).look

    def draw(axes):
        axes.set_axis_off()
        axes.plot([0, 1], [0, 0], **{**look, "marker": None}, linewidth=1.6, clip_on=False)
        axes.plot([0.5], [0], **{**look, "linestyle": "none"}, markersize=5.5, clip_on=False)
        axes.set_xlim(-0.12, 1.12)
        axes.set_ylim(-1, 1)

    return _svg(f"swatch-{index}", draw, size=(0.32, 0.14))


def thin(run: dict[int, tuple[float, float]], most: int = MOST_POINTS) -> dict[int, tuple[float, float]]:
    """`run` with at most `most` points: means over neighbouring points, filed under the last step of each window."""
    steps = sorted(run)
    width = -(-len(steps) // most)
    windows = [steps[start : start + width] for start in range(0, len(steps), width or 1)]
    return {window[-1]: tuple(sum(run[step][axis] for step in window) / len(window) for axis in (0, 1)) for window in windows}


def require_matplotlib():
    """The matplotlib module, or InputError with the command that installs it."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError('the charts are drawn with matplotlib, which is not installed; run: pip install "tisdpo[report]"') from error
    return matplotlib


def _own(artists: list, series: Series) -> None:
    """Mark what belongs to a method, so that the page can bring it to the front."""
    for artist in artists:
        artist.set_gid(f"series-{series.index}-")


def _signed_sqrt(x):
    return np.sign(x) * np.sqrt(np.abs(x))  # an estimated KL may come out slightly below zero


def _signed_square(x):
    return np.sign(x) * np.square(x)


def sqrt_ticks(largest: float) -> list[float]:
    """Round values from 0 to `largest`, at least a ninth of a square-root axis apart."""
    if not largest > 0:
        return [0.0]
    start = math.floor(math.log10(largest)) - 2
    candidates = [digits * 10.0**power for power in range(start, start + 3) for digits in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)]
    ticks = [0.0]
    for value in candidates:
        if value <= largest and math.sqrt(value) - math.sqrt(ticks[-1]) >= math.sqrt(largest) / 9:
            ticks.append(value)
    return ticks


def _weight_axis(axis, set_scale: Callable, span: Span) -> None:
    """A logarithmic axis of weights with ticks at round values; a plain axis where weights are zero or hardly differ."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = span
    if low <= 0 or high / low < 1.5:
        return
    set_scale("log", base=2)
    ratio = 2.0 ** max(0.5, round(math.log2(high / low) / 5))
    if high / low < 4:
        ticks = [value / 10 for value in range(1, 40) if low <= value / 10 <= high and value % 2 == 0]
    else:
        ticks = [ratio**power for power in range(math.ceil(math.log(low, ratio)), math.floor(math.log(high, ratio)) + 1)]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axis.set_minor_locator(NullLocator())


def _svg(name: str, draw: Callable, size: tuple[float, float] = PANEL) -> str:
    """The chart that `draw(axes)` makes, as an `<svg>` element without size, fonts, dates or outside addresses."""
    matplotlib = require_matplotlib()
    from matplotlib.figure import Figure  # the object, not pyplot: no display, no state shared with the user's own figures

    stream = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        matplotlib.rcParams["svg.hashsalt"] = name
        figure = Figure(figsize=size)
        draw(figure.add_subplot())
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(stream.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """An SVG file made fit for the inside of an HTML page that holds many of them."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # it would rule the whole page
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, count=2).replace("xlink:href", "href")
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head) + ' aria-hidden="true" focusable="false"'
    serial = itertools.count()
    body = re.sub(r'\bid="series-(\d+)-"', lambda match: f'id="series-{match[1]}-{next(serial)}"', body)
    body = re.sub(
        r'\bid="(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|\w+Collection)_\d+"', "", body
    )  # nothing refers to them
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r"<(g|path|defs)\s+>", r"<\1>", body)
    for placeholder, variable in VARIABLES.items():
        body = body.replace(placeholder, f"var(--{variable})")
    body = re.sub(r"#0200([0-9a-f]{2})", lambda match: f"var(--m{int(match[1], 16)})", body)
    return re.sub(r"\s*\n\s*", "\n", f"{head}>{body}")
