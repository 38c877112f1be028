"""Studies at their smallest: all policies under one search, results and page, resuming after an interruption, verdicts on claims."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from test_pipeline import SMALL

from tisdpo import cli
from tisdpo.config import load_config
from tisdpo.doctor import cpu_name
from tisdpo.errors import InputError
from tisdpo.study import frontiers
from tisdpo.study.config import PLACES, load_study
from tisdpo.study.costs import Tokens, costs
from tisdpo.study.page import best_settings, claim_as_text
from tisdpo.study.results import _wall, note_wall
from tisdpo.study.shared import StudyRun, data_settings, identity

STUDIES = sorted(path.stem for path in PLACES[1].glob("*.yaml"))
STUDY = {
    "base": {"run": "small.yaml", "train.learning_rate": 1e-2},
    "seeds": 2,
    "jobs": 1,
    "search": {"objective.beta": [0.5, 1.0]},
    "arms": {
        "DPO": {"method": "dpo"},
        "(S)": {"method": "S", "note": "two SFT models"},
        "k 2": {"method": "S", "overrides": {"weighting.k": 2}, "search": {"objective.beta": [0.25, 0.5]}, "against": "(S)", "group": "k"},
    },
    "claims": [
        {"text": "Weights help.", "compare": "(S) - DPO", "metric": ["lead", "reward"]},
        {"text": "k is a factor on beta.", "compare": "k 2 - (S)", "metric": ["lead", "reward"], "expect": "equal", "within": 1e-9},
        {"text": "It rises.", "compare": ["DPO - (S)", "k 2 - (S)", "(S) - (S)"], "expect": "rising"},
        {"text": "The contrast says something.", "compare": "(S) - 0.5", "metric": "auc"},
    ],
}


def written(tmp_path, **changes) -> str:
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
    return str(tmp_path / "tiny.yaml")


def made(directory) -> dict[str, int]:
    """When each model and each policy of the study was written."""
    return {str(p): p.stat().st_mtime_ns for name in ("*.safetensors", "policy.json") for p in directory.rglob(name)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that was interrupted and went on, then in two processes: (directory, what the first and what the second try left)."""
    from tisdpo import estimation, pipeline

    tmp_path, calls = tmp_path_factory.mktemp("study"), []
    directory = tmp_path / "out"
    arguments = ["study", written(tmp_path), f"output_dir={directory}"]
    with pytest.MonkeyPatch.context() as patch:
        real = pipeline.train_stage

        def dies_at_the_ninth(*args, **options):
            calls.append(1)
            if len(calls) == 9:
                raise KeyboardInterrupt
            return real(*args, **options)

        for module in (estimation, pipeline):
            patch.setattr(module, "train_stage", dies_at_the_ninth)
        assert cli.main(arguments) == 130
    first = made(directory)
    assert cli.main([*arguments, "jobs=2"]) == 0
    second = made(directory)
    assert cli.main(arguments) == 0 and made(directory) == second  # nothing was left to do
    return directory, first, second


def test_an_interrupted_study_goes_on(finished):
    _, first, second = finished
    assert len(first) >= 8 and {path: second[path] for path in first if path in second} == {p: t for p, t in first.items() if p in second}
    models = {Path(path).parts[-3].rsplit("-", 1)[0] for path in second if path.endswith("safetensors")}
    assert models == {"base", "contrastive-sft-chosen", "contrastive-sft-rejected"}
    assert len(second) == 2 * (1 + 2 + 3 * 2)  # base, two SFT models and figures of three arms at two points, all once


def test_results_hold_every_policy_and_claim(finished):
    directory, *_ = finished
    results = json.loads((directory / "results.json").read_text())
    assert len(results["policies"]) == 3 * 2 * 2 and results["quality"] == "reward"
    claims = {claim["text"]: claim for claim in results["claims"]}
    k = claims["k is a factor on beta."]
    assert k["verdict"] == "confirmed" and all(set(c["differences"].values()) == {0.0} for c in k["comparisons"])
    assert [len(claim["comparisons"]) for claim in results["claims"]] == [2, 2, 4, 1]
    (auc,) = claims["The contrast says something."]["comparisons"]
    assert auc["mean"] == pytest.approx(sum(auc["differences"].values()) / 2) and auc["half_width"] > 0
    lead, _ = claims["Weights help."]["comparisons"]
    assert lead["differences"] == results["leads"]["(S)"]["lead"]
    for policy in results["policies"]:
        assert len(policy["points"]) == 2 and (policy["weights"] is not None) == (policy["arm"] in ("(S)", "k 2"))
        assert policy["metrics"]["flop"] == pytest.approx(math.fsum(cost["flop"] for cost in policy["costs"]))
        assert len(policy["curves"]["step"]) == len(policy["curves"]["rewards/chosen"])
    cost = results["costs"]["arms"]
    assert cost["(S)"]["contrastive"] > 0 and cost["DPO"]["one"] == cost["DPO"]["policy"]
    own = math.fsum(c["flop"] for p in results["policies"] if p["arm"] == "(S)" for c in p["costs"] if c["stage"] == "policy") / 2
    assert cost["(S)"]["shared"] == pytest.approx(cost["(S)"]["search"] - own)  # all but the training of its own policies
    assert not list(directory.rglob("policies/*/model"))


def test_results_say_how_long_it_took_by_the_clock_and_on_what(finished):
    directory, *_ = finished
    results = json.loads((directory / "results.json").read_text())
    calls = json.loads((directory / "wall.json").read_text())
    assert [call["jobs"] for call in calls] == [1, 2]  # the third call had nothing to do
    assert sum(call["policies"] for call in calls) == 12 and all(call["seconds"] > 0 for call in calls)
    assert results["wall"] == {"seconds": pytest.approx(sum(call["seconds"] for call in calls)), "calls": 2, "jobs": [1, 2]}
    assert cpu_name() in results["environment"]["cpu"]
    assert results["environment"]["vectors"] == torch.backends.cpu.get_cpu_capability()
    assert "by the clock in 2 calls, 1 or 2 jobs" in (directory / "study.html").read_text()


def test_the_time_by_the_clock_is_not_guessed(tmp_path):
    assert _wall(tmp_path, 3) is None
    note_wall(tmp_path, 5.0, 2, jobs=2)
    assert _wall(tmp_path, 3) is None  # a call that was killed finished the third
    note_wall(tmp_path, 1.5, 1, jobs=2)
    assert _wall(tmp_path, 3) == {"seconds": 6.5, "calls": 2, "jobs": [2]}


def test_the_table_has_a_row_for_every_policy(finished):
    directory, *_ = finished
    rows = list(csv.DictReader((directory / "results.csv").open()))
    assert len(rows) == 12 and {(r["arm"], r["objective.beta"]) for r in rows if r["arm"] == "k 2"} == {("k 2", "0.25"), ("k 2", "0.5")}
    assert {r["method"] for r in rows} == {"dpo", "S"} and all(float(r["flop"]) > 0 and r["reward"] for r in rows)
    assert all(bool(r["auc"]) == (r["method"] == "S") for r in rows)


def test_the_page_shows_claims_frontiers_costs_and_the_command(finished):
    page = (finished[0] / "study.html").read_text()
    for part in (
        'id="claims"',
        'id="frontiers"',
        'id="curves"',
        'id="costs"',
        'id="compute-',
        "tisdpo study",
        "k is a factor on beta.",
        "two SFT models",
        "compared with (S)",
        "Share of sampled responses that ended by themselves.",
        "from a synthetic world in which the reward of every token is known",
        "Implicit reward of rejected",
    ):
        assert part in page
    assert page.count("<svg") > 6 and "http" not in page.split("</style>")[1]


def test_the_page_says_where_the_best_points_lie(finished):
    results, page = json.loads((finished[0] / "results.json").read_text()), (finished[0] / "study.html").read_text()
    results["values"]["k 2"]["point"], results["values"]["DPO"]["point"] = {"0": 1, "1": 1}, {"0": 1, "1": 0}
    best = best_settings(results)
    assert list(best) == ["objective.beta"]
    assert best["objective.beta"]["k 2"] == "0.5 (2)"  # a search of its own
    assert best["objective.beta"]["DPO"] == "0.5 (1), 1 (1)" and "Where the best points lie" in page


@pytest.mark.parametrize("name", STUDIES)
def test_the_studies_of_the_examples_can_be_read(name):
    study = load_study(name)
    assert study.command == f"tisdpo study {name}" and len(study.claims) >= 4
    assert len(load_study(name, smoke=True).runs) == len(study.arms) and load_study(name, full=True).config.name == f"{name}-full"


def test_the_smoke_form_is_small():
    study = load_study("claims", smoke=True)
    assert study.config.name == "claims-smoke" and len(study.points) == 1 and study.config.seed_list == [0, 1]
    for run in study.runs.values():
        assert run.train.steps <= 4 and run.model.pretrain.steps <= 2 and run.evaluation.prompts <= 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arms": {}}, "arms is empty"),
        ({"arms": {"base": {"method": "dpo"}}}, "give the arm another name"),
        ({"arms": {"a": {"method": "dpoo"}}}, "did you mean dpo"),
        ({"arms": {"a": {"method": "dpo", "overrides": {"train.stepz": 3}}}}, "stepz"),
        ({"arms": {"a": {"method": "dpo", "overrides": {"objective.beta": 3}}}}, "search varies for all arms"),
        ({"arms": {"a": {"method": "dpo", "overrides": {"seeds": 3}}}}, "study itself sets"),
        ({"arms": {"a": {"method": "dpo", "against": "b"}}}, "none of the arms"),
        ({"arms": {"a": {"method": "dpo", "search": {"objective.beta": [1]}}}}, "must be a list of 2 values"),
        ({"arms": {"a": {"method": "dpo", "search": {"train.steps": [1, 2]}}}}, "does not vary"),
        ({"search": {"objective.beta": 3}}, "must be a list"),
        ({"baseline": "b"}, "baseline is 'b'"),
        ({"claims": [{"text": "t", "compare": "(S) - (T)"}]}, "no comparison"),
        ({"claims": [{"text": "t", "compare": "(S) - 1"}]}, "needs two arms"),
        ({"claims": [{"text": "t", "compare": "(S)", "metric": "rewards"}]}, "did you mean reward"),
        ({"claims": [{"text": "t", "compare": "(S) - DPO", "expect": "equal"}]}, "within belongs to expect"),
        ({"claims": [{"text": "t", "compare": "(S) - DPO", "expect": "rising"}]}, "two or more comparisons"),
        ({"base": {"run": "small.yaml", "seeds": 3}}, "set by the study itself"),
        ({"base": {"run": "small.yaml", "evaluation.checkpoints": 0}}, "at least 1: a frontier"),
        ({"base": {"run": "small.yaml", "train.batch_size": 32, "train.tokens_per_batch": 999}}, "train.tokens_per_batch is not for it"),
        ({"jobs": 0}, "jobs must be"),
        ({"seeds": [1, 1]}, "different seeds"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, message):
    study = written(tmp_path, **({"claims": []} | changes))
    with pytest.raises(InputError, match=message):
        load_study(study)


def test_a_study_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="did you mean claims"):
        load_study("claim")
    with pytest.raises(InputError, match="there is no file"):
        load_study(tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match="no section full"):
        load_study(written(tmp_path), full=True)


# Frontiers and verdicts


def line(slope: float, end: float = 4.0):
    """Reward slope * root of the KL, up to a KL."""
    return [(0.0, 0.0), (1.0, slope), (end, slope * math.sqrt(end))]


def test_the_lead_is_the_mean_distance_on_the_root_axis():
    first, second = {0: [line(3.0)], 1: [line(3.0)]}, {0: [line(2.0)], 1: [line(1.0, end=9.0)]}
    assert frontiers.reach(first, second) == 4.0
    assert frontiers.lead(first, second) == pytest.approx({0: 1.0, 1: 2.0})  # over roots of 0..2, a mean distance of slope * 1
    assert frontiers.lead_at(first, second, None) == pytest.approx({0: 2.0, 1: 4.0})


def test_a_seed_does_not_choose_its_own_search_point():
    lines = {0: [line(5.0), line(2.0)], 1: [line(1.0), line(2.0)]}
    assert frontiers.frontier(lines, 0)[-1] == (4.0, 4.0)  # seed 1 says the second point, though the first shines here
    assert frontiers.frontier(lines, 1)[-1] == (4.0, 2.0)  # and seed 0 the first
    assert frontiers.best_point({0: [5.0, 2.0], 1: [1.0, 2.0]}, 0) == 1 and frontiers.best_point({0: [5.0, 2.0]}, 0) == 0


def test_a_frontier_is_what_is_earned_at_most_within_a_distance():
    near, far = [(0.0, 0.0), (1.0, 2.0), (4.0, 2.5)], [(0.0, 0.0), (4.0, 1.0), (9.0, 4.0), (16.0, 3.0)]
    assert frontiers.frontier({0: [near, far]}, 0) == [(0.0, 0.0), (1.0, 2.0), (9.0, 4.0)]  # (4, 2.5) lies below, (16, 3) beyond the best
    assert frontiers.frontier({0: [[(0.0, 1.0), (1.0, 0.5), (2.0, -3.0)]]}, 0) == [(0.0, 1.0)]  # who only loses stays where it was
    assert frontiers.reach({0: [near, far]}) == 16.0 and frontiers.frontier({0: [far, far]}, 0) == frontiers.frontier({0: [far]}, 0)
    here = [(0.0, 0.0), (9.0, 2.0), (4.0, 2.5)], far  # of this seed, which puts the first checkpoint beyond the last
    assert frontiers.frontier({0: here, 1: (near, far)}, 0) == [(0.0, 0.0), (9.0, 4.0)]


@pytest.mark.parametrize(
    "differences, expect, within, verdict",
    [
        ([1.0, 1.1, 0.9], "higher", None, "confirmed"),
        ([1.0, 1.1, 0.9], "lower", None, "opposite"),
        ([1.0, -1.1, 0.9], "higher", None, "unclear"),
        ([0.01, -0.01, 0.0], "equal", 0.05, "confirmed"),
        ([0.1, -0.1, 0.0], "equal", 0.05, "unclear"),
        ([0.1, 0.1001, 0.1], "equal", 0.05, "opposite"),
        ([1.0], "higher", None, "unclear"),
        ([0.0], "equal", 0.1, "unclear"),
        ([], "higher", None, "not measured"),
    ],
)
def test_a_verdict_needs_the_whole_interval(differences, expect, within, verdict):
    assert frontiers.judged(dict(enumerate(differences)), expect, within).verdict == verdict


@pytest.mark.parametrize(
    "verdict, expect, said",
    [
        ("unclear", "higher", "no clear difference"),
        ("opposite", "higher", "the opposite"),
        ("unclear", "equal", "not shown to be equal"),  # the interval may well lie on one side of 0
        ("opposite", "equal", "differs by more"),
        ("confirmed", "equal", "confirmed"),
    ],
)
def test_a_verdict_in_words(verdict, expect, said):
    one = {"compare": "A - B", "metric": "reward", "verdict": verdict, "differences": {"0": -0.05, "1": -0.03}}
    claim = {"text": "t", "expect": expect, "within": 0.05 if expect == "equal" else None, "verdict": "not confirmed", "comparisons": [one]}
    shown = claim_as_text(claim, "arithmetic")["comparisons"][0]
    assert shown["verdict"] == said and shown["metric"] == "true reward"
    assert claim_as_text(claim, "text")["comparisons"][0]["metric"] == "reward"
    one["metric"] = "lead_at_kl"
    assert claim_as_text(claim | {"kl": 1.0}, "text")["comparisons"][0]["metric"] == "lead at a KL of 1"


def test_a_trend_is_the_slope_of_every_seed():
    assert frontiers.slopes([{0: 1.0, 1: 0.0}, {0: 2.0, 1: 5.0}, {0: 3.0, 1: 1.0, 2: 7.0}]) == pytest.approx({0: 1.0, 1: 0.5})


def test_a_claim_depends_on_what_only_some_comparisons_show():
    assert [frontiers.overall(v) for v in (["confirmed"] * 2, ["confirmed", "unclear"], ["opposite"])] == [
        "confirmed", "depends on", "not confirmed",
    ]  # fmt: skip


# Cost


def total(tmp_path, method: str, *overrides) -> dict[str, float]:
    """Cost by part; 100 parameters, contrastive models 10; 5 pairs of 20 + 30 tokens, system prompts of 2 and 3."""
    (tmp_path / "small.yaml").write_text(SMALL)
    dpo = "contrast.dpo={steps: 3, batch_size: 4, learning_rate: 1e-3}"
    settings = [f"methods=[{method}]", f"contrast.constructions=[{method if len(method) == 1 else 'S'}]", dpo, *overrides]
    tokens = Tokens(5, 20.0, 30.0, (2, 3))
    found = {"contrastive": 0.0, "scoring": 0.0, "policy": 0.0}
    for cost in costs(load_config(tmp_path / "small.yaml", settings), tokens, tokens, 100, 10):
        found[cost["part"]] += cost["flop"]
    return found


def test_costs_are_tokens_times_parameters(tmp_path):
    policy = 16 * 50 * 6 * 100 + 5 * 50 * 2 * 100  # four steps of four pairs, and the reference once
    sft, scoring, dpo, asked = 8 * 50 * 6 * 10, 2 * 5 * 50 * 2 * 10, 12 * 50 * 6 * 10, 5 * 50 * 2 * 10
    assert total(tmp_path, "dpo") == {"contrastive": 0, "scoring": 0, "policy": policy}
    assert total(tmp_path, "S") == total(tmp_path, "random") == {"contrastive": sft, "scoring": scoring, "policy": policy}
    assert total(tmp_path, "D") == {"contrastive": 2 * dpo, "scoring": scoring, "policy": policy}  # its reference is asked already
    assert total(tmp_path, "R") == {"contrastive": dpo, "scoring": scoring, "policy": policy}
    assert total(tmp_path, "R", "objective.kl=reverse")["contrastive"] == dpo + asked
    small = "contrast.model={hidden_size: 8, heads: 2, layers: 1, pretrain: {steps: 2, batch_size: 4, learning_rate: 1e-3}}"
    assert total(tmp_path, "D", small) == {"contrastive": 2 * dpo + asked, "scoring": scoring, "policy": policy}
    assert total(tmp_path, "P") == {"contrastive": 0, "scoring": (2 * 5 * 50 + 5 * 2 * 5) * 2 * 10, "policy": policy}
    assert total(tmp_path, "S", "objective.kl=reverse")["policy"] == 16 * 50 * (6 + 2) * 100
    assert total(tmp_path, "S", "contrast.pairs=3") == {"contrastive": 3 * sft, "scoring": 3 * scoring, "policy": policy}
    assert total(tmp_path, "S", "contrast.checkpoints=3") == {"contrastive": sft, "scoring": 3 * scoring, "policy": policy}
    folds = total(tmp_path, "S", "contrast.pairs=3", "contrast.crossfit=true")
    assert folds["contrastive"] == 3 * sft and folds["scoring"] == pytest.approx(scoring)
    assert total(tmp_path, "D", "contrast.rounds=2") == {"contrastive": 4 * dpo + asked, "scoring": 2 * scoring, "policy": policy}


# What is shared


@pytest.mark.parametrize(
    "change, apart",
    [
        ("train.steps=3", {"policy/S"}),
        ("weighting.upper=1", {"policy/S", "weights/S"}),
        ("contrast.smooth=3", {"policy/S", "weights/S"}),
        ("contrast.pairs=2", {"policy/S", "weights/S"}),
        ("contrast.sft.steps=3", {"policy/S", "weights/S", "scored/S", "contrastive/sft-chosen"}),
        ("contrast.checkpoints=2", {"policy/S", "weights/S", "scored/S", "contrastive/sft-chosen"}),
        ("data.world={flip: 0.1}", {"policy/S", "weights/S", "scored/S", "contrastive/sft-chosen"}),
        ("data.world={people: 0.1}", {"policy/S", "weights/S", "scored/S", "contrastive/sft-chosen", "base", "contrastive/base"}),
        ("contrast.constructions=[S, P]", set()),
        ("threads=2", set()),
    ],
)
def test_a_stage_is_shared_exactly_where_nothing_it_depends_on_differs(tmp_path, change, apart):
    (tmp_path / "small.yaml").write_text(SMALL)
    runs = [StudyRun(load_config(tmp_path / "small.yaml", ["methods=[S]", *more]), 0, tmp_path / "out") for more in ([], [change])]
    stages = ("base", "contrastive/base", "contrastive/sft-chosen", "scored/S", "weights/S", "policy/S")
    assert {stage for stage in stages if runs[0].place(stage) != runs[1].place(stage)} == apart


def test_another_content_of_a_file_is_another_policy(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    file, names = tmp_path / "pairs.jsonl", []
    for content in ("a", "b", "a"):
        file.write_text(content)
        run = load_config(tmp_path / "small.yaml", ["methods=[S]", f"data={{source: {file}, max_length: 64}}"])
        names.append((identity(run, 0), data_settings(run.data)["content"]))
    assert names[0] == names[2] and names[0][0] != names[1][0] and names[0][1] != names[1][1]
    run = load_config(tmp_path / "small.yaml", ["methods=[S]", f"contrast.data={{source: {file}, max_length: 64}}"])
    places = []
    for content in ("a", "b"):
        file.write_text(content)
        study_run = StudyRun(run, 0, tmp_path / "out")
        places.append([study_run.place(stage) for stage in ("contrastive/sft-chosen", "scored/S", "weights/S")])
    assert all(a != b for a, b in zip(*places))
    assert "content" not in data_settings(load_config(tmp_path / "small.yaml").data)  # of a world there is no file


def test_every_named_study_is_where_it_is_looked_for():
    assert {"claims", "sensitivity", "closing", "noise", "cost", "transfer"} <= set(STUDIES)
    assert all(Path(place).parts[-2:] == ("examples", "studies") for place in PLACES)
