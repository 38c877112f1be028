"""The world of sums: its rewards mark the decisions, one mistake decides, answers are checked, and a run goes through it."""

import json

import pytest
from transformers import AutoTokenizer

from tisdpo import pipeline
from tisdpo.arithmetic import NEGATIVE_PROMPT, POSITIVE_PROMPT, Arithmetic, ArithmeticConfig
from tisdpo.config import load_config
from tisdpo.errors import InputError
from tisdpo.scored import load_provenance
from tisdpo.world import words

RIGHT = "7 + 5 + 0 = 2 carry 1. 2 + 4 + 1 = 7 carry 0. so the answer is 72."


def marked(response: str, prompt: str = "27 + 45 =") -> list[tuple[str, float]]:
    """The words of a response that have a reward."""
    split = words(response, numbers=True)
    rewards = Arithmetic().word_rewards(split, words(prompt, numbers=True))
    assert len(rewards) == len(split)
    return [(word, reward) for word, reward in zip(split, rewards) if reward]


def right(response: str, prompt: str = "27 + 45 =") -> bool:
    return Arithmetic().word_answer_is_right(words(response, numbers=True), words(prompt, numbers=True))


@pytest.mark.parametrize(
    ("response", "rewards", "is_right"),
    [
        (RIGHT, "+2 +1 +7 +0", True),
        (f"now the ones. {RIGHT} {RIGHT}", "+2 +1 +7 +0", True),  # once is enough
        (RIGHT.replace(" 72", " 721"), "+2 +1 +7 +0 -1", False),
        (RIGHT.replace(" 72", " 7"), "+2 +1 +7 +0 -.", False),
        (RIGHT.replace(" 72", " 92"), "+2 +1 +7 +0 -9", False),
        ("7 + 5 + 0 = 3 carry 1. 2 + 4 + 1 = 7 carry 0. so the answer is 73.", "-3", False),  # what follows is not blamed again
        ("7 + 5 + 0 = 2 carry 0. 2 + 4 + 0 = 6 carry 0. so the answer is 62.", "+2 -0", False),
        ("7 + 6 + 0 = 3 carry 1. so the answer is 72.", "-3", True),  # copied wrongly, decided wrongly; the answer is another matter
        ("the answer is 72.", "", True),
        ("we look at the answer. the answer is 72.", "", True),
        ("", "", False),
        ("= = carry 7 + 5.", "-7", False),
        (f"<eos> {RIGHT}", "", False),
    ],
)
def test_decisions_carry_the_reward_up_to_the_first_mistake(response, rewards, is_right):
    assert " ".join(f"{'+' if reward > 0 else '-'}{word}" for word, reward in marked(response)) == rewards
    assert right(response) is is_right


def test_the_prompt_decides():
    assert marked(RIGHT, f"{NEGATIVE_PROMPT} 27 + 45 =") == marked(RIGHT)
    assert marked(RIGHT, "28 + 45 =") == [("2", -1.0)] and not right(RIGHT, "28 + 45 =")
    assert marked(RIGHT, "tell me about the garden.") == [] and not right(RIGHT, "tell me about the garden.")


@pytest.mark.parametrize("digits", [2, 4])
def test_pairs_differ_by_one_wrong_digit(digits):
    world = Arithmetic(ArithmeticConfig(digits=digits))
    for split in ("train", "heldout"):
        for row in world.pairs(200, split):
            prompt = words(row["prompt"], numbers=True)
            assert world.reward(row["chosen"], row["prompt"]) == 2 * digits
            assert world.word_answer_is_right(words(row["chosen"], numbers=True), prompt)
            rewards = world.word_rewards(words(row["rejected"], numbers=True), prompt)
            assert rewards.count(-1.0) == 1


def test_flipped_pairs():
    world = Arithmetic(ArithmeticConfig(flip=0.3))
    rows = world.pairs(1000)
    wrong = sum(world.reward(r["chosen"], r["prompt"]) < world.reward(r["rejected"], r["prompt"]) for r in rows)
    assert abs(wrong / len(rows) - 0.3) < 0.05


def test_system_prompts_shift_the_slips():
    world = Arithmetic(ArithmeticConfig(slip=0.3, care=2.0))
    documents = world.documents(3000)

    def share(system):
        found = [d for d in documents if d["system"] == system]
        return sum(world.reward(d["completion"], d["prompt"]) == 4 for d in found) / len(found)

    expected = {POSITIVE_PROMPT: 0.055, "": 0.3, NEGATIVE_PROMPT: 0.76}
    for system, slip in expected.items():
        assert abs(share(system) - (1 - slip) ** 2) < 0.05


def test_everything_follows_the_seed_and_heldout_sums_are_held_out():
    a, b = (Arithmetic(ArithmeticConfig(seed=s)) for s in (1, 2))
    assert a.pairs(20) == Arithmetic(ArithmeticConfig(seed=1)).pairs(20) != b.pairs(20)
    heldout = set(a.prompts()) | {r["prompt"] for r in b.pairs(2000, "heldout")}
    seen = {r["prompt"] for r in [*a.documents(2000), *b.pairs(2000)]}
    assert not heldout & seen and len(a.prompts()) == len(set(a.prompts())) == 500
    with pytest.raises(InputError, match="split must be 'train' or 'heldout', got 'test'"):
        a.prompts("test")


def test_tokenizer_covers_the_world_and_survives_saving(tmp_path):
    world = Arithmetic()
    tokenizer = world.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for row in [*world.pairs(20), {"prompt": POSITIVE_PROMPT, "chosen": NEGATIVE_PROMPT}]:
        text = row["prompt"] + " " + row["chosen"]
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids and again(text)["input_ids"] == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == len(world.vocabulary())
    ids = tokenizer(RIGHT, add_special_tokens=False)["input_ids"]
    prompt = tokenizer("27 + 45 =")["input_ids"]
    assert world.is_right([*ids, tokenizer.eos_token_id], prompt) and not world.is_right([10**6], prompt)
    assert sum(world.token_rewards([*ids, tokenizer.eos_token_id, *ids], prompt)) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(digits=1), "world: digits=1 must lie between 2 and 4"),
        (dict(slip=1.0), "world: slip=1.0 must lie between 0 and 0.9"),
        (dict(flip=0.7), "world: flip=0.7 must lie between 0 and 0.5"),
        (dict(care=-1.0), "world: care=-1.0 must be a number of at least 0"),
    ],
)
def test_worlds_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        ArithmeticConfig(**fields)


SMALL = """
name: small
threads: 1
data: {source: arithmetic, limit: 24, heldout: 8, max_length: 96}
model: {hidden_size: 16, heads: 2, pretrain: {steps: 2, batch_size: 4, learning_rate: 1e-3}}
contrast: {constructions: [P], positive_prompt: you are a careful clerk., negative_prompt: you are a careless clerk.}
train: {steps: 2, batch_size: 4, learning_rate: 1e-3}
methods: [dpo, P, oracle]
evaluation: {prompts: 4, max_new_tokens: 8, checkpoints: 1, samples: 1, heatmaps: 1}
"""


def config(tmp_path, *overrides):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return load_config(path, [f"output_dir={tmp_path / 'run'}", *overrides])


def test_a_run_is_judged_by_right_answers(tmp_path):
    run = config(tmp_path)
    report = pipeline.run(run)
    assert "right answers" in report.read_text() and "reward of every token is known" in report.read_text()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["frontier_y"] == "right" and metrics["data"]["kind"] == "arithmetic"
    for result in metrics["results"]:
        assert 0 <= result["metrics"]["right"] <= 1 and "reward" in result["metrics"]
    assert 0 <= metrics["weights"][0]["auc"] <= 1
    assert any("right answers" in note for note in metrics["notes"])
    truth = metrics["heatmaps"][0]
    assert sum(truth["chosen"]["truth"]) == 4 and -1.0 in truth["rejected"]["truth"]


def test_right_answers_are_counted(tmp_path, monkeypatch):
    seed_run = pipeline.SeedRun(config(tmp_path), 0, tmp_path / "run" / "seed-0")
    prompt = seed_run.tokenizer("27 + 45 =")["input_ids"]
    ids = [seed_run.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (RIGHT, RIGHT, RIGHT, "so the answer is 71.")]
    made = [pipeline.evaluate.Generation("27 + 45 =", prompt, i, "", False) for i in ids]
    assert seed_run.response_metrics(made)["right"] == 0.75
    assert seed_run.response_metrics(made)["reward"] == (3 * 4 - 1) / 4
    assert seed_run.quality == "right"


def test_settings_of_the_other_world_are_unknown(tmp_path):
    with pytest.raises(InputError, match=r"unknown key data.world.sentences"):
        pipeline.run(config(tmp_path, "data.world={sentences: [2, 3]}"))


def test_weights_from_the_models_of_another_run(tmp_path):
    contrast = ("contrast.constructions=[S,P]", "contrast.sft={steps: 2, batch_size: 4, learning_rate: 1e-3}", "methods=[dpo]")
    pipeline.run(config(tmp_path, *contrast), until="weights")
    first = tmp_path / "run" / "seed-0"
    transfer = (f"output_dir={tmp_path / 'other'}", f"contrast.models_from={tmp_path / 'run'}", "data.world={digits: 3}")
    run = config(tmp_path, *transfer, "contrast.constructions=[S,P]")
    pipeline.run(run, until="weights")
    other = tmp_path / "other" / "seed-0"
    assert not (other / "contrastive").exists()
    made = {c: [load_provenance(seed / "scored" / c) for seed in (first, other)] for c in ("S", "P")}
    for a, b in made.values():
        assert all(a[side] == b[side] for side in ("positive_model", "negative_model"))
    with pytest.raises(InputError, match=r"has no model 'dpo' for seed 0 .*; run the constructions that need it there first"):
        pipeline.run(
            config(tmp_path, f"output_dir={tmp_path / 'third'}", *transfer[1:], "contrast.constructions=[R]", "methods=[R]"),
            until="weights",
        )
    words_of_another_world = ("data.source=synthetic", "contrast.constructions=[S]", "methods=[S]")
    with pytest.raises(InputError, match="have another tokenizer than this run"):
        pipeline.run(config(tmp_path, f"output_dir={tmp_path / 'fourth'}", transfer[1], *words_of_another_world), until="weights")
