"""The tables of RESULTS.md, and who is named as faster or smaller than this library, with the reason."""

from benchmarks.measure import MIB, floor
from benchmarks.registry import OUR_OPS, OURS, Step
from benchmarks.reports import cpu_text, red

# Why a provider is faster than one pass somewhere: (how its name begins, what must hold of the size, the reason)
WHOLE = ("plain torch", "torch.compile")
LOGITS = (*WHOLE, "F.cross_entropy", "F.linear_cross_entropy, one chunk", "TRL selective_log_softmax")
KEEPS = (
    "all logits are kept for the backward, so there are three products of one call each; here there are four, or, for H / 2 to H rows (of "
    "bfloat16 2 H; of float32 since revision 3b0ebc1), three in chunks"
)
AT_ONCE = "all logits at once, so each product is one call; here they come in chunks"
REASONS_OF_OPS = {  # by kind of step
    Step(op="log-probs").name: [(LOGITS, KEEPS)],
    **{step.name: [(LOGITS, AT_ONCE)] for step in (Step(op="scores"), Step(op="nll"), Step(op="log-probs", frozen=True))},
}
REASONS = [
    (WHOLE, lambda size: size["tokens"] * size["vocabulary"] > 1 << 23,
     "all logits at once, so each product is one call, and of 16 bits logits and sums are rounded; in chunks the head is packed anew "
     "for each, and dWeight, where it is summed in float32 (not for up to 2 H rows of 16 bits, nor, since revision 49877a4, H of "
     "float32), read and written (NOTES.md). One pass in one chunk is the row of that name, and between it and these rows the order "
     "changes from run to run; the budget is yours: TISDPO_CHUNK_MIB"),
    (WHOLE, lambda size: size["tokens"] * size["vocabulary"] <= 1 << 23,
     "few logits: they fit into the cache, nothing is saved by chunks, and the fixed cost of the operators counts"),
]  # fmt: skip
ON_GPU = "logits rounded to 16 bits, which halves the traffic of the softmax, and all of them at once, so that each product is one call"

# rows of our own beside the one that is compared: forms of one pass on a GPU (NOTES.md, 2026-11-27)
OWN_FORMS = ("tisdpo", "both products in one program", "logits and folds")


def ours_of(result: dict) -> str:
    """Our row of a table."""
    return OUR_OPS if result.get("op") else OURS


def others(result: dict) -> list[tuple[str, float]]:
    """Providers of the same task, and how many times as fast they were, by the medians of the times or of the ratios, whichever is more."""
    ours, found = result["rows"].get(ours_of(result), {}), []
    for name, row in result["rows"].items():
        factors = [ours[by] / row[by] for by in ("seconds", "ratio") if by in ours and by in row]
        if factors and not name.startswith(OWN_FORMS) and row.get("task") == "TIS-DPO":
            found.append((name, max(factors)))
    return found


def lost(result: dict) -> list[tuple[str, float]]:
    """Those of `others` that were faster."""
    return [(name, factor) for name, factor in others(result) if factor > 1]


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
    """Every row of the published tables in which somebody who computes the same task is faster, by reason: table, who, how much."""
    found: dict[str, dict[str, list[str]]] = {}
    for report in reports:
        curves = [(point, f"curve of {name}") for name, c in report.get("scaling", {}).items() for point in c["points"]]
        for result, where in [(r, r["step"]) for r in report.get("steps", []) + report.get("ops", [])] + curves:
            for name, factor in lost(result):
                reason = ON_GPU if "sms" in report.get("device", {}) and name.startswith(WHOLE) else why(name, result)
                close = "~" if result["rows"][name]["p80"] > result["rows"][ours_of(result)]["p20"] else ""
                much = " (not all GPU tests passed, see there)" if red(report) else f" {factor:.2f}{close}"
                row = f"{result['dtype']}{_on(report)}, {where}, {size_text(result['size'])}"
                found.setdefault(reason, {}).setdefault(row, []).append(name + much)
    told = {reason: [f"  - {row}: {', '.join(who)}" for row, who in rows.items()] for reason, rows in found.items()}
    return [line for reason, rows in told.items() for line in (f"- {reason[0].upper()}{reason[1:]}.", *rows)] or ["None."]


def counted(reports: list[dict]) -> tuple[int, int]:
    """(kinds of step, each at a size on a machine, in which somebody of the same task was faster, all of them), curves left out."""
    results = [result for report in reports for result in report.get("steps", []) + report.get("ops", [])]
    results = [result for result in results if ours_of(result) in result["rows"]]
    return sum(bool(lost(result)) for result in results), len(results)


def rows_with_more_memory(reports: list[dict]) -> list[str]:
    """By kind of step, who computes the same task in less memory than one pass, by more than 1 MiB: the one with the least."""
    lines = []
    for report in reports:
        for result in report.get("steps", []) + report.get("ops", []):
            rows = {name: row for name, row in result["rows"].items() if row.get("extra_bytes") is not None and "seconds" in row}
            peers = [n for n, row in rows.items() if not n.startswith(OWN_FORMS) and row.get("task") == "TIS-DPO"]
            least, ours = min(peers, key=lambda n: rows[n]["extra_bytes"], default=None), rows.get(ours_of(result))
            if least and ours and rows[least]["extra_bytes"] + MIB < ours["extra_bytes"]:
                mib, times = (f"{x['extra_bytes'] / MIB:,.0f} MiB" for x in (rows[least], ours)), rows[least]["seconds"] / ours["seconds"]
                row = f"{result['dtype']}{_on(report)}, {result['step']}, {size_text(result['size'])}"
                lines.append(f"- {row}: {least} {' instead of '.join(mib)}, in {times:.2g} times as long")
    return lines or ["None."]


def _on(report: dict) -> str:
    """Which machine, among rows of several."""
    return f", {report['device']['name'] if 'sms' in report['device'] else cpu_text(report)}"


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
            found = [f"{name} {longest_text(row)}" for name, row in rows.items()]
            lines.append(f"- {task}: " + ", ".join(found))
    return [*lines, ""]


def longest_text(row: dict) -> str:
    return f"more than {row['points'][-1][0]:,}" if row["longest"] is None else f"{row['longest']:,}"


def gpu_steps(report: dict) -> list[str]:
    """The tables of all steps and of log-probs alone, by head."""
    lines, steps = [], report["steps"] + report.get("ops", [])
    for head in dict.fromkeys(result["head"] for result in steps):
        lines += [f"### The head of {head}", ""]
        for result in steps:
            lines += step_table(result, not red(report)) if result["head"] == head else []
    return lines
