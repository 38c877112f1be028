"""What a trained policy is worth: held-out preferences, its own responses, its distance from the reference, the truth where it is known.

Nothing here touches the global random state, keeps a gradient or makes [N, V] logits of whole batches; models come back in the mode
(training or evaluation) they had. Sizes: P pairs, N completion tokens of a batch, H hidden, V vocabulary. Log-probs and KL in nats.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import Tensor

from tisdpo.attention import evaluating
from tisdpo.batches import flatten_batch
from tisdpo.errors import InputError
from tisdpo.functional import linear_token_logps
from tisdpo.hf import Head, attach_head, model_inputs
from tisdpo.scoring import Ids, completion_logps, pad_batch, plan_batches
from tisdpo.weighting import average_ranks


@dataclass(frozen=True)
class Generation:
    """A response of a model: the prompt and the response as text and as ids (with the EOS if it came); `finished` if it did; the prompt's
    `messages` where it is a conversation."""

    prompt: str
    prompt_ids: list[int]
    ids: list[int]
    text: str
    finished: bool
    messages: list[dict] | None = None


Reward = Callable[[Generation], float]


# Held-out preferences


def preference_metrics(model, ref_model, rows, *, pad_token_id: int, beta: float = 0.1, batch_tokens: int = 16384) -> dict[str, float]:
    """How the policy ranks held-out pairs by its implicit reward beta * (log pi - log pi_ref), summed over the completion::

        accuracy            share of pairs whose chosen completion has the larger reward, ties count one half; 0..1
        margin              mean reward of chosen minus rejected, beta * nats
        longer_wins         accuracy of the rule "the longer completion wins", ties one half ("the shorter wins": one minus it)
        accuracy_by_length  the better of these two rules: what is had without any model
        length_chosen, length_rejected   mean completion length in tokens, EOS included
        n                   pairs

    With ref_model=None the reference's log-probs are those that the rows carry (chosen_ref_logps, rejected_ref_logps), so that many
    checkpoints are compared at the cost of one model each.
    Raises InputError without rows, and without a reference.
    """
    if len(rows) == 0:
        raise InputError("there are no held-out pairs to evaluate; give a held-out file, or a held-out share that leaves at least one pair")
    options = {"pad_token_id": pad_token_id, "batch_tokens": batch_tokens}
    ratios = _policy_sums(model, rows, options) - (_stored_sums(rows) if ref_model is None else _policy_sums(ref_model, rows, options))
    lengths = torch.tensor([[len(c), len(r)] for c, r in zip(rows["chosen_ids"], rows["rejected_ids"])], dtype=torch.float64)
    longer_wins = _share_won(lengths)
    return {
        "accuracy": _share_won(ratios),
        "margin": beta * (ratios[:, 0] - ratios[:, 1]).mean().item(),
        "longer_wins": longer_wins,
        "accuracy_by_length": max(longer_wins, 1 - longer_wins),
        "length_chosen": lengths[:, 0].mean().item(),
        "length_rejected": lengths[:, 1].mean().item(),
        "n": len(rows),
    }


def _policy_sums(model, rows, options: dict) -> Tensor:
    """Summed log-probs [P, 2] (float64) of the chosen and the rejected completion of every row."""
    prompts = list(rows["prompt_ids"])
    return _sums(*(completion_logps(model, prompts, list(rows[side]), **options) for side in ("chosen_ids", "rejected_ids")))


def _stored_sums(rows) -> Tensor:
    """The same from the reference log-probs that the rows carry."""
    if not {"chosen_ref_logps", "rejected_ref_logps"} <= set(rows.column_names):
        raise InputError("the held-out rows carry no chosen_ref_logps and rejected_ref_logps; compute them once, or give ref_model")
    return _sums(rows["chosen_ref_logps"], rows["rejected_ref_logps"])


def _sums(chosen, rejected) -> Tensor:
    return torch.tensor(
        [[math.fsum(torch.as_tensor(side).tolist()) for side in pair] for pair in zip(chosen, rejected)], dtype=torch.float64
    )


def _share_won(scores: Tensor) -> float:
    """Share of the rows of scores [P, 2] whose first entry is the larger; a tie counts one half."""
    return 0.5 + 0.5 * (scores[:, 0] - scores[:, 1]).sign().mean().item()


# Responses


def generate(
    model,
    tokenizer,
    prompts: Sequence[str | Ids],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> list[Generation]:
    """A response of the model to every prompt (text, or ready ids), in their order.

    Samples the model's own distribution at this temperature (0: the most likely token), whatever the model's generation_config says:
    no top-k, no penalties. Ends at the tokenizer's EOS or after max_new_tokens. Every prompt draws from its own random stream, made of
    `seed` and its number: a sample does not depend on `batch_size` (up to rounding), and the global random state is neither read nor
    changed. `progress` is called with the number of responses of every finished batch.

    Raises InputError for an empty prompt, one that leaves no room in the model's context, and a tokenizer without EOS.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token, so responses could not end; set `eos_token` in its tokenizer_config.json")
    if max_new_tokens < 1 or batch_size < 1 or not 0 <= temperature < math.inf:
        raise InputError(
            "max_new_tokens and batch_size must be at least 1 and temperature finite and at least 0, "
            f"got {max_new_tokens}, {batch_size} and {temperature}"
        )
    prompt_ids = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    _check_room(model, prompt_ids, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompt_ids[i]), i))  # prompts of similar length together: little padding
    found: list[Generation | None] = [None] * len(prompts)
    with evaluating(model), _plain_generation(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            responses = _generate_batch(model, tokenizer, [prompt_ids[i] for i in batch], max_new_tokens, temperature, seed, batch)
            for i, ids in zip(batch, responses):
                prompt = prompts[i] if isinstance(prompts[i], str) else tokenizer.decode(prompt_ids[i], skip_special_tokens=True)
                text = tokenizer.decode(ids, skip_special_tokens=True)
                found[i] = Generation(prompt, prompt_ids[i], ids, text, ids[-1] == tokenizer.eos_token_id)
            if progress is not None:
                progress(len(batch))
    return found


def _generate_batch(
    model, tokenizer, prompts: list[Ids], max_new_tokens: int, temperature: float, seed: int, numbers: list[int]
) -> list[list[int]]:
    """Response ids of one batch, each up to and including its EOS; `numbers` are the prompts' numbers, for their random streams."""
    from transformers import GenerationConfig, LogitsProcessorList

    device, eos = next(model.parameters()).device, tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    processors = LogitsProcessorList([_gumbel_noise(temperature, seed, numbers, device)] if temperature > 0 else [])
    # the most likely token after Gumbel noise is a sample
    config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=pad)
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=attention, generation_config=config, logits_processor=processors)
    responses = [row[width:] for row in out.tolist()]
    return [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in responses]


def _gumbel_noise(temperature: float, seed: int, numbers: list[int], device):
    """A logits processor: argmax(logits / temperature + Gumbel noise) is a draw from the softmax; one random stream per row."""
    streams = [torch.Generator(device).manual_seed(_stream_seed(seed, number)) for number in numbers]

    def perturb(input_ids: Tensor, logits: Tensor) -> Tensor:  # [rows, V]
        noise = torch.stack([torch.empty_like(row, dtype=torch.float32).exponential_(generator=g) for row, g in zip(logits, streams)])
        return logits.float() / temperature - noise.clamp_min(torch.finfo(torch.float32).tiny).log()

    return perturb


def _stream_seed(seed: int, number: int) -> int:
    """Unrelated for every (seed, number), unlike their sum."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:7], "big")


def _prompt_ids(tokenizer, prompt: str | Ids) -> list[int]:
    """Ids of a prompt; an EOS that the tokenizer puts at the end of every text is taken off."""
    if not isinstance(prompt, str):
        return [int(i) for i in prompt]
    ids = list(tokenizer(prompt)["input_ids"])
    while ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids.pop()
    return ids


def _check_room(model, prompts: list[list[int]], max_new_tokens: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for n, ids in enumerate(prompts):
        if not ids:
            raise InputError(f"prompt {n} has no tokens; remove it, or start it with a BOS token")
        if context is not None and len(ids) + max_new_tokens > context:
            raise InputError(
                f"prompt {n} has {len(ids)} tokens, which with max_new_tokens={max_new_tokens} exceeds the model's {context} positions; "
                "shorten the prompt or lower max_new_tokens"
            )


@contextmanager
def _plain_generation(model):
    """Without the model's own generation settings, which `generate` would fill in where ours are silent (penalties, suppressed tokens)."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def response_metrics(
    generations: Sequence[Generation], reward: Reward | None = None, right: Callable[[Generation], bool] | None = None
) -> dict[str, float | None]:
    """Of generated responses::

        length             mean length in tokens, EOS included
        finished           share that ended with EOS before max_new_tokens
        reward, reward_se  mean of reward(generation) and its standard error (None for a single response); only if `reward` is given
        right              share of responses for which right(generation) holds; only if `right` is given

    Raises InputError for no responses and for a reward that is not finite.
    """
    _check_some(generations)
    metrics: dict[str, float | None] = {
        "length": sum(len(g.ids) for g in generations) / len(generations),
        "finished": sum(g.finished for g in generations) / len(generations),
    }
    if reward is not None:
        rewards = [float(reward(g)) for g in generations]
        for n, value in enumerate(rewards):
            if not math.isfinite(value):
                raise InputError(f"the reward of response {n} ({generations[n].text[:60]!r}) is {value}; the reward model cannot be used")
        metrics["reward"], metrics["reward_se"] = _mean_and_error(rewards)
    if right is not None:
        metrics["right"] = sum(map(right, generations)) / len(generations)
    return metrics


def _check_some(generations: Sequence[Generation]) -> None:
    if not generations:
        raise InputError("there are no responses to evaluate; give at least one prompt")


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None for a single value."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else None


# Distance from the reference


def kl_to_reference(
    model, ref_model, generations: Sequence[Generation], *, pad_token_id: int, batch_tokens: int = 16384
) -> dict[str, float | None]:
    """KL(pi || pi_ref) of responses, estimated on the policy's own samples (from `generate` with temperature 1)::

        kl            mean over responses of sum_t KL(pi(. | x, y_<t) || pi_ref(. | x, y_<t)), nats per response
        kl_se         its standard error (None for a single response)
        kl_per_token  the same sum divided by all response tokens, nats

    The KL of the next token is exact at every position (Rao-Blackwellised), so only the choice of y_<t is random: unbiased, never
    negative, and far less noisy than log pi(y) - log pi_ref(y). The reference may have another hidden size, but not another vocabulary
    or logit scale: InputError.
    """
    _check_some(generations)
    sums = [0.0] * len(generations)
    lengths = [len(g.prompt_ids) + len(g.ids) for g in generations]
    with evaluating(model, ref_model):
        for batch in plan_batches(lengths, batch_tokens):
            prompts, responses = ([getattr(generations[i], name) for i in batch] for name in ("prompt_ids", "ids"))
            padded = pad_batch(prompts, responses, pad_token_id, next(model.parameters()).device)
            for i, value in zip(batch, _batch_kl(model, ref_model, padded)):
                sums[i] = value
    kl, kl_se = _mean_and_error(sums)
    return {"kl": kl, "kl_se": kl_se, "kl_per_token": math.fsum(sums) / sum(len(g.ids) for g in generations)}


@torch.no_grad()
def _batch_kl(model, ref_model, batch: dict[str, Tensor]) -> list[float]:
    """Sum over completion tokens of KL(pi || pi_ref), for every row of a padded batch."""
    flat = flatten_batch(batch)
    ref_hidden, reference = attach_head(ref_model)(**model_inputs(batch), head=lambda hidden, head: (flat.take(hidden), head))

    def token_kl(hidden: Tensor, head: Head) -> Tensor:
        _check_comparable(head, reference)
        return linear_token_logps(
            flat.take(hidden), head.weight, flat.target, bias=head.bias, ref_hidden=ref_hidden, ref_weight=reference.weight.detach(),
            ref_bias=None if reference.bias is None else reference.bias.detach(), kl="reverse", ignore_index=None, **head.transform,
        ).kl  # fmt: skip

    kl = attach_head(model)(**model_inputs(batch), head=token_kl).double().cpu()
    return [x.sum().item() for x in kl.split(flat.cu_seqlens.diff().tolist())]


def _check_comparable(head: Head, reference: Head) -> None:
    if len(head.weight) != len(reference.weight):
        raise InputError(
            f"policy and reference have vocabularies of {len(head.weight)} and {len(reference.weight)} tokens; "
            "give the model that the policy was trained from as the reference"
        )
    if head.transform != reference.transform:
        raise InputError(
            f"policy and reference scale their logits differently ({head.transform} and {reference.transform}); "
            "give the model that the policy was trained from as the reference"
        )


# Known truth


def truth_agreement(contrast: Tensor, truth: Tensor) -> dict[str, float | None]:
    """How well the raw contrast [N] of completion tokens finds their known rewards, truth [N]::

        auc       chance that a token with a reward (truth != 0) has a larger |contrast| than one without, ties one half; 0.5 is blind
        spearman  rank correlation of contrast and truth, with their signs; -1..1

    None where it is not defined: no token, or every token, carries a reward; one of the two is constant.
    Raises ValueError for different shapes and values that are not finite.
    """
    contrast, truth = (torch.as_tensor(x, dtype=torch.float64).flatten() for x in (contrast, truth))
    if contrast.shape != truth.shape:
        raise ValueError(f"contrast and truth must have one value per token each, got {len(contrast)} and {len(truth)}")
    if not (contrast.isfinite().all() and truth.isfinite().all()):
        raise ValueError("contrast and truth must be finite")
    return {"auc": _auc(contrast.abs(), truth != 0), "spearman": _correlation(average_ranks(contrast), average_ranks(truth))}


def _auc(scores: Tensor, positive: Tensor) -> float | None:
    """Mann-Whitney: the rank sum of the positives [N] (bool) counts the negatives below each of them, and the positives below them."""
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return None
    ranks = average_ranks(scores)[positive].sum().item()
    return (ranks - positives * (positives - 1) / 2) / (positives * negatives)


def _correlation(x: Tensor, y: Tensor) -> float | None:
    """Pearson's; None if one is constant."""
    if not len(x):
        return None
    x, y = x - x.mean(), y - y.mean()
    scale = x.norm() * y.norm()
    return (x @ y / scale).clamp(-1, 1).item() if scale > 0 else None


# Reward models


def load_reward_model(path: str, *, device: str | torch.device | None = None) -> Reward:
    """A reward function from any sequence-classification model (directory or hub id, with its tokenizer).

    The reward is its logit, or for two labels logit 1 minus logit 0: the log-odds of the second label. It reads prompt and response
    through its chat template if it has one; as a pair of texts if its tokenizer has a separator (encoders); else one after the other
    with its EOS at the end (decoders, the way they are trained). One response at a time.

    Raises InputError for what cannot be loaded, lacks the trained reward head or has more labels, and for a response beyond its context.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, use_safetensors=True, trust_remote_code=False
        )
    except _LOADING_ERRORS as error:
        raise InputError(
            f"no reward model could be loaded from {path!r} ({_reason(error)}); give a sequence-classification model, directory or hub id"
        ) from error
    if info["missing_keys"]:
        raise InputError(
            f"{path!r} holds no trained reward model: {', '.join(sorted(info['missing_keys'])[:3])} is missing from its weights; "
            "give a model that was saved as a sequence classifier"
        )
    if model.config.num_labels not in (1, 2):
        raise InputError(f"the classifier in {path!r} has {model.config.num_labels} labels, a reward model has 1 or 2; give another one")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except _LOADING_ERRORS as error:
        raise InputError(
            f"no tokenizer could be loaded from the reward model {path!r} ({_reason(error)}); save its tokenizer in that directory"
        ) from error
    model = model.to(device).eval().requires_grad_(False)
    limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
    context = min(limit for limit in limits if limit is not None)

    @torch.no_grad()
    def reward(generation: Generation) -> float:
        inputs = _reward_inputs(tokenizer, generation)
        length = inputs["input_ids"].shape[1]
        if length > context:
            raise InputError(
                f"a response with its prompt has {length} tokens for the reward model {path!r}, which reads at most {context}; "
                "lower max_new_tokens or use a reward model with a longer context"
            )
        logits = model(**{name: x.to(model.device) for name, x in inputs.items()}).logits[0].double()
        return (logits[-1] - logits[:-1].sum()).item()  # one label: nothing to take off

    return reward


_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


def _reason(error: Exception) -> str:
    return next((line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _reward_inputs(tokenizer, generation: Generation) -> dict[str, Tensor]:
    """Prompt and response as the reward model reads them, [1, T] each."""
    if tokenizer.chat_template is not None:
        before = generation.messages or [{"role": "user", "content": generation.prompt}]
        messages = [{key: value for key, value in m.items() if value is not None} for m in before]  # Arrow fills up with None
        messages.append({"role": "assistant", "content": generation.text})
        return dict(tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True))
    if tokenizer.sep_token_id is not None:
        return dict(tokenizer(generation.prompt, generation.text, return_tensors="pt"))
    ids = list(tokenizer(generation.prompt + generation.text)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
