"""RESULTS.md, its plots and the README's figures, from the JSON files in results/.

    python -m benchmarks.plot              # writes benchmarks/RESULTS.md, benchmarks/plots/*.svg and README's block of figures
    python -m benchmarks.plot --check      # says whether they are what the JSON files give (exit code 1 if not); writes nothing

Of every kind of file, size and CPU the newest is taken. Typed by hand are the reasons for losing rows, and a row that is
lost without a reason stands in the table as such; and what a file says of itself (`note`, `remarks`), which is printed with it. A run whose
tests did not all pass has its times on the pages, and no ratios.
"""

import argparse
import json
import sys
from dataclasses import asdict

from benchmarks.measure import MIB, RESULTS, ROOT, floor
from benchmarks.pictures import PLOTS, PLOTTED, stale_plots
from benchmarks.registry import OUR_OPS, OURS, Size, Step

PAGE, README = ROOT / "benchmarks/RESULTS.md", ROOT / "README.md"
DTYPES = ("float32", "bfloat16", "float16")
MARKS = ("<!-- figures: begin (python -m benchmarks.plot) -->", "<!-- figures: end -->")

# Why a provider is faster than one pass somewhere: (how its name begins, what must hold of the size, the reason)
WHOLE = ("plain torch", "torch.compile")
LOGITS = (*WHOLE, "F.cross_entropy", "F.linear_cross_entropy, one chunk", "TRL selective_log_softmax")
KEEPS = (
    "it keeps all logits for the backward, so there are three products of one call each; here there are four, or, for H / 2 to H rows (of "
    "bfloat16 2 H; of float32 since revision 3b0ebc1), three in chunks"
)
AT_ONCE = "it holds all logits at once, so each product is one call; here they come in chunks"
REASONS_OF_OPS = {  # by kind of step
    Step(op="log-probs").name: [(LOGITS, KEEPS)],
    **{step.name: [(LOGITS, AT_ONCE)] for step in (Step(op="scores"), Step(op="nll"), Step(op="log-probs", frozen=True))},
}
REASONS = [
    (WHOLE, lambda size: size["tokens"] * size["vocabulary"] > 1 << 23,
     "it holds all logits at once, so each product is one call, and of 16 bits it rounds logits and sums; in chunks the head is packed "
     "anew for each, and dWeight, where it is summed in float32 (not for up to 2 H rows of 16 bits), read and written (NOTES.md). One pass "
     "in one chunk is the row of that name, and between it and these rows the order changes from run to run; the budget is yours: "
     "TISDPO_CHUNK_MIB"),
    (WHOLE, lambda size: size["tokens"] * size["vocabulary"] <= 1 << 23,
     "few logits: they fit into the cache, nothing is saved by chunks, and the fixed cost of the operators counts"),
    (("both products in one program", "logits and folds"), lambda size: True,
     "another form of one pass on a GPU, tried and given up: faster here by 2 % at most, slower elsewhere (NOTES.md, 2026-11-27)"),
]  # fmt: skip
ON_GPU = (
    "it rounds its logits to 16 bits, which halves the traffic of the softmax, and holds all of them at once, so that each product is one "
    "call"
)


def reports_of(kind: str) -> list[dict]:
    """The content of results/<kind>-*.json, the oldest first, with its name as `file`."""
    found = [json.loads(path.read_text()) | {"file": path.name} for path in RESULTS.glob(f"{kind}-*.json")]
    return sorted(found, key=lambda report: (report["file"][-15:], report["date"]))


def newest_of_each_gpu() -> list[tuple[dict, dict | None]]:
    """For each GPU the newest device-*.json that has steps, and the newest without-logits-*.json if it is newer; the newest GPU first."""
    first, again = ({r["device"]["name"]: r for r in reports_of(kind) if r.get("steps")} for kind in ("device", "without-logits"))
    order = sorted(first.items(), key=lambda item: item[1]["date"], reverse=True)
    found = [(report, again.get(name)) for name, report in order]
    return [(report, later if later and later["date"] > report["date"] else None) for report, later in found]


def newest_of_each_cpu(kind: str) -> list[dict]:
    """The newest results/<kind>-*.json of each kind of CPU, the newest of all first."""
    return list({cpu_of(report): report for report in reports_of(kind) if report.get("steps")}.values())[::-1]


def cpu_of(report: dict) -> tuple[str, str]:
    return report["device"]["name"], report["device"]["vectors"]


def size_of(report: dict) -> dict:
    """That of the steps, or of log-probs alone."""
    return (report.get("steps") or report["ops"])[0]["size"]


def newest_of_each_size() -> list[dict]:
    """The newest cpu-<dtype>-*.json for every dtype, size and CPU; the default size first, of its CPUs the one of the newest file.

    Other parts that it lacks, or some curves of, are those of the file before, or of a later one without steps, whose `machine` then
    stands in `parts_of`.
    """
    found, parts = {}, ("ops", "roofline", "scaling")
    for report in reports_of("cpu"):
        report |= {"parts_of": {}, "newest": report["date"]}
        key = report["dtype"], tuple(size_of(report).values()), cpu_of(report)
        before = found.get(key, {"parts_of": {}})
        if report.get("steps") or not before.get("steps"):
            for part in parts:
                if len(report.get(part, ())) < len(before.get(part, ())):
                    report[part], report["parts_of"][part] = before[part], before["parts_of"].get(part, machine(before))
                    report["where_" + part] = before.get("where_" + part) or _where(before)
            found[key] = report
            continue
        before["newest"] = report["date"]
        for part in filter(report.get, parts):
            before[part], before["parts_of"][part] = report[part], machine(report)
            before["where_" + part] = _where(report)
    order = sorted(found.values(), key=lambda report: report["newest"], reverse=True)
    return sorted(order, key=lambda report: (DTYPES.index(report["dtype"]), not of_default_size(report), list(size_of(report).values())))


def of_default_size(report: dict) -> bool:
    """Whether a report has README's figures."""
    return size_of(report) == asdict(Size())


def pictured(reports: list[dict]) -> dict[tuple[str, str], dict]:
    """The report of the picture of (part, dtype): the first of the default size that has such a part and steps."""
    whole = [report for report in reports if of_default_size(report) and report.get("steps")]
    return {(part, report["dtype"]): report for report in reversed(whole) for part in PLOTTED if report.get(part)}


# Tables


def ours_of(result: dict) -> str:
    """Our row of a table."""
    return OUR_OPS if result.get("op") else OURS


def lost(result: dict) -> list[tuple[str, float]]:
    """Providers of the same task that were faster, by the medians of the times or by those of the ratios, with the larger factor."""
    ours, found = result["rows"].get(ours_of(result), {}), []
    for name, row in result["rows"].items():
        factors = [ours[by] / row[by] for by in ("seconds", "ratio") if by in ours and by in row]
        if not name.startswith("tisdpo") and row.get("task") == "TIS-DPO" and max(factors, default=0) > 1:
            found.append((name, max(factors)))
    return found


def why(name: str, result: dict) -> str:
    """The reason for a losing row, or a sentence that there is none yet."""
    if result.get("op"):
        return next((text for who, text in REASONS_OF_OPS.get(result["step"], ()) if name.startswith(who)), "not explained yet")
    return next((text for who, holds, text in REASONS if name.startswith(who) and holds(result["size"])), "not explained yet")


def ms(seconds: float) -> str:
    """Milliseconds, three digits or all that stand before the point."""
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def speed(flops: float) -> str:
    return f"{flops / 1e12:.0f} TFLOP/s" if flops > 1e13 else f"{flops / 1e9:.0f} GFLOP/s"


def size_text(size: dict) -> str:
    masked = f", {size['masked']:.0%} masked" if size["masked"] else ""
    return f"N = {size['tokens']:,} in {size['pairs']} pairs, H = {size['hidden']:,}, V = {size['vocabulary']:,}{masked}"


def step_table(result: dict, ratios: bool = True) -> list[str]:
    """One kind of step, fastest first; who takes no part stands below with the reason. ratios: whether all tests passed."""
    products = f", {speed(1e12 * result['products_tflops'])}" if result["products"] else ""
    unit = "products" if result["products"] else "copy"
    lines = [
        f"**{result['step']}** ({result['dtype']}, {size_text(result['size'])}): {floor(result)}, "
        f"{ms(result['products_seconds'])} ms{products}",
        "",
        f"| | ms (p20 to p80) | x {unit} | MiB beyond gradients | largest relative error |",
        "| --- | --- | --- | --- | --- |",
    ]
    absent = []
    for name, row in sorted(result["rows"].items(), key=lambda item: item[1].get("seconds", 9e9)):
        if "seconds" not in row:
            absent.append(f"{name}: {row.get('skipped') or row.get('failed')}")
            continue
        note = "" if row["task"] == "TIS-DPO" else f" (computes {row['task']} only)"
        memory = f"{row['extra_bytes'] / MIB:.0f}" if row.get("extra_bytes") is not None else ""
        error = f"{max(row['error'].values()):.0e}" if "error" in row else "not compared"
        bold = "**" if name == ours_of(result) else ""
        spread = f"{ms(row['seconds'])} ({ms(row['p20'])} to {ms(row['p80'])})"
        ratio = f"{bold}{row['ratio']:.2f}{bold}" if ratios else ""
        lines.append(f"| {bold}{name}{bold}{note} | {spread} | {ratio} | {memory} | {error} |")
    return [*lines, "", *(["No part: " + "; ".join(absent) + ".", ""] if absent else [])]


def losing_rows(reports: list[dict]) -> list[str]:
    """Every row of the published tables in which somebody who computes the same task is faster, by provider and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for report in reports:
        curves = [(point, f"curve of {name}") for name, c in report.get("scaling", {}).items() for point in c["points"]]
        for result, where in [(r, r["step"]) for r in report.get("steps", []) + report.get("ops", [])] + curves:
            for name, factor in lost(result):
                reason = ON_GPU if "sms" in report.get("device", {}) and name.startswith(WHOLE) else why(name, result)
                close = ", ranges overlap" if result["rows"][name]["p80"] > result["rows"][ours_of(result)]["p20"] else ""
                much = "not all GPU tests passed, see there" if red(report) else f"{factor:.2f} times as fast{close}"
                row = f"  - {result['dtype']}{_on(report)}, {where}, {size_text(result['size'])}: {much}"
                found.setdefault((name, reason), []).append(row)
    return [line for (name, reason), rows in found.items() for line in (f"- **{name}**: {reason}.", *rows)] or ["None."]


def rows_with_more_memory(reports: list[dict]) -> list[str]:
    """By kind of step, who computes the same task in less memory than one pass, by more than 1 MiB: the one with the least."""
    lines = []
    for report in reports:
        for result in report.get("steps", []) + report.get("ops", []):
            rows = {name: row for name, row in result["rows"].items() if row.get("extra_bytes") is not None and "seconds" in row}
            peers = [n for n, row in rows.items() if not n.startswith("tisdpo") and row.get("task") == "TIS-DPO"]
            least, ours = min(peers, key=lambda n: rows[n]["extra_bytes"], default=None), rows.get(ours_of(result))
            if least and ours and rows[least]["extra_bytes"] + MIB < ours["extra_bytes"]:
                mib, times = (f"{x['extra_bytes'] / MIB:,.0f} MiB" for x in (rows[least], ours)), rows[least]["seconds"] / ours["seconds"]
                row = f"{result['dtype']}{_on(report)}, {result['step']}, {size_text(result['size'])}"
                lines.append(f"- {row}: {least} {' instead of '.join(mib)}, in {times:.2g} times as long")
    return lines or ["None."]


def red(report: dict) -> bool:
    """Whether tests of the measured functions did not all pass: on a GPU; on a CPU nothing is measured then."""
    return "sms" in report.get("device", {}) and not report.get("tests", {}).get("passed")


def _cpu(report: dict) -> str:
    name, vectors = cpu_of(report)
    return f"{name.replace('(R)', '').replace(' Processor', '')}, {vectors.replace('AVX512', 'AVX-512')}"


def _on(report: dict) -> str:
    """Which machine, among rows of several."""
    return f", {report['device']['name'] if 'sms' in report['device'] else _cpu(report)}"


def machine(report: dict) -> str:
    """What a file was measured on, and how."""
    device = report["device"]
    what = f"{device.get('sms')} SMs, driver {report.get('driver', '?')}"
    if "cores" in device:
        what = f"{device['cores']} cores, {device['threads']} threads, {device['vectors']}, load {device['load_before']:.1f} before"
        what += ", freed memory kept" if report.get("keeps_freed_memory") else ""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    file = f"[{report['file']}](results/{report['file']})"
    told = "".join(f" {text}" for text in (f"`{report['command']}`." if "command" in report else "", report.get("note", "")) if text)
    return f"{file}: {device['name']}, {what}; {versions}; revision {report['revision']}, {report['date'][:10]}.{told}"


def scaling_table(scaling: dict) -> list[str]:
    lines = ["| | time ~ N^b | time ~ V^b | departure from proportional to unmasked tokens |", "| --- | --- | --- | --- |"]
    for name in scaling["tokens"]["fits"]:
        cells = [scaling[c]["fits"].get(name, {}) for c in ("tokens", "vocabulary", "masked")]
        texts = [f"{c['exponent']:.2f}" if "exponent" in c else "" for c in cells[:2]]
        texts.append(f"{cells[2]['departure']:.0%}" if "departure" in cells[2] else "not measured")
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return [*lines, ""]


def roofline_table(result: dict) -> list[str]:
    top = result["ceilings"]
    lines = [
        f"Ceilings: products {speed(top['flops'])}, a copy {top['bytes_per_second'] / 1e9:.1f} GB/s (read and written).",
        "",
    ]
    if products := result.get("products"):
        lines += ["| product alone | ms | | of the ceiling |", "| --- | --- | --- | --- |"]
        for name, row in products.items():
            lines.append(f"| {name} | {ms(row['seconds'])} | {speed(row['flops'])} | {row['flops'] / top['flops']:.0%} |")
        lines.append("")
    lines += ["| fold alone | ms | GB/s | of the copy |", "| --- | --- | --- | --- |"]
    for name, row in result["folds"].items():
        share = row["bytes_per_second"] / top["bytes_per_second"]
        lines.append(f"| {name} | {ms(row['seconds'])} | {row['bytes_per_second'] / 1e9:.1f} | {share:.0%} |")
    return [*lines, ""]


def end_to_end_tables(report: dict) -> list[str]:
    lines = ["| model | step | | ms (p20 to p80) | tokens/s | peak MiB |", "| --- | --- | --- | --- | --- | --- |"]
    for result in report["steps"] + report["scoring"]:
        for name, row in sorted(result["rows"].items(), key=lambda item: item[1].get("seconds", 9e9)):
            head = f"| {result['model']} | {result['task']} | {name} | "
            if "seconds" not in row:
                lines.append(head + f"{row['skipped']} | | |")
                continue
            memory = f"{row['peak_bytes'] / MIB:.0f}" if "peak_bytes" in row else ""
            spread = f"{1e3 * row['seconds']:.0f} ({1e3 * row['p20']:.0f} to {1e3 * row['p80']:.0f})"
            lines.append(head + f"{spread} | {row['tokens_per_second']:.0f} | {memory} |")
    for result in report["longest"]:
        lines += [
            "",
            f"Longest completions of one pair whose loss and backward stay within {result['limit_bytes'] / MIB:.0f} MiB beyond weights "
            f"and reference ({result['model']}; straight lines between measured lengths):",
            "",
        ]
        for task, rows in result["rows"].items():
            found = [f"{name} {_longest(row)}" for name, row in rows.items()]
            lines.append(f"- {task}: " + ", ".join(found))
    return [*lines, ""]


def _longest(row: dict) -> str:
    return f"more than {row['points'][-1][0]:,}" if row["longest"] is None else f"{row['longest']:,}"


def page(cpu: list[dict], end_to_end: list[dict], gpus: list[tuple[dict, dict | None]]) -> str:
    """RESULTS.md. later: steps that were measured on the same GPU after `gpu`, see `main`."""
    lines = [
        "# Results", "",
        "Made by `python -m benchmarks.plot` from the JSON files named below. What u is, how to read the tables and how to repeat them: "
        "[docs/benchmarks.md](../docs/benchmarks.md).", "",
    ]  # fmt: skip
    for report in cpu:
        where = f"{report['dtype']}, {_cpu(report)}" + ("" if of_default_size(report) else f", {size_text(size_of(report))}")
        what = "The loss step" if report.get("steps") else "Log-probs alone"
        lines += [f"## {what} on a CPU, {where}", "", machine(report), ""]
        drawn = [part for (part, _), of in pictured(cpu).items() if of is report]
        if "steps" in drawn:
            name = f"steps-{report['dtype']}.svg"
            lines += [f"![time, memory and error of every kind of step](plots/{name})", ""]
        for result in report.get("steps", []):
            lines += step_table(result)
        if report.get("ops"):
            lines += [f"### Log-probs alone, {where}", ""] if report.get("steps") else []
            lines += [report["parts_of"]["ops"], ""] if "ops" in report["parts_of"] else []
            for result in report["ops"]:
                lines += step_table(result)
        if "roofline" in report:
            lines += [f"### Ceilings, {where}", ""]
            lines += [f"![roofline](plots/roofline-{report['dtype']}.svg)", ""] if "roofline" in drawn else []
            lines += [report["parts_of"]["roofline"], ""] if "roofline" in report["parts_of"] else []
            lines += roofline_table(report["roofline"])
        if report.get("scaling"):
            lines += [f"### Scaling, {where}, no KL, trainable head", ""]
            lines += [f"![scaling](plots/scaling-{report['dtype']}.svg)", ""] if "scaling" in drawn else []
            lines += [report["parts_of"]["scaling"], ""] if "scaling" in report["parts_of"] else []
            lines += scaling_table(report["scaling"])
    lines += ["## Where somebody else is faster", "", "Rows above in which a provider that computes the same task beats one pass:", ""]
    every = [*cpu, *(report for both in gpus for report in both if report)]
    lines += [*losing_rows(every), ""]
    lines += ["## Where somebody else takes less memory", "", "The smallest of the same task, where that is not one pass:", ""]
    lines += [*rows_with_more_memory(every), ""]
    for report in end_to_end:
        lines += [f"## Whole training steps and scoring, float32, {_cpu(report)}", "", machine(report), "", *end_to_end_tables(report)]
    if not gpus:
        lines += ["## GPU", "", "Not yet measured. `python -m benchmarks.device` measures it.", ""]
    for gpu, later in gpus:
        lines += [f"## GPU, {gpu['device']['name']}", "", machine(gpu), ""]
        lines += [f"- Tests marked gpu: {gpu.get('tests', {}).get('summary', 'not run')}."]
        lines += [f"- {remark}" for remark in gpu.get("remarks", [])]
        if gpu.get("sanitizer", {}).get("ran"):
            lines += [f"- compute-sanitizer (memcheck) over small cases: {'clean' if gpu['sanitizer']['clean'] else 'NOT clean'}."]
        lines += [""]
        if "ceilings" in gpu.get("roofline", {}):
            lines += ["### Ceilings, and the products and folds of 2048 rows of 128256", "", *roofline_table(gpu["roofline"])]
        lines += gpu_steps(gpu)
        if gpu.get("failed"):
            lines += ["Given up: " + "; ".join(gpu["failed"]) + ".", ""]
        if gpu.get("left_out"):
            lines += ["No time was left for: " + "; ".join(text.removesuffix(": no time left") for text in gpu["left_out"]) + ".", ""]
        if later is not None:
            lines += [f"## GPU, {gpu['device']['name']}, revision {later['revision']}", "", machine(later), ""]
            lines += [f"- Tests marked gpu: {later['tests']['summary']}.", *(f"- {remark}" for remark in later["remarks"]), ""]
            lines += gpu_steps(later)
    return "\n".join(lines)


def gpu_steps(report: dict) -> list[str]:
    """The tables of all steps and of log-probs alone, by head."""
    lines, steps = [], report["steps"] + report.get("ops", [])
    for head in dict.fromkeys(result["head"] for result in steps):
        lines += [f"### The head of {head}", ""]
        for result in steps:
            lines += step_table(result, not red(report)) if result["head"] == head else []
    return lines


def gpu_figures(report: dict, later: dict | None) -> list[str]:
    """The README's table of a GPU: time and memory of the four kinds of step at the first head and length that were measured."""
    first = report["steps"][0]
    steps = [r for r in report["steps"] if (r["head"], r["size"]) == (first["head"], first["size"])]
    lines = [
        f"On a GPU ({report['device']['name']}, {first['dtype']}, the head of {first['head']}, {size_text(first['size'])}; "
        f"[data](benchmarks/results/{report['file']}), revision {report['revision']}), ms and MiB beyond the gradients:",
        "", "| | " + " | ".join(r["step"] for r in steps) + " |", "| --- |" + " --- |" * len(steps),
        "| the matrix products alone | " + " | ".join(ms(r["products_seconds"]) for r in steps) + " |",
    ]  # fmt: skip
    again = {(r["head"], tuple(r["size"].values()), r["step"]): r for r in (later or {"steps": []})["steps"]}
    found = [again.get((r["head"], tuple(r["size"].values()), r["step"])) for r in steps]
    if any(found):
        cells = ["" if r is None else _gpu_cell(r["rows"][OURS], ratio=not red(later)) for r in found]
        place = f"[revision {later['revision']}](benchmarks/results/{later['file']})"
        lines.append(_gpu_row(f"**tisdpo one pass**, {place}", cells, "**"))
    whole = ("tisdpo one pass, one chunk", "torch.compile", "torch.compile, float32 logits", "plain torch", "plain torch, float32 logits")
    for name in (OURS, *whole, "TRL chunked", "Cut Cross-Entropy, exact"):
        cells = [_gpu_cell(r["rows"][name]) if "seconds" in r["rows"].get(name, {}) else "" for r in steps]
        bold = "**" if name == OURS else ""
        lines.append(_gpu_row(f"{bold}{name}{bold}", cells, bold))
    if any(found):
        products = ", ".join("-" if r is None else ms(r["products_seconds"]) for r in found)
        note = f"Revision {later['revision']} was timed in a later run, in which the products alone took {products} ms"
        x = "" if red(later) else "; x is the median of the quotients"
        lines += ["", f"{note}{x}. Its remarks: benchmarks/RESULTS.md."]
    for r in filter(None, (report, later)):
        if red(r):
            tests = r.get("tests", {"summary": "they were not run"})["summary"]
            told = f"At revision {r['revision']} not every GPU test was seen to pass ({tests}), so there is no ratio; "
            lines += ["", told + "why: benchmarks/RESULTS.md."]
    return ["", *lines]


def _gpu_cell(row: dict, ratio: bool = False) -> str:
    return f"{ms(row['seconds'])} ms, {row['extra_bytes'] / MIB:,.0f} MiB" + (f", {row['ratio']:.2f} x" if ratio else "")


def _gpu_row(name: str, cells: list[str], bold: str) -> str:
    return f"| {name} | " + " | ".join(bold + cell + bold if cell else "" for cell in cells) + " |"


def figures(reports: list[dict], end_to_end: list[dict], gpus: list[tuple[dict, dict | None]]) -> str:
    """The README's block: time and memory of both kinds of step from the files of the default size, a GPU's, whole training steps."""
    steps = [(report, step) for report in reports for step in report.get("steps", []) if step["step"] in ("no KL", "KL, online reference")]
    names = (OURS, "plain torch", "plain torch, float32 logits", "torch.compile", "TRL chunked")
    lines = [
        f"Time over the matrix products of the step (those of `torch.mm`; on a CPU ours may be faster), and MiB beyond the gradients, on "
        f"two cores of a CPU ({size_text(size_of(reports[0]))}; [all results](benchmarks/RESULTS.md)):",
        "", "| | " + " | ".join(f"**{name}**" if name == OURS else name for name in names) + " |", "| --- |" + " --- |" * len(names),
    ]  # fmt: skip
    for report, step in steps:
        file = f"[{report['dtype']}, {_cpu(report)}](benchmarks/results/{report['file']}), revision {report['revision']}"
        found = [(name, step["rows"].get(name, {})) for name in names]
        cells = [f"{row['ratio']:.2f} x, {row['extra_bytes'] / MIB:,.0f} MiB" if "ratio" in row else "" for _, row in found]
        cells[0] = f"**{cells[0]}**"
        lines.append(f"| {file}, {step['step']} | " + " | ".join(cells) + " |")
    half = [step["rows"] for report, step in steps if report["dtype"] == "bfloat16"][:2]
    if len(half) == 2:
        errors = [[max(row[name]["error"].values()) for row in half] for name in (OURS, "plain torch")]
        ours, plain = (f"{100 * a:.1f} % (with KL {100 * b:.1f} %)" for a, b in errors)
        lines += [
            "",
            f"Largest error of bfloat16 gradients, against float64: {ours}; plain torch, which rounds its logits, {plain}.",
        ]
    measured = {report["dtype"]: report for report in reversed(reports) if report.get("ops")}  # of the newest file
    lines += [text for report in reversed(measured.values()) for text in ("", log_probs(report))]
    lines += [line for both in gpus for line in gpu_figures(*both)] or ["", "On a GPU: not yet measured."]
    told = []
    for report in end_to_end:
        rows = report["steps"][0]["rows"]
        whole = [
            f"{rows[n]['tokens_per_second']:.0f} tokens/s and {rows[n]['peak_bytes'] / MIB:,.0f} MiB" for n in ("tisdpo", "TRL", "unfused")
        ]
        file = f"[data](benchmarks/results/{report['file']})"
        told.append("{}; TRL's trainer {}, plain torch {} ".format(*whole) + f"({_cpu(report)}; {file})")
    if told:
        step = end_to_end[0]["steps"][0]
        lines += [
            "",
            f"Whole DPO training steps of a small {step['model']} (V = {step['shape']['vocabulary']:,}, float32, two CPU cores) that all "
            f"take the same batch: {'. '.join(told)}. On a CPU TRL projects prompts and padding, too; on a GPU it need not.",
        ]
    return "\n".join(lines) + "\n"


def log_probs(report: dict) -> str:
    """README's sentence on log-probs alone, beside what other trainers use; of those whose time and memory are in the file."""
    rows = {result["step"]: result["rows"] for result in report["ops"]}
    measured = {
        step: {name: row for name, row in found.items() if "seconds" in row and row.get("extra_bytes") is not None}
        for step, found in rows.items()
    }

    def told(step: Step) -> str:
        found = measured.get(step.name, {})
        whole = [name for name in found if name.startswith(LOGITS) and not name.startswith("F.linear")]  # which has a place of its own
        whole = min(whole, key=lambda name: found[name]["seconds"], default="")
        names = {OUR_OPS: "", whole: f"the fastest with all logits at once, `{whole}`:", "TRL chunked": "TRL's chunked operator"}
        names |= {"F.linear_cross_entropy": "`F.linear_cross_entropy`", "F.linear_cross_entropy, one chunk": "the same in one chunk"}
        if step.op == "from logits":
            names = {OUR_OPS: "", "F.cross_entropy": "`F.cross_entropy`", "TRL selective_log_softmax": "TRL's `selective_log_softmax`"}
        rows = [(text, found[name]) for name, text in names.items() if name in found]
        cells = [f"{text} {ms(row['seconds'])} ms and {row['extra_bytes'] / MIB:,.0f} MiB".strip() for text, row in rows]
        return f"{cells[0]} ({'; '.join(cells[1:])})" if cells[1:] and OUR_OPS in found else ""

    parts = {
        "`token_logps` from logits, forward and backward,": Step(op="from logits"),
        "`linear_token_logps` without gradients": Step(op="scores"),
        "`linear_token_logps`, any gradient a token, forward and backward,": Step(op="log-probs"),
        "`linear_token_logps`, any gradient a token, frozen head (LoRA),": Step(op="log-probs", frozen=True),
        "`linear_nll_loss`, forward and backward,": Step(op="nll"),
    }
    found = [f"- {what} {text}" for what, step in parts.items() if (text := told(step))]
    where = report.get("where_ops") or (_where(report) if "device" in report else report["dtype"])
    return "\n".join([f"Log-probs alone, for other trainers ({where}; same sizes):", "", *(found or ["- not measured"])])


def _where(report: dict) -> str:
    file = f"[{report['dtype']}](benchmarks/results/{report['file']})"
    return f"{file}, {report['device']['cores']} cores of an {_cpu(report)}, revision {report['revision']}"


def with_figures(text: str, block: str) -> str:
    """README with the text between the marks replaced."""
    begin, end = MARKS
    if begin not in text or end not in text:
        raise SystemExit(f"README.md lacks the marks {begin} and {end}")
    return text[: text.index(begin) + len(begin)] + "\n\n" + block + "\n" + text[text.index(end) :]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the pages are not what the files give")
    args = parser.parse_args(argv)
    cpu = newest_of_each_size()
    if not (cpu and of_default_size(cpu[0]) and cpu[0]["dtype"] == "float32"):
        print(f"no cpu-float32-*.json of the default size in {RESULTS}; run python -m benchmarks.run", file=sys.stderr)
        return 2
    end_to_end = newest_of_each_cpu("end-to-end")
    gpus = newest_of_each_gpu()
    text = page(cpu, end_to_end, gpus)
    readme = with_figures(README.read_text(), figures([report for report in cpu if of_default_size(report)], end_to_end, gpus))
    if args.check:
        stale = [path.name for path, new in ((PAGE, text), (README, readme)) if not path.exists() or path.read_text() != new]
        stale += stale_plots(pictured(cpu))
        print(f"not what the JSON files give: {', '.join(stale)}; run python -m benchmarks.plot" if stale else "up to date")
        return int(bool(stale))
    PAGE.write_text(text)
    README.write_text(readme)
    for (part, _), report in pictured(cpu).items():
        PLOTTED[part](report)
    print(f"{PAGE}, {PLOTS}, {README}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
