"""The known-truth world: its rewards are what the module says, its draws follow the seed, its labels follow Bradley-Terry."""

import math

import pytest
from transformers import AutoTokenizer

from tisdpo.errors import InputError
from tisdpo.synthetic import BAD, GOOD, NEGATIVE_PROMPT, NEUTRAL, POSITIVE_PROMPT, World, WorldConfig, vocabulary, words


def test_only_the_first_quality_of_a_person_counts():
    world = World()
    rewards = dict(
        a=("the gardener was gentle.", 1.0),
        b=("the fountain was gentle.", 0.0),
        c=("the gardener was very rough. the sailor seemed warm.", 0.0),
        d=("the gardener was quiet.", 0.0),
        e=("gentle gentle gentle.", 0.0),
        f=("the gardener was gentle warm bright.", 1.0),
    )
    for text, reward in rewards.values():
        assert world.reward(text) == reward, text


def test_token_rewards_mark_the_word_and_nothing_after_eos():
    world, tokenizer = World(), World().tokenizer()
    ids = tokenizer("the gardener was harsh.", add_special_tokens=False)["input_ids"]
    assert world.token_rewards(ids) == [0, 0, 0, -1, 0]
    assert world.token_rewards([*ids, tokenizer.eos_token_id, *ids]) == [0, 0, 0, -1, 0] + [0] * 6
    assert world.token_rewards([10**6]) == [0]  # whatever a model may produce


def test_everything_follows_the_seed():
    a, b = (World(WorldConfig(seed=s)) for s in (1, 2))
    assert a.pairs(20) == World(WorldConfig(seed=1)).pairs(20) != b.pairs(20)
    a.documents(5)  # other draws change nothing
    assert a.pairs(20) == World(WorldConfig(seed=1)).pairs(20)
    assert a.pairs(20)[:5] == a.pairs(5)


def test_labels_follow_bradley_terry():
    world = World(WorldConfig(scale=1.0, sentences=(3, 3)))
    hits, expected = 0, 0.0
    rows = world.pairs(4000)
    for row in rows:
        gap = abs(world.reward(row["chosen"]) - world.reward(row["rejected"]))
        hits += world.reward(row["chosen"]) > world.reward(row["rejected"])
        expected += 1 / (1 + math.exp(-gap)) if gap else 0
    assert abs(hits - expected) < 4 * math.sqrt(len(rows) / 4)


def test_flipped_labels_lower_the_agreement():
    def agreement(flip):
        world = World(WorldConfig(scale=9.0, flip=flip))
        rows = [(world.reward(r["chosen"]), world.reward(r["rejected"])) for r in world.pairs(1500)]
        decided = [a > b for a, b in rows if a != b]
        return sum(decided) / len(decided)

    assert agreement(0.0) > 0.99
    assert abs(agreement(0.3) - 0.7) < 0.05


def test_important_tokens_are_few_and_not_found_by_length_or_word():
    world = World()
    rows = world.pairs(1500)
    rewards = [r for row in rows for side in ("chosen", "rejected") for r in world.word_rewards(words(row[side]))]
    assert 0.01 < sum(r != 0 for r in rewards) / len(rewards) < 0.1
    longer = [len(words(r["chosen"])) - len(words(r["rejected"])) for r in rows]
    assert abs(sum(longer) / len(longer)) < 0.6
    texts = " ".join(row[side] for row in rows for side in ("chosen", "rejected"))
    carried = [r != 0 for w, r in zip(words(texts), world.word_rewards(words(texts))) if w in GOOD + BAD]
    assert 0.3 < sum(carried) / len(carried) < 0.9  # the same words stand with and without a reward


def test_system_prompts_shift_the_tone():
    world = World(WorldConfig(tone=2.0))
    documents = world.documents(3000)

    def share(system):
        found = [w for d in documents if d["system"] == system for w in words(d["completion"])]
        good, bad = (sum(w in group for w in found) for group in (GOOD, BAD))
        return good / (good + bad)

    assert share(POSITIVE_PROMPT) > 0.8 > 0.6 > share("") > 0.4 > 0.2 > share(NEGATIVE_PROMPT)


def test_heldout_questions_are_never_asked_in_training():
    world = World()
    assert not set(world.prompts("train")) & set(world.prompts("heldout"))
    assert {r["prompt"] for r in world.pairs(200, "heldout")} <= set(world.prompts("heldout"))
    assert not {d["prompt"] for d in world.documents(300)} & set(world.prompts("heldout"))


def test_tokenizer_covers_the_world_and_survives_saving(tmp_path):
    world = World()
    tokenizer = world.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for row in world.pairs(30):
        ids = tokenizer(row["prompt"] + " " + row["chosen"])["input_ids"]
        assert (
            tokenizer.unk_token_id not in ids
            and ids[0] == tokenizer.bos_token_id
            and again(row["prompt"] + " " + row["chosen"])["input_ids"] == ids
        )
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["prompt"] + " " + row["chosen"]
    assert len(tokenizer) == len(vocabulary()) and set(GOOD + NEUTRAL + BAD) <= set(vocabulary())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(people=0.7, things=0.6), "must not be negative nor add up to more than 1"),
        (dict(reward=0.0), "no token would carry a reward"),
        (dict(sentences=(4, 2)), "least and the greatest number of sentences"),
        (dict(flip=0.7), "flip=0.7 must lie between 0 and 0.5"),
        (dict(scale=-1.0), "scale=-1.0 must be a number of at least 0"),
    ],
)
def test_worlds_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        WorldConfig(**fields)
