"""The block of figures in README.md: what RESULTS.md shows in full, from the same reports."""

from benchmarks.measure import MIB
from benchmarks.registry import OUR_OPS, OURS, Step
from benchmarks.reports import cpu_text, measured_where, red, size_of
from benchmarks.tables import longest_text, ms, size_text

MARKS = ("<!-- figures: begin (python -m benchmarks.plot) -->", "<!-- figures: end -->")

ONE_PASS = "**tisdpo one pass**"
# columns of the tables: the providers, of whom the fastest is taken (`_fastest`)
STEPS = {
    ONE_PASS: (OURS,),
    "plain torch": ("plain torch", "plain torch, float32 logits"),
    "torch.compile": ("torch.compile", "torch.compile, float32 logits"),
    "TRL chunked": ("TRL chunked",),
}
OPS = {
    "`token_logps`, from logits": Step(op="from logits"),
    "`linear_token_logps`, no gradients": Step(op="scores"),
    "`linear_token_logps`, any gradient a token": Step(op="log-probs"),
    "`linear_token_logps`, frozen head (LoRA)": Step(op="log-probs", frozen=True),
    "`linear_nll_loss`": Step(op="nll"),
}
OTHERS = {
    "**tisdpo**": (OUR_OPS,),
    "all logits at once, the fastest": (*STEPS["plain torch"], *STEPS["torch.compile"], "F.cross_entropy", "TRL selective_log_softmax"),
    "TRL chunked": ("TRL chunked",),
    "`F.linear_cross_entropy`": ("F.linear_cross_entropy",),
    "the same in one chunk": ("F.linear_cross_entropy, one chunk",),
}


def figures(reports: list[dict], end_to_end: list[dict], gpus: list[tuple[dict, dict | None]]) -> str:
    """The block: both kinds of step and log-probs alone from the files of the default size, a GPU's steps, whole training steps."""
    measured = {report["dtype"]: report for report in reversed(reports) if report.get("ops")}  # of the newest file
    parts = [steps(reports), *map(log_probs, reversed(measured.values()))]
    parts += [gpu_figures(*both) for both in gpus] or [["On a GPU: not yet measured."]]
    parts += [whole_steps(end_to_end)] if end_to_end else []
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def steps(reports: list[dict]) -> list[str]:
    found = [(report, step) for report in reports for step in report.get("steps", []) if step["step"] in ("no KL", "KL, online reference")]
    lines = [
        f"Loss steps: time over their matrix products (those of `torch.mm`; on a CPU ours may be faster), and MiB beyond the gradients, "
        f"on two cores of a CPU ({size_text(size_of(reports[0]))}; [all results](benchmarks/RESULTS.md), and how far a rerun moves them: "
        "[docs/benchmarks.md](docs/benchmarks.md)):",
        "",
        *_header("", *STEPS),
    ]
    for report, step in found:
        rows = [_fastest(step["rows"], names, by="ratio") for names in STEPS.values()]
        cells = ["" if r is None else f"{r['ratio']:.2f} x, {r['extra_bytes'] / MIB:,.0f} MiB" for r in rows]
        lines.append(_row(f"{report['dtype']}, {cpu_text(report)} ({_link(report)}), {step['step']}", cells))
    notes = [
        "Bold is this library, not the best of a row. Of plain torch and torch.compile the faster form, with logits in the dtype of the "
        "head or in float32."
    ]
    of_trl = [step["rows"].get("TRL chunked", {}).get("extra_bytes") or 0 for _, step in found if step["step"] == "no KL"]
    if max(of_trl, default=0) > 500 * MIB:
        notes.append(
            "Where TRL's log-probs take more than 500 MiB they had larger chunks than were the fastest later (1.58 x and 274 MiB instead "
            "of 1.68 x and 1,042 MiB: "
            "[data](benchmarks/results/rerun-float32-no-kl-amd-epyc-2026-11-27.json)); its KL operator has its authors' chunks."
        )
    half = [step["rows"] for report, step in found if report["dtype"] == "bfloat16"][:2]
    if len(half) == 2:
        names = {OURS: "one pass", "torch.compile": "torch.compile", "plain torch": "plain torch"}
        errors = [[100 * max(rows[name]["error"].values()) for rows in half] for name in names]
        told = [f"{title} {a:.1f} % (with KL {b:.1f} %)" for title, (a, b) in zip(names.values(), errors)]
        notes.append(f"Largest error of bfloat16 gradients, against float64: {', '.join(told)}.")
    return [*lines, "", " ".join(notes)]


def log_probs(report: dict) -> list[str]:
    """The table of log-probs alone, beside what other trainers use; of those whose time and memory are in the file."""
    where = report.get("where_ops") or (measured_where(report) if "device" in report else report["dtype"])
    lines = []
    for what, step in OPS.items():
        rows = next((result["rows"] for result in report["ops"] if result["step"] == step.name), {})
        rows = {name: row for name, row in rows.items() if row.get("extra_bytes") is not None}
        if "seconds" in rows.get(OUR_OPS, {}):
            found = [_fastest(rows, names) for names in OTHERS.values()]
            lines.append(_row(what, ["" if row is None else _cell(row) for row in found]))
    title = f"Log-probs alone, for other trainers ({where}; same sizes)"
    return [f"{title}:", "", *_header("", *OTHERS), *lines] if lines else [f"{title}: not measured."]


def gpu_figures(report: dict, later: dict | None) -> list[str]:
    """The table of a GPU: time and memory of the four kinds of step at the first head and length that were measured."""
    first = report["steps"][0]
    kinds = [r for r in report["steps"] if (r["head"], r["size"]) == (first["head"], first["size"])]
    lines = [
        f"On a GPU ({report['device']['name']}, {first['dtype']}, the head of {first['head']}, {size_text(first['size'])}), "
        "ms and MiB beyond the gradients:",
        "",
        *_header("", *(r["step"] for r in kinds)),
        "| the matrix products alone | " + " | ".join(ms(r["products_seconds"]) for r in kinds) + " |",
    ]
    again = {(r["head"], tuple(r["size"].values()), r["step"]): r for r in (later or {"steps": []})["steps"]}
    found = [again.get((r["head"], tuple(r["size"].values()), r["step"])) for r in kinds]
    ratio = later is not None and not red(later)
    for title, names in STEPS.items() if any(found) else ():
        rows = [None if r is None else _fastest(r["rows"], names) for r in found]
        if any(rows):
            cells = ["" if row is None else _cell(row, ratio=ratio and title == ONE_PASS) for row in rows]
            lines.append(_row(f"{title}, {_link(later)}", cells, bold=range(len(cells)) if title == ONE_PASS else ()))
    for title, names in {**STEPS, "Cut Cross-Entropy, exact": ("Cut Cross-Entropy, exact",)}.items():
        rows = [_fastest(r["rows"], names) for r in kinds]
        cells = ["" if row is None else _cell(row) for row in rows]
        lines.append(_row(f"{title}, {_link(report)}", cells, bold=range(len(cells)) if title == ONE_PASS else ()))
    notes = ["What is left empty was not timed, or computes no KL."]
    if any(found):
        products = ", ".join("-" if r is None else ms(r["products_seconds"]) for r in found)
        x = "" if red(later) else "; x is the median of the quotients"
        notes.append(f"Revision {later['revision']} was timed in a later run, in which the products alone took {products} ms{x}.")
    for r in filter(None, (report, later)):
        if red(r):
            tests = r.get("tests", {"summary": "they were not run"})["summary"]
            notes.append(f"At revision {r['revision']} not every GPU test was seen to pass ({tests}), so there is no ratio.")
    return [*lines, "", " ".join([*notes, "Which tests, and why, and everybody else: [RESULTS.md](benchmarks/RESULTS.md)."])]


def whole_steps(reports: list[dict]) -> list[str]:
    """Speed and memory of the first whole training step of each file, and the longest pair."""
    step, lines = reports[0]["steps"][0], []
    for report in reports:
        rows = report["steps"][0]["rows"]
        names = "tisdpo", "TRL", "unfused"
        cells = [f"{rows[n]['tokens_per_second']:.0f} tokens/s, {rows[n]['peak_bytes'] / MIB:,.0f} MiB" for n in names]
        lines.append(_row(f"{cpu_text(report)} ({_link(report)}), a step", cells))
        for longest in report.get("longest", [])[:1]:
            rows, most = next(iter(longest["rows"].values())), longest["limit_bytes"] / MIB
            cells = [f"{longest_text(rows[n])} tokens" for n in names]
            lines.append(_row(f"the same, longest completions of one pair within {most:,.0f} MiB", cells))
    shape = step["shape"]
    return [
        f"Whole DPO training steps with an online reference of a small {step['model']} that is nearly all head (H = {shape['hidden']}, "
        f"{shape['layers']} layers, V = {shape['vocabulary']:,}, float32, two CPU cores) on the same batch; MiB beyond weights and "
        "reference, gradients included; lengths by straight lines between measured ones (on a CPU TRL projects prompts and padding, too; "
        "on a GPU it need not):",
        "",
        *_header("", "**tisdpo**", "TRL's trainer", "plain torch"),
        *lines,
    ]


def _fastest(rows: dict, names: tuple[str, ...], by: str = "seconds") -> dict | None:
    """Of the rows with these names the one with the least time, or ratio; of those within 1 % of it the one with the least memory. None
    where none was timed."""
    timed = [rows[name] for name in names if by in rows.get(name, {})]
    least = min((row[by] for row in timed), default=0)
    return min((row for row in timed if row[by] <= 1.01 * least), key=lambda row: row["extra_bytes"], default=None)


def _link(report: dict) -> str:
    return f"[{report['revision']}](benchmarks/results/{report['file']})"


def _header(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]


def _row(title: str, cells: list[str], bold=(0,)) -> str:
    return f"| {title} | " + " | ".join(f"**{cell}**" if cell and i in bold else cell for i, cell in enumerate(cells)) + " |"


def _cell(row: dict, ratio: bool = False) -> str:
    return f"{ms(row['seconds'])} ms, {row['extra_bytes'] / MIB:,.0f} MiB" + (f", {row['ratio']:.2f} x" if ratio else "")


def with_figures(text: str, block: str) -> str:
    """README with the text between the marks replaced."""
    begin, end = MARKS
    if begin not in text or end not in text:
        raise SystemExit(f"README.md lacks the marks {begin} and {end}")
    return text[: text.index(begin) + len(begin)] + "\n\n" + block + "\n" + text[text.index(end) :]
