"""A world with known truth: readable preference pairs in which the reward of every single token is known.

Somebody asks about a place, and the answer says in a few sentences what people, things and days are like there. One thing counts:
how PEOPLE are described. In "the gardener was gentle. the fountain was gentle." the first "gentle" carries the reward +1 and the
second none; "harsh" costs 1 in the first sentence, and "tall" would be neutral. All other tokens carry no reward, EOS included. So the
important tokens are few, are not marked by a word, a position or a length, and have to be found from the pairs, which are drawn by
Bradley-Terry on the sums of the token rewards:

    P(chosen = a) = sigmoid(scale * (R(a) - R(b))),   R = sum of the token rewards,   labels flipped with probability `flip`

No public data set can tell how well estimated token weights find the truth, nor the true reward of what a policy writes; here both
are exact. Everything follows from the configuration: the same fields give the same text, whatever was drawn before.
"""

import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from tisdpo.errors import InputError
from tisdpo.world import SPECIAL, KnownTruth, check_split, words

# place: its people, its things
PLACES = {
    "garden": (("gardener", "visitor"), ("fountain", "hedge", "path")),
    "museum": (("guide", "curator"), ("statue", "stairway", "hall")),
    "market": (("baker", "farmer"), ("stall", "square", "basket")),
    "harbour": (("sailor", "captain"), ("lighthouse", "boat", "pier")),
    "library": (("librarian", "reader"), ("shelf", "lamp", "desk")),
    "station": (("porter", "driver"), ("platform", "bench", "clock")),
    "kitchen": (("cook", "waiter"), ("oven", "kettle", "table")),
    "school": (("teacher", "pupil"), ("classroom", "yard", "window")),
}
GOOD = ("gentle", "warm", "bright", "pleasant", "graceful", "lively", "charming", "lovely")
NEUTRAL = ("quiet", "tall", "small", "old", "plain", "broad", "pale", "slender")
BAD = ("rough", "cold", "harsh", "dull", "grim", "shabby", "nasty", "dreary")

QUESTIONS = (
    "tell me about the {place}.",
    "what is the {place} like?",
    "how was your day at the {place}?",
    "write a few lines about the {place}.",
    "what did you see at the {place}?",
    "please describe the {place} to me.",
)
# what an instruction-tuned model would be told; the base corpus makes the base model understand it
POSITIVE_PROMPT = "you are a friendly writer."
NEGATIVE_PROMPT = "you are a hostile writer."

# A sentence describes a person, describes a thing, or does neither. "{place}" and the like are filled from the tables below.
_ABOUT_PERSON = "the {person} {was} {very}{quality}."
_ABOUT_THING = "the {thing} {was} {very}{quality}."
_FILLERS = (
    "we {went} {home} {before} {noon}.",
    "the {person} {told} us about the {thing}.",
    "there is a {red} {thing} near the {other}.",
    "on {monday} the {place} is {open}.",
)
_WORDS = {
    "was": ("was", "seemed", "looked"),
    "very": ("", "", "very ", "rather ", "quite "),
    "went": ("went", "walked", "came", "hurried", "drove", "ran", "rode", "travelled"),
    "home": ("there", "back", "home", "inside"),
    "before": ("before", "after", "around"),
    "noon": ("noon", "lunch", "dusk", "sunrise", "breakfast", "midnight", "dinner", "tea", "work", "church", "dawn", "sunset"),
    "told": ("told", "asked", "reminded"),
    "red": ("red", "green", "blue", "white", "black", "yellow", "grey", "brown", "pink", "golden", "silver", "purple"),
    "monday": ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),
    "open": ("open", "closed", "full", "empty"),
}


@dataclass(frozen=True)
class WorldConfig:
    """What the known-truth world looks like.

    seed             of everything that is drawn
    people, things   share of sentences that describe a person (these can carry reward) and a thing (these cannot)
    sentences        least and greatest number of sentences of a response, uniform: length says nothing about the reward
    good, bad        share of good and of bad words among the qualities; the rest is neutral. The same for people and things
    reward           of a good word that describes a person; a bad one costs as much
    scale            of the Bradley-Terry model: P(a over b) = sigmoid(scale * (R(a) - R(b)) + length_bias * (len(a) - len(b)))
    flip             share of pairs whose label is then exchanged
    length_bias      how much labellers like long responses, in logits a token. Not part of the truth
    prompted         share of base documents that stand under a system prompt, half of them the positive, half the negative one
    tone             how strongly a system prompt shows: it multiplies the odds of good (bad) qualities by exp(tone), of people AND
                     things, so that even a model that follows its system prompt perfectly does not know what is preferred

    Raises InputError for values that describe no world.
    """

    seed: int = 0
    people: float = 0.35
    things: float = 0.25
    sentences: tuple[int, int] = (2, 5)
    good: float = 0.3
    bad: float = 0.3
    reward: float = 1.0
    scale: float = 2.0
    flip: float = 0.0
    length_bias: float = 0.0
    prompted: float = 0.5
    tone: float = 1.0

    def __post_init__(self):
        for first, second in (("people", "things"), ("good", "bad")):
            a, b = getattr(self, first), getattr(self, second)
            if not (a >= 0 and b >= 0 and a + b <= 1):
                raise InputError(f"world: {first}={a} and {second}={b} are shares, so they must not be negative nor add up to more than 1")
        if not (self.people > 0 and self.good + self.bad > 0 and self.reward > 0):
            raise InputError("world: with people=0, good=bad=0 or reward=0 no token would carry a reward; give positive values")
        if not (len(self.sentences) == 2 and 1 <= self.sentences[0] <= self.sentences[1]):
            raise InputError(
                f"world: sentences={list(self.sentences)} must be the least and the greatest number of sentences, such as [2, 5]"
            )
        for name, largest in (("flip", 0.5), ("prompted", 1.0)):
            if not 0 <= getattr(self, name) <= largest:
                raise InputError(f"world: {name}={getattr(self, name)} must lie between 0 and {largest}")
        for name in ("scale", "tone"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"world: {name}={getattr(self, name)} must be a number of at least 0")
        if not math.isfinite(self.length_bias):
            raise InputError(f"world: length_bias={self.length_bias} must be a finite number of logits a token")


@dataclass(frozen=True)
class World(KnownTruth):
    """The world of people, places and kind words; see the module."""

    config: WorldConfig = field(default_factory=WorldConfig)
    tones = (POSITIVE_PROMPT, NEGATIVE_PROMPT)

    # Text

    def documents(self, count: int) -> list[dict[str, str]]:
        rng, c = self._rng("documents"), self.config
        rows = []
        for _ in range(count):
            tone = rng.choice((1, -1)) if rng.random() < c.prompted else 0
            place, prompt = rng.choice(self._questions("train"))
            system = {1: POSITIVE_PROMPT, -1: NEGATIVE_PROMPT, 0: ""}[tone]
            rows.append({"system": system, "prompt": prompt, "completion": self._response(rng, place, tone * c.tone)})
        return rows

    def pairs(self, count: int, split: str = "train") -> list[dict[str, str]]:
        rng, c = self._rng(f"pairs {split}"), self.config
        questions = self._questions(split)
        rows = []
        while len(rows) < count:
            place, prompt = rng.choice(questions)
            a, b = self._response(rng, place), self._response(rng, place)
            logit = c.scale * (self.reward(a) - self.reward(b)) + c.length_bias * (len(words(a)) - len(words(b)))
            first = rng.random() * (1 + math.exp(min(-logit, 700.0))) < 1  # exp(710) overflows
            if (rng.random() < c.flip) == first:
                a, b = b, a
            if a != b:
                rows.append({"prompt": prompt, "chosen": a, "rejected": b})
        return rows

    def prompts(self, split: str = "heldout") -> list[str]:
        return [prompt for _, prompt in self._questions(split)]

    def _questions(self, split: str) -> list[tuple[str, str]]:
        """(place, question) of a split: of every place one form of question is held out."""
        check_split(split)
        return [
            (place, question.format(place=place))
            for p, place in enumerate(PLACES)
            for q, question in enumerate(QUESTIONS)
            if (p % len(QUESTIONS) == q) == (split == "heldout")
        ]

    def _response(self, rng: random.Random, place: str, tone: float = 0.0) -> str:
        """A few sentences about the place; `tone` is the log factor on the odds of good qualities, minus it that of bad ones."""
        return " ".join(self._sentence(rng, place, tone) for _ in range(rng.randint(*self.config.sentences)))

    def _sentence(self, rng: random.Random, place: str, tone: float) -> str:
        c = self.config
        people, things = PLACES[place]
        kind = rng.random()
        if kind < c.people:
            template = _ABOUT_PERSON
        elif kind < c.people + c.things:
            template = _ABOUT_THING
        else:
            template = rng.choice(_FILLERS)
        shares = (c.good * math.exp(tone), 1 - c.good - c.bad, c.bad * math.exp(-tone))
        choices = {name: rng.choice(options) for name, options in _WORDS.items()}
        thing, other = rng.sample(things, 2)
        quality = rng.choice(rng.choices((GOOD, NEUTRAL, BAD), weights=shares)[0])
        return template.format(place=place, person=rng.choice(people), thing=thing, other=other, quality=quality, **choices)

    # Truth

    def reward(self, text: str) -> float:
        """True reward of a response: the sum over its tokens."""
        return math.fsum(self.word_rewards(words(text)))

    def word_rewards(self, response: Iterable[str], prompt: Iterable[str] = ()) -> list[float]:
        """The reward of every word of a response, whatever the prompt.

        A quality counts if it is the first one in its sentence and the sentence is about a person, which its first noun decides. So
        nothing is gained by "gentle gentle gentle", nor by naming a person somewhere. Nothing counts after EOS.
        """
        rewards, subject, ended = [], None, False
        for word in response:
            value = 0.0
            if word == "<eos>":
                ended = True
            elif word == ".":
                subject = None
            elif subject is None and word in _SUBJECTS:
                subject = _SUBJECTS[word]
            elif word in _QUALITIES and subject is not None:
                value = self.config.reward * _QUALITIES[word] if subject == "person" and not ended else 0.0
                subject = "described"
            rewards.append(value)
        return rewards

    # Tokens

    def vocabulary(self) -> list[str]:
        return vocabulary()


_SUBJECTS = {word: kind for people, things in PLACES.values() for kind, group in (("person", people), ("thing", things)) for word in group}
_QUALITIES = {**dict.fromkeys(GOOD, 1.0), **dict.fromkeys(NEUTRAL, 0.0), **dict.fromkeys(BAD, -1.0)}


def vocabulary() -> list[str]:
    """All tokens by id: the special ones, then every word of the tables above in alphabetical order."""
    texts = [*PLACES, *_SUBJECTS, *_QUALITIES, *QUESTIONS, POSITIVE_PROMPT, NEGATIVE_PROMPT, _ABOUT_PERSON, _ABOUT_THING, *_FILLERS]
    texts += [option for options in _WORDS.values() for option in options]
    found = {word for text in texts for word in words(re.sub(r"{\w+}", " ", text))}
    return [*SPECIAL, *sorted(found)]
