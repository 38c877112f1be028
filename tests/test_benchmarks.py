"""The benchmarks measure what they say, their pages are what their files give; and a short suite for `pytest --benchmark-only`."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from benchmarks import baselines, device, end_to_end, measure, pictures, plot, readme, reports, roofline, run, studies, tables
from benchmarks.registry import (
    ALL_MODES,
    MODES,
    OP_STEPS,
    OUR_OPS,
    OURS,
    PROVIDERS,
    SMOKE,
    TASKS,
    Problem,
    Size,
    Step,
    fused,
    plain,
    relative_error,
)
from tisdpo import reference

HERE = [p for p in PROVIDERS if not p.missing("cpu") and not p.name.startswith("torch.compile")]


@pytest.mark.parametrize("step", [*ALL_MODES, *OP_STEPS], ids=lambda s: s.name)
@pytest.mark.parametrize("masked", [0.0, 0.3])
def test_everybody_agrees_with_float64(step, masked):
    size = Size(40, 16, 211, pairs=2, masked=masked)
    problem, took_part = Problem(size), 0
    for provider in HERE:
        if provider.missing("cpu", step, size):
            continue
        took_part += 1
        truth = problem.truth(provider.task, step)
        for x, y in zip(problem.run(provider, step), truth):
            assert (x is None) == (y is None)
            assert x is None or relative_error(x, y) < 1e-5, provider.name
    assert (took_part == 0) if masked and step.op else (took_part > 2)


OF_TASKS = [(task, step) for task in TASKS for step in (Step(), Step(kl="reverse"), Step(frozen=True))]
OF_TASKS += [("TIS-DPO", step) for step in OP_STEPS]


@pytest.mark.parametrize(("task", "step"), OF_TASKS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_the_truth_pair_by_pair_is_that_of_the_whole(task, step):
    """The oracle of the measured errors, against autograd of one plain loss of all pairs."""
    problem = Problem(Size(40, 16, 211, pairs=3))
    whole = problem.double().run(TASKS[task], step)
    for found, expected in zip(problem.truth(task, step), whole):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_truth_is_the_reference():
    """What judges everybody, `plain`, against the package's oracle."""
    p = Problem(Size(40, 16, 211, pairs=2), torch.float64)
    logits, ref_logits = p.hidden @ p.weight.T, p.ref_hidden @ p.ref_weight.T
    for kl in ("reverse", "forward"):
        expected = reference.tis_dpo_losses(logits, ref_logits, p.target, p.cu_seqlens, p.token_weights, kl=kl).mean()
        torch.testing.assert_close(plain(p, Step(kl=kl)), expected)


def test_masked_tokens_count_for_nothing():
    """The masked problem has the loss of the problem without its ignored rows."""
    p = Problem(Size(40, 16, 211, pairs=2, masked=0.4), torch.float64)
    kept = p.target != -100
    q = object.__new__(Problem)
    counts = [int(part.sum()) for part in kept.split(p.cu_seqlens.diff().tolist())]
    q.__dict__ = vars(p) | {name: getattr(p, name)[kept] for name in ("hidden", "ref_hidden", "target", "token_weights", "ref_logps")}
    q.size, q.cu_seqlens = Size(int(kept.sum()), 16, 211, 2), torch.tensor([0, *counts]).cumsum(0)
    for step in (Step(), Step(kl="forward")):
        torch.testing.assert_close(plain(p, step), plain(q, step))


def test_a_wrong_provider_is_not_timed():
    def wrong(p, step):
        return fused(p, step) * 1.01

    from benchmarks.registry import Provider

    result = measure.compare(SMOKE, Step(), [Provider("wrong", wrong), PROVIDERS[0]], 2, "cpu", torch.float32)
    assert "so it was not timed" in result["rows"]["wrong"]["failed"]
    assert "seconds" not in result["rows"]["wrong"]
    assert result["rows"][OURS]["seconds"] > 0


def test_exponents():
    def points(law, values):
        return [{"value": v, "rows": {"x": {"seconds": law(v)}}} for v in values]

    cubic = run.fit("tokens", points(lambda v: 1e-9 * v**3, (128, 256, 512, 1024)), "x")
    assert cubic["exponent"] == pytest.approx(3)
    shares = (0.0, 0.25, 0.5, 0.75, 0.9)
    assert run.fit("masked", points(lambda share: 7.0 * (1 - share), shares), "x")["departure"] == pytest.approx(0)
    assert run.fit("masked", points(lambda share: 7.0, shares), "x")["departure"] == pytest.approx(0.9)


def test_unfused_equations_at_one_pair():
    """The baseline on the reference's own functions, on a tiny model."""
    shape, batch = end_to_end.SMOKE, end_to_end.Batch(2, 6)
    for weighted in (False, True):
        losses = [make(shape, batch, weighted)[1]().item() for make in (end_to_end.ours, end_to_end.unfused)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    model = end_to_end.model(shape, 0)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = reference.token_logps(model(ids).logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(baselines.score(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0], expected)


def test_trl_without_its_log_computes_log_probs_alone(monkeypatch):
    utils = pytest.importorskip("trl.trainer.utils", reason="needs the extra trl")
    if not hasattr(utils, "_ChunkedLogProbFunction"):
        pytest.skip("TRL before 1.15, which Python 3.10 gets: its head is another one, and the benchmark leaves it out")
    asked, own = [], utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", lambda *args: (asked.append(args[-1]), own(*args))[1])
    shape, batch = end_to_end.SMOKE, end_to_end.Batch(2, 6)
    losses, outputs = [], []
    for make in (end_to_end.trl, end_to_end.trl_without_its_log):
        losses.append(make(shape, batch, False)[1]().item())
        outputs.append(set(asked))
        asked.clear()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert any("entropy" in names for names in outputs[0]) and outputs[1] == {("log_probs",)}


def test_where_memory_reaches_the_limit():
    assert end_to_end._crossing([(256, 10), (512, 30)], 20) == 384
    assert end_to_end._crossing([(256, 10), (512, 15)], 20) is None
    assert end_to_end._crossing([(256, 30)], 20) == 0


def test_the_pages_are_what_the_files_give(capsys):
    if not reports.newest_of_each_size():
        pytest.skip("nothing measured yet")
    assert plot.main(["--check"]) == 0, capsys.readouterr().out


def test_a_ratio_is_to_the_products_before_and_after(monkeypatch):
    speeds, done = iter([1, 1.5, 2, 3, 4, 5, 6, 8, 10]), []

    def timed(job, device, flush):
        done.append(job)
        if job == "raises":
            raise MemoryError("full")
        return next(speeds) * {"products": 1.0, "a": 2.0, "b": 3.0}[job]

    monkeypatch.setattr(measure, "timed", timed)
    figures = measure.interleaved({x: x for x in ("products", "a", "b")}, 2, "cpu", beside="products")
    assert done == ["products", "a", "products", "b", "products", "a", "products", "b", "products"]
    assert (figures["a"]["ratio"], figures["b"]["ratio"]) == (2.0, 3.0) and "ratio" not in figures["products"]
    assert (figures["products"]["rounds"], figures["a"]["rounds"], figures["b"]["seconds"]) == (5, 2, 16.5)

    speeds, done, failed = iter([1, 1, 1]), [], {}
    figures = measure.interleaved({"products": "products", "a": "raises"}, 3, "cpu", failed, beside="products")
    assert done == ["products", "raises"] and failed == {"a": "MemoryError: full"}
    assert list(figures) == ["products"]


def test_a_ratio_that_is_not_settled_is_measured_further(monkeypatch):
    seconds = {
        "products": iter([1.0] * 99),
        "calm": iter([2.0, 2.01] * 9),
        "wild": iter([2.0, 4.0, 3.0] * 30),
        "late": iter([1, 3, *[2.0] * 30]),
    }
    monkeypatch.setattr(measure, "timed", lambda job, device, flush: next(seconds[job]))
    figures = measure.interleaved({name: name for name in seconds}, 3, "cpu", beside="products", most=20)
    assert (figures["calm"]["rounds"], figures["wild"]["rounds"]) == (3, 20) and 3 < figures["late"]["rounds"] < 20
    assert measure.settled([1.0, 1.01, 1.02]) and not measure.settled([1.0, 1.2, 1.4]) and not measure.settled([1.0])


def test_ctrl_c_ends_the_rounds_that_go_on_and_keeps_the_figures(monkeypatch):
    seconds = {"products": iter([1.0] * 99), "wild": iter([2.0, 4.0, 3.0] * 30)}

    def run(until: int):
        count = iter(range(99))

        def timed(job, device, flush):
            if job == "wild" and next(count) == until:
                raise KeyboardInterrupt
            return next(seconds[job])

        monkeypatch.setattr(measure, "timed", timed)
        return measure.interleaved({name: name for name in seconds}, 3, "cpu", {}, beside="products", most=20)

    assert run(until=7)["wild"]["rounds"] == 7
    with pytest.raises(KeyboardInterrupt):
        run(until=2)


def test_the_readme_shows_a_later_run_of_a_gpu_as_one():
    row = {"seconds": 0.0384, "extra_bytes": 5 << 20, "ratio": 1.1}
    step = {
        "head": "H",
        "size": {"tokens": 8, "hidden": 8, "vocabulary": 9, "pairs": 1, "masked": 0.0},
        "dtype": "bfloat16",
        "products_seconds": 0.03,
    }
    report = {
        "device": {"name": "GPU", "sms": 9}, "file": "a.json", "revision": "aaa", "tests": {"passed": True, "summary": "9 passed"},
        "steps": [step | {"step": kind, "rows": {OURS: row}} for kind in ("no KL", "KL")],
    }  # fmt: skip
    later = report | {"file": "b.json", "revision": "bbb", "tests": {"passed": False, "summary": "1 failed"}}
    later["steps"] = [step | {"step": "no KL", "products_seconds": 0.02, "rows": {OURS: row | {"seconds": 0.025, "ratio": 1.25}}}]
    alone, both = "\n".join(readme.gpu_figures(report, None)), "\n".join(readme.gpu_figures(report, later))
    assert "**38.4 ms, 5 MiB, 1.10 x**" in alone and "bbb" not in alone and "some GPU tests failed" not in alone
    assert (
        "| [bbb](benchmarks/results/b.json): the matrix products alone | 20 ms |  |\n| **tisdpo one pass** | **25 ms, 5 MiB** |  |" in both
    )
    assert "At bbb some GPU tests failed" in both and "**38.4 ms, 5 MiB, 1.10 x**" in both
    green = "\n".join(readme.gpu_figures(report, later | {"tests": {"passed": True, "summary": "9 passed"}}))
    assert "| **25 ms, 5 MiB, 1.25 x** |  |" in green and "some GPU tests failed" not in green
    never = "\n".join(readme.gpu_figures({k: v for k, v in report.items() if k != "tests"}, later))
    assert "At bbb some GPU tests failed, so there are no ratios. At aaa the GPU tests were not run" in never


def test_a_gpu_does_not_replace_another(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "RESULTS", tmp_path)
    assert reports.newest_of_each_gpu() == []
    for file, name, date in (
        ("device-a-2026-01-01", "A", "2026-01-01T10"), ("device-a-2026-01-03", "A", "2026-01-03T10"),
        ("device-b-2026-01-04", "B", "2026-01-04T10"), ("device-c-2026-01-06", "C", "2026-01-06T10"),
        ("without-logits-a-2026-01-05", "A", "2026-01-05T10"), ("without-logits-b-2026-01-02", "B", "2026-01-02T10"),
    ):  # fmt: skip
        report = {"device": {"name": name, "sms": 9}, "date": date, "steps": [] if name == "C" else ["a step"]}
        (tmp_path / f"{file}.json").write_text(json.dumps(report))
    found = [(gpu["file"], later and later["file"]) for gpu, later in reports.newest_of_each_gpu()]
    assert found == [("device-b-2026-01-04.json", None), ("device-a-2026-01-03.json", "without-logits-a-2026-01-05.json")]


def test_a_step_that_raises_does_not_end_the_run_of_a_gpu(tmp_path, monkeypatch, capsys):
    own = device.compare

    def compare(size, step, *rest, **options):
        if step == MODES[1]:
            raise RuntimeError("an illegal memory access was encountered")
        return own(size, step, *rest, **options)

    monkeypatch.setattr(device, "compare", compare)
    output = tmp_path / "out.json"
    assert device.main(["--smoke", "--only", "steps", "--rounds", "1", "--output", str(output)]) == 1
    report = json.loads(output.read_text())
    assert report["failed"] == [f"smoke, N=96, {MODES[1].name}: RuntimeError: an illegal memory access was encountered"]
    assert report["failed"][0] in capsys.readouterr().out and len(report["steps"]) == len(MODES) - 1 and report["ops"]
    assert not list(tmp_path.glob("*.part"))


def test_the_table_of_log_probs_needs_no_peer():
    row = {"seconds": 0.02, "extra_bytes": 3 << 20}
    slow, fast = row | {"seconds": 0.05}, row | {"seconds": 0.04}
    told = readme.log_probs(
        [{"dtype": "float32", "ops": [{"step": Step(op="scores").name, "rows": {OUR_OPS: row, "F.cross_entropy": slow}}]}]
    )
    assert told[-1] == "| float32, no gradients | **20 ms, 3 MiB** | 50 ms, 3 MiB |  |  |"
    assert readme.log_probs([{"dtype": "float32", "ops": []}])[-1].endswith("not measured.")
    rows = {OUR_OPS: row, "plain torch": slow, "torch.compile": fast, "F.linear_cross_entropy, one chunk": slow}
    reports = [{"dtype": of, "ops": [{"step": Step(op="log-probs").name, "rows": rows}]} for of in ("float32", "bfloat16", "float32")]
    told = [line for line in readme.log_probs(reports) if "gradient a token" in line]
    cells = "any gradient a token | **20 ms, 3 MiB** | 40 ms, 3 MiB |  | 50 ms, 3 MiB |"
    assert sorted(told) == [f"| bfloat16, {cells}", f"| float32, {cells}"]  # of each dtype one file


def test_the_readme_shows_the_newest_of_each_dtype_and_where_others_are_furthest_ahead():
    def report(dtype: str, ours: float, other: float) -> dict:
        rows = {name: {"task": "TIS-DPO", "seconds": x, "ratio": x} for name, x in ((OURS, ours), ("plain torch", other))}
        return {"dtype": dtype, "steps": [{"step": "no KL", "rows": rows}]}

    newest, older, lost, half = (report(*of) for of in (("f", 1.0, 1.1), ("f", 1.0, 0.99), ("f", 1.1, 1.0), ("h", 1.0, 2.0)))
    behind = report("h", 1.0, 1.5)
    assert readme.shown([newest, older, lost, half, {"dtype": "h"}]) == [newest, lost, half]
    assert readme.shown([newest, half, behind]) == [newest, half, behind] and readme.shown([lost]) == [lost]
    assert readme.others_ahead([newest, older, lost]).startswith("In 2 of the 3 tables")


def test_a_stale_picture_is_found(tmp_path, monkeypatch):
    report = reports.pictured(reports.newest_of_each_size())["steps", "float32"]
    monkeypatch.setattr(pictures, "PLOTS", tmp_path)
    assert "steps-float32.svg" in pictures.stale_plots({("steps", "float32"): report})
    pictures.plot_steps(report)
    assert "steps-float32.svg" not in pictures.stale_plots({("steps", "float32"): report})
    assert "steps-float32.svg" in pictures.stale_plots({("steps", "float32"): report | {"steps": report["steps"][:2]}})


def test_the_command_of_a_file_names_no_place(monkeypatch):
    for words in (
        ["--output", "a.json", "steps", "--providers", "plain torch"],
        ["steps", "--output=b", "--providers", "plain torch"],
    ):
        monkeypatch.setattr(sys, "argv", ["benchmarks/run.py", *words])
        assert measure.command_line() == "python -m benchmarks.run steps --providers 'plain torch'"


def test_losing_rows_are_named():
    cpu = {"device": {"name": "X", "vectors": "AVX2"}}
    row = {"task": "TIS-DPO", "error": {"loss": 0.0}, "p20": 1.0, "p80": 1.0, "ratio": 1.0}
    result = {
        "size": {"tokens": 10**5, "hidden": 8, "vocabulary": 10**5, "pairs": 1, "masked": 0.0}, "dtype": "float32", "step": "no KL",
        "rows": {OURS: row | {"seconds": 2.0}, "plain torch": row | {"seconds": 1.0}, "less": row | {"seconds": 0.5, "task": "DPO"}},
    }  # fmt: skip
    assert tables.lost(result) == [("plain torch", 2.0)]
    reason, line = tables.losing_rows([cpu | {"steps": [result]}])
    assert reason.startswith("- All logits at once") and line.endswith(": plain torch 2.00")
    close = {"rows": {OURS: row | {"seconds": 1.0, "ratio": 1.02}, "plain torch": row | {"seconds": 1.1, "ratio": 1.0}}}
    assert tables.lost(close) == [("plain torch", 1.02)]  # by the ratio, though not by the time
    whole = result | {"products": 3, "products_seconds": 1.0, "products_tflops": 1.0}
    assert "1.00" in "".join(tables.step_table(whole)) and "1.00" not in "".join(tables.step_table(whole, ratios=False))
    alone = {
        "op": "log-probs",
        "step": Step(op="log-probs").name,
        "rows": {OUR_OPS: row | {"seconds": 2.0}, "TRL chunked": row | {"seconds": 1.0}} | result["rows"],
    }
    reasons = [line for line in tables.losing_rows([cpu | {"ops": [result | alone]}]) if line.startswith("- ")]
    assert "- All logits are kept for the backward" in reasons[1] and reasons[0] == "- Not explained yet."
    gpu = tables.losing_rows([{"device": {"name": "H100", "sms": 9}, "tests": {"passed": False}, "steps": [result]}])
    assert gpu[1].endswith(": plain torch (not all GPU tests passed, see there)")
    result["rows"]["fast"] = result["rows"].pop("plain torch")
    assert tables.losing_rows([cpu | {"steps": [result]}])[0] == "- Not explained yet."
    result["rows"]["logits and folds"] = result["rows"].pop("fast")  # a form of our own
    assert tables.losing_rows([cpu | {"steps": [result]}]) == ["None."]
    json.dumps(result)


# pytest --benchmark-only; run once each, untimed, where benchmarks are off


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("step", [Step(), Step(kl="reverse"), Step(frozen=True)], ids=lambda s: s.name)
def test_speed_of_a_step(benchmark, step, plan):
    problem = Problem(Size(128, 128, 4003, pairs=4))
    loss, *_ = benchmark(problem.run, lambda p, s: fused(p, s, plan), step)
    assert relative_error(loss, plain(problem.double(), step).detach()) < 1e-5


def test_speed_of_log_probs(benchmark):
    import tisdpo

    z = torch.randn(128, 4003)
    target = torch.randint(4003, (128,))
    found = benchmark(tisdpo.token_logps, z, target).logps
    torch.testing.assert_close(found, z.log_softmax(-1).gather(-1, target[:, None])[:, 0])


def test_the_page_of_the_studies_is_what_their_files_give(capsys):
    assert studies.main(["--check"]) == 0, capsys.readouterr().out


def test_a_study_is_kept_and_put_on_the_page(tmp_path, monkeypatch):
    found = {"compare": "(S) - DPO", "metric": "reward", "verdict": "confirmed", "differences": {"0": 0.5, "1": 0.6}}
    arm, base = {"overrides": {}, "search": {}}, {"reward": 0.1, "samples": 3}
    policy = {"arm": "DPO", "point": 0, "settings": {}, "id": "x", "points": [], "metrics": {"reward": 1.0, "kl": None}, "base": base}
    results = {
        "name": "one", "command": "tisdpo study one", "seeds": [0, 1], "seconds": 61.0,
        "points": [{"train.learning_rate": 0.1}, {"train.learning_rate": 2e-5}],
        "wall": {"seconds": 31.0, "calls": 1, "jobs": [2]}, "environment": {"date": "2026-01-02", "revision": "abc", "cpu": "a CPU"},
        "quality": "reward", "baseline": "DPO", "policies": [policy | {"seed": 0}, policy | {"seed": 1}], "data": {"kind": "synthetic"},
        "arms": [{"name": "DPO", **arm}, {"name": "(S)", **arm},
            {"name": "(S) on things", "overrides": {"evaluation.data": {}}, "search": {}}],
        "leads": {"(S)": {"over": "(P)", "lead": {"0": 0.1, "1": 0.2}}},
        "values": {"DPO": {"reward": {"0": 1.0}, "point": {"0": 1, "1": 1}}, "(S) on things": {"point": {"0": 0, "1": 1}},
            "(S)": {"reward": {"0": 1.5, "1": 1.6}, "point": {"0": 0, "1": 1}}},
        "costs": {"arms": {"DPO": {"one": 2.0, "search": 3.0}, "(S)": {"one": 6.0, "search": 7.5}}},
        "claims": [{"text": "More.", "expect": "higher", "within": None, "verdict": "confirmed", "comparisons": [found]}],
    }  # fmt: skip
    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    monkeypatch.setattr(studies, "PAGE", tmp_path / "page.md")
    studies.PAGE.write_text("before\n<!-- one: begin -->\nold\n<!-- one: end -->\nafter\n")
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit, match=r"holds no results\.json"):
        studies.main([str(tmp_path / "run")])
    (tmp_path / "run/results.json").write_text(json.dumps(results))
    assert studies.main([str(tmp_path / "run")]) == 0 and studies.main(["--check"]) == 0
    page = studies.PAGE.read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert "| More. | **confirmed** | " in page and "(S) − DPO +0.55 ± 0.64" in page
    assert "61 s" not in page and "1 min 1 s of one core (31 s by the clock, 2 jobs, a CPU)" in page
    assert "| (S) | 1.6 ± 0.6 | 0.2 ± 0.6 over (P) | 3.0 | 2.5 | 0.1 (1), 2e-05 (1) |" in page and "on things" not in page
    assert "compute | with its search | best learning rate (seeds) |" in page and "train.learning_rate (0.1, 2e-05)" in page
    kept = json.loads((tmp_path / "study-one.json").read_text())
    assert kept["policies"][1] == {"arm": "DPO", "point": 0, "seed": 1, "metrics": {"reward": 1.0}}
    assert kept["base"] == {"DPO": {"0": {"reward": 0.1}, "1": {"reward": 0.1}}}
    (tmp_path / "run/results.json").write_text(json.dumps(results | {"environment": {"date": "", "revision": "abc-dirty"}}))
    with pytest.raises(SystemExit, match="commit and run it again"):
        studies.main([str(tmp_path / "run")])


def test_what_takes_too_long_ends_with_all_that_it_started():
    code = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True); subprocess.run(['sleep', '600'])"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        device.finished([sys.executable, "-c", code], 5)
    assert int(caught.value.output) > 0  # read to its end, which comes when nobody holds the pipe any more
    done = device.finished([sys.executable, "-c", "import os; print(os.environ['A']); exit(3)"], 60, env={**os.environ, "A": "b"})
    assert (done.returncode, done.stdout) == (3, "b\n")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept():
    """In a process of its own, for it stays so: a tensor soon lies where earlier ones were, without a page fault.

    Not at once: an aligned request leaves a splinter, and glibc sets up to seven of a kind aside before it joins what is free.
    """
    code = """if True:
        import resource, torch
        from benchmarks.measure import keep_freed_memory
        assert keep_freed_memory()
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(12):
            torch.ones(64 << 20, dtype=torch.uint8)
        before = faults()
        torch.ones(64 << 20, dtype=torch.uint8)
        assert faults() - before < 1000, faults() - before"""
    assert subprocess.run([sys.executable, "-c", code], cwd=measure.ROOT).returncode == 0


@pytest.mark.parametrize("curves", [(), ("tokens",)])
def test_a_part_that_the_newest_file_lacks_is_that_of_the_file_before(curves, tmp_path, monkeypatch):
    old = json.loads((measure.RESULTS / "cpu-float32-amd-epyc-2026-11-25.json").read_text())
    new = old | {"scaling": {name: old["scaling"][name] for name in curves}, "revision": "a later one"}
    for name, report in {"cpu-float32-a-2026-11-25.json": old, "cpu-float32-a-2026-11-26.json": new}.items():
        (tmp_path / name).write_text(json.dumps(report))
    monkeypatch.setattr(reports, "RESULTS", tmp_path)
    (report,) = reports.newest_of_each_size()
    assert report["file"] == "cpu-float32-a-2026-11-26.json" and report["revision"] == "a later one"
    assert report["scaling"] == old["scaling"] and list(report["parts_of"]) == ["scaling"]
    assert "cpu-float32-a-2026-11-25.json" in plot.page([report], [], []).split("### Scaling")[1]


def test_every_kind_of_cpu_has_its_table_and_parts_without_steps_too(tmp_path, monkeypatch):
    old = json.loads((measure.RESULTS / "cpu-float32-amd-epyc-2026-11-25.json").read_text())
    ops = json.loads((measure.RESULTS / "cpu-float32-ops-amd-epyc-2026-11-27.json").read_text())
    other = {"device": old["device"] | {"name": "Another(R) Processor"}, "date": "2026-11-28T00:00:00"}
    files = {"cpu-float32-a-2026-11-25.json": old, "cpu-float32-ops-b-2026-11-28.json": ops | other}
    for name, report in files.items():
        (tmp_path / name).write_text(json.dumps(report))
    monkeypatch.setattr(reports, "RESULTS", tmp_path)
    first, second = reports.newest_of_each_size()
    assert first["file"].startswith("cpu-float32-ops-b") and second["file"] == "cpu-float32-a-2026-11-25.json"
    assert set(reports.pictured([first, second])) == {(part, "float32") for part in pictures.PLOTTED}
    text, block = plot.page([first, second], [], []), readme.figures([first, second], [], [])
    assert "## Log-probs alone on a CPU, float32, Another, AVX-512" in text
    assert "## The loss step on a CPU, float32, AMD EPYC, AVX-512" in text
    assert block.count("float32, AMD EPYC, AVX-512 ([") == 2 and "cpu-float32-ops-b-2026-11-28.json), 2 cores of an Another" in block
    files["cpu-float32-a-2026-11-26.json"] = old | {"revision": "another"} | other  # now that CPU has steps, and keeps its log-probs
    (tmp_path / "cpu-float32-a-2026-11-26.json").write_text(json.dumps(files["cpu-float32-a-2026-11-26.json"]))
    first, second = reports.newest_of_each_size()
    assert first["revision"] == "another" and first["ops"] and "ops-b" in first["parts_of"]["ops"]
    assert "cpu-float32-ops-b-2026-11-28.json), 2 cores of an Another" in readme.figures([first, second], [], [])


def test_who_takes_less_memory_is_named():
    row = {"task": "TIS-DPO", "seconds": 2.0, "extra_bytes": 9 << 20}
    rows = {OURS: row, "a": row | {"extra_bytes": 5 << 20, "seconds": 3.0}, "b": row | {"extra_bytes": 6 << 20}, "c": {"skipped": "no"}}
    result = {"step": "no KL", "dtype": "float32", "size": asdict(Size()), "rows": rows}
    report = {"device": {"name": "X", "vectors": "AVX2"}, "steps": [result]}
    (line,) = tables.rows_with_more_memory([report])
    assert line.endswith("a 5 MiB instead of 9 MiB, in 1.5 times as long") and line.startswith("- float32, X, AVX2, no KL, N = 1,024")
    rows["a"] = rows["b"] = row | {"extra_bytes": (9 << 20) - 1}
    assert tables.rows_with_more_memory([report]) == ["None."]


# On a GPU machine Triton compiles, so tensors of the CPU have no Triton backend; `benchmarks.device` runs the part itself there.
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_alone(monkeypatch, dtype):
    """With Triton, whose interpreter counts as a chip that has one, also the product without logits."""
    monkeypatch.setenv("TISDPO_BACKEND", "triton")
    found = roofline.products(Size(16, 32, 96, 2), "cpu", dtype, 1)
    assert ("D and sums, no logits" in found) == (dtype == torch.bfloat16)
    assert {"logits in float32", "dHidden", "dWeight in float32"} <= set(found)
    for row in found.values():
        assert row["seconds"] > 0 and row["seconds"] * row["flops"] == pytest.approx(2 * 16 * 32 * 96)
