"""`TISDPOTrainer`: its loss is the reference's, its options have effects, it resumes, it refuses what it cannot use."""

import copy
import math

import datasets
import pytest
import tiny
import torch
from transformers import TrainingArguments

from tisdpo import TISDPOConfig, TISDPOTrainer, reference
from tisdpo.batches import flatten_batch
from tisdpo.data import Counts
from tisdpo.errors import InputError
from tisdpo.fingerprints import model_fingerprint
from tisdpo.hf import load_model, model_inputs
from tisdpo.ops.rows import Tiles
from tisdpo.rows import add_reference_logps, apply_weighting
from tisdpo.scoring import completion_logps
from tisdpo.weighting import Weighting


def trainer(tmp_path, dataset=None, model=None, **options):
    defaults = dict(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    others = ("ref_model", "eval_dataset", "compute_metrics", "compute_loss_func")
    extra = {name: options.pop(name) for name in others if name in options}
    args = TISDPOConfig(**{**defaults, **options})
    return TISDPOTrainer(
        model or tiny.model(),
        args,
        train_dataset=dataset if dataset is not None else tiny.rows(),
        processing_class=tiny.tokenizer(),
        **extra,
    )


def full_logits_loss(policy, ref, batch, weights=None, **options):
    """The loss of a batch from full logits and the oracle."""
    flat = flatten_batch(batch)
    logits, ref_logits = (m(**model_inputs(batch)).logits.flatten(0, 1)[flat.index].double() for m in (policy, ref))
    return reference.tis_dpo_losses(logits, ref_logits, flat.target, flat.cu_seqlens, flat.token_weights, **options).mean()


def batch_of(t, dataset=None, count=4):
    return t.data_collator([t.train_dataset[i] for i in range(count)])


@pytest.mark.parametrize(
    "options",
    [
        dict(method="dpo"),
        dict(),
        dict(kl="reverse"),
        dict(kl="forward", alpha=0.5, detach_chosen_kl=True),
        dict(loss_type="ipo"),
        dict(label_smoothing=0.1),
        dict(loss_type="sigmoid_norm", nll_coef=0.5),
        dict(kl="reverse", nll_coef=0.5),
    ],
    ids=["dpo", "weights", "reverse", "tdpo2", "ipo", "smoothed", "nll", "reverse_nll"],
)
def test_loss_equals_the_oracle_on_full_logits(tmp_path, options):
    dataset = tiny.rows() if options.get("method") == "dpo" else tiny.contrast(tiny.rows())
    ref = tiny.model(seed=1)
    t = trainer(tmp_path, dataset, ref_model=ref, **options)
    batch = batch_of(t)
    names = {
        "loss_type": "loss",
        "kl": "kl",
        "alpha": "alpha",
        "detach_chosen_kl": "detach_chosen_kl",
        "label_smoothing": "label_smoothing",
        "nll_coef": "nll_coef",
    }
    expected = full_logits_loss(t.model, ref, batch, **{names[k]: v for k, v in options.items() if k in names})
    torch.testing.assert_close(t.compute_loss(t.model, batch).double(), expected, rtol=1e-5, atol=1e-6)


def test_first_loss_is_ln_2_and_training_lowers_it(tmp_path):
    t = trainer(tmp_path, method="dpo", max_steps=6)
    t.train()
    losses = [h["loss"] for h in t.state.log_history if "loss" in h]
    assert abs(losses[0] - math.log(2)) < 1e-5
    assert losses[-1] < losses[0]
    assert {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    } <= t.state.log_history[0].keys()


def test_an_nll_is_logged_and_left_out_of_the_check_of_the_first_loss(tmp_path):
    t = trainer(tmp_path, method="dpo", nll_coef=0.5, max_steps=1)
    t.train()
    first = t.state.log_history[0]
    assert first["nll_loss"] > 1 and first["loss"] == pytest.approx(math.log(2) + 0.5 * first["nll_loss"], abs=1e-4)


def test_a_reference_of_another_model_stops_at_the_first_step(tmp_path):
    other = trainer(tmp_path, method="dpo", model=tiny.model(seed=5)).train_dataset
    with pytest.raises(RuntimeError, match=r"they differ by 0\.0\d+ nats times the root .* \(the loss is 0\.687"):
        trainer(tmp_path, other, method="dpo").train()
    trainer(tmp_path, other, method="dpo", sanity_check=False).train()


@pytest.mark.parametrize("beta", [0.01, 1.0])
def test_the_first_step_is_judged_by_its_log_probs_whatever_the_loss(tmp_path, beta):
    """Of IPO with a small beta a rounding of 1e-3 nat a token moves the loss by ten times that a token."""
    options = dict(method="dpo", loss_type="ipo", beta=beta)
    rows = trainer(tmp_path, **options).train_dataset
    for noise, stops in ((1e-4, False), (1e-2, True)):
        moved = {side: [[x + noise for x in logps] for logps in rows[f"{side}_ref_logps"]] for side in ("chosen", "rejected")}
        noisy = rows.remove_columns([f"{side}_ref_logps" for side in moved])
        for side, logps in moved.items():
            noisy = noisy.add_column(f"{side}_ref_logps", logps)
        t = trainer(tmp_path, noisy, **options)
        if stops:
            with pytest.raises(RuntimeError, match="the same model"):
                t.train()
        else:
            t.train()


def test_predict_prepares_its_rows_and_has_the_metrics_of_an_evaluation(tmp_path):
    rows = tiny.rows()
    t = trainer(tmp_path, rows, method="dpo", ref_model=tiny.model(seed=1))
    t.train()
    output = t.predict(rows)
    expected = t.evaluate(rows)
    assert output.predictions is None and abs(output.metrics["test_loss"] - math.log(2)) > 1e-4
    for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert output.metrics[f"test_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-6)
    sft = trainer(tmp_path, rows, method="sft")
    assert sft.predict(rows).metrics["test_loss"] == pytest.approx(sft.evaluate(rows)["eval_loss"], rel=1e-6)
    with pytest.raises(InputError, match=r"must be a datasets\.Dataset, got NoneType"):
        t.predict(None)
    alone = trainer(tmp_path, rows, method="dpo")
    alone.train()
    with pytest.raises(InputError, match="the reference was the policy before training"):
        alone.predict(rows)
    with pytest.raises(InputError, match="have no reference log-probs, and there is no reference model"):  # never the policy itself
        alone.compute_loss(alone.model, alone.data_collator([dict(row) for row in rows.select(range(2))]))


def test_a_reference_that_has_said_all_leaves_the_device(tmp_path, monkeypatch):
    moved, ref = [], tiny.model(seed=1)
    monkeypatch.setattr(ref, "to", lambda device: moved.append(str(device)) or ref)
    t = trainer(tmp_path, method="dpo", ref_model=ref)
    assert "chosen_ref_logps" in t.train_dataset.column_names and moved == ["cpu", "cpu"]  # there, and back to where it was


def test_ligers_own_loss_does_not_take_the_place_of_the_head(tmp_path):
    pytest.importorskip("liger_kernel")
    args = TISDPOConfig(str(tmp_path), use_cpu=True, use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert args.liger_kernel_config == {"rope": False, "fused_linear_cross_entropy": False}
    with pytest.raises(InputError, match="replaces the loss on the head"):
        TISDPOConfig(str(tmp_path), use_cpu=True, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})


def test_adapters_of_a_given_reference_belong_to_its_name():
    peft = pytest.importorskip("peft")
    base = tiny.model()
    plain = model_fingerprint(base)
    ref = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert model_fingerprint(ref) == plain != model_fingerprint(ref, adapters=True)


def test_weights_1_equal_dpo(tmp_path):
    losses = []
    for dataset, options in ((tiny.rows(), dict(method="dpo")), (tiny.contrast(tiny.rows(), value=0.0), dict())):
        t = trainer(tmp_path, dataset, max_steps=3, **options)
        t.train()
        losses.append([h["loss"] for h in t.state.log_history if "loss" in h])
    assert losses[0] == losses[1]


def test_swapped_pairs_are_reverse_dpo(tmp_path):
    t, swapped = (trainer(tmp_path, method="dpo", swap_pairs=s, ref_model=tiny.model(seed=1)) for s in (False, True))
    forward, backward = (x.compute_loss(x.model, batch_of(x), return_outputs=True)[1]["rewards/margins"] for x in (t, swapped))
    torch.testing.assert_close(forward, -backward)


def test_sft_loss_is_the_mean_cross_entropy_of_its_side(tmp_path):
    for side, prompt_loss in (("chosen", False), ("rejected", False), ("chosen", True)):
        t = trainer(tmp_path, method="sft", sft_side=side, sft_prompt_loss=prompt_loss)
        batch = batch_of(t)
        flat = flatten_batch(batch)
        logits = t.model(**model_inputs(batch)).logits.flatten(0, 1)[flat.index]
        torch.testing.assert_close(t.compute_loss(t.model, batch), torch.nn.functional.cross_entropy(logits, flat.target))
        row = t.train_dataset[0]
        counted = len(row[f"{side}_ids"]) + (len(row["prompt_ids"]) - 1 if prompt_loss else 0)
        assert flat.cu_seqlens[1] == counted


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_accumulated_micro_batches_equal_one_batch(tmp_path, method):
    weights = []
    for batch, steps in ((4, 1), (1, 4)):
        t = trainer(
            tmp_path,
            method=method,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
        )
        t.train()
        weights.append(torch.cat([p.detach().flatten() for p in t.model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_metrics_are_means_over_all_pairs_since_the_last_log(tmp_path):
    t = trainer(tmp_path, method="dpo", eval_dataset=tiny.rows(6), per_device_eval_batch_size=4, ref_model=tiny.model(seed=1))
    metrics = t.evaluate()
    t.model.eval()
    with torch.no_grad():
        margins = t.compute_loss(t.model, t.data_collator([t.eval_dataset[i] for i in range(6)]), return_outputs=True)[1]["rewards/margins"]
    assert abs(metrics["eval_rewards/margins"] - margins.mean().item()) < 1e-5
    assert "eval_loss" in metrics


def test_kl_and_weight_metrics(tmp_path):
    t = trainer(tmp_path, tiny.contrast(tiny.rows()), kl="reverse", max_steps=2)
    t.train()
    logged = t.state.log_history[1]
    assert logged["kl/chosen"] > 0 and logged["kl/rejected"] > 0
    assert 0.5 < logged["weights/chosen"] < 5
    assert t.state.log_history[0]["kl/chosen"] == pytest.approx(0, abs=1e-6)


def test_resume_on_other_rows_or_weights_is_refused(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    rows = tiny.contrast(tiny.rows())
    trainer(tmp_path, rows, **options).train()
    trainer(tmp_path, rows, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for other, changed, what in (
        (rows, dict(swap_pairs=True), "order of the pairs"),
        (rows, dict(weighting={"upper": 0.5}), "weights and weighting"),
        (rows.select(range(20)), {}, "token ids and weights"),
        (rows.select(range(len(rows) - 1, -1, -1)), {}, "token ids and weights"),
    ):
        for checkpoint in (str(tmp_path / "checkpoint-2"), True):
            with pytest.raises(InputError, match=f"was trained with other {what}; go on with the same rows"):
                trainer(tmp_path, other, **options, **changed).train(resume_from_checkpoint=checkpoint)
    (tmp_path / "checkpoint-2" / "tisdpo_rows.json").unlink()  # of an older version, or killed before it
    t = trainer(tmp_path, rows, weighting={"upper": 0.5}, **options)
    t.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    t.state.global_step = 9
    t._save_checkpoint(t.model, None)  # as transformers saves when a job is ended from outside
    assert (tmp_path / "checkpoint-9" / "tisdpo_rows.json").exists()


def test_resume_from_another_reference_is_refused(tmp_path):
    options = dict(kl="reverse", max_steps=4, save_strategy="steps", save_steps=2)
    rows = tiny.contrast(tiny.rows())
    trainer(tmp_path, rows, **options).train()
    checkpoint = tmp_path / "checkpoint-2"
    trainer(tmp_path, rows, **options).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(InputError, match=r"with other reference model; .*\(the model that training began with, not the checkpoint's"):
        trainer(tmp_path, rows, model=load_model(str(checkpoint)), **options).train(resume_from_checkpoint=str(checkpoint))


def test_resume_gives_the_same_losses(tmp_path):
    straight = trainer(tmp_path / "a", method="dpo", max_steps=6)
    straight.train()
    first = trainer(tmp_path / "b", method="dpo", max_steps=6, save_strategy="steps", save_steps=3)
    first.train()
    resumed = trainer(tmp_path / "b", method="dpo", max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    expected, actual = ([h["loss"] for h in t.state.log_history if "loss" in h] for t in (straight, resumed))
    assert actual == expected


def test_weights_come_from_the_stored_contrast():
    dataset = apply_weighting(tiny.contrast(tiny.rows()), Weighting(upper=0.5, eos_weight=0.25), tiny.tokenizer().eos_token_id)
    row = dataset[0]
    r = torch.tensor(row["rejected_contrast"])
    torch.testing.assert_close(torch.tensor(row["rejected_weights"])[:-1], torch.exp(-r.clamp(-0.5, 0.5))[:-1])
    assert row["chosen_weights"][-1] == 0.25  # EOS
    assert len(row["chosen_weights"]) == len(row["chosen_ids"])


def test_text_pairs_are_tokenised(tmp_path):
    import datasets

    t = trainer(tmp_path, datasets.Dataset.from_list(tiny.pairs()), method="dpo")
    assert t.train_dataset["chosen_ids"] == tiny.rows()["chosen_ids"]


@pytest.mark.parametrize("kl", [None, "reverse"])
def test_policy_and_reference_have_one_number_format(tmp_path, kl):
    """float32 weights, trained in bfloat16: the first loss is ln 2, and the KL 0, only if the reference is cast as well."""
    t = trainer(tmp_path, tiny.contrast(tiny.rows()), bf16=True, kl=kl, max_steps=2)
    t.train()
    if kl is None:  # a loss of ln 2 cannot tell: the log-probs of so small a model hardly depend on the format
        rows = t.train_dataset
        with torch.autocast("cpu", torch.bfloat16):
            cast = completion_logps(tiny.model(), rows["prompt_ids"][:], rows["chosen_ids"][:], pad_token_id=t.pad_token_id)
        plain = completion_logps(tiny.model(), rows["prompt_ids"][:], rows["chosen_ids"][:], pad_token_id=t.pad_token_id)
        stored = [torch.tensor(x) for x in rows["chosen_ref_logps"]]
        assert all(torch.equal(a, b) for a, b in zip(stored, cast)) and not any(torch.equal(a, b) for a, b in zip(stored, plain))
    first, second = t.state.log_history[:2]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3 if kl is None else 1e-6)
    assert first.get("kl/chosen", 0.0) == 0.0 and second["loss"] < first["loss"]


def test_number_format_of_the_training_decides_about_padding(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("tisdpo.trainer.choose", lambda *args: asked.append(torch.is_autocast_enabled("cpu")) or False)
    for bf16 in (True, False):
        trainer(tmp_path, method="dpo", bf16=bf16)
    assert asked == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_stays_shared_with_its_reference_under_autocast(tmp_path, monkeypatch, dtype):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny.model().to(dtype), config)
    t = trainer(tmp_path, tiny.contrast(tiny.rows()), model=model, kl="reverse", bf16=True, max_steps=1)
    shared = []
    made = Tiles.__init__
    monkeypatch.setattr(Tiles, "__init__", lambda self, *args: made(self, *args) or shared.append(self.shared))
    t.train()
    assert shared and all(shared)
    assert t.state.log_history[0]["kl/chosen"] == 0.0


def test_log_probs_that_a_kl_term_does_not_use_are_named(tmp_path, caplog):
    rows = trainer(tmp_path, method="dpo").train_dataset
    trainer(tmp_path, rows, method="dpo")
    assert "not used" not in caplog.text
    trainer(tmp_path, rows, method="dpo", kl="reverse")
    assert caplog.text.count("the rows' reference log-probs are not used: a KL term needs") == 1


def test_prepared_rows_may_be_evaluated_again(tmp_path):
    t = trainer(tmp_path, tiny.contrast(tiny.rows()), weighting={"upper": 0.5}, eval_dataset=tiny.contrast(tiny.rows(24)), max_steps=1)
    assert t.evaluate(t.eval_dataset)["eval_loss"] == t.evaluate()["eval_loss"]
    own = t.train_dataset.remove_columns(["chosen_contrast", "rejected_contrast"])
    with pytest.raises(InputError, match="the rows carry ready weights, so weighting has no effect"):
        t.evaluate(own)


def test_tokens_across_the_end_of_the_prompt_are_counted_in_the_log(tmp_path, caplog, monkeypatch):
    counts = Counts(read=3, kept=3, moved=2)
    monkeypatch.setattr("tisdpo.rows.tokenize_pairs", lambda dataset, *args, **options: (tiny.rows(3), counts))
    trainer(tmp_path, method="dpo")
    assert "2 with a token across the prompt's end" in caplog.text


def test_dropout_is_off_unless_wanted(tmp_path):
    def dropped(**options):
        model = tiny.model()
        model.extra = torch.nn.Dropout(0.5)
        trainer(tmp_path, method="dpo", model=model, **options)
        return model.extra.p

    assert dropped() == 0.0 and dropped(disable_dropout=False) == 0.5


def test_a_copy_of_the_reference_that_no_row_needs_is_told(tmp_path, caplog):
    rows = tiny.rows()
    for side in ("chosen", "rejected"):
        rows = rows.add_column(f"{side}_ref_logps", [[-1.0] * len(ids) for ids in rows[f"{side}_ids"]])
    for precompute in (None, False):
        t = trainer(tmp_path, rows, method="dpo", precompute_ref=precompute)
        told = "keeps a copy of the model in memory, which none of these rows needs" in caplog.text
        assert told == (t.ref_model is not None) == (precompute is False)


@pytest.mark.parametrize(
    ("options", "dataset", "message"),
    [
        (dict(), lambda: tiny.rows(), "needs rows with chosen_contrast"),
        (dict(method="dpo"), lambda: tiny.contrast(tiny.rows()), "does not use"),
        (dict(method="ppo"), None, "method must be one of"),
        (dict(method="dpo", weighting={"upper": 2}), None, "no effect"),
        (dict(sft_side="both", method="sft"), None, "'chosen' or 'rejected'"),
        (dict(sft_side="rejected"), None, "sft_side has no effect with method='tis-dpo'"),
        (dict(sft_prompt_loss=True, method="dpo"), None, "sft_prompt_loss has no effect with method='dpo'"),
        (dict(precompute_ref=True, method="sft"), None, "precompute_ref of the preference loss has no effect with method='sft'"),
        (dict(kl="reverse", precompute_ref=True), None, "needs the reference's distribution"),
        (dict(remove_unused_columns=True), None, "drop the token weights"),
        (dict(beta=-1.0), None, "beta must be positive"),
        (dict(average_tokens_across_devices=False), None, "average_tokens_across_devices=False has no effect"),
        (dict(label_smoothing_factor=0.1), None, "label_smoothing_factor=0.1 has no effect; use label_smoothing"),
        (dict(method="sft", nll_coef=1.0, loss_type="ipo"), None, "loss, nll_coef of the preference loss has no effect with method='sft'"),
        (
            dict(loss_type=["sigmoid", "sft"]),
            None,
            "loss_type must be one of .*, got sigmoid, sft; for 'sft' beside one of them set nll_coef",
        ),
        (dict(train_sampling_strategy="group_by_length"), None, "looks for input_ids, which pairs do not have; use tokens_per_batch"),
        (dict(compute_metrics=len), None, "compute_metrics has no effect: there are no logits"),
        (dict(compute_loss_func=len), None, "compute_loss_func has no effect"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, options, dataset, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, dataset() if dataset else None, **options)


def test_a_stream_whose_columns_are_not_known(tmp_path):
    stream = datasets.IterableDataset.from_generator(lambda: iter(tiny.pairs(12)))
    assert stream.column_names is None
    t = trainer(tmp_path, stream, method="dpo", eval_dataset=stream)
    assert len(t.train_dataset) == len(t.eval_dataset) == 12
    t.train()
    with pytest.raises(InputError, match="these rows have no reference log-probs, and the reference was the policy before training"):
        t.evaluate(stream)


def test_arguments_of_another_trainer_and_one_model_twice(tmp_path):
    rest = dict(train_dataset=tiny.rows(), processing_class=tiny.tokenizer())
    with pytest.raises(TypeError, match=r"a tisdpo.TISDPOConfig, got transformers.training_args.TrainingArguments; for TRL's"):
        TISDPOTrainer(tiny.model(), TrainingArguments(str(tmp_path)), **rest)
    args, model = TISDPOConfig(str(tmp_path), kl="reverse", method="dpo", use_cpu=True), tiny.model()
    with pytest.raises(InputError, match="model and ref_model are the same object"):
        TISDPOTrainer(model, args, ref_model=model, **rest)
    assert model.lm_head.weight.requires_grad
    with pytest.raises(InputError, match=r"a model, not its name: tisdpo.hf.load_model\('gpt2'\)"):
        TISDPOTrainer("gpt2", args, **rest)
    with pytest.raises(InputError, match="the rows carry chosen_ref_logps already"):
        add_reference_logps(add_reference_logps(tiny.rows(4), model, 0), model, 0)


def test_processing_class_is_required(tmp_path):
    with pytest.raises(InputError, match=r"must be a datasets.Dataset, got list; tisdpo.data.load_pairs makes one"):
        TISDPOTrainer(tiny.model(), TISDPOConfig(str(tmp_path), use_cpu=True), [{"prompt": "a"}], processing_class=tiny.tokenizer())
    with pytest.raises(InputError, match=r"a dataset has splits \(train\); pass one of them, as in rows\['train'\]"):
        TISDPOTrainer(tiny.model(), TISDPOConfig(str(tmp_path), use_cpu=True), {"train": tiny.rows()}, processing_class=tiny.tokenizer())
    with pytest.raises(InputError, match="processing_class is missing"):
        TISDPOTrainer(tiny.model(), TISDPOConfig(output_dir=str(tmp_path)), train_dataset=tiny.rows())


def test_a_copied_model_runs_its_own_forward():
    model = tiny.model()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    ids = torch.tensor([[5, 6, 7]])
    assert twin(ids).logits.abs().sum() == 0 and model(ids).logits.abs().sum() > 0


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    dataset = tiny.rows(4).map(lambda row: {"chosen_ids": [*row["chosen_ids"][:-1], 10**6, row["chosen_ids"][-1]]})
    with pytest.raises(InputError, match="pair 0: chosen_ids holds 1000000, outside of the vocabulary"):
        trainer(tmp_path, dataset, method="dpo")


# What a review found


def losses_of(t) -> list[float]:
    t.train()
    return [entry["loss"] for entry in t.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [dict(), dict(kl="reverse")], ids=["precomputed", "kl"])
def test_lora_takes_its_base_as_reference(tmp_path, options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    dataset = tiny.contrast(tiny.rows())
    t = trainer(tmp_path, dataset, model=peft.get_peft_model(tiny.model(), config), learning_rate=5e-2, **options)
    assert t.ref_model is None  # no second copy
    t.train()
    batch = batch_of(t)
    found = t.compute_loss(t.model, batch)
    expected = full_logits_loss(t.model, tiny.model(), batch, beta=0.1, **({"kl": "reverse"} if options else {}))
    assert abs(found.item() - math.log(2)) > 1e-3  # the adapters have moved
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_several_evaluation_sets_and_prefixes_keep_their_metrics(tmp_path):
    sets = {"a": tiny.rows(24).select(range(4)), "b": tiny.rows(24).select(range(8, 12))}
    t = trainer(tmp_path, method="dpo", eval_dataset=sets, ref_model=tiny.model(seed=1))
    both = t.evaluate()
    alone = {
        name: trainer(tmp_path, method="dpo", eval_dataset=rows, ref_model=tiny.model(seed=1)).evaluate() for name, rows in sets.items()
    }
    for name in sets:
        assert both[f"eval_{name}_rewards/margins"] == pytest.approx(alone[name]["eval_rewards/margins"], rel=1e-5)
    assert both["eval_a_rewards/margins"] != both["eval_b_rewards/margins"]
    tested = t.evaluate(sets["b"], metric_key_prefix="test")  # rows without reference log-probs, prepared here
    assert tested["test_rewards/margins"] == pytest.approx(alone["b"]["eval_rewards/margins"], rel=1e-5)


def test_other_rows_are_evaluated_where_workers_stay(tmp_path):
    """The Trainer itself would take the loader of the first rows."""
    options = dict(dataloader_num_workers=1, dataloader_persistent_workers=True)
    a, b = tiny.rows(24).select(range(4)), tiny.rows(24).select(range(8, 12))
    alone = trainer(tmp_path, method="dpo", eval_dataset=b, ref_model=tiny.model(seed=1)).evaluate()
    t = trainer(tmp_path, method="dpo", eval_dataset=a, ref_model=tiny.model(seed=1), **options)
    first = t.evaluate()
    assert t.evaluate(b)["eval_rewards/margins"] == pytest.approx(alone["eval_rewards/margins"], rel=1e-5)
    assert t.evaluate()["eval_rewards/margins"] == first["eval_rewards/margins"] != alone["eval_rewards/margins"]


def test_new_rows_after_training_need_a_reference(tmp_path):
    t = trainer(tmp_path, method="dpo")
    t.train()
    with pytest.raises(InputError, match="the reference was the policy before training"):
        t.evaluate(tiny.rows().select(range(4)))


def test_attention_dropout_is_off_as_well(tmp_path):
    model = tiny.model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    model.model.layerdrop = 0.5
    assert losses_of(trainer(tmp_path, method="dpo", model=model))[0] == pytest.approx(math.log(2), abs=1e-5)
    assert model.model.layerdrop == 0
    noisy = tiny.model()
    for layer in noisy.model.layers:
        layer.self_attn.attention_dropout = 0.3
    first = losses_of(trainer(tmp_path, method="dpo", model=noisy, disable_dropout=False))[0]
    assert first != pytest.approx(math.log(2), abs=1e-6)  # wanted, so the first loss is not checked
    first = losses_of(trainer(tmp_path, method="dpo", neftune_noise_alpha=20.0))[0]
    assert first != pytest.approx(math.log(2), abs=1e-6)


def test_sft_cuts_ready_ids_and_checks_them(tmp_path, caplog):
    rows = tiny.rows()
    longest = max(len(p) for p in rows["prompt_ids"])
    t = trainer(tmp_path, rows, method="sft", max_length=longest + 3)
    assert max(len(p) + len(c) for p, c in zip(t.train_dataset["prompt_ids"], t.train_dataset["chosen_ids"])) <= longest + 3
    shortest = min(len(p) for p in rows["prompt_ids"])
    left = trainer(tmp_path, rows, method="sft", max_length=shortest + 1).train_dataset
    assert 0 < len(left) < len(rows) and "have no completion within max_length" in caplog.text
    bad = rows.remove_columns("chosen_ids").add_column("chosen_ids", [[10**6]] * len(rows))
    with pytest.raises(InputError, match="row 0: 1000000 is no token id of this model"):
        trainer(tmp_path, bad, method="sft")
