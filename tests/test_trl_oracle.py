"""With weights 1 and no KL the losses are TRL's DPO losses: value, gradient of every parameter, and logged metrics of TRL's own trainer."""

import pytest
import torch

import tisdpo
from tisdpo import Objective

trl = pytest.importorskip("trl", reason="TRL is the oracle of this file")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

V, BETA = 61, 0.3
LOSSES = {
    "sigmoid": (dict(loss_type="sigmoid"), Objective("sigmoid", beta=BETA)),
    "sigmoid_norm": (dict(loss_type="sigmoid_norm"), Objective("sigmoid_norm", beta=BETA)),
    "hinge": (dict(loss_type="hinge"), Objective("hinge", beta=BETA)),
    "ipo": (dict(loss_type="ipo"), Objective("ipo", beta=BETA)),
    "robust": (dict(loss_type="robust", label_smoothing=0.2), Objective("robust", beta=BETA, label_smoothing=0.2)),
}


def tiny_model(seed: int) -> LlamaForCausalLM:
    """A random Llama; a large initialisation moves policy and reference far enough apart for the losses to differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def pairs() -> Dataset:
    """Pairs of unequal lengths in words t2 .. t60, one word a token; TRL appends the EOS token to each completion."""
    g = torch.Generator().manual_seed(0)

    def words(n: int) -> str:
        return "".join(f" t{i}" for i in torch.randint(2, V, (n,), generator=g).tolist())

    sizes = [(4, 7, 3), (2, 0, 6), (9, 5, 5)]
    return Dataset.from_list([dict(prompt=words(p), chosen=words(w) + " ", rejected=words(l) + " ") for p, w, l in sizes])


def trl_trainer_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t1")


def trl_trainer(tmp_path, options):
    tokenizer = trl_trainer_tokenizer()
    args = trl.DPOConfig(
        output_dir=str(tmp_path), beta=BETA, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        disable_tqdm=True, **options,
    )  # fmt: skip
    return trl.DPOTrainer(model=tiny_model(1), ref_model=tiny_model(2), args=args, train_dataset=pairs(), processing_class=tokenizer)


def flat(model, batch):
    """Hidden states that predict completion tokens, their targets and cu_seqlens, chosen and rejected interleaved.

    TRL's batch holds all chosen rows first, then all rejected ones.
    """
    rows = len(batch["input_ids"])
    order = torch.arange(rows).reshape(2, -1).T.flatten()
    ids, attention, mask = (batch[name][order] for name in ("input_ids", "attention_mask", "completion_mask"))
    where = mask[:, 1:].bool()
    hidden = model.model(input_ids=ids, attention_mask=attention).last_hidden_state[:, :-1][where]
    return hidden, ids[:, 1:][where], torch.cat([torch.zeros(1, dtype=torch.long), where.sum(1).cumsum(0)])


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_loss_of_trl(name, plan, tmp_path):
    options, objective = LOSSES[name]
    trainer = trl_trainer(tmp_path, options)
    model, reference = trainer.model, trainer.ref_model
    model.train()
    batch = trainer.data_collator(list(trainer.train_dataset))

    theirs = trainer._compute_loss(model, dict(batch), return_outputs=False)
    their_grads = torch.autograd.grad(theirs, list(model.parameters()))

    hidden, target, cu_seqlens = flat(model, batch)
    with torch.no_grad():
        ref_hidden = flat(reference, batch)[0]
    ours = tisdpo.linear_tis_dpo_loss(
        hidden, model.lm_head.weight, target, cu_seqlens, ref_hidden=ref_hidden, ref_weight=reference.lm_head.weight.detach(),
        objective=objective, plan=plan,
    )  # fmt: skip
    grads = torch.autograd.grad(ours.loss, list(model.parameters()))

    rounding = dict(rtol=2e-5, atol=2e-6)  # float32, sums of some thirty log-probs
    torch.testing.assert_close(ours.loss, theirs, **rounding)
    scale = max(g.abs().max() for g in their_grads).item()
    assert scale > 1e-3
    for (parameter, _), a, b in zip(model.named_parameters(), grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-5 * scale, msg=lambda m, parameter=parameter: f"{parameter}: {m}")

    metrics = {k: v[-1] for k, v in trainer._metrics["train"].items()}
    expected = {
        "rewards/chosen": ours.chosen_rewards.mean(),
        "rewards/rejected": ours.rejected_rewards.mean(),
        "rewards/margins": ours.logits.mean(),
        "rewards/accuracies": (ours.logits > 0).float().mean(),
        "logps/chosen": ours.chosen_logps.mean(),
        "logps/rejected": ours.rejected_logps.mean(),
    }
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value.item(), rel=2e-5, abs=2e-6), key


def test_the_nll_of_one_pair_is_the_sft_loss_of_trl(tmp_path):
    """Of one pair, because TRL divides by the tokens of the batch: in a larger one a long completion counts for more."""
    trainer = trl_trainer(tmp_path, dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]))
    model, reference = trainer.model, trainer.ref_model
    batch = trainer.data_collator([trainer.train_dataset[0]])
    theirs = trainer._compute_loss(model, dict(batch), return_outputs=False)
    hidden, target, cu_seqlens = flat(model, batch)
    ours = tisdpo.linear_tis_dpo_loss(
        hidden, model.lm_head.weight, target, cu_seqlens, ref_hidden=flat(reference, batch)[0].detach(),
        ref_weight=reference.lm_head.weight.detach(), objective=Objective(beta=BETA, nll_coef=0.5),
    ).loss  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
    for a, b in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-5)


def test_policy_and_reference_differ_enough_for_the_losses_to_disagree(tmp_path):
    """Guards the comparison above: at equal models every sigmoid-like loss would be ln 2 and prove little."""
    trainer = trl_trainer(tmp_path, {})
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        hidden, target, cu_seqlens = flat(trainer.model, batch)
        ref_hidden = flat(trainer.ref_model, batch)[0]
        args = (hidden, trainer.model.lm_head.weight, target, cu_seqlens)
        values = [
            tisdpo.linear_tis_dpo_loss(*args, ref_hidden=ref_hidden, ref_weight=trainer.ref_model.lm_head.weight, objective=objective).loss
            for _, objective in LOSSES.values()
        ]
    assert len({round(v.item(), 3) for v in values}) == len(LOSSES)
