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
from tisdpo.study.config import OF_ONE
from tisdpo.study.page import best_settings, claim_as_text, setting, wall_as_text

PAGE = Path(__file__).parents[1] / "docs" / "study.md"
# of an arm: (title, where it stands in the results, its name there)
COLUMNS = (("true reward", "values", "reward"), ("right answers", "values", "right"), ("KL (nats)", "values", "kl"),
    ("lead", "leads", "lead"), ("AUC", "values", "auc"), ("signal / noise", "values", "signal_to_noise"))  # fmt: skip


def keep(directory: Path) -> Path:
    """Copies results.json of a finished study to results/study-<name>.json.

    Of every policy it keeps the final metrics, and of every arm those of its base model.
    """
    path = directory / "results.json"
    if not path.exists():
        raise SystemExit(f"{directory} holds no results.json; give the directory of a finished `tisdpo study`")
    results = json.loads(path.read_text())
    if str(results["environment"]["revision"]).endswith("-dirty"):
        raise SystemExit(
            f"{path} was made with changes that no revision holds ({results['environment']['revision']}); commit and run it again"
        )
    base: dict[str, dict] = {}
    for policy in results["policies"]:
        base.setdefault(policy["arm"], {})[policy["seed"]] = _known(policy["base"])
    results["base"] = base
    results["policies"] = [
        {"arm": p["arm"], "point": p["point"], "seed": p["seed"], "metrics": _known(p["metrics"])} for p in results["policies"]
    ]
    kept = RESULTS / f"study-{results['name']}.json"
    kept.write_text(json.dumps(results, indent=1) + "\n")
    return kept


def _known(metrics: dict) -> dict:
    return {name: metrics[name] for name in OF_ONE if metrics.get(name) is not None}


def block(results: dict) -> str:
    """Claims with verdicts, and the table of the arms, as Markdown."""
    made, policies = results["environment"], results["policies"]
    policies = policies if isinstance(policies, int) else len(policies)  # until 2026-11-25 their number alone was kept
    wall = f" ({wall_as_text(results['wall'])}, {made['cpu']})" if results.get("wall") else ""
    lines = [
        f"`{results['command'].split(' output_dir=')[0]}`: {len(results['seeds'])} seeds, {policies} policies, "
        f"{duration(results['seconds'])} of one core{wall}; {made['date']}, revision {made['revision']}; "
        f"data: `benchmarks/results/study-{results['name']}.json`. Searched for every arm: {_search(results)}."
        + (f" Corrected afterwards, {results['corrected']}" if "corrected" in results else ""),
        "", "| claim | verdict | difference ± 95 % interval over seeds |", "| --- | --- | --- |",
    ]  # fmt: skip
    for claim in results["claims"]:
        claim = claim_as_text(claim, results["data"]["kind"])
        found = [_comparison(one) for one in claim["comparisons"]]
        expected = "" if claim["expected"] == "above 0" else f" *({claim['expected']})*"
        lines.append(f"| {claim['text']}{expected} | **{claim['verdict']}** | {'<br>'.join(found)} |")
    arms = [arm["name"] for arm in results["arms"] if "evaluation.data" not in arm["overrides"]]  # those are policies of other rows
    columns = [c for c in COLUMNS if any(_column(results, arm, c) is not None for arm in arms)]
    titles = [f"lead over {results['baseline']}" if name == "lead" else title for title, _, name in columns]
    best, costs = best_settings(results), results["costs"]["arms"]
    titles += ["compute", "with its search", *(f"best {key.rsplit('.', 1)[-1].replace('_', ' ')} (seeds)" for key in best)]
    lines += ["", f"| policy | {' | '.join(titles)} |", f"|{' --- |' * (len(titles) + 1)}"]
    digits = [decimals(_column(results, arm, c) for arm in arms) for c in columns]
    baseline = costs[results["baseline"]]
    for arm in arms:
        cells = [_cell(_column(results, arm, c), n) + _over(results, arm, c) for c, n in zip(columns, digits)]
        cells += [f"{costs[arm][count] / baseline[count]:.1f}" for count in ("one", "search")]
        lines.append(f"| {arm} | {' | '.join([*cells, *(values[arm] for values in best.values())])} |")
    return "\n".join(lines)


def _over(results: dict, arm: str, column: tuple) -> str:
    """Which frontier a lead is over, where it is not the baseline's."""
    over = results["leads"].get(arm, {}).get("over", results["baseline"])
    return f" over {over}" if column[2] == "lead" and over != results["baseline"] else ""


def _comparison(one: dict) -> str:
    interval, verdict = f" ± {one['half']}" if one["half"] else "", f" ({one['verdict']})" if one["verdict"] else ""
    return f"{one['metric']}: {one['compare']} {one['figure']}{interval}{verdict}"


def _search(results: dict) -> str:
    values: dict[str, list] = {}
    for point in results["points"]:
        for key, value in point.items():
            values.setdefault(key, []).append(value)
    return " and ".join(f"{key} ({', '.join(map(setting, dict.fromkeys(found)))})" for key, found in values.items()) or "nothing"


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
