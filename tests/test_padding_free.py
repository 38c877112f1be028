"""Padding-free batches: the loss, gradients and metrics of padded ones; torch's varlen kernel; who is refused."""

import logging
import math
from functools import cache

import families
import pytest
import tiny
import torch
from test_trainer import losses_of, trainer

from tisdpo import attention
from tisdpo.attention import VARLEN, across, choose, leak
from tisdpo.batches import flatten_batch
from tisdpo.data import PairCollator
from tisdpo.errors import InputError
from tisdpo.hf import verify_head


@cache
def uneven(count: int = 7):
    """Rows with contrasts; the chosen completion of one has one token, of another a prompt has one."""

    def change(row, index):
        if index == 1:
            return {"chosen_ids": row["chosen_ids"][:1]}
        return {"prompt_ids": row["prompt_ids"][:1]} if index == 2 else {}

    return tiny.contrast(tiny.rows().select(range(count)).map(change, with_indices=True))


def llama(seed: int = 0, **options):
    return families.model("Llama", len(tiny.tokenizer()), seed, **options)


def varlen_by_sdpa(query, key, value, cu_q, cu_k, longest_q, longest_k, *, scale, window_size, enable_gqa):
    """What torch's kernel promises, one sequence after the other."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.diff().max() == longest_q and cu_k.diff().max() == longest_k
    assert window_size[1] == 0 and enable_gqa == (query.shape[1] != key.shape[1])
    out = []
    for q, k, v in zip(*(x.split(cu_q.diff().tolist()) for x in (query, key, value))):
        apart = torch.arange(len(q))[:, None] - torch.arange(len(k))
        seen = (apart >= 0) & ((apart <= window_size[0]) | (window_size[0] < 0))
        one = [x.transpose(0, 1)[None] for x in (q, k, v)]
        attended = torch.nn.functional.scaled_dot_product_attention(*one, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


@pytest.fixture
def kernel(monkeypatch):
    calls = []

    def recorded(*args, **kwargs):
        calls.append(kwargs["window_size"])
        return varlen_by_sdpa(*args, **kwargs)

    monkeypatch.setattr(attention, "kernel", lambda: recorded)
    return calls


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
def test_flat_equals_padded_in_every_family(tmp_path, kernel, family, implementation):
    """Sliding windows shorter than the sequences (Gemma3, Mistral), grouped heads, experts, learned positions."""
    model = families.model(family, len(tiny.tokenizer()), attention=implementation)
    ref = families.model(family, len(tiny.tokenizer()), seed=1, attention=implementation)
    assert_same(*padded_and_flat(tmp_path, model, ref_model=ref, kl="reverse"), rtol=FLOAT32)
    windows = {"Gemma3Text": {(3, 0), (-1, 0)}, "Mistral": {(3, 0)}}.get(family, {(-1, 0)})
    assert set(kernel) == (windows if implementation == VARLEN else set())


def test_recomputed_layers_keep_the_boundaries(tmp_path, kernel):
    t = trainer(tmp_path, uneven(), llama(attention=VARLEN))
    kernel.clear()
    plain = result(t)
    forwards = len(kernel)
    t.model.gradient_checkpointing_enable()
    assert_same(plain, result(t), rtol=FLOAT32)
    assert len(kernel) == 3 * forwards  # the layers ran again


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


# Leaks


def logits(model, first, second):
    ids = torch.tensor([[*first, *second]])
    lengths = attention.flat_inputs([len(first), len(second)])
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **lengths).logits[0, len(first) :]


FIRST, OTHER, SECOND = [3, 9, 4, 11, 20, 6, 7, 8], [13, 30, 8, 2, 2, 5, 40, 41], [5, 6, 12, 7, 21, 33]


@pytest.mark.parametrize("implementation", ["sdpa", "eager", VARLEN])
@pytest.mark.parametrize("family", families.ATTENTION)
def test_tokens_of_one_sequence_change_nothing_in_another(kernel, family, implementation):
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


def test_batches_are_flat_by_default_where_the_attention_reads_boundaries(kernel):
    assert choose([llama(attention=VARLEN)], None) and kernel
    assert not choose([llama(attention=VARLEN)], False)


def test_a_kernel_that_does_not_run_here_means_padded_batches(monkeypatch):
    def broken(*args, **kwargs):
        raise NotImplementedError("no such kernel.\nmore")

    monkeypatch.setattr(attention, "kernel", lambda: broken)
    model = llama(attention=VARLEN)
    assert not choose([model], None)
    with pytest.raises(InputError, match=r"its forward refuses a flat batch \(no such kernel\)"):
        choose([model], True)


def test_varlen_takes_the_place_of_sdpa_and_gives_it_back(monkeypatch, kernel):
    monkeypatch.setattr(attention, "_varlen_runs", lambda model: True)
    first, second = llama(), llama(seed=1)
    assert choose([first, second], None)
    assert first.config._attn_implementation == second.config._attn_implementation == VARLEN
    first, leaking = llama(), families.model("Lfm2")
    assert not choose([first, leaking], None) and first.config._attn_implementation == "sdpa"
    assert "tisdpo_varlen" not in str(llama(attention=VARLEN).config.to_dict())  # a saved model does not ask for it


def test_varlen_builds_no_mask_for_flat_batches(kernel, monkeypatch):
    masks = []
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", lambda *args, **kwargs: masks.append(kwargs))
    model = families.model("Gemma3Text", attention=VARLEN)
    inputs = attention.flat_inputs([3, 6])
    model(input_ids=torch.arange(9)[None], **inputs, head=lambda hidden, head: hidden)
    assert not masks and kernel
    model(input_ids=torch.arange(9)[None], head=lambda hidden, head: hidden)
    assert masks


def test_a_model_that_waits_for_its_gpu_is_verified_by_another_attention(monkeypatch):
    model = llama()
    model.config._attn_implementation = "flash_attention_2"  # it would refuse the CPU
    verify_head(model)
    assert model.config._attn_implementation == "flash_attention_2"


def test_padded_and_generating_calls_of_varlen_are_sdpa(kernel):
    model, sdpa = llama(attention=VARLEN), llama()
    ids = torch.randint(3, 40, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for inputs in (dict(attention_mask=mask), dict()):
        assert torch.equal(model(ids, **inputs).logits, sdpa(ids, **inputs).logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), sdpa.generate(ids, max_new_tokens=4, do_sample=False))
    packed = dict(position_ids=torch.tensor([[*range(4), *range(5)]]))  # positions alone, without boundaries
    assert torch.equal(model(ids[:1], **packed).logits, sdpa(ids[:1], **packed).logits) and not kernel


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
def test_varlen_refuses_what_the_kernel_cannot_do(kernel, options, message):
    x, bounds = torch.zeros(1, 2, 4, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(InputError, match=f"Linear needs {message}, which torch's varlen attention cannot do"):
        attention.varlen_attention(
            torch.nn.Linear(1, 1), x, x, x, None,
            cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=4, max_length_k=4, **options,
        )  # fmt: skip
    assert not kernel


def test_varlen_pads_narrow_values(kernel):
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
@pytest.mark.parametrize("options", [dict(), dict(kl="reverse")], ids=["no reference", "reference"])
def test_sdpa_becomes_varlen_on_a_gpu(tmp_path, options):
    """Also where the models come from the CPU, as they mostly do."""
    model = llama(hidden_size=64, head_dim=16).to(torch.bfloat16)
    t = trainer(tmp_path, uneven(), model, use_cpu=False, **options)
    assert t.data_collator.flat and model.config._attn_implementation == VARLEN
    assert len(losses_of(t)) == 2
