"""A whole run at its smallest: everything is written, an interrupted run goes on, a run may grow but not change."""

import json
import math

import pytest
import torch
from pair_tokenizers import CHAT_TEMPLATE, bpe

from tisdpo import estimation, pipeline, stages
from tisdpo.batches import sequences
from tisdpo.config import load_config
from tisdpo.errors import InputError
from tisdpo.rows import apply_weighting
from tisdpo.stages import last_complete_checkpoint
from tisdpo.summary import at_equal_kl, compare, interpolated, notes, pieces
from tisdpo.weighting import Weighting

SMALL = """
name: small
threads: 1
data: {source: synthetic, limit: 24, heldout: 8, max_length: 96}
model: {hidden_size: 16, heads: 2, pretrain: {steps: 2, batch_size: 4, learning_rate: 1e-3}}
contrast:
  constructions: [S]
  sft: {steps: 2, batch_size: 4, learning_rate: 1e-3}
train: {steps: 4, batch_size: 4, learning_rate: 1e-3}
methods: [dpo, random, S, truth]
evaluation: {prompts: 4, max_new_tokens: 8, checkpoints: 2, samples: 1, heatmaps: 1}
"""


def config(tmp_path, *overrides, text=SMALL):
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return load_config(path, [f"output_dir={tmp_path / 'run'}", *overrides])


def trained(tmp_path) -> dict[str, int]:
    """When each file of the run was written."""
    return {str(p.relative_to(tmp_path)): p.stat().st_mtime_ns for p in (tmp_path / "run" / "seed-0").rglob("*.safetensors")}


def test_a_run_writes_everything_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    real, calls = pipeline.train_stage, []

    def dies_at_the_fifth(*args, **kwargs):
        calls.append(kwargs["label"])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    for module in (pipeline, estimation):
        monkeypatch.setattr(module, "train_stage", dies_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config(tmp_path))
    before = trained(tmp_path)
    report = pipeline.run(config(tmp_path))
    assert "seed 0 · responses" in capsys.readouterr().err  # which are counted while they are generated
    assert report.name == "report.html" and report.stat().st_size > 10_000
    assert len(calls) == 5 + 3  # the base, two SFT models and a policy were not trained again
    assert {name: trained(tmp_path)[name] for name in before} == before
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {(r["method"], r["seed"]) for r in metrics["results"]} == {(m, 0) for m in ("base", "dpo", "random", "S", "truth")}
    assert [len(f["points"]) for f in metrics["frontier"]] == [2] * 4
    weights = metrics["weights"][0]
    assert 0 <= weights["auc"] <= 1 and sum(weights["histogram"]["chosen"]) == weights["chosen"]["tokens"]
    assert metrics["heatmaps"][0]["chosen"]["truth"] is not None
    assert (tmp_path / "run" / "config.yaml").exists()

    grown = json.loads(pipeline.run(config(tmp_path, "seeds=2"), until="eval").joinpath("metrics.json").read_text())
    assert grown["seeds"] == [0, 1] and {name: trained(tmp_path)[name] for name in before} == before
    with pytest.raises(InputError, match="train differ"):
        pipeline.run(config(tmp_path, "train.steps=5"))


def test_the_oracle_weighs_only_what_is_to_be_learned(tmp_path):
    run = config(tmp_path, "methods=[oracle]", "contrast.constructions=[]", "weighting.eos_weight=2", "weighting.k=3")
    seed_run = pipeline.SeedRun(run, 0, tmp_path / "run" / "seed-0")
    rows, options = seed_run.method_rows("oracle")
    assert "weighting" not in options
    for side, mu in (("chosen", 1), ("rejected", -1)):
        truth, weights = ([x for values in rows[f"{side}_{kind}"] for x in values] for kind in ("truth", "weights"))
        expected = {0.0: 0.0, 1.0: 3 * math.exp(mu * 1.5), -1.0: 3 * math.exp(mu * -0.5)}
        assert weights == pytest.approx([expected[x] for x in truth]) and set(truth) == set(expected)
    pipeline.run(run, until="train")


def test_the_same_seed_gives_the_same_results(tmp_path):
    results = []
    for name in ("a", "b"):
        pipeline.run(config(tmp_path, f"output_dir={tmp_path / name}", "methods=[S]"), until="train")
        results.append(json.loads((tmp_path / name / "seed-0" / "policy" / "S" / "result.json").read_text()))
    assert results[0] == results[1]


def test_stages_may_form_batches_by_tokens_and_without_padding(tmp_path, monkeypatch):
    batches = []

    class Recorded(stages.TISDPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            batches.append(("cu_seq_lens_q" in inputs, inputs["input_ids"].numel(), sequences(inputs)))
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(stages, "TISDPOTrainer", Recorded)
    changes = [
        f"{stage}={{steps: 2, learning_rate: 1e-3, batch_size: 32, padding_free: {flat}, tokens_per_batch: {tokens}}}"
        for stage, flat, tokens in (("model.pretrain", "true", 100), ("contrast.sft", "false", 110), ("train", "true", 200))
    ]
    pipeline.run(config(tmp_path, "methods=[S]", *changes), until="train")
    assert [flat for flat, _, _ in batches] == [True] * 2 + [False] * 4 + [True] * 2
    assert all(most >= tokens > most / 2 for (_, tokens, _), most in zip(batches, [100] * 2 + [110] * 4 + [200] * 2)), batches
    assert all(count % 2 == 0 and count > 2 for _, _, count in batches[-2:])


def test_settings_of_a_stage_reach_its_trainer(tmp_path, monkeypatch):
    seen = []

    class Recorded(stages.TISDPOTrainer):
        def __init__(self, model, args, **kwargs):
            seen.append(args)
            super().__init__(model, args, **kwargs)

    monkeypatch.setattr(stages, "TISDPOTrainer", Recorded)
    settings = dict(steps=2, learning_rate=0.003, batch_size=3, warmup_steps=1, scheduler="cosine", weight_decay=0.07, max_grad_norm=0.5)
    text = ", ".join(f"{name}: {value}" for name, value in settings.items())
    pipeline.run(config(tmp_path, "methods=[S]", f"train={{{text}, arguments: {{adam_beta1: 0.8}}}}"), until="train")
    args = seen[-1]
    found = (
        args.max_steps, args.learning_rate, args.per_device_train_batch_size, args.warmup_steps, args.lr_scheduler_type.value,
        args.weight_decay, args.max_grad_norm,
    )  # fmt: skip
    assert found == tuple(settings.values()) and args.adam_beta1 == 0.8 and args.seed == args.data_seed == 0
    assert (seen[0].warmup_steps, seen[0].lr_scheduler_type.value, seen[0].adam_beta1) == (0, "linear", 0.9)


def test_a_model_of_ones_own_on_pairs_from_a_file(tmp_path):
    """`tisdpo run examples/own.yaml data.source=... model.path=...`, with what such a run may name besides."""
    import tiny
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = tiny.tokenizer()
    for name, model in (
        ("model", tiny.model(seed=3)),
        ("judge", LlamaForSequenceClassification(LlamaConfig(**tiny.model().config.to_diff_dict() | {"num_labels": 1}))),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, tiny.pairs(12))))
    own = [
        f"data={{source: {tmp_path / 'pairs.jsonl'}, heldout: 2, streaming: true, max_length: 96}}",
        f"model={{path: {tmp_path / 'model'}}}", "contrast.constructions=[S, P]", "contrast.task=helpful", "methods=[dpo, P, S]",
        f"evaluation.reward_model={tmp_path / 'judge'}", "evaluation.temperature=0",
    ]  # fmt: skip
    metrics = json.loads((pipeline.run(config(tmp_path, *own), until="eval") / "metrics.json").read_text())
    results = {r["method"]: r["metrics"] for r in metrics["results"]}
    assert set(results) == {"base", "dpo", "P", "S"} and all(math.isfinite(m["reward"]) for m in results.values())
    prompts = [json.loads(p.read_text())["how"] for p in (tmp_path / "run/seed-0/scored/P").glob("*.json") if "how" in p.read_text()]
    from tisdpo.prompts import PROMPTS

    assert [(how["positive_prompt"], how["negative_prompt"]) for how in prompts] == [PROMPTS["helpful"]]


def test_conversations_reach_the_reward_model_as_messages(tmp_path):
    words = ("cook", "swim", "sing", "run")
    bpe(template=CHAT_TEMPLATE).save_pretrained(tmp_path / "words")
    asked = [[{"role": "system", "content": "Hi."}, {"role": "user", "content": f"how do I {word}?"}] for word in words]
    sides = {"chosen": [{"role": "assistant", "content": "slowly"}], "rejected": [{"role": "assistant", "content": "no"}]}
    rows = [{side: [*talk, *answer] for side, answer in sides.items()} for talk in asked]  # the prompt is what both share
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = [f"data={{source: {tmp_path / 'pairs.jsonl'}, heldout: 2, max_length: 96}}", "data.limit=null", "methods=[dpo]"]
    run = config(tmp_path, *own, f"model.tokenizer={tmp_path / 'words'}", "contrast.constructions=[]")
    seed_run = pipeline.SeedRun(run, 0, tmp_path / "run" / "seed-0")
    found = seed_run.generations(seed_run.base())
    assert len(found) == 2 and all(one.messages in asked and one.messages[1]["content"] in one.prompt for one in found)


def test_pairs_of_ready_ids_may_have_any_index(tmp_path):
    import tiny

    rows = [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in tiny.rows(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row | {"index": 1000 + i}) for i, row in enumerate(rows)))
    tiny.model(seed=3).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    own = [f"data={{source: {tmp_path / 'pairs.jsonl'}, heldout: 2, max_length: 96}}", f"model={{path: {tmp_path / 'model'}}}"]
    run = config(tmp_path, *own, "data.limit=null", "contrast.constructions=[]", "methods=[dpo]")
    source = pipeline.SeedRun(run, 0, tmp_path / "run" / "seed-0").source
    assert source.conversations is None and len(source.prompts) == 2


def test_a_file_of_pairs_that_has_changed_is_told(tmp_path):
    rows = [{"prompt": f"Question {i}?", "chosen": f" A fine answer, number {i}.", "rejected": f" No {i}."} for i in range(12)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    own = [f"data={{source: {file}, heldout: 2, max_length: 64}}", "data.limit=null", "model.vocab_size=300", "contrast.constructions=[]"]
    run = config(tmp_path, *own, "methods=[dpo]")
    for _ in range(2):
        pipeline.run(run, until="train")
    file.write_text("\n".join(map(json.dumps, [dict(row, chosen=row["rejected"], rejected=row["chosen"]) for row in rows])))
    with pytest.raises(InputError, match=r"holds a run on what .*pairs\.jsonl held before it was changed"):
        pipeline.run(run, until="train")


def test_a_run_without_constructions_goes_on(tmp_path):
    none = ["contrast.constructions=[]", "methods=[dpo]"]
    for more in ([], ["seeds=2"]):
        pipeline.run(config(tmp_path, *none, *more), until="train")
    assert (tmp_path / "run/seed-1/policy/dpo/result.json").exists()


def test_a_stage_that_keeps_models_begins_anew_after_it_was_killed(tmp_path, monkeypatch):
    real = stages.save_model

    def dies_at_the_last(model, tokenizer, path):
        if path.name == "model" and path.parent.name == "sft-chosen":
            raise KeyboardInterrupt
        real(model, tokenizer, path)

    run = config(tmp_path, "contrast.checkpoints=2", "contrast.sft.steps=4")
    monkeypatch.setattr(stages, "save_model", dies_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(run, until="weights")
    assert (tmp_path / "run/seed-0/contrastive/sft-chosen/model-1").is_dir()
    monkeypatch.setattr(stages, "save_model", real)
    pipeline.run(run, until="weights")
    assert (tmp_path / "run/seed-0/scored/S-1").is_dir()


@pytest.mark.parametrize("transform", ["exp", "rank", "scale"])
def test_controls_follow_the_rule_of_the_run(tmp_path, transform):
    """random: the same weights, dealt out anew (of a rule by ranks the same set of them); swapped: those of the other side's sign."""
    run = config(tmp_path, f"weighting.transform={transform}", "methods=[S, random, swapped]")
    seed_run = pipeline.SeedRun(run, 0, tmp_path / "run" / "seed-0")
    made = {}
    for method in ("S", "random", "swapped"):
        rows, options = seed_run.method_rows(method)
        rows = apply_weighting(rows, Weighting(**options["weighting"]), seed_run.tokenizer.eos_token_id)
        made[method] = {side: torch.tensor([x for w in rows[f"{side}_weights"] for x in w]) for side in ("chosen", "rejected")}
    for side in ("chosen", "rejected"):
        assert not torch.equal(made["random"][side], made["S"][side])
        assert made["random"][side].min() >= made["S"][side].min() - 1e-6 and made["random"][side].max() <= made["S"][side].max() + 1e-6
        if transform != "rank":
            torch.testing.assert_close(made["random"][side].sort().values, made["S"][side].sort().values)
        if transform == "rank":  # the order turned around: 0.7 .. 1.3
            torch.testing.assert_close(made["swapped"][side], 2.0 - made["S"][side])


def test_training_on_scores_of_another_run(tmp_path):
    pipeline.run(config(tmp_path), until="weights")
    scored = tmp_path / "run" / "seed-0" / "scored" / "S"
    path = pipeline.train_on(config(tmp_path, f"output_dir={tmp_path / 'other'}", "weighting.upper=1"), scored)
    assert json.loads((path / "result.json").read_text())["metrics"]["kl"] >= 0
    # a set may hold more pairs than these, as one does that `tisdpo score` made of a whole file
    pipeline.train_on(config(tmp_path, f"output_dir={tmp_path / 'third'}", "data.limit=20"), scored)
    with pytest.raises(InputError, match=r"has no scores for \d+ of these \d+ rows, row 0 for one; .* max_length=\d+\)"):
        pipeline.train_on(config(tmp_path, f"output_dir={tmp_path / 'fourth'}", "data.max_length=20"), scored)


def test_preference_text_from_a_file(tmp_path):
    rows = [{"prompt": f"Question {i}?", "chosen": f" A fine answer, number {i}.", "rejected": f" No {i}."} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    overrides = [
        f"data.source={tmp_path / 'pairs.jsonl'}",
        "data.limit=null",
        "data.heldout=2",
        "model.vocab_size=300",
        "methods=[dpo, P, S]",
    ]
    run = config(tmp_path, *overrides, "contrast.constructions=[S, P]", "objective.kl=reverse")
    metrics = json.loads(pipeline.run(run, until="eval").joinpath("metrics.json").read_text())
    assert metrics["frontier_y"] == "accuracy" and metrics["data"] == {"train": 10, "heldout": 2, "dropped": {}, "kind": "text"}
    assert metrics["weights"][0]["auc"] is None
    assert any("accuracy" in note for note in metrics["notes"])


def test_a_mistake_in_the_data_does_not_lock_the_directory(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        pipeline.run(config(tmp_path, f"data.source={tmp_path / 'nowhere.jsonl'}", "methods=[dpo]"))
    with pytest.raises(InputError, match="flop"):
        pipeline.run(config(tmp_path, "data.world={flop: 1}", "methods=[dpo]"))
    pipeline.run(config(tmp_path), until="weights")


def test_sentences_on_differences():
    assert "one seed" in compare("A", "B", "reward", {0: 1.0}, {0: 0.5})
    assert compare("A", "B", "reward", {0: 1.0, 1: 1.1, 2: 1.2}, {0: 0.5, 1: 0.6, 2: 0.7}).endswith(
        "difference +0.50 ± 0.00 (95 %, 3 seeds, paired): better."
    )
    assert "no clear difference" in compare("A", "B", "reward", {0: 1.0, 1: 0.0}, {0: 0.5, 1: 0.4})


def test_comparison_at_equal_kl_interpolates_between_checkpoints():
    metrics = {
        "frontier_y": "reward", "seeds": [0], "results": [{"method": "base", "seed": 0, "metrics": {"reward": 0.0}}],
        "frontier": [
            {"method": "S", "seed": 0, "points": [{"step": 1, "kl": 2.0, "y": 1.0}, {"step": 2, "kl": 4.0, "y": 3.0}]},
            {"method": "dpo", "seed": 0, "points": [{"step": 1, "kl": 3.0, "y": 1.5}]},
        ],
    }  # fmt: skip
    assert interpolated([(0.0, 0.0), (2.0, 1.0)], 0.5) == pytest.approx(0.5)  # the root of the KL is half way
    sentence = at_equal_kl("S", {"S": "TIS-DPO (S)"}, "reward", metrics)
    assert "(3.0 nats)" in sentence and "+0.59 reward" in sentence  # 1 + 2 (√3 - √2) / (√4 - √2) = 2.09 against 1.5


def test_pieces_join_to_the_text():
    import tiny

    tokenizer = tiny.tokenizer()
    ids = tokenizer("the gardener was warm. we went home.", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == "the gardener was warm. we went home."


def test_a_checkpoint_written_half_is_passed_over(tmp_path):
    whole, cut = '{"global_step": 2}', '{"global_st'
    for step, state in ((2, whole), (4, None), (6, cut), (8, ""), (10, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_text("x")
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2"]
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_another_scored_set_does_not_get_the_results_of_the_first(tmp_path):
    run = config(tmp_path, "contrast.constructions=[S,R]", "contrast.dpo={steps: 2, batch_size: 4, learning_rate: 1e-3}", "methods=[dpo]")
    pipeline.run(run, until="weights")
    seed = tmp_path / "run" / "seed-0"
    pipeline.train_on(run, seed / "scored" / "S")
    first = (seed / "policy" / "scored" / "result.json").read_text()
    pipeline.train_on(run, seed / "scored" / "S")  # the same set: nothing is done again
    with pytest.raises(InputError, match="holds a policy trained on another scored set"):
        pipeline.train_on(run, seed / "scored" / "R")
    assert (seed / "policy" / "scored" / "result.json").read_text() == first


def test_a_control_keeps_its_construction(tmp_path):
    more = ("contrast.dpo={steps: 2, batch_size: 4, learning_rate: 1e-3}", "methods=[random]")
    pipeline.run(config(tmp_path, "contrast.constructions=[S,R]", *more), until="train")
    with pytest.raises(InputError, match=r"holds a control .random or swapped. made from the contrasts of another construction"):
        pipeline.run(config(tmp_path, "contrast.constructions=[R,S]", *more), until="train")
    pipeline.run(config(tmp_path, "contrast.constructions=[S]", *more), until="train")


def test_seconds_of_a_stage_inside_another_count_once(tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 13.0, 20.0, 22.0, 30.0])
    seed_run = pipeline.SeedRun(config(tmp_path), 0, tmp_path / "run" / "seed-0")
    monkeypatch.setattr(estimation.time, "monotonic", lambda: next(clock))
    with seed_run.timed("outer"):
        with seed_run.timed("a"):
            pass
        with seed_run.timed("b"):
            pass
    assert seed_run.seconds == {"a": 3.0, "b": 2.0, "outer": 25.0}


def test_the_notes_say_where_the_papers_best_construction_does_not_lead():
    def metrics(rewards, signal=(("S", 11.0), ("D", 9.0))):
        methods = [{"id": m, "label": m.upper()} for m in rewards]
        results = [{"method": m, "seed": s, "metrics": {"reward": r + 0.01 * s}} for m, r in rewards.items() for s in (0, 1)]
        weights = [{"construction": c, "auc": 0.9, "signal_to_noise": value} for c, value in signal]
        points = [{"method": m, "seed": s, "points": [{"step": 1, "kl": 1.0, "y": r}]} for m, r in rewards.items() for s in (0, 1)]
        return dict(frontier_y="reward", methods=methods, results=results, weights=weights, frontier=points, seeds=[0, 1])

    behind = notes(metrics({"base": 0.0, "dpo": 0.4, "S": 0.9, "D": 0.8, "oracle": 1.0}))
    assert any("(D), the best construction of the paper, does not lead here: (S) has the higher mean reward" in n for n in behind)
    assert any("ORACLE: reward 1.0" in n and "for S" in n for n in behind)
    assert any("At equal KL" in n and "ORACLE" in n for n in behind)
    ahead = notes(metrics({"base": 0.0, "dpo": 0.4, "S": 0.7, "D": 0.8}))
    assert not any("does not lead" in n for n in ahead)
    zero = notes(metrics({"base": 0.0, "dpo": 0.4, "S": 0.9, "D": 0.8}, signal=(("S", None), ("D", 9.0))))
    assert not any("does not lead" in n for n in zero)  # weights of 0 have no size to compare
