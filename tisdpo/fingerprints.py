"""Short names of models and tokenizers by what is in them, so that scores are never used with another model or tokenizer."""

import hashlib
import json
import re

import torch

SAMPLED = 256  # values of every parameter that go into a fingerprint

# entries of a configuration that change with loading, saving or the library, not with what the model computes
_VOLATILE = {
    "_name_or_path", "_attn_implementation", "_attn_implementation_autoset", "_experts_implementation", "architectures",
    "dtype", "torch_dtype", "name_or_path", "output_attentions", "output_hidden_states", "return_dict", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id",  # of trainers that take them over from the tokenizer
}  # fmt: skip


def model_fingerprint(model: torch.nn.Module, adapters: bool = False) -> str:
    """16 hexadecimal digits that tell whether two models compute the same: configuration, and shape, type and a sample of every parameter.

    Deterministic, independent of the device, the same after saving and loading. Of a PEFT model it is that of its base, adapters off,
    or with its `adapters`.
    Costs one read of SAMPLED values per parameter, so a change of a few single values may go unseen; a step of training does not.

    >>> model_fingerprint(model) == model_fingerprint(copy.deepcopy(model))
    True
    """
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        digest.update(_canonical(_without_volatile(config.to_dict())))
    for name, adapter in sorted(model.peft_config.items()) if adapters else ():
        digest.update(_canonical([name, *(getattr(adapter, key, None) for key in ("r", "lora_alpha", "use_rslora", "use_dora"))]))
    for name, parameter in sorted(list(model.named_parameters()) if adapters else base_parameters(model)):
        flat = parameter.detach().reshape(-1)
        where = torch.linspace(0, max(flat.numel() - 1, 0), min(SAMPLED, flat.numel()), dtype=torch.float64).long()
        digest.update(_canonical([name, list(parameter.shape), str(parameter.dtype)]))
        digest.update(flat[where.to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def base_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and parameters; of a PEFT model those of its base under the names they have without PEFT."""
    if not hasattr(model, "get_base_model"):
        return list(model.named_parameters())
    prefix = getattr(model.base_model, "prefix", None)  # of the adapters' own parameters
    adapters = [prefix] if isinstance(prefix, str) else ["lora_", "adaption_"]
    return [
        (re.sub(r"\.(token_adapter|base_layer|original_module)(?=\.)", "", name), parameter)
        for name, parameter in model.get_base_model().named_parameters()
        if not any(part in name for part in (*adapters, ".modules_to_save.", ".trainable_tokens_"))
    ]


def _without_volatile(config: dict) -> dict:
    return {key: _without_volatile(value) if isinstance(value, dict) else value for key, value in config.items() if key not in _VOLATILE}


def tokenizer_fingerprint(tokenizer) -> str:
    """16 hexadecimal digits that tell whether two tokenizers turn the same text into the same ids (chat template apart).

    >>> tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(AutoTokenizer.from_pretrained(saved))
    True
    """
    special = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "unk_token_id")}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        for state in ("padding", "truncation"):  # set by the last call, not by who made the tokenizer
            content.pop(state, None)
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(_canonical([special, content])).hexdigest()[:16]


def chat_template_fingerprint(tokenizer) -> str | None:
    """16 hexadecimal digits of the chat template, or None if there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else hashlib.sha256(_canonical(template)).hexdigest()[:16]


def _canonical(content) -> bytes:
    return json.dumps(content, sort_keys=True, default=str).encode()
