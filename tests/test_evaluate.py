"""Evaluation against plain computations on full logits, brute-force counts and scipy; generation against itself."""

import dataclasses
import math
import random

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tisdpo import evaluate
from tisdpo.errors import InputError
from tisdpo.evaluate import Generation

PAD, BOS, EOS, UNK, SEP = range(5)
WORDS = [f"w{i}" for i in range(18)]
VOCABULARY = ["<pad>", "<bos>", "<eos>", "<unk>", "<sep>", *WORDS]
CONTEXT = 40


def make_tokenizer(*, bos=True, sep=False, eos=True):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if sep:
        core.post_processor = processors.TemplateProcessing(
            single="$A <sep>", pair="$A <sep> $B:1 <sep>:1", special_tokens=[("<sep>", SEP)]
        )
    elif bos:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>"}
    special |= {"eos_token": "<eos>"} if eos else {}
    special |= {"sep_token": "<sep>", "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]} if sep else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def llama_config(**changes):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return LlamaConfig(
        **{"vocab_size": len(VOCABULARY), "max_position_embeddings": CONTEXT, "initializer_range": 0.4, **sizes, **special, **changes}
    )


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**changes)).eval()


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small lose far more than they gain by a second thread, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def policy():
    return make_model(1)


@pytest.fixture(scope="module")
def reference():
    return make_model(2)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def random_ids(rng, least, most):
    return [rng.randrange(5, len(VOCABULARY)) for _ in range(rng.randint(least, most))]


def make_rows(pairs=7, seed=0):
    rng = random.Random(seed)
    return Dataset.from_list(
        [
            {
                "prompt_ids": [BOS, *random_ids(rng, 1, 6)],
                "chosen_ids": [*random_ids(rng, 0, 9), EOS],
                "rejected_ids": [*random_ids(rng, 0, 9), EOS],
            }
            for _ in range(pairs)
        ]
    )


@torch.no_grad()
def full_logps(model, prompt, completion):
    """Log-distributions [completion, V] from the whole logits of one unpadded sequence, float64."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    return logits.double().log_softmax(-1)[len(prompt) - 1 : -1]


def full_sum(model, prompt, completion):
    return full_logps(model, prompt, completion).gather(1, torch.tensor(completion)[:, None]).sum().item()


# Held-out preferences


def test_completion_logps_are_those_of_full_logits_in_any_batching(policy):
    rows = make_rows()
    prompts, completions = list(rows["prompt_ids"]), list(rows["chosen_ids"])
    for batch_tokens in (1, 37, 4096):
        found = evaluate.completion_logps(policy, prompts, completions, pad_token_id=PAD, batch_tokens=batch_tokens)
        for prompt, completion, logps in zip(prompts, completions, found, strict=True):
            expected = full_logps(policy, prompt, completion).gather(1, torch.tensor(completion)[:, None])[:, 0]
            assert logps.dtype == torch.float32
            torch.testing.assert_close(logps.double(), expected, atol=1e-5, rtol=0)


def test_preference_metrics_are_those_of_full_logits(policy, reference):
    rows = make_rows(pairs=9)
    margins, longer = [], []
    for row in rows:
        ratio = {
            side: full_sum(policy, row["prompt_ids"], row[side]) - full_sum(reference, row["prompt_ids"], row[side])
            for side in ("chosen_ids", "rejected_ids")
        }
        margins.append(ratio["chosen_ids"] - ratio["rejected_ids"])
        chosen, rejected = len(row["chosen_ids"]), len(row["rejected_ids"])
        longer.append(1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0)
    found = evaluate.preference_metrics(policy, reference, rows, pad_token_id=PAD, beta=0.3)
    assert found["accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 9) and 0 < found["accuracy"] < 1
    assert found["margin"] == pytest.approx(0.3 * sum(margins) / 9, abs=1e-5)
    assert found["longer_wins"] == pytest.approx(sum(longer) / 9)
    assert found["accuracy_by_length"] == pytest.approx(max(sum(longer) / 9, 1 - sum(longer) / 9))
    assert found["length_chosen"] == pytest.approx(sum(len(c) for c in rows["chosen_ids"]) / 9)
    assert found["length_rejected"] == pytest.approx(sum(len(r) for r in rows["rejected_ids"]) / 9)
    assert found["n"] == 9


def test_reference_logps_of_the_rows_serve_without_the_reference(policy, reference):
    rows = make_rows()
    scored = rows
    for side in ("chosen", "rejected"):
        logps = evaluate.completion_logps(reference, list(rows["prompt_ids"]), list(rows[f"{side}_ids"]), pad_token_id=PAD)
        scored = scored.add_column(f"{side}_ref_logps", [x.tolist() for x in logps])
    with_model = evaluate.preference_metrics(policy, reference, rows, pad_token_id=PAD)
    assert evaluate.preference_metrics(policy, None, scored, pad_token_id=PAD) == with_model
    with pytest.raises(InputError, match="carry no chosen_ref_logps"):
        evaluate.preference_metrics(policy, None, rows, pad_token_id=PAD)


def test_the_reference_itself_ties_every_pair(reference):
    found = evaluate.preference_metrics(reference, reference, make_rows(), pad_token_id=PAD)
    assert found["accuracy"] == 0.5 and found["margin"] == 0.0


def test_no_pairs_is_an_input_error(policy):
    with pytest.raises(InputError, match="no held-out pairs"):
        evaluate.preference_metrics(policy, policy, make_rows().select([]), pad_token_id=PAD)


# Generation

PROMPTS = ["w1 w2 w3 w4 w5", "w7", "w3 w9", "w11 w12 w13 w1 w2 w3 w4", "w7 w7 w7", "w0"]


def test_left_padding_changes_nothing(policy, tokenizer):
    together = evaluate.generate(policy, tokenizer, PROMPTS, max_new_tokens=12, temperature=0)
    alone = [evaluate.generate(policy, tokenizer, [prompt], max_new_tokens=12, temperature=0)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({tuple(g.ids) for g in together}) > 1
    for generation in together:  # the most likely token at every step of the whole, unpadded sequence
        logps = full_logps(policy, generation.prompt_ids, generation.ids)
        assert logps.argmax(-1).tolist() == generation.ids


def test_samples_depend_on_the_seed_alone(policy, tokenizer):
    first = evaluate.generate(policy, tokenizer, PROMPTS, max_new_tokens=10, seed=3)
    assert evaluate.generate(policy, tokenizer, PROMPTS, max_new_tokens=10, seed=3) == first
    assert evaluate.generate(policy, tokenizer, PROMPTS, max_new_tokens=10, seed=3, batch_size=2) == first
    assert [g.ids for g in evaluate.generate(policy, tokenizer, PROMPTS, max_new_tokens=10, seed=4)] != [g.ids for g in first]
    same_prompt = evaluate.generate(policy, tokenizer, ["w1"] * 6, max_new_tokens=10, seed=3)
    assert len({tuple(g.ids) for g in same_prompt}) > 1


def test_generation_keeps_order_ids_and_the_world_as_it_was(policy, tokenizer):
    policy.train()
    own = policy.generation_config
    state, seen = torch.get_rng_state(), []
    generations = evaluate.generate(policy, tokenizer, PROMPTS, max_new_tokens=6, batch_size=4, progress=seen.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.training and policy.generation_config is own
    policy.eval()
    assert seen == [4, 2]
    assert [g.prompt for g in generations] == PROMPTS
    assert [g.prompt_ids for g in generations] == [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    from_ids = evaluate.generate(policy, tokenizer, [g.prompt_ids for g in generations], max_new_tokens=6)
    assert from_ids == generations


def test_eos_ends_a_response_and_is_part_of_its_ids(tokenizer):
    model = make_model(5, initializer_range=0.1)  # almost uniform: EOS comes early in some responses and not in others
    generations = evaluate.generate(model, tokenizer, PROMPTS * 6, max_new_tokens=12, seed=1)
    assert {g.finished for g in generations} == {True, False}
    for g in generations:
        assert EOS not in g.ids[:-1]
        assert g.finished == (g.ids[-1] == EOS)
        assert g.finished or len(g.ids) == 12
        assert g.text == tokenizer.decode(g.ids, skip_special_tokens=True) and "<eos>" not in g.text


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_models_distribution(policy, tokenizer, temperature):
    n = 4000
    generations = evaluate.generate(policy, tokenizer, ["w1 w2"] * n, max_new_tokens=1, temperature=temperature, batch_size=1000)
    counts = torch.tensor([g.ids[0] for g in generations]).bincount(minlength=len(VOCABULARY)).double()
    p = (full_logps(policy, generations[0].prompt_ids, [0])[0] / temperature).softmax(-1)
    chi_squared = ((counts - n * p) ** 2 / (n * p)).sum().item()
    degrees = len(VOCABULARY) - 1
    assert chi_squared < degrees + 4 * math.sqrt(2 * degrees)  # four standard deviations of a chi-squared variable


def test_the_models_own_generation_settings_do_not_shape_the_samples(tokenizer):
    model = make_model(1)
    plain = evaluate.generate(model, tokenizer, PROMPTS, max_new_tokens=10)
    model.generation_config = GenerationConfig(repetition_penalty=5.0, suppress_tokens=[7, 8, 9], no_repeat_ngram_size=1, eos_token_id=9)
    assert evaluate.generate(model, tokenizer, PROMPTS, max_new_tokens=10) == plain


def test_bad_input_to_generation(policy, tokenizer):
    with pytest.raises(InputError, match=f"prompt 1 has 39 tokens.*{CONTEXT} positions"):
        evaluate.generate(policy, tokenizer, ["w1", [7] * 39], max_new_tokens=2)
    with pytest.raises(InputError, match="prompt 0 has no tokens"):
        evaluate.generate(policy, tokenizer, [[]], max_new_tokens=2)
    with pytest.raises(InputError, match="no EOS token"):
        evaluate.generate(policy, make_tokenizer(eos=False), ["w1"], max_new_tokens=2)
    with pytest.raises(InputError, match="max_new_tokens"):
        evaluate.generate(policy, tokenizer, ["w1"], max_new_tokens=0)
    assert evaluate.generate(policy, tokenizer, [], max_new_tokens=2) == []


# Responses and KL


def response(ids, finished=True, prompt="w1 w2", prompt_ids=(BOS, 6, 7)):
    text = " ".join(VOCABULARY[i] for i in ids if i != EOS)
    return Generation(prompt, list(prompt_ids), list(ids), text, finished)


def test_response_metrics():
    generations = [response([8, 9, EOS]), response([8, EOS]), response([5] * 7, finished=False)]
    assert evaluate.response_metrics(generations) == {"length": 4.0, "finished": 2 / 3}
    found = evaluate.response_metrics(generations, reward=lambda g: float(len(g.text.split())))  # 2, 1, 7
    assert found["reward"] == pytest.approx(10 / 3)
    assert found["reward_se"] == pytest.approx(math.sqrt(31 / 3) / math.sqrt(3))  # sample variance 31/3
    assert evaluate.response_metrics(generations[:1], reward=lambda g: 2.5)["reward_se"] is None
    with pytest.raises(InputError, match=r"reward of response 1 .* is nan"):
        evaluate.response_metrics(generations, reward=lambda g: math.nan if len(g.ids) == 2 else 0.0)
    with pytest.raises(InputError, match="no responses"):
        evaluate.response_metrics([])


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_kl_is_that_of_full_logits(policy, tokenizer, batch_tokens):
    wider = make_model(2, hidden_size=24)  # the reference may have another hidden size
    generations = evaluate.generate(policy, tokenizer, PROMPTS, max_new_tokens=9, seed=2)
    sums, tokens = [], 0
    for g in generations:
        p, q = full_logps(policy, g.prompt_ids, g.ids), full_logps(wider, g.prompt_ids, g.ids)
        sums.append((p.exp() * (p - q)).sum().item())
        tokens += len(g.ids)
    found = evaluate.kl_to_reference(policy, wider, generations, pad_token_id=PAD, batch_tokens=batch_tokens)
    sums = torch.tensor(sums, dtype=torch.float64)
    assert found["kl"] == pytest.approx(sums.mean().item(), rel=1e-5)
    assert found["kl_se"] == pytest.approx(sums.std().item() / math.sqrt(len(sums)), rel=1e-4)
    assert found["kl_per_token"] == pytest.approx(sums.sum().item() / tokens, rel=1e-5)


def test_kl_estimates_what_log_ratios_estimate(tokenizer):
    policy, reference = make_model(3, initializer_range=0.25), make_model(4, initializer_range=0.25)
    generations = evaluate.generate(policy, tokenizer, ["w1 w2"] * 400, max_new_tokens=3, batch_size=200)
    found = evaluate.kl_to_reference(policy, reference, generations, pad_token_id=PAD)
    prompts, responses = [g.prompt_ids for g in generations], [g.ids for g in generations]
    ours, theirs = (evaluate.completion_logps(m, prompts, responses, pad_token_id=PAD) for m in (policy, reference))
    ratios = torch.stack([(a - b).sum() for a, b in zip(ours, theirs)]).double()
    noise = ratios.std().item() / math.sqrt(len(ratios))
    assert found["kl_se"] < noise  # Rao-Blackwell
    assert abs(found["kl"] - ratios.mean().item()) < 4 * noise


def test_kl_of_the_reference_is_zero_and_leaves_nothing_behind(reference, policy):
    generations = [response([8, 9, 10, EOS]), response([5, EOS])]
    found = evaluate.kl_to_reference(reference, reference, generations, pad_token_id=PAD)
    assert abs(found["kl"]) < 1e-6 and abs(found["kl_per_token"]) < 1e-6
    assert evaluate.kl_to_reference(policy, reference, generations[:1], pad_token_id=PAD)["kl_se"] is None
    assert all(p.grad is None for m in (policy, reference) for p in m.parameters())


def test_kl_to_another_vocabulary_is_an_input_error(policy):
    other = make_model(2, vocab_size=len(VOCABULARY) + 3)
    with pytest.raises(InputError, match="vocabularies of 23 and 26"):
        evaluate.kl_to_reference(policy, other, [response([8, EOS])], pad_token_id=PAD)


# Known truth


def brute_force_auc(scores, positive):
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, p in zip(scores, positive) if p for b, q in zip(scores, positive) if not q]
    return sum(wins) / len(wins)


@pytest.mark.parametrize("ties", [False, True])
def test_truth_agreement_counts_pairs_and_correlates_ranks(ties):
    stats = pytest.importorskip("scipy.stats")
    g = torch.Generator().manual_seed(5)
    truth = torch.randint(-4, 5, (200,), generator=g).float()
    truth = truth * (truth.abs() > 2)
    contrast = truth + 2 * torch.randn(200, generator=g)
    if ties:
        contrast = contrast.round()
    found = evaluate.truth_agreement(contrast, truth)
    scores = contrast.abs().tolist()
    assert found["auc"] == pytest.approx(brute_force_auc(scores, (truth != 0).tolist()), abs=1e-12)
    positive, negative = contrast.abs()[truth != 0], contrast.abs()[truth == 0]
    assert found["auc"] == pytest.approx(stats.mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)), abs=1e-12)
    assert found["spearman"] == pytest.approx(stats.spearmanr(contrast, truth).statistic, abs=1e-12)
    assert 0.5 < found["auc"] < 1 and 0 < found["spearman"] < 1


def test_truth_agreement_where_it_is_not_defined():
    contrast = torch.tensor([0.5, -1.0, 2.0])
    assert evaluate.truth_agreement(contrast, torch.zeros(3)) == {"auc": None, "spearman": None}
    everywhere = evaluate.truth_agreement(contrast, torch.tensor([1.0, -1.0, 2.0]))
    assert everywhere["auc"] is None and everywhere["spearman"] == pytest.approx(1.0)
    assert evaluate.truth_agreement(torch.ones(3), torch.tensor([1.0, 0.0, 0.0])) == {"auc": 0.5, "spearman": None}
    assert evaluate.truth_agreement(torch.empty(0), torch.empty(0)) == {"auc": None, "spearman": None}
    with pytest.raises(ValueError, match="got 3 and 2"):
        evaluate.truth_agreement(contrast, torch.zeros(2))
    with pytest.raises(ValueError, match="finite"):
        evaluate.truth_agreement(torch.tensor([math.nan]), torch.zeros(1))


# Reward models


def save_classifier(path, *, labels=1, model_class=LlamaForSequenceClassification, tokenizer=None, config=None):
    torch.manual_seed(7)
    model = model_class(config or llama_config(num_labels=labels)).eval()
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return model


def logits_of(model, ids, **inputs):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), **inputs).logits[0]


@pytest.mark.parametrize("labels", [1, 2])
def test_reward_model_reads_prompt_response_and_eos(tmp_path, tokenizer, labels):
    model = save_classifier(tmp_path, labels=labels, tokenizer=tokenizer)
    reward = evaluate.load_reward_model(str(tmp_path))
    logits = logits_of(model, [BOS, 6, 7, 8, 9, EOS])
    expected = logits[0] if labels == 1 else logits[1] - logits[0]
    generation = response([8, 9, EOS], prompt="w1 w2 ")
    assert reward(generation) == pytest.approx(expected.item(), abs=1e-5)
    assert evaluate.response_metrics([generation], reward)["reward"] == pytest.approx(expected.item(), abs=1e-5)
    assert reward(response([8, 10, EOS], prompt="w1 w2 ")) != reward(generation)


def test_reward_model_with_a_chat_template_reads_messages(tmp_path):
    tokenizer = make_tokenizer(bos=False)
    tokenizer.chat_template = "{% for m in messages %}{{ '<bos> ' if m.role == 'user' else '<sep> ' }}{{ m.content }} {% endfor %}"
    model = save_classifier(tmp_path, tokenizer=tokenizer)
    reward = evaluate.load_reward_model(str(tmp_path))
    assert reward(response([8, 9, EOS])) == pytest.approx(logits_of(model, [BOS, 6, 7, SEP, 8, 9]).item(), abs=1e-5)
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2", "name": None}, {"role": "user", "content": "w1 w1"}]
    asked = dataclasses.replace(response([8, 9, EOS]), messages=talk)  # what the policy read, not its text without the special tokens
    assert reward(asked) == pytest.approx(logits_of(model, [BOS, 6, SEP, 7, BOS, 6, 6, SEP, 8, 9]).item(), abs=1e-5)


def test_encoder_reward_model_reads_a_pair_of_texts(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.4}
    config = BertConfig(vocab_size=len(VOCABULARY), num_labels=1, pad_token_id=PAD, max_position_embeddings=8, **sizes)
    model = save_classifier(tmp_path, model_class=BertForSequenceClassification, tokenizer=make_tokenizer(sep=True), config=config)
    reward = evaluate.load_reward_model(str(tmp_path))
    expected = logits_of(model, [6, 7, SEP, 8, 9, SEP], token_type_ids=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    assert reward(response([8, 9, EOS])) == pytest.approx(expected.item(), abs=1e-5)
    with pytest.raises(InputError, match=r"has 9 tokens for the reward model .* at most 8"):
        reward(response([8, 9, 10, 11, 12, EOS]))


def test_reward_models_that_cannot_be_used(tmp_path, tokenizer):
    def load(name):
        return evaluate.load_reward_model(str(tmp_path / name))

    with pytest.raises(InputError, match=r"no reward model could be loaded from .*nowhere"):
        load("nowhere")
    make_model().save_pretrained(tmp_path / "language-model")
    with pytest.raises(InputError, match=r"no trained reward model: score\.weight is missing"):
        load("language-model")
    save_classifier(tmp_path / "three", labels=3, tokenizer=tokenizer)
    with pytest.raises(InputError, match="has 3 labels"):
        load("three")
    save_classifier(tmp_path / "bare")
    with pytest.raises(InputError, match="no tokenizer could be loaded"):
        load("bare")
    save_classifier(tmp_path / "torn", tokenizer=tokenizer)
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match=r"no reward model could be loaded from .*torn"):
        load("torn")
