"""Scoring: the contrast is that of full logits, is resumable bit for bit, and its diagnostics say what is wrong."""

import pytest
import tiny
import torch

from tisdpo import parts
from tisdpo.contrastive import Scorer, rank_correlation, score_contrast, system_prompts, weight_diagnostics
from tisdpo.errors import InputError
from tisdpo.scoring import completion_logps, plan_batches
from tisdpo.weighting import Weighting


def plain_logps(model, prompt, completion):
    logps = model(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
    return torch.stack([logps[len(prompt) + t - 1, token] for t, token in enumerate(completion)])


def score(tmp_path, rows, **options):
    scorers = (Scorer(tiny.model(1)), Scorer(tiny.model(2)))
    return score_contrast(rows, *scorers, pad_token_id=0, parts=tmp_path / "parts", **options)


def test_contrast_is_the_difference_of_full_log_probs(tmp_path):
    rows = tiny.rows(6)
    scored = score(tmp_path, rows, batch_tokens=200)
    positive, negative = tiny.model(1), tiny.model(2)
    for row in scored:
        for side in ("chosen", "rejected"):
            expected = plain_logps(positive, row["prompt_ids"], row[f"{side}_ids"]) - plain_logps(
                negative, row["prompt_ids"], row[f"{side}_ids"]
            )
            torch.testing.assert_close(torch.tensor(row[f"{side}_contrast"]), expected, rtol=1e-4, atol=1e-5)


def test_killed_scoring_goes_on_and_gives_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_TOKENS", 150)
    rows = tiny.rows(12)
    whole = score(tmp_path / "whole", rows, batch_tokens=200)
    done, real = [], parts.Scoring._score

    def dies_at_the_third(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args)

    monkeypatch.setattr(parts.Scoring, "_score", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path, rows, batch_tokens=200)
    done.clear()
    monkeypatch.setattr(parts.Scoring, "_score", lambda *args: (done.append(1), real(*args))[1])
    resumed = score(tmp_path, rows, batch_tokens=200)
    files = len(list((tmp_path / "parts").rglob("*.safetensors")))
    assert files > 3 and len(done) == files - 2  # the first two were not computed again
    assert resumed["chosen_contrast"] == whole["chosen_contrast"] and resumed["rejected_contrast"] == whole["rejected_contrast"]


def test_parts_of_other_models_are_not_used(tmp_path):
    rows = tiny.rows(4)
    first = score(tmp_path, rows)
    other = score_contrast(rows, Scorer(tiny.model(2)), Scorer(tiny.model(1)), pad_token_id=0, parts=tmp_path / "parts")
    torch.testing.assert_close(torch.tensor(other[0]["chosen_contrast"]), -torch.tensor(first[0]["chosen_contrast"]))


def test_system_prompts_change_the_prompt_and_keep_the_completion(tmp_path):
    rows, tokenizer = tiny.rows(5), tiny.tokenizer()
    prompts = system_prompts(tiny.pairs(24), rows, tokenizer, "you are a friendly writer.")
    extra = tokenizer("you are a friendly writer.")["input_ids"]
    assert [len(p) for p in prompts] == [len(p) + len(extra) - 1 for p in rows["prompt_ids"]]  # one BOS
    model = tiny.model(1)
    scored = score_contrast(rows, Scorer(model, prompts), Scorer(model), pad_token_id=0, parts=tmp_path / "parts")
    row = scored[0]
    expected = plain_logps(model, prompts[0], row["chosen_ids"]) - plain_logps(model, row["prompt_ids"], row["chosen_ids"])
    torch.testing.assert_close(torch.tensor(row["chosen_contrast"]), expected, rtol=1e-4, atol=1e-5)


def test_completion_logps_keep_the_order_and_the_models_mode():
    model = tiny.model(1).train()
    rows = tiny.rows(6)
    logps = completion_logps(model, rows["prompt_ids"], rows["chosen_ids"], pad_token_id=0, batch_tokens=100)
    assert model.training
    for row, values in zip(rows, logps):
        torch.testing.assert_close(values, plain_logps(model, row["prompt_ids"], row["chosen_ids"]), rtol=1e-4, atol=1e-5)


def test_batches_hold_every_sequence_once_within_the_budget():
    lengths = [5, 9, 1, 30, 9, 2, 7]
    batches = plan_batches(lengths, 20)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert batches[0] == [3]  # longer than the budget: alone
    assert all(max(lengths[i] for i in b) * len(b) <= 20 for b in batches[1:])


def scored_rows(chosen, rejected):
    return {"chosen_contrast": chosen, "rejected_contrast": rejected}


@pytest.mark.parametrize(
    ("rows", "finding"),
    [
        (scored_rows([[0.01, 0.0, -0.01]] * 3, [[0.0, 0.01, 0.0]] * 3), "almost uniform"),
        (scored_rows([[9.0, -9.0, 9.0, -9.0]] * 3, [[0.3, -0.2, 0.1, 0.2]] * 3), "nearly two-valued"),
        (scored_rows([[1.4, 1.3, 1.4]] * 3, [[1.4, 1.2, 1.3]] * 3), "side carries"),
        (scored_rows([[-0.4, 0.1, 0.5, 0.9]] * 3, [[0.2, -0.3, 0.1, 0.0]] * 3), "late tokens carry"),
    ],
)
def test_findings_name_the_known_failures(rows, finding):
    assert any(finding in sentence for sentence in weight_diagnostics(rows)["findings"])


def test_healthy_weights_give_no_finding():
    g = torch.Generator().manual_seed(0)
    rows = scored_rows(*[[(0.6 * torch.randn(9, generator=g)).tolist() for _ in range(50)] for _ in range(2)])
    assert weight_diagnostics(rows)["findings"] == []


def test_diagnostics_by_hand():
    d = weight_diagnostics(scored_rows([[-1.0, 0.0], [2.0]], [[0.0, 0.0], [0.0]]), Weighting())["chosen"]
    w = torch.exp(torch.tensor([-0.5, 0.0, 1.5], dtype=torch.float64))
    assert d["mean"] == pytest.approx(w.mean().item(), rel=1e-6)
    assert d["clipped_low"] == d["clipped_high"] == pytest.approx(1 / 3)
    assert d["ess"] == pytest.approx((w.sum() ** 2 / (3 * (w**2).sum())).item(), rel=1e-6)
    assert d["tokens"] == 3


def test_clipping_is_that_of_the_rule():
    """exp clamps the contrast, scale the signed one, ranks nothing."""
    rows = scored_rows([[3.0, -3.0, 3.0]], [[3.0, 0.0, 0.0]])
    found = {}
    for name in ("exp", "scale", "rank", "equal"):
        d = weight_diagnostics(rows, Weighting(transform=name))
        found[name] = [(round(3 * d[side]["clipped_low"]), round(3 * d[side]["clipped_high"])) for side in ("chosen", "rejected")]
        assert any("at the clamp" in text for text in d["findings"]) == (name in ("exp", "scale"))
    assert found["exp"] == [(1, 2), (0, 1)] and found["scale"] == [(1, 2), (1, 0)]
    assert found["rank"] == found["equal"] == [(0, 0), (0, 0)]


def test_rank_correlation():
    scipy = pytest.importorskip("scipy.stats")
    a, b = torch.randn(40).round(decimals=1), torch.randn(40).round(decimals=1)
    assert rank_correlation(a, b) == pytest.approx(scipy.spearmanr(a, b).statistic)
    assert rank_correlation(torch.ones(4), torch.arange(4.0)) == 0


def test_changed_completions_are_refused(monkeypatch):
    rows = tiny.rows(3)
    broken = [{**p, "chosen": p["chosen"] + " quiet"} for p in tiny.pairs(24)]
    broken = [{**p, "chosen": "quiet " + p["chosen"]} for p in broken]
    with pytest.raises(InputError, match="tokenised differently"):
        system_prompts(broken, rows, tiny.tokenizer(), "you are a friendly writer.")
