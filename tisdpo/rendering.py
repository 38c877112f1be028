"""One preference pair, whatever its form, to the three texts that are tokenised, and their ids to prompt and completions."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile

from tisdpo.errors import InputError
from tisdpo.readers import ID_COLUMNS

# the dialogues of anthropics/hh-rlhf come without a prompt column; responses that begin alike would lose their beginning to the prompt
DIALOGUE_TURN = "\n\nAssistant:"

# why a pair is dropped
EMPTY, IDENTICAL, NO_PROMPT = "empty response", "identical chosen and rejected", "empty prompt"
TOO_LONG, IDENTICAL_CUT = "prompt too long", "identical after truncation"


@dataclass
class Rendered:
    """A pair on its way to ids.

    texts   prompt, prompt + chosen, prompt + rejected, to be tokenised with add_special_tokens
    ids     prompt, chosen and rejected; of a pair that came as ids (given_ids), or after tokenising
    moved   whether the prompt ends differently alone than with a completion
    drop    why the pair is dropped, or None
    """

    index: int
    row: dict
    texts: tuple[str, str, str] | None = None
    add_special_tokens: bool = True
    ids: tuple[list[int], list[int], list[int]] | None = None
    moved: bool = False
    drop: str | None = None

    @property
    def given_ids(self) -> bool:
        return "chosen_ids" in self.row


def conversation(index: int, row: dict) -> tuple[list[dict], list[dict], list[dict]]:
    """Messages of the prompt, and of both answers, of a pair that comes as messages; InputError with its number."""
    prompt, chosen, rejected = row.get("prompt"), list(row["chosen"]), list(row["rejected"])
    for name in ("prompt", "chosen", "rejected"):
        if isinstance(row.get(name), list):
            _check_messages(index, name, row[name])
    if isinstance(prompt, list):
        if all(side[: len(prompt)] == prompt for side in (chosen, rejected)):  # whole conversations beside their start
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return prompt, chosen, rejected
    shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected))]
    if not shared and prompt:  # a text prompt beside bare answers
        return [{"role": "user", "content": prompt}], chosen, rejected
    if prompt and not any(prompt.strip() == message["content"].strip() for message in shared):
        raise InputError(
            f"pair {index}: prompt is not among the messages that chosen and rejected share; remove the prompt column or correct the pair"
        )
    return shared, chosen[len(shared) :], rejected[len(shared) :]


class Renderer:
    """Renders pairs for a tokenizer, with an optional system prompt."""

    def __init__(self, tokenizer, system_prompt: str | None = None):
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.is_blank = lru_cache(maxsize=None)(lambda token: not tokenizer.decode([token]).strip())
        self._system_role: bool | None = None

    def __call__(self, index: int, row: dict) -> Rendered:
        """Texts or ids of a pair; InputError with its number if it is of none of the known forms."""
        if not isinstance(row, dict):
            raise InputError(f"pair {index} is {_kind(row)}; a preference pair is a dict with prompt, chosen and rejected")
        if "chosen_ids" in row or "prompt_ids" in row:
            return self._ids(index, row)
        for column in ("chosen", "rejected"):
            if column not in row:
                raise InputError(f"pair {index} has no {column!r} (it has: {', '.join(map(str, row))}); rename the column that holds it")
        prompt, chosen, rejected = row.get("prompt", ""), row["chosen"], row["rejected"]
        if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str):
            return self._text(index, row, "prompt" not in row)
        if isinstance(chosen, list) and isinstance(rejected, list) and isinstance(prompt, str | list):
            return self._messages(index, row)
        kinds = ", ".join(f"{name} is {_kind(row[name])}" for name in ("prompt", "chosen", "rejected") if name in row)
        raise InputError(f"pair {index}: {kinds}; all of them must be text, or all lists of messages; correct or remove the pair")

    def _ids(self, index: int, row: dict) -> Rendered:
        if self.system_prompt is not None:
            raise InputError(
                f"pair {index} comes as token ids, in front of which no system prompt can be put; give the pairs as text or messages"
            )
        found = []
        for name in ID_COLUMNS:
            ids = row.get(name)
            ids = as_list(ids)
            if not isinstance(ids, list) or not all(type(i) is int for i in ids):
                raise InputError(f"pair {index}: {name} must be a list of whole numbers, got {_kind(ids)}; correct or remove the pair")
            found.append(ids)
        return Rendered(index, row, ids=tuple(found))

    def _text(self, index: int, row: dict, implicit: bool) -> Rendered:
        chosen, rejected = row["chosen"], row["rejected"]
        if implicit and chosen == rejected:
            return Rendered(index, row, drop=IDENTICAL)
        prompt = _shared_text(chosen, rejected) if implicit else row["prompt"]
        if implicit:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        drop = _no_signal(chosen.strip(), rejected.strip(), chosen == rejected)
        if self.system_prompt:
            apart = "" if self.system_prompt[-1].isspace() or prompt[:1].isspace() else "\n\n"
            prompt = self.system_prompt + apart + prompt
        return Rendered(index, row, (prompt, prompt + chosen, prompt + rejected), drop=drop)

    def _messages(self, index: int, row: dict) -> Rendered:
        if not isinstance(row.get("prompt"), list) and row["chosen"] == row["rejected"]:
            return Rendered(index, row, drop=IDENTICAL)
        prompt, chosen, rejected = conversation(index, row)
        if not prompt:
            return Rendered(index, row, drop=NO_PROMPT)
        drop = _no_signal(any(m["content"].strip() for m in chosen), any(m["content"].strip() for m in rejected), chosen == rejected)
        if drop is not None:
            return Rendered(index, row, drop=drop)
        prompt = self._with_system(index, prompt)
        texts = self._apply(index, row, prompt, True), self._apply(index, row, prompt + chosen), self._apply(index, row, prompt + rejected)
        return Rendered(index, row, texts, add_special_tokens=False)

    def _apply(self, index: int, row: dict, messages: list[dict], generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        if self.tokenizer.chat_template is None:
            raise InputError(
                "the pairs are conversations, but the tokenizer has no chat template; set tokenizer.chat_template or give the pairs as text"
            )
        options = {"tools": self._tools(index, row.get("tools")), **(row.get("chat_template_kwargs") or {})}
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]  # Arrow fills up with None
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt, **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"pair {index}: the chat template refuses the conversation ({error}); correct or remove the pair") from error

    def _tools(self, index: int, tools):
        """Schemas of functions for the chat template: a list, or its JSON, as columns of files have it; None where there are none."""
        if not isinstance(tools, str):
            return tools
        try:
            return json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise InputError(f"pair {index}: tools is no JSON ({error}); correct it, or remove the column") from error

    def _with_system(self, index: int, messages: list[dict]) -> list[dict]:
        """The system prompt as a system message, joined with one that is there.

        It stands in the first user message where the template has no such role.
        """
        if not self.system_prompt:
            return messages
        if self._system_role is None:
            self._system_role = self._renders_system_role()
        role = "system" if self._system_role else "user"
        for i, message in enumerate(messages):
            if message["role"] == role:
                joined = {**message, "content": f"{self.system_prompt}\n\n{message['content']}"}
                return [*messages[:i], joined, *messages[i + 1 :]]
        if role == "user":
            raise InputError(
                f"pair {index}: the chat template has no system role and the prompt no user message to put the system prompt in; "
                "use another template"
            )
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def _renders_system_role(self) -> bool:
        from jinja2 import TemplateError

        probe = [{"role": "system", "content": "tisdpo-probe"}, {"role": "user", "content": "x"}]
        try:
            return "tisdpo-probe" in self.tokenizer.apply_chat_template(probe, tokenize=False)
        except (TemplateError, ValueError):
            return False

    # Ids

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=add_special_tokens, padding=False, truncation=False, verbose=False)["input_ids"]

    def split(
        self, prompt: list[int], with_chosen: list[int], with_rejected: list[int]
    ) -> tuple[tuple[list[int], list[int], list[int]], bool]:
        """Ids of prompt, chosen and rejected, and whether the prompt ends differently alone than with a completion."""
        prompt, with_chosen, with_rejected = (self._one_bos(list(ids)) for ids in (prompt, with_chosen, with_rejected))
        length = min(common_prefix(prompt, with_chosen), common_prefix(prompt, with_rejected))
        end = len(prompt)
        while end > length and prompt[end - 1] == self.tokenizer.eos_token_id:  # put there by the tokenizer
            end -= 1
        ids = (prompt[:length], self._one_eos(with_chosen[length:]), self._one_eos(with_rejected[length:]))
        return ids, end > length

    def _one_bos(self, ids: list[int]) -> list[int]:
        """One BOS where the text and the tokenizer both put one."""
        bos, start = self.tokenizer.bos_token_id, 0
        while bos is not None and ids[start : start + 2] == [bos, bos]:
            start += 1
        return ids[start:]

    def _one_eos(self, ids: list[int]) -> list[int]:
        """The completion up to its final EOS, added if there is none.

        Templates write a line break after it, which no model ever generates.
        """
        eos, end, cut = self.tokenizer.eos_token_id, len(ids), len(ids)
        while end and (ids[end - 1] == eos or self.is_blank(ids[end - 1])):
            end -= 1
            if ids[end] == eos:
                cut = end
        return [*ids[:cut], eos]


def as_list(values):
    """Arrays and tensors as the list of Python numbers that Arrow gives, anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") else values


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences have in common at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _shared_text(chosen: str, rejected: str) -> str:
    """The prompt of two texts without one: what both begin with, back to the last turn of a dialogue or else to the end of a word.

    So the beginning that two responses of a dialogue share stays with them, no word is cut in two, and the space before a response
    belongs to it.
    """
    shared = chosen[: common_prefix(chosen, rejected)]
    turn = shared.rfind(DIALOGUE_TURN)
    if turn >= 0:
        return shared[: turn + len(DIALOGUE_TURN)]
    between_words = all(text[len(shared) : len(shared) + 1].isspace() for text in (chosen, rejected))
    return (shared if between_words else re.sub(r"\S+\Z", "", shared)).rstrip()


def _no_signal(chosen, rejected, identical: bool) -> str | None:
    if not chosen or not rejected:
        return EMPTY
    return IDENTICAL if identical else None


def _check_messages(index: int, name: str, messages: list) -> None:
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise InputError(
                f"pair {index}: message {number} of {name} must be {{'role': text, 'content': text}}, got {_kind(message)}; "
                "correct or remove the pair"
            )


def _kind(value) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a dict with " + ", ".join(f"{key}: {'null' if v is None else type(v).__name__}" for key, v in value.items())
    return {str: "text", list: "a list", bool: "true or false", int: "a number", float: "a number"}.get(type(value), type(value).__name__)
