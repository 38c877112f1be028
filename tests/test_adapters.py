"""Adapters, quantised bases, routers and pictures: what is trained beside a plain model, and what is refused."""

import math

import pytest
import tiny
import torch
import transformers
from test_trainer import batch_of, full_logits_loss, losses_of, trainer

from tisdpo.errors import InputError
from tisdpo.hf import attach_head, head_of, model_inputs
from tisdpo.ops import products

METHODS = pytest.mark.parametrize("options", [dict(), dict(kl="reverse")], ids=["precomputed", "kl"])


def lora(model, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options)
    )


def dataset():
    return tiny.contrast(tiny.rows())


# Adapters


@pytest.mark.parametrize("attached_first", [False, True])
def test_an_adapter_on_the_head_is_refused(tmp_path, attached_first):
    model = tiny.model() if attached_first else transformers.LlamaForCausalLM(tiny.model().config)
    with pytest.raises(InputError, match=r"the head of LlamaForCausalLM carries an adapter \(peft.tuners.lora.layer.Linear\)"):
        trainer(tmp_path, dataset(), model=lora(model, target_modules=["q_proj", "lm_head"]))


def test_trained_tokens_of_a_tied_head_are_refused(tmp_path):
    config = tiny.model().config
    config.tie_word_embeddings = True
    model = lora(attach_head(transformers.LlamaForCausalLM(config)), trainable_token_indices=[1, 2])
    with pytest.raises(InputError, match=r"the head of LlamaForCausalLM carries an adapter .*TrainableTokens"):
        trainer(tmp_path, dataset(), model=model)


@METHODS
def test_a_whole_copy_of_the_head_is_trained_and_the_reference_keeps_its_own(tmp_path, options):
    t = trainer(tmp_path, dataset(), model=lora(tiny.model(), modules_to_save=["lm_head"]), learning_rate=5e-2, **options)
    start = tiny.model().lm_head.weight
    assert losses_of(t)[0] == pytest.approx(math.log(2), abs=1e-5)
    head = t.model.get_base_model().lm_head
    assert torch.equal(head.original_module.weight, start) and (head_of(t.model.get_base_model()).weight - start).abs().max() > 1e-2
    batch = batch_of(t)
    expected = full_logits_loss(t.model, tiny.model(), batch, beta=0.1, **options)
    torch.testing.assert_close(t.compute_loss(t.model, batch).double(), expected, rtol=1e-4, atol=1e-5)


@METHODS
def test_adapters_that_were_trained_before_are_no_part_of_the_reference(tmp_path, options):
    model = lora(tiny.model())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    t = trainer(tmp_path, dataset(), model=model, **options)
    batch = batch_of(t)
    expected = full_logits_loss(t.model, tiny.model(), batch, beta=0.1, **options)
    assert abs(expected.item() - math.log(2)) > 1e-3
    torch.testing.assert_close(t.compute_loss(t.model, batch).double(), expected, rtol=1e-4, atol=1e-5)
    assert losses_of(t)[0] != pytest.approx(math.log(2), abs=1e-3)  # the first loss need not be ln 2, and is not refused
    t.evaluate(dataset())  # the base is there at any time


@METHODS
def test_adapters_that_change_their_base_need_a_reference(tmp_path, options):
    model = lora(tiny.model(), init_lora_weights="pissa")
    with pytest.raises(InputError, match="init_lora_weights='pissa' changes the weights of the base"):
        trainer(tmp_path, dataset(), model=model, **options)
    t = trainer(tmp_path, dataset(), model=model, ref_model=tiny.model(), **options)
    assert losses_of(t)[0] == pytest.approx(math.log(2), abs=1e-3)


@METHODS
def test_the_gradient_of_a_frozen_head_is_never_computed(tmp_path, options, monkeypatch):
    seen = []
    own = products.add_grad_weight_
    monkeypatch.setattr(products, "add_grad_weight_", lambda *args, **kwargs: (seen.append(1), own(*args, **kwargs)))
    monkeypatch.setenv("TISDPO_BACKEND", "torch")
    t = trainer(tmp_path, dataset(), model=lora(tiny.model()), max_steps=1, **options)
    t.train()
    assert not seen and t.model.get_base_model().lm_head.weight.grad is None
    trainer(tmp_path, dataset(), max_steps=1, **options).train()
    assert seen  # a trained head passes here


# Quantised bases


class FourBit(torch.nn.Module):
    """A linear layer as bitsandbytes keeps it: two numbers of 4 bits in a byte and a scale for each row; frozen, computed in `dtype`."""

    def __init__(self, linear, dtype):
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, dtype
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 7)
        levels = (linear.weight.detach() / self.scale).round().to(torch.int8) + 8
        self.weight = torch.nn.Parameter((levels[:, ::2] | levels[:, 1::2] << 4).to(torch.uint8), requires_grad=False)

    def forward(self, x):
        levels = torch.stack([self.weight & 15, self.weight >> 4], -1).flatten(1).to(self.dtype) - 8
        return torch.nn.functional.linear(x.to(self.dtype), levels * self.scale.to(self.dtype)).to(x.dtype)


def quantised(skip=("lm_head",), adapters=True, dtype=torch.float32):
    """The tiny model with 4-bit layers; adapters around them are PEFT's LoRA."""
    model = tiny.model().to(dtype).requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name.split(".")[-1] not in skip:
            model.set_submodule(name, FourBit(module, dtype))
    if not adapters:
        return model
    peft = pytest.importorskip("peft")
    from peft.tuners.lora import Linear

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    config._register_custom_module({FourBit: Linear})
    return peft.get_peft_model(model, config)


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_base_is_trained_through_its_adapters(tmp_path, options, dtype):
    model = quantised(dtype=dtype)
    packed = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    t = trainer(tmp_path, dataset(), model=model, learning_rate=5e-2, **options)
    assert t.ref_model is None and len(packed) == 14
    first, *_ = losses_of(t)
    assert first == pytest.approx(math.log(2), abs=1e-5 if dtype == torch.float32 else 5e-3)
    assert all(torch.equal(p, packed[name]) for name, p in model.named_parameters() if name in packed)
    assert not model.get_base_model().lm_head.weight.requires_grad
    batch = batch_of(t)
    found = t.compute_loss(t.model, batch)
    expected = full_logits_loss(t.model, quantised(adapters=False, dtype=dtype), batch, beta=0.1, **options)
    assert abs(found.item() - math.log(2)) > 1e-3  # the adapters have moved
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.05, atol=0.02)
    torch.testing.assert_close(found.double(), expected, **tolerance)


def test_a_quantised_head_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"the head of LlamaForCausalLM is quantised \(FourBit, torch.uint8\).*llm_int8_skip_modules"):
        trainer(tmp_path, dataset(), model=quantised(skip=()))


# Mixtures of experts


def moe(kind="Mixtral", **options):
    sizes = dict(
        vocab_size=len(tiny.tokenizer()), hidden_size=16, intermediate_size=24, moe_intermediate_size=16, num_hidden_layers=2,
        num_experts=4, num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=160,
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "Olmoe", "GraniteMoe", "GptOss"])
def test_the_routers_loss_is_the_models_own(kind):
    model = moe(kind, output_router_logits=True, router_aux_loss_coef=0.25)
    ids = torch.randint(3, 20, (2, 9), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids).index_fill(1, torch.tensor([8]), 0)}
    own = model(**batch, output_hidden_states=True)
    if not isinstance(own.aux_loss, torch.Tensor):
        with pytest.raises(InputError, match=f"{kind}ForCausalLM makes no auxiliary loss of its routers in transformers"):
            attach_head(model)(**batch, head=lambda hidden, head: head)
        return  # this transformers gives the family the number 0
    hidden, head = attach_head(model)(**batch, head=lambda hidden, head: (hidden, head))
    torch.testing.assert_close(head.aux_loss, own.aux_loss)
    torch.testing.assert_close(hidden, own.hidden_states[-1])
    assert head.aux_loss_coef == 0.25 and head.aux_loss.requires_grad and not model.base_model._forward_hooks
    with torch.no_grad():
        assert model(**batch, head=lambda hidden, head: head).aux_loss is None  # a reference


@pytest.mark.parametrize("options", [dict(method="dpo", kl="reverse"), dict(method="sft")], ids=["dpo", "sft"])
def test_the_routers_loss_is_added_and_logged(tmp_path, options):
    options |= dict(max_steps=1, learning_rate=0.0, sanity_check=True)
    (plain,) = [e for e in history(trainer(tmp_path, tiny.rows(), model=moe(), **options)) if "loss" in e]
    assert "aux_loss" not in plain
    for sizes in (dict(), dict(per_device_train_batch_size=1, gradient_accumulation_steps=4)):
        model = moe(output_router_logits=True, router_aux_loss_coef=0.5)
        t = trainer(tmp_path, tiny.rows(), model=model, **options | sizes)
        (entry,) = [e for e in history(t) if "loss" in e]
        assert entry["aux_loss"] > 0.9
        assert entry["loss"] == pytest.approx(
            plain["loss"] + 0.5 * entry["aux_loss"], rel=1e-2 if options["method"] == "sft" and sizes else 1e-4
        )
    assert not any("aux_loss" in name for name in t.evaluate(t.train_dataset.select(range(2))))


def test_a_model_that_makes_no_routers_loss_says_so():
    model = attach_head(tiny.model())
    with pytest.raises(InputError, match=r"no auxiliary loss of its routers in transformers .*; set output_router_logits=False in its"):
        model(input_ids=torch.tensor([[3, 4]]), head=lambda hidden, head: hidden, output_router_logits=True)


def history(t):
    t.train()
    return t.state.log_history


def test_the_routers_loss_reaches_the_routers(tmp_path):
    grads = {}
    for coef in (0.0, 10.0):
        t = trainer(tmp_path, tiny.rows(), model=moe(output_router_logits=True, router_aux_loss_coef=coef), method="dpo")
        t.model.train()
        t.compute_loss(t.model, batch_of(t)).backward()
        grads[coef] = next(p.grad for name, p in t.model.named_parameters() if name.endswith("gate.weight"))
    assert grads[10.0].norm() > 10 * grads[0.0].norm()


# Pictures


def test_pictures_are_refused(tmp_path):
    words = "vision-language pairs are not supported, they carry"
    rows = tiny.rows()
    with pytest.raises(InputError, match=f"{words} images"):
        trainer(tmp_path, rows.add_column("images", [[b""]] * len(rows)), method="dpo")
    with pytest.raises(InputError, match=f"{words} image_grid_thw, pixel_values"):
        model_inputs({"input_ids": torch.zeros(2, 3), "pixel_values": torch.zeros(1), "image_grid_thw": torch.zeros(1, 3)})
