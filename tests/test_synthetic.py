"""The known-truth world: its truth by hand, its text as configured, its tokenizer, and that trivial cues do not give the truth away."""

import hashlib
import json
import math
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

from tisdpo.errors import InputError
from tisdpo.synthetic import BAD, GOOD, NEGATIVE_PROMPT, NEUTRAL, PLACES, POSITIVE_PROMPT, World, WorldConfig, vocabulary, words
from tisdpo.weighting import average_ranks

PEOPLE = {word for people, _ in PLACES.values() for word in people}
DEMO = WorldConfig(sentences=(3, 3), people=0.4, good=0.2, bad=0.2, scale=1.0, tone=2.0)

TRUTH = {  # text: its nonzero rewards by position
    "the gardener was gentle.": {3: 1.0},
    "the gardener was very harsh. the pupil looked warm.": {4: -1.0, 9: 1.0},
    "the gardener was tall.": {},
    "the fountain was gentle.": {},
    "the gardener asked us about the fountain. the fountain was gentle.": {},  # the person is in another sentence
    "the fountain near the gardener was gentle.": {},  # the first noun is what a sentence is about
    "the gardener near the fountain was gentle.": {6: 1.0},
    "the gardener was gentle gentle harsh.": {3: 1.0},  # only the first quality counts
    "the gardener was tall gentle.": {},
    "gentle the gardener was.": {},
    "the gardener was <eos> gentle": {},
    "the gardener was gentle": {3: 1.0},  # an answer cut off
    "": {},
}


def auc(scores: list[float], hits: list[bool]) -> float:
    """Probability that a hit scores higher than another token, ties count half."""
    ranks, hit = average_ranks(torch.tensor(scores)), torch.tensor(hits)
    count = hit.sum().item()
    return (ranks[hit].sum().item() - count * (count - 1) / 2) / (count * (len(hits) - count))


def responses(world: World, count: int = 1500) -> list[list[str]]:
    return [words(row[side]) for row in world.pairs(count) for side in ("chosen", "rejected")]


@pytest.mark.parametrize("text", TRUTH, ids=lambda text: text[:40] or "empty")
def test_truth_by_hand(text):
    world, tokenizer = World(), World().tokenizer()
    expected = [TRUTH[text].get(position, 0.0) for position in range(len(words(text)))]
    assert world.word_rewards(words(text)) == expected
    assert world.token_rewards(tokenizer(text, add_special_tokens=False)["input_ids"]) == expected
    assert world.reward(text) == sum(expected)


def test_eos_special_tokens_and_foreign_ids_carry_nothing():
    world, tokenizer = World(), World().tokenizer()
    ids = tokenizer("the gardener was gentle.", add_special_tokens=False)["input_ids"]
    specials = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, len(tokenizer) + 7, -1]
    assert world.token_rewards([*ids, *specials, tokenizer.eos_token_id]) == [0, 0, 0, 1.0, 0] + [0.0] * 6


def test_reward_scales_the_truth():
    assert World(WorldConfig(reward=2.5)).reward("the cook was gentle. the waiter was harsh. the cook was warm.") == 2.5


def test_the_text_of_a_configuration_never_changes():
    """Published figures belong to these very pairs and documents."""
    world = World(DEMO)
    text = json.dumps([world.documents(50), world.pairs(50), world.pairs(50, "heldout"), world.prompts()])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "dbee33d6059fadd3"
    assert world.pairs(1) == [
        {
            "prompt": "tell me about the market.",
            "chosen": "on monday the market is open. the farmer was very old. the square looked rough.",
            "rejected": "the baker looked plain. the baker was quite slender. the stall was plain.",
        }
    ]


def test_a_draw_depends_on_the_seed_and_on_nothing_drawn_before():
    world = World(WorldConfig(seed=3))
    pairs = world.pairs(40)
    world.documents(10)
    assert world.pairs(40) == pairs == World(WorldConfig(seed=3)).pairs(60)[:40]
    assert pairs != World(WorldConfig(seed=4)).pairs(40)


def test_held_out_questions_are_never_asked_in_training():
    world = World()
    heldout, train = set(world.prompts()), set(world.prompts("train"))
    assert len(heldout) == len(PLACES) and not heldout & train
    assert {row["prompt"] for row in world.pairs(300, "heldout")} == heldout
    assert {row["prompt"] for row in world.pairs(1000)} == train == {row["prompt"] for row in world.documents(1000)}


@pytest.mark.parametrize("flip", [0.0, 0.2])
def test_labels_follow_bradley_terry(flip):
    world = World(WorldConfig(scale=1.5, flip=flip))
    margins = [world.reward(row["chosen"]) - world.reward(row["rejected"]) for row in world.pairs(4000)]
    for gap in (1.0, 2.0):
        found = [margin > 0 for margin in margins if abs(margin) == gap]
        p = 1 / (1 + math.exp(-1.5 * gap))
        p = (1 - flip) * p + flip * (1 - p)
        assert len(found) > 300
        assert abs(sum(found) / len(found) - p) < 4 * math.sqrt(p * (1 - p) / len(found))  # four standard errors


def test_length_says_nothing_unless_labellers_like_it():
    def longer_wins(**settings) -> float:
        signs = [len(words(r["chosen"])) - len(words(r["rejected"])) for r in World(WorldConfig(sentences=(2, 5), **settings)).pairs(3000)]
        return sum(s > 0 for s in signs) / sum(s != 0 for s in signs)

    assert abs(longer_wins() - 0.5) < 0.04
    assert longer_wins(length_bias=0.3) > 0.7  # the rewards still have their say


def test_a_large_scale_decides_every_pair():
    """Labels without noise."""
    world = World(WorldConfig(scale=50.0))
    assert all(world.reward(row["chosen"]) >= world.reward(row["rejected"]) for row in world.pairs(300))


def test_shares_of_sentences_and_qualities():
    world = World(DEMO)
    sentences = [s.split() for row in world.pairs(2000) for s in row["chosen"].rstrip(".").split(". ")]
    described = [s for s in sentences if s[-1] in GOOD + NEUTRAL + BAD]
    about_people = [s for s in described if s[1] in PEOPLE]
    assert len(sentences) == 3 * 2000
    assert abs(len(about_people) / len(sentences) - 0.4) < 0.03
    assert abs((len(described) - len(about_people)) / len(sentences) - 0.25) < 0.03
    things = Counter(s[-1] for s in described if s[1] not in PEOPLE)  # preferences do not touch these
    for group, share in ((GOOD, 0.2), (NEUTRAL, 0.6), (BAD, 0.2)):
        assert abs(sum(things[word] for word in group) / sum(things.values()) - share) < 0.04


def test_system_prompts_show_in_the_documents():
    world = World(DEMO)
    shares = {}
    for row in world.documents(4000):
        counts = shares.setdefault(row["system"], Counter())
        counts.update("good" if word in GOOD else "bad" for word in words(row["completion"]) if word in GOOD + BAD)
    good = {system: counts["good"] / counts.total() for system, counts in shares.items()}
    assert set(good) == {POSITIVE_PROMPT, NEGATIVE_PROMPT, ""}
    assert good[POSITIVE_PROMPT] > 0.95 and good[NEGATIVE_PROMPT] < 0.05 and abs(good[""] - 0.5) < 0.06  # odds e**4, e**-4, 1
    plain = World(WorldConfig(prompted=0.0)).documents(200)
    assert all(row["system"] == "" for row in plain)


def test_no_trivial_cue_tells_which_qualities_carry_reward():
    """Position, rarity and the word itself are blind among the qualities, where the question is decided."""
    world = World(DEMO)
    answers = responses(world)
    frequency = Counter(word for answer in answers for word in answer)
    rows = [
        (position, frequency[word], word in GOOD + BAD, reward != 0)
        for answer in answers
        for position, (word, reward) in enumerate(zip(answer, world.word_rewards(answer)))
        if word in GOOD + NEUTRAL + BAD
    ]
    position, seen, valued, hits = (list(column) for column in zip(*rows))
    assert 0.01 < sum(hits) / sum(map(len, answers)) < 0.05
    assert 0.45 < auc([float(p) for p in position], hits) < 0.55
    # knowing the list of the 16 words is not knowing the tokens: over a third of their places carry nothing
    worth = [hit for hit, value in zip(hits, valued) if value]
    assert 0.5 < sum(worth) / len(worth) < 0.7
    # neutral words are more frequent than good and bad ones in this configuration: even so, rarity leaves people and things mixed
    among = [(-float(s), hit) for s, value, hit in zip(seen, valued, hits) if value]
    assert 0.35 < auc([s for s, _ in among], [hit for _, hit in among]) < 0.65


def test_tokenizer_round_trip_and_ids(tmp_path):
    world = World(WorldConfig(sentences=(2, 5)))
    tokenizer = world.tokenizer()
    assert len(tokenizer) == len(vocabulary()) == len(set(vocabulary()))
    assert tokenizer.convert_ids_to_tokens(list(range(4))) == ["<pad>", "<bos>", "<eos>", "<unk>"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2, 3)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    for row in world.pairs(200):
        ids = tokenizer(row["chosen"])["input_ids"]
        assert tokenizer.unk_token_id not in ids + tokenizer(row["prompt"])["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", *words(row["chosen"])]
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["chosen"]
        assert loaded(row["chosen"])["input_ids"] == ids


def test_prompt_and_completion_meet_at_a_token_boundary():
    tokenizer = World().tokenizer()
    row = World().pairs(1)[0]
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = tokenizer(row["chosen"], add_special_tokens=False)["input_ids"]
    for joint in (row["prompt"] + row["chosen"], row["prompt"] + " " + row["chosen"]):
        assert tokenizer(joint)["input_ids"] == prompt + completion


def test_messages_and_text_are_the_same_ids():
    tokenizer = World().tokenizer()
    row = World().pairs(1)[0]
    user, answer = {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}
    system = {"role": "system", "content": POSITIVE_PROMPT}

    def ids(messages):
        return tokenizer.apply_chat_template(messages, return_dict=False)

    completion = [*tokenizer(row["chosen"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert ids([user]) == tokenizer(row["prompt"])["input_ids"]
    assert ids([user, answer]) == tokenizer(row["prompt"])["input_ids"] + completion
    assert ids([system, user, answer]) == tokenizer(f"{POSITIVE_PROMPT} {row['prompt']}")["input_ids"] + completion
    with pytest.raises(Exception, match="roles are system, user and assistant"):
        ids([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"people": 0.7, "things": 0.5}, "people=0.7 and things=0.5 are shares"),
        ({"good": -0.1}, "good=-0.1 and bad"),
        ({"people": 0.0}, "no token would carry a reward"),
        ({"good": 0.0, "bad": 0.0}, "no token would carry a reward"),
        ({"reward": math.nan}, "no token would carry a reward"),
        ({"sentences": (3, 2)}, "sentences=.*least and the greatest"),
        ({"sentences": (3,)}, "sentences=.*least and the greatest"),
        ({"flip": 0.6}, "flip=0.6 must lie between 0 and 0.5"),
        ({"prompted": 1.5}, "prompted=1.5 must lie between 0 and 1"),
        ({"scale": math.nan}, "scale=nan must be a number of at least 0"),
        ({"tone": -1.0}, "tone=-1.0 must be a number of at least 0"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_describe_no_world(settings, message):
    with pytest.raises(InputError, match=message):
        WorldConfig(**settings)


def test_an_unknown_split_is_named():
    with pytest.raises(InputError, match="'train' or 'heldout', got 'test'"):
        World().pairs(1, split="test")
