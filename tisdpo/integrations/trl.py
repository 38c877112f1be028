"""TIS-DPO on `trl.DPOTrainer`: TRL's tokens, collation and reference handling, with token weights, the KL term and the one-pass head.

    from tisdpo.integrations.trl import TISDPOConfig, TISDPOTrainer
    TISDPOTrainer(model, args=TISDPOConfig("out", kl="reverse"), train_dataset=rows, processing_class=tokenizer).train()

Rows are TRL's preference pairs with `chosen_contrast`, `rejected_contrast` (raw, one number a completion token; the rule is in
`weighting`) or ready `chosen_weights`, `rejected_weights`; as text, or as ready `prompt_ids`, `chosen_ids`, `rejected_ids`, such as a
scored set of this library. With method="dpo" and kl=None the losses are TRL's own; but label_smoothing, which TRL's "sigmoid" ignores,
has an effect on it here (conservative DPO).

Left out, compared with `trl.DPOTrainer`: metrics that need logits (entropy, logits/*, mean_token_accuracy) and `compute_metrics`; losses
other than sigmoid, sigmoid_norm, hinge, ipo and robust; f-divergences, LD-DPO, WPO; vision-language models. All but the metrics are
refused by name. The auxiliary loss of a mixture of experts is added in training as TRL does it; evaluation leaves it out.
"""

import logging
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch
from datasets import Dataset
from packaging.version import Version
from torch import Tensor

from tisdpo.batches import flatten_batch, interleaved
from tisdpo.errors import InputError
from tisdpo.first_step import FirstStep, check_base, is_its_base, trained_base
from tisdpo.functional import linear_tis_dpo_loss
from tisdpo.hf import Head, attach_head, disable_dropout, model_inputs, reference_inputs, verify_head
from tisdpo.losses import Objective
from tisdpo.processes import REPEATED, GlobalBatches, check_parallelism
from tisdpo.provenance import check_rows, home_of, load_provenance
from tisdpo.resume import RemembersRows
from tisdpo.rows import brings_reference, shared_logps, weigh
from tisdpo.trainer import UNUSED_LOGPS, fingerprint_if_here, preference_metrics
from tisdpo.weighting import Weighting

OLDEST, NEWEST = "1.13", "1.17"  # supported: from the first up to, not including, the second
try:
    INSTALLED = version("trl")
except PackageNotFoundError:
    INSTALLED = None
if INSTALLED is None or not Version(OLDEST) <= Version(INSTALLED) < Version(NEWEST):
    raise ImportError(
        f"tisdpo.integrations.trl works with trl>={OLDEST},<{NEWEST}, but {'no trl' if INSTALLED is None else 'trl ' + INSTALLED} is "
        f'installed; run: pip install "trl>={OLDEST},<{NEWEST}", or use tisdpo.TISDPOTrainer, which needs no TRL'
    )

from accelerate.utils import is_peft_model  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference, use_adapter  # noqa: E402
from trl.trainer.utils import pad  # noqa: E402

log = logging.getLogger("tisdpo")

SIDES = ("chosen", "rejected")
COLUMNS = [f"{side}_{kind}" for kind in ("weights", "contrast", "ref_logps") for side in SIDES]


@dataclass
class TISDPOConfig(DPOConfig):
    """`trl.DPOConfig` with the fields below. Raises ValueError for options of DPOConfig that have no meaning here.

    method            "tis-dpo" uses the rows' weights and raises without them; "dpo" has weights 1 and raises where rows carry weights
    kl                None, "reverse" (the paper) or "forward": the sequence KL term, weighted like the log-ratio
    alpha             factor of the KL term
    detach_chosen_kl  no gradient through the chosen sequence's KL (TDPO2)
    nll_coef          factor of the chosen's NLL a token, which is added to the loss of every pair (RPO); TRL's "sft" divides by the tokens
                      of a micro-batch instead
    weighting         fields of `tisdpo.Weighting` for rows with a raw contrast, such as {"upper": 2.0}
    sanity_check      stop at the first step unless policy and reference have the same log-probs there, where no ref_model was given (TRL
                      loads the reference again from where the model came from: a model that was changed since is another one)
    """

    method: str = field(default="tis-dpo", metadata={"help": "tis-dpo or dpo"})
    kl: str | None = field(default=None, metadata={"help": "reverse, forward or nothing"})
    alpha: float = field(default=1.0, metadata={"help": "factor of the KL term"})
    detach_chosen_kl: bool = field(default=False, metadata={"help": "no gradient through the chosen KL"})
    nll_coef: float = field(default=0.0, metadata={"help": "factor of the NLL of the chosen"})
    weighting: dict | None = field(default=None, metadata={"help": "fields of tisdpo.Weighting"})
    sanity_check: bool = field(default=True, metadata={"help": "stop unless policy and reference are the same at the first step"})

    def __post_init__(self):
        super().__post_init__()
        if self.method not in ("tis-dpo", "dpo"):
            raise ValueError(f"method must be 'tis-dpo' or 'dpo', got {self.method!r}")
        if self.padding_free:  # TRL itself warns and pads
            raise ValueError(
                "padding_free=True is not supported with TRL's collator, which pads; leave it out, or train with tisdpo.TISDPOTrainer"
            )
        for name, usual in (("f_divergence_type", "reverse_kl"), ("ld_alpha", None), ("use_weighting", False), ("loss_weights", None)):
            value = getattr(self, name, usual)
            if getattr(value, "value", value) != usual:
                raise ValueError(f"{name}={value!r} is not supported; leave it at {usual!r}, or use trl.DPOTrainer")
        if self.weighting is not None and self.method == "dpo":
            raise ValueError("weighting has no effect with method='dpo'; use method='tis-dpo' or leave it out")
        if not self.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices=False has no effect: losses are those of the whole global batch; leave it out")
        if self.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor={self.label_smoothing_factor} has no effect; use label_smoothing")
        if self.accelerator_config.dispatch_batches:
            raise ValueError("dispatch_batches=True would cut pairs apart between the processes; leave it out")
        if getattr(self, "train_sampling_strategy", None) == "batch_rebalance":
            raise ValueError("train_sampling_strategy='batch_rebalance' makes unequal batches, of which pairs would be lost; leave it out")
        if getattr(self, "precompute_ref_batch_size", None) is not None:
            raise ValueError("precompute_ref_batch_size has no effect: reference log-probs are made in batches by tokens; leave it out")
        Weighting.of(self.weighting)  # raises for what is none
        self.objective  # noqa: B018  (raises for values out of range)

    @property
    def objective(self) -> Objective:
        """The pairwise loss that these options describe."""
        return Objective.of_trainer(self)


@dataclass
class WeightedCollator(DataCollatorForPreference):
    """TRL's collator, with `token_weights` and `ref_logps` [2B, T] in the coordinates of `input_ids` where the rows have them."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        for kind, name in (("weights", "token_weights"), ("ref_logps", "ref_logps")):
            if f"chosen_{kind}" in examples[0]:
                batch[name] = self._padded(examples, kind)
        return batch

    def _padded(self, examples, kind: str) -> Tensor:
        cut = slice(None) if self.max_length is None else slice(None, self.max_length)
        if self.max_length is not None and self.truncation_mode == "keep_end":
            cut = slice(-self.max_length, None)
        values = [([0.0] * len(e["prompt_ids"]) + list(e[f"{side}_{kind}"]))[cut] for side in SIDES for e in examples]
        values = [torch.tensor(v, dtype=torch.float32) for v in values]
        return pad(values, padding_value=0.0, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)


class TISDPOTrainer(RemembersRows, GlobalBatches, DPOTrainer):
    """`trl.DPOTrainer` with a weight for every token, the sequence KL, and the head inside the loss (no [tokens, vocabulary] logits).

    Takes what DPOTrainer takes. The reference is, in this order: with kl=None log-probs per token, where the rows carry them (columns
    `chosen_ref_logps`, `rejected_ref_logps`; sanity_check=False if they are of another model than the policy) or
    precompute_ref_log_probs=True, which computes those that are missing (and spares the second model that TRL keeps without it);
    `ref_model`; of adapters that are new (`peft_config`) the base, adapters off; of a PEFT model that comes with adapters the copy of these
    that TRL makes; of any other model one that TRL loads again.

    Rows of a scored set (`tisdpo.scored.load_scored`) that are given here are refused with another tokenizer or chat template than it was
    scored with, and their log-probs with another reference (InputError).
    """

    def __init__(self, model, ref_model=None, args=None, *more, **kwargs):
        args = args if args is not None else TISDPOConfig("tis-dpo")
        if not isinstance(args, TISDPOConfig):
            raise TypeError(
                f"args must be a {__name__}.TISDPOConfig, which takes DPOConfig's arguments, got "
                f"{type(args).__module__}.{type(args).__qualname__}"
            )
        if args.kl is not None and args.precompute_ref_log_probs:
            raise ValueError(
                f"kl={args.kl!r} needs the reference's distribution, not only its log-probs; set precompute_ref_log_probs=False"
            )
        self.objective = args.objective
        self._given_reference = None
        if isinstance(ref_model, torch.nn.Module):  # before TRL shards or casts it
            verify_head(attach_head(_base(ref_model)))
            self._given_reference = fingerprint_if_here(ref_model, adapters=True)
        # log-probs that were made here and not read
        self._computed_here: list = []
        super().__init__(model, ref_model, args, *more, **kwargs)
        if self.compute_metrics is not None:
            raise ValueError("compute_metrics needs logits, which are never formed here; leave it out or use trl.DPOTrainer")
        if self._is_vision_dataset:
            raise ValueError("vision-language pairs are not supported: their collation happens elsewhere in TRL; use trl.DPOTrainer")
        if type(self.data_collator) is DataCollatorForPreference:
            self.data_collator = WeightedCollator(**vars(self.data_collator))
        loses = args.method == "tis-dpo" or brings_reference(self.train_dataset)
        if loses and not isinstance(self.data_collator, WeightedCollator):
            raise InputError(
                f"data_collator is a {type(self.data_collator).__name__}, which leaves out token weights and reference log-probs; derive "
                "it from tisdpo.integrations.trl.WeightedCollator, or leave it out"
            )
        if ref_model is None:
            asked = args.kl is not None or not all(map(brings_reference, self._datasets()))
            check_base(self.model, moves=asked and not args.precompute_ref_log_probs)
        if args.disable_dropout:
            disable_dropout(self.model)  # also those that attention layers keep as numbers
        copied = is_peft_model(self.model) and "ref" in self.model.peft_config
        self._first_step = FirstStep(self, ref_model is None and (copied or is_its_base(self.model)))
        check_parallelism(self.model, self.accelerator)
        if self.ref_model is not None:
            check_parallelism(self.accelerator.unwrap_model(self.ref_model), self.accelerator)
        self._attach()
        self._check_homes()
        if ref_model is None and self.ref_model is not None and args.kl is None and all(map(brings_reference, self._datasets())):
            log.warning(
                "TRL keeps a second model as the reference, which none of these rows needs: all carry reference log-probs; set "
                "precompute_ref_log_probs=True, then it does not"
            )
        brought = self.objective.kl is None and not any(self.train_dataset is other for other in self._computed_here)
        brought = brought and brings_reference(self.train_dataset)
        weighting = Weighting.of(args.weighting) if args.method == "tis-dpo" else None
        self._remember_rows(self.objective.kl, weighting, None if brought else self._reference_name())

    def _attach(self) -> None:
        verify_head(attach_head(_base(self.model)))
        if self.ref_model is not None:
            attach_head(_base(self.accelerator.unwrap_model(self.ref_model)))

    # Rows

    def _datasets(self) -> list:
        """Those of training and evaluation that were given."""
        several = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return [dataset for dataset in (self.train_dataset, *several) if dataset is not None]

    def _check_homes(self) -> None:
        """Refuse rows of scored sets that were made for something else, or that the collator would cut."""
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        for dataset in self._datasets():
            carries = brings_reference(dataset)
            if carries and self.objective.kl is None and self.args.sync_ref_model:
                raise InputError("the rows carry reference log-probs, so sync_ref_model has no effect; remove the columns or leave it out")
            if carries and self.objective.kl is not None:
                log.warning(UNUSED_LOGPS)
            home = home_of(dataset)
            if home is not None:
                stored = load_provenance(home)
                # whose are not those of the set, they were made here or come with the rows
                of_set = "reference_model" in stored and not any(dataset is other for other in self._computed_here)
                used = carries and self.objective.kl is None and of_set
                longest = stored["max_length"] if self.args.max_length is None else self.args.max_length
                most = longest if stored["max_length"] is None else min(longest, stored["max_length"])
                check_rows(dataset, home, tokenizer, max_length=most, reference=self._reference_name() if used else None)

    def _reference_name(self) -> str | None:
        if self._given_reference is not None:
            return self._given_reference
        reference = self.accelerator.unwrap_model(self.ref_model if self.ref_model is not None else self.model)
        if self.ref_model is None and is_peft_model(reference) and "ref" in reference.peft_config and not is_its_base(reference):
            return "a copy of the policy's adapters"
        return fingerprint_if_here(reference)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        columns = set(dataset.column_names or next(iter(dataset)))
        if "prompt_ids" not in columns:
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        elif args.max_length is not None and args.truncation_mode == "keep_start":  # ready ids, of which TRL itself drops nothing
            dataset = _with_completions(dataset, args.max_length, dataset_name)
        weighted = {"chosen_weights", "chosen_contrast"} & columns
        if args.method == "dpo":
            if weighted:
                raise InputError(
                    f"the {dataset_name} rows carry {', '.join(sorted(weighted))}, which method='dpo' does not use; "
                    "remove the columns or use method='tis-dpo'"
                )
            return dataset
        if not weighted:
            raise InputError(
                f"method='tis-dpo' needs {dataset_name} rows with chosen_contrast and rejected_contrast, or chosen_weights and "
                f"rejected_weights; they have {', '.join(sorted(columns))}. Use method='dpo' for none"
            )
        for kind in ("weights", "contrast"):
            if f"chosen_{kind}" in columns:
                _check_lengths(dataset, kind)
        return weigh(dataset, args.weighting, getattr(processing_class, "tokenizer", processing_class).eos_token_id)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in COLUMNS if name not in self._signature_columns]

    def _precompute_ref_logps(self, dataset, name, batch_size):
        """Per token instead of TRL's one number a sequence, which could not be weighted."""
        if brings_reference(dataset):
            _check_lengths(dataset, "ref_logps")
            return dataset
        if self.ref_model is None and self.state.global_step > 0 and trained_base(self.accelerator.unwrap_model(self.model)) is not None:
            raise InputError(
                "these rows have no reference log-probs, and the reference was the model before its base was trained; give them to the "
                "constructor as eval_dataset, or give it a ref_model"
            )
        reference = self.ref_model if self.ref_model is not None else self.model
        attach_head(_base(self.accelerator.unwrap_model(reference)))
        with self._reference_adapter():
            for side in SIDES:
                whole = zip(dataset["prompt_ids"][:], dataset[f"{side}_ids"][:])
                cut = [_cut(*ids, self.args.max_length, self.args.truncation_mode) for ids in whole]
                prompts, completions, starts, lengths = (list(x) for x in zip(*cut)) if cut else ([],) * 4
                logps = shared_logps(reference, prompts, completions, self.data_collator.pad_token_id, self.accelerator)
                logps = [[0.0] * start + x + [0.0] * (length - start - len(x)) for x, start, length in zip(logps, starts, lengths)]
                dataset = dataset.add_column(f"{side}_ref_logps", logps)
        self._computed_here.append(dataset)
        return dataset

    # The loss

    def _rows(self, batch: dict) -> int:
        return len(batch["input_ids"]) // 2

    _items = _rows

    def _first(self, batch: dict, rows: int) -> dict:
        """Of both halves of TRL's batch, the chosen and the rejected."""
        every = len(batch["input_ids"])
        keep = [*range(rows), *range(every // 2, every // 2 + rows)]
        return {name: x[keep] if isinstance(x, Tensor) and x.dim() and len(x) == every else x for name, x in batch.items()}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss of the global batch's pairs, this batch's part of it; where TRL takes the mean over processes and batches of means."""
        return self._compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        return super().prediction_step(model, self._unrepeated(inputs), True, ignore_keys)  # there are no logits to predict

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        for name, mean in self._mean_metrics(mode).items():
            self._metrics[mode][name] = [mean]
        super().log(logs, start_time)

    def _compute_loss(self, model, inputs, return_outputs, items=None):
        if return_outputs:
            raise ValueError("compute_metrics needs logits, which are never formed here; leave it out or use trl.DPOTrainer")
        mode = "train" if self.model.training else "eval"
        batch = interleaved(inputs)
        flat = flatten_batch(batch)
        reference = self._reference(batch, flat)

        def preference(hidden: Tensor, head: Head):
            output = linear_tis_dpo_loss(
                flat.take(hidden), head.weight, flat.target, flat.cu_seqlens, token_weights=flat.token_weights, bias=head.bias,
                objective=self.objective, normalizer=items, ignore_index=None, **reference, **head.transform,
            )  # fmt: skip
            return output, head.aux_loss

        asked = {"output_router_logits": True} if self.aux_loss_enabled else {}
        with self.accelerator.autocast():  # before training TRL has prepared the reference, and nobody the policy
            output, aux_loss = model(**model_inputs(batch), **asked, head=preference)
        if mode == "train":
            own = inputs["attention_mask"].sum() * (REPEATED not in inputs)
            tokens = self.accelerator.reduce(own, "sum").item()
            self._total_train_tokens += tokens // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        self._first_step.check(output, flat)
        self._add_metrics(mode, preference_metrics(output, flat), inputs)
        loss = output.loss
        if aux_loss is not None and self.aux_loss_enabled:
            self._add_metrics(mode, {"aux_loss": aux_loss}, inputs)
            # a mean over tokens of its own: of several batches and processes it is the mean, by their pairs
            loss = loss + self.router_aux_loss_coef * aux_loss * (1.0 if items is None else self._items(inputs) / items)
        return self._share(loss, inputs, summed=items is not None)

    def _reference(self, batch: dict, flat) -> dict:
        if flat.ref_logps is not None and self.objective.kl is None:
            return {"ref_logps": flat.ref_logps}
        model = self.ref_model if self.ref_model is not None else self.model
        with self.accelerator.autocast(), self._reference_adapter():
            return reference_inputs(model, batch, flat, _base(self.accelerator.unwrap_model(self.model)))

    def _reference_adapter(self):
        """Adapters off (or the copy of a retrained one) where a PEFT model is its own reference."""
        unwrapped = self.accelerator.unwrap_model(self.model)
        if self.ref_model is None and is_peft_model(unwrapped):
            return use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        return nullcontext()


def _base(model):
    return model.get_base_model() if is_peft_model(model) else model


def _cut(prompt: list[int], completion: list[int], max_length: int | None, mode: str) -> tuple[list[int], list[int], int, int]:
    """(what TRL's collator leaves of prompt and completion, place in the whole completion of the first token that something predicts, the
    length of the whole completion)."""
    excess = 0 if max_length is None else max(0, len(prompt) + len(completion) - max_length)
    if mode == "keep_end":
        start = max(0, excess - len(prompt))
        left = prompt[excess:], completion[start:]
    else:
        start, kept = 0, len(prompt) + len(completion) - excess
        left = prompt[:kept], completion[: max(0, kept - len(prompt))]
    return *left, start + (not left[0] and bool(left[1])), len(completion)


def _with_completions(dataset, max_length: int, name: str):
    """Rows whose prompt leaves room for a completion; others are dropped, and counted in the log."""
    if not isinstance(dataset, Dataset):
        return dataset.filter(lambda row: len(row["prompt_ids"]) < max_length)
    kept = [number for number, ids in enumerate(dataset["prompt_ids"]) if len(ids) < max_length]
    if len(kept) == len(dataset):
        return dataset
    dropped = len(dataset) - len(kept)
    log.warning("%d of %d %s rows have no completion within max_length=%d and are left out", dropped, len(dataset), name, max_length)
    return dataset.select(kept)


def _check_lengths(dataset, kind: str) -> None:
    """One value for every completion token that TRL made, EOS included."""
    for side in SIDES:
        for index, (values, ids) in enumerate(zip(dataset[f"{side}_{kind}"], dataset[f"{side}_ids"])):
            if len(values) != len(ids):
                raise InputError(
                    f"row {index}: {side}_{kind} has {len(values)} values, but TRL makes {len(ids)} tokens of {side}; "
                    "score the same tokens (pass the scored set itself, which carries its ids)"
                )
