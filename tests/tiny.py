"""The known-truth world at its smallest, for tests of the pipeline: a tokenizer, rows, a model with two layers of 16 numbers."""

from functools import cache

from tisdpo.data import tokenize_pairs
from tisdpo.hf import tiny_llama
from tisdpo.synthetic import World, WorldConfig


@cache
def world() -> World:
    return World(WorldConfig(seed=3))


@cache
def tokenizer():
    return world().tokenizer()


@cache
def pairs(count: int = 24) -> list[dict]:
    return world().pairs(count)


def rows(count: int = 24):
    return tokenize_pairs(pairs(count), tokenizer(), max_length=128)[0]


def model(seed: int = 0):
    return tiny_llama(tokenizer(), hidden_size=16, layers=2, heads=2, max_length=160, seed=seed)


def contrast(dataset, value=None):
    """Rows with a raw contrast: `value` everywhere, or a function of the token id."""
    for side in ("chosen", "rejected"):
        dataset = dataset.add_column(
            f"{side}_contrast", [[float(value if value is not None else (i % 7) / 3 - 1) for i in ids] for ids in dataset[f"{side}_ids"]]
        )
    return dataset
