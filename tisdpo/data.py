"""Preference pairs to token ids to batches: `load_pairs` -> `tokenize_pairs` -> `holdout` -> `PairCollator`.

A tokenised row has, for one pair:

    index                                  its number in the source, counted from 0
    prompt_ids, chosen_ids, rejected_ids   int lists; the completions end with one EOS unless they were truncated
    and optionally, for both completions, one float for each of their tokens (`*` is chosen or rejected):
    *_contrast   raw r_t = log pi+ - log pi-, nats        *_weights    ready token weights
    *_ref_logps  log-probs of the reference, nats         *_truth      the known reward of the token

Sizes: B pairs of a batch, T padded length.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from tisdpo.attention import flat_inputs
from tisdpo.cached import ReferenceCache
from tisdpo.errors import InputError
from tisdpo.readers import ID_COLUMNS, load_pairs
from tisdpo.rendering import EMPTY, IDENTICAL, IDENTICAL_CUT, NO_PROMPT, TOO_LONG, Rendered, Renderer, as_list

__all__ = [
    "TOKEN_COLUMNS",
    "Counts",
    "PairCollator",
    "holdout",
    "ids_fingerprint",
    "load_pairs",
    "token_sums",
    "tokenize_pairs",
]

SIDES = ("chosen", "rejected")
TOKEN_COLUMNS = ("contrast", "weights", "ref_logps", "truth")  # each as chosen_* and rejected_*, one value for every completion token
CHUNK = 512  # pairs tokenised by one call of the tokenizer


@dataclass
class Counts:
    """What became of the pairs: how many were read, kept, truncated, dropped (by reason).

    moved: pairs whose prompt ends differently alone than with a completion, because tokens merge across the boundary or the chat
    template renders it differently; their completion starts where the two part.
    """

    read: int = 0
    kept: int = 0
    truncated: int = 0
    moved: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def describe(self) -> str:
        """One line, e.g. "5 pairs: 3 kept (1 truncated), 2 dropped (2 empty response)"."""
        notes = [f"{n} {what}" for n, what in ((self.truncated, "truncated"), (self.moved, "with a token across the prompt's end")) if n]
        dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(self.dropped.items(), key=lambda item: -item[1]))
        return (
            f"{self.read} pairs: {self.kept} kept"
            + (f" ({', '.join(notes)})" if notes else "")
            + (f", {sum(self.dropped.values())} dropped ({dropped})" if dropped else "")
        )


def tokenize_pairs(
    pairs: Iterable[dict], tokenizer, *, max_length: int | None = 1024, system_prompt: str | None = None, vocab_size: int | None = None
) -> tuple[Dataset, Counts]:
    """Tokenised rows of preference pairs, and what became of the pairs.

    pairs           any iterable of dicts (a Dataset, also a streamed one, or a list), each of one of these forms
                      {"prompt", "chosen", "rejected"} as text                          tokenised as it is
                      {"prompt", "chosen", "rejected"} as lists of {"role", "content"}   through the tokenizer's chat template
                      {"chosen", "rejected"} as text or messages                         what both begin with is the prompt
                      {"prompt_ids", "chosen_ids", "rejected_ids"}                       ids, taken as they are; an `index` is kept
                    and each form may carry the columns of this module with a value for every completion token, EOS included
    max_length      tokens of prompt + completion; what is longer is cut at the end, with all its values. None: no limit
    system_prompt   a system message in front of every conversation, or text in front of every text prompt
    vocab_size      ids must be smaller; default: the tokenizer's

    Prompt and completion are tokenised together, and the completion starts where prompt and prompt + completion part (the shorter
    common prefix of the two sides, as in TRL 1.16). BOS stands once; an untruncated completion ends with exactly one EOS, whatever the
    text, the tokenizer or the chat template put there.

    Pairs that cannot teach anything are dropped and counted: a response that is empty or only EOS, identical responses (also after
    truncation), a prompt that fills max_length, a prompt without any token. A pair of the wrong form, an id outside of the vocabulary,
    a value that is NaN or infinite, a negative weight raise InputError with the pair's number.

    >>> rows, counts = tokenize_pairs([{"prompt": "2+2=", "chosen": "4", "rejected": "5"}], tokenizer)
    >>> tokenizer.decode(rows[0]["chosen_ids"])
    '4</s>'
    """
    if max_length is not None and max_length < 2:
        raise InputError(f"max_length must be at least 2 (a prompt token and a completion token), got {max_length}")
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token, so completions could not end; set its eos_token")
    limit = vocab_size or max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)
    renderer = Renderer(tokenizer, system_prompt)
    counts, tables, schema = Counts(), [], None
    size = len(pairs) if hasattr(pairs, "__len__") else None
    with tqdm(total=size, desc="tokenising", unit="pair", delay=3, leave=False) as bar:
        for chunk in _chunks(pairs):
            counts.read += len(chunk)
            rows = [
                row for rendered in _with_ids(chunk, renderer, counts) if (row := _finish(rendered, tokenizer, max_length, limit, counts))
            ]
            schema = schema or (_schema(rows[0]) if rows else None)
            if rows:
                tables.append(_table(rows, schema))
            bar.update(len(chunk))
    counts.kept = sum(len(table) for table in tables)
    if not tables:
        raise InputError(f"no pair can be used ({counts.describe()}); check the data, the tokenizer and max_length={max_length}")
    return Dataset(pa.concat_tables(tables)), counts


def _chunks(pairs: Iterable[dict]) -> Iterator[list[tuple[int, dict]]]:
    numbered = enumerate(pairs)
    while chunk := list(islice(numbered, CHUNK)):
        yield chunk


def _with_ids(chunk: list[tuple[int, dict]], renderer: Renderer, counts: Counts) -> list[Rendered]:
    """The pairs of a chunk with their ids; without those that were dropped."""
    found = []
    for index, row in chunk:
        rendered = renderer(index, row)
        if rendered.drop is not None:
            counts.drop(rendered.drop)
        else:
            found.append(rendered)
    for special in (True, False):  # text gets BOS and the like, a rendered chat template has them
        texts = [text for r in found if r.ids is None and r.add_special_tokens is special for text in r.texts]
        ids = iter(renderer.encode(texts, special))
        for r in found:
            if r.ids is None and r.add_special_tokens is special:
                r.ids, r.moved = renderer.split(next(ids), next(ids), next(ids))
    return found


def _finish(pair: Rendered, tokenizer, max_length: int | None, vocab_size: int, counts: Counts) -> dict | None:
    """The tokenised row of a pair, checked and truncated; None if it is dropped."""
    prompt, *completions = pair.ids
    for name, ids in zip(ID_COLUMNS, pair.ids):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            bad = next(i for i in ids if not 0 <= i < vocab_size)
            raise InputError(
                f"pair {pair.index}: {name} holds {bad}, outside of the vocabulary of {vocab_size}; were they made with another tokenizer?"
            )
    values = {name: _token_values(pair, name, completions) for name in TOKEN_COLUMNS if any(f"{side}_{name}" in pair.row for side in SIDES)}
    room = math.inf if max_length is None else max_length - len(prompt)
    whole = completions
    completions = [ids if len(ids) <= room else ids[: max(room, 0)] for ids in whole]
    reason = _unusable(prompt, whole, completions, tokenizer.eos_token_id)
    if reason is not None:
        counts.drop(reason)
        return None
    counts.truncated += completions != whole
    counts.moved += pair.moved
    row = {"index": pair.row["index"] if pair.given_ids and "index" in pair.row else pair.index, "prompt_ids": prompt}
    for i, side in enumerate(SIDES):
        row[f"{side}_ids"] = completions[i]
        row |= {f"{side}_{name}": sides[i][: len(completions[i])] for name, sides in values.items()}
    return row


def _unusable(prompt: list[int], whole: Sequence[list[int]], cut: Sequence[list[int]], eos: int) -> str | None:
    """Why a pair cannot teach anything, or None."""
    if any(all(i == eos for i in ids) for ids in whole):
        return EMPTY
    if whole[0] == whole[1]:
        return IDENTICAL
    if not prompt:
        return NO_PROMPT
    if not all(cut):
        return TOO_LONG
    if cut[0] == cut[1]:
        return IDENTICAL_CUT
    return None


def _token_values(pair: Rendered, name: str, completions: Sequence[list[int]]) -> list[list[float]]:
    """The values of a token column for both sides, checked against the completions."""
    found = []
    for side, ids in zip(SIDES, completions):
        column = f"{side}_{name}"
        values = as_list(pair.row.get(column))
        if not isinstance(values, list):
            raise InputError(
                f"pair {pair.index}: {column} is missing; give a value for every token of both completions, or remove the columns *_{name}"
            )
        check_token_values(values, len(ids), name, f"pair {pair.index}: {column}")
        found.append(values)
    return found


def check_token_values(values: list, tokens: int, name: str, where: str) -> None:
    """InputError unless there is a finite value for every token, and none of them negative if they are weights."""
    if len(values) != tokens:
        raise InputError(
            f"{where} has {len(values)} values for {tokens} tokens; there must be one for every completion token, EOS included"
        )
    for position, value in enumerate(values):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{where} is {value} at token {position}; every value must be a finite number")
        if name == "weights" and value < 0:
            raise InputError(
                f"{where} is {value} at token {position}; a negative weight would turn the preference round, weights must be at least 0"
            )


def _schema(row: dict) -> pa.Schema:
    def kind(name: str) -> pa.DataType:
        return pa.int64() if name == "index" else pa.list_(pa.int32() if name.endswith("_ids") else pa.float32())

    return pa.schema([(name, kind(name)) for name in row])


def _table(rows: list[dict], schema: pa.Schema) -> pa.Table:
    for row in rows:
        if row.keys() != set(schema.names):
            odd = sorted(row.keys() ^ set(schema.names))
            raise InputError(f"pair {row['index']}: {', '.join(odd)} must be in every pair or in none")
    return pa.Table.from_pylist(rows, schema)


def holdout(rows: Dataset, size: int | float, *, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Rows for training and held-out rows; all pairs of a prompt are on the same side.

    size    a share in (0, 1), or a number of rows. Where prompts have several pairs, the held-out rows may be a few less
    seed    another seed holds out other prompts

    Which prompts are held out depends on the prompts and the seed alone, not on the order of the rows. Works on tokenised rows and on
    pairs with a prompt column. Raises InputError where a side would be empty.

    >>> train, heldout = holdout(rows, 0.1)
    """
    key = "prompt_ids" if "prompt_ids" in rows.column_names else "prompt"
    if key not in rows.column_names:
        raise InputError("the pairs have no prompt column to split by; tokenise them first")
    number = round(size * len(rows)) if isinstance(size, float) else size
    if isinstance(size, bool) or (isinstance(size, float) and not 0 < size < 1):
        raise InputError(f"size must be a share in (0, 1) or a number of rows, got {size!r}")
    number = max(1, number) if isinstance(size, float) else number
    if not 0 < number < len(rows):
        raise InputError(f"{size} of {len(rows)} rows cannot be held out; hold out at least one and leave at least one for training")
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(rows[key]):
        groups.setdefault(repr(list(prompt) if key == "prompt_ids" else prompt), []).append(i)
    held: set[int] = set()
    for prompt in sorted(groups, key=lambda prompt: sha256(f"{seed} {prompt}".encode()).digest()):
        if len(held) + len(groups[prompt]) <= number:
            held.update(groups[prompt])
    if not held:
        raise InputError(f"every prompt has more than {number} pairs, so none can be held out whole; raise the size")
    return rows.select([i for i in range(len(rows)) if i not in held]), rows.select(sorted(held))


def ids_fingerprint(rows: Dataset) -> str:
    """16 hexadecimal digits of all ids of tokenised rows, in their order."""
    parts = []
    for column in ID_COLUMNS:
        lengths, values = sha256(), sha256()
        for batch in rows.select_columns([column]).with_format("numpy").iter(1000):
            lists = [np.asarray(ids, dtype=np.int64) for ids in batch[column]]
            lengths.update(np.array([len(ids) for ids in lists], dtype=np.int64).tobytes())
            values.update(np.concatenate(lists).tobytes())
        parts += [lengths.hexdigest(), values.hexdigest()]
    return sha256(" ".join(parts).encode()).hexdigest()[:16]


def token_sums(rows: Dataset, name: str) -> list[float] | None:
    """Two sums over *_<name>, plain and weighted by the place of the sequence, which tell other values or another order; None without."""
    if f"{SIDES[0]}_{name}" not in rows.column_names:
        return None
    plain = placed = 0.0
    for side in SIDES:
        batches = rows.select_columns([f"{side}_{name}"]).with_format("numpy").iter(1000)
        sums = np.array([np.sum(values, dtype=np.float64) for batch in batches for values in batch[f"{side}_{name}"]])
        plain, placed = plain + sums.sum(), placed + (sums * np.arange(1, len(sums) + 1)).sum()
    return [float(plain), float(placed)]


@dataclass
class PairCollator:
    """Tokenised rows to a batch of tensors, padded or padding-free.

    pad_token_id   fills up on the right
    side           None: B pairs as 2B sequences chosen_0, rejected_0, chosen_1, ...; "chosen", "rejected": that side's B, for SFT
    prompt_loss    the prompt's tokens count as completion tokens too (SFT)
    weights        True: every row must carry *_weights. False: they are left out. None: as the rows are, but raw *_contrast without
                   weights is refused, for it would be trained on as if all weights were 1
    swap           exchange chosen and rejected, with all their values
    flat           no padding: all sequences in one row, for models that keep them apart (`tisdpo.attention.choose`)
    reference      a `tisdpo.cached.ReferenceCache`: the batch gets ref_hidden [N, H], of all completion tokens, sequence after sequence

    Returns input_ids, attention_mask [2B, T] int64, completion_mask [2B, T] bool, and where the rows carry them token_weights and ref_logps
    [2B, T] float32: the value of a token stands at its own position, 0 elsewhere. With flat all are [1, T], T the tokens of all sequences,
    and in place of the attention_mask come lengths [2B] and what `tisdpo.attention.flat_inputs` makes of them. Raises InputError for a row
    that cannot be used so.

    >>> batch = PairCollator(tokenizer.pad_token_id)([rows[0], rows[1]])
    >>> batch["input_ids"].shape[0]
    4
    """

    pad_token_id: int
    side: str | None = None
    prompt_loss: bool = False
    weights: bool | None = None
    swap: bool = False
    flat: bool = False
    reference: ReferenceCache | None = None

    def __post_init__(self):
        if self.side not in (None, *SIDES):
            raise InputError(f"side must be 'chosen', 'rejected' or None, got {self.side!r}")
        if self.prompt_loss and self.side is None:
            raise InputError("prompt_loss is for SFT; give side='chosen' or side='rejected' with it")
        if self.swap and self.side is not None:
            raise InputError("swap exchanges the two sides of a pair; with side, name the other side instead")
        if self.pad_token_id is None:
            raise InputError("pad_token_id is None; set the tokenizer's pad_token, or pass its eos_token_id")

    def __call__(self, rows: Sequence[dict]) -> dict[str, Tensor]:
        sides = (self.side,) if self.side else SIDES[::-1] if self.swap else SIDES
        sequences = [(row, side) for row in rows for side in sides]
        lengths = [len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for row, side in sequences]
        ids = torch.full((1, sum(lengths)) if self.flat else (len(sequences), max(lengths)), self.pad_token_id)
        completion = torch.zeros(ids.shape, dtype=torch.bool)
        for (row, side), own, counts in zip(sequences, self._split(ids, lengths), self._split(completion, lengths)):
            own[:] = torch.tensor([*row["prompt_ids"], *row[f"{side}_ids"]])
            counts[0 if self.prompt_loss else len(row["prompt_ids"]) :] = True
            if self.flat:
                counts[:1] = False  # what stands before it in the row does not predict it
        batch = {"input_ids": ids, "completion_mask": completion}
        if self.flat:  # `lengths` comes first: the Trainer takes the first tensor's rows for the batch size, by which it weights eval_loss
            batch = {"lengths": torch.tensor(lengths), **batch, **flat_inputs(lengths)}
        else:
            batch["attention_mask"] = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
        for column, name, wanted in (("weights", "token_weights", self._weights_wanted(sequences)), ("ref_logps", "ref_logps", None)):
            present = [row.get(f"{side}_{column}") is not None for row, side in sequences]
            if wanted is True or (wanted is None and any(present)):
                values = batch[name] = torch.zeros(ids.shape)
                self._fill(self._split(values, lengths), sequences, column)
        if self.reference is not None:
            batch["ref_hidden"] = torch.cat([self.reference.hidden(row["prompt_ids"], row[f"{side}_ids"]) for row, side in sequences])
        return batch

    def _split(self, batch: Tensor, lengths: list[int]) -> list[Tensor]:
        """Each sequence's own part of a batch."""
        return list(batch[0].split(lengths)) if self.flat else [row[:n] for row, n in zip(batch, lengths)]

    def _weights_wanted(self, sequences) -> bool | None:
        if self.weights is None:
            for row, side in sequences:
                if row.get(f"{side}_contrast") is not None and row.get(f"{side}_weights") is None:
                    raise InputError(
                        f"pair {row.get('index', '?')} carries the raw {side}_contrast but no {side}_weights; "
                        "turn the contrast into weights first "
                        "(tisdpo.rows.apply_weighting), or pass weights=False to leave it out"
                    )
        return self.weights

    def _fill(self, parts: list[Tensor], sequences, column: str) -> None:
        """Write the values of a column to their tokens. With prompt_loss, weights of the prompt's tokens are 1."""
        for part, (row, side) in zip(parts, sequences):
            found, start, tokens = row.get(f"{side}_{column}"), len(row["prompt_ids"]), len(row[f"{side}_ids"])
            where = f"pair {row.get('index', '?')}: {side}_{column}"
            if found is None:
                raise InputError(f"{where} is missing; every row of a batch needs it")
            check_token_values(as_list(found), tokens, column, where)
            part[start:] = torch.tensor(as_list(found), dtype=torch.float32)
            if self.prompt_loss and column == "weights":
                part[:start] = 1.0
