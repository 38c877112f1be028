"""What a run asks of a world with known truth: text, a tokenizer, and the reward of every token that anybody may write in it.

A world is a subclass of `KnownTruth` with a configuration (a frozen dataclass with a `seed`). It speaks of words; tokens are words
here, and all that has to do with ids stands in this module.
"""

import random
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any, ClassVar

from tisdpo.errors import InputError

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant') }}{% endif %}"
    "{{ message['content'] }}{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
)


class KnownTruth:
    """Documents, pairs, prompts, a tokenizer and the truth about every token, all from one configuration.

    Everything follows from the configuration: the same fields give the same text, whatever was drawn before.
    """

    tones: ClassVar[tuple[str, str]]  # the positive and the negative system prompt that the documents teach
    numbers: ClassVar[bool] = False  # every digit is a word of its own, and written without a space to the next one
    verifiable: ClassVar[bool] = False  # whether answers are right or wrong
    config: Any

    # What a world is

    def documents(self, count: int) -> list[dict[str, str]]:
        """Unlabelled rows {"system", "prompt", "completion"} for pretraining a base model; "system" is "" without a system prompt."""
        raise NotImplementedError

    def pairs(self, count: int, split: str = "train") -> list[dict[str, str]]:
        """Rows {"prompt", "chosen", "rejected"} as text; split "heldout" has prompts that "train" and the documents never have."""
        raise NotImplementedError

    def prompts(self, split: str = "heldout") -> list[str]:
        """Prompts of a split, each once."""
        raise NotImplementedError

    def word_rewards(self, response: Iterable[str], prompt: Iterable[str] = ()) -> list[float]:
        """The reward of every word of a response to a prompt; nothing counts after EOS."""
        raise NotImplementedError

    def word_answer_is_right(self, response: Iterable[str], prompt: Iterable[str]) -> bool:
        """Whether a response answers its prompt rightly; only of a world that is `verifiable`."""
        raise NotImplementedError

    def vocabulary(self) -> list[str]:
        """All tokens by id: the special ones, then every word in alphabetical order."""
        raise NotImplementedError

    # What all worlds share

    @cached_property
    def _table(self) -> list[str]:
        return self.vocabulary()

    def token_rewards(self, ids: Iterable[int], prompt_ids: Iterable[int] = ()) -> list[float]:
        """The truth about every token of a completion, given as ids of this world's tokenizer; of any completion, also a generated one."""
        return self.word_rewards(self._words(ids), self._words(prompt_ids))

    def is_right(self, ids: Iterable[int], prompt_ids: Iterable[int]) -> bool:
        """Whether a completion, given as ids, answers its prompt rightly; only of a world that is `verifiable`."""
        return self.word_answer_is_right(self._words(ids), self._words(prompt_ids))

    def tokenizer(self):
        """A word-level `PreTrainedTokenizerFast` for this world, with a chat template that takes an optional system message.

        Words and punctuation marks are tokens. The template only joins the messages, so that a prompt as text and the same prompt
        as messages are the same ids, and a system prompt is text in front.
        """
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        table = self._table
        core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(table)}, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        core.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # words apart, punctuation marks attached
        if self.numbers:
            core.pre_tokenizer = pre_tokenizers.Sequence([core.pre_tokenizer, pre_tokenizers.Digits(individual_digits=True)])
            core.decoder = decoders.Sequence([core.decoder, decoders.Fuse(), decoders.Replace(Regex(r"(?<=\d) (?=\d)"), "")])
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", table.index("<bos>"))])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core,
            pad_token="<pad>",
            bos_token="<bos>",
            eos_token="<eos>",
            unk_token="<unk>",
            clean_up_tokenization_spaces=False,
        )
        tokenizer.chat_template = _CHAT_TEMPLATE
        return tokenizer

    def _words(self, ids: Iterable[int]) -> list[str]:
        table = self._table
        return [table[i] if 0 <= i < len(table) else "<unk>" for i in ids]

    def _rng(self, purpose: str) -> random.Random:
        return random.Random(f"{self.config.seed} {purpose}")


def words(text: str, numbers: bool = False) -> list[str]:
    """Words and punctuation marks of a text: the tokens of a world; with `numbers` every digit is one."""
    return re.findall(r"<\w+>|\d|[^\W\d]+|[^\w\s]" if numbers else r"<\w+>|\w+|[^\w\s]", text)


def check_split(split: str) -> None:
    """Raise InputError unless this is one of the two splits."""
    if split not in ("train", "heldout"):
        raise InputError(f"split must be 'train' or 'heldout', got {split!r}")
