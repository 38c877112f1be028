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
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

from tisdpo.errors import InputError

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
GOOD = ("gentle", "warm", "bright", "pleasant")
NEUTRAL = ("quiet", "tall", "small", "old")
BAD = ("rough", "cold", "harsh", "dull")

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

_COPULA = ("was", "seemed", "looked")
_DEGREE = ("", "", "very ", "rather ", "quite ")
_FILLER = (
    "we {went} {there} {before} {noon}.",
    "the {person} {told} us about the {thing}.",
    "there is a {red} {thing} near the {other}.",
    "on {monday} the {place} is {open}.",
)
_WORDS = {
    "went": ("went", "walked", "came", "hurried"),
    "there": ("there", "back", "home", "inside"),
    "before": ("before", "after", "around"),
    "noon": ("noon", "lunch", "dusk", "sunrise"),
    "told": ("told", "asked", "reminded"),
    "red": ("red", "green", "blue", "white"),
    "monday": ("monday", "tuesday", "friday", "sunday"),
    "open": ("open", "closed", "full", "empty"),
}
