"""Small models of many families of transformers, for what depends on the layers: the attention, the ends of sequences, the head."""

import tiny
import torch
import transformers

from tisdpo.hf import attach_head

SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=160,
    head_dim=8,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
SLIDING = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])
MIXED = ["linear_attention", "full_attention"]
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4)

# name of the config class without "Config" -> its own sizes
ATTENTION = {
    "Llama": {},
    "Qwen3": {},
    "Mistral": dict(sliding_window=4),
    "Gemma3Text": SLIDING,
    "Qwen3Moe": dict(num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2),
    "GPT2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=160),
}
ACROSS = {
    "Lfm2": dict(layer_types=["conv", "full_attention"]),
    "Mamba": dict(state_size=4),
    "FalconH1": dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4),
    "RecurrentGemma": dict(lru_width=32, block_types=["recurrent", "attention"], attention_window_size=16),
    "MiniMax": dict(num_local_experts=2, layer_types=MIXED),
    "Rwkv": dict(attention_hidden_size=32),
}
PACKS_ITSELF = {
    "Qwen3Next": dict(
        layer_types=MIXED,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts_per_tok=2,
    )
}
POSITIONS_UNSEEN = {"OPT": dict(ffn_dim=48, word_embed_proj_dim=32), "GptOss": dict(SLIDING, num_local_experts=4)}
ALL = {**ATTENTION, **ACROSS, **PACKS_ITSELF, **POSITIONS_UNSEEN}


def model(family: str, vocabulary: int = 64, seed: int = 0, attention: str | None = None, **options):
    config = getattr(transformers, f"{family}Config")(**{**SMALL, "vocab_size": vocabulary, **ALL[family], **options})
    head = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family.removesuffix('Text')}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(transformers, head)(config).eval()
    if attention is not None:
        made.set_attn_implementation(attention)
    return attach_head(made)


def llama(seed: int = 0, **options):
    """With the vocabulary of the smallest world."""
    return model("Llama", len(tiny.tokenizer()), seed, **options)


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
