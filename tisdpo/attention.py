"""Attention for padding-free (flat) batches: one row [1, T] with sequences one after the other, and which models may be given one.

A flat batch is right where no layer looks across the end of a sequence. Attention layers do not: flash-attn reads the boundaries from
`cu_seq_lens_q`, ..., and transformers' `sdpa` and `eager` build a block mask [T, T] from positions that start again at 0 (right, slower).
For machines without flash-attn, `VARLEN` is torch's own kernel as an attention implementation of transformers. Convolutions and linear
attention run on over the boundaries. `choose` decides, and asks the model itself: names grow old.

Sizes: T tokens of all sequences, A query heads, G key heads, D numbers a head.
"""

import inspect
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

from tisdpo.errors import InputError

log = logging.getLogger("tisdpo")

VARLEN = "tisdpo_varlen"
_ATTENTION_LAYERS = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
_RECURRENT = re.compile("mamba|rwkv|lstm|recurrent|linear_?attention|lightning|deltanet|shortconv|retention", re.IGNORECASE)
_UNABLE = {"softcap": "soft-capped attention scores", "s_aux": "attention sinks", "position_bias": "an attention bias"}
_flat: ContextVar[bool] = ContextVar("flat", default=False)


def flat_inputs(lengths: Sequence[int]) -> dict:
    """What a model needs besides `input_ids` [1, T] to keep sequences of these lengths apart: the names are transformers'.

    position_ids [1, T] int64, cu_seq_lens_q = cu_seq_lens_k [S+1] int32, max_length_q = max_length_k int.
    """
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    longest = max(lengths)
    return {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


@contextmanager
def flat_masks(flat: bool) -> Iterator[None]:
    """Within it a model with the attention `VARLEN` builds no mask: the kernel reads the boundaries, and a mask would be [T, T]."""
    token = _flat.set(flat)
    try:
        yield
    finally:
        _flat.reset(token)


@contextmanager
def evaluating(*models):
    """The models in evaluation mode; afterwards each in the mode it had."""
    training = [model for model in models if model.training]  # a change of mode may cost something (kernels of the hub)
    for model in training:
        model.eval()
    try:
        yield
    finally:
        for model in training:
            model.train()


@contextmanager
def runs_anywhere(model) -> Iterator[None]:
    """Within it a model that waits on the CPU for the GPU that its flash-attn needs has the attention `eager`."""
    config, own = _base(model).config, _implementation(model)
    wait = "flash" in own and next(model.parameters()).device.type == "cpu"
    try:
        if wait:
            config._attn_implementation = "eager"
        yield
    finally:
        if wait:
            config._attn_implementation = own


@cache
def kernel():
    """torch's `varlen_attn`, or None where this torch has none that can do scales, windows and grouped heads (before torch 2.12)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys() else None


def varlen_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, dropout=0.0, scaling=None, sliding_window=None,
    is_causal=None, cu_seq_lens_q=None, cu_seq_lens_k=None, max_length_q=None, max_length_k=None, **kwargs,
):  # fmt: skip
    """Causal attention of transformers' interface on torch's varlen kernel; without `cu_seq_lens_q` (padded, generating) it is `sdpa`.

    query [1, A, T, D], key and value [1, G, T, D] -> [1, T, A, D]. Raises InputError for what the kernel cannot do.
    """
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    unable = [what for name, what in _UNABLE.items() if kwargs.get(name) is not None]
    unable += ["dropout"] if dropout else []
    unable += [] if (getattr(module, "is_causal", True) if is_causal is None else is_causal) else ["attention in both directions"]
    if unable:
        raise InputError(f"{type(module).__name__} needs {unable[0]}, which torch's varlen attention cannot do; set padding_free=False")
    dtype = value.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(value.device.type):
        dtype = torch.get_autocast_dtype(value.device.type)
    if value.is_cuda and dtype == torch.float32:
        raise InputError("torch's varlen attention needs 16-bit numbers; set bf16=True, load the model in bfloat16, or padding_free=False")
    width = value.shape[-1]
    if width != query.shape[-1]:  # latent attention (DeepSeek): one width for the kernel, the rest is cut off again
        value = torch.nn.functional.pad(value, (0, query.shape[-1] - width))
    query, key, value = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value))
    out = kernel()(
        query, key, value, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k,
        scale=scaling, window_size=(-1 if sliding_window is None else sliding_window - 1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out[None, ..., :width], None


def _varlen_mask(*args, use_vmap: bool = False, **kwargs):
    from transformers.masking_utils import sdpa_mask

    if not _flat.get():
        return sdpa_mask(*args, use_vmap=use_vmap, **kwargs)
    if use_vmap:
        raise InputError(
            "the model adds a pattern of its own to its mask, which torch's varlen attention cannot do; set padding_free=False"
        )
    return None


def register_varlen() -> None:
    """Make `attn_implementation=VARLEN` known to transformers; twice changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, _varlen_mask)


# Which models


def choose(models: Sequence, wanted: bool | None, device: torch.device | None = None) -> bool:
    """Whether all these models (policy, reference; with `tisdpo.hf.attach_head`) get flat batches; one line in the log says why.

    None: where flash-attn is the attention, or `sdpa` on a GPU that torch's varlen kernel can replace (it then does, on these instances).
    True: also by transformers' `sdpa` and `eager`, which build a mask of T x T; InputError, by name, where a flat batch would be wrong.
    False: no. Call it under the autocast of the training. device: of the training, where the models may not be yet; None: theirs.
    """
    if wanted is False:
        return False
    before = [_implementation(model) for model in models]
    for model in models:
        reason = _prepare(model, wanted, device)
        if reason is not None:
            for other, implementation in zip(models, before):
                _use(other, implementation)
            if wanted:
                raise InputError(f"padding_free=True does not work with {type(_base(model)).__name__}: {reason}; leave padding_free out")
            log.info("batches of %s are padded: %s", type(_base(model)).__name__, reason)
            return False
    log.info("batches are padding-free, by the attention %s", ", ".join(sorted({_implementation(model) for model in models})))
    return True


def _prepare(model, wanted: bool | None, device: torch.device | None) -> str | None:
    """Give the model an attention for flat batches; if there is none, the reason."""
    reason = across(model)
    if reason is not None:
        return reason
    own = _implementation(model)
    candidates = [VARLEN] if own == "sdpa" and _varlen_runs(model, device) else []
    if wanted or _needs_gpu(model):
        candidates.append(own)
    reason = f"its attention is {own!r}"
    for implementation in candidates:
        _use(model, implementation)
        reason = _chunked(model) or leak(model)
        if reason is None:
            return None
    return reason


def across(model) -> str | None:
    """Why a flat batch must be wrong for this model, from the kinds of its layers; None where it only has attention."""
    peft = getattr(model, "active_peft_config", None)
    if getattr(peft, "is_prompt_learning", False):
        return f"{type(peft).__name__} puts its prompt before the whole row, not before each of its sequences"
    found = [
        (convolves, name.count("."), type(module).__name__)
        for name, module in model.named_modules()
        if (convolves := any(isinstance(child, torch.nn.Conv1d) for child in module.children())) or _RECURRENT.search(type(module).__name__)
    ]
    kinds = sorted(set(getattr(_base(model).config.get_text_config(), "layer_types", None) or ()) - _ATTENTION_LAYERS)
    if not found and not kinds:
        return None
    layers = max(found)[-1] if found else kinds[0]  # the deepest name is the layer's, the others are the model's
    return f"its {layers} layers carry what they read across the end of a sequence to the next one"


@torch.no_grad()
def leak(model) -> str | None:
    """Why flat batches give other hidden states than separate sequences, from three forwards on 14 tokens; None where they do not.

    Weights that are not here yet (meta device, sharded, still waiting for their GPU) cannot be asked: None.
    """
    weight = next(model.parameters())
    waiting = _needs_gpu(model) and weight.device.type == "cpu" and torch.cuda.is_available()
    if weight.is_meta or not weight.numel() or waiting:
        return None
    last = [3, 4, 5, 6, 7]

    def hidden(ids: list[int], **inputs) -> Tensor:
        ids = torch.tensor([ids], device=weight.device) % _base(model).config.get_text_config().vocab_size
        inputs = {name: x.to(weight.device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        return model(input_ids=ids, **inputs, head=lambda hidden, head: hidden)[:, -len(last) :].float()

    try:
        with evaluating(model):
            flat, other = (hidden([*range(start, start + 9), *last], **flat_inputs([9, 5])) for start in (1, 20))
            alone = hidden(last)
    except Exception as error:  # of any kind: a keyword that the model does not know, a kernel that does not run here
        return f"its forward refuses a flat batch ({(str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.')})"
    exact = weight.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(weight.device.type)
    scale = alone.abs().max()
    if (flat - other).abs().max() > (1e-5 if exact else 1e-2) * scale:  # the same shapes twice: equal but for the order of experts
        return f"with the attention {_implementation(model)!r} its tokens see other sequences of the row"
    if (flat - alone).abs().max() > (1e-3 if exact else 1e-1) * scale:
        return f"with the attention {_implementation(model)!r} a sequence in a row gets other hidden states than alone"
    return None


def _base(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _implementation(model) -> str:
    return getattr(_base(model).config.get_text_config(), "_attn_implementation", None) or "eager"


def _use(model, implementation: str) -> None:
    if implementation != _implementation(model):
        _base(model).set_attn_implementation(implementation)


def _varlen_runs(model, device: torch.device | None) -> bool:
    """Whether torch's varlen kernel can take the place of this model's `sdpa`."""
    weight = next(model.parameters())
    device = weight.device if device is None else device
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0) or kernel() is None:
        return False
    sixteen = weight.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cuda")
    return sixteen and getattr(_base(model), "_supports_flash_attn", False)


def _needs_gpu(model) -> bool:
    return _implementation(model) == VARLEN or "flash" in _implementation(model)


def _chunked(model) -> str | None:
    if _needs_gpu(model) and "chunked_attention" in (getattr(_base(model).config.get_text_config(), "layer_types", None) or ()):
        return f"its chunked attention is nothing that {_implementation(model)!r} can do"
    return None
