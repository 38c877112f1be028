"""Rows made ready for a trainer: checked, tokenised, with weights from their contrast and log-probs of the reference."""

import logging
from contextlib import nullcontext

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset

from tisdpo.data import tokenize_pairs
from tisdpo.errors import InputError
from tisdpo.hf import is_sharded, refuse_images
from tisdpo.scoring import completion_logps
from tisdpo.weighting import Weighting, contrast_weights

log = logging.getLogger("tisdpo")


def check_kind(dataset) -> None:
    if isinstance(dataset, dict):
        raise InputError(
            f"a dataset has splits ({', '.join(map(str, dataset))}); pass one of them, as in rows[{next(iter(dataset), '')!r}]"
        )
    if not isinstance(dataset, Dataset | IterableDataset):
        raise InputError(
            f"a dataset must be a datasets.Dataset, got {type(dataset).__name__}; tisdpo.data.load_pairs makes one of a list of pairs, a "
            "file or a hub id"
        )


def datasets_in(*given) -> list:
    """The datasets among what a trainer was given, which may be None or {name: dataset}."""
    return [d for some in given for d in (some.values() if isinstance(some, dict) else [some]) if d is not None]


def each(function, given):
    """function of a dataset, or of every one of {name: dataset}."""
    return {name: function(dataset) for name, dataset in given.items()} if isinstance(given, dict) else function(given)


def prepare_rows(dataset, tokenizer, args, vocab_size: int):
    """Rows tokenised, with weights where the method uses them: their own, or those that `args.weighting` makes of their contrast. args: a
    `tisdpo.TISDPOConfig`."""
    names = dataset.column_names or ()  # of a stream they may not be known
    refuse_images(names)
    if args.method != "sft" or "chosen_ids" not in names:  # documents have one side, nothing to compare
        dataset, counts = tokenize_pairs(dataset, tokenizer, max_length=args.max_length, vocab_size=vocab_size)  # checks ready ids, too
        if counts.dropped or counts.truncated or counts.moved:
            log.warning(counts.describe())
    else:
        dataset = cut_completions(dataset, args.sft_side, args.max_length, vocab_size)
    columns = set(dataset.column_names)
    weighted = {"chosen_weights", "chosen_contrast"} & columns
    if args.method == "tis-dpo":
        if not weighted:
            raise InputError(
                "method='tis-dpo' needs rows with chosen_contrast and rejected_contrast (`tisdpo score` with --positive and --negative "
                "makes them), or chosen_weights and rejected_weights; with weights 1 it is method='dpo'"
            )
        dataset = weigh(dataset, args.weighting, tokenizer.eos_token_id)
    elif args.method == "dpo" and weighted:
        raise InputError(
            f"the rows carry {', '.join(sorted(weighted))}, which method='dpo' does not use; remove the columns or use method='tis-dpo'"
        )
    return dataset


def weigh(dataset, weighting: dict | None, eos_token_id: int | None):
    """Rows with weights: ready ones, or made of their contrast where there are none or `weighting` (fields of `Weighting`) says how."""
    columns = set(dataset.column_names or next(iter(dataset)))
    if "chosen_weights" in columns and weighting is None:
        return dataset
    if "chosen_contrast" not in columns:
        raise InputError("the rows carry ready weights, so weighting has no effect; remove the *_weights columns or the weighting")
    if "chosen_weights" in columns:
        log.info("weights are made anew from the contrast, as weighting says; the rows' own are left out")
        dataset = dataset.remove_columns(["chosen_weights", "rejected_weights"])
    return apply_weighting(dataset, Weighting.of(weighting), eos_token_id)


def cut_completions(dataset, side: str, max_length: int, vocab_size: int):
    """Ready ids of one side with their ends cut off at max_length; rows that keep no completion are dropped and counted."""

    def cut(row, index):
        ids = row[f"{side}_ids"]
        wrong = [i for i in (*row["prompt_ids"], *ids) if not 0 <= i < vocab_size]
        if wrong:
            raise InputError(f"row {index}: {wrong[0]} is no token id of this model, whose vocabulary has {vocab_size} tokens")
        return {f"{side}_ids": ids[: max(0, max_length - len(row["prompt_ids"]))]}

    dataset = dataset.map(cut, with_indices=True)
    kept = dataset.filter(lambda row: len(row[f"{side}_ids"]) > 0)
    if len(kept) < len(dataset):
        log.warning(
            "%d of %d rows have no completion within max_length=%d and are left out", len(dataset) - len(kept), len(dataset), max_length
        )
    return kept


def apply_weighting(dataset, weighting: Weighting, eos_token_id: int | None):
    """Columns chosen_weights and rejected_weights from the stored raw contrast, for all rows at once; InputError for rows with weights."""
    _without(dataset, "chosen_weights")
    contrasts = {side: dataset[f"{side}_contrast"] for side in ("chosen", "rejected")}
    sequences = [values for pair in zip(contrasts["chosen"], contrasts["rejected"]) for values in pair]
    ids = [values for pair in zip(dataset["chosen_ids"], dataset["rejected_ids"]) for values in pair]
    lengths = torch.tensor([len(values) for values in sequences], dtype=torch.long)
    flat = torch.tensor([x for values in sequences for x in values], dtype=torch.float32)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    is_chosen = torch.repeat_interleave(torch.arange(len(lengths)) % 2 == 0, lengths)
    is_eos = torch.tensor([x == eos_token_id for values in ids for x in values], dtype=torch.bool)
    weights = contrast_weights(flat, is_chosen, weighting, cu_seqlens=cu_seqlens, is_eos=is_eos).split(lengths.tolist())
    for offset, side in enumerate(("chosen", "rejected")):
        dataset = dataset.add_column(f"{side}_weights", [w.tolist() for w in weights[offset::2]])
    return dataset


def add_reference_logps(dataset, reference, pad_token_id: int, accelerator=None):
    """Columns chosen_ref_logps and rejected_ref_logps: per-token log-probs under the reference, see `shared_logps`; InputError for rows
    that have them."""
    _without(dataset, "chosen_ref_logps")
    for side in ("chosen", "rejected"):
        logps = shared_logps(reference, dataset["prompt_ids"], dataset[f"{side}_ids"], pad_token_id, accelerator)
        dataset = dataset.add_column(f"{side}_ref_logps", logps)
    return dataset


def _without(dataset, name: str) -> None:
    if name in dataset.column_names:
        raise InputError(f"the rows carry {name} already; use them as they are, or remove the columns")


def brings_reference(rows) -> bool:
    """Whether rows, None for none, carry log-probs of a reference."""
    return "chosen_ref_logps" in (getattr(rows, "column_names", None) or ())


def shared_logps(reference, prompts, completions, pad_token_id: int, accelerator=None) -> list[list[float]]:
    """Log-probs (nats) of the tokens of every completion after its prompt.

    accelerator   of the training: its number format, and its processes share the rows (of a sharded reference each computes them all)
    """
    shared = accelerator is not None and accelerator.num_processes > 1 and not is_sharded(reference)
    rank, world = (accelerator.process_index, accelerator.num_processes) if shared else (0, 1)
    own = [ids[:][rank::world] for ids in (prompts, completions)]  # a lazy column is read row by row
    with nullcontext() if accelerator is None else accelerator.autocast():
        logps = [x.tolist() for x in completion_logps(reference, *own, pad_token_id=pad_token_id)]
    if not shared:
        return logps
    whole: list = [None] * len(completions)
    for number, part in enumerate(gather_object([logps])):
        whole[number::world] = part
    return whole
