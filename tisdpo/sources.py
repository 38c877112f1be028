"""Where the pairs of a run come from: the known-truth world, or preference text; with the tokenizer, the base corpus and the truth."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import datasets

from tisdpo import synthetic
from tisdpo.config import RunConfig
from tisdpo.data import holdout, load_pairs, tokenize_pairs
from tisdpo.errors import InputError
from tisdpo.hf import load_tokenizer, train_bpe


@dataclass
class Source:
    """Everything about the data of one seed.

    train, heldout   tokenised rows; pairs: the pairs as text, indexed by the rows' `index`
    documents        rows (prompt_ids, chosen_ids) a base model is pretrained on, or None when there is a base model
    prompts          token ids of held-out prompts for generation
    reward           true reward of a generation, or None where nobody knows it
    dropped          how many pairs were left out, by reason
    """

    kind: str
    tokenizer: Any
    train: datasets.Dataset
    heldout: datasets.Dataset
    pairs: Any
    documents: datasets.Dataset | None
    prompts: list[list[int]]
    reward: Callable | None = None
    dropped: dict[str, int] = field(default_factory=dict)
