"""`tisdpo plan`: counts that are exact, activations and peaks beside what autograd and the allocator were seen to hold."""

import json
from dataclasses import fields, replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tisdpo import Objective, cli, linear_tis_dpo_loss, memory
from tisdpo.errors import InputError
from tisdpo.hf import attach_head
from tisdpo.memory import GIB, Plan, estimate, shape_of

SIZES = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=500)
SMALL = Plan(seq_len=32, device="cpu", dtype="float32")


def llama(dtype=torch.float32, lora=None, **sizes):
    model = LlamaForCausalLM(LlamaConfig(**SIZES | sizes)).to(dtype)
    if lora is not None:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=lora, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.train()


def shape(**sizes):
    return shape_of(LlamaConfig(**SIZES | sizes))


def batch_of(plan, vocabulary):
    ids = torch.randint(0, vocabulary, (2 * plan.pairs_per_gpu, plan.seq_len))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0 if plan.attention == "sdpa" else 1  # without padding transformers drops the mask
    return {"input_ids": ids, "attention_mask": mask}


def training_step(model, plan):
    """A function that runs forward and backward of the loss on a random batch."""
    attach_head(model)
    batch = batch_of(plan, model.config.vocab_size)
    ids, cu = batch["input_ids"], torch.arange(2 * plan.pairs_per_gpu + 1) * (plan.seq_len - 1)
    tokens, width, dtype = int(cu[-1]), model.config.hidden_size, next(model.parameters()).dtype
    reference = {"ref_logps": torch.zeros(tokens)}
    if plan.kl:
        reference = {
            "ref_hidden": torch.randn(tokens, width, dtype=dtype),
            "ref_weight": torch.randn(model.config.vocab_size, width, dtype=dtype),
        }

    def head(hidden, head):
        return linear_tis_dpo_loss(
            hidden[:, :-1].reshape(-1, width), head.weight, ids[:, 1:].flatten(), cu, **reference,
            objective=Objective(kl="reverse" if plan.kl else None),
        ).loss  # fmt: skip

    return lambda: model(**batch, head=head).backward()


# Counts


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Llama-3-8B", 8_030_261_248), ("Llama-3.2-1B", 1_235_814_400), ("Mistral-7B-v0.3", 7_248_023_552), ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen2.5-3B", 3_085_938_688), ("Qwen2.5-7B", 7_615_616_512),
    ],
)  # fmt: skip
def test_known_models_have_their_published_number_of_parameters(name, count):
    assert shape_of(memory.load_config(name)).count == count


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_weights_gradients_and_optimiser_are_exact(optimizer, lora, tied):
    from transformers import Adafactor

    model = llama(torch.bfloat16, lora, tie_word_embeddings=tied)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.randn_like(p)
    make = {"adamw": lambda p: torch.optim.AdamW(p, fused=True), "sgd": torch.optim.SGD, "adafactor": Adafactor}[optimizer]
    stepped = make(trained)
    stepped.step()
    found = estimate(shape(tie_word_embeddings=tied), replace(SMALL, dtype="bfloat16", lora=lora, optimizer=optimizer))
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in trained)
    assert found.optimizer == sum(
        x.nbytes for state in stepped.state.values() for x in state.values() if isinstance(x, torch.Tensor) and x.dim()
    ) + (
        4 * len(trained) if optimizer == "adamw" else 0  # its steps are tensors without dimensions
    )


# Activations


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, 4])
def test_activations_are_what_autograd_saves(lora, dtype, attention):
    """Exact, but for LoRA: the first layer's norm has an input without gradient, so it keeps less."""
    plan = replace(SMALL, lora=lora, dtype=dtype, attention=attention, gradient_checkpointing=False)
    model = llama(getattr(torch, dtype), lora)
    parameters, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    batch = batch_of(plan, SIZES["vocab_size"])
    base = model.get_base_model().model if lora else model.model
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        base(**batch, use_cache=False)
    seen = sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in parameters)
    found, _ = memory.activation_bytes(shape(), plan)
    mask = 2 * plan.seq_len**2 if attention == "sdpa" else 0  # the mask itself lives as long as the forward, autograd saves its numbers
    if lora is None:
        assert found - mask == seen
    else:
        assert 0.95 * (found - mask) <= seen <= found - mask


# The peak of a step


def peak_of(step) -> int:
    """Bytes by which the CPU allocator's total rises during `step`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    totals = []
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            totals.append((event.start_ns(), event.nbytes()))
    running = peak = 0
    for _, size in sorted(totals, key=lambda x: x[0]):
        running += size
        peak = max(peak, running)
    assert totals
    return peak


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (dict(), dict()),
        (dict(kl=True, reference="cached-hidden"), dict()),
        (dict(gradient_checkpointing=False), dict()),
        (dict(lora=4, seq_len=128), dict(vocab_size=50)),
        (dict(seq_len=256), dict(vocab_size=50)),
        (dict(seq_len=256, attention="flash"), dict(vocab_size=50)),
    ],
    ids=["head", "kl", "everything kept", "lora", "layer", "layer, flash"],
)
def test_the_peak_of_a_step_is_the_estimate(options, sizes, monkeypatch):
    """Within 5 %; gradients of an earlier micro-batch are there, as the estimate assumes."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    plan = replace(SMALL, **options)
    model = llama(torch.float32, plan.lora, **sizes)
    if plan.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if plan.lora:
            model.enable_input_require_grads()
    step = training_step(model, plan)
    step()
    found = estimate(shape(**sizes), plan)
    assert peak_of(step) == pytest.approx(found.activations + max(found.head, found.layer), rel=0.05)


def test_the_head_follows_the_librarys_chunks(monkeypatch):
    base, plan = shape(), replace(SMALL, seq_len=1000)
    whole = memory.head_bytes(base, plan)
    monkeypatch.setenv("TISDPO_CHUNK_MIB", "1")
    assert memory.head_bytes(base, plan) < whole  # the pair is longer than the budget: computed twice
    trained = memory.head_bytes(base, plan) - memory.head_bytes(base, replace(plan, lora=4))
    v, h = SIZES["vocab_size"], SIZES["hidden_size"]
    rows = (1 << 20) // (4 * v)
    held = min(max(4 * rows, 2 * plan.seq_len), plan.tokens)
    assert trained == 4 * v * h - 2 * 4 * (held - rows) * h  # a frozen head keeps a pair's D @ W, not its logits


# Sharding


def test_sharding_divides_what_it_says():
    base, one = shape(), Plan(dtype="float32")
    whole = estimate(base, one)
    found = {name: estimate(base, replace(one, gpus=4, sharding=name)) for name in memory.SHARDINGS}
    assert (found["ddp"].weights, found["ddp"].gradients, found["ddp"].gathered) == (whole.weights, whole.gradients, whole.gradients)
    assert (found["zero2"].weights, found["zero2"].gradients) == (whole.weights, whole.gradients / 4) and not found["zero2"].gathered
    for name in ("zero3", "fsdp2"):
        assert (found[name].weights, found[name].gradients) == (whole.weights / 4, whole.gradients / 4)
        assert found[name].gathered == 4 * (3 * base.layer + 2 * base.root)
    half = replace(one, dtype="bfloat16", gpus=4)
    masters = estimate(base, replace(half, sharding="zero3")).optimizer - estimate(base, replace(half, sharding="fsdp2")).optimizer
    assert masters == pytest.approx((12 - 4) * base.count / 4, rel=1e-6)
    assert base.layer * 3 + base.root == base.count


# The command


def test_plan_prints_a_table_and_a_verdict(tmp_path, capsys):
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    for model in (tmp_path, tmp_path / "config.json"):
        assert cli.main(["plan", "--model", str(model), "--seq-len", "64"]) == 0
        out = capsys.readouterr().out
        assert f"{shape().count:,} parameters, all trained" in out and "optimiser state" in out
        assert "Assumed: every token is a completion's, adamw, gradient checkpointing, padded batches (sdpa)" in out
        assert "within 5 % of the peaks of small" in out
        assert out.splitlines()[-1].startswith("fits in 80 GiB: 1.0 GiB, largest is CUDA context")


def test_every_option_of_plan_has_an_effect(tmp_path, capsys):
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    options = dict(
        gpus=4, seq_len=70, pairs_per_gpu=3, lora=8, kl=True, dtype="float32", optimizer="adafactor", sharding="zero2",
        gradient_checkpointing=False, attention="flash", reference="cached-hidden",
    )  # fmt: skip
    words = ["plan", "--model", str(tmp_path), "--gpu-memory", "7"]
    for name, value in options.items():
        flag = "--" + ("no-" if value is False else "") + name.replace("_", "-")
        words += [flag] if isinstance(value, bool) else [flag, str(value)]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == memory.report(str(tmp_path), shape(), Plan(**options), 7.0) + "\n"
    assert {*options, "device"} == {f.name for f in fields(Plan)} and all(v != getattr(Plan(), k) for k, v in options.items())


def test_the_advice_is_what_fits():
    base, plan = shape_of(memory.load_config("Llama-3-8B")), Plan(gpus=8, kl=True)
    said = memory.verdict(base, plan, 80)
    assert said.startswith("does not fit in 80 GiB: 96.3 GiB, largest is optimiser state (29.9 GiB); try --sharding fsdp2 (")
    assert estimate(base, replace(plan, sharding="fsdp2")).total <= 80 * GIB
    assert "try gradient checkpointing" in memory.verdict(base, Plan(lora=8, gradient_checkpointing=False), 60)
    assert memory.verdict(base, plan, 1).endswith("try more GPUs or a smaller model.")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "no/such"], "no configuration could be read from 'no/such'"),
        (["--model", "Llama-3-8B", "--dtype", "int8"], "dtype must be one of bfloat16, float16, float32, got 'int8'"),
        (["--model", "Llama-3-8B", "--gpus", "0"], "gpus must be at least 1, got 0"),
        (["--model", "Llama-3-8B", "--gpu-memory", "0"], "gpu_memory must be positive"),
        (["--model", "Llama-3-8B", "--kl", "--reference", "precomputed"], "the KL term needs the reference's distribution"),
    ],
)
def test_plan_refuses_what_it_cannot_count(words, said, capsys):
    assert cli.main(["plan", *words]) == 2
    assert capsys.readouterr().err.startswith(f"tisdpo: {said}")


def test_a_model_of_another_kind_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "vocab_size": 64, "hidden_size": 8, "num_hidden_layers": 1}))
    with pytest.raises(
        InputError, match="the activations of MambaForCausalLM cannot be estimated: its configuration has no num_attention_heads"
    ):
        shape_of(memory.load_config(str(tmp_path)))
