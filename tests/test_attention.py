"""Attention for padding-free batches: which models are refused, which attention is taken, and torch's varlen kernel as one of them."""

import logging

import families
import pytest
import tiny
import torch
from families import llama
from test_padding_free import uneven
from test_trainer import trainer

from tisdpo import attention
from tisdpo.attention import VARLEN, across, choose, leak
from tisdpo.errors import InputError
from tisdpo.hf import verify_head

# Leaks


def logits(model, first, second):
    ids = torch.tensor([[*first, *second]])
    lengths = attention.flat_inputs([len(first), len(second)])
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **lengths).logits[0, len(first) :]


FIRST, OTHER, SECOND = [3, 9, 4, 11, 20, 6, 7, 8], [13, 30, 8, 2, 2, 5, 40, 41], [5, 6, 12, 7, 21, 33]


@pytest.mark.parametrize("implementation", ["sdpa", "eager", VARLEN])
@pytest.mark.parametrize("family", families.ATTENTION)
def test_tokens_of_one_sequence_change_nothing_in_another(varlen_calls, family, implementation):
    model = families.model(family, attention=implementation)
    torch.testing.assert_close(logits(model, OTHER, SECOND), logits(model, FIRST, SECOND), rtol=0, atol=0 if "Moe" not in family else 1e-6)
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([SECOND]), use_cache=False).logits[0]
    torch.testing.assert_close(logits(model, FIRST, SECOND), alone, rtol=0, atol=1e-6)
    assert across(model) is None and leak(model) is None


@pytest.mark.parametrize(
    ("family", "layer"),
    {
        "Lfm2": "Lfm2ShortConv",
        "Mamba": "MambaMixer",
        "FalconH1": "FalconH1Mixer",
        "RecurrentGemma": "RecurrentGemmaRecurrentBlock",
        "MiniMax": "MiniMaxLightningAttention",
        "Rwkv": "RwkvSelfAttention",
        "Qwen3Next": "Qwen3NextGatedDeltaNet",
    }.items(),
)
def test_what_leaks_is_refused_by_name(family, layer, caplog):
    model = families.model(family)
    if family not in families.PACKS_ITSELF:  # its torch code may be given the boundaries, its kernels not everywhere
        assert (logits(model, OTHER, SECOND) - logits(model, FIRST, SECOND)).abs().max() > 1e-5  # it does leak
    message = f"does not work with {type(model).__name__}: its {layer}"
    with pytest.raises(InputError, match=message):
        choose([model], True)
    with caplog.at_level(logging.INFO, "tisdpo"):
        assert choose([model], None) is False
    assert f"{type(model).__name__} are padded: its {layer}" in caplog.text


@pytest.mark.parametrize("family", families.ACROSS)
def test_the_forward_finds_the_leak_without_the_names(family):
    assert "see other sequences" in leak(families.model(family)) or "other hidden states" in leak(families.model(family))


@pytest.mark.parametrize("family", families.POSITIONS_UNSEEN)
def test_a_model_whose_mask_does_not_see_positions_is_refused(family):
    """No name would tell: these build their mask without position_ids, so `eager` mixes the sequences of a row."""
    with pytest.raises(InputError, match=r"with the attention '\w+' its tokens see other sequences of the row"):
        choose([families.model(family, attention="eager")], True)


def test_prompt_tuning_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="PromptTuningConfig puts its prompt before the whole row"):
        choose([model], True)


def test_a_reference_that_leaks_is_refused_too(tmp_path):
    ref = families.model("Lfm2", len(tiny.tokenizer()))
    with pytest.raises(InputError, match="does not work with Lfm2ForCausalLM"):
        trainer(tmp_path, uneven(), llama(), padding_free=True, ref_model=ref, kl="reverse")


# The attention


def test_batches_are_padded_by_default_where_the_attention_builds_masks(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "tisdpo"):
        assert not trainer(tmp_path, method="dpo").data_collator.flat
        assert trainer(tmp_path, method="dpo", padding_free=True).data_collator.flat
    assert "batches of LlamaForCausalLM are padded: its attention is 'sdpa'" in caplog.text
    assert "batches are padding-free, by the attention sdpa" in caplog.text


def test_batches_are_flat_by_default_where_the_attention_reads_boundaries(varlen_calls):
    assert choose([llama(attention=VARLEN)], None) and varlen_calls
    assert not choose([llama(attention=VARLEN)], False)


def test_a_kernel_that_does_not_run_here_means_padded_batches(monkeypatch):
    def broken(*args, **kwargs):
        raise NotImplementedError("no such kernel.\nmore")

    monkeypatch.setattr(attention, "kernel", lambda: broken)
    model = llama(attention=VARLEN)
    assert not choose([model], None)
    with pytest.raises(InputError, match=r"its forward refuses a flat batch \(no such kernel\)"):
        choose([model], True)


def test_varlen_takes_the_place_of_sdpa_and_gives_it_back(monkeypatch, varlen_calls):
    monkeypatch.setattr(attention, "_varlen_runs", lambda model, device: True)
    first, second = llama(), llama(seed=1)
    assert choose([first, second], None)
    assert first.config._attn_implementation == second.config._attn_implementation == VARLEN
    first, leaking = llama(), families.model("Lfm2")
    assert not choose([first, leaking], None) and first.config._attn_implementation == "sdpa"
    assert "tisdpo_varlen" not in str(llama(attention=VARLEN).config.to_dict())  # a saved model does not ask for it


def test_varlen_builds_no_mask_for_flat_batches(varlen_calls, monkeypatch):
    masks = []
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", lambda *args, **kwargs: masks.append(kwargs))
    model = families.model("Gemma3Text", attention=VARLEN)
    inputs = attention.flat_inputs([3, 6])
    model(input_ids=torch.arange(9)[None], **inputs, head=lambda hidden, head: hidden)
    assert not masks and varlen_calls
    model(input_ids=torch.arange(9)[None], head=lambda hidden, head: hidden)
    assert masks


def test_a_model_that_waits_for_its_gpu_is_verified_by_another_attention(monkeypatch):
    model = llama()
    model.config._attn_implementation = "flash_attention_2"  # it would refuse the CPU
    verify_head(model)
    assert model.config._attn_implementation == "flash_attention_2"


def test_padded_and_generating_calls_of_varlen_are_sdpa(varlen_calls):
    model, sdpa = llama(attention=VARLEN), llama()
    ids = torch.randint(3, 40, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for inputs in (dict(attention_mask=mask), dict()):
        assert torch.equal(model(ids, **inputs).logits, sdpa(ids, **inputs).logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), sdpa.generate(ids, max_new_tokens=4, do_sample=False))
    packed = dict(position_ids=torch.tensor([[*range(4), *range(5)]]))  # positions alone, without boundaries
    assert torch.equal(model(ids[:1], **packed).logits, sdpa(ids[:1], **packed).logits) and not varlen_calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(softcap=30.0), "soft-capped attention scores"),
        (dict(s_aux=torch.zeros(2)), "attention sinks"),
        (dict(position_bias=torch.zeros(1)), "an attention bias"),
        (dict(dropout=0.1), "dropout"),
        (dict(is_causal=False), "attention in both directions"),
    ],
)
def test_varlen_refuses_what_the_kernel_cannot_do(varlen_calls, options, message):
    x, bounds = torch.zeros(1, 2, 4, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(InputError, match=f"Linear needs {message}, which torch's varlen attention cannot do"):
        attention.varlen_attention(
            torch.nn.Linear(1, 1), x, x, x, None,
            cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=4, max_length_k=4, **options,
        )  # fmt: skip
    assert not varlen_calls


def test_varlen_pads_narrow_values(varlen_calls):
    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 6)
    inputs = {name: x for name, x in attention.flat_inputs([5]).items() if name != "position_ids"}
    out, _ = attention.varlen_attention(torch.nn.Module(), query, key, value, None, scaling=0.3, **inputs)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_torchs_kernel_has_the_arguments_that_are_used():
    """The installed torch's own, on meta tensors: the call must fit its signature."""
    function = attention.kernel()
    if function is None:
        pytest.skip("this torch has no varlen_attn with windows and grouped heads")
    q, k = torch.empty(6, 4, 8, device="meta"), torch.empty(6, 2, 8, device="meta")
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    assert function(q, k, k, bounds, bounds, 4, 4, scale=0.5, window_size=(3, 0), enable_gqa=True).shape == q.shape
