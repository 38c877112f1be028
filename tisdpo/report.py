"""From `metrics.json` to one self-contained `report.html`: the tables and the page.

The page is a Jinja template (autoescaped) around charts of `tisdpo.plots` and heat maps of `tisdpo.heatmap`. Whatever
part the metrics do not hold is left out of the page.
"""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import yaml

from tisdpo import plots
from tisdpo.errors import InputError
from tisdpo.files import beside
from tisdpo.heatmap import colour_limit, heatmap_groups, scale_ticks, signed
from tisdpo.intervals import Estimate, best_method, decimals, estimate, number

__all__ = ["heatmap_html", "write_html", "write_report"]

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
    "position_correlation": ("position ρ", "rank correlation of the weight with the position in the response"),
    "contrast_std": ("contrast s.d.", "standard deviation of the raw contrast, nats"),
}
SIDES = ("chosen", "rejected")
TRUTH = ("auc", "spearman", "signal_to_noise")  # agreement with the truth, where it is known
SHARES = ("clipped_low", "clipped_high", "ess")


def write_report(metrics: dict, path: str | os.PathLike) -> Path:
    """Write the report of one run as one HTML file without any outside resource; equal metrics give equal bytes.

    `metrics` is the content of `metrics.json`; of its keys only "name" is required. Raises InputError where jinja2 or
    matplotlib is missing and where the metrics contradict themselves (a result of an unlisted method, a broken heat map).
    """
    return write_html(render("report.html.j2", _page(metrics)), path)


def write_html(page: str, path: str | os.PathLike) -> Path:
    """The page is complete or not there. Raises InputError where the disk is full or cannot be written."""
    with beside(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", errors="replace"))  # a model may generate half a surrogate pair
    return Path(path)


def heatmap_html(heatmaps: list[dict], *, title: str = "Token weights") -> str:
    """A self-contained page with nothing but heat maps; `heatmaps` has the form of metrics["heatmaps"]. Needs no matplotlib."""
    return render("report.html.j2", _page({"name": title, "heatmaps": heatmaps}))


def render(template: str, content: dict) -> str:
    """A page of `templates/` with this content, the style sheet in it."""
    try:
        import jinja2
    except ImportError as error:
        raise InputError('the report is written with jinja2, which is not installed; run: pip install "tisdpo[report]"') from error
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["trusted"] = jinja2.utils.markupsafe.Markup  # for our own charts and style sheet, never for text of the user
    css = loader.get_source(environment, "report.css")[0]
    return environment.get_template(template).render(content, css=css)


def _page(metrics: dict) -> dict:
    """All the template reads. A part without data is None or empty."""
    methods = listed_methods(metrics)
    seeds = metrics.get("seeds") or sorted({result["seed"] for result in metrics.get("results", [])})
    heatmaps = metrics.get("heatmaps") or []
    groups = heatmap_groups(heatmaps)
    limit = colour_limit(heatmap[side] for heatmap in heatmaps for side in SIDES)
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
        "table": metric_table(metrics, methods),
        "frontier": _frontier(metrics, methods),
        "curves": _curves(metrics, methods),
        "weights": _weights(metrics.get("weights") or []),
        "heatmaps": groups,
        "heat_ticks": scale_ticks(limit),
        "constructions": CONSTRUCTIONS,
        "samples": metrics.get("samples") or [],
        "signed": signed,
    }


def listed_methods(metrics: dict) -> dict[str, dict]:
    """{id: {"label", "note", "index", "swatch"}} in the order of the tables; the base has no index, it is where all lines start."""
    methods = {}
    for method in metrics.get("methods", []):
        index = None if method["id"] == "base" else sum(known["index"] is not None for known in methods.values())
        swatch = "" if index is None else plots.swatch(index)
        methods[method["id"]] = {
            "label": method.get("label", method["id"]),
            "note": method.get("note", ""),
            "index": index,
            "swatch": swatch,
        }
    for part in ("results", "frontier", "curves"):
        for entry in metrics.get(part) or []:
            if entry["method"] not in methods:
                raise InputError(f"metrics: {part!r} names the method {entry['method']!r}, which 'methods' does not list; add it there")
    for sample in metrics.get("samples") or []:
        for response in sample["responses"]:
            if response["method"] not in methods:
                raise InputError(f"metrics: 'samples' names the method {response['method']!r}, which 'methods' does not list; add it there")
    return methods


def metric_table(metrics: dict, methods: dict) -> dict | None:
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
            cells[method].append(_cell(one, runs, digits, best=method == best))
        columns.append(described)
    rows = [{"id": method, "cells": cells[method]} for method in methods if any(cell["mean"] for cell in cells[method])]
    intervals = any(cell["half"] for row in rows for cell in row["cells"])
    return {"columns": columns, "rows": rows, "intervals": intervals, "best": any(cell["best"] for row in rows for cell in row["cells"])}


def _cell(one: Estimate | None, runs: list[tuple[int, float | None]], digits: int, *, best: bool = False, unit: str = "") -> dict:
    """Text of a table cell: {"mean", "half", "best", "seeds" (single values, for the tooltip), "missing" (seeds without a value)}."""
    if one is None:
        return {"mean": "", "half": "", "best": False, "seeds": "", "missing": 0, "unit": ""}
    single = [f"seed {seed}: {value:.4g}".replace("-", "−") for seed, value in runs if value is not None]
    half = "" if one.half_width is None else number(one.half_width, digits)
    return {
        "mean": number(one.mean, digits),
        "half": half,
        "best": best,
        "seeds": "\n".join(single) if len(single) > 1 else "",
        "missing": len(runs) - len(one.values),
        "unit": unit,
    }


def _series(entries: list[dict], methods: dict, points: Callable[[dict], dict]) -> list[plots.Series]:
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
    described = {"label": quality, "unit": "", **(metrics.get("metric_info") or {}).get(quality, {})}
    label = described["label"]
    base = estimate(result["metrics"].get(quality) for result in metrics.get("results") or [] if result["method"] == "base")
    return {
        "svg": plots.frontier(
            series,
            base and base.mean,
            "KL to the reference (nats, square-root axis)",
            f"{label} ({described['unit']})" if described["unit"] else label,
        ),
        "label": label,
        "title": label[:1].upper() + label[1:],
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
            entries, methods, lambda entry, key=key: {x: (x, y) for x, y in zip(entry["step"], entry.get(key) or []) if _finite(y)}
        )
        if series:
            panels.append({"title": title, "svg": plots.curve(str(place), series)})
            indices |= {one.index for one in series}
            longest = max(longest, *(len(run) for one in series for run in one.runs))
    if not panels:
        return None
    window = -(-longest // plots.MOST_POINTS)
    return {"panels": panels, "indices": sorted(indices), "window": window, "spread": len({entry["seed"] for entry in entries}) > 1}


def _finite(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def _weights(entries: list[dict]) -> dict | None:
    """Table of the constructions (two rows each, chosen and rejected), their findings, histograms and position charts."""
    if not entries:
        return None
    grouped = {}
    for entry in entries:
        grouped.setdefault(entry["construction"], []).append(entry)
    known = {key for entry in entries for side in SIDES for key, value in entry[side].items() if value is not None}
    columns = {key: named for key, named in SIDE_COLUMNS.items() if key in known}
    rows = []
    for construction, seeds in grouped.items():
        row = {"construction": construction, "sides": [], "findings": _findings(seeds)}
        for key in TRUTH:
            runs = [(entry["seed"], entry.get(key)) for entry in seeds]
            row[key] = _cell(estimate(value for _, value in runs), runs, 2)
        for side in SIDES:
            row["sides"].append({"name": side, "cells": [_side_cell(key, side, seeds) for key in columns]})
        rows.append(row)
    return {
        "rows": rows,
        "columns": [{"label": label, "help": text} for label, text in columns.values()],
        "truth": any(row[key]["mean"] for row in rows for key in TRUTH),
        "findings": any(row["findings"] for row in rows),
        "left_out": sum(sum(bool(entry.get("histogram")) for entry in seeds) - len(_poolable(seeds)) for seeds in grouped.values()),
        "histograms": _histograms(grouped),
        "positions": _positions(grouped),
    }


def _side_cell(key: str, side: str, seeds: list[dict]) -> dict:
    share = key in SHARES
    runs = [(entry["seed"], entry[side].get(key)) for entry in seeds]
    if share:
        runs = [(seed, None if value is None else 100 * value) for seed, value in runs]
    return _cell(estimate(value for _, value in runs), runs, 1 if share else 2, unit=" %" if share else "")


def _findings(seeds: list[dict]) -> list[dict]:
    """Every finding once, in the words of its first seed, with the seeds where there are several; figures may differ between seeds."""
    found = {}
    for entry in seeds:
        for text in entry.get("findings") or []:
            kind = re.sub(r"[-+−]?\d[\d.]*", "#", text)
            found.setdefault(kind, (text, []))[1].append(entry["seed"])
    return [{"text": text, "seeds": _where(where, len(seeds))} for text, where in found.values()]


def _where(found_in: list[int], seeds: int) -> str:
    """In words, the seeds of a finding; nothing where there is only one seed."""
    if seeds == 1:
        return ""
    if len(found_in) == 1:
        return f"seed {found_in[0]} only"
    these = f"all {seeds} seeds" if len(found_in) == seeds else f"seeds {', '.join(map(str, found_in))}"
    return f"{these}; figures of seed {found_in[0]}"


def _poolable(seeds: list[dict]) -> list[dict]:
    """Histograms with the bins of the first one."""
    histograms = [entry["histogram"] for entry in seeds if entry.get("histogram")]
    return [histogram for histogram in histograms if histogram["edges"] == histograms[0]["edges"]]


def _histograms(grouped: dict[str, list[dict]]) -> list[dict]:
    """One chart per construction, of the tokens of all seeds whose bins agree, all on the same axes."""
    drawn = {}
    for construction, seeds in grouped.items():
        if same := _poolable(seeds):
            counts = [[sum(column) for column in zip(*(histogram[side] for histogram in same))] for side in SIDES]
            drawn[construction] = same[0]["edges"], *([100 * count / (sum(row) or 1) for count in row] for row in counts)
    if not drawn:
        return []
    bars = [(share, edges[at : at + 2]) for edges, *sides in drawn.values() for side in sides for at, share in enumerate(side)]
    axes = {"weights": _span([edge for share, ends in bars if share for edge in ends]), "top": max(share for share, _ in bars) or 1.0}
    return [{"construction": name, "svg": plots.histogram(str(place), *of, **axes)} for place, (name, of) in enumerate(drawn.items())]


def _positions(grouped: dict[str, list[dict]]) -> list[dict]:
    """One chart per construction, of the mean over the seeds that reach a position, all on the same axes."""
    drawn = {}
    for construction, seeds in grouped.items():
        if positions := [entry["position"] for entry in seeds if entry.get("position")]:
            drawn[construction] = [_mean_over_seeds([one[side] for one in positions]) for side in SIDES]
    if not drawn:
        return []
    known = [value for sides in drawn.values() for side in sides for value in side if not math.isnan(value)]
    axes = {"weights": _span(known), "last": max(len(side) for sides in drawn.values() for side in sides) - 1}
    return [{"construction": name, "svg": plots.position(str(place), *of, **axes)} for place, (name, of) in enumerate(drawn.items())]


def _mean_over_seeds(seeds: list[list[float]]) -> list[float]:
    columns = ([seed[at] for seed in seeds if at < len(seed)] for at in range(max(len(seed) for seed in seeds)))
    return [one.mean if (one := estimate(column)) else math.nan for column in columns]


def _span(weights: list[float]) -> plots.Span:
    """Ends of an axis for these weights; weight 1 is always on it."""
    low, high = min([1.0, *weights]), max([1.0, *weights])
    return (low, high) if low < high else (0.9, 1.1)


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
