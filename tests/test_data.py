"""Reading pairs, tokenising them, dropping and refusing the bad ones, holding out, collating; TRL's own functions as an oracle."""

import gzip
import json
import random
import re

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from pair_tokenizers import CHAT_TEMPLATE, NO_SYSTEM_TEMPLATE, bpe, words

from tisdpo.data import Counts, PairCollator, holdout, load_pairs, tokenize_pairs
from tisdpo.errors import InputError

PAIR = {"prompt": "What is two and two?", "chosen": " It is four.", "rejected": " It is five."}
TALK = {
    "prompt": [{"role": "user", "content": "how do I bake bread?"}],
    "chosen": [{"role": "assistant", "content": "mix flour with water"}],
    "rejected": [{"role": "assistant", "content": "I do not know"}],
}
SHARED = [*TALK["prompt"], {"role": "assistant", "content": "good morning"}, {"role": "user", "content": "It is blue"}]
IMPLICIT = {side: SHARED + TALK[side] for side in ("chosen", "rejected")}
IDS = {"prompt_ids": [1, 10, 11], "chosen_ids": [12, 13, 2], "rejected_ids": [14, 2]}
PAIRS = [{**PAIR, "chosen": f" It is {word}."} for word in ("two", "four", "blue", "green", "good")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path, lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def one(pair, tokenizer, **options):
    rows, counts = tokenize_pairs([pair], tokenizer, **options)
    assert counts.kept == len(rows) == 1
    return rows[0]


# Reading


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.json", "pairs.parquet", "saved"])
def test_every_kind_of_file_gives_the_same_pairs(tmp_path, name, streaming):
    path = tmp_path / name
    if name == "pairs.parquet":
        Dataset.from_list(PAIRS).to_parquet(str(path))
    elif name == "saved":
        Dataset.from_list(PAIRS).save_to_disk(str(path))
    else:
        write(path, [json.dumps(PAIRS)] if name == "pairs.json" else PAIRS)
    pairs = load_pairs(str(path), streaming=streaming)
    assert isinstance(pairs, IterableDataset if streaming else Dataset)
    assert list(pairs) == PAIRS
    assert list(load_pairs(path, streaming=streaming, limit=2)) == PAIRS[:2]
    assert list(load_pairs(path, streaming=streaming, limit=99)) == PAIRS


def test_memory_is_read_too():
    assert list(load_pairs(PAIRS)) == PAIRS
    assert list(load_pairs(Dataset.from_list(PAIRS), limit=1)) == PAIRS[:1]
    assert list(load_pairs(DatasetDict(train=Dataset.from_list(PAIRS[:2]), test=Dataset.from_list(PAIRS[2:])), split="test")) == PAIRS[2:]
    assert list(load_pairs(iter_dataset := Dataset.from_list(PAIRS).to_iterable_dataset(), streaming=True)) == list(iter_dataset)
    assert load_pairs([TALK, TALK])[1]["prompt"] == TALK["prompt"]


GOOD = json.dumps(PAIR)
FAULTS = {
    "broken line": ([GOOD, GOOD, '{"prompt": "a", "chosen": '], r"pairs\.jsonl, line 3: broken JSON .*correct or remove"),
    "line after a blank one": ([GOOD, "", "{]"], r"line 3: broken JSON"),
    "a number": ([GOOD, "5"], r"line 2: .*must be an object.*got a number"),
    "a list": ([GOOD, "[1, 2]"], r"line 2: .*got a list"),
    "another type": ([GOOD, json.dumps({**PAIR, "chosen": 5})], r"line 2: chosen is a number, but text in the pairs before"),
    "no column": ([json.dumps({"prompt": "a", "chosen": "b", "reject": "c"})], r"no column 'rejected' \(it has: prompt, chosen, reject\)"),
    "no ids": ([json.dumps({"prompt_ids": [1], "chosen_ids": [1]})], r"no column 'rejected_ids'"),
    "nothing": ([""], r"pairs\.jsonl is empty"),
    "blank lines": (["", "  ", ""], r"pairs\.jsonl is empty"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_named_with_line_and_remedy(tmp_path, fault, streaming):
    lines, message = FAULTS[fault]
    path = write(tmp_path / "pairs.jsonl", lines)
    with pytest.raises(InputError, match=message) as caught:
        list(load_pairs(path, streaming=streaming))
    assert "\n" not in str(caught.value)


def test_a_fault_in_a_json_list_is_found(tmp_path):
    with pytest.raises(InputError, match=r"line 3: broken JSON"):
        load_pairs(write(tmp_path / "pairs.json", ["[", GOOD + ",", "{nothing}]"]))
    with pytest.raises(InputError, match=r"entry 1 of the list: .*got a number"):
        load_pairs(write(tmp_path / "pairs.json", [f"[{GOOD}, 7]"]))


def test_what_is_no_data_set_is_refused(tmp_path):
    (tmp_path / "empty-directory").mkdir()
    (tmp_path / "pairs.csv").write_text("a,b")
    (tmp_path / "pairs.parquet").write_text("not parquet")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}\n')
    whole = gzip.compress(GOOD.encode() * 500)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    for source, message in [
        (tmp_path / "absent.jsonl", "absent.jsonl does not exist; give the path"),
        (tmp_path / "pairs.csv", "unknown type; .* read from .json"),
        (tmp_path / "pairs.parquet", "could not be read as parquet"),
        (tmp_path / "cut.jsonl.gz", "cut.jsonl.gz is damaged .*copy or download it again"),
        (tmp_path / "latin.jsonl", "line 1: not UTF-8"),
        (tmp_path / "empty-directory", "holds no dataset"),
        ("somebody/some-pairs", "neither a file here nor .* hub .*check the name"),
        ([], "data is empty"),
        ([PAIR, {"prompt": "a", "chosen": "b"}], "pair 1: rejected is missing"),
        ([PAIR, {**PAIR, "chosen": None}], "pair 1: chosen is null, but text"),
        ([PAIR, "text"], "pair 1: .*got text"),
        (7, "must be a path, a hub id, a list of dicts or a Dataset, got int"),
        (DatasetDict(train=Dataset.from_list(PAIRS)), "no split 'test'"),
    ]:
        with pytest.raises(InputError, match=message):
            load_pairs(source, split="test" if isinstance(source, DatasetDict) else "train")
    with pytest.raises(InputError, match="limit must be a positive"):
        load_pairs(PAIRS, limit=0)


# Tokenising


def trl_ids(pair, tokenizer):
    """TRL 1.16's rule: the ids of prompt, chosen and rejected."""
    pytest.importorskip("trl", "1.16", reason="TRL's rule is the oracle")
    from trl.data_utils import _tokenize, common_prefix_length

    texts = isinstance(pair["chosen"], str)
    sides = [
        pair["prompt"] + pair[side] + (tokenizer.eos_token if texts else "") if texts else pair["prompt"] + pair[side]
        for side in ("chosen", "rejected")
    ]
    prompt = _tokenize(tokenizer, pair["prompt"], **({} if texts else {"add_generation_prompt": True}))["input_ids"]
    chosen, rejected = (_tokenize(tokenizer, side)["input_ids"] for side in sides)
    n = min(common_prefix_length(prompt, chosen), common_prefix_length(prompt, rejected))
    return prompt[:n], chosen[n:], rejected[n:]


TEXTS = [
    PAIR,
    {"prompt": "\n\nHuman: hello there\n\nAssistant:", "chosen": " good morning", "rejected": " how are you\ntoday?"},
    {"prompt": "the sky is ", "chosen": "blue", "rejected": "green"},  # the space merges into the completion
    {"prompt": "how do I bake bre", "chosen": "ad?", "rejected": "w it"},  # a word across the boundary
    {"prompt": "", "chosen": "two", "rejected": "five"},
    {"prompt": "naïve ☂?", "chosen": " ☂☂", "rejected": " öde"},
]


@pytest.mark.parametrize("make", [bpe, words])
@pytest.mark.parametrize("bos", [True, False])
def test_texts_are_tokenised_as_trl_does(make, bos):
    tokenizer = make(bos=bos)
    compared = 0
    for pair in TEXTS:
        expected = trl_ids(pair, tokenizer)
        if not expected[0] or expected[1] == expected[2]:
            continue  # dropped here, see below
        row = one(pair, tokenizer)
        assert (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) == expected
        assert [ids.count(2) for ids in expected] == [0, 1, 1]
        assert row["prompt_ids"].count(1) == bos
        compared += 1
    assert compared >= 3


def test_a_token_across_the_boundary_goes_to_the_completion():
    tokenizer = bpe()
    rows, counts = tokenize_pairs([TEXTS[2]], tokenizer)
    assert counts.moved == 1 and "across the prompt's end" in counts.describe()
    assert tokenizer.decode(rows[0]["prompt_ids"]) == "the sky is" and tokenizer.decode(rows[0]["chosen_ids"]) == " blue</s>"


def test_conversations_are_tokenised_as_trl_does_up_to_the_final_eos():
    tokenizer = bpe(bos=True)
    row, expected = one(TALK, tokenizer), trl_ids(TALK, tokenizer)
    assert row["prompt_ids"] == expected[0]
    for side, ids in zip(("chosen", "rejected"), expected[1:]):
        assert tokenizer.decode(ids).endswith("</s>\n")
        assert row[f"{side}_ids"] == ids[: ids.index(2) + 1]  # the line break after EOS is never generated
    assert tokenizer.decode(row["prompt_ids"]) == "<|user|>\nhow do I bake bread?</s>\n<|assistant|>\n"


@pytest.mark.parametrize("text", [" It is four.", " It is four.</s>", " It is four.</s></s>", " It is four.</s>\n"])
@pytest.mark.parametrize("eos", [True, False], ids=["tokenizer adds EOS", "plain"])
def test_exactly_one_eos_whoever_writes_it(text, eos):
    tokenizer = bpe(bos=True, eos=eos)
    row, counts = tokenize_pairs([{**PAIR, "chosen": text}], tokenizer)
    assert tokenizer.decode(row[0]["chosen_ids"]) == " It is four.</s>"
    assert tokenizer.decode(row[0]["prompt_ids"]) == "<s>What is two and two?"
    assert counts.moved == 0


def test_one_bos_whoever_writes_it():
    assert one({**PAIR, "prompt": "<s>" + PAIR["prompt"]}, bpe(bos=True)) == one(PAIR, bpe(bos=True))
    row = one(TALK, bpe(bos=True, template=NO_SYSTEM_TEMPLATE))
    assert row["prompt_ids"].count(1) == 1 and row["chosen_ids"].count(1) == 0
    assert row["chosen_ids"][-1] == 2  # this template writes no EOS


def test_the_implicit_prompt_is_trls():
    pytest.importorskip("trl", reason="TRL's rule is the oracle")
    from trl.data_utils import extract_prompt

    by_trl = extract_prompt(IMPLICIT)
    assert by_trl["prompt"] == SHARED and one(by_trl, bpe()) == one(IMPLICIT, bpe())


def test_implicit_prompts():
    tokenizer = bpe()
    assert {k: v for k, v in one(IMPLICIT, tokenizer).items()} == one({"prompt": SHARED, **{s: TALK[s] for s in IMPLICIT}}, tokenizer)
    # a prompt column beside whole conversations, and beside bare answers
    assert one({**IMPLICIT, "prompt": "It is blue"}, tokenizer) == one(IMPLICIT, tokenizer)
    assert one({**TALK, "prompt": TALK["prompt"][0]["content"]}, tokenizer) == one(TALK, tokenizer)

    def split(chosen, rejected):
        row = one({"chosen": chosen, "rejected": rejected}, tokenizer)
        return tuple(tokenizer.decode(row[f"{part}_ids"]).removesuffix("</s>") for part in ("prompt", "chosen", "rejected"))

    assert split("the sky is blue", "the sky is green") == ("the sky is", " blue", " green")
    assert split("the sky is blue", "the sky is bluegreen") == ("the sky is", " blue", " bluegreen")  # no word in two
    assert split("the sky is", "the sky is blue") == ("the sky", " is", " is blue")  # no empty response
    dialogue = "\n\nHuman: hello\n\nAssistant: two\n\nHuman: hello\n\nAssistant:"
    assert split(dialogue + " I do not", dialogue + " I know") == (dialogue, " I do not", " I know")  # both begin with I


def test_a_prompt_of_messages_beside_whole_conversations():
    """It is not said twice."""
    tokenizer = bpe()
    whole = {**TALK, "chosen": [*TALK["prompt"], *TALK["chosen"]], "rejected": [*TALK["prompt"], *TALK["rejected"]]}
    assert one(whole, tokenizer) == one(TALK, tokenizer)


def test_tools_may_come_as_json():
    template = "{% if tools %}{{ tools | map(attribute='name') | join(' ') }} {% endif %}" + CHAT_TEMPLATE
    tokenizer, tools = bpe(template=template), [{"name": "kind"}, {"name": "two"}]
    assert one({**TALK, "tools": json.dumps(tools)}, tokenizer) == one({**TALK, "tools": tools}, tokenizer) != one(TALK, tokenizer)
    assert one({**TALK, "tools": ""}, tokenizer) == one(TALK, tokenizer)
    with pytest.raises(InputError, match="pair 0: tools is no JSON"):
        one({**TALK, "tools": "kind, two"}, tokenizer)


def test_system_prompts():
    tokenizer = bpe(bos=True)
    system = "You are a kind helper."
    framed, plain = one(PAIR, tokenizer, system_prompt=system), one(PAIR, tokenizer)
    assert tokenizer.decode(framed["prompt_ids"]) == "<s>You are a kind helper.\n\nWhat is two and two?"
    assert (framed["chosen_ids"], framed["rejected_ids"]) == (plain["chosen_ids"], plain["rejected_ids"])
    assert tokenizer.decode(one(PAIR, tokenizer, system_prompt="Hm: ")["prompt_ids"]) == "<s>Hm: What is two and two?"
    talk = one(TALK, tokenizer, system_prompt=system)
    assert tokenizer.decode(talk["prompt_ids"]).startswith("<|system|>\nYou are a kind helper.</s>\n<|user|>\n")
    assert talk["chosen_ids"] == one(TALK, tokenizer)["chosen_ids"]
    there = {**TALK, "prompt": [{"role": "system", "content": "Hello."}, *TALK["prompt"]]}
    assert tokenizer.decode(one(there, tokenizer, system_prompt=system)["prompt_ids"]).startswith(f"<|system|>\n{system}\n\nHello.</s>")
    gemma = bpe(template=NO_SYSTEM_TEMPLATE)
    assert tokenizer.decode(one(TALK, gemma, system_prompt=system)["prompt_ids"]).startswith(f"<s>[user] {system}\n\nhow do I")
    deaf = bpe(template=CHAT_TEMPLATE.replace("messages %}", "messages if m['role'] != 'system' %}"))
    assert system in deaf.decode(one(TALK, deaf, system_prompt=system)["prompt_ids"])  # a template that leaves system messages out
    with pytest.raises(InputError, match="pair 0 comes as token ids"):
        tokenize_pairs([IDS], tokenizer, system_prompt=system)


def test_ids_are_taken_as_they_are_with_everything_of_their_tokens():
    values = {
        "chosen_contrast": [0.5, -1.0, 0.25],
        "rejected_contrast": [1.5, 0.0],
        "chosen_truth": [0.0, 1.0, 0.0],
        "rejected_truth": [0.0, 0.0],
    }
    rows, _ = tokenize_pairs([{**IDS, **values, "index": 41, "note": "left out"}], bpe())
    assert rows[0] == {"index": 41, **IDS, **values}
    assert rows.features["chosen_contrast"].feature.dtype == "float32" and rows.features["chosen_ids"].feature.dtype == "int32"
    again, counts = tokenize_pairs(rows, bpe())
    assert list(again) == list(rows) and counts.describe() == "1 pairs: 1 kept"
    arrays = {name: np.array(value) for name, value in IDS.items()}
    assert one(arrays, bpe()) == {"index": 0, **IDS}
    weights = {"chosen_weights": [1.0] * 5, "rejected_weights": [0.5] * 5}
    text = one({**PAIR, **weights}, words())  # text may carry values too: It is four . EOS
    assert text["rejected_weights"] == weights["rejected_weights"]


def test_truncation_cuts_everything_together():
    values = {
        f"{side}_{name}": [i + 0.5 for i in range(len(IDS[f"{side}_ids"]))]
        for side in ("chosen", "rejected")
        for name in ("weights", "contrast", "ref_logps", "truth")
    }
    rows, counts = tokenize_pairs([{**IDS, **values}], bpe(), max_length=5)
    assert counts.truncated == 1
    assert rows[0]["prompt_ids"] == IDS["prompt_ids"] and rows[0]["chosen_ids"] == [12, 13] and rows[0]["rejected_ids"] == [14, 2]
    for name in ("weights", "contrast", "ref_logps", "truth"):
        assert rows[0][f"chosen_{name}"] == [0.5, 1.5] and rows[0][f"rejected_{name}"] == [0.5, 1.5]
    long = {**PAIR, "chosen": " It is" + " four" * 50}
    row = one(long, bpe(), max_length=20)
    assert len(row["prompt_ids"]) + len(row["chosen_ids"]) == 20 and row["chosen_ids"][-1] != 2  # no stop where the text goes on
    assert row["chosen_ids"] == one(long, bpe(), max_length=None)["chosen_ids"][: len(row["chosen_ids"])]


DROPPED = {
    "empty response": [
        {**PAIR, "chosen": ""},
        {**PAIR, "rejected": " \n"},
        {**PAIR, "chosen": "</s>"},
        {**TALK, "rejected": [{"role": "assistant", "content": ""}]},
        {**TALK, "rejected": []},
        {**IDS, "chosen_ids": []},
        {**IDS, "chosen_ids": [2]},
    ],
    "identical chosen and rejected": [
        {**PAIR, "chosen": PAIR["rejected"]},
        {**PAIR, "chosen": PAIR["rejected"] + "</s>"},
        {"chosen": "the sky", "rejected": "the sky"},
        {**TALK, "chosen": TALK["rejected"]},
        {"chosen": TALK["chosen"], "rejected": TALK["chosen"]},
        {**IDS, "chosen_ids": [14, 2]},
    ],
    "prompt too long": [{**PAIR, "prompt": "two and " * 60}, {**IDS, "prompt_ids": [9] * 40}, {**IDS, "prompt_ids": [9] * 50}],
    "identical after truncation": [{**PAIR, "chosen": " It is" + " two" * 60, "rejected": " It is" + " two" * 61}],
    "empty prompt": [{"prompt": "", "chosen": "two", "rejected": "five"}, {**TALK, "prompt": []}, {**IDS, "prompt_ids": []}],
}


@pytest.mark.parametrize("reason", DROPPED)
def test_pairs_that_teach_nothing_are_dropped_and_counted(reason):
    tokenizer = bpe()
    for pair in DROPPED[reason]:
        rows, counts = tokenize_pairs([PAIR, pair, PAIR], tokenizer, max_length=40)
        assert counts.dropped == {reason: 1} and rows["index"][:] == [0, 2]
        assert counts.describe().endswith(f"3 pairs: 2 kept, 1 dropped (1 {reason})") or counts.truncated
        with pytest.raises(InputError, match=rf"no pair can be used \(.*1 {reason}\)"):
            tokenize_pairs([pair], tokenizer, max_length=40)


def test_an_empty_prompt_is_fine_after_bos():
    assert one({"prompt": "", "chosen": "two", "rejected": "five"}, bpe(bos=True))["prompt_ids"] == [1]


def test_counts_in_one_line():
    counts = Counts(9, 5, 2, 1)
    for reason in ("empty response", "prompt too long", "prompt too long"):
        counts.drop(reason)
    assert (
        counts.describe()
        == "9 pairs: 5 kept (2 truncated, 1 with a token across the prompt's end), 3 dropped (2 prompt too long, 1 empty response)"
    )


REFUSED = [
    ({**PAIR, "chosen": None}, "pair 1: .*chosen is null"),
    ({**PAIR, "prompt": None}, "pair 1: prompt is null"),
    ({**PAIR, "chosen": 7}, "chosen is a number, rejected is text"),
    ({**PAIR, "chosen": TALK["chosen"]}, "all of them must be text, or all lists of messages"),
    ({"prompt": "a", "chosen": "b"}, "pair 1 has no 'rejected'"),
    ("text", "pair 1 is text"),
    ({**TALK, "chosen": ["mix"]}, "pair 1: message 0 of chosen must be .*got text"),
    ({**TALK, "chosen": [{"role": "assistant", "content": None}]}, "message 0 of chosen .*content: null"),
    ({"prompt": "other", **{side: TALK["prompt"] + TALK[side] for side in ("chosen", "rejected")}}, "prompt is not among"),
    ({**IDS, "chosen_ids": [3, 450, 2]}, "chosen_ids holds 450, outside of the vocabulary of 378"),
    ({**IDS, "prompt_ids": [-1]}, "prompt_ids holds -1"),
    ({**IDS, "rejected_ids": [0.5]}, "rejected_ids must be a list of whole numbers"),
    ({**IDS, "rejected_ids": None}, "rejected_ids must be a list of whole numbers, got null"),
    ({"prompt_ids": [1], "chosen_ids": [3]}, "rejected_ids must be a list"),
    ({**IDS, "chosen_weights": [1.0, 1.0, 1.0]}, "rejected_weights is missing"),
    ({**IDS, "chosen_weights": [1.0, 1.0], "rejected_weights": [1.0, 1.0]}, "chosen_weights has 2 values for 3 tokens"),
    ({**IDS, "chosen_weights": [1.0, float("nan"), 1.0], "rejected_weights": [1.0, 1.0]}, "chosen_weights is nan at token 1"),
    ({**IDS, "chosen_weights": [1.0] * 3, "rejected_weights": [1.0, -0.5]}, "rejected_weights is -0.5 at token 1; a negative weight"),
    ({**IDS, "chosen_contrast": [1.0] * 3, "rejected_contrast": [1.0, float("inf")]}, "rejected_contrast is inf at token 1"),
    ({**IDS, "chosen_ref_logps": [None] * 3, "rejected_ref_logps": [-1.0] * 2}, "chosen_ref_logps is None at token 0"),
]  # fmt: skip


@pytest.mark.parametrize("pair, message", REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_a_bad_pair_is_named_with_its_number(pair, message):
    with pytest.raises(InputError, match=message):
        tokenize_pairs([PAIR, pair], bpe())


def test_a_column_must_be_in_every_pair():
    with pytest.raises(InputError, match=r"pair 1: chosen_weights, rejected_weights must be in every pair or in none"):
        tokenize_pairs([IDS, {**IDS, "chosen_weights": [1.0] * 3, "rejected_weights": [1.0] * 2}], bpe())


def test_bad_tokenizers_and_options():
    with pytest.raises(InputError, match="no chat template"):
        tokenize_pairs([TALK], bpe(template=None))
    with pytest.raises(InputError, match=r"pair 0: the chat template refuses the conversation \(no system role\)"):
        tokenize_pairs([{**TALK, "prompt": [{"role": "system", "content": "a"}, *TALK["prompt"]]}], bpe(template=NO_SYSTEM_TEMPLATE))
    tokenizer = bpe()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        tokenize_pairs([PAIR], tokenizer)
    with pytest.raises(InputError, match="max_length must be at least 2"):
        tokenize_pairs([PAIR], bpe(), max_length=1)
    with pytest.raises(InputError, match="outside of the vocabulary of 12"):
        tokenize_pairs([IDS], bpe(), vocab_size=12)
    with pytest.raises(InputError, match="no pair can be used"):
        tokenize_pairs([], bpe())


def test_streams_mixed_forms_and_many_chunks():
    tokenizer = bpe(bos=True)
    rng = random.Random(0)
    many = [{**PAIR, "chosen": f" It is {rng.random()}"} for _ in range(1100)]
    rows, counts = tokenize_pairs(many, tokenizer)
    stream, _ = tokenize_pairs(load_pairs(many, streaming=True), tokenizer)
    assert counts.read == 1100 and rows["index"][:] == list(range(1100)) and list(stream) == list(rows)
    for i in (0, 511, 512, 1099):
        assert {**one(many[i], tokenizer), "index": i} == rows[i]
    mixed = [PAIR, TALK, IDS, PAIR]
    rows, _ = tokenize_pairs(mixed, tokenizer)
    assert [{**row, "index": 0} for row in rows] == [one(pair, tokenizer) for pair in mixed]


def test_calls_do_not_depend_on_the_tokenizers_state():
    tokenizer = bpe()
    tokenizer(["two", "two and two"], padding=True, truncation=True, max_length=4)
    assert one(PAIR, tokenizer, max_length=None) == one(PAIR, bpe(), max_length=None)


# Holding out


def prompt_rows():
    prompts = [i for i in range(40) for _ in range(1 + i % 3)]
    return Dataset.from_dict({"prompt_ids": [[1, p] for p in prompts], "number": list(range(len(prompts)))})


@pytest.mark.parametrize("size, expected", [(0.25, 20), (10, 10), (1, 1), (60, 60)])
def test_holdout_splits_by_prompt(size, expected):
    rows = prompt_rows()
    train, heldout = holdout(rows, size)
    assert len(rows) == 79 and len(heldout) == expected and len(train) + len(heldout) == len(rows)
    assert not {tuple(p) for p in train["prompt_ids"]} & {tuple(p) for p in heldout["prompt_ids"]}
    assert sorted(train["number"][:] + heldout["number"][:]) == rows["number"][:]
    assert train["number"][:] == sorted(train["number"][:])


def test_holdout_depends_on_prompts_and_seed_alone():
    rows = prompt_rows()
    prompts = [{tuple(p) for p in holdout(r, 20, seed=s)[1]["prompt_ids"]} for r, s in ((rows, 0), (rows.shuffle(seed=3), 0), (rows, 1))]
    assert prompts[0] == prompts[1] != prompts[2]
    text = Dataset.from_list([{**PAIR, "prompt": f"two {i}"} for i in range(10)])
    assert len(holdout(text, 0.5)[1]) == 5


@pytest.mark.parametrize(
    "size, message", [(0, "cannot be held out"), (79, "cannot be held out"), (1.5, "must be a share"), (True, "must be a share")]
)
def test_impossible_holdouts(size, message):
    with pytest.raises(InputError, match=message):
        holdout(prompt_rows(), size)


def test_holdout_needs_whole_prompts():
    with pytest.raises(InputError, match="every prompt has more than 1 pairs"):
        holdout(Dataset.from_dict({"prompt_ids": [[1], [1], [2], [2]]}), 1)
    with pytest.raises(InputError, match="no prompt column"):
        holdout(Dataset.from_list([{"chosen": "a", "rejected": "b"}] * 3), 1)


# Batches

ROWS = [
    {"index": 0, "prompt_ids": [1, 5], "chosen_ids": [6, 7, 2], "rejected_ids": [8, 2]},
    {"index": 1, "prompt_ids": [1], "chosen_ids": [9, 2], "rejected_ids": [3, 4, 4, 4, 2]},
]
WEIGHTS = [
    {"chosen_weights": [1.5, 2.5, 3.5], "rejected_weights": [0.25, 0.5]},
    {"chosen_weights": [4.5, 5.5], "rejected_weights": [0.125] * 5},
]
REFS = [
    {"chosen_ref_logps": [-1.0, -2.0, -3.0], "rejected_ref_logps": [-4.0, -5.0]},
    {"chosen_ref_logps": [-6.0, -7.0], "rejected_ref_logps": [-8.0] * 5},
]
WEIGHTED = [{**row, **weights, **refs} for row, weights, refs in zip(ROWS, WEIGHTS, REFS)]


def test_a_batch_of_pairs():
    batch = PairCollator(pad_token_id=0)(ROWS)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7, 2, 0], [1, 5, 8, 2, 0, 0], [1, 9, 2, 0, 0, 0], [1, 3, 4, 4, 4, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1] * 6]
    assert batch["completion_mask"].tolist() == [
        [False, False, True, True, True, False], [False, False, True, True, False, False],
        [False, True, True, False, False, False], [False, True, True, True, True, True],
    ]  # fmt: skip
    assert set(batch) == {"input_ids", "attention_mask", "completion_mask"}
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64 and batch["completion_mask"].dtype == torch.bool


def test_values_stand_at_their_tokens():
    batch = PairCollator(pad_token_id=0, weights=True)(WEIGHTED)
    for name, column in (("token_weights", "weights"), ("ref_logps", "ref_logps")):
        assert batch[name].dtype == torch.float32 and batch[name].shape == batch["input_ids"].shape
        expected = [x for row in WEIGHTED for side in ("chosen", "rejected") for x in row[f"{side}_{column}"]]
        assert batch[name][batch["completion_mask"]].tolist() == expected
        assert not batch[name][~batch["completion_mask"]].any()
    assert "token_weights" in PairCollator(0)(WEIGHTED) and "token_weights" not in PairCollator(0, weights=False)(WEIGHTED)


def test_swapped_pairs_carry_their_values_along():
    batch, swapped = PairCollator(0)(WEIGHTED), PairCollator(0, swap=True)(WEIGHTED)
    order = [1, 0, 3, 2]
    assert all(torch.equal(swapped[name], batch[name][order]) for name in batch) and len(batch) == 5


def test_one_side_for_sft():
    pairs, chosen, rejected = (PairCollator(0, side=side, weights=False)(ROWS) for side in (None, "chosen", "rejected"))
    assert torch.equal(chosen["input_ids"], pairs["input_ids"][::2, :5])  # padded to its own longest row
    assert torch.equal(rejected["input_ids"], pairs["input_ids"][1::2])
    assert torch.equal(rejected["completion_mask"], pairs["completion_mask"][1::2])
    prompt = PairCollator(0, side="chosen", prompt_loss=True)(WEIGHTED)
    assert torch.equal(prompt["completion_mask"], prompt["attention_mask"].bool())
    assert prompt["token_weights"][0].tolist() == [1.0, 1.0, 1.5, 2.5, 3.5]
    documents = [{"prompt_ids": [1], "chosen_ids": [4, 2]}]
    assert PairCollator(0, side="chosen", weights=False)(documents)["input_ids"].tolist() == [[1, 4, 2]]


def test_batches_that_would_train_on_something_else_are_refused():
    def refused(message, rows, **options):
        with pytest.raises(InputError, match=message):
            PairCollator(0, **options)(rows)

    refused("pair 0: chosen_weights is missing", ROWS, weights=True)
    refused("pair 1: chosen_weights is missing", [WEIGHTED[0], {**ROWS[1], **REFS[1]}])
    refused("pair 1: chosen_ref_logps is missing", [WEIGHTED[0], {**ROWS[1], **WEIGHTS[1]}])
    refused(
        "pair 0 carries the raw chosen_contrast but no chosen_weights",
        [{**ROWS[0], "chosen_contrast": [0.0] * 3, "rejected_contrast": [0.0] * 2}],
    )
    refused("chosen_weights has 2 values for 3 tokens", [{**WEIGHTED[0], "chosen_weights": [1.0, 1.0]}])
    refused("chosen_weights is nan", [{**WEIGHTED[0], "chosen_weights": [1.0, float("nan"), 1.0]}])
    refused("rejected_weights is -1.0", [{**WEIGHTED[0], "rejected_weights": [-1.0, 1.0]}])
    refused("side must be", ROWS, side="both")
    refused("prompt_loss is for SFT", ROWS, prompt_loss=True)
    refused("swap exchanges", ROWS, side="chosen", swap=True)
    with pytest.raises(InputError, match="pad_token_id is None"):
        PairCollator(None)


def test_from_text_to_batch():
    tokenizer = bpe(bos=True)
    rows, _ = tokenize_pairs(PAIRS, tokenizer)
    batch = PairCollator(tokenizer.pad_token_id)([rows[i] for i in range(3)])
    texts = tokenizer.batch_decode(batch["input_ids"])
    assert re.sub("(<pad>)+$", "", texts[2]) == "<s>What is two and two? It is four.</s>"
    completions = [tokenizer.decode(ids[mask]) for ids, mask in zip(batch["input_ids"], batch["completion_mask"])]
    assert completions == [
        " It is two.</s>",
        " It is five.</s>",
        " It is four.</s>",
        " It is five.</s>",
        " It is blue.</s>",
        " It is five.</s>",
    ]
