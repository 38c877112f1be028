"""`tisdpo.integrations.trl`: with weights 1 TRL's own losses, step by step; with weights and KL this library's; nothing ignored."""

from pathlib import Path

import datasets
import pytest
import torch
import transformers

trl = pytest.importorskip("trl", reason="needs the extra trl")

import test_trl_oracle as oracle  # noqa: E402

import tisdpo  # noqa: E402
from tisdpo import Objective  # noqa: E402
from tisdpo.errors import InputError  # noqa: E402
from tisdpo.hf import attach_head  # noqa: E402
from tisdpo.integrations.trl import TISDPOConfig, TISDPOTrainer, WeightedCollator  # noqa: E402
from tisdpo.rows import add_reference_logps  # noqa: E402
from tisdpo.scored import load_scored, make_provenance, save_scored  # noqa: E402

BETA = oracle.BETA
PLAIN = dict(report_to="none", use_cpu=True, gradient_checkpointing=False, disable_tqdm=True)


def tokenizer():
    return oracle.trl_trainer_tokenizer()


def arguments(tmp_path, **options):
    usual = {"beta": BETA, "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2, "bf16": False}
    return dict(output_dir=str(tmp_path), save_strategy="no", lr_scheduler_type="constant", **PLAIN, **{**usual, **options})


def weighted(rows=None, value=None, kind="contrast"):
    """The pairs with one number for every token that TRL makes of them, EOS included."""
    rows = oracle.pairs() if rows is None else rows
    for side in ("chosen", "rejected"):
        lengths = [
            len(tokenizer()(p + text + "t1").input_ids) - len(tokenizer()(p).input_ids) for p, text in zip(rows["prompt"], rows[side])
        ]
        values = [[value if value is not None else 0.3 * ((i + n) % 5) - 0.5 for i in range(n)] for n in lengths]
        rows = rows.add_column(f"{side}_{kind}", values)
    return rows


def trained(trainer) -> list[dict]:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def trainer(tmp_path, rows, **options):
    args = TISDPOConfig(**arguments(tmp_path, **options))
    return TISDPOTrainer(oracle.tiny_model(1), oracle.tiny_model(2), args, train_dataset=rows, processing_class=tokenizer())


@pytest.mark.parametrize("name", oracle.LOSSES)
def test_equals_trl_step_by_step(name, tmp_path):
    options = oracle.LOSSES[name][0]
    args = trl.DPOConfig(**arguments(tmp_path, **options))
    theirs = trained(
        trl.DPOTrainer(oracle.tiny_model(1), oracle.tiny_model(2), args, train_dataset=oracle.pairs(), processing_class=tokenizer())
    )
    runs = {
        "dpo": trainer(tmp_path, oracle.pairs(), method="dpo", **options),
        "weights one": trainer(tmp_path, weighted(value=1.0, kind="weights"), **options),
        "equal": trainer(tmp_path, weighted(), weighting={"transform": "equal"}, **options),
    }
    for label, run in runs.items():
        ours = trained(run)
        assert len(ours) == len(theirs) == 3
        for a, b in zip(ours, theirs):
            for key in (
                "loss",
                "rewards/chosen",
                "rewards/rejected",
                "rewards/margins",
                "rewards/accuracies",
                "logps/chosen",
                "num_tokens",
            ):
                assert a[key] == pytest.approx(b[key], rel=2e-4, abs=2e-5), f"{label}: {key}"


@pytest.mark.parametrize("kl", [None, "reverse", "forward"])
def test_weights_and_kl_are_this_librarys(kl, tmp_path):
    run = trainer(tmp_path, weighted(), kl=kl, alpha=0.7 if kl else 1.0, max_steps=1, per_device_train_batch_size=3)
    batch = run.data_collator(list(run.train_dataset))
    found = run._compute_loss(run.model, dict(batch), return_outputs=False)
    hidden, target, cu_seqlens = oracle.flat(run.model, batch)
    ref_hidden = oracle.flat(run.ref_model, batch)[0].detach()
    order = torch.arange(6).reshape(2, -1).T.flatten()
    weights = batch["token_weights"][order][:, 1:][batch["completion_mask"][order][:, 1:].bool()]
    assert weights.std() > 0.1
    expected = tisdpo.linear_tis_dpo_loss(
        hidden, run.model.lm_head.weight, target, cu_seqlens, token_weights=weights, ref_hidden=ref_hidden,
        ref_weight=run.ref_model.lm_head.weight.detach(), objective=Objective(beta=BETA, kl=kl, alpha=0.7 if kl else 1.0),
    ).loss  # fmt: skip
    torch.testing.assert_close(found, expected)
    logged = trained(run)[0]
    assert ("kl/chosen" in logged) == (kl is not None) and {"weights/chosen", "weights/rejected"} <= set(logged)
    plain = trained(trainer(tmp_path, oracle.pairs(), method="dpo", max_steps=1, per_device_train_batch_size=3))[0]
    assert abs(logged["loss"] - plain["loss"]) > 1e-3


def test_lora_takes_its_base_as_reference(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = arguments(tmp_path, learning_rate=5e-2)
    theirs = trained(trl.DPOTrainer(
        oracle.tiny_model(1), args=trl.DPOConfig(**options), train_dataset=oracle.pairs(), processing_class=tokenizer(), peft_config=config
    ))  # fmt: skip
    run = TISDPOTrainer(
        oracle.tiny_model(1), args=TISDPOConfig(**options, method="dpo"), train_dataset=oracle.pairs(), processing_class=tokenizer(),
        peft_config=config,
    )  # fmt: skip
    ours = trained(run)
    assert ours[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and ours[-1]["loss"] != ours[0]["loss"]
    for a, b in zip(ours, theirs):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4) and a["logps/chosen"] == pytest.approx(b["logps/chosen"], rel=2e-4)
    assert not [n for n, p in run.model.named_parameters() if p.requires_grad and "lora" not in n]


@pytest.mark.parametrize("kl, nll_coef", [("reverse", 0.0), (None, 0.5), ("forward", 0.5)])
def test_lora_with_a_kl_term_or_an_nll(kl, nll_coef, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    args = TISDPOConfig(**arguments(tmp_path, learning_rate=5e-2, kl=kl, nll_coef=nll_coef, per_device_train_batch_size=3))
    run = TISDPOTrainer(oracle.tiny_model(1), args=args, train_dataset=weighted(), processing_class=tokenizer(), peft_config=config)
    assert run.ref_model is None
    first = trained(run)[0]
    assert first["loss"] == pytest.approx(0.693147 + nll_coef * first.get("nll_loss", 0.0), abs=1e-4) and first.get("kl/chosen", 0.0) == 0.0
    batch = run.data_collator(list(run.train_dataset))
    hidden, target, cu_seqlens = oracle.flat(run.model.get_base_model(), batch)
    with run.model.disable_adapter():
        ref_hidden = oracle.flat(run.model.get_base_model(), batch)[0].detach()
    order = torch.arange(6).reshape(2, -1).T.flatten()
    weights = batch["token_weights"][order][:, 1:][batch["completion_mask"][order][:, 1:].bool()]
    expected = tisdpo.linear_tis_dpo_loss(
        hidden, run.model.get_base_model().lm_head.weight, target, cu_seqlens, token_weights=weights, ref_hidden=ref_hidden,
        objective=Objective(beta=BETA, kl=kl, nll_coef=nll_coef),
    )  # fmt: skip
    assert abs(expected.logits).min() > 1e-3  # the adapters have moved
    torch.testing.assert_close(run._compute_loss(run.model, dict(batch), return_outputs=False), expected.loss)


def test_the_routers_loss_is_trls(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=len(tokenizer()), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    options, logs = arguments(tmp_path, max_steps=2, router_aux_loss_coef=0.5), []
    for kind, settings in ((trl.DPOTrainer, trl.DPOConfig(**options)), (TISDPOTrainer, TISDPOConfig(**options, method="dpo"))):
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(transformers.MixtralForCausalLM(config))
        run = kind(*models, args=settings, train_dataset=oracle.pairs(), processing_class=tokenizer())
        logs.append(trained(run))
    for theirs, ours in zip(*logs):
        assert ours["aux_loss"] == pytest.approx(theirs["aux_loss"], rel=1e-3) and ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert logs[1][0]["loss"] > 0.6931 + 0.4 * logs[1][0]["aux_loss"]


def test_reference_log_probs_per_token_from_a_cache(tmp_path):
    options = dict(max_steps=2, per_device_train_batch_size=3)
    online = trained(trainer(tmp_path, weighted(), **options))
    cached = trainer(tmp_path, weighted(), precompute_ref_log_probs=True, **options)
    assert len(cached.train_dataset[0]["chosen_ref_logps"]) == len(cached.train_dataset[0]["chosen_ids"])
    for a, b in zip(trained(cached), online):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    rows = cached.train_dataset.select_columns(
        ["prompt_ids", "chosen_ids", "rejected_ids", "chosen_weights", "rejected_weights", "chosen_ref_logps", "rejected_ref_logps"]
    )
    again = trained(trainer(tmp_path, rows, precompute_ref_log_probs=True, **options))  # ready ids, weights and cache
    assert [a["loss"] for a in again] == pytest.approx([b["loss"] for b in online], rel=1e-5)


@pytest.mark.parametrize("precompute", [False, True])
def test_a_second_model_that_no_row_needs_is_named(precompute, tmp_path, caplog):
    oracle.tiny_model(2).save_pretrained(tmp_path / "model")
    rows = scored(tmp_path, reference=oracle.tiny_model(2))
    args = TISDPOConfig(**arguments(tmp_path, precompute_ref_log_probs=precompute))
    run = TISDPOTrainer(str(tmp_path / "model"), args=args, train_dataset=rows, processing_class=tokenizer())
    assert (run.ref_model is None) == precompute
    assert ("set precompute_ref_log_probs=True, then it does not" in caplog.text) == (not precompute)


def scored(tmp_path, reference=None, made_with=None):
    """A scored set of ready ids, with log-probs of the reference if there is one."""
    rows = tisdpo.data.tokenize_pairs(oracle.pairs(), tokenizer(), max_length=64)[0]
    for side in ("chosen", "rejected"):
        rows = rows.add_column(f"{side}_contrast", [[0.1 * i for i in range(len(ids))] for ids in rows[f"{side}_ids"]])
    if reference is not None:
        rows = add_reference_logps(rows, attach_head(reference), tokenizer().pad_token_id)
    how = dict(max_length=64, positive="a", negative="b", how={"construction": "S"}, reference=reference)
    provenance = make_provenance(tokenizer(), **how) | ({} if made_with is None else {"tokenizer": made_with})
    save_scored(rows, tmp_path / "set", provenance)
    return load_scored(tmp_path / "set")


def test_a_scored_set_of_another_tokenizer_or_reference_is_refused(tmp_path, caplog):
    with pytest.raises(InputError, match="tokenizer is 'another' there"):
        trainer(tmp_path, scored(tmp_path / "a", made_with="another"))
    ours = scored(tmp_path / "b", reference=oracle.tiny_model(2))
    logged = trained(trainer(tmp_path, ours, max_steps=1))[0]
    plain = trained(trainer(tmp_path, scored(tmp_path / "c"), max_steps=1))[0]
    assert logged["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    other = scored(tmp_path / "d", reference=oracle.tiny_model(3))
    with pytest.raises(InputError, match=r"reference_model is .* train from the model that was the reference there"):
        trainer(tmp_path, other)
    trainer(tmp_path, other, kl="reverse")  # which does not use them, and says so
    assert caplog.text.count("the rows' reference log-probs are not used") == 1
    with pytest.raises(InputError, match="sync_ref_model has no effect"):
        trainer(tmp_path, ours, sync_ref_model=True)


def test_log_probs_of_another_model_stop_at_the_first_step(tmp_path):
    """Columns of one's own, of which nobody knows whose they are."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    rows = datasets.Dataset.from_dict(scored(tmp_path, reference=oracle.tiny_model(2)).to_dict())

    def run(rows=rows, ref_model=None, **options):
        args = TISDPOConfig(**arguments(tmp_path, max_steps=1, **options))
        kwargs = {} if ref_model else {"peft_config": config}
        return TISDPOTrainer(oracle.tiny_model(1), ref_model, args, train_dataset=rows, processing_class=tokenizer(), **kwargs)

    with pytest.raises(RuntimeError, match="at the first step policy and reference are the same model"):
        run().train()
    assert trained(run(sanity_check=False))[0]["loss"] != pytest.approx(0.6931, abs=1e-4)
    assert trained(run(ref_model=oracle.tiny_model(2)))[0]["loss"] != pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize("changed", [False, True])
def test_a_model_that_was_changed_since_it_was_loaded(changed, tmp_path):
    """TRL loads the reference again; attention layers keep their dropout as a number, which TRL does not find."""
    oracle.tiny_model(1).save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    if changed:
        model.load_state_dict(oracle.tiny_model(2).state_dict())
    run = TISDPOTrainer(
        model, args=TISDPOConfig(**arguments(tmp_path, max_steps=1)), train_dataset=weighted(), processing_class=tokenizer()
    )
    if changed:
        with pytest.raises(RuntimeError, match="TRL loads the reference again"):
            run.train()
    else:
        assert trained(run)[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_adapters_that_change_their_base_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa")
    args = TISDPOConfig(**arguments(tmp_path))
    options = dict(args=args, train_dataset=weighted(), processing_class=tokenizer(), peft_config=config)
    with pytest.raises(InputError, match="init_lora_weights='pissa' changes the weights of the base"):
        TISDPOTrainer(oracle.tiny_model(1), **options)


@pytest.mark.parametrize("ready", [False, True])
def test_new_adapters_and_log_probs_of_their_base(ready, tmp_path):
    """A model without a padding id, which TRL gives it; adapters by peft_config, or on the model already (TRL copies these)."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    base = oracle.tiny_model(1)
    assert base.config.pad_token_id is None
    options = dict(args=TISDPOConfig(**arguments(tmp_path, max_steps=1)), processing_class=tokenizer())
    options |= {} if ready else {"peft_config": config}
    for place, reference, fits in (("a", base, True), ("b", oracle.tiny_model(2), False)):
        rows = scored(tmp_path / place, reference=reference)
        model = peft.get_peft_model(oracle.tiny_model(1), config) if ready else oracle.tiny_model(1)
        if fits:
            assert trained(TISDPOTrainer(model, train_dataset=rows, **options))[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
            continue
        with pytest.raises(InputError, match="reference_model is"):
            TISDPOTrainer(model, train_dataset=rows, **options)
        rows = rows.remove_columns(["chosen_ref_logps", "rejected_ref_logps"])
        options["args"] = TISDPOConfig(**arguments(tmp_path, max_steps=1, precompute_ref_log_probs=True))
        model = peft.get_peft_model(oracle.tiny_model(1), config) if ready else oracle.tiny_model(1)
        assert trained(TISDPOTrainer(model, train_dataset=rows, **options))[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_a_head_that_is_not_what_it_says_is_refused(tmp_path, monkeypatch):
    model = oracle.tiny_model(1)
    own = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: 3.0 * own(x))
    args = TISDPOConfig(**arguments(tmp_path))
    with pytest.raises(InputError, match="makes its logits in a way that is not known here"):
        TISDPOTrainer(model, oracle.tiny_model(2), args, train_dataset=weighted(), processing_class=tokenizer())


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [4, 9])
def test_log_probs_of_cut_rows_are_those_of_what_is_left(mode, max_length, tmp_path):
    options = dict(max_steps=2, per_device_train_batch_size=3, max_length=max_length, truncation_mode=mode)
    online = trained(trainer(tmp_path, weighted(), **options))
    cached = trained(trainer(tmp_path, weighted(), precompute_ref_log_probs=True, **options))
    assert [a["loss"] for a in cached] == pytest.approx([b["loss"] for b in online], rel=1e-5)


def test_ready_rows_that_lose_their_completion_are_dropped_and_counted(tmp_path, caplog):
    rows = tisdpo.data.tokenize_pairs(oracle.pairs(), tokenizer(), max_length=64)[0]
    short, long = sorted(len(ids) for ids in rows["prompt_ids"])
    run = trainer(tmp_path, rows, method="dpo", max_length=long)
    assert [len(row["prompt_ids"]) for row in run.train_dataset] == [short]
    assert f"1 of 2 train rows have no completion within max_length={long}" in caplog.text
    assert len(trainer(tmp_path, rows, method="dpo", max_length=long, truncation_mode="keep_end").train_dataset) == 2
    assert len(trainer(tmp_path, rows, method="dpo", max_length=long + 1).train_dataset) == 2


def test_a_scored_set_that_would_be_cut_is_refused(tmp_path):
    with pytest.raises(InputError, match="max_length is 64 there and 10 here; use the max_length it was scored with"):
        trainer(tmp_path, scored(tmp_path), max_length=10)
    trainer(tmp_path, load_scored(tmp_path / "set"), max_length=32)  # cuts none of them


def test_resume_on_other_rows_or_with_another_reference_is_refused(tmp_path):
    options = dict(max_steps=2, save_strategy="steps", save_steps=1, kl="reverse")
    rows = weighted()

    def run(rows, reference, **changed):
        args = TISDPOConfig(**{**arguments(tmp_path), **options, **changed})
        return TISDPOTrainer(oracle.tiny_model(1), oracle.tiny_model(reference), args, train_dataset=rows, processing_class=tokenizer())

    run(rows, 2).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    run(rows, 2).train(resume_from_checkpoint=checkpoint)
    for other, reference, changed, what in (
        (rows, 3, {}, "reference model"),
        (rows, 2, dict(weighting={"upper": 0.1}), "weights and weighting"),
        (rows.select([1, 0, 2]), 2, {}, "token ids and weights"),
        (rows, 2, dict(kl=None), "kl"),
    ):
        with pytest.raises(InputError, match=f"was trained with other {what}; go on"):
            run(other, reference, **changed).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("options", [dict(), dict(kl="reverse"), dict(precompute_ref_log_probs=True)], ids=str)
def test_policy_and_reference_have_one_number_format(options, tmp_path):
    """The same model twice, in float32, trained in bfloat16: the first loss is ln 2, and the KL 0, only if the reference is cast too."""
    args = TISDPOConfig(**arguments(tmp_path, max_steps=1, per_device_train_batch_size=3, bf16=True, **options))
    run = TISDPOTrainer(oracle.tiny_model(1), oracle.tiny_model(1), args, train_dataset=weighted(), processing_class=tokenizer())
    logged = trained(run)[0]
    assert logged["loss"] == pytest.approx(0.693147, abs=1e-3 if "precompute_ref_log_probs" in options else 1e-6)
    assert logged.get("kl/chosen", 0.0) == 0.0


def test_a_collator_that_would_lose_the_weights_is_refused(tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class Other(DataCollatorForPreference):
        pass

    class Own(WeightedCollator):
        pass

    args = TISDPOConfig(**arguments(tmp_path))
    make = [TISDPOTrainer, oracle.tiny_model(1), oracle.tiny_model(2), args]
    with pytest.raises(InputError, match="data_collator is a Other, which leaves out token weights"):
        make[0](*make[1:], train_dataset=weighted(), processing_class=tokenizer(), data_collator=Other(pad_token_id=0))
    run = make[0](*make[1:], train_dataset=weighted(), processing_class=tokenizer(), data_collator=Own(pad_token_id=0))
    assert "token_weights" in run.data_collator(list(run.train_dataset))


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation_cuts_weights_with_their_tokens(mode, tmp_path):
    run = trainer(tmp_path, weighted(), max_length=9, truncation_mode=mode)
    batch = run.data_collator(list(run.train_dataset))
    assert batch["token_weights"].shape == batch["input_ids"].shape
    rows = list(run.train_dataset)
    for place, (row, side) in enumerate([(r, s) for s in ("chosen", "rejected") for r in rows]):
        full = [0.0] * len(row["prompt_ids"]) + row[f"{side}_weights"]
        cut = full[:9] if mode == "keep_start" else full[-9:]
        assert batch["token_weights"][place][: len(cut)].tolist() == pytest.approx(cut)
    assert (batch["token_weights"][batch["completion_mask"] == 1] > 0).all()


@pytest.mark.parametrize(
    "options, rows, error, words",
    [
        ({}, lambda: oracle.pairs(), InputError, "method='tis-dpo' needs train rows with chosen_contrast"),
        (dict(method="dpo"), lambda: weighted(), InputError, "chosen_contrast, which method='dpo' does not use"),
        (dict(weighting={"upper": 2.0}), lambda: weighted(value=1.0, kind="weights"), InputError, "weighting has no effect"),
        (dict(method="dpo", weighting={"upper": 2.0}), lambda: oracle.pairs(), ValueError, "weighting has no effect with method='dpo'"),
        (dict(method="sft"), lambda: oracle.pairs(), ValueError, "method must be 'tis-dpo' or 'dpo', got 'sft'"),
        (dict(loss_type="apo_zero"), lambda: weighted(), ValueError, "loss_type must be one of .*, got apo_zero; for others use trl"),
        (dict(loss_type=["sigmoid", "sft"]), lambda: weighted(), ValueError, "got sigmoid, sft; for 'sft' .* set nll_coef"),
        (dict(f_divergence_type="js_divergence"), lambda: weighted(), ValueError, "f_divergence_type='js_divergence' is not supported"),
        (dict(ld_alpha=0.5), lambda: weighted(), ValueError, "ld_alpha=0.5 is not supported"),
        (dict(padding_free=True), lambda: weighted(), ValueError, "padding_free=True is not supported .* train with tisdpo.TISDPOTrainer"),
        (dict(use_weighting=True), lambda: weighted(), ValueError, "use_weighting=True is not supported"),
        (dict(average_tokens_across_devices=False), lambda: weighted(), ValueError, "average_tokens_across_devices=False has no effect"),
        (dict(label_smoothing_factor=0.1), lambda: weighted(), ValueError, "label_smoothing_factor=0.1 has no effect"),
        (dict(accelerator_config={"dispatch_batches": True}), lambda: weighted(), ValueError, "dispatch_batches=True would cut pairs"),
        (dict(train_sampling_strategy="batch_rebalance"), lambda: weighted(), ValueError, "batch_rebalance' makes unequal batches"),
        (dict(kl="sideways"), lambda: weighted(), ValueError, "kl must be None, 'reverse' or 'forward', got 'sideways'"),
        (dict(alpha=0.5), lambda: weighted(), ValueError, "alpha=0.5 has no effect with kl=None"),
        (dict(kl="reverse", precompute_ref_log_probs=True), lambda: weighted(), ValueError, "needs the reference's distribution"),
        (dict(loss_type="hinge", label_smoothing=0.1), lambda: weighted(), ValueError, "label_smoothing"),
        (dict(precompute_ref_batch_size=4), lambda: weighted(), ValueError, "precompute_ref_batch_size has no effect"),
        (dict(weighting={"uper": 2.0}), lambda: weighted(), ValueError, "weighting has no field 'uper'; did you mean upper"),
    ],
)
def test_nothing_is_ignored_silently(options, rows, error, words, tmp_path):
    with pytest.raises(error, match=words):
        trainer(tmp_path, rows(), **options)


def test_a_weight_too_many_is_named(tmp_path):
    rows = weighted()
    values = list(rows["rejected_contrast"])
    values[1] = [*values[1], 0.1]
    rows = rows.remove_columns("rejected_contrast").add_column("rejected_contrast", values)
    with pytest.raises(InputError, match=r"row 1: rejected_contrast has 9 values, but TRL makes 8 tokens of rejected"):
        trainer(tmp_path, rows)


def test_arguments_of_the_wrong_kind(tmp_path):
    args = trl.DPOConfig(**arguments(tmp_path))
    with pytest.raises(TypeError, match=r"trl.TISDPOConfig, which takes DPOConfig.s arguments, got trl.trainer.dpo_config.DPOConfig"):
        TISDPOTrainer(oracle.tiny_model(1), oracle.tiny_model(2), args, train_dataset=weighted(), processing_class=tokenizer())
    args = TISDPOConfig(**arguments(tmp_path))
    with pytest.raises(ValueError, match="compute_metrics needs logits"):
        TISDPOTrainer(oracle.tiny_model(1), oracle.tiny_model(2), args, None, weighted(), None, tokenizer(), len)


def test_other_rows_are_evaluated_where_workers_stay(tmp_path):
    options = dict(method="dpo", dataloader_num_workers=1, dataloader_persistent_workers=True, per_device_eval_batch_size=3)
    a, b = oracle.pairs().select([0]), oracle.pairs().select([1, 2])
    run = trainer(tmp_path, oracle.pairs(), **options)
    found = run.evaluate({"a": a, "b": b})
    alone = {name: trainer(tmp_path, oracle.pairs(), **options).evaluate(rows)["eval_loss"] for name, rows in (("a", a), ("b", b))}
    assert {name: found[f"eval_{name}_loss"] for name in "ab"} == pytest.approx(alone) and alone["a"] != pytest.approx(alone["b"])


def test_predictions_are_metrics(tmp_path):
    run = trainer(tmp_path, weighted())
    assert run.predict(run.train_dataset).metrics["test_loss"] > 0


def test_an_unsupported_trl_says_so_at_import(monkeypatch):
    import importlib
    import importlib.metadata

    import tisdpo.integrations.trl as module

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.1" if name == "trl" else real(name))
    supported = f"trl>={module.OLDEST},<{module.NEWEST}"
    assert supported in Path(__file__).parents[1].joinpath("pyproject.toml").read_text()
    with pytest.raises(ImportError, match=f"works with {supported}, but trl 0.19.1 is installed"):
        importlib.reload(module)

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match="but no trl is installed; run: pip install"):
        importlib.reload(module)
