"""Each option of the contrastive models changes the weights as it says: averages, folds, other models, other data, rounds."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from test_pipeline import SMALL

from tisdpo import contrastive, estimation, pipeline
from tisdpo.config import load_config
from tisdpo.errors import InputError
from tisdpo.pipeline import SeedRun

FEW = ["data.limit=6", "contrast.sft.steps=4", "contrast.sft.learning_rate=1e-2"]


@pytest.fixture
def start(tmp_path):
    """A run with these overrides; all of them share the base model of the first."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)

    def made(name, *overrides):
        return SeedRun(load_config(path, [*FEW, f"output_dir={tmp_path / name}", *overrides]), 0, tmp_path / name / "seed-0")

    return made


def contrasts(rows, side="chosen"):
    return [torch.tensor(values) for values in rows[f"{side}_contrast"]]


def test_pairs_and_checkpoints_are_averaged(start):
    run = start("a", "contrast.pairs=2", "contrast.checkpoints=2")
    parts = [contrasts(run.scored_by("S", pair, checkpoint)) for pair in (0, 1) for checkpoint in (0, 1)]
    for place, values in enumerate(contrasts(run.scored("S"))):
        several = torch.stack([part[place] for part in parts])
        assert not torch.equal(several[0], several[1]) and not torch.equal(several[0], several[2])
        torch.testing.assert_close(values, several.mean(0))


def test_the_models_of_a_fold_have_not_seen_what_they_score(start, monkeypatch):
    run, seen, real = start("a", "contrast.pairs=3", "contrast.crossfit=true"), {}, estimation.train_stage

    def noted(model, tokenizer, rows, stage, directory, **options):
        seen[directory.name] = rows["index"] if "index" in rows.column_names else None
        return real(model, tokenizer, rows, stage, directory, **options)

    monkeypatch.setattr(estimation, "train_stage", noted)
    scored = run.scored("S")
    assert len(scored) == 6 and all(len(c) == len(ids) for c, ids in zip(scored["chosen_contrast"], scored["chosen_ids"]))
    for pair, name in enumerate(("sft-chosen", "sft-chosen.1", "sft-chosen.2")):
        of_fold = run.scored_by("S", pair)
        assert of_fold["index"] == [pair, pair + 3] and sorted([*of_fold["index"], *seen[name]]) == list(range(6))
        assert scored["chosen_contrast"][pair] == pytest.approx(of_fold["chosen_contrast"][0])


def test_smoothing_and_the_standard_deviation():
    rows = tiny.contrast(tiny.rows(4))
    one = contrasts(contrastive.combined(tiny.rows(4), [(rows, None)], smooth=3))[0]
    raw = contrasts(rows)[0]
    torch.testing.assert_close(one[1], raw[:3].mean())
    torch.testing.assert_close(one[0], raw[:2].mean())  # shorter at the ends
    scaled = contrastive.combined(tiny.rows(4), [(rows, None)], std=0.25)
    every = torch.cat([*contrasts(scaled), *contrasts(scaled, "rejected")])
    assert every.std(correction=0).item() == pytest.approx(0.25)
    torch.testing.assert_close(contrasts(scaled)[0] / raw, (contrasts(scaled)[0][0] / raw[0]).expand_as(raw))  # one factor, zero stays


def test_contrastive_models_of_another_size(start):
    small = "contrast.model={hidden_size: 8, heads: 2, layers: 1, pretrain: {steps: 2, batch_size: 4, learning_rate: 1e-3}}"
    run = start("a", small)
    model = run.contrastive_model("sft-chosen")
    assert model.config.hidden_size == 8 and run.reference.config.hidden_size == 16
    dpo = start("b", small, "contrast.constructions=[D]", "methods=[D]", "contrast.dpo={steps: 2, batch_size: 4, learning_rate: 1e-3}")
    smaller, base = (dpo._with_reference(dpo.source.train, model)["chosen_ref_logps"] for model in (dpo.contrast_reference, None))
    assert dpo.rows_for_contrast["chosen_ref_logps"] == smaller != base  # contrastive DPO is held to its own start


def test_contrastive_models_learn_from_other_data(start):
    other = "contrast.data={source: synthetic, limit: 6, heldout: 2, max_length: 96, world: {flip: 0.5, people: 0.1}}"
    run = start("a", other)
    assert run.contrast_source.train["chosen_ids"] != run.source.train["chosen_ids"]
    scored = run.scored("S")
    assert scored["chosen_ids"] == run.source.train["chosen_ids"]
    assert scored["chosen_contrast"] != start("b").scored("S")["chosen_contrast"]


def test_a_policy_is_evaluated_on_other_data(start):
    other = "evaluation.data={source: synthetic, limit: 6, heldout: 3, max_length: 96, world: {reward: 5}}"
    run, plain = start("a", other), start("b")
    assert len(run.heldout_reference) == 3 and len(plain.heldout_reference) == 8
    ids = run.source.tokenizer("the gardener was gentle .", add_special_tokens=False)["input_ids"]
    generation = type("Generation", (), {"ids": ids, "prompt_ids": []})
    assert run.reward(generation) == 5 * plain.reward(generation) != 0


def test_rounds_estimate_anew_and_go_on_after_an_interruption(start, monkeypatch):
    more = ["contrast.rounds=2", "methods=[S]", "train.learning_rate=1e-2"]
    run, calls, real = start("twice", *more), [], pipeline.train_stage

    def dies_in_the_second_round(*args, **kwargs):
        calls.append(kwargs["until"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(pipeline, "train_stage", dies_in_the_second_round)
    with pytest.raises(KeyboardInterrupt):
        run.policy("S")
    twice = run.policy("S")["points"]
    assert calls == [2, 4, 4] and [p["step"] for p in twice] == [2, 4]
    anew = pipeline.Round(run, run.place("policy/S") / "round-1").scored("S")
    assert anew["chosen_contrast"] != run.scored("S")["chosen_contrast"]
    once = start("once", *more, "contrast.rounds=1").policy("S")["points"]
    assert once[0] == twice[0] and once[1] != twice[1]


def test_a_round_that_was_killed_before_its_model_was_saved(start, monkeypatch):
    """The checkpoint of its last step is there: the weights are estimated from that, and nothing is trained on with those of before."""
    more, real, killed = ["contrast.rounds=2", "methods=[S]", "train.learning_rate=1e-2"], pipeline.save_model, []

    def killed_once(model, tokenizer, path):
        if "round-1" in str(path) and not killed:
            killed.append(path)
            raise KeyboardInterrupt
        real(model, tokenizer, path)

    expected = start("straight", *more).policy("S")["points"]
    run = start("killed", *more)
    monkeypatch.setattr(pipeline, "save_model", killed_once)
    with pytest.raises(KeyboardInterrupt):
        run.policy("S")
    assert killed and run.policy("S")["points"] == expected


def test_pairs_of_a_prompt_are_in_one_fold(start, tmp_path):
    """Of text: they may share a response, which the models of a fold must not have seen."""
    pairs = [{"prompt": f"what is {word}", "chosen": " a", "rejected": f" {n}"} for word in ("sun", "moon", "rain", "snow") for n in "bcd"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    source = f"data={{source: {tmp_path / 'pairs.jsonl'}, heldout: 3, max_length: 64}}"
    run = start("text", "contrast.pairs=2", "contrast.crossfit=true", source, "data.limit=null", "model.vocab_size=300", "methods=[S]")
    folds = [run.fold(pair) for pair in (0, 1)]
    prompts = [{tuple(run.source.train["prompt_ids"][n]) for n in fold} for fold in folds]
    with pytest.raises(InputError, match=r"crossfit shares prompts out to contrast\.pairs=4, and there are 3"):
        start("few", "contrast.pairs=4", "contrast.crossfit=true", source, "data.limit=null", "model.vocab_size=300", "methods=[S]").fold(0)
    assert sorted(folds[0] + folds[1]) == list(range(9)) and not prompts[0] & prompts[1] and min(map(len, folds)) == 3


def test_longer_data_of_the_evaluation_do_not_bind_the_training(start):
    """The batches of a stage have to hold the pairs that it trains on, not those that others are evaluated on."""
    longer = "evaluation.data={source: synthetic, limit: 8, heldout: 4, max_length: 400}"
    run = start("longer", longer, "train.batch_size=32", "train.tokens_per_batch=200")
    assert len(run.evaluation_source.heldout) == 4


def test_batches_of_the_contrast_hold_its_own_pairs(start):
    """Told when the run begins, not after hours."""
    data = "contrast.data={source: synthetic, limit: 8, heldout: 4, max_length: 300}"
    with pytest.raises(InputError, match=r"contrast\.sft\.tokens_per_batch=200 cannot hold every row of data\.max_length=300"):
        start("long", data, "contrast.sft.batch_size=32", "contrast.sft.tokens_per_batch=200")


def test_contrast_data_have_a_length_of_their_own(start, monkeypatch):
    seen = {}
    monkeypatch.setattr(estimation, "train_stage", lambda *args, options, **more: seen.update(options) or 1 / 0)
    run = start("own", "contrast.data={source: synthetic, limit: 8, heldout: 4, max_length: 80}")
    run.base  # noqa: B018
    monkeypatch.setattr(run, "contrast_base", lambda: None)
    with pytest.raises(ZeroDivisionError):
        run.contrastive_model("sft-chosen")
    assert seen["max_length"] == 80


@pytest.mark.parametrize(
    "override, message",
    [
        ("contrast.smooth=2", "odd number"),
        ("contrast.std=0", "std must be"),
        ("contrast.crossfit=true", "crossfit needs pairs"),
        ("contrast={constructions: [P], pairs: 2}", "pairs has no effect on construction P"),
        ("contrast={constructions: [P], checkpoints: 2}", "checkpoints has no effect on construction P"),
        ("contrast={constructions: [P], data: {source: synthetic}}", "data has no effect on construction P"),
        ("contrast={constructions: [P], rounds: 5}", "contrast.rounds=5 is more than train.steps=4"),
    ],
)
def test_what_has_no_effect_is_refused(start, override, message):
    with pytest.raises(InputError, match=message):
        start("a", override, "methods=[dpo]")


def test_other_tokenizers_are_refused(start, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"Q{i}?", "chosen": " yes.", "rejected": " no."}) for i in range(8))
    )
    run = start("a", "methods=[dpo]")
    run.config = replace(
        run.config,
        contrast=replace(run.config.contrast, data=replace(run.config.data, source=str(tmp_path / "pairs.jsonl"), heldout=2, world={})),
    )
    with pytest.raises(InputError, match=r"contrast\.data.*another tokenizer"):
        run.scored("S")
