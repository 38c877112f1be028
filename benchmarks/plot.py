"""RESULTS.md, its plots and the README's figures, from the JSON files in results/.

    python -m benchmarks.plot              # writes benchmarks/RESULTS.md, benchmarks/plots/*.svg and README's block of figures
    python -m benchmarks.plot --check      # says whether they are what the JSON files give (exit code 1 if not); writes nothing

Of every kind of file, size and CPU the newest is taken. Typed by hand are the reasons for losing rows (`tables`), and a row that is
lost without a reason stands in the table as such; and what a file says of itself (`note`, `remarks`), which is printed with it. A run whose
tests did not all pass has its times on the pages, and no ratios.
"""

import argparse
import sys

from benchmarks import readme, reports, tables
from benchmarks.measure import RESULTS, ROOT
from benchmarks.pictures import PLOTS, PLOTTED, stale_plots
from benchmarks.reports import cpu_text, machine

PAGE, README = ROOT / "benchmarks/RESULTS.md", ROOT / "README.md"


def page(cpu: list[dict], end_to_end: list[dict], gpus: list[tuple[dict, dict | None]]) -> str:
    """RESULTS.md. gpus: of each the newest report, and a later one of some of its steps or None (`reports.newest_of_each_gpu`)."""
    lines = [
        "# Results", "",
        "Made by `python -m benchmarks.plot` from the JSON files named below. What u is, how to read the tables and how to repeat them: "
        "[docs/benchmarks.md](../docs/benchmarks.md).", "",
    ]  # fmt: skip
    for report in cpu:
        where = f"{report['dtype']}, {cpu_text(report)}"
        where += "" if reports.of_default_size(report) else f", {tables.size_text(reports.size_of(report))}"
        what = "The loss step" if report.get("steps") else "Log-probs alone"
        lines += [f"## {what} on a CPU, {where}", "", machine(report), ""]
        drawn = [part for (part, _), of in reports.pictured(cpu).items() if of is report]
        if "steps" in drawn:
            name = f"steps-{report['dtype']}.svg"
            lines += [f"![time, memory and error of every kind of step](plots/{name})", ""]
        for result in report.get("steps", []):
            lines += tables.step_table(result)
        if report.get("ops"):
            lines += [f"### Log-probs alone, {where}", ""] if report.get("steps") else []
            lines += [report["parts_of"]["ops"], ""] if "ops" in report["parts_of"] else []
            for result in report["ops"]:
                lines += tables.step_table(result)
        if "roofline" in report:
            lines += [f"### Ceilings, {where}", ""]
            lines += [f"![roofline](plots/roofline-{report['dtype']}.svg)", ""] if "roofline" in drawn else []
            lines += [report["parts_of"]["roofline"], ""] if "roofline" in report["parts_of"] else []
            lines += tables.roofline_table(report["roofline"])
        if report.get("scaling"):
            lines += [f"### Scaling, {where}, no KL, trainable head", ""]
            lines += [f"![scaling](plots/scaling-{report['dtype']}.svg)", ""] if "scaling" in drawn else []
            lines += [report["parts_of"]["scaling"], ""] if "scaling" in report["parts_of"] else []
            lines += tables.scaling_table(report["scaling"])
    lines += ["## Where somebody else is faster", ""]
    lines += [
        "Providers of the same task that beat one pass in a table above, and how many times as fast they are (~: the ranges overlap):",
        "",
    ]
    every = [*cpu, *(report for both in gpus for report in both if report)]
    lines += [*tables.losing_rows(every), ""]
    lines += ["## Where somebody else takes less memory", "", "The smallest of the same task, where that is not one pass:", ""]
    lines += [*tables.rows_with_more_memory(every), ""]
    for report in end_to_end:
        lines += [f"## Whole training steps and scoring, float32, {cpu_text(report)}", "", machine(report), ""]
        lines += tables.end_to_end_tables(report)
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
            lines += ["### Ceilings, and the products and folds of 2048 rows of 128256", "", *tables.roofline_table(gpu["roofline"])]
        lines += tables.gpu_steps(gpu)
        if gpu.get("failed"):
            lines += ["Given up: " + "; ".join(gpu["failed"]) + ".", ""]
        if gpu.get("left_out"):
            lines += ["No time was left for: " + "; ".join(text.removesuffix(": no time left") for text in gpu["left_out"]) + ".", ""]
        if later is not None:
            lines += [f"## GPU, {gpu['device']['name']}, revision {later['revision']}", "", machine(later), ""]
            lines += [f"- Tests marked gpu: {later['tests']['summary']}.", *(f"- {remark}" for remark in later["remarks"]), ""]
            lines += tables.gpu_steps(later)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the pages are not what the files give")
    args = parser.parse_args(argv)
    cpu = reports.newest_of_each_size()
    if not (cpu and reports.of_default_size(cpu[0]) and cpu[0]["dtype"] == "float32"):
        print(f"no cpu-float32-*.json of the default size in {RESULTS}; run python -m benchmarks.run", file=sys.stderr)
        return 2
    end_to_end = reports.newest_of_each_cpu("end-to-end")
    gpus = reports.newest_of_each_gpu()
    text = page(cpu, end_to_end, gpus)
    block = readme.figures(cpu, end_to_end, gpus)
    front = readme.with_figures(README.read_text(), block)
    if args.check:
        stale = [path.name for path, new in ((PAGE, text), (README, front)) if not path.exists() or path.read_text() != new]
        stale += stale_plots(reports.pictured(cpu))
        print(f"not what the JSON files give: {', '.join(stale)}; run python -m benchmarks.plot" if stale else "up to date")
        return int(bool(stale))
    PAGE.write_text(text)
    README.write_text(front)
    for (part, _), report in reports.pictured(cpu).items():
        PLOTTED[part](report)
    print(f"{PAGE}, {PLOTS}, {README}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
