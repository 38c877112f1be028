"""The pictures of RESULTS.md: bars of a kind of step, curves, the roofline; each carries a digest of the figures that it was made of."""

import hashlib
import json

from benchmarks.measure import MIB, ROOT
from benchmarks.registry import ALL_MODES, OUR_OPS, OURS, Size
from benchmarks.roofline import step_work

PLOTS = ROOT / "benchmarks/plots"
COLORS = {OURS: "#c2410c", OUR_OPS: "#c2410c", "tisdpo two passes": "#f59e0b", "plain torch": "#334155", "TRL chunked": "#0e7490"}


def _axes(columns: int, height: float, rows: int = 1):
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "tisdpo", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, height * rows), layout="constrained", squeeze=False)
    return figure, axes.ravel()


def digest(data) -> str:
    """What a picture says of the figures that it was made of."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _write(figure, name: str, data) -> None:
    import matplotlib.pyplot as plt

    PLOTS.mkdir(exist_ok=True)
    figure.savefig(PLOTS / name, metadata={"Date": None, "Description": f"figures {digest(data)}"})
    plt.close(figure)


def stale_plots(reports: dict[tuple[str, str], dict]) -> list[str]:
    """Pictures, of (part, dtype), that are not there, or were made of other figures."""
    names = {f"{part}-{dtype}.svg": (report[part], report["steps"]) for (part, dtype), report in reports.items()}
    made = {name: (PLOTS / name).read_text() if (PLOTS / name).exists() else "" for name in names}
    return [name for name, data in names.items() if f"figures {digest(data)}" not in made[name]]


def plot_steps(report: dict) -> None:
    """Bars: time over the products, memory, error; one row of panels a kind of step without and with KL."""
    chosen = [r for r in report["steps"] if r["step"] in ("no KL", "KL, online reference")]
    figure, axes = _axes(3, 3.0, rows=len(chosen))
    for i, result in enumerate(chosen):
        rows = {n: r for n, r in sorted(result["rows"].items(), key=lambda item: -item[1].get("seconds", 0)) if "seconds" in r}
        bars = [
            ("time / products", [r["ratio"] for r in rows.values()], 1.0),
            ("MiB beyond gradients", [(r.get("extra_bytes") or 0) / MIB for r in rows.values()], None),
            ("largest relative error", [max(r["error"].values()) if "error" in r else 0 for r in rows.values()], None),
        ]
        for ax, (label, values, line) in zip(axes[3 * i :], bars):
            ax.barh(range(len(rows)), values, color=[COLORS.get(name, "#94a3b8") for name in rows])
            ax.set_yticks(range(len(rows)), list(rows) if label.startswith("time") else [""] * len(rows))
            ax.set_xlabel(label)
            if label.startswith("largest"):
                ax.set_xscale("log")
                ax.set_xlim(min(filter(None, values), default=1) / 10, max(values) * 2)
            if line is not None:
                ax.axvline(line, color="#64748b", lw=0.8, ls="--")
                ax.set_title(f"{result['step']}: {result['products']} products", loc="left", fontsize=9)
    _write(figure, f"steps-{report['dtype']}.svg", (report["steps"], report["steps"]))


def plot_scaling(report: dict) -> None:
    figure, axes = _axes(3, 3.4)
    for ax, (name, curve) in zip(axes, report["scaling"].items()):
        for provider in curve["fits"]:
            points = [(p["value"], p["rows"][provider]["seconds"]) for p in curve["points"] if "seconds" in p["rows"][provider]]
            if points:
                x, y = zip(*points)
                x = [1 - v for v in x] if name == "masked" else x
                ax.plot(x, [1e3 * s for s in y], "o-", ms=3, lw=1.2, color=COLORS.get(provider, "#94a3b8"), label=provider)
        if name != "masked":
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
        else:
            ax.set_xlim(0, 1.02)
            ax.set_ylim(0)
        ax.set_xlabel({"tokens": "tokens N", "vocabulary": "vocabulary V", "masked": "share of unmasked tokens"}[name])
        ax.set_ylabel("ms a step")
    axes[0].legend(frameon=False)
    _write(figure, f"scaling-{report['dtype']}.svg", (report["scaling"], report["steps"]))


def plot_roofline(report: dict) -> None:
    """Speed against operations a byte: the folds under the memory's ceiling, the steps under that of the products."""
    result, top = report["roofline"], report["roofline"]["ceilings"]
    figure, (ax,) = _axes(1, 3.6)
    x = [2.0**i for i in range(-1, 12)]
    ax.plot(x, [min(top["flops"], top["bytes_per_second"] * v) / 1e9 for v in x], color="#334155", lw=1)
    for name, row in result["folds"].items():
        ax.plot(row["operations"] / row["bytes"], row["operations"] / row["seconds"] / 1e9, "s", ms=4, color="#f59e0b")
        ax.annotate(name, (row["operations"] / row["bytes"], row["operations"] / row["seconds"] / 1e9), fontsize=6, xytext=(4, -6),
                    textcoords="offset points")  # fmt: skip
    names = {mode.name: mode for mode in ALL_MODES}
    for step in report.get("steps", []):
        ours = step["rows"].get(OURS, {})
        if "seconds" in ours:
            operations, moved = step_work(Size(**step["size"]), names[step["step"]], 4 if report["dtype"] == "float32" else 2)
            ax.plot(operations / moved, operations / ours["seconds"] / 1e9, "o", ms=5, color=COLORS[OURS])
    ax.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s")
    ax.set_title("line: measured ceilings; circles: one pass; squares: folds alone", loc="left", fontsize=8)
    _write(figure, f"roofline-{report['dtype']}.svg", (report["roofline"], report["steps"]))


PLOTTED = {"steps": plot_steps, "scaling": plot_scaling, "roofline": plot_roofline}
