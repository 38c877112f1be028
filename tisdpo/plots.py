"""The charts of the report as inline SVG that takes its colours from the page.

Every chart is drawn by matplotlib with placeholder colours, which become CSS variables (`var(--ink)`, `var(--m3)`, ...)
in the SVG, so that one picture serves a light page, a dark page and paper. Nothing here depends on the user's
matplotlibrc, on the date or on a display; equal data gives equal bytes.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

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
    "font.size": 9.5,
    "axes.labelsize": 9.5,
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

    def mean(self) -> list[tuple[float, float]]:
        """Mean over seeds at the steps that all seeds have, in order of the steps."""
        common = sorted(set.intersection(*(set(run) for run in self.runs)))
        count = len(self.runs)
        return [tuple(sum(run[step][axis] for run in self.runs) / count for axis in (0, 1)) for step in common]


def frontier(series: list[Series], base: float | None, x_label: str, y_label: str) -> str:
    """y against KL to the reference, one line per method through its checkpoints; thin lines are single seeds.

    The KL axis is a square-root axis, the customary scale for it: equal steps are about equal effort. `base` is the y of
    the reference itself, a dotted line.
    """

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
        largest = max((x for one in series for run in one.runs for x, _ in run.values()), default=1.0)
        axes.set_xlim(left=-0.0004 * largest, right=1.06 * largest if largest > 0 else 1.0)
        axes.xaxis.set_major_locator(_sqrt_ticks(largest))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return _svg("frontier", draw, size=(8.2, 4.4))


def curve(name: str, series: list[Series]) -> str:
    """A logged quantity against the step: mean over seeds as a line, smallest to largest seed as a band."""

    def draw(axes):
        for one in series:
            runs = [thin(run) for run in one.runs]
            one = Series(one.index, runs)
            points = one.mean()
            if not points:
                continue
            x, y = zip(*points)
            if len(runs) > 1:
                steps = sorted(set.intersection(*(set(run) for run in runs)))
                low, high = ([reach(run[step][1] for run in runs) for step in steps] for reach in (min, max))
                _own([axes.fill_between(x, low, high, color=one.colour, alpha=0.13, linewidth=0)], one)
            look = {**one.look, "marker": one.look["marker"] if len(x) == 1 else None}
            _own(axes.plot(x, y, **look, linewidth=1.5), one)
        axes.set_xlabel("step")
        axes.margins(x=0.02)

    return _svg(f"curve-{name}", draw)


def histogram(name: str, edges: list[float], chosen: list[float], rejected: list[float]) -> str:
    """Share of tokens per bin of the weight, chosen and rejected; a dotted line at weight 1."""

    def draw(axes):
        for counts, colour in ((chosen, CHOSEN), (rejected, REJECTED)):
            total = sum(counts) or 1
            shares = [100 * count / total for count in counts]
            axes.stairs(shares, edges, color=colour, linewidth=1.6)
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.16, linewidth=0)
        if edges[0] > 0 and edges[-1] / edges[0] > 1.5:
            _weight_axis(axes.xaxis, axes.set_xscale, edges[0], edges[-1])
        axes.axvline(1.0, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        axes.set_xlabel("weight")
        axes.set_ylabel("% of the tokens")
        axes.set_ylim(bottom=0)

    return _svg(f"histogram-{name}", draw)


def position(name: str, chosen: list[float], rejected: list[float]) -> str:
    """Mean weight at every position of the response, chosen and rejected; a dotted line at weight 1."""

    def draw(axes):
        for values, look in ((chosen, {"color": CHOSEN}), (rejected, {"color": REJECTED, "linestyle": DASHES[1]})):
            axes.plot(range(len(values)), values, linewidth=1.5, marker="o" if len(values) == 1 else None, **look)
        axes.axhline(1.0, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        known = [value for value in (*chosen, *rejected) if value == value]
        if known and min(known) > 0 and max(known) / min(known) > 1.5:
            _weight_axis(axes.yaxis, axes.set_yscale, min(known), max(known))
        axes.set_xlabel("position in the response (tokens)")
        axes.set_ylabel("mean weight")
        axes.margins(x=0.02)

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
        raise InputError('the report draws its charts with matplotlib, which is not installed; run: pip install "tisdpo[report]"') from error
    return matplotlib


def _own(artists: list, series: Series) -> None:
    """Mark what belongs to a method, so that the page can bring it to the front."""
    for artist in artists:
        artist.set_gid(f"series-{series.index}-")


def _signed_sqrt(x):
    import numpy

    return numpy.sign(x) * numpy.sqrt(numpy.abs(x))  # an estimated KL may come out slightly below zero


def _signed_square(x):
    import numpy

    return numpy.sign(x) * numpy.square(x)


def _sqrt_ticks(largest: float):
    """Round values about equally far apart on a square-root axis from 0 to `largest`."""
    from matplotlib.ticker import FixedLocator

    ticks = [0.0]
    for share in (0.04, 0.16, 0.36, 0.64, 1.0):
        rounded = float(f"{share * largest:.1g}") if share < 0.3 else float(f"{share * largest:.2g}")
        if rounded > ticks[-1]:
            ticks.append(rounded)
    return FixedLocator(ticks)


def _weight_axis(axis, set_scale: Callable, low: float, high: float) -> None:
    """A logarithmic axis of weights with ticks at powers of two (of a higher power where the range is wide)."""
    from math import floor, log2

    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    set_scale("log", base=2)
    stride = max(1, round((log2(high) - log2(low)) / 6))
    exponents = range(floor(log2(low) / stride) * stride, floor(log2(high)) + stride + 1, stride)
    axis.set_major_locator(FixedLocator([2.0**exponent for exponent in exponents]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
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
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # that style would rule the whole page
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, count=2).replace("xlink:href", "href")
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head) + ' aria-hidden="true" focusable="false"'
    serial = iter(range(len(body)))
    body = re.sub(r'\bid="series-(\d+)-"', lambda match: f'id="series-{match[1]}-{next(serial)}"', body)
    body = re.sub(r'\bid="(?!series-)(?:figure|axes|patch|line2d|text|matplotlib\.\w+|xtick|ytick|FillBetweenPolyCollection)_\w+"', "", body)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r"<(g|path|defs)\s+>", r"<\1>", body)
    for placeholder, variable in VARIABLES.items():
        body = body.replace(placeholder, f"var(--{variable})")
    body = re.sub(r"#0200([0-9a-f]{2})", lambda match: f"var(--m{int(match[1], 16)})", body)
    return re.sub(r"\s*\n\s*", "\n", f"{head}>{body}")
