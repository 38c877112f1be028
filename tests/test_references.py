"""What the trainers take as the reference: never a model that is made into something else on the way."""

import copy

import pytest
import tiny
import torch
from test_adapters import lora
from test_cached import scored
from test_trainer import batch_of, trainer
from transformers import GraniteConfig, GraniteForCausalLM, LlamaForCausalLM

from tisdpo import cached
from tisdpo.batches import flatten_batch, interleaved
from tisdpo.errors import InputError
from tisdpo.hf import Head
from tisdpo.scored import load_scored


def granite(scaling: float, vocabulary: int = len(tiny.tokenizer())):
    """A model that divides its logits; equal weights whatever the divisor."""
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=160, logits_scaling=scaling, initializer_range=0.2,
    )  # fmt: skip
    return GraniteForCausalLM(config)


def noisy(model):
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return model


@pytest.mark.parametrize("options", [dict(kl="reverse"), dict(precompute_ref=False)], ids=str)
def test_a_reference_that_scales_its_logits_differently_is_refused(options, tmp_path):
    options = dict(method="dpo", max_steps=1, **options)
    trainer(tmp_path, model=granite(2.0), ref_model=granite(2.0), **options).train()
    with pytest.raises(InputError, match=r"scales or caps its logits differently \(.*'logit_scale': 0.25.*the policy .*'logit_scale': 0.5"):
        trainer(tmp_path, model=granite(2.0), ref_model=granite(4.0), **options).train()


def test_log_probs_of_a_reference_that_scales_its_logits_differently(tmp_path):
    """Made beforehand they are right: each by its own scale."""
    t = trainer(tmp_path, method="dpo", model=granite(2.0), ref_model=granite(4.0))
    batch = batch_of(t)
    flat = flatten_batch(batch)
    logits = granite(4.0)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)[flat.index]
    torch.testing.assert_close(flat.ref_logps, logits.log_softmax(-1).gather(-1, flat.target[:, None])[:, 0].detach(), rtol=1e-4, atol=1e-4)


def test_a_cached_reference_that_scales_its_logits_differently_is_refused(tmp_path, monkeypatch):
    rows = load_scored(scored(tmp_path / "set", tiny.rows(4), tiny.model()))
    trainer(tmp_path, rows, kl="reverse")
    monkeypatch.setattr(cached, "Head", lambda weight, bias, **transform: Head(weight, bias, 0.5))
    with pytest.raises(InputError, match="the reference scales or caps its logits differently"):
        trainer(tmp_path, rows, kl="reverse")


def test_a_base_that_is_trained_is_no_reference(tmp_path):
    def model():
        found = lora(tiny.model())
        found.get_base_model().model.norm.weight.requires_grad_()
        return found

    for options in (dict(kl="reverse"), dict(precompute_ref=False)):
        with pytest.raises(InputError, match=r"model.norm.weight, a weight of the base, is trained"):
            trainer(tmp_path, model=model(), method="dpo", **options)
    trainer(tmp_path, model=model(), ref_model=tiny.model(), method="dpo", kl="reverse")
    rows = load_scored(scored(tmp_path / "set", tiny.rows(4), tiny.model()))  # brings log-probs, and hidden states
    trainer(tmp_path, rows, model=model(), kl="reverse").train()
    trainer(tmp_path, rows, model=model(), precompute_ref=False).train()
    t = trainer(tmp_path, model=model(), method="dpo")  # log-probs of the rows are made before it moves
    t.train()
    with pytest.raises(InputError, match="the reference was the policy before training"):
        t.evaluate(tiny.rows().select(range(4)))
    trainer(tmp_path, model=lora(tiny.model(), trainable_token_indices=[3]), method="dpo", kl="reverse")  # the adapter's own
    config = tiny.model().config
    config.attention_bias = True
    with pytest.raises(InputError, match=r"bias, a weight of the base, is trained \(LoraConfig\(bias=...\)"):
        trainer(tmp_path, model=lora(LlamaForCausalLM(config), bias="all"), method="dpo", kl="reverse")


def test_the_reference_has_no_dropout(tmp_path):
    t = trainer(tmp_path, model=lora(noisy(tiny.model())), method="dpo", kl="reverse", disable_dropout=False)
    batch = batch_of(t)
    flat = flatten_batch(batch)
    t.model.train()
    found = [t._reference(batch, flat)["ref_hidden"] for _ in "ab"]
    expected = tiny.model().model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    torch.testing.assert_close(found[0], flat.take(expected).detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(*found) and t.model.training


def test_a_reference_that_is_not_asked_is_named(tmp_path, caplog):
    rows = trainer(tmp_path, method="dpo").train_dataset
    trainer(tmp_path, rows, method="dpo", ref_model=tiny.model(seed=1))
    assert "the ref_model is not asked" in caplog.text
    caplog.clear()
    trainer(tmp_path, method="dpo", ref_model=tiny.model(seed=1))
    assert "is not asked" not in caplog.text


# TRL's trainer


def of_trl(tmp_path, model, ref_model=None, **options):
    pytest.importorskip("trl", reason="needs the extra trl")
    from test_trl_trainer import TISDPOConfig, TISDPOTrainer, arguments, oracle, tokenizer

    args = TISDPOConfig(**arguments(tmp_path, method="dpo", max_steps=1, **options))
    return TISDPOTrainer(model, ref_model, args, train_dataset=oracle.pairs(), processing_class=tokenizer())


def test_trl_refuses_a_reference_that_scales_its_logits_differently(tmp_path):
    trl = pytest.importorskip("test_trl_oracle", reason="needs the extra trl")
    of_trl(tmp_path, granite(2.0, trl.V), granite(2.0, trl.V)).train()
    with pytest.raises(InputError, match="the reference scales or caps its logits differently"):
        of_trl(tmp_path, granite(2.0, trl.V), granite(4.0, trl.V)).train()


def test_trl_refuses_a_base_that_is_trained(tmp_path):
    trl = pytest.importorskip("test_trl_oracle", reason="needs the extra trl")
    model = lora(trl.tiny_model(1))
    model.get_base_model().model.norm.weight.requires_grad_()
    try:
        t = of_trl(tmp_path, copy.deepcopy(model))
    except InputError as error:
        assert "model.norm.weight, a weight of the base, is trained" in str(error)
    else:  # PEFT 0.18 freezes the base anew where TRL adds its copy of the adapters: then it does not move
        assert not t.model.get_base_model().model.norm.weight.requires_grad
        return
    t = of_trl(tmp_path, model, precompute_ref_log_probs=True)
    t.train()
    with pytest.raises(InputError, match="the reference was the model before its base was trained"):
        t.evaluate(trl.pairs())


def test_the_reference_of_trl_has_no_dropout(tmp_path):
    trl = pytest.importorskip("test_trl_oracle", reason="needs the extra trl")
    t = of_trl(tmp_path, lora(noisy(trl.tiny_model(1))), kl="reverse", disable_dropout=False, sanity_check=False)
    batch = interleaved(next(iter(t.get_train_dataloader())))
    t.model.train()
    found = [t._reference(batch, flatten_batch(batch))["ref_hidden"] for _ in "ab"]
    assert torch.equal(*found) and t.model.training
