"""One command's work: preference pairs and models in, a scored set with contrast, reference log-probs and hidden states (or the latter
two alone) out.

Processes share the work without talking to each other: each scores its share of the parts (`tisdpo.parts`), one of them joins them.
"""

import logging
import os
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from tisdpo.contrastive import system_prompts
from tisdpo.data import load_pairs, tokenize_pairs
from tisdpo.doctor import default_device
from tisdpo.errors import InputError
from tisdpo.files import disk_trouble, remove
from tisdpo.fingerprints import tokenizer_fingerprint
from tisdpo.hf import head_of, load_model, load_tokenizer
from tisdpo.parts import Scorer, Scoring
from tisdpo.prompts import PROMPTS
from tisdpo.provenance import PROVENANCE
from tisdpo.scored import load_scored, make_provenance, save_scored

log = logging.getLogger("tisdpo")

POLL = 0.5  # seconds between two looks for the parts of other ranks


def score(
    pairs,
    out: str | Path,
    *,
    positive: str | None = None,
    negative: str | None = None,
    prompts: tuple[str, str] | None = None,
    reference: str | None = None,
    dtype: torch.dtype = torch.float32,
    hidden_dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    max_length: int | None = 1024,
    batch_tokens: int = 8192,
    split: str = "train",
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
    trust_remote_code: bool = False,
) -> Path | None:
    """Score preference pairs into the scored set `out`; None where this process did only its share.

    pairs                what `load_pairs` reads
    positive, negative   directories or hub ids of pi+ and pi-; both None: no contrast, the reference alone (for DPO)
    prompts              system prompts of pi+ and pi- (construction P); None: they see the rows' prompts
    dtype                of the models' weights; log-probs are float32 either way. A policy that is to use the stored reference must have
                         the same: another dtype is another model
    reference            its log-probs are stored too; with hidden_dtype also its hidden states and its head (`tisdpo.cached`)
    tokenizer            default: that of `positive` (or of the reference), and the other models must have the same
    shard                (i, n): score every n-th part from the i-th on and stop; the same call without it joins all. None: of RANK and
                         WORLD_SIZE, where they are set (torchrun, accelerate): rank 0 waits for the parts of the others and joins them

    Killed at any moment, the same call goes on where it was. Work in progress lies beside `out`, in <out>.parts, and goes when it is done.
    Raises InputError where `out` holds another scored set, tokenizers differ, or the pairs or models cannot be used.
    """
    out = Path(out)
    parts = out.with_name(out.name + ".parts")
    if (positive is None) != (negative is None):
        raise InputError("the contrast needs two models: give --positive and --negative together, or neither for the reference alone")
    if positive is None and (reference is None or prompts is not None):
        needs = "a reference whose log-probs are to be stored (--reference)" if prompts is None else "the models that see these prompts"
        raise InputError(f"there is no --positive and --negative, so the command needs {needs}")
    if positive is not None and prompts is None and positive == negative:
        raise InputError(
            f"positive and negative are the same model ({positive}) under the same prompts, so the contrast would be 0 for every token; "
            "give two models, or the two system prompts of a task"
        )
    rank = (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    raw = load_pairs(pairs, split=split, limit=limit)
    names = list(dict.fromkeys(name for name in (positive, negative, reference) if name is not None))
    spoken = load_tokenizer(tokenizer or names[0], trust_remote_code=trust_remote_code)
    if tokenizer is None:
        _check_tokenizers(spoken, names[0], names, trust_remote_code)
    _check_writable(parts)
    models = {name: load_model(name, dtype=dtype, trust_remote_code=trust_remote_code) for name in names}
    models = {name: model.to(_device()).requires_grad_(False) for name, model in models.items()}
    vocab_size = min(len(head_of(model).weight) for model in models.values())
    rows, counts = tokenize_pairs(raw, spoken, max_length=max_length, vocab_size=vocab_size)
    if counts.dropped or counts.truncated or counts.moved:
        log.warning(counts.describe())
    scorers = [None if name is None else Scorer(models[name]) for name in (positive, negative)]
    how: dict = {"reference": reference} if positive is None else {"positive": positive, "negative": negative}
    if prompts is not None:
        how |= {"construction": "P", "positive_prompt": prompts[0], "negative_prompt": prompts[1]}
        for scorer, text in zip(scorers, prompts):
            scorer.prompts = system_prompts(raw, rows, spoken, text)
    provenance = make_provenance(
        spoken,
        max_length=max_length,
        positive=models.get(positive),
        negative=models.get(negative),
        how=how,
        reference=models.get(reference),
    )
    if hidden_dtype is not None:
        provenance["reference_hidden"] = str(hidden_dtype).removeprefix("torch.")
    if (out / PROVENANCE).exists():
        load_scored(out, dataset=rows, expect=provenance)  # what is there is this, or refused
        remove(parts)
        return out
    scoring = Scoring(
        rows, *scorers, pad_token_id=spoken.pad_token_id, parts=parts, batch_tokens=batch_tokens,
        reference=models.get(reference), hidden_dtype=hidden_dtype,
    )  # fmt: skip
    share = shard or rank
    with tqdm(total=scoring.tokens(share), desc=f"scoring {out.name}", unit="tok", unit_scale=True, disable=share[0] > 0) as bar:
        scoring.score(shard=share, progress=bar.update)
    if shard is not None or rank[0] > 0:
        return None
    _wait(scoring)
    save_scored(scoring.joined(), out, provenance, more=scoring.write_reference if hidden_dtype is not None else None)
    remove(parts)
    return out


def task_prompts(task: str | None, positive: str | None, negative: str | None) -> tuple[str, str] | None:
    """The system prompts of construction P: a task's, or given ones in their place; None where there are neither."""
    if task is None and (positive is None) != (negative is None):
        raise InputError("a system prompt needs its opposite: give --positive-prompt and --negative-prompt together, or --task")
    if "" in (positive, negative):
        raise InputError("--positive-prompt and --negative-prompt must not be empty; leave them out for the prompts of --task")
    if task is not None:
        of_task = PROMPTS[task]
        positive, negative = (given if given is not None else its for given, its in zip((positive, negative), of_task))
    if positive is not None and positive == negative:
        raise InputError("--positive-prompt and --negative-prompt are the same; their contrast would show nothing, change one")
    return None if positive is None else (positive, negative)


def _check_tokenizers(tokenizer, owner: str, names: list[str], trust_remote_code: bool) -> None:
    for name in names:
        if tokenizer_fingerprint(load_tokenizer(name, trust_remote_code=trust_remote_code)) != tokenizer_fingerprint(tokenizer):
            raise InputError(
                f"the tokenizers of {owner} and {name} differ, so their tokens could not be compared; give models of one tokenizer, or "
                "name with --tokenizer the one that all of them were trained with"
            )


def _check_writable(parts: Path) -> None:
    """Told before the models are loaded, not after the first hour."""
    try:
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = disk_trouble(error) or f"{str(error.strerror).lower()} ({error.filename}); give another directory"
        raise InputError(f"{parts} could not be written: {reason}") from error


def _device() -> torch.device:
    kind = default_device()
    return torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind != "cpu" and "LOCAL_RANK" in os.environ else torch.device(kind)


def _wait(scoring: Scoring) -> None:
    """Until the parts of all ranks are there; whoever started the ranks ends this one if another fails."""
    told = False
    while missing := scoring.missing():
        if not told:
            log.info("waiting for %d parts of the other ranks", len(missing))
            told = True
        time.sleep(POLL)
