"""The cached reference: the trainer's loss and gradients are those of a resident one, and a cache of something else is refused by name."""

import copy
import json
import pickle

import pytest
import tiny
import torch
from safetensors.torch import load_file

from tisdpo import TISDPOConfig, TISDPOTrainer
from tisdpo.cached import ReferenceCache
from tisdpo.errors import InputError
from tisdpo.fingerprints import model_fingerprint
from tisdpo.hf import head_of
from tisdpo.parts import Scorer, Scoring
from tisdpo.scored import load_scored, make_provenance, save_scored
from tisdpo.scoring import completion_logps


def reference(seed=0, bias=False):
    model = tiny.model(seed)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, len(head_of(model).weight)))
    return model


def scored(path, rows, model, dtype=torch.float32, max_length=128, batch_tokens=400):
    """A scored set with the reference's log-probs and hidden states."""
    scoring = Scoring(
        rows, Scorer(tiny.model(1)), Scorer(tiny.model(2)), pad_token_id=0, parts=path.with_name("parts"), batch_tokens=batch_tokens,
        reference=model, hidden_dtype=dtype,
    )  # fmt: skip
    scoring.score()
    how = {"construction": "S"}
    provenance = make_provenance(tiny.tokenizer(), max_length=max_length, positive="a", negative="b", how=how, reference=model)
    save_scored(scoring.joined(), path, provenance, more=scoring.write_reference if dtype is not None else None)
    return path


def trainer(tmp_path, rows, model=None, ref_model=None, eval_dataset=None, **options):
    defaults = dict(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2, logging_steps=1, save_strategy="no",
        disable_tqdm=True, use_cpu=True, seed=0, max_length=128,
    )  # fmt: skip
    args = TISDPOConfig(**{**defaults, **options})
    return TISDPOTrainer(
        model or tiny.model(), args, train_dataset=rows, eval_dataset=eval_dataset, processing_class=tiny.tokenizer(), ref_model=ref_model
    )


def resident(rows):
    """The same rows, without knowing that they come from a scored set."""
    import datasets

    return datasets.Dataset.from_list([{k: v for k, v in row.items() if "ref" not in k} for row in rows])


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Scored sets of twelve pairs by the dtype of their hidden states; the reference is tiny.model(0)."""
    folder = tmp_path_factory.mktemp("sets")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "none": None}
    return {name: scored(folder / name / "set", tiny.rows(12), tiny.model(0), dtype) for name, dtype in dtypes.items()}


def losses(t):
    t.train()
    return [entry["loss"] for entry in t.state.log_history if "loss" in entry]


def loss_and_gradients(t, count=4):
    """Loss and gradients of a first batch, the policy moved away from the reference."""
    t._first_step.waits = False
    for p in t.model.parameters():
        p.data += 0.05 * torch.sin(torch.arange(p.numel(), dtype=torch.float32)).view_as(p)
    batch = t.data_collator([t.train_dataset[i] for i in range(count)])
    loss = t.compute_loss(t.model, batch)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in t.model.parameters()])


# What is stored


def test_stored_values_are_those_of_the_reference(sets):
    rows, cache = load_scored(sets["float32"]), ReferenceCache(sets["float32"])
    model = tiny.model(0)
    for side in ("chosen", "rejected"):
        expected = completion_logps(model, rows["prompt_ids"], rows[f"{side}_ids"], pad_token_id=0)
        for row, logps in zip(rows, expected):
            torch.testing.assert_close(torch.tensor(row[f"{side}_ref_logps"]), logps, rtol=1e-5, atol=1e-5)
            ids = torch.tensor([[*row["prompt_ids"], *row[f"{side}_ids"]]])
            with torch.no_grad():
                hidden = model.model(ids).last_hidden_state[0, len(row["prompt_ids"]) - 1 : -1]
            torch.testing.assert_close(cache.hidden(row["prompt_ids"], row[f"{side}_ids"]), hidden, rtol=1e-4, atol=1e-5)
    assert torch.equal(cache.head.weight, head_of(model).weight) and cache.head.bias is None and cache.dtype == torch.float32
    half = ReferenceCache(sets["bfloat16"])
    row = rows[3]
    assert torch.equal(
        half.hidden(row["prompt_ids"], row["chosen_ids"]), cache.hidden(row["prompt_ids"], row["chosen_ids"]).to(torch.bfloat16)
    )
    tokens = sum(len(ids) for side in ("chosen", "rejected") for ids in rows[f"{side}_ids"])
    for name, itemsize in (("bfloat16", 2), ("float32", 4)):  # 2 H bytes a token, 4 H in float32
        size = sum(x.nbytes for f in (sets[name] / "reference").glob("hidden-*") for x in load_file(f).values())
        assert size == itemsize * 16 * tokens


def test_a_reference_that_is_one_of_the_scorers_is_asked_once(tmp_path):
    rows, base = tiny.rows(6), tiny.model(0)
    asked = []
    base.register_forward_pre_hook(lambda *a, **k: asked.append(1))
    options = dict(pad_token_id=0, batch_tokens=10**6, reference=base, hidden_dtype=torch.float32)
    shared = Scoring(rows, Scorer(tiny.model(1)), Scorer(base), parts=tmp_path / "a", **options)
    shared.score()
    assert len(asked) == 1
    twin = Scoring(rows, Scorer(tiny.model(1)), Scorer(copy.deepcopy(base)), parts=tmp_path / "b", **options)
    twin.score()
    assert list(shared.joined()) == list(twin.joined())
    prompted = Scoring(rows, Scorer(base, [[7, *p] for p in rows["prompt_ids"]]), Scorer(base), parts=tmp_path / "c", **options)
    prompted.score()
    assert prompted.joined()["chosen_ref_logps"][:] == twin.joined()["chosen_ref_logps"][:]


def test_hidden_states_are_read_when_a_row_asks_for_them(sets, monkeypatch):
    cache, rows = ReferenceCache(sets["bfloat16"]), load_scored(sets["bfloat16"])
    assert not cache._files
    first = cache.hidden(rows[0]["prompt_ids"], rows[0]["chosen_ids"])
    assert len(cache._files) == 1
    copied = pickle.loads(pickle.dumps(cache))  # a worker process
    assert not copied._files and torch.equal(copied.hidden(rows[0]["prompt_ids"], rows[0]["chosen_ids"]), first)


# Training with it


@pytest.mark.parametrize(("kl", "flat"), [("reverse", False), ("forward", False), ("reverse", True)])
def test_loss_and_gradients_equal_those_of_a_resident_reference(sets, tmp_path, kl, flat):
    found = {}
    for name in ("float32", "bfloat16"):
        t = trainer(tmp_path, load_scored(sets[name]), kl=kl, padding_free=flat)
        assert t.data_collator.flat is flat
        assert t.ref_model is None and not t.ref_head["ref_weight"].requires_grad
        found[name] = loss_and_gradients(t)
    t = trainer(tmp_path, resident(load_scored(sets["float32"])), kl=kl)
    assert t.cache is None and t.ref_model is not None
    loss, gradients = loss_and_gradients(t)
    torch.testing.assert_close(found["float32"][0], loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found["float32"][1], gradients, rtol=1e-4, atol=1e-7)
    # bfloat16 keeps 8 bits of the hidden states: 2^-9 of their size, in logits of a few nats
    assert (found["bfloat16"][0] - loss).abs() < 1e-3 and not torch.equal(found["bfloat16"][0], loss)
    assert (found["bfloat16"][1] - gradients).norm() < 2e-2 * gradients.norm()


def test_training_with_the_cache_goes_like_training_with_the_reference(sets, tmp_path):
    expected = losses(trainer(tmp_path, resident(load_scored(sets["float32"])), kl="reverse", max_steps=4))
    assert losses(trainer(tmp_path, load_scored(sets["float32"]), kl="reverse", max_steps=4)) == pytest.approx(expected, abs=1e-5)
    assert losses(trainer(tmp_path, load_scored(sets["bfloat16"]), kl="reverse", max_steps=4)) == pytest.approx(expected, abs=2e-3)


def test_rows_may_be_selected_split_swapped_and_extended(sets, tmp_path):
    rows = load_scored(sets["float32"])
    split = rows.shuffle(seed=1).train_test_split(4, seed=1)
    train = split["train"].add_column("note", ["x"] * 8)
    t = trainer(tmp_path, train, kl="forward", eval_dataset=split["test"], swap_pairs=True, per_device_eval_batch_size=4)
    plain = resident(split["train"]), resident(split["test"])
    other = trainer(tmp_path, plain[0], kl="forward", eval_dataset=plain[1], swap_pairs=True, per_device_eval_batch_size=4)
    assert t.evaluate()["eval_loss"] == pytest.approx(other.evaluate()["eval_loss"], abs=1e-6)
    assert losses(t) == pytest.approx(losses(other), abs=1e-5)


def test_a_reference_of_another_start_is_given_and_not_kept(tmp_path):
    path = scored(tmp_path / "set", tiny.rows(8), reference(3, bias=True))
    t = trainer(tmp_path, load_scored(path), kl="reverse", ref_model=reference(3, bias=True))
    assert t.ref_model is None
    found = loss_and_gradients(t)
    expected = loss_and_gradients(trainer(tmp_path, resident(load_scored(path)), kl="reverse", ref_model=reference(3, bias=True)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_base_of_a_peft_model_is_its_reference(sets, tmp_path):
    peft = pytest.importorskip("peft")
    for options in (dict(target_modules=["q_proj"]), dict(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])):
        model = peft.get_peft_model(tiny.model(0), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))
        assert model_fingerprint(model) == model_fingerprint(tiny.model(0))
    model = peft.get_peft_model(tiny.model(0), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    cached = losses(trainer(tmp_path, load_scored(sets["float32"]), copy.deepcopy(model), kl="reverse"))
    assert cached == pytest.approx(losses(trainer(tmp_path, resident(load_scored(sets["float32"])), model, kl="reverse")), abs=1e-5)
    other = peft.get_peft_model(tiny.model(1), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="reference_model is"):
        trainer(tmp_path, load_scored(sets["float32"]), other, kl="reverse")


def test_log_probs_of_the_set_are_used_without_a_kl_term(sets, tmp_path, monkeypatch):
    monkeypatch.setattr("tisdpo.trainer.add_reference_logps", lambda *args: pytest.fail("the reference was asked"))
    t = trainer(tmp_path, load_scored(sets["none"]))
    losses(t)
    assert "ref_hidden" not in t.data_collator([t.train_dataset[0]])


# What is refused


def test_a_cache_of_something_else_is_refused_by_name(sets, tmp_path):
    rows = load_scored(sets["bfloat16"])
    for options in (dict(kl="reverse"), dict()):  # hidden states; log-probs
        with pytest.raises(
            InputError, match=r"set was scored under other conditions: reference_model is '\w+' there and '\w+' here; train"
        ):
            trainer(tmp_path, rows, tiny.model(1), **options)
        with pytest.raises(InputError, match="reference_model is"):
            trainer(tmp_path, rows, ref_model=tiny.model(1), **options)
        with pytest.raises(InputError, match="reference_model is"):
            trainer(tmp_path, rows, tiny.model(0).bfloat16(), **options)
    provenance = sets["bfloat16"] / "provenance.json"
    content = provenance.read_text()
    try:
        for field, value, said in (
            ("tokenizer", "0", "tokenizer is '0' there and '[0-9a-f]{16}' here; use the tokenizer"),
            ("chat_template", "0", "chat_template is '0' there and '[0-9a-f]{16}' here; use the chat template"),
        ):
            provenance.write_text(json.dumps({**json.loads(content), field: value}))
            with pytest.raises(InputError, match=said):
                trainer(tmp_path, rows, kl="reverse")
            with pytest.raises(InputError, match=said):
                trainer(tmp_path, rows)
    finally:
        provenance.write_text(content)


def test_another_truncation_is_refused_where_it_cuts(sets, tmp_path):
    rows = load_scored(sets["bfloat16"])
    trainer(tmp_path, rows, kl="reverse", max_length=1024)  # nothing was cut at 128, nothing is at 1024
    longest = max(len(r["prompt_ids"]) + len(r[f"{s}_ids"]) for r in rows for s in ("chosen", "rejected"))
    trainer(tmp_path, rows, kl="reverse", max_length=longest)
    with pytest.raises(InputError, match=rf"max_length is 128 there and {longest - 1} here; use the max_length it was scored with"):
        trainer(tmp_path, rows, kl="reverse", max_length=longest - 1)
    from tisdpo.data import tokenize_pairs

    short, counts = tokenize_pairs(tiny.pairs(24)[:6], tiny.tokenizer(), max_length=longest - 4)
    assert counts.truncated
    path = scored(tmp_path / "short" / "set", short, tiny.model(0), max_length=longest - 4)
    trainer(tmp_path, load_scored(path), kl="reverse", max_length=longest - 4)
    with pytest.raises(InputError, match=rf"max_length is {longest - 4} there and 128 here"):
        trainer(tmp_path, load_scored(path), kl="reverse")


def test_rows_that_are_not_cached_are_refused(sets, tmp_path):
    train, other = load_scored(sets["bfloat16"]), tiny.contrast(tiny.rows(24).select(range(20, 24)))
    with pytest.raises(InputError, match=r"the chosen response of row 0 is not among the cached hidden states of the reference in .*set;"):
        trainer(tmp_path, train, kl="reverse", eval_dataset=other)
    path = scored(tmp_path / "other" / "set", other.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]), tiny.model(0))
    t = trainer(tmp_path, train, kl="reverse", eval_dataset=load_scored(path))  # two sets of one reference
    assert t.evaluate()["eval_loss"] == pytest.approx(0.693147, abs=5e-3)
    with pytest.raises(InputError, match="is not among the cached"):
        t.evaluate(tiny.contrast(tiny.rows(24).select(range(14, 16))))


def test_a_damaged_cache_is_refused_before_training(tmp_path):
    path = scored(tmp_path / "set", tiny.rows(6), tiny.model(0))
    file = next((path / "reference").glob("hidden-*"))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"hidden-00000.safetensors, part of a cached reference, is missing or damaged .* score the pairs"):
        trainer(tmp_path, load_scored(path), kl="reverse")
    file.unlink()
    with pytest.raises(InputError, match="is missing or damaged"):
        trainer(tmp_path, load_scored(path), kl="reverse")


def test_hidden_states_need_a_reference(tmp_path):
    with pytest.raises(InputError, match="there is no reference whose hidden states"):
        Scoring(tiny.rows(4), Scorer(tiny.model(1)), Scorer(tiny.model(2)), pad_token_id=0, parts=tmp_path, hidden_dtype=torch.bfloat16)
