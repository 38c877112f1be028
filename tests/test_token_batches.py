"""Batches made flat, and formed by tokens: what they hold, on every rank and after a resume; their loss and step, as of rows."""

import math

import pytest
import torch
from families import llama
from test_padding_free import uneven
from test_trainer import losses_of, trainer

from tisdpo.batches import TokenBatches, flatten_batch, interleaved, sequences
from tisdpo.errors import InputError


def lengths_of(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(1, 40, (count, 2), generator=g).tolist()


@pytest.mark.parametrize("padded", [False, True])
def test_token_batches_hold_every_row_once_and_no_more_tokens_than_allowed(padded):
    lengths, state = lengths_of(50), {}
    batches = TokenBatches(lengths, 120, padded=padded, seed=3, epoch=lambda: state["epoch"])

    def cost(rows):
        return 2 * len(rows) * max(max(lengths[r]) for r in rows) if padded else sum(sum(lengths[r]) for r in rows)

    seen = []
    for epoch in (0, 1):
        state["epoch"] = epoch
        found = list(batches)
        assert len(found) == len(batches) and sorted(r for batch in found for r in batch) == list(range(50))
        assert max(map(cost, found)) <= 120 and max(map(len, found)) > 1
        seen.append(found)
    assert seen[0] != seen[1] and sorted(map(tuple, seen[0])) == sorted(map(tuple, seen[1]))
    again, other = (list(TokenBatches(lengths, 120, padded=padded, seed=s, epoch=lambda: 1)) for s in (3, 4))
    assert again == seen[1] and other != seen[1]
    # formed in one pass: no batch could have taken the row that the next one starts with
    assert all(cost([*a, b[0]]) > 120 for a, b in zip(batches.batches, batches.batches[1:]))
    assert [r for batch in TokenBatches(lengths, 120, padded=padded) for r in batch] == list(range(50))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches_of_an_epoch(world):
    lengths = lengths_of(31)
    alone = list(TokenBatches(lengths, 100, seed=0))
    ranks = [list(TokenBatches(lengths, 100, seed=0, rank=r, world=world)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    together = [batch for step in zip(*ranks) for batch in step]
    assert together[: len(alone)] == alone and together[len(alone) :] == alone[: len(together) - len(alone)]


@pytest.mark.parametrize(
    "options", [dict(padding_free=True), dict(padding_free=False), dict(padding_free=True, method="sft")], ids=["flat", "padded", "sft"]
)
def test_batches_by_tokens_give_the_step_of_one_batch_of_all_rows(tmp_path, options):
    """Every pair (SFT: token) counts the same, however many its batch holds."""
    extra = {} if "method" in options else dict(ref_model=llama(seed=1), precompute_ref=False)
    by_rows = dict(per_device_train_batch_size=12)
    by_tokens = dict(tokens_per_batch=220, per_device_train_batch_size=8, gradient_accumulation_steps=100)
    losses, weights = [], []
    for formed in (by_rows, by_tokens):
        options |= dict(num_train_epochs=1, max_steps=-1, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, max_length=64)
        t = trainer(tmp_path, uneven(12), llama(), **options, **extra, **formed)
        counts = [sequences(batch) for batch in t.get_train_dataloader()]
        assert sum(counts) == (12 if "method" in options else 24) and (len(set(counts)) > 1) == (formed is by_tokens), counts
        losses += losses_of(t)
        weights.append(torch.cat([p.detach().flatten() for p in t.model.parameters()]))
    assert len(losses) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-5) and abs(losses[0] - math.log(2)) > 1e-4
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
    assert (weights[0] - torch.cat([p.detach().flatten() for p in llama().parameters()])).abs().max() > 1e-4


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "padded"])
def test_resuming_within_an_epoch_sees_the_same_token_batches(tmp_path, flat, caplog):
    def run(directory, **options):
        options = {**dict(max_length=64, tokens_per_batch=250, padding_free=flat, per_device_train_batch_size=8), **options}
        return trainer(tmp_path / directory, uneven(10), llama(), num_train_epochs=2, max_steps=-1, **options)

    straight = run("a")
    per_epoch = len(straight.get_train_dataloader())
    assert per_epoch > 2 and max(batch["input_ids"].numel() for batch in straight.get_train_dataloader()) <= 250
    expected = losses_of(straight)
    assert len(expected) == 2 * per_epoch
    run("b", save_strategy="steps", save_steps=per_epoch + 1).train()
    resumed = run("b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{per_epoch + 1}"))
    assert [h["loss"] for h in resumed.state.log_history if "loss" in h] == expected
    caplog.clear()
    run("b", tokens_per_batch=260).train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{per_epoch + 1}"))
    assert "formed by other tokens_per_batch" in caplog.text and "pairs of the interrupted epoch may be seen twice" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tokens_per_batch=100, max_length=64), "cannot hold every row of max_length=64; give at least 128"),
        (dict(tokens_per_batch=1000, max_length=64, per_device_train_batch_size=4), "per_device_train_batch_size=4 has no effect"),
        (dict(tokens_per_batch=1000, max_length=64, auto_find_batch_size=True), "auto_find_batch_size=True has no effect"),
        (dict(tokens_per_batch=1000, max_length=64, train_sampling_strategy="group_by_length"), "'group_by_length' has no effect"),
        (dict(accelerator_config={"dispatch_batches": True}), "dispatch_batches=True would cut"),
    ],
)
def test_options_that_contradict_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, method="dpo", **{"per_device_train_batch_size": 8, **options})


def test_flat_batches():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    batch = {"input_ids": torch.arange(8).reshape(2, 4), "completion_mask": mask, "token_weights": torch.arange(8.0).reshape(2, 4)}
    flat = flatten_batch(batch)
    assert flat.target.tolist() == [1, 2, 6, 7] and flat.cu_seqlens.tolist() == [0, 2, 4] and flat.ref_logps is None
    assert flat.token_weights.tolist() == [1, 2, 6, 7]
    hidden = torch.arange(8.0).reshape(2, 4, 1)
    assert flat.take(hidden)[:, 0].tolist() == [0, 1, 5, 6]  # the position before predicts the token
    of_labels = flatten_batch({"input_ids": batch["input_ids"], "labels": batch["input_ids"].masked_fill(~mask, -100)})
    assert of_labels.target.tolist() == [1, 2, 6, 7] and of_labels.cu_seqlens.tolist() == [0, 2, 4]
    for other, told in (
        ({"labels": batch["input_ids"][:, 1:]}, r"labels must have the shape of input_ids, \[2, 4\], .* got \[2, 3\]"),
        ({"labels": batch["input_ids"].roll(-1, 1)}, r"labels must be input_ids, .* these differ; were they shifted"),
        ({"completion_mask": mask, "token_weights": torch.ones(2, 6)}, r"token_weights must have the shape of input_ids, .* got \[2, 6\]"),
        ({"completion_mask": [[True] * 4] * 2}, r"the batch's completion_mask must be a tensor .*, got list"),
    ):
        with pytest.raises(InputError, match=told):
            flatten_batch({"input_ids": batch["input_ids"], **other})
    with pytest.raises(InputError, match=r"the batch's input_ids must be a tensor .*, got NoneType"):
        interleaved({"labels": mask})
    with pytest.raises(InputError, match=r"hidden states \[2, 3\] of a batch of \[2, 4\] tokens: give the model's whole"):
        flat.take(hidden[:, :-1])
    with pytest.raises(InputError, match=r"completion_mask, or labels with -100 elsewhere; the batch has input_ids, attention_mask"):
        flatten_batch({"input_ids": batch["input_ids"], "attention_mask": mask})
    halves = {"input_ids": torch.tensor([[1], [2], [3], [4]]), "lengths": torch.ones(2), "name": "x"}  # chosen 1 and 2, rejected 3 and 4
    assert interleaved(halves)["input_ids"].flatten().tolist() == [1, 3, 2, 4] and len(interleaved(halves)["lengths"]) == 2
    with pytest.raises(InputError, match="an even number of rows, got 3"):
        interleaved({"input_ids": torch.zeros(3, 1)})


def test_hidden_states_of_another_length_are_refused():
    """As prompt tuning makes them, which puts tokens in front."""
    batch = {"input_ids": torch.arange(10).view(2, 5), "completion_mask": torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1]]).bool()}
    flat = flatten_batch(batch)
    assert torch.equal(flat.take(batch["input_ids"][..., None])[:, 0] + 1, flat.target)
    with pytest.raises(InputError, match=r"hidden states \[2, 7\] of a batch of \[2, 5\] tokens"):
        flat.take(torch.zeros(2, 7, 3))
