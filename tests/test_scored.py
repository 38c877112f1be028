"""Scored sets: stored whole, refused when they belong to something else; fingerprints; the authors' weight files."""

import copy
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from pair_tokenizers import CHAT_TEMPLATE, NO_SYSTEM_TEMPLATE, bpe, words
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import tisdpo
from tisdpo.data import PairCollator, load_pairs, tokenize_pairs
from tisdpo.errors import InputError
from tisdpo.fingerprints import chat_template_fingerprint, model_fingerprint, tokenizer_fingerprint
from tisdpo.provenance import FORMAT
from tisdpo.scored import ids_fingerprint, import_official_weights, load_provenance, load_scored, make_provenance, save_scored
from tisdpo.weighting import Weighting, contrast_weights

PAIRS = [
    {"prompt": f"What is {a}?", "chosen": f" It is {b}.", "rejected": " I do not know that."} for a, b in [("two", "four"), ("sky", "blue")]
]
HOW = {"construction": "P", "prompts": ("be kind", "be rude"), "steps": 80}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))


def scored_rows(**columns):
    rows, _ = tokenize_pairs(PAIRS, words())
    generator = np.random.default_rng(0)
    for side in ("chosen", "rejected"):
        for name in ("contrast", *columns):
            values = [(generator.normal(size=len(ids)) - 3).astype(np.float32).tolist() for ids in rows[f"{side}_ids"]]
            rows = rows.add_column(f"{side}_{name}", values)
    return rows


def provenance(tokenizer=None, **changes):
    return make_provenance(tokenizer or words(), **{"max_length": 64, "positive": "aa", "negative": "bb", "how": HOW, **changes})


@pytest.fixture
def stored(tmp_path):
    rows, path = scored_rows(), tmp_path / "runs" / "scored"
    save_scored(rows, path, provenance())
    return rows, path


# Storing and loading


def test_what_is_stored_comes_back(stored):
    rows, path = stored
    loaded = load_scored(path, dataset=rows, expect=provenance())
    assert list(loaded) == list(rows)  # float32 values, bit for bit
    assert loaded.features["chosen_contrast"].feature.dtype == "float32" and rows.features["chosen_contrast"].feature.dtype == "float64"
    assert load_provenance(path) == {
        "format": FORMAT, "tisdpo": tisdpo.__version__, "pairs": 2, "ids": ids_fingerprint(rows), **json.loads(json.dumps(provenance())),
    }  # fmt: skip
    assert [entry.name for entry in path.parent.iterdir()] == ["scored"]  # nothing beside it


def test_reference_and_truth_are_stored_too(tmp_path):
    rows = scored_rows(ref_logps=1, truth=1)
    save_scored(rows, tmp_path / "set", provenance(reference="cc"))
    loaded = load_scored(tmp_path / "set", expect={"reference_model": "cc"})
    assert loaded["rejected_ref_logps"][:] == rows["rejected_ref_logps"][:] and loaded["chosen_truth"][:] == rows["chosen_truth"][:]
    with pytest.raises(InputError, match=r"reference_model is 'cc' there and 'dd' here; train from the model that was the reference"):
        load_scored(tmp_path / "set", expect={"reference_model": "dd"})
    with pytest.raises(InputError, match="lacks reference_model"):
        save_scored(rows, tmp_path / "other", provenance())


MISMATCHES = [
    ({"max_length": 128}, r"max_length is 64 there and 128 here; use the max_length it was scored with"),
    ({"positive_model": "cc"}, r"positive_model is 'aa' there and 'cc' here; score the pairs again"),
    ({"negative_model": "cc"}, r"negative_model is 'bb' there and 'cc' here"),
    ({"tokenizer": "0"}, r"tokenizer is '[0-9a-f]{16}' there and '0' here; use the tokenizer it was scored with"),
    ({"chat_template": "0"}, r"chat_template is None there and '0' here; use the chat template"),
    ({"how": {"construction": "S"}}, r"how.construction is 'P' there and 'S' here"),
    ({"how": {**HOW, "steps": 81}}, r"conditions: how.steps is 80 there and 81 here"),
    ({"unheard": 1}, r"unheard is None there and 1 here"),
    ({"max_length": 128, "positive_model": "cc"}, r"max_length is 64 .*; positive_model is 'aa'"),
]  # fmt: skip


@pytest.mark.parametrize("expect, message", MISMATCHES, ids=[" ".join(expect) for expect, _ in MISMATCHES])
def test_a_set_scored_otherwise_is_refused_by_field_and_values(stored, expect, message):
    with pytest.raises(InputError, match=message):
        load_scored(stored[1], expect={**json.loads(json.dumps(provenance())), **expect})


def test_a_set_of_other_rows_is_refused(stored):
    rows, path = stored
    other, _ = tokenize_pairs([PAIRS[0], {**PAIRS[1], "chosen": " It is green."}], words())
    with pytest.raises(
        InputError, match=r"scored for other rows: chosen_ids of row 1 is \[.*\] \(5 tokens\) there and \[.*\] \(5 tokens\) here"
    ):
        load_scored(path, dataset=other)
    with pytest.raises(InputError, match="it has 2 pairs, these are 1"):
        load_scored(path, dataset=rows.select([0]))
    with pytest.raises(InputError, match="other rows"):
        load_scored(path, dataset=rows.select([1, 0]))
    plain = rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    assert len(load_scored(path, dataset=plain)) == 2


def test_what_is_no_scored_set_is_refused(stored, tmp_path):
    rows, path = stored
    with pytest.raises(InputError, match=r"absent is no scored set \(provenance.json is missing\)"):
        load_scored(tmp_path / "absent")
    with pytest.raises(InputError, match="exists; remove it"):
        save_scored(rows, path, provenance())
    content = json.loads((path / "provenance.json").read_text())
    for changed, message in [({"format": 1}, f"format is 1 there and {FORMAT} here"), ({"ids": "0"}, "its ids have changed")]:
        (path / "provenance.json").write_text(json.dumps({**content, **changed}))
        with pytest.raises(InputError, match=message):
            load_scored(path)
    (path / "provenance.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        load_scored(path)
    (path / "provenance.json").write_text(json.dumps(content))
    (path / "data-00000-of-00001.arrow").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"cannot be read .* remove the directory and score"):
        load_scored(path)


def test_a_killed_save_leaves_nothing_and_is_repeated(tmp_path, monkeypatch):
    rows, path = scored_rows(), tmp_path / "scored"

    def killed(self, directory):
        (Path(directory) / "half").write_text("")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Dataset, "save_to_disk", killed)
        with pytest.raises(KeyboardInterrupt):
            save_scored(rows, path, provenance())
    assert not path.exists()
    save_scored(rows, path, provenance())
    assert list(load_scored(path, dataset=rows)) == list(rows)
    assert not (path / "half").exists() and [p.name for p in tmp_path.iterdir()] == ["scored"]


def test_rows_that_are_no_scored_rows_are_refused(tmp_path):
    rows, path = scored_rows(), tmp_path / "set"

    def with_values(column, values):
        return rows.remove_columns([column]).add_column(column, values)

    good = rows["chosen_contrast"][:]
    for bad, message in [
        (rows.remove_columns(["rejected_contrast"]), "no column 'rejected_contrast'"),
        (rows.remove_columns(["prompt_ids"]), "no column 'prompt_ids'"),
        (with_values("chosen_contrast", [good[0], good[1][:-1]]), "pair 1: chosen_contrast has 4 values for 5 tokens"),
        (with_values("chosen_contrast", [good[0], [float("nan"), *good[1][1:]]]), "pair 1: chosen_contrast is nan at token 0"),
    ]:
        with pytest.raises(InputError, match=message):
            save_scored(bad, path, provenance())
    with pytest.raises(InputError, match="provenance lacks max_length, how"):
        save_scored(rows, path, {k: v for k, v in provenance().items() if k not in ("max_length", "how")})
    assert not path.exists()


def test_ids_fingerprint_sees_every_id_and_every_boundary():
    def fingerprint(prompt, chosen, rejected):
        return ids_fingerprint(Dataset.from_dict({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}))

    base = fingerprint([[1], [1, 2]], [[3, 4], [5]], [[6], [7]])
    others = [
        fingerprint([[1], [1, 2]], [[3, 4], [5]], [[6], [8]]),
        fingerprint([[1], [1, 2]], [[3], [4, 5]], [[6], [7]]),
        fingerprint([[1, 1], [2]], [[3, 4], [5]], [[6], [7]]),
        fingerprint([[1], [1, 2]], [[6], [7]], [[3, 4], [5]]),
    ]
    assert len({base, *others}) == 5
    long = {name: [[i % 7, i] for i in range(2500)] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    whole = Dataset.from_dict(long)
    parts = datasets.concatenate_datasets([whole.select(range(700)), whole.select(range(700, 2500))])
    assert ids_fingerprint(whole) == ids_fingerprint(parts)  # of the content, not of how it lies in memory


# Fingerprints


def test_model_fingerprints(tmp_path):
    model = tiny()
    name = model_fingerprint(model)
    assert name == model_fingerprint(copy.deepcopy(model)) and len(name) == 16
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert model_fingerprint(loaded) == name
    assert (
        len(
            {
                name,
                model_fingerprint(tiny(1)),
                model_fingerprint(tiny(rms_norm_eps=1e-3)),
                model_fingerprint(copy.deepcopy(model).bfloat16()),
            }
        )
        == 4
    )
    loss = loaded(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()
    torch.optim.SGD(loaded.parameters(), lr=1e-2).step()
    assert model_fingerprint(loaded) != name  # one step of training
    make = make_provenance(words(), max_length=None, positive=model, negative=loaded, how={})
    assert make["positive_model"] == name and make["negative_model"] == model_fingerprint(loaded)


def test_tokenizer_fingerprints(tmp_path):
    tokenizer = bpe(bos=True)
    name = tokenizer_fingerprint(tokenizer)
    tokenizer(["two", "two and two"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == name  # a call changes nothing
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(loaded) == name
    assert (
        chat_template_fingerprint(loaded)
        == chat_template_fingerprint(tokenizer)
        != chat_template_fingerprint(bpe(template=NO_SYSTEM_TEMPLATE))
    )
    assert chat_template_fingerprint(bpe(template=None)) is None
    tokenizer.chat_template = CHAT_TEMPLATE.replace("user", "human")
    assert tokenizer_fingerprint(tokenizer) == name
    assert len({name, tokenizer_fingerprint(bpe()), tokenizer_fingerprint(words())}) == 3
    loaded.add_tokens(["breadbreadbread"])
    assert tokenizer_fingerprint(loaded) != name


# The authors' files


def official_file(path, tokenizer, pairs=PAIRS, change=lambda row: row):
    """What token_weight_estimation.py writes: log pi- minus log pi+, to two digits, for every token of the response alone."""
    rows = []
    for number, pair in enumerate(pairs):
        row = dict(pair)
        for side, sign in (("chosen", -1), ("rejected", 1)):
            tokens = tokenizer(pair[side], add_special_tokens=False)["input_ids"]
            row[f"{side}_weight"] = [round(sign * (0.25 * i + 0.13) - number, 2) for i in range(len(tokens))]
        rows.append(change(row))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("make", [words, bpe])
def test_official_weights_come_in_with_our_sign(tmp_path, make):
    tokenizer = make(bos=True)
    rows, counts = import_official_weights(official_file(tmp_path / "train.jsonl", tokenizer), tokenizer)
    assert counts.describe() == "2 pairs: 2 kept" and rows["index"][:] == [0, 1]
    plain, _ = tokenize_pairs(PAIRS, tokenizer)
    assert rows["chosen_ids"][:] == plain["chosen_ids"][:] and rows["prompt_ids"][:] == plain["prompt_ids"][:]
    chosen = rows[0]["chosen_contrast"]
    assert chosen[:3] == pytest.approx([0.13, 0.38, 0.63]) and chosen[-1] == 0.0  # pi+ prefers these; nothing is known of EOS
    assert rows[1]["rejected_contrast"][:2] == pytest.approx([-0.13 + 1, -0.38 + 1])
    weights = contrast_weights(torch.tensor(chosen), torch.ones(len(chosen), dtype=torch.bool), Weighting())
    assert (weights[:3] > 1).all() and weights[-1] == 1.0
    batch_rows = [{**row, **{f"{side}_weights": [1.0] * len(row[f"{side}_ids"]) for side in ("chosen", "rejected")}} for row in rows]
    assert PairCollator(0, weights=True)(batch_rows)["token_weights"].sum() == sum(
        len(ids) for s in ("chosen", "rejected") for ids in rows[f"{s}_ids"]
    )


def test_official_weights_are_truncated_with_their_ids(tmp_path):
    rows, counts = import_official_weights(official_file(tmp_path / "train.jsonl", words()), words(), max_length=7)
    assert counts.truncated == 2
    assert all(
        len(row[f"{side}_contrast"]) == len(row[f"{side}_ids"]) == 7 - len(row["prompt_ids"])
        for row in rows
        for side in ("chosen", "rejected")
    )


def test_official_weights_of_other_tokens_are_dropped_or_refused(tmp_path):
    def one_less(row):
        return {**row, "chosen_weight": row["chosen_weight"][:-1]} if "sky" in row["prompt"] else row

    rows, counts = import_official_weights(official_file(tmp_path / "a.jsonl", words(), change=one_less), words())
    assert rows["index"][:] == [0] and counts.dropped == {"tokens differ from the file's": 1} and counts.kept == 1
    merged = [*PAIRS, {"prompt": "how do I bake bre", "chosen": "ad?", "rejected": " it?"}]  # alone, "ad" is another token
    rows, counts = import_official_weights(official_file(tmp_path / "b.jsonl", bpe(), merged), bpe())
    assert rows["index"][:] == [0, 1] and counts.dropped == {"tokens differ from the file's": 1}
    unknown = [{**pair, "chosen": " unheard-of vocabulary"} for pair in PAIRS]
    with pytest.raises(InputError, match=r"no pair of .*c.jsonl can be used \(.*2 tokens differ.*give the tokenizer of the models"):
        import_official_weights(official_file(tmp_path / "c.jsonl", words(), unknown), bpe())
    (tmp_path / "d.jsonl").write_text(json.dumps(PAIRS[0]))
    with pytest.raises(InputError, match="no column chosen_weight, rejected_weight"):
        import_official_weights(tmp_path / "d.jsonl", words())
    (tmp_path / "e.jsonl").write_text(json.dumps({**PAIRS[0], "chosen_weight": 0.5, "rejected_weight": 0.5}))
    with pytest.raises(InputError, match="pair 0: chosen_weight must be a list"):
        import_official_weights(tmp_path / "e.jsonl", words())
    assert len(load_pairs(tmp_path / "e.jsonl")) == 1
