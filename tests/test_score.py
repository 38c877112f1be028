"""`tisdpo score`: one command for contrast, reference log-probs and hidden states; shared out over processes; what it refuses."""

import json
import os
import re
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file

from tisdpo import TISDPOConfig, TISDPOTrainer, cli, parts, score
from tisdpo.cached import ReferenceCache
from tisdpo.contrastive import Scorer, score_contrast, system_prompts
from tisdpo.data import load_pairs, tokenize_pairs
from tisdpo.errors import InputError
from tisdpo.fingerprints import model_fingerprint
from tisdpo.hf import load_model, save_model, train_bpe
from tisdpo.prompts import PROMPTS
from tisdpo.rows import add_reference_logps
from tisdpo.scored import load_provenance, load_scored, make_provenance, save_scored, scores_of

BATCH = ("--batch-tokens", "300")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of three models."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("good", 1), ("bad", 2)):
        save_model(tiny.model(seed), tiny.tokenizer(), folder / name)
    return folder


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(pair) for pair in tiny.pairs(24)[:10]))
    return path


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(cli, "_quiet", lambda debug: None)
    monkeypatch.setattr(parts, "PART_TOKENS", 60)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def words(pairs, out, models, *more):
    return ["score", str(pairs), str(out), "--positive", str(models / "good"), "--negative", str(models / "bad"), *BATCH, *more]


def with_reference(models, *more):
    return ["--reference", str(models / "base"), "--reference-hidden", *more]


def said(capsys, argv) -> str:
    """The one sentence of a command that ends with exit code 2."""
    capsys.readouterr()
    assert cli.main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tisdpo: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("tisdpo: ")


def content(out) -> dict[str, bytes]:
    """Every file of values of a scored set."""
    files = [*out.glob("*.arrow"), *out.rglob("*.safetensors")]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def test_one_command_writes_contrast_reference_and_hidden_states(pairs, models, tmp_path, capsys):
    out = tmp_path / "runs" / "set"
    assert cli.main(words(pairs, out, models, *with_reference(models, "--max-length", "128"))) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert sorted(p.name for p in out.parent.iterdir()) == ["set"]  # nothing beside it
    rows, _ = tokenize_pairs(load_pairs(pairs), tiny.tokenizer(), max_length=128)
    loaded = load_scored(out, dataset=rows, expect={"max_length": 128, "reference_model": model_fingerprint(tiny.model(0))})
    expected = score_contrast(rows, Scorer(tiny.model(1)), Scorer(tiny.model(2)), pad_token_id=0, parts=tmp_path / "p", batch_tokens=300)
    assert loaded["chosen_contrast"][:] == expected["chosen_contrast"][:] and "chosen_ref_logps" in loaded.column_names
    cache = ReferenceCache(out)
    cache.check(loaded)
    assert cache.dtype == torch.bfloat16 and len(list((out / "reference").glob("hidden-*"))) > 2
    found = load_provenance(out)
    assert found["positive_model"] == model_fingerprint(tiny.model(1)) and found["negative_model"] == model_fingerprint(tiny.model(2))
    assert found["reference_hidden"] == "bfloat16" and found["how"] == {"positive": str(models / "good"), "negative": str(models / "bad")}


def test_a_reference_alone_serves_dpo(pairs, models, tmp_path, capsys):
    """Its log-probs for the loss without a KL term, its hidden states for one; what needs a contrast says that there is none."""
    out, base = tmp_path / "set", str(models / "base")
    argv = ["score", str(pairs), str(out), "--reference", base, "--reference-hidden", "--hidden-dtype", "float32", "--max-length", "128"]
    assert cli.main(argv) == 0
    rows = load_scored(out)
    assert "chosen_contrast" not in rows.column_names and load_provenance(out)["positive_model"] is None
    expected = add_reference_logps(rows.remove_columns(["chosen_ref_logps", "rejected_ref_logps"]), tiny.model(0), 0)
    for side in ("chosen", "rejected"):
        for a, b in zip(rows[f"{side}_ref_logps"], expected[f"{side}_ref_logps"]):
            assert a == pytest.approx(b, abs=1e-5)
    for kl in (None, "reverse"):
        options = dict(use_cpu=True, max_steps=1, per_device_train_batch_size=2, disable_tqdm=True, method="dpo", max_length=128, kl=kl)
        args = TISDPOConfig(str(tmp_path / "out"), **options)
        run = TISDPOTrainer(load_model(base), args, load_scored(out), processing_class=tiny.tokenizer())
        assert run.ref_model is None and (run.cache is None) == (kl is None)
        run.train()
        with pytest.raises(InputError, match="reference_model is"):
            TISDPOTrainer(tiny.model(1), args, load_scored(out), processing_class=tiny.tokenizer())
    for argv in (["show", str(out)], ["annotate", str(out), "--pairs", "1", "--tokenizer", base]):
        assert "holds the log-probs of a reference alone, and no contrast" in said(capsys, argv)


def test_options_have_effects(pairs, models, tmp_path):
    out = tmp_path / "set"
    argv = words(pairs, out, models, *with_reference(models, "--hidden-dtype", "float32"), "--limit", "4", "--max-length", "30")
    assert cli.main([*argv, "--tokenizer", str(models / "base"), "--split", "train[2:]"]) == 0
    rows = load_scored(out, expect={"max_length": 30})
    assert len(rows) <= 4 and ReferenceCache(out).dtype == torch.float32
    first = tokenize_pairs(load_pairs(pairs).select([2]), tiny.tokenizer(), max_length=30)[0][0]
    assert rows[0]["chosen_ids"] == first["chosen_ids"]
    assert max(len(r["prompt_ids"]) + len(r["chosen_ids"]) for r in rows) <= 30


def test_16_bit_models_and_a_policy_that_uses_their_reference(pairs, models, tmp_path):
    """The dtype is part of what a reference is."""
    out = tmp_path / "set"
    assert cli.main(words(pairs, out, models, "--reference", str(models / "base"), "--dtype", "bfloat16")) == 0
    policy = load_model(str(models / "base"), dtype=torch.bfloat16)
    assert load_provenance(out)["reference_model"] == model_fingerprint(policy) != model_fingerprint(tiny.model(0))
    args = TISDPOConfig(str(tmp_path / "out"), use_cpu=True, max_steps=1, per_device_train_batch_size=2, disable_tqdm=True)
    TISDPOTrainer(policy, args, train_dataset=load_scored(out), processing_class=tiny.tokenizer()).train()
    with pytest.raises(InputError, match="reference_model is"):
        TISDPOTrainer(load_model(str(models / "base")), args, train_dataset=load_scored(out), processing_class=tiny.tokenizer())


def test_a_task_puts_its_prompts_in_front(pairs, models, tmp_path):
    out, base = tmp_path / "set", str(models / "base")
    own = "you are a friendly writer."
    argv = ["score", str(pairs), str(out), "--positive", base, "--negative", base, "--task", "helpful", "--positive-prompt", own]
    assert cli.main(argv) == 0
    raw = load_pairs(pairs)
    rows, _ = tokenize_pairs(raw, tiny.tokenizer())
    scorers = [Scorer(tiny.model(0), system_prompts(raw, rows, tiny.tokenizer(), text)) for text in (own, PROMPTS["helpful"][1])]
    expected = score_contrast(rows, *scorers, pad_token_id=0, parts=tmp_path / "p")
    assert load_scored(out)["rejected_contrast"][:] == expected["rejected_contrast"][:]
    how = load_provenance(out)["how"]
    assert how["construction"] == "P" and how["positive_prompt"] == own and how["negative_prompt"] == PROMPTS["helpful"][1]
    assert score.task_prompts(None, "a", "b") == ("a", "b") and score.task_prompts(None, None, None) is None


# Sharing out


@pytest.fixture
def whole(pairs, models, tmp_path):
    out = tmp_path / "whole"
    assert cli.main(words(pairs, out, models, *with_reference(models))) == 0
    return out


def test_shares_of_jobs_join_to_the_same_bits(pairs, models, tmp_path, whole, capsys, monkeypatch):
    out, real, scored = tmp_path / "set", parts.Scoring._score, []
    monkeypatch.setattr(parts.Scoring, "_score", lambda self, part: (scored.append(part), real(self, part)))
    argv = words(pairs, out, models, *with_reference(models))
    capsys.readouterr()
    for share in ("1/3", "0/3", "2/3"):
        assert cli.main([*argv, "--shard", share]) == 0 and not out.exists()
        assert capsys.readouterr().out.startswith(f"share {share[0]} of 3 is scored; when all are, the same command without --shard joins")
    assert sorted(scored) == list(range(len(scored))) and scored[0] == 1 and len(scored) >= 3
    scored.clear()
    assert cli.main(argv) == 0 and not scored  # nothing was left to score
    assert content(out) == content(whole)


def test_ranks_share_the_work_and_rank_0_joins(pairs, models, tmp_path, whole, capsys, monkeypatch):
    out = tmp_path / "set"
    argv = words(pairs, out, models, *with_reference(models))

    def rank(number):
        monkeypatch.setenv("RANK", str(number))
        return cli.main(argv)

    def other_ranks(seconds):
        assert not out.exists()
        assert rank(1) == 0 and rank(2) == 0 and not out.exists()

    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(score.time, "sleep", other_ranks)  # they work while rank 0 waits
    capsys.readouterr()
    assert rank(0) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert content(out) == content(whole)


def test_what_is_there_is_taken_or_refused(pairs, models, tmp_path, whole, capsys, monkeypatch):
    before = content(whole)
    monkeypatch.setattr(parts.Scoring, "_score", lambda self, part: pytest.fail("scored again"))
    assert cli.main(words(pairs, whole, models, *with_reference(models))) == 0
    assert "reference_hidden is 'bfloat16' there and 'float32' here" in said(
        capsys, words(pairs, whole, models, *with_reference(models, "--hidden-dtype", "float32"))
    )
    swapped = ["score", str(pairs), str(whole), "--positive", str(models / "bad"), "--negative", str(models / "good")]
    assert re.search(r"positive_model is '\w+' there and '\w+' here; negative_model is", said(capsys, swapped))
    assert content(whole) == before


# What is refused


def test_mistakes_are_one_sentence(pairs, models, tmp_path, capsys):
    out, base = tmp_path / "set", str(models / "base")
    same = ["score", str(pairs), str(out), "--positive", base, "--negative", base]
    assert said(capsys, same).startswith("positive and negative are the same model")
    assert said(capsys, same[:5]).startswith("the contrast needs two models: give --positive and --negative together")
    assert "so the command needs a reference" in said(capsys, same[:3])
    assert "so the command needs the models that see these prompts" in said(capsys, [*same[:3], "--reference", base, "--task", "helpful"])
    assert said(capsys, [*same, "--positive-prompt", "x"]).startswith("a system prompt needs its opposite")
    for task in ([], ["--task", "harmless"]):
        prompts = [*task, "--positive-prompt", "x", "--negative-prompt", "x"]
        assert "are the same; their contrast" in said(capsys, [*same, *prompts])
    assert "must not be empty" in said(capsys, [*same, "--task", "harmless", "--positive-prompt", ""])
    assert said(capsys, words(pairs, out, models, "--reference-hidden")).startswith("--reference-hidden needs the model")
    assert said(capsys, words(pairs, out, models, "--hidden-dtype", "float32")).startswith("--hidden-dtype has no effect without")
    assert said(capsys, words("gone.jsonl", out, models)).startswith("gone.jsonl does not exist; give the path")
    other = tmp_path / "other"
    shutil.copytree(models / "bad", other)
    train_bpe(["some text"], 300).save_pretrained(other)
    assert said(capsys, ["score", str(pairs), str(out), "--positive", base, "--negative", str(other)]).startswith(
        f"the tokenizers of {base} and {other} differ"
    )
    assert not out.exists()


@pytest.mark.parametrize("more", [["--shard", "4/4"], ["--shard", "x"], ["--shard", "-1/4"], ["--max-length", "0"], ["--task", "kind"]])
def test_wrong_values_end_in_usage(pairs, models, tmp_path, capsys, more):
    with pytest.raises(SystemExit) as end:
        cli.main(words(pairs, tmp_path / "set", models, *more))
    assert end.value.code == 2 and f"argument {more[0]}" in capsys.readouterr().err


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_one_sentence_and_scoring_goes_on_afterwards(pairs, models, tmp_path, capsys, whole, monkeypatch):
    from datasets import Dataset
    from safetensors import SafetensorError

    out, argv = tmp_path / "set", words(pairs, tmp_path / "set", models, *with_reference(models))
    remedy = "no space is left on its disk; free some and give the same command again, it goes on from there"
    real, written = parts.save_file, []

    def third_is_full(tensors, path):
        written.append(path)
        if len(written) == 5:
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(tensors, path)

    monkeypatch.setattr(parts, "save_file", third_is_full)
    assert re.fullmatch(rf"{out}.parts/\w+/hidden-00002.safetensors could not be written: {remedy}", said(capsys, argv))
    assert not list(out.with_name("set.parts").rglob("*.writing"))  # the half file is gone
    with monkeypatch.context() as patched:
        patched.setattr(Dataset, "save_to_disk", full)
        assert said(capsys, argv) == f"{out} could not be written: {remedy}"
        assert not out.exists()
    with monkeypatch.context() as patched:
        patched.setattr("tisdpo.cached.os.link", full)
        patched.setattr("tisdpo.cached.shutil.copyfile", full)
        assert said(capsys, argv) == f"{out} could not be written: {remedy}"
    assert cli.main(argv) == 0
    assert content(out) == content(whole)


def test_an_output_that_cannot_be_written_is_told_before_the_models_are_loaded(pairs, models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(score, "load_model", lambda *args, **kwargs: pytest.fail("the models were loaded"))
    (tmp_path / "file").write_text("")
    argv = words(pairs, tmp_path / "file" / "set", models)
    assert re.match(r".*set.parts could not be written: not a directory \(.*\); give another directory", said(capsys, argv))
    for number, name in ((13, "Permission denied"), (30, "Read-only file system")):

        def refuse(self, *args, number=number, name=name, made=score.Path.mkdir, **kwargs):
            if self.name == "set.parts":
                raise OSError(number, name, str(self))
            return made(self, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(score.Path, "mkdir", refuse)
            sentence = said(capsys, words(pairs, tmp_path / "set", models))
        assert sentence == f"{tmp_path}/set.parts could not be written: nothing can be written there; give a directory that can be written"


def test_a_dataset_that_vanished_between_two_tries_is_named(pairs, models, tmp_path, capsys):
    argv = words(pairs, tmp_path / "set", models)
    assert cli.main([*argv, "--shard", "0/2"]) == 0
    pairs.unlink()
    assert said(capsys, argv).startswith(f"{pairs} does not exist; give the path of a .json")


# Only safetensors, and no code of others


def test_pickled_weights_are_refused(pairs, models, tmp_path, capsys):
    pickled = tmp_path / "pickled"
    shutil.copytree(models / "bad", pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    assert load_model(str(pickled)) is not None  # the safetensors beside it are read
    (pickled / "model.safetensors").unlink()
    sentence = said(capsys, ["score", str(pairs), str(tmp_path / "set"), "--positive", str(models / "good"), "--negative", str(pickled)])
    assert sentence.startswith(f"'{pickled}' holds its weights as pytorch_model.bin, a pickle, which can run any code when it is read")


def test_code_of_a_model_runs_only_when_asked(pairs, models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.utils.hub.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("it asked on the terminal"))
    custom, ran = tmp_path / "custom", tmp_path / "ran"
    shutil.copytree(models / "bad", custom)
    (custom / "modeling_own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((custom / "config.json").read_text())
    config |= {
        "model_type": "own-llama",
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},
    }
    (custom / "config.json").write_text(json.dumps(config))
    argv = ["score", str(pairs), str(tmp_path / "set"), "--positive", str(models / "good"), "--negative", str(custom), "--limit", "3"]
    assert "trust_remote_code" in said(capsys, [*argv, "--tokenizer", str(models / "good")]) and not ran.exists()
    assert not ran.exists()
    assert cli.main([*argv, "--tokenizer", str(models / "good"), "--trust-remote-code"]) == 0 and ran.exists()
    assert os.path.exists(tmp_path / "set" / "provenance.json")


def test_scores_of_some_of_the_pairs_in_another_order(tmp_path):
    save_scored(
        tiny.contrast(tiny.rows()), tmp_path / "set", make_provenance(tiny.tokenizer(), max_length=128, positive="a", negative="b", how={})
    )
    rows, order = load_scored(tmp_path / "set"), [5, 2, 9, 0]
    found = scores_of(tmp_path / "set", tiny.rows().select(order), expect={"max_length": 128})
    for column in ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_contrast", "rejected_contrast"):
        assert list(found[column]) == [rows[i][column] for i in order]
    other = tiny.rows(30).select([0, 28, 29])
    with pytest.raises(InputError, match=r"has no scores for 2 of these 3 rows, row 1 for one; .* scored with max_length=128"):
        scores_of(tmp_path / "set", other)
