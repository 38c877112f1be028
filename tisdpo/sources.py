"""Where the pairs of a run come from: a world with known truth or preference text, with the tokenizer, the base corpus and the truth."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import datasets

from tisdpo.config import WORLDS, DataConfig, RunConfig
from tisdpo.data import holdout, load_pairs, tokenize_pairs
from tisdpo.errors import InputError
from tisdpo.hf import load_tokenizer, train_bpe
from tisdpo.rendering import conversation
from tisdpo.settings import build
from tisdpo.world import KnownTruth

DEFAULT_PAIRS = 2000  # of a known-truth world, when data.limit is not set


@dataclass
class Source:
    """Everything about the data of one seed.

    train, heldout   tokenised rows; pairs: the training pairs as text, found by the rows' `index`
    documents        makes the rows (prompt_ids, chosen_ids) a base model is pretrained on; None when there is a base model
    prompts          token ids of held-out prompts for generation, as many as the evaluation asks for where there are enough
    conversations    messages of each of these prompts, or None where they are text
    reward           true reward of an `evaluate.Generation`, or None where nobody knows it
    right            whether an `evaluate.Generation` is a right answer, or None where there is no such thing
    tones            the positive and the negative system prompt that the base corpus knows, or None
    dropped          how many pairs were left out, by reason
    """

    kind: str
    tokenizer: Any
    train: datasets.Dataset
    heldout: datasets.Dataset
    pairs: Any
    documents: Callable[[], datasets.Dataset] | None
    prompts: list[list[int]]
    conversations: list[list[dict]] | None = None
    reward: Callable | None = None
    right: Callable | None = None
    tones: tuple[str, str] | None = None
    dropped: dict[str, int] = field(default_factory=dict)


def load_source(config: RunConfig, seed: int, data: DataConfig | None = None) -> Source:
    """The source of one seed, of other `data` than the run's where they are given. A known-truth world is drawn anew for every seed; text
    is split the same way for all of them."""
    data = data or config.data
    return _world(config, data, seed) if data.source in WORLDS else _text(config, data)


def _world(config: RunConfig, data: DataConfig, seed: int) -> Source:
    kind, settings = WORLDS[data.source]
    world = kind(build(settings, {**data.world, "seed": seed}, place="data.world"))
    tokenizer = world.tokenizer()
    count = data.limit or DEFAULT_PAIRS
    sets = {"train": world.pairs(count), "heldout": world.pairs(_heldout_count(data.heldout, count), "heldout")}
    rows, dropped = {}, {}
    for split, pairs in sets.items():
        rows[split], counts = tokenize_pairs(pairs, tokenizer, max_length=data.max_length)
        for side in ("chosen", "rejected"):
            truth = [world.token_rewards(ids, prompt) for ids, prompt in zip(rows[split][f"{side}_ids"], rows[split]["prompt_ids"])]
            rows[split] = rows[split].add_column(f"{side}_truth", truth)
        dropped = counts if split == "train" else dropped
    questions = world.prompts()
    prompts = [tokenizer(questions[i % len(questions)])["input_ids"] for i in range(config.evaluation.prompts)]
    pretrain = config.model.pretrain
    return Source(
        kind=data.source,
        tokenizer=tokenizer,
        train=rows["train"],
        heldout=rows["heldout"],
        pairs=sets["train"],
        documents=lambda: _world_documents(world, tokenizer, pretrain.steps * pretrain.batch_size),
        prompts=prompts,
        reward=lambda generation: sum(world.token_rewards(generation.ids, generation.prompt_ids)),
        right=(lambda generation: world.is_right(generation.ids, generation.prompt_ids)) if world.verifiable else None,
        tones=world.tones,
        dropped=_dropped(dropped),
    )


def _world_documents(world: KnownTruth, tokenizer, count: int) -> datasets.Dataset:
    """Every document once: the base model sees no text twice."""
    documents = world.documents(count)
    prompts = tokenizer([f"{d['system']} {d['prompt']}".strip() for d in documents])["input_ids"]
    completions = tokenizer([d["completion"] for d in documents], add_special_tokens=False)["input_ids"]
    return datasets.Dataset.from_dict({"prompt_ids": prompts, "chosen_ids": [[*c, tokenizer.eos_token_id] for c in completions]})


def _text(config: RunConfig, data: DataConfig) -> Source:
    model = config.model
    pairs = load_pairs(data.source, split=data.split, streaming=data.streaming, limit=data.limit)
    pairs = list(pairs) if data.streaming else pairs
    if model.tokenizer or model.path:
        tokenizer = load_tokenizer(model.tokenizer or model.path)
    else:
        tokenizer = train_bpe((text for pair in pairs for text in _texts(pair)), model.vocab_size)
    rows, counts = tokenize_pairs(pairs, tokenizer, max_length=data.max_length)
    if len(rows) < 2:
        raise InputError(
            f"{data.source} leaves {len(rows)} usable pairs ({_dropped(counts) or 'none dropped'}); "
            "at least two are needed, one of them held out"
        )
    train, heldout = holdout(rows, data.heldout, seed=0)
    documents = (lambda: _both_sides(train)) if model.path is None else None
    prompts = list(islice(dict.fromkeys(map(tuple, heldout["prompt_ids"])), config.evaluation.prompts))
    talks = isinstance(pairs[0].get("chosen"), list) and "chosen_ids" not in pairs[0]  # ready ids have an index of their own
    asked = {tuple(ids): index for ids, index in reversed(list(zip(heldout["prompt_ids"], heldout["index"])))}  # the first pair of each
    return Source(
        kind="text",
        tokenizer=tokenizer,
        train=train,
        heldout=heldout,
        pairs=pairs,
        documents=documents,
        prompts=[list(p) for p in prompts],
        conversations=[conversation(asked[p], pairs[asked[p]])[0] for p in prompts] if talks else None,
        dropped=_dropped(counts),
    )


def _both_sides(rows) -> datasets.Dataset:
    """Chosen and rejected responses alike, as the text a base model learns."""
    texts = [(p, c) for side in ("chosen", "rejected") for p, c in zip(rows["prompt_ids"], rows[f"{side}_ids"])]
    return datasets.Dataset.from_dict({"prompt_ids": [p for p, _ in texts], "chosen_ids": [c for _, c in texts]})


def _texts(pair: dict) -> list[str]:
    """All text of a pair, for training a tokenizer; messages by their content."""
    values = [pair[name] for name in ("prompt", "chosen", "rejected") if name in pair]
    return [text for value in values for text in ([value] if isinstance(value, str) else [m["content"] for m in value])]


def _heldout_count(heldout: int | float, pairs: int) -> int:
    return heldout if isinstance(heldout, int) else max(1, round(heldout * pairs))


def _dropped(counts) -> dict[str, int]:
    return {reason: n for reason, n in counts.dropped.items() if n}
