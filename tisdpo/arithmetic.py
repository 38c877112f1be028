"""A second world with known truth: sums with a worked solution, in which one wrong token decides.

    27 + 45 =
    now the ones. 7 + 5 + 0 = 2 carry 1. let us go on with the tens. 2 + 4 + 1 = 7 carry 0. so the answer is 72.

Every column of a sum leaves two things to decide: the digit after "=" and the one after "carry". All else is copied, follows from
what stands there already, or is talk. A solution earns +1 for every decision that is right, the first mistake costs 1, and nothing counts
after it: the rest follows from a wrong number. A mistake made in copying costs 1 as well, where it first shows: in a decision that comes
out wrong, or in the answer. So here, unlike in `tisdpo.synthetic`, the same token is worth something in one place and costs something
in another, only the numbers around it decide, and the answer can be checked: `is_right`.

The chosen response of a pair is right; the rejected one has one wrong digit and what follows from it. The talk in both is drawn alike. A
base model learns from solutions in which every column goes wrong with probability `slip`.
"""

import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from tisdpo.errors import InputError
from tisdpo.world import SPECIAL, KnownTruth, check_split, words

COLUMNS = ("ones", "tens", "hundreds", "thousands")
POSITIVE_PROMPT = "you are a careful clerk."
NEGATIVE_PROMPT = "you are a careless clerk."
HELDOUT_SHARE = 0.1  # of all sums
PROMPTS = 500  # that `prompts` gives

_STEP = "{a} + {b} + {carry} = {digit} carry {next}."
_ANSWER = "{so} the answer is {sum}."
_REMARKS = (
    "{now} {we} look at the {column}.",
    "{let} go on with the {column}.",
    "the {column} {come} {first}.",
    "this is {easy} {work}, {friend}.",
    "i {like} {numbers} on a {quiet} {monday}.",
)
_WORDS = {
    "so": ("so", "then", "thus"),
    "now": ("now", "here", "next"),
    "we": ("we", "i", "you"),
    "let": ("let us", "please", "i will", "time to"),
    "come": ("come", "follow"),
    "first": ("here", "now", "next"),
    "easy": ("easy", "hard", "slow", "dull", "honest"),
    "work": ("work", "business", "counting", "labour"),
    "friend": ("friend", "dear", "colleague", "neighbour"),
    "like": ("like", "love", "trust", "enjoy"),
    "numbers": ("numbers", "sums", "figures", "books"),
    "quiet": ("quiet", "rainy", "sunny", "busy", "long"),
    "monday": ("monday", "tuesday", "wednesday", "thursday", "friday"),
}


@dataclass(frozen=True)
class ArithmeticConfig:
    """What the world of sums looks like.

    seed       of everything that is drawn
    digits     of each of the two numbers, 2 to 4: the columns of the sum, and so the number of steps
    slip       share of columns of a base document that go wrong, in the digit or in the carry
    remarks    chance of a remark before every step and before the answer; it says nothing about the sum
    flip       share of pairs whose label is exchanged
    prompted   share of base documents that stand under a system prompt, half of them the positive, half the negative one
    care       how strongly a system prompt shows: the positive one divides the odds of a slip by exp(care), the negative one
               multiplies them by it

    Raises InputError for values that describe no world.
    """

    seed: int = 0
    digits: int = 2
    slip: float = 0.25
    remarks: float = 0.5
    flip: float = 0.0
    prompted: float = 0.5
    care: float = 1.5

    def __post_init__(self):
        if not 2 <= self.digits <= len(COLUMNS):
            raise InputError(f"world: digits={self.digits} must lie between 2 and {len(COLUMNS)}")
        for name, largest in (("slip", 0.9), ("remarks", 1.0), ("flip", 0.5), ("prompted", 1.0)):
            if not 0 <= getattr(self, name) <= largest:
                raise InputError(f"world: {name}={getattr(self, name)} must lie between 0 and {largest}")
        if not 0 <= self.care < math.inf:
            raise InputError(f"world: care={self.care} must be a number of at least 0")


@dataclass(frozen=True)
class Arithmetic(KnownTruth):
    """The world of sums; see the module."""

    config: ArithmeticConfig = field(default_factory=ArithmeticConfig)
    tones = (POSITIVE_PROMPT, NEGATIVE_PROMPT)
    numbers = True
    verifiable = True

    # Text

    def documents(self, count: int) -> list[dict[str, str]]:
        rng, c = self._rng("documents"), self.config
        rows = []
        for _ in range(count):
            tone = rng.choice((1, -1)) if rng.random() < c.prompted else 0
            odds = c.slip / (1 - c.slip) * math.exp(-tone * c.care)
            a, b = self._problem(rng, "train")
            slips = {column for column in range(c.digits) if rng.random() < odds / (1 + odds)}
            system = {1: POSITIVE_PROMPT, -1: NEGATIVE_PROMPT, 0: ""}[tone]
            rows.append({"system": system, "prompt": _prompt(a, b), "completion": self._solution(rng, a, b, slips)})
        return rows

    def pairs(self, count: int, split: str = "train") -> list[dict[str, str]]:
        check_split(split)
        rng, c = self._rng(f"pairs {split}"), self.config
        rows = []
        for _ in range(count):
            a, b = self._problem(rng, split)
            right, wrong = self._solution(rng, a, b, ()), self._solution(rng, a, b, {rng.randrange(c.digits)})
            if rng.random() < c.flip:
                right, wrong = wrong, right
            rows.append({"prompt": _prompt(a, b), "chosen": right, "rejected": wrong})
        return rows

    def prompts(self, split: str = "heldout") -> list[str]:
        check_split(split)
        rng, found = self._rng(f"prompts {split}"), {}
        while len(found) < PROMPTS:
            found[_prompt(*self._problem(rng, split))] = None
        return list(found)

    def _problem(self, rng: random.Random, split: str) -> tuple[int, int]:
        """Two numbers of a split. The sums held out are the same for every seed, and no digit or column is held out."""
        while True:
            a, b = (rng.randrange(10 ** (self.config.digits - 1), 10**self.config.digits) for _ in range(2))
            if (random.Random(f"{a} + {b}").random() < HELDOUT_SHARE) == (split == "heldout"):
                return a, b

    def _solution(self, rng: random.Random, a: int, b: int, slips: Iterable[int]) -> str:
        """A worked solution with one wrong digit in each of these columns; all that comes after goes on from it."""
        sentences, digits, carry = [], [], 0
        for column, (x, y) in enumerate(self._columns(a, b)):
            after, digit = divmod(x + y + carry, 10)
            if column in slips:
                if rng.random() < 0.5:
                    digit = (digit + rng.randrange(1, 10)) % 10
                else:
                    after = 1 - after
            sentences += self._remark(rng, COLUMNS[column])
            sentences.append(_STEP.format(a=x, b=y, carry=carry, digit=digit, next=after))
            digits.append(digit)
            carry = after
        sentences += self._remark(rng, "answer")
        total = ("1" if carry else "") + "".join(map(str, reversed(digits)))
        sentences.append(_ANSWER.format(so=rng.choice(_WORDS["so"]), sum=total))
        return " ".join(sentences)

    def _remark(self, rng: random.Random, column: str) -> list[str]:
        choices = {name: rng.choice(options) for name, options in _WORDS.items()}
        remark = rng.choice(_REMARKS).format(column=column, **choices)
        return [remark] if rng.random() < self.config.remarks else []

    def _columns(self, a: int, b: int) -> list[tuple[int, int]]:
        """The digits of both numbers, the ones first."""
        return [(a // 10**i % 10, b // 10**i % 10) for i in range(self.config.digits)]

    # Truth

    def reward(self, text: str, prompt: str) -> float:
        """True reward of a response: the sum over its tokens."""
        return math.fsum(self.word_rewards(words(text, numbers=True), words(prompt, numbers=True)))

    def word_rewards(self, response: Iterable[str], prompt: Iterable[str] = ()) -> list[float]:
        """The reward of every word of a response.

        The first digit after "=" in a sentence and the first after "carry" are the decisions of the next column, as long as there is
        one. The digits after "answer" earn nothing, but a first mistake there costs 1. Nothing counts after the first mistake, after the
        answer, after EOS, or to a prompt that asks for no sum.
        """
        response = list(response)
        rewards = [0.0] * len(response)
        numbers = _numbers(prompt)
        if numbers is None:
            return rewards
        decisions, carry = [], 0
        for x, y in self._columns(*numbers):
            carry, digit = divmod(x + y + carry, 10)
            decisions += [("=", str(digit)), ("carry", str(carry))]
        answer, expects = list(str(sum(numbers))), None
        for at, word in enumerate(response):
            if word == "<eos>":
                break
            if word in ("=", "carry", "answer"):
                expects = word
            elif word.isdigit() and expects == "answer":
                if not answer or word != answer.pop(0):
                    rewards[at] = -1.0
                    break
            elif word.isdigit() and expects is not None and decisions:
                kind, value = decisions.pop(0)
                rewards[at] = 1.0 if (kind, value) == (expects, word) else -1.0
                if rewards[at] < 0:
                    break
                expects = None
            elif word == ".":
                if expects == "answer" and len(answer) < len(str(sum(numbers))):
                    rewards[at] = -1.0 if answer else 0.0  # digits are missing
                    break
                expects = None
        return rewards

    def word_answer_is_right(self, response: Iterable[str], prompt: Iterable[str]) -> bool:
        """Whether the first number after "answer", in the same sentence, is the sum."""
        numbers, text = _numbers(prompt), " ".join(response).partition("<eos>")[0]
        found = re.search(r"\banswer\b[^\d.]*((?:\d ?)+)", text)
        return bool(numbers and found) and found[1].replace(" ", "") == str(sum(numbers))

    # Tokens

    def vocabulary(self) -> list[str]:
        texts = [*COLUMNS, "answer", POSITIVE_PROMPT, NEGATIVE_PROMPT, _STEP, _ANSWER, *_REMARKS, "0 1 2 3 4 5 6 7 8 9 + ="]
        texts += [option for options in _WORDS.values() for option in options]
        return [*SPECIAL, *sorted({word for text in texts for word in words(re.sub(r"{\w+}", " ", text), numbers=True)})]


def _prompt(a: int, b: int) -> str:
    return f"{a} + {b} ="


def _numbers(prompt: Iterable[str]) -> tuple[int, int] | None:
    """The two numbers that a prompt (words, maybe with a system prompt in front) wants added."""
    found = re.search(r"((?:\d ?)+)\+ ((?:\d ?)+)=", " ".join(prompt))
    return (int(found[1].replace(" ", "")), int(found[2].replace(" ", ""))) if found else None
