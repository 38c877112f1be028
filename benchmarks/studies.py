"""The figures of docs/study.md, from what `tisdpo study` found.

    python -m benchmarks.studies runs/studies/claims    # keeps its results as results/study-claims.json and writes them into the page
    python -m benchmarks.studies                        # writes the page anew from the files in results/
    python -m benchmarks.studies --check                # says whether the page is what they give (exit code 1 if not); writes nothing

The page's own sentences stand outside the marked blocks and are never touched.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.measure import RESULTS
from tisdpo.intervals import decimals, estimate, number
from tisdpo.report import duration
from tisdpo.study.page import claim_as_text

PAGE = Path(__file__).parents[1] / "docs" / "study.md"
# of an arm: (title, where it stands in the results, its name there)
COLUMNS = (("true reward", "values", "reward"), ("right answers", "values", "right"), ("KL (nats)", "values", "kl"),
    ("lead", "leads", "lead"), ("AUC", "values", "auc"), ("signal / noise", "values", "signal_to_noise"))  # fmt: skip


def keep(directory: Path) -> Path:
    """Copies results.json of a finished study, without the single policies (those are in its results.csv), to results/study-<name>.json."""
    path = directory / "results.json"
    if not path.exists():
        raise SystemExit(f"{directory} holds no results.json; give the directory of a finished `tisdpo study`")
    results = json.loads(path.read_text())
    if str(results["environment"]["revision"]).endswith("-dirty"):
        raise SystemExit(
            f"{path} was made with changes that no revision holds ({results['environment']['revision']}); commit and run it again"
        )
    results["policies"] = len(results["policies"])
    kept = RESULTS / f"study-{results['name']}.json"
    kept.write_text(json.dumps(results, indent=1) + "\n")
    return kept


def block(results: dict) -> str:
    """Claims with verdicts, and the table of the arms, as Markdown."""
    made = results["environment"]
    lines = [
        f"`{results['command'].split(' output_dir=')[0]}`: {len(results['seeds'])} seeds, {results['policies']} policies, "
        f"{duration(results['seconds'])} of one core; {made['date']}, revision {made['revision']}; "
        f"data: `benchmarks/results/study-{results['name']}.json`. Every arm was searched over {_search(results)}.",
        "", "| claim | verdict | difference ± 95 % interval over seeds |", "| --- | --- | --- |",
    ]  # fmt: skip
    for claim in results["claims"]:
        claim = claim_as_text(claim, results["quality"])
        found = [_comparison(one) for one in claim["comparisons"]]
        expected = "" if claim["expected"] == "above 0" else f" *({claim['expected']})*"
        lines.append(f"| {claim['text']}{expected} | **{claim['verdict']}** | {'<br>'.join(found)} |")
    columns = [c for c in COLUMNS if any(_column(results, arm["name"], c) is not None for arm in results["arms"])]
    lines += ["", f"| policy | {' | '.join(title for title, *_ in columns)} | compute |", f"|{' --- |' * (len(columns) + 2)}"]
    digits = [decimals(_column(results, arm["name"], c) for arm in results["arms"]) for c in columns]
    flops = {arm: estimate(values["flop"].values()).mean for arm, values in results["values"].items()}
    for arm in results["arms"]:
        cells = [_cell(_column(results, arm["name"], c), n) for c, n in zip(columns, digits)]
        lines.append(f"| {arm['name']} | {' | '.join(cells)} | {flops[arm['name']] / flops[results['baseline']]:.1f} |")
    return "\n".join(lines)


def _comparison(one: dict) -> str:
    interval, verdict = f" ± {one['half']}" if one["half"] else "", f" ({one['verdict']})" if one["verdict"] else ""
    return f"{one['metric']}: {one['compare']} {one['figure']}{interval}{verdict}"


def _search(results: dict) -> str:
    values: dict[str, list] = {}
    for point in results["points"]:
        for key, value in point.items():
            values.setdefault(key, []).append(value)
    return " and ".join(f"{key} ({', '.join(f'{v:g}' for v in dict.fromkeys(found))})" for key, found in values.items()) or "nothing"


def _column(results: dict, arm: str, column: tuple):
    _, place, name = column
    return estimate(results[place].get(arm, {}).get(name, {}).values())


def _cell(found, digits: int) -> str:
    if found is None:
        return ""
    return number(found.mean, digits) + ("" if found.half_width is None else f" ± {number(found.half_width, digits)}")


def page(text: str) -> str:
    """The page with every block as its file gives it."""
    for path in sorted(RESULTS.glob("study-*.json")):
        results = json.loads(path.read_text())
        begin, end = (f"<!-- {results['name']}: {word} -->" for word in ("begin", "end"))
        if begin not in text or end not in text:
            raise SystemExit(f"{PAGE.name} lacks the marks {begin} and {end}")
        text = f"{text[: text.index(begin) + len(begin)]}\n{block(results)}\n{text[text.index(end) :]}"
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="*", type=Path, metavar="DIRECTORY", help="finished studies whose results are to be kept")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is not what the files give")
    args = parser.parse_args(argv)
    for directory in args.directories:
        print(f"kept as {keep(directory)}")
    text = PAGE.read_text()
    new = page(text)
    if args.check:
        print(f"docs/{PAGE.name} is " + ("what the files give" if new == text else "not what the files give: python -m benchmarks.studies"))
        return int(new != text)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
