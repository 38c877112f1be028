"""Batches of trainers to the completion tokens that the loss functions take, and back; batches formed by tokens.

Sizes: S = 2B sequences of a batch (chosen_0, rejected_0, chosen_1, ...), T padded length, N completion tokens of all sequences. A
padding-free batch has one row: [1, T] with T the tokens of all sequences, and their boundaries in `cu_seq_lens_q` [S+1].
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tisdpo.errors import InputError


class FlatBatch(NamedTuple):
    """The completion tokens of a batch, sequence after sequence.

    index [N]: positions among all S T of the batch whose next token is a completion token; target [N]: that token;
    cu_seqlens [S+1] counts completion tokens, on the CPU: the host then need not wait for a device when it comes to the loss;
    token_weights [N] and ref_logps [N], or None where the batch has none; shape (S, T) of the batch, (1, T) of a padding-free one.
    """

    index: Tensor
    target: Tensor
    cu_seqlens: Tensor
    token_weights: Tensor | None
    ref_logps: Tensor | None
    shape: tuple[int, int]

    def take(self, hidden: Tensor) -> Tensor:
        """The hidden states that predict completion tokens: [S, T, H] -> [N, H]."""
        if hidden.shape[:2] != self.shape:
            raise InputError(
                f"hidden states {list(hidden.shape[:2])} of a batch of {list(self.shape)} tokens: give the model's whole [S, T, H], "
                "neither flattened nor shifted; models that add or drop positions (prompt tuning does) are not supported"
            )
        return hidden.flatten(0, 1).index_select(0, self.index)


def flatten_batch(batch: dict) -> FlatBatch:
    """The flat form of a batch with `input_ids` [S, T] and `completion_mask` [S, T] (bool), or in its place `labels` [S, T] that are -100
    elsewhere, optionally `token_weights` and `ref_logps` [S, T]; of a padding-free batch all are [1, T].

    All are in the coordinates of `input_ids`, not shifted. The first position of a sequence is never a target: nothing predicts it.
    InputError for a batch with neither a mask nor labels, for tensors of another shape than `input_ids`, and for labels that were shifted.
    """
    ids = _tensor(batch, "input_ids")
    for name in ("completion_mask", "labels", "token_weights", "ref_logps"):
        if batch.get(name) is not None and _tensor(batch, name).shape != ids.shape:
            raise InputError(
                f"{name} must have the shape of input_ids, {list(ids.shape)}, and its coordinates (not shifted), got "
                f"{list(batch[name].shape)}"
            )
    if "completion_mask" in batch:
        mask = batch["completion_mask"].bool()
    elif "labels" in batch:
        mask = batch["labels"] != -100
        if (batch["labels"] != ids)[mask].any():
            raise InputError("labels must be input_ids, with -100 outside of the completions: these differ; were they shifted?")
    else:
        raise InputError(
            f"which tokens are completions? Give completion_mask, or labels with -100 elsewhere; the batch has {', '.join(batch)}"
        )
    where = mask[:, 1:]
    bounds = batch.get("cu_seq_lens_q")
    counts = where.sum(1) if bounds is None else mask[0]
    cu_seqlens = torch.cat([counts.new_zeros(1, dtype=torch.long), counts.cumsum(0)])
    if bounds is not None:
        cu_seqlens = cu_seqlens[bounds.long()]
    cu_seqlens = cu_seqlens.cpu()
    index = torch.nn.functional.pad(where, (0, 1)).flatten().nonzero()[:, 0]

    def following(name: str) -> Tensor | None:
        return batch[name].flatten()[index + 1] if batch.get(name) is not None else None

    return FlatBatch(index, following("input_ids"), cu_seqlens, following("token_weights"), following("ref_logps"), tuple(mask.shape))


def _tensor(batch: dict, name: str) -> Tensor:
    x = batch.get(name)
    if not isinstance(x, Tensor) or x.dim() != 2:
        came = f"{type(x).__name__}" if not isinstance(x, Tensor) else f"shape {list(x.shape)}"
        raise InputError(f"the batch's {name} must be a tensor [S, T], one row a sequence, got {came}")
    return x


def interleaved(batch: dict) -> dict:
    """A batch of all chosen rows, then all rejected ones, as TRL and others make them, in the order chosen_0, rejected_0, chosen_1, ..."""
    rows = len(_tensor(batch, "input_ids"))
    if rows % 2:
        raise InputError(f"a batch of chosen rows, then as many rejected ones, has an even number of rows, got {rows}")
    order = torch.arange(rows, device=batch["input_ids"].device).view(2, -1).T.flatten()
    return {name: x[order] if isinstance(x, Tensor) and x.dim() and len(x) == rows else x for name, x in batch.items()}


def sequences(batch: dict) -> int:
    """How many sequences a batch holds, padded or padding-free."""
    return len(batch["lengths" if "lengths" in batch else "input_ids"])


def first_sequences(batch: dict, count: int) -> dict:
    """The batch of the first `count` sequences of a batch, padded or padding-free."""
    bounds = batch.get("cu_seq_lens_q")
    tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.dim() and name != "ref_hidden"}
    if bounds is None:
        cut = {name: x[:count] for name, x in tensors.items()}
    else:
        end = int(bounds[count])
        cut = {name: x[:, :end] if x.dim() > 1 else x[: count + name.startswith("cu_")] for name, x in tensors.items()}
    if "ref_hidden" in batch:  # one row for every completion token
        cut["ref_hidden"] = batch["ref_hidden"][: len(flatten_batch({**batch, **cut}).target)]
    return {**batch, **cut}


class TokenBatches:
    """A batch sampler: batches of whole rows with at most `tokens` tokens each, for a `DataLoader` of one of several ranks.

    lengths    tokens of every row's sequences, e.g. (chosen, rejected), both with their prompt
    tokens     the most that a batch may hold; a row with more than that stands alone
    padded     the batches will be padded, so every sequence counts as long as the longest of its batch
    seed       None: rows stay in their order. Otherwise rows are shuffled into batches once, and the batches anew for every epoch, so that
               all epochs have the same number of them (the Trainer counts its steps only once)
    epoch      called where an iteration starts; a resumed run sees the batches of its epoch again
    rank, world   every rank gets as many batches as the others, for which the first ones may come twice
    """

    batch_size = None  # what accelerate asks: the batches have no common size
    drop_last = False

    def __init__(
        self, lengths: Sequence[Sequence[int]], tokens: int, *, padded: bool = False, seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0, rank: int = 0, world: int = 1,
    ):  # fmt: skip
        self.seed, self.epoch, self.rank, self.world = seed, epoch, rank, world
        self.batches: list[list[int]] = []
        count = total = longest = 0  # of the last batch: sequences, tokens, tokens of the longest
        for row in range(len(lengths)) if seed is None else self._shuffled(len(lengths), seed):
            count, total, longest = count + len(lengths[row]), total + sum(lengths[row]), max(longest, *lengths[row])
            if not self.batches or (count * longest if padded else total) > tokens:
                self.batches.append([])
                count, total, longest = len(lengths[row]), sum(lengths[row]), max(lengths[row])
            self.batches[-1].append(row)

    @staticmethod
    def _shuffled(count: int, seed: int) -> list[int]:
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()

    @property
    def ends_repeated(self) -> bool:
        """Whether the last batch of this rank has come already, at another one."""
        return self.rank >= (len(self.batches) % self.world or self.world)

    def __len__(self) -> int:
        return -(-len(self.batches) // self.world)

    def __iter__(self) -> Iterator[list[int]]:
        order = range(len(self.batches)) if self.seed is None else self._shuffled(len(self.batches), self.seed + 1 + self.epoch())
        for i in range(self.rank, len(self) * self.world, self.world):
            yield self.batches[order[i % len(self.batches)]]


def check_tokens_per_batch(args, least: int) -> None:
    """InputError unless a batch of `args.tokens_per_batch` tokens holds a row of `least` tokens, and no other option forms batches."""
    if args.tokens_per_batch < least:
        raise InputError(
            f"tokens_per_batch={args.tokens_per_batch} cannot hold every row of max_length={args.max_length}; "
            f"give at least {least}, or lower max_length"
        )
    usual = type(args).__dataclass_fields__["per_device_train_batch_size"].default
    for name, allowed in (
        ("per_device_train_batch_size", (usual,)),
        ("auto_find_batch_size", (False,)),
        ("train_sampling_strategy", ("random", "sequential")),
    ):
        if getattr(args, name, allowed[0]) not in allowed:
            raise InputError(f"{name}={getattr(args, name)!r} has no effect with tokens_per_batch; leave one of the two out")


def token_loader(rows, sides: Sequence[str], collator, args, accelerator, epoch: Callable[[], int]) -> tuple[DataLoader, bool]:
    """The training batches of `args.tokens_per_batch` tokens for this rank, moved to its device; shuffled unless args say "sequential".

    Also whether the last of them is a repeated one.
    """
    from accelerate.data_loader import prepare_data_loader

    columns = [rows["prompt_ids"], *(rows[f"{side}_ids"] for side in sides)]
    lengths = [[len(prompt) + len(ids) for ids in completions] for prompt, *completions in zip(*columns)]
    seed = args.seed if args.data_seed is None else args.data_seed
    batches = TokenBatches(
        lengths,
        args.tokens_per_batch,
        padded=not collator.flat,
        seed=None if args.train_sampling_strategy == "sequential" else seed,
        epoch=epoch,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    loader = DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),  # of newer transformers, like the next
        in_order=getattr(args, "dataloader_in_order", True),
    )
    # every rank has its share already, so accelerate is only to move the tensors
    return prepare_data_loader(loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True), batches.ends_repeated
