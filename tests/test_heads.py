"""The head of every family of models, read from its configuration: our log-probs are those of the model's own logits."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tisdpo import linear_token_logps
from tisdpo.errors import InputError
from tisdpo.hf import attach_head, head_of, logit_transform, verify_head

V = 53
SMALL = dict(
    vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.5,
)  # fmt: skip

# family: what is special about its head, and the settings that make it show
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen3": {"tie_word_embeddings": True},
    "phi": {},  # a bias
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},  # tied
    "gpt_neox": {},
    "olmo2": {},
    "gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
    "recurrent_gemma": {"logits_soft_cap": 2.0, "lru_width": 16, "attention_window_size": 16},
    "xlstm": {"output_logit_soft_cap": 2.0, "num_blocks": 1, "num_heads": 2, "embedding_dim": 16, "chunk_size": 8},
    "nanochat": {"final_logit_softcapping": 2.0},
    "vaultgemma": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.4},
    "granite": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0, "num_local_experts": 2, "num_experts_per_tok": 1},
    "minicpm3": {
        "dim_model_base": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 2,
    },
    "hyperclovax": {"logits_scaling": 0.5},
    "falcon_h1": {
        "lm_head_multiplier": 0.6, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
        "mamba_expand": 1, "mamba_chunk_size": 8,
    },
}  # fmt: skip
SCALED = {
    "recurrent_gemma",
    "xlstm",
    "nanochat",
    "vaultgemma",
    "gemma2",
    "gemma3_text",
    "cohere",
    "cohere2",
    "granite",
    "granitemoe",
    "minicpm3",
    "hyperclovax",
    "falcon_h1",
}


def build(family: str):
    try:
        config = AutoConfig.for_model(family, **SMALL | FAMILIES[family])
    except ValueError as error:
        pytest.skip(f"this transformers does not know it: {str(error)[:60]}")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_models_own_logits(family):
    model = build(family)
    ids = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        expected = own[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        attach_head(model)
        found = model(
            input_ids=ids,
            head=lambda hidden, head: linear_token_logps(hidden[:, :-1], head.weight, ids[:, 1:], bias=head.bias, **head.transform).logps,
        )
    assert own.std() > 0.05  # logits that differ
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    transform = logit_transform(model.config)
    assert (transform != {"logit_scale": 1.0, "softcap": None}) == (family in SCALED)
    assert (head_of(model).bias is not None) == (family == "phi")
    verify_head(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_does_something_else_is_refused(dtype):
    """As if a family kept its scale under a name that nobody knows."""
    model = build("granite").to(dtype).train()
    attach_head(model)
    verify_head(model)
    assert model.training
    model.config.logits_scaling = 1.0  # what is read is wrong now; the model itself still divides by 3
    model.logits_scaling = 3.0
    own = type(model).forward

    def scaled(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        out.logits = out.logits / 3
        return out

    model._tisdpo_own_forward = scaled.__get__(model)
    with pytest.raises(InputError, match=r"GraniteForCausalLM makes its logits in a way that is not known here .*logit scale 1.0"):
        verify_head(model)


def test_a_cap_that_is_far_above_16_bit_logits_is_seen():
    """As xLSTM's of 30 would be under another name: of logits up to 11 it takes half a nat."""
    model = build("llama").to(torch.bfloat16)
    attach_head(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(11 / model(input_ids=torch.arange(8)[None]).logits.abs().max())
    verify_head(model)
    own = type(model).forward

    def capped(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out

    model._tisdpo_own_forward = capped.__get__(model)
    with pytest.raises(InputError, match="makes its logits in a way that is not known here"):
        verify_head(model)
