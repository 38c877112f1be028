"""The reference as a cache: its hidden states at the completion tokens, and its head; read row by row, for KL without the transformer.

In the directory of a scored set:

    reference/head.safetensors          weight [V, H], bias [V] where there is one; the scale and cap of the logits as metadata
    reference/index.safetensors         key, part and start [2P] of every completion
    reference/hidden-<part>.safetensors hidden [tokens, H], completion after completion

It costs 2 H bytes for every completion token in bfloat16 (8 KB with H = 4096: 300 GB for 60 000 pairs of 2 x 300 tokens), 4 H in
float32, on the disk; in memory no more than the batch that is read. A completion is found by what it is (its ids and those of its
prompt), not by where it stands: rows may be selected, shuffled, split or swapped.
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tisdpo.errors import InputError
from tisdpo.hf import Head

FOLDER = "reference"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def sequence_key(prompt: Sequence[int], completion: Sequence[int]) -> int:
    """64 bits that stand for a completion after its prompt."""
    content = np.array([len(prompt), *prompt, *completion], dtype=np.int64).tobytes()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True)


def hidden_name(part: int) -> str:
    return f"hidden-{part:05d}.safetensors"


def write_reference(
    directory: Path, head: Head, sequences: Iterable[tuple[Sequence[int], Sequence[int]]], where: Sequence[tuple[int, int]], source: Path
) -> None:
    """Write the folder `reference` of a scored set: head, index, and the files of hidden states that lie in `source`.

    where   (part, first row of its hidden states there) of every sequence
    """
    folder = Path(directory) / FOLDER
    folder.mkdir()
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    transform = {"transform": json.dumps(head.transform)}
    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, folder / "head.safetensors", transform)
    index = {
        "key": torch.tensor([sequence_key(*s) for s in sequences], dtype=torch.int64),
        "part": torch.tensor([part for part, _ in where], dtype=torch.int32),
        "start": torch.tensor([start for _, start in where], dtype=torch.int64),
    }
    save_file(index, folder / "index.safetensors")
    for part in sorted({part for part, _ in where}):
        try:
            os.link(source / hidden_name(part), folder / hidden_name(part))
        except OSError:  # a file system without links
            shutil.copyfile(source / hidden_name(part), folder / hidden_name(part))


class ReferenceCache:
    """Reads the cached reference of one or several scored sets of the same reference; files are opened when a row asks for them.

    head    of the reference, on the CPU
    dtype   of the hidden states as stored

    >>> cache = ReferenceCache("runs/scored/S")
    >>> cache.hidden(row["prompt_ids"], row["chosen_ids"]).shape
    torch.Size([17, 4096])
    """

    def __init__(self, directory: str | Path):
        self._places: dict[int, tuple[str, int]] = {}
        self._files: dict = {}
        self._added: list[str] = []
        self.add(directory)
        file = Path(directory) / FOLDER / "head.safetensors"
        with _opened(file) as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            self.head = Head(tensors["weight"], tensors.get("bias"), **json.loads(content.metadata()["transform"]))
        with _opened(next(iter(self._places.values()))[0]) as content:
            self.dtype = content.get_slice("hidden")[:0].dtype

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """ref_weight and ref_bias, as the loss takes them."""
        return {"ref_weight": self.head.weight, "ref_bias": self.head.bias}

    def add(self, directory: str | Path) -> None:
        """The sequences of another scored set, whose reference the caller has found to be the same."""
        if str(directory) in self._added:
            return
        folder = Path(directory) / FOLDER
        with _opened(folder / "index.safetensors") as content:
            keys, parts, starts = (content.get_tensor(name).tolist() for name in ("key", "part", "start"))
        for part in set(parts):
            _opened(folder / hidden_name(part))  # what is missing or cut off is told now, not in the middle of training
        self._places |= {key: (str(folder / hidden_name(part)), start) for key, part, start in zip(keys, parts, starts)}
        self._added.append(str(directory))

    def hidden(self, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
        """Hidden states [tokens, H] that predict the tokens of a completion; InputError for one that is not in the cache."""
        file, start = self._place(prompt, completion, "a row")
        if file not in self._files:
            self._files[file] = _opened(file)
        return self._files[file].get_slice("hidden")[start : start + len(completion)]

    def check(self, rows) -> None:
        """InputError unless both completions of every row are in the cache."""
        for number, row in enumerate(rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])):
            for side in ("chosen", "rejected"):
                self._place(row["prompt_ids"], row[f"{side}_ids"], f"the {side} response of row {number}")

    def _place(self, prompt, completion, what: str) -> tuple[str, int]:
        found = self._places.get(sequence_key(prompt, completion))
        if found is None:
            raise InputError(
                f"{what} is not among the cached hidden states of the reference in {', '.join(self._added)}; "
                "score these pairs with --reference-hidden too, or use the rows and the max_length they were scored with"
            )
        return found

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}  # a worker process opens its own


def _opened(file: str | Path):
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{file}, part of a cached reference, is missing or damaged ({str(error).splitlines()[0]}); score the pairs again"
        ) from error
