"""Padding-free batches: the loss, gradients and metrics of padded ones, by every attention."""

import math
from functools import cache

import families
import pytest
import tiny
import torch
from families import llama, varlen_by_sdpa
from test_trainer import losses_of, trainer

from tisdpo import attention
from tisdpo.attention import VARLEN
from tisdpo.batches import flatten_batch
from tisdpo.data import PairCollator


@cache
def uneven(count: int = 7):
    """Rows with contrasts; the chosen completion of one has one token, of another a prompt has one."""

    def change(row, index):
        if index == 1:
            return {"chosen_ids": row["chosen_ids"][:1]}
        return {"prompt_ids": row["prompt_ids"][:1]} if index == 2 else {}

    return tiny.contrast(tiny.rows().select(range(count)).map(change, with_indices=True))


# The same numbers


def result(t):
    """Loss, metrics and gradients of one batch."""
    t.model.train()
    t.model.zero_grad()
    batch = t.data_collator([t.train_dataset[i] for i in range(len(t.train_dataset))])
    assert ("attention_mask" in batch) != t.data_collator.flat
    loss, metrics = t.compute_loss(t.model, batch, return_outputs=True)
    loss.backward()
    return loss, metrics, {name: p.grad.clone() for name, p in t.model.named_parameters() if p.grad is not None}


def padded_and_flat(tmp_path, model, **options):
    t = trainer(tmp_path, uneven(), model, padding_free=True, **options)
    assert t.data_collator.flat
    flat = result(t)
    t.data_collator.flat = False
    return result(t), flat


def assert_same(padded, flat, rtol):
    torch.testing.assert_close(flat[0], padded[0], rtol=rtol, atol=0)
    assert flat[1].keys() == padded[1].keys()
    for name, values in padded[1].items():
        if name == "rewards/accuracies":  # signs of margins; of one that is 0, rounding decides
            decided = padded[1]["rewards/margins"].abs() > 10 * rtol
            assert flat[1][name][decided].equal(values[decided])
            continue
        torch.testing.assert_close(flat[1][name], values, rtol=rtol, atol=10 * rtol, msg=lambda m, name=name: f"{name}: {m}")
    largest = max(g.abs().max() for g in padded[2].values())
    assert flat[2].keys() == padded[2].keys() and largest > 0
    for name, gradient in padded[2].items():
        torch.testing.assert_close(flat[2][name], gradient, rtol=0, atol=rtol * largest.item(), msg=lambda m, name=name: f"{name}: {m}")


OBJECTIVES = {
    "weights": dict(),
    "kl": dict(kl="reverse"),
    "tdpo2": dict(kl="forward", alpha=0.5, detach_chosen_kl=True),
    "precomputed": dict(precompute_ref=True, loss_type="ipo"),
    "sft": dict(method="sft", sft_prompt_loss=True),
}
FLOAT32 = 2e-5  # of the largest gradient; the order of sums differs


@pytest.mark.parametrize("options", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_flat_equals_padded(tmp_path, options):
    extra = {} if "method" in options else dict(ref_model=llama(seed=1))
    assert_same(*padded_and_flat(tmp_path, llama(), **extra, **options), rtol=FLOAT32)


def test_flat_equals_padded_in_float64(tmp_path):
    results = padded_and_flat(tmp_path, llama().double(), ref_model=llama(seed=1).double(), kl="reverse")
    assert_same(*results, rtol=1e-7)  # the norms of these layers are float32


@pytest.mark.parametrize("implementation", ["sdpa", "eager", VARLEN])
@pytest.mark.parametrize("family", families.ATTENTION)
def test_flat_equals_padded_in_every_family(tmp_path, varlen_calls, family, implementation):
    """Sliding windows shorter than the sequences (Gemma3, Mistral), grouped heads, experts, learned positions."""
    model = families.model(family, len(tiny.tokenizer()), attention=implementation)
    ref = families.model(family, len(tiny.tokenizer()), seed=1, attention=implementation)
    assert_same(*padded_and_flat(tmp_path, model, ref_model=ref, kl="reverse"), rtol=FLOAT32)
    windows = {"Gemma3Text": {(3, 0), (-1, 0)}, "Mistral": {(3, 0)}}.get(family, {(-1, 0)})
    assert set(varlen_calls) == (windows if implementation == VARLEN else set())


def test_the_routers_loss_counts_the_same_tokens(tmp_path):
    model = families.model("Qwen3Moe", len(tiny.tokenizer()), output_router_logits=True, router_aux_loss_coef=0.5)
    padded, flat = padded_and_flat(tmp_path, model, ref_model=families.model("Qwen3Moe", len(tiny.tokenizer()), seed=1))
    assert padded[1]["aux_loss"] > 0
    assert_same(padded, flat, rtol=FLOAT32)


@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_flash_attn_gets_the_boundaries_from_transformers(tmp_path, monkeypatch, family):
    """transformers' own path up to the kernel of flash-attn, in whose place stands what it promises."""
    from transformers import modeling_flash_attention_utils as utils

    calls = []

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False, window_size=(-1, -1)):
        assert causal
        calls.append(cu_seqlens_q.tolist())
        options = dict(scale=softmax_scale, window_size=(window_size[0], 0), enable_gqa=q.shape[1] != k.shape[1])
        return varlen_by_sdpa(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)

    def dense(q, k, v, **options):
        bounds = torch.tensor([0, q.shape[1]], dtype=torch.int32)
        return torch.stack([varlen(*x, bounds, bounds, q.shape[1], q.shape[1], **options) for x in zip(q, k, v)])

    names = ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_pad_fn", "_unpad_fn", "_process_flash_kwargs_fn")
    values = ("flash_attention_2", dense, varlen, utils._pad_input, utils._unpad_input, utils._lazy_define_process_function(varlen))
    for name, value in zip(names, values):
        monkeypatch.setattr(utils, name, value)
    models = [families.model(family, len(tiny.tokenizer()), seed) for seed in (0, 1)]
    expected = result(trainer(tmp_path, uneven(), models[0], ref_model=models[1], padding_free=False))
    for model in models:
        model.config._attn_implementation = "flash_attention_2"
    t = trainer(tmp_path, uneven(), models[0], ref_model=models[1])
    assert t.data_collator.flat  # without being asked for
    calls.clear()
    assert_same(expected, result(t), rtol=FLOAT32)
    batch = t.data_collator([t.train_dataset[i] for i in range(len(t.train_dataset))])
    assert calls == [batch["cu_seq_lens_q"].tolist()] * 2  # of every layer


def test_recomputed_layers_keep_the_boundaries(tmp_path, varlen_calls):
    t = trainer(tmp_path, uneven(), llama(attention=VARLEN))
    varlen_calls.clear()
    plain = result(t)
    forwards = len(varlen_calls)
    t.model.gradient_checkpointing_enable()
    assert_same(plain, result(t), rtol=FLOAT32)
    assert len(varlen_calls) == 3 * forwards  # the layers ran again


@pytest.mark.parametrize("options", [dict(), dict(kl="reverse")], ids=["precomputed", "kl"])
def test_lora_flat_equals_padded(tmp_path, options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), config)
    options = dict(options, sanity_check=False)
    assert_same(*padded_and_flat(tmp_path, model, **options), rtol=FLOAT32)


def test_training_and_evaluation_are_those_of_padded_batches(tmp_path):
    logs = []
    for flat in (False, True):
        sets = dict(eval_dataset=uneven(6), per_device_eval_batch_size=4)
        t = trainer(tmp_path, uneven(12), llama(), padding_free=flat, max_steps=4, eval_strategy="steps", eval_steps=2, **sets)
        t.train()
        logs.append([{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in t.state.log_history])
    assert len(logs[0]) == len(logs[1]) > 5
    assert logs[1][-1].pop("total_flos") < 0.8 * logs[0][-1].pop("total_flos")  # no work for padding
    for padded, flat in zip(*logs):
        assert flat == pytest.approx(padded, rel=1e-3, abs=1e-5)
    assert abs(logs[0][0]["loss"] - math.log(2)) < 1e-5 and abs(logs[0][3]["loss"] - math.log(2)) > 1e-4


def test_a_flat_batch():
    row = dict(index=0, prompt_ids=[5, 6], chosen_ids=[7, 8, 2], rejected_ids=[2], chosen_weights=[1, 2, 3], rejected_weights=[4])
    row |= dict(chosen_ref_logps=[-1, -2, -3], rejected_ref_logps=[-4])
    batch = PairCollator(0, flat=True)([row, {**row, "prompt_ids": []}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 2, 5, 6, 2, 7, 8, 2, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 0]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 5, 8, 11, 12]
    assert batch["max_length_q"] == batch["max_length_k"] == 5 and "attention_mask" not in batch
    assert next(iter(batch)) == "lengths" and batch["lengths"].tolist() == [5, 3, 3, 1]
    flat = flatten_batch(batch)
    assert flat.target.tolist() == [7, 8, 2, 2, 8, 2] and flat.cu_seqlens.tolist() == [0, 3, 4, 6, 6]
    assert flat.token_weights.tolist() == [1, 2, 3, 4, 2, 3] and flat.ref_logps.tolist() == [-1, -2, -3, -4, -2, -3]
    assert flat.take(torch.arange(12.0)[None, :, None])[:, 0].tolist() == [1, 2, 3, 6, 8, 9]


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", [VARLEN, "flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("family", ["Llama", "Gemma3Text"])
def test_the_real_kernels_on_a_gpu(tmp_path, family, implementation):
    """err(flat against float32) <= 2 err(padded in bfloat16 against float32) + tiny, for the loss and the gradients."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    there = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if not there.get(implementation, attention.kernel)():
        pytest.skip(f"{implementation} is not installed")
    sizes = dict(hidden_size=64, head_dim=16)

    def run(attn, dtype, flat):
        policy, ref = (
            families.model(family, len(tiny.tokenizer()), s, attention=attn, **sizes).to(device="cuda", dtype=dtype) for s in (0, 1)
        )
        t = trainer(tmp_path, uneven(), policy, padding_free=flat, ref_model=ref, kl="reverse", use_cpu=False)
        assert t.data_collator.flat is flat
        batch = t._prepare_inputs(t.data_collator([t.train_dataset[i] for i in range(len(t.train_dataset))]))
        t.model.train()
        loss = t.compute_loss(t.model, batch)
        loss.backward()
        return loss.detach().double(), torch.cat([p.grad.double().flatten() for p in t.model.parameters() if p.grad is not None])

    truth, padded, flat = run("sdpa", torch.float32, False), run("sdpa", torch.bfloat16, False), run(implementation, torch.bfloat16, True)
    for name, x, y, z in zip(("loss", "gradient"), truth, padded, flat):
        assert (z - x).norm() <= 2 * (y - x).norm() + 4e-3 * x.norm(), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# Before torch 2.12 there is none with scales and windows, and batches stay padded: nothing becomes varlen that could be tested here.
@pytest.mark.skipif(attention.kernel() is None, reason="this torch has no varlen attention that suffices")
@pytest.mark.parametrize("options", [dict(), dict(kl="reverse")], ids=["no reference", "reference"])
def test_sdpa_becomes_varlen_on_a_gpu(tmp_path, options):
    """Also where the models come from the CPU, as they mostly do."""
    model = llama(hidden_size=64, head_dim=16).to(torch.bfloat16)
    t = trainer(tmp_path, uneven(), model, use_cpu=False, **options)
    assert t.data_collator.flat and model.config._attn_implementation == VARLEN
    assert len(losses_of(t)) == 2
