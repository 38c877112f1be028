"""The block of figures in README.md: what RESULTS.md shows in full, from the same reports."""

from benchmarks.measure import MIB
from benchmarks.registry import OUR_OPS, OURS, Step
from benchmarks.reports import cpu_text, measured_where, red, size_of
from benchmarks.tables import LOGITS, ms, size_text

MARKS = ("<!-- figures: begin (python -m benchmarks.plot) -->", "<!-- figures: end -->")

STEPS = {OURS: "**tisdpo one pass**", "plain torch": "plain torch", "torch.compile": "torch.compile", "TRL chunked": "TRL chunked"}
OPS = {
    "`token_logps`, from logits": Step(op="from logits"),
    "`linear_token_logps`, no gradients": Step(op="scores"),
    "`linear_token_logps`, any gradient a token": Step(op="log-probs"),
    "`linear_token_logps`, frozen head (LoRA)": Step(op="log-probs", frozen=True),
    "`linear_nll_loss`": Step(op="nll"),
}
# columns of the table of log-probs: how the names of providers begin, of whom the fastest is taken (of TRL not who keeps all logits)
OTHERS = {
    "**tisdpo**": lambda step: OUR_OPS,
    "all logits at once, the fastest": lambda step: tuple(name for name in LOGITS if not name.startswith(("F.linear", "TRL"))),
    "TRL": lambda step: "TRL selective_log_softmax" if step.op == "from logits" else "TRL chunked",
    "`F.linear_cross_entropy`": lambda step: "F.linear_cross_entropy",
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
        f"on two cores of a CPU ({size_text(size_of(reports[0]))}; [all results](benchmarks/RESULTS.md)):",
        "",
        *_header("", *STEPS.values()),
    ]
    for report, step in found:
        where = f"{report['dtype']}, {cpu_text(report)} ({_link(report)}), {step['step']}"
        rows = [step["rows"].get(name, {}) for name in STEPS]
        lines.append(_row(where, [f"{r['ratio']:.2f} x, {r['extra_bytes'] / MIB:,.0f} MiB" if "ratio" in r else "" for r in rows]))
    notes = ["Bold is this library, not the best of a row."]
    of_trl = [step["rows"].get("TRL chunked", {}).get("extra_bytes") for _, step in found if step["step"] == "no KL"]
    of_trl = [x for x in of_trl if x]
    if of_trl and max(of_trl) > 2 * min(of_trl):
        notes.append("TRL's chunks were chosen anew between some of these files ([docs/benchmarks.md](docs/benchmarks.md)).")
    half = [step["rows"] for report, step in found if report["dtype"] == "bfloat16"][:2]
    if len(half) == 2:
        errors = [[max(row[name]["error"].values()) for row in half] for name in (OURS, "plain torch")]
        ours, plain = (f"{100 * a:.1f} % (with KL {100 * b:.1f} %)" for a, b in errors)
        notes.append(f"Largest error of bfloat16 gradients, against float64: {ours}; plain torch, which rounds its logits, {plain}.")
    return [*lines, "", " ".join(notes)]


def log_probs(report: dict) -> list[str]:
    """The table of log-probs alone, beside what other trainers use; of those whose time and memory are in the file."""
    where = report.get("where_ops") or (measured_where(report) if "device" in report else report["dtype"])
    lines = []
    for what, step in OPS.items():
        rows = next((result["rows"] for result in report["ops"] if result["step"] == step.name), {})
        rows = {name: row for name, row in rows.items() if "seconds" in row and row.get("extra_bytes") is not None}
        columns = [[row for name, row in rows.items() if name.startswith(who(step))] for who in OTHERS.values()]
        if OUR_OPS in rows:
            lines.append(_row(what, [_cell(min(column, key=lambda row: row["seconds"])) if column else "" for column in columns]))
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
    if any(found):
        cells = ["" if r is None else _cell(r["rows"][OURS], ratio=not red(later)) for r in found]
        lines.append(_row(f"{STEPS[OURS]}, {_link(later)}", cells, bold=range(len(cells))))
    titles = STEPS | {OURS: f"{STEPS[OURS]}, {_link(report)}", "Cut Cross-Entropy, exact": "Cut Cross-Entropy, exact"}
    for name, title in titles.items():
        cells = [_cell(r["rows"][name]) if "seconds" in r["rows"].get(name, {}) else "" for r in kinds]
        lines.append(_row(title, cells, bold=range(len(cells)) if name == OURS else ()))
    notes = []
    if any(found):
        products = ", ".join("-" if r is None else ms(r["products_seconds"]) for r in found)
        x = "" if red(later) else "; x is the median of the quotients"
        notes.append(f"Revision {later['revision']} was timed in a later run, in which the products alone took {products} ms{x}.")
    for r in filter(None, (report, later)):
        if red(r):
            tests = r.get("tests", {"summary": "they were not run"})["summary"]
            notes.append(f"At revision {r['revision']} not every GPU test was seen to pass ({tests}), so there is no ratio.")
    notes.append("Memory of one pass is mostly its budget of logits, which `TISDPO_CHUNK_MIB` lowers.")
    return [*lines, "", " ".join([*notes, "Remarks (which tests, and why), and everybody else: [RESULTS.md](benchmarks/RESULTS.md)."])]


def whole_steps(reports: list[dict]) -> list[str]:
    """Tokens/s and memory of the first whole training step of each file."""
    step, lines = reports[0]["steps"][0], []
    for report in reports:
        rows = report["steps"][0]["rows"]
        cells = [f"{rows[n]['tokens_per_second']:.0f}, {rows[n]['peak_bytes'] / MIB:,.0f} MiB" for n in ("tisdpo", "TRL", "unfused")]
        lines.append(_row(f"{cpu_text(report)} ({_link(report)}), a step", cells))
        for longest in report.get("longest", [])[:1]:
            rows, most = next(iter(longest["rows"].values())), longest["limit_bytes"] / MIB
            cells = [f"{rows[n]['longest']:,} tokens" if rows[n]["longest"] else "" for n in ("tisdpo", "TRL", "unfused")]
            lines.append(_row(f"the same, longest completion within {most:,.0f} MiB", cells))
    shape = step["shape"]
    return [
        f"Whole DPO training steps of a small {step['model']} (H = {shape['hidden']}, {shape['layers']} layers, V = "
        f"{shape['vocabulary']:,}, float32, two CPU cores) on the same batch: tokens/s, and MiB beyond weights and reference, gradients "
        "included (on a CPU TRL projects prompts and padding, too; on a GPU it need not):",
        "",
        *_header("", "**tisdpo**", "TRL's trainer", "plain torch"),
        *lines,
    ]


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
