"""Causal language models of `transformers`: their head, their hidden states, and how to load, build and fingerprint them.

The head runs inside the model's own forward: `model(input_ids=..., attention_mask=..., head=function)` runs the backbone and returns
`function(hidden [S, T, H], Head)` instead of logits. The hooks of a wrapper (DDP, FSDP, DeepSpeed, PEFT) are armed then, and one forward
serves scoring, SFT and preference training alike.
"""

import functools
import os
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tisdpo.attention import evaluating, flat_masks, register_varlen, runs_anywhere
from tisdpo.errors import InputError
from tisdpo.files import beside

INPUTS = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True)
class Head:
    """A language-model head: weight [V, H], bias [V] or None, and how the model scales its logits.

    aux_loss, aux_loss_coef   of a mixture of experts that was asked for it (`attach_head`): the load-balancing loss of this forward's
                              routers, a scalar with gradient, and what the model's configuration multiplies it with
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float = 1.0
    softcap: float | None = None
    aux_loss: Tensor | None = None
    aux_loss_coef: float = 0.0

    @property
    def transform(self) -> dict:
        """Keyword arguments of the functions in `tisdpo.functional`."""
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}


def logit_transform(config) -> dict:
    """How a model of this configuration turns the product of its head into logits: logit_scale and softcap.

    Gemma and others cap (`final_logit_softcapping`); Cohere multiplies by `logit_scale`, Falcon-H1 by `lm_head_multiplier`; Granite and
    MiniCPM3 divide by `logits_scaling`, HyperCLOVA X multiplies by it. `verify_head` compares with the model's own logits.
    """
    text = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text, name, None) is not None:
            scale = float(getattr(text, name))
            break
    else:
        scaling = getattr(text, "logits_scaling", None)
        if scaling is not None:
            scale = float(scaling) if text.model_type == "hyperclovax" else 1.0 / float(scaling)
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # the second: RecurrentGemma, the third: xLSTM
    softcap = next((x for x in (getattr(text, name, None) for name in names) if x is not None), None)
    return {"logit_scale": scale, "softcap": None if softcap is None else float(softcap)}


def head_of(model) -> Head:
    """The head of a causal language model; InputError for a model without one, or whose weight alone does not make the logits."""
    embedding = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if embedding is None or not isinstance(getattr(embedding, "weight", None), Tensor):
        raise InputError(f"{type(model).__name__} has no language-model head; load a causal language model (AutoModelForCausalLM)")
    name, kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__, type(embedding)
    if kind.__module__.startswith("peft.") and kind.__name__ != "ModulesToSaveWrapper":
        raise InputError(
            f"the head of {name} carries an adapter ({kind.__module__}.{kind.__name__}), which the loss would leave out, "
            "for it reads the head's weight; adapt other layers only, or train a whole copy of the head (modules_to_save=['lm_head'])"
        )
    if not embedding.weight.is_floating_point() or hasattr(embedding.weight, "quant_state"):
        raise InputError(
            f"the head of {name} is quantised ({kind.__name__}, {embedding.weight.dtype}), but the loss multiplies with "
            "its weight; leave it in 16 bits (BitsAndBytesConfig: llm_int8_skip_modules=['lm_head'])"
        )
    return Head(embedding.weight, getattr(embedding, "bias", None), **logit_transform(model.config))


def attach_head(model):
    """Let `model(..., head=function)` return function(hidden, Head); without `head` the forward is the model's own. Returns the model.

    Only this instance changes, and attaching twice changes nothing. Of a PEFT model it is the base that gets it: PEFT passes keywords on.
    With `output_router_logits` (keyword, or entry of the configuration) and with gradients on, Head.aux_loss is there.
    """
    if hasattr(model, "get_base_model"):
        attach_head(model.get_base_model())
        return model
    if getattr(model, "_tisdpo_head", False):
        return model
    head_of(model)  # a model without a head is refused here, not at the first step
    # kept on the model, not in a closure, so that a deep copy runs its own forward
    model._tisdpo_own_forward = vars(model).get("forward")

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(self, *args, head: Callable | None = None, **kwargs):
        own = self._tisdpo_own_forward or functools.partial(type(self).forward, self)
        if head is None:
            return own(*args, **kwargs)
        asked = kwargs.pop("output_router_logits", getattr(self.config.get_text_config(), "output_router_logits", False))
        aux_loss = None
        # backbone and head are looked up at each call: wrappers replace them after this
        with flat_masks("cu_seq_lens_q" in kwargs):
            if asked and torch.is_grad_enabled():
                hidden, aux_loss = _with_aux_loss(self, own, *args, **kwargs)
            else:
                hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state

        def run(hidden: Tensor):
            found = _whole(head_of(self))
            if aux_loss is not None:
                found = replace(found, aux_loss=aux_loss.to(found.weight.device), aux_loss_coef=_aux_loss_coef(self))
            return head(hidden.to(found.weight.device), found)

        return _within(self.get_output_embeddings(), run, hidden)

    model.forward = types.MethodType(forward, model)
    model._tisdpo_head = True
    return model


def _within(module, function: Callable, hidden: Tensor):
    """function(hidden), between the hooks of `module` where it has any: there FSDP2 and ZeRO-3 gather its weight, and its gradient."""
    if not (module._forward_pre_hooks or module._forward_hooks):
        return function(hidden)
    own = vars(module).get("forward")
    module.forward = function
    try:
        return module(hidden)
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _whole(head: Head) -> Head:
    """The head; InputError if it is still a shard between the hooks of its module."""
    if hasattr(head.weight, "placements"):
        raise InputError(
            f"the head is a shard ({', '.join(map(str, head.weight.placements))}) where it is needed whole: tensor-parallel heads are not "
            "supported; leave lm_head (and tied embeddings) out of the tensor-parallel plan"
        )
    return head


def _with_aux_loss(model, own: Callable, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """Last hidden states and the routers' loss. Every family has that loss in its own forward: run for one token's logits."""
    kept = []
    hook = model.base_model.register_forward_hook(lambda module, inputs, output: kept.append(output.last_hidden_state))
    try:
        output = own(*args, use_cache=False, output_router_logits=True, logits_to_keep=1, **kwargs)
    finally:
        hook.remove()
    if not isinstance(getattr(output, "aux_loss", None), Tensor):  # an older transformers gives some families the number 0
        import transformers

        raise InputError(
            f"{type(model).__name__} makes no auxiliary loss of its routers in transformers {transformers.__version__}; "
            "set output_router_logits=False in its configuration"
        )
    return kept[0], output.aux_loss


def _aux_loss_coef(model) -> float:
    """The factor of the auxiliary loss, under the names that transformers has for it."""
    text = model.config.get_text_config()
    found = (getattr(x, name, None) for x in (text, model) for name in ("router_aux_loss_coef", "aux_loss_coef"))
    return float(next((x for x in found if x is not None), 0.0))


def check_reference_head(transform: dict, reference: Head) -> None:
    """InputError where the reference's logits are scaled or capped differently: the loss makes both by the `transform` of the policy."""
    if reference.transform != transform:
        raise InputError(
            f"the reference scales or caps its logits differently ({reference.transform}, the policy {transform}), which the loss does not "
            "know; without a KL term give the rows its log-probs (`tisdpo score PAIRS OUT --reference MODEL`), with a KL term take a "
            "reference of the policy's family"
        )


@torch.no_grad()
def reference_inputs(model, batch: dict, flat, policy) -> dict:
    """ref_hidden [N, H], ref_weight and ref_bias of a reference for the loss of a `tisdpo.batches.FlatBatch` `flat` of `batch`.

    The reference is in evaluation mode, also where it is the policy with its adapters off. Of a sharded model (FSDP, DeepSpeed ZeRO-3) the
    head is whole inside its own forward only, so a copy of it is taken along.
    """
    sharded = is_sharded(model)

    def keep(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().clone() if sharded else x.detach()

    found = {}

    def take(hidden: Tensor, head: Head) -> None:  # wrappers of mixed precision would make float32 copies of what a forward returns
        check_reference_head(logit_transform(policy.config), head)
        found.update(ref_hidden=flat.take(hidden), ref_weight=keep(head.weight), ref_bias=keep(head.bias))

    with evaluating(model):
        model(**model_inputs(batch), head=take)
    return found


def is_sharded(model) -> bool:
    """Whether FSDP (1 or 2) or DeepSpeed ZeRO-3 frees weights of this model outside of its forward."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    wrapped = any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())
    return wrapped or any(hasattr(p, "ds_id") for p in model.parameters())


def disable_dropout(model) -> None:
    """Set every dropout to 0: the modules, and the probabilities that attention layers keep as numbers."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@torch.no_grad()
def verify_head(model) -> None:
    """Refuse a model (with attached head) whose logits are not made from its hidden states the way `head_of` says; a forward on 8 tokens.

    Without it a scale or a cap that a new family keeps under another name would train on wrong log-probs, silently. Weights that are not
    here yet (meta device, sharded at construction) are not checked.
    """
    head = head_of(model)
    if head.weight.is_meta or not head.weight.numel():
        return
    ids = torch.arange(8, device=head.weight.device)[None] % len(head.weight)
    with evaluating(model), runs_anywhere(model):
        own = model(input_ids=ids, use_cache=False).logits.float()
        raw = model(
            input_ids=ids, head=lambda hidden, head: torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
        ).float()
    found = raw * head.logit_scale
    if head.softcap is not None:
        found = head.softcap * torch.tanh(found / head.softcap)
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 0.03  # nats; 16-bit logits are rounded, several times where they are scaled
    if own.shape != found.shape or (own.log_softmax(-1) - found.log_softmax(-1)).abs().max() > tolerance * max(1.0, own.abs().max().item()):
        raise InputError(
            f"{type(model).__name__} makes its logits in a way that is not known here (read from its configuration: logit scale "
            f"{head.logit_scale}, soft cap {head.softcap}); use tisdpo.token_logps on the model's own logits instead"
        )


def model_inputs(batch: dict) -> dict:
    """What the backbone needs of a batch, padded or padding-free; InputError for a batch with images, which would go unseen."""
    refuse_images(batch)
    return {name: batch[name] for name in INPUTS if name in batch}


def refuse_images(columns) -> None:
    """InputError where one of these names is that of images or videos."""
    seen = sorted(
        name for name in columns if name in ("image", "video") or name.startswith(("images", "videos", "pixel_values", "image_", "video_"))
    )
    if seen:
        raise InputError(
            f"vision-language pairs are not supported, they carry {', '.join(seen)}: the model would be trained without seeing the "
            "pictures; remove them, or use trl.DPOTrainer"
        )


def load_tokenizer(path: str, *, trust_remote_code: bool = False):
    """Tokenizer of a directory or hub id; InputError with the reason if there is none, or if it has no EOS token.

    trust_remote_code   run Python code that comes with it; off: a tokenizer that needs it is refused
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"no tokenizer could be loaded from {path!r} ({_first_line(error)}); give a directory with tokenizer files or a hub id"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer of {path!r} has no EOS token, so completions could not end; set `eos_token` in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked everywhere, its id is never read
    return tokenizer


def load_model(path: str, *, trust_remote_code: bool = False, **kwargs):
    """Causal language model of a directory or hub id, in float32 unless `dtype` says otherwise, with its head attached.

    Only safetensors are read: pickles (pytorch_model.bin) can run any code and are refused.
    trust_remote_code   run Python code that comes with the model; off: a model that needs it is refused
    """
    from transformers import AutoModelForCausalLM

    register_varlen()  # attn_implementation="tisdpo_varlen" is among the kwargs that may come
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        remedy = "give a directory written by save_pretrained or a hub id"
        if (Path(path) / "adapter_config.json").exists():
            remedy = "these are adapters of PEFT: merge them first (PeftModel.merge_and_unload, save_pretrained) and give that directory"
        raise InputError(f"{path!r} holds no model: config.json is missing; {remedy}")
    pickles = sorted(file.name for file in Path(path).glob("*.bin")) if Path(path).is_dir() else []
    if pickles and not any(Path(path).glob("*.safetensors")):
        raise InputError(
            f"{path!r} holds its weights as {pickles[0]}, a pickle, which can run any code when it is read; convert it to safetensors "
            "where you trust it (load it with transformers there and call save_pretrained)"
        )
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **{"dtype": torch.float32, **kwargs},
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"no causal language model could be loaded from {path!r} ({_first_line(error)}); give a directory or a hub id"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"the model in {path!r} lacks weights of a causal language model ({', '.join(missing[:3])}); was it saved without its head?"
        )
    attach_head(model)
    verify_head(model)
    return model


def _first_line(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it brings Python code of its own, which runs with trust_remote_code=True only, where you trust it"
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def save_model(model, tokenizer, path: str | Path) -> None:
    """Model and tokenizer as one directory; it appears complete or not at all."""
    with beside(path, directory=True) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def train_bpe(texts, vocab_size: int):
    """A byte-level BPE tokenizer trained on an iterable of texts, with <s>, </s> and <pad>: for a base model trained from scratch."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def tiny_llama(tokenizer, *, hidden_size: int = 64, layers: int = 2, heads: int = 4, max_length: int = 512, seed: int = 0):
    """A Llama-architecture model with fresh weights for this tokenizer: the start of a base model trained from scratch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if hidden_size % heads:
        raise InputError(f"model.hidden_size={hidden_size} must be a multiple of model.heads={heads}")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return attach_head(LlamaForCausalLM(config))


def quiet_libraries() -> None:
    """Messages of the libraries below are errors only, and they show no progress bars."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning at every fork
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
