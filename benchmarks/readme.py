"""The block of figures in README.md: what RESULTS.md shows in full, from the same reports."""

from benchmarks.measure import MIB
from benchmarks.registry import OUR_OPS, OURS, Step
from benchmarks.reports import cpu_text, measured_where, of_default_size, red, size_of
from benchmarks.tables import counted, longest_text, ms, others, size_text

MARKS = ("<!-- figures: begin (python -m benchmarks.plot) -->", "<!-- figures: end -->")

ONE_PASS = "**tisdpo one pass**"
# columns of the tables: the providers, of whom the fastest is taken (`_fastest`)
STEPS = {
    ONE_PASS: (OURS,),
    "plain torch": ("plain torch", "plain torch, float32 logits"),
    "torch.compile": ("torch.compile", "torch.compile, float32 logits"),
    "TRL chunked": ("TRL chunked",),
}
ONE_CHUNK = {"`F.linear_cross_entropy`, one chunk": ("F.linear_cross_entropy, one chunk",)}
OPS = {
    "any gradient a token": Step(op="log-probs"),
    "the same, frozen head (LoRA)": Step(op="log-probs", frozen=True),
    "no gradients": Step(op="scores"),
}
OTHERS = {
    "**`linear_token_logps`**": (OUR_OPS,),
    "all logits at once, the best": (*STEPS["plain torch"], *STEPS["torch.compile"], "F.cross_entropy", "TRL selective_log_softmax"),
    "TRL chunked": ("TRL chunked",),
    **ONE_CHUNK,
}


def figures(every: list[dict], end_to_end: list[dict], gpus: list[tuple[dict, dict | None]]) -> str:
    """The block: whole training steps, a GPU's steps, the two common kinds of step and log-probs alone from CPU files of the default size,
    and of all tables together how often somebody else is ahead."""
    reports = [report for report in every if of_default_size(report)]
    parts = [whole_steps(end_to_end)] if end_to_end else []
    parts += [gpu_figures(*both) for both in gpus] or [["On a GPU: not yet measured."]]
    parts += [steps(reports), log_probs(reports), [others_ahead([*every, *(r for both in gpus for r in both if r and not red(r))])]]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def shown(reports: list[dict]) -> list[dict]:
    """Of each dtype the newest, and the one in which another provider is furthest ahead, or least behind."""

    def ahead(report: dict) -> float:
        return max((factor for result in report["steps"] for _, factor in others(result)), default=0)

    of = {}
    for report in reports:
        if report.get("steps"):
            of.setdefault(report["dtype"], []).append(report)
    return [report for same in of.values() for report in same if report in (same[0], max(same, key=ahead))]


def steps(reports: list[dict]) -> list[str]:
    columns = STEPS | ONE_CHUNK
    found = [(r, step) for r in shown(reports) for step in r["steps"] if step["step"] in ("no KL", "KL, online reference")]
    lines = [
        f"Loss steps from hidden states on two cores of a CPU ({size_text(size_of(reports[0]))}): time of forward and backward divided by "
        "that of the matrix products they cannot do without, in `torch.mm` (below 1: ours are faster), and peak MiB beyond the gradients. "
        "Of each dtype the newest machine, and the one on which another provider is furthest ahead, or least behind:",
        "",
        *_header("", *columns),
    ]
    for report, step in found:
        rows = [_fastest(step["rows"], names, by="ratio") for names in columns.values()]
        cells = ["" if r is None else f"{r['ratio']:.2f} x, {r['extra_bytes'] / MIB:,.0f} MiB" for r in rows]
        lines.append(_row(f"{report['dtype']}, {cpu_text(report)} ({_link(report)}), {step['step']}", cells))
    notes = [
        "Bold is this library, not the best of a row; of plain torch and torch.compile the faster form, logits in the head's dtype or in "
        "float32 (of those within 1 % the one with less memory)."
    ]
    of_trl = [step["rows"].get("TRL chunked", {}).get("extra_bytes") or 0 for _, step in found if step["step"] == "no KL"]
    if max(of_trl, default=0) > 500 * MIB:
        notes.append("Where TRL's log-probs take more than 500 MiB their chunks were larger than the ones found fastest later.")
    half = [step["rows"] for report, step in found if report["dtype"] == "bfloat16"][:2]
    if len(half) == 2:
        names = {OURS: "one pass", "torch.compile": "torch.compile", "plain torch": "plain torch"}
        errors = [[100 * max(rows[name]["error"].values()) for rows in half] for name in names]
        told = [f"{title} {a:.1f} % (with KL {b:.1f} %)" for title, (a, b) in zip(names.values(), errors)]
        notes.append(f"Largest error of bfloat16 gradients, against float64: {', '.join(told)}.")
    return [*lines, "", " ".join(notes)]


def log_probs(reports: list[dict]) -> list[str]:
    """Log-probs alone, beside what other trainers use: of each dtype the newest file; the rows whose time and memory are in it."""
    newest, lines, places = {report["dtype"]: report for report in reversed(reports) if report.get("ops")}, [], []
    for dtype, report in reversed(newest.items()):
        for what, step in OPS.items():
            rows = next((result["rows"] for result in report["ops"] if result["step"] == step.name), {})
            rows = {name: row for name, row in rows.items() if row.get("extra_bytes") is not None}
            if "seconds" in rows.get(OUR_OPS, {}):
                found = [_fastest(rows, names) for names in OTHERS.values()]
                lines.append(_row(f"{dtype}, {what}", ["" if row is None else _cell(row) for row in found]))
        places.append(report.get("where_ops") or (measured_where(report) if "device" in report else dtype))
    title = f"Log-probs alone, for other trainers ({'; '.join(places)}; same sizes)"
    return [f"{title}:", "", *_header("", *OTHERS), *lines] if lines else [f"{title}: not measured."]


def others_ahead(reports: list[dict]) -> str:
    ahead, of = counted(reports)
    return (
        f"In {ahead} of the {of} tables of RESULTS.md with ratios another provider of the same task is ahead, by time or by ratio; in "
        "some, another takes less memory: [which, and why](benchmarks/RESULTS.md#where-somebody-else-is-faster). How to read all this, and "
        "how far a rerun moves it: [docs/benchmarks.md](docs/benchmarks.md)."
    )


def gpu_figures(report: dict, later: dict | None) -> list[str]:
    """The table of a GPU: time and memory of the four kinds of step at the first head and length that were measured, by revision."""
    first = report["steps"][0]
    kinds = [r for r in report["steps"] if (r["head"], r["size"]) == (first["head"], first["size"])]
    lines = [
        f"The loss step on a GPU ({report['device']['name']}, {first['dtype']}, the head of {first['head']}, {size_text(first['size'])}), "
        "ms and MiB beyond the gradients:",
        "",
        *_header("", *(r["step"] for r in kinds)),
    ]
    again = {(r["head"], tuple(r["size"].values()), r["step"]): r for r in (later or {"steps": []})["steps"]}
    found = [again.get((r["head"], tuple(r["size"].values()), r["step"])) for r in kinds]
    for of, results in ((later, found), (report, kinds)):
        if any(results):
            cells = ["" if r is None else f"{ms(r['products_seconds'])} ms" for r in results]
            lines.append(_row(f"{_link(of)}: the matrix products alone", cells, bold=()))
        for title, names in {**STEPS, "Cut Cross-Entropy, exact": ("Cut Cross-Entropy, exact",)}.items():
            rows = [None if r is None else _fastest(r["rows"], names) for r in results]
            if any(rows):
                cells = ["" if row is None else _cell(row, ratio=not red(of) and title == ONE_PASS) for row in rows]
                lines.append(_row(title, cells, bold=range(len(cells)) if title == ONE_PASS else ()))
    notes = ["What is left empty was not timed, or computes no KL."]
    of = {}
    for r in (later, report):
        if r is not None and red(r):
            of.setdefault("some GPU tests failed" if "tests" in r else "the GPU tests were not run", []).append(r["revision"])
    notes += [f"At {' and '.join(revisions)} {what}, so there are no ratios." for what, revisions in of.items()]
    return [*lines, "", " ".join([*notes, "Which tests, and why, other heads, and everybody else: [RESULTS.md](benchmarks/RESULTS.md)."])]


def whole_steps(reports: list[dict]) -> list[str]:
    """Speed and memory of the first whole training step of each file, and of the newest the longest pair."""
    step, lines = reports[0]["steps"][0], []
    names = {"**tisdpo**": "tisdpo", "TRL's trainer": "TRL", "the same without its log": "TRL, without its log", "plain torch": "unfused"}
    names = {title: name for title, name in names.items() if any(name in report["steps"][0]["rows"] for report in reports)}
    without = " (the next column is without them)" if "TRL, without its log" in names.values() else ""
    for report in reports:
        rows = [report["steps"][0]["rows"].get(n) for n in names.values()]
        cells = ["" if r is None else f"{r['tokens_per_second']:.0f} tokens/s, {r['peak_bytes'] / MIB:,.0f} MiB" for r in rows]
        lines.append(_row(f"{cpu_text(report)} ({_link(report)})", cells))
    for longest in reports[0].get("longest", [])[:1]:
        task, most = next(iter(longest["rows"].values())), longest["limit_bytes"] / MIB
        cells = [f"{longest_text(task[n])} tokens" if n in task else "" for n in names.values()]
        lines.append(_row(f"the longest completions of one pair within {most:,.0f} MiB, {cpu_text(reports[0])}", cells))
    shape = step["shape"]
    return [
        f"Whole DPO training steps with an online reference of a small {step['model']} that is nearly all head (H = {shape['hidden']}, "
        f"{shape['layers']} layers, V = {shape['vocabulary']:,}, float32, two CPU cores) on the same batch; MiB beyond weights and "
        "reference, gradients included; lengths are interpolated. TRL's trainer also computes entropy, mean logit and accuracy of every "
        f"token for its log{without}; on a CPU TRL and plain torch project prompts and padding, too:",
        "",
        *_header("", *names),
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
