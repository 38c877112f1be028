"""From `metrics.json` to one self-contained `report.html`: statistics over seeds, tables, and the page.

The page is a Jinja template (autoescaped) around charts of `tisdpo.plots` and heat maps of `tisdpo.heatmap`. Whatever
part the metrics do not hold is left out of the page.
"""

import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from tisdpo import plots
from tisdpo.errors import InputError
from tisdpo.heatmap import colour_limit, heatmap_groups, heatmap_terminal, scale_ticks, signed

__all__ = ["Estimate", "estimate", "heatmap_html", "heatmap_terminal", "t_quantile", "write_report"]

CONSTRUCTIONS = {
    "P": "one model under a positive and a negative prompt",
    "S": "two SFT runs, on the chosen and on the rejected responses",
    "D": "two DPO runs, the second with the pairs swapped",
    "R": "a DPO model against its reference",
    "random": "drawn at random, without looking at the text",
    "truth": "from the known reward of every token",
}
CURVES = {
    "loss": "Loss",
    "rewards/margins": "Margin of the implicit reward",
    "rewards/accuracies": "Pairs ranked correctly",
    "rewards/chosen": "Implicit reward of chosen",
    "rewards/rejected": "Implicit reward of rejected",
}
SIDE_COLUMNS = {
    "mean": ("mean", "mean weight"),
    "std": ("s.d.", "standard deviation of the weights"),
    "clipped_low": ("at L", "share of the tokens whose contrast lies below the lower clamp"),
    "clipped_high": ("at U", "share of the tokens whose contrast lies above the upper clamp"),
    "ess": ("eff. size", "effective sample size (sum w)² / sum w², as a share of the tokens; 100 % means equal weights"),
    "position_correlation": ("position r", "correlation of the weight with the position in the response"),
}
SHARES = ("clipped_low", "clipped_high", "ess")


@cache
def t_quantile(degrees: int, level: float = 0.95) -> float:
    """t with P(|T| <= t) = level for Student's T with `degrees` degrees of freedom (two-sided critical value).

    Solved by bisection on the closed forms of the distribution for whole degrees of freedom: Abramowitz and Stegun,
    Handbook of Mathematical Functions, 26.7.3 (odd) and 26.7.4 (even). Good to about 1e-12.
    """
    if degrees < 1 or not 0 < level < 1:
        raise ValueError(f"t_quantile needs degrees >= 1 and 0 < level < 1, got degrees={degrees}, level={level}")

    def inside(angle: float) -> float:  # P(|T| <= tan(angle) * sqrt(degrees))
        odd = degrees % 2
        term, total = (math.cos(angle) if odd else 1.0), 0.0
        for k in range(1 + odd, degrees, 2):
            total += term
            term *= math.cos(angle) ** 2 * k / (k + 1)
        return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


@dataclass(frozen=True)
class Estimate:
    """Mean of `values` (one per seed) and the half-width of its 95 % t-interval, None for fewer than two values."""

    mean: float
    half_width: float | None
    values: tuple[float, ...]

    @property
    def low(self) -> float:
        return self.mean - (math.inf if self.half_width is None else self.half_width)

    @property
    def high(self) -> float:
        return self.mean + (math.inf if self.half_width is None else self.half_width)


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Mean and 95 % t-interval of the finite `values`; None if there are none."""
    known = tuple(float(value) for value in values if value is not None and math.isfinite(value))
    if not known:
        return None
    half = t_quantile(len(known) - 1) * statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    return Estimate(statistics.fmean(known), half, known)


def write_report(metrics: dict, path: str | os.PathLike) -> Path:
    """Write the report of one run as one HTML file without any outside resource; equal metrics give equal bytes.

    `metrics` is the content of `metrics.json`; of its keys only "name" is required. Raises InputError where jinja2 or
    matplotlib is missing and where the metrics contradict themselves (a result of an unlisted method, a broken heat map).
    """
    page = _render(metrics)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(page.encode("utf-8", errors="replace"))  # a model may generate half a surrogate pair
    partial.replace(path)
    return path


def heatmap_html(heatmaps: list[dict], *, title: str = "Token weights") -> str:
    """A self-contained page with nothing but heat maps; `heatmaps` has the form of metrics["heatmaps"]. Needs no matplotlib."""
    return _render({"name": title, "heatmaps": heatmaps})


def _render(metrics: dict) -> str:
    try:
        import jinja2
    except ImportError as error:
        raise InputError('the report is written with jinja2, which is not installed; run: pip install "tisdpo[report]"') from error
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = jinja2.utils.markupsafe.Markup  # charts are made here and hold no markup of the user
    return environment.get_template("report.html.j2").render(_page(metrics))


def _page(metrics: dict) -> dict:
    """All the template reads. A part without data is None or empty."""
    methods = _methods(metrics)
    seeds = metrics.get("seeds") or sorted({result["seed"] for result in metrics.get("results", [])})
    heatmaps = metrics.get("heatmaps") or []
    limit = colour_limit(heatmap[side] for heatmap in heatmaps for side in ("chosen", "rejected"))
    return {
        "name": metrics["name"],
        "description": metrics.get("description", ""),
        "notes": metrics.get("notes") or [],
        "data": metrics.get("data") or {},
        "environment": metrics.get("environment") or {},
        "settings": yaml.safe_dump(metrics["settings"], sort_keys=False, allow_unicode=True, width=100) if metrics.get("settings") else "",
        "seconds": _seconds(metrics.get("seconds") or {}),
        "seeds": seeds,
        "methods": methods,
        "table": _metric_table(metrics, methods),
        "frontier": _frontier(metrics, methods),
        "curves": _curves(metrics, methods),
        "weights": _weights(metrics.get("weights") or []),
        "heatmaps": heatmap_groups(heatmaps),
        "heat_ticks": scale_ticks(limit),
        "constructions": CONSTRUCTIONS,
        "samples": metrics.get("samples") or [],
        "signed": signed,
    }


def _methods(metrics: dict) -> dict[str, dict]:
    """{id: {"label", "note", "index", "swatch"}} in the order of the tables; the base has no index, it is where all lines start."""
    methods = {}
    for method in metrics.get("methods", []):
        index = None if method["id"] == "base" else sum(known["index"] is not None for known in methods.values())
        swatch = "" if index is None else plots.swatch(index)
        methods[method["id"]] = {"label": method.get("label", method["id"]), "note": method.get("note", ""), "index": index, "swatch": swatch}
    for part in ("results", "frontier", "curves"):
        for entry in metrics.get(part) or []:
            if entry["method"] not in methods:
                raise InputError(f"metrics: {part!r} names the method {entry['method']!r}, which 'methods' does not list; add it there")
    for sample in metrics.get("samples") or []:
        for response in sample["responses"]:
            if response["method"] not in methods:
                raise InputError(f"metrics: 'samples' names the method {response['method']!r}, which 'methods' does not list; add it there")
    return methods


def _metric_table(metrics: dict, methods: dict) -> dict | None:
    """Columns {"id", "label", "unit", "better", "help"} and, per method, one cell per column."""
    results = metrics.get("results") or []
    if not results:
        return None
    info = metrics.get("metric_info") or {}
    present = {name for result in results for name in result["metrics"]}
    names = [name for name in info if name in present] + sorted(present - set(info))
    columns, cells = [], {method: [] for method in methods}
    for name in names:
        described = {"label": name, "unit": "", "better": None, "help": "", **info.get(name, {}), "id": name}
        found = {}
        for method in methods:
            runs = [(result["seed"], result["metrics"].get(name)) for result in results if result["method"] == method]
            found[method] = (estimate(value for _, value in runs), runs)
        estimates = {method: one for method, (one, _) in found.items()}
        best = best_method(estimates, described["better"])
        digits = decimals(estimates.values())
        for method, (one, runs) in found.items():
            cells[method].append(_cell(one, runs, digits, method == best))
        columns.append(described)
    rows = [{"id": method, "cells": cells[method]} for method in methods if any(cell["mean"] for cell in cells[method])]
    intervals = any(cell["half"] for row in rows for cell in row["cells"])
    return {"columns": columns, "rows": rows, "intervals": intervals, "best": any(cell["best"] for row in rows for cell in row["cells"])}


def best_method(estimates: dict[str, Estimate | None], better: str | None) -> str | None:
    """The method whose interval lies beyond those of all others on the `better` side ("higher" | "lower"), or None.

    A method with one seed has no interval and could be anywhere: then there is no best one.
    """
    known = {method: one for method, one in estimates.items() if one is not None}
    if better not in ("higher", "lower") or len(known) < 2:
        return None
    sign = 1 if better == "higher" else -1
    best = max(known, key=lambda method: sign * known[method].mean)
    worst_of_best = known[best].low if sign > 0 else -known[best].high
    best_of_others = max((one.high if sign > 0 else -one.low) for method, one in known.items() if method != best)
    return best if worst_of_best > best_of_others else None


def decimals(estimates: Iterable[Estimate | None]) -> int:
    """Digits after the point for one column: two significant digits of a typical interval, or three of the largest value."""
    known = [one for one in estimates if one is not None]
    halves = sorted(one.half_width for one in known if one.half_width)
    scale = halves[len(halves) // 2] * 10 if halves else max((abs(one.mean) for one in known), default=1.0)
    return max(0, min(4, 2 - math.floor(math.log10(scale)))) if scale > 0 else 2


def number(value: float, digits: int) -> str:
    """`value` rounded, with a true minus and thin spaces between thousands."""
    text = f"{value:,.{digits}f}".replace(",", "\u202f")
    return text.lstrip("-") if float(f"{value:.{digits}f}") == 0 else text.replace("-", "−")


def _cell(one: Estimate | None, runs: list[tuple[int, float | None]], digits: int, best: bool = False) -> dict:
    """Text of a table cell: {"mean", "half", "best", "seeds" (single values, for the tooltip), "missing" (seeds without a value)}."""
    if one is None:
        return {"mean": "", "half": "", "best": False, "seeds": "", "missing": 0}
    single = [f"seed {seed}: {value:.4g}".replace("-", "−") for seed, value in runs if value is not None]
    half = "" if one.half_width is None else number(one.half_width, digits)
    return {
        "mean": number(one.mean, digits),
        "half": half,
        "best": best,
        "seeds": "\n".join(single) if len(single) > 1 else "",
        "missing": len(runs) - len(one.values),
    }


def _series(entries: list[dict], methods: dict, points) -> list[plots.Series]:
    """One Series per method of `methods` that has points; `points(entry)` gives {step: (x, y)} of one seed."""
    series = []
    for method, described in methods.items():
        runs = [run for run in (points(entry) for entry in entries if entry["method"] == method) if run]
        if runs and described["index"] is not None:
            series.append(plots.Series(described["index"], runs))
    return series


def _frontier(metrics: dict, methods: dict) -> dict | None:
    """Chart of a quality metric against KL, its labels, the methods in it and the number of seeds."""
    entries = metrics.get("frontier") or []
    series = _series(entries, methods, lambda entry: {p["step"]: (p["kl"], p["y"]) for p in entry["points"] if _finite(p["kl"], p["y"])})
    if not series:
        return None
    quality = metrics.get("frontier_y", "y")
    label = (metrics.get("metric_info") or {}).get(quality, {}).get("label", quality)
    base = estimate(result["metrics"].get(quality) for result in metrics.get("results") or [] if result["method"] == "base")
    return {
        "svg": plots.frontier(series, base and base.mean, "KL to the reference (nats per response, square-root axis)", label),
        "label": label,
        "base": base is not None,
        "indices": [one.index for one in series],
        "spread": any(len(one.runs) > 1 for one in series),
        "checkpoints": max(len(run) for one in series for run in one.runs),
    }


def _curves(metrics: dict, methods: dict) -> dict | None:
    """Charts of what the trainer logged, those of CURVES that are there."""
    entries = metrics.get("curves") or []
    panels, indices, longest = [], set(), 0
    for place, (key, title) in enumerate(CURVES.items()):
        series = _series(
            entries, methods, lambda entry, key=key: {s: (s, y) for s, y in zip(entry["step"], entry.get(key) or []) if y is not None and _finite(y)}
        )
        if series:
            panels.append({"title": title, "svg": plots.curve(str(place), series)})
            indices |= {one.index for one in series}
            longest = max(longest, *(len(run) for one in series for run in one.runs))
    if not panels:
        return None
    window = -(-longest // plots.MOST_POINTS)
    return {"panels": panels, "indices": sorted(indices), "window": window, "spread": len({entry["seed"] for entry in entries}) > 1}


def _finite(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)


def _weights(entries: list[dict]) -> dict | None:
    """Table of the constructions (two rows each, chosen and rejected), their findings, histograms and position charts."""
    if not entries:
        return None
    grouped = {}
    for entry in entries:
        grouped.setdefault(entry["construction"], []).append(entry)
    rows = []
    for place, (construction, seeds) in enumerate(grouped.items()):
        row = {"construction": construction, "sides": [], "findings": _findings(seeds)}
        for key in ("auc", "spearman"):
            runs = [(entry["seed"], entry.get(key)) for entry in seeds]
            row[key] = _cell(estimate(value for _, value in runs), runs, 2)
        for side in ("chosen", "rejected"):
            row["sides"].append({"name": side, "cells": [_side_cell(key, side, seeds) for key in SIDE_COLUMNS]})
        row["histogram"] = _histogram(str(place), seeds)
        row["position"] = _position(str(place), seeds)
        rows.append(row)
    return {
        "rows": rows,
        "columns": [{"label": label, "help": text} for label, text in SIDE_COLUMNS.values()],
        "truth": any(row[key]["mean"] for row in rows for key in ("auc", "spearman")),
        "findings": any(row["findings"] for row in rows),
        "charts": any(row["histogram"] or row["position"] for row in rows),
    }


def _side_cell(key: str, side: str, seeds: list[dict]) -> dict:
    scale = 100 if key in SHARES else 1
    runs = [(entry["seed"], entry[side].get(key)) for entry in seeds]
    runs = [(seed, None if value is None else scale * value) for seed, value in runs]
    cell = _cell(estimate(value for _, value in runs), runs, 1 if scale == 100 else 2)
    return {**cell, "unit": " %" if scale == 100 and cell["mean"] else ""}


def _findings(seeds: list[dict]) -> list[dict]:
    """Every different finding once, with the seeds it was found in where that is not all of them."""
    found = {}
    for entry in seeds:
        for finding in entry.get("findings") or []:
            found.setdefault(finding, []).append(entry["seed"])
    return [{"text": text, "seeds": where if len(where) < len(seeds) else []} for text, where in found.items()]


def _histogram(name: str, seeds: list[dict]) -> str:
    """Chart of the counts of all seeds together, or of the first seed where the bins differ."""
    histograms = [entry["histogram"] for entry in seeds if entry.get("histogram")]
    if not histograms:
        return ""
    edges = histograms[0]["edges"]
    same = [histogram for histogram in histograms if histogram["edges"] == edges]
    chosen, rejected = ([sum(counts) for counts in zip(*(histogram[side] for histogram in same))] for side in ("chosen", "rejected"))
    return plots.histogram(name, edges, chosen, rejected)


def _position(name: str, seeds: list[dict]) -> str:
    """Chart of the mean over seeds at every position that a seed has."""
    positions = [entry["position"] for entry in seeds if entry.get("position")]
    if not positions:
        return ""
    means = []
    for side in ("chosen", "rejected"):
        longest = max(len(one[side]) for one in positions)
        columns = ([one[side][at] for one in positions if at < len(one[side])] for at in range(longest))
        means.append([one.mean if (one := estimate(column)) else math.nan for column in columns])
    return plots.position(name, *means)


def _seconds(seconds: dict[str, float]) -> dict | None:
    """Stages with their time as text and as a share of the longest one."""
    if not seconds:
        return None
    longest = max(seconds.values()) or 1.0
    stages = [{"name": name, "time": duration(value), "share": f"{100 * value / longest:.1f}"} for name, value in seconds.items()]
    return {"stages": stages, "total": duration(sum(seconds.values()))}


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 0.4 s, 42 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"
