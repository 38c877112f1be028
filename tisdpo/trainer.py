"""`TISDPOTrainer`: TIS-DPO, DPO, reverse DPO and SFT on `transformers.Trainer`.

Read from top to bottom it does four things: prepare rows (`tisdpo.rows`: tokenise, contrasts to weights, log-probs of the reference),
compute the loss inside the model's forward, collect metrics, evaluate. Optimiser, schedule, checkpoints, resume, logging, callbacks,
mixed precision and `accelerate launch` are the Trainer's.

Left out compared with the authors' released code, and why: weights by rank (a `Weighting` preset, not the default: the paper's rule is
the clamped exponential), a zero weight for EOS (the model would not learn to stop), the KL term with factor 0.5 in the loss and 1 in
the rewards (one coefficient here, so that the margin is the loss logit), logged `logps/*` that are weighted sums (plain sums here).
"""

import copy
import logging
from contextlib import nullcontext
from dataclasses import dataclass, field, fields

import torch
from accelerate.utils import is_peft_model
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from tisdpo.attention import choose, register_varlen
from tisdpo.batches import check_tokens_per_batch, first_sequences, flatten_batch, sequences, token_loader
from tisdpo.cached import FOLDER, ReferenceCache
from tisdpo.data import PairCollator
from tisdpo.errors import InputError
from tisdpo.fingerprints import model_fingerprint
from tisdpo.first_step import FirstStep, check_base, is_its_base, trained_base
from tisdpo.functional import linear_nll_loss, linear_tis_dpo_loss
from tisdpo.hf import (
    Head,
    attach_head,
    check_reference_head,
    disable_dropout,
    head_of,
    is_sharded,
    model_inputs,
    reference_inputs,
    verify_head,
)
from tisdpo.losses import Objective
from tisdpo.processes import GlobalBatches, check_parallelism, check_whole_weights
from tisdpo.provenance import check_rows, home_of
from tisdpo.resume import RemembersRows
from tisdpo.rows import add_reference_logps, brings_reference, check_kind, datasets_in, each, prepare_rows
from tisdpo.weighting import Weighting

log = logging.getLogger("tisdpo")

METHODS = ("tis-dpo", "dpo", "sft")
UNUSED_LOGPS = "the rows' reference log-probs are not used: a KL term needs the reference's distribution, which is computed at every step"
UNUSED = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")  # arguments of Trainer
register_varlen()  # models may be loaded with attn_implementation="tisdpo_varlen" from here on


@dataclass
class TISDPOConfig(TrainingArguments):
    """`TrainingArguments` plus what preference training with token weights needs.

    method               "tis-dpo" (rows carry *_contrast or *_weights), "dpo" (weights 1), "sft" (one side, token cross-entropy)
    beta, loss_type, kl, alpha, detach_chosen_kl, label_smoothing, nll_coef   the `tisdpo.Objective`
    weighting            fields of `tisdpo.Weighting` that turn the stored contrast into weights, e.g. {"upper": 2.0}; None: the rows' ready
                         weights, where they carry some, else the paper's rule
    swap_pairs           exchange chosen and rejected: reverse DPO, the negative half of the (D) construction
    sft_side             "chosen" or "rejected": what method="sft" learns
    sft_prompt_loss      method="sft" learns the prompt's tokens as well (pretraining a base model)
    max_length           tokens of prompt + completion; longer pairs are truncated at the end
    precompute_ref       reference log-probs are computed once, before training; None: whenever the KL term does not need the reference
    padding_free         batches are one row without padding. None: where the attention is flash-attn, or torch's varlen kernel, which takes
                         the place of `sdpa` on a GPU with 16-bit numbers; padded elsewhere. True: with any attention of transformers, and
                         an error, by name, where a flat batch would be wrong (convolutions, linear attention, ...). False: padded
    tokens_per_batch     a training batch, per device and accumulation step, is as many whole pairs as have at most so many tokens, with the
                         prompts of both sides and with padding if there is any; takes the place of per_device_train_batch_size
                         (dataloader_drop_last then concerns evaluation alone)
    disable_dropout      set every dropout probability to 0
    sanity_check         stop at the first step unless policy and reference have the same log-probs there (the loss is ln 2)
    """

    method: str = "tis-dpo"
    beta: float = 0.1
    loss_type: str = "sigmoid"
    kl: str | None = None
    alpha: float = 1.0
    detach_chosen_kl: bool = False
    label_smoothing: float = 0.0
    nll_coef: float = 0.0
    weighting: dict | None = field(default=None)
    swap_pairs: bool = False
    sft_side: str = "chosen"
    sft_prompt_loss: bool = False
    max_length: int = 1024
    precompute_ref: bool | None = None
    padding_free: bool | None = None
    tokens_per_batch: int | None = None
    disable_dropout: bool = True
    sanity_check: bool = True
    learning_rate: float = 1e-6
    logging_steps: float = 10
    remove_unused_columns: bool = False  # the rows' columns are the collator's, not the model's
    report_to: str | list[str] | None = "none"

    def __post_init__(self):
        if self.method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.sft_side not in ("chosen", "rejected"):
            raise InputError(f"sft_side must be 'chosen' or 'rejected', got {self.sft_side!r}")
        if not self.average_tokens_across_devices:
            raise InputError("average_tokens_across_devices=False has no effect: losses are those of the whole global batch; leave it out")
        if self.label_smoothing_factor:
            raise InputError(f"label_smoothing_factor={self.label_smoothing_factor} has no effect; use label_smoothing")
        if self.use_liger_kernel:  # Liger's own loss would take the place of the forward that has the head in it
            asked = dict(self.liger_kernel_config or {})
            if asked.get("fused_linear_cross_entropy"):
                raise InputError("fused_linear_cross_entropy of liger_kernel_config replaces the loss on the head; leave it out")
            self.liger_kernel_config = asked | {"fused_linear_cross_entropy": False}
        by_length = getattr(self, "train_sampling_strategy", None) in ("group_by_length", "batch_rebalance")
        if by_length and self.tokens_per_batch is None:
            raise InputError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} looks for input_ids, which pairs do not have; use "
                "tokens_per_batch"
            )
        if self.remove_unused_columns:
            raise InputError("remove_unused_columns must stay False: it would drop the token weights before the collator sees them")
        if self.method != "tis-dpo" and self.weighting is not None:
            raise InputError(f"weighting has no effect with method={self.method!r}; use method='tis-dpo'")
        Weighting.of(self.weighting)  # raises for what is none
        changed = [f.name for f in fields(Objective) if getattr(self.objective(), f.name) != f.default]
        if self.method == "sft" and self.precompute_ref is not None:
            changed.append("precompute_ref")
        if self.method == "sft" and changed:
            raise InputError(f"{', '.join(changed)} of the preference loss has no effect with method='sft'; leave it out")
        for name in ("sft_side", "sft_prompt_loss"):
            if self.method != "sft" and getattr(self, name) != getattr(TISDPOConfig, name):
                raise InputError(f"{name} has no effect with method={self.method!r}; leave it out, or use method='sft'")
        if self.precompute_ref and self.kl is not None:
            raise InputError(
                f"precompute_ref=True stores log-probs only, but kl={self.kl!r} needs the reference's distribution at every step"
            )
        super().__post_init__()
        if self.accelerator_config.dispatch_batches:
            raise InputError("dispatch_batches=True would cut collated batches apart between the ranks; leave it out")
        if self.tokens_per_batch is not None:
            check_tokens_per_batch(self, self.max_length * (1 if self.method == "sft" else 2))

    def objective(self) -> Objective:
        """The loss on sequence sums that these fields describe."""
        return Objective.of_trainer(self)


class TISDPOTrainer(RemembersRows, GlobalBatches, Trainer):
    """Trains `model` on preference pairs.

    model              a causal language model; its head runs inside its own forward
    args               `TISDPOConfig`
    train_dataset, eval_dataset   rows of `tisdpo.data` (prompt_ids, chosen_ids, rejected_ids, ...) or pairs as text, which are tokenised
    processing_class   the tokenizer
    ref_model          the reference policy; None: the model as it is when training starts, of a PEFT model its base (adapters off)

    Rows that come from a scored set (`tisdpo.scored.load_scored`, also selected, shuffled or split afterwards) bring their reference
    along: log-probs where they carry them, and with a KL term the hidden states, if the set was scored with them. Of the reference only
    the head [V, H] then stays in memory; 2 H bytes are read from the disk for every completion token (float32: 4 H). A set that belongs
    to another tokenizer, chat template, truncation or reference is refused by name (InputError).

    Metrics carry TRL's names (`rewards/chosen`, `rewards/margins`, `logps/chosen`, ...) plus `kl/*` and `weights/*`. A mixture of experts
    whose configuration says output_router_logits=True is trained with its load-balancing loss, times its coefficient there, and logs it
    without (`aux_loss`); neither the reference nor the evaluation has it.
    """

    def __init__(
        self,
        model,
        args: TISDPOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        ref_model=None,
        **kwargs,
    ):
        args = args or TISDPOConfig()
        if not isinstance(args, TISDPOConfig):
            raise TypeError(
                f"args must be a tisdpo.TISDPOConfig, got {type(args).__module__}.{type(args).__qualname__}; for TRL's arguments there are "
                "TISDPOConfig and TISDPOTrainer of tisdpo.integrations.trl"
            )
        if isinstance(model, str):
            raise InputError(f"model must be a model, not its name: tisdpo.hf.load_model({model!r})")
        if ref_model is model:
            raise InputError("model and ref_model are the same object; leave ref_model out: the reference is the model as training begins")
        if processing_class is None:
            raise InputError("processing_class is missing: pass the model's tokenizer as processing_class=...")
        for name in UNUSED:
            if kwargs.get(name) is not None:
                raise InputError(f"{name} has no effect: there are no logits to give it; leave it out, or use transformers.Trainer")
        check_whole_weights(args)
        attach_head(model)
        verify_head(model)
        if args.disable_dropout:
            disable_dropout(model)
        self.objective = args.objective()
        self.preference, self._max_length = args.method != "sft", args.max_length
        self.pad_token_id = processing_class.pad_token_id if processing_class.pad_token_id is not None else processing_class.eos_token_id
        starts_at_reference = ref_model is None and self.preference and is_its_base(model)
        precompute = args.precompute_ref if args.precompute_ref is not None else args.kl is None
        if ref_model is not None:
            verify_head(attach_head(ref_model))
        given = datasets_in({"train": train_dataset}, eval_dataset)
        for dataset in given:
            check_kind(dataset)
        bring = bool(given) and all(map(brings_reference, given))
        if ref_model is not None and args.kl is None and any(brings_reference(rows) and home_of(rows) is None for rows in given):
            log.warning("rows bring reference log-probs, so the ref_model is not asked for them; remove the columns if it should be")
        if args.precompute_ref is False and args.kl is None and bring and ref_model is None and not is_peft_model(model):
            log.warning(
                "precompute_ref=False keeps a copy of the model in memory, which none of these rows needs: all carry reference log-probs"
            )
        self.cache = self._open_cache(train_dataset, eval_dataset) if self.preference and args.kl is not None else None
        if self.preference and ref_model is None:
            check_base(model, moves=not precompute and self.cache is None and not (args.kl is None and bring))
        self._reference_name = fingerprint_if_here(model) if ref_model is None else fingerprint_if_here(ref_model, adapters=True)
        scorer = None
        if self.preference:
            scorer = (ref_model or model) if precompute else None
            if scorer is None and ref_model is None and not is_peft_model(model) and self.cache is None:
                ref_model = copy.deepcopy(model)
        resident = ref_model is not None and not precompute and self.cache is None
        self.ref_model = ref_model.eval().requires_grad_(False) if resident else None

        self._eval_prefix = None
        self._scorer, self._policy_scores = scorer, scorer is model
        brought = args.kl is None and brings_reference(train_dataset)
        if args.kl is not None and self.cache is None and any(map(brings_reference, datasets_in(train_dataset))):
            log.warning(UNUSED_LOGPS)
        self._vocabulary = len(head_of(model).weight)
        collator = PairCollator(
            self.pad_token_id,
            side=None if self.preference else args.sft_side,
            prompt_loss=args.sft_prompt_loss,
            weights=args.method == "tis-dpo",
            swap=args.swap_pairs,
            reference=self.cache,
        )
        super().__init__(
            model,
            args,
            data_collator=collator,
            train_dataset=self._prepared(train_dataset, processing_class, args),
            eval_dataset=each(lambda rows: self._prepared(rows, processing_class, args), eval_dataset),
            processing_class=processing_class,
            **kwargs,
        )
        self._first_step = FirstStep(self, starts_at_reference)
        if self.args.n_gpu > 1:
            raise InputError(
                f"{self.args.n_gpu} GPUs are visible to one process, which DataParallel would share; start with `accelerate launch` "
                "or `torchrun`, or show one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        check_parallelism(model, self.accelerator)
        if ref_model is not None:
            check_parallelism(ref_model, self.accelerator)
        self.train_dataset, self.eval_dataset = (each(self._with_reference, rows) for rows in (self.train_dataset, self.eval_dataset))
        self.label_names = []
        if self.ref_model is not None and not self.accelerator.state.is_fsdp2:  # sharded below, layer by layer, like the policy
            self.ref_model.to(self.args.device)
        with self.accelerator.autocast():  # `choose` asks for devices and number formats: those of the training
            models = [m for m in (model, self.ref_model) if m is not None]
            self.data_collator.flat = choose(models, args.padding_free, self.args.device)
        if self.preference:
            weighting = Weighting.of(args.weighting) if args.method == "tis-dpo" else None
            tokens = args.tokens_per_batch and [args.tokens_per_batch, "padding-free" if self.data_collator.flat else "padded"]
            more = {"order of the pairs": "swapped" if args.swap_pairs else "as given", "tokens_per_batch": tokens}
            self._remember_rows(args.kl, weighting, None if brought else self._reference_name, more)
        if self.ref_model is not None and self.accelerator.state.is_fsdp2:
            self.ref_model = fsdp2_prepare_model(self.accelerator, self.ref_model)
        if self.cache is not None:
            check_reference_head(head_of(model).transform, self.cache.head)
            self.ref_head = {name: None if x is None else x.to(self.args.device) for name, x in self.cache.tensors.items()}

    # Rows and their reference

    def _prepared(self, dataset, tokenizer, args: TISDPOConfig):
        """The rows, checked, tokenised and weighted; None for none."""
        if dataset is None:
            return None
        if self.preference:
            self._check_home(dataset, tokenizer)
        dataset = prepare_rows(dataset, tokenizer, args, self._vocabulary)
        if self.cache is not None:
            self.cache.check(dataset)
        return dataset

    def _with_reference(self, dataset):
        """Prepared rows with the reference's log-probs, where the loss takes those and they do not bring them."""
        scorer = self._scorer
        if dataset is not None and scorer is not None and not brings_reference(dataset):
            placed = getattr(scorer, "hf_device_map", None) is not None or getattr(scorer, "is_quantized", False) or is_sharded(scorer)
            before = next(scorer.parameters()).device
            if not placed:
                scorer.to(self.args.device)
            with adapters_off(scorer) if self._policy_scores else nullcontext():
                dataset = add_reference_logps(dataset, scorer, self.pad_token_id, self.accelerator)
            if not (placed or self._policy_scores):
                scorer.to(before)  # a reference that has said all must not take the memory of the training
        return dataset

    def _open_cache(self, *given) -> ReferenceCache | None:
        """The cached reference of the first rows there are, if their scored set has one."""
        home = next((home_of(dataset) for dataset in datasets_in(*given)), None)
        return ReferenceCache(home) if home is not None and (home / FOLDER).is_dir() else None

    def _check_home(self, dataset, tokenizer) -> None:
        """Refuse rows of a scored set that was made for something else; take over its cached reference."""
        home = home_of(dataset)
        if home is None:
            return
        used = self.cache is not None or (self.objective.kl is None and brings_reference(dataset))
        check_rows(dataset, home, tokenizer, max_length=self._max_length, reference=self._reference_name if used else None)
        if self.cache is not None and (home / FOLDER).is_dir():
            self.cache.add(home)

    # Batches

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's, or with `tokens_per_batch` one whose batches are formed by tokens."""
        if self.args.tokens_per_batch is None:
            return super().get_train_dataloader()
        sides = ("chosen", "rejected") if self.preference else (self.args.sft_side,)
        self._forms_batches = True
        loader, self._ends_repeated = token_loader(
            self.train_dataset, sides, self.data_collator, self.args, self.accelerator, lambda: int(self.state.epoch or 0)
        )
        return loader

    # The loss

    def _rows(self, batch: dict) -> int:
        return sequences(batch) // (2 if self.preference else 1)

    def _first(self, batch: dict, rows: int) -> dict:
        return first_sequences(batch, rows * (2 if self.preference else 1))

    def _items(self, batch: dict) -> int:
        return self._rows(batch) if self.preference else int(batch["completion_mask"][:, 1:].sum())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss of the global batch's pairs (SFT: tokens), this batch's part of it."""
        items = num_items_in_batch if num_items_in_batch is not None else float(max(self._items(inputs), 1))
        loss, metrics = (self._preference_loss if self.preference else self._sft_loss)(model, inputs, items)
        self._add_metrics("train" if model.training else "eval", metrics, inputs)
        loss = self._share(loss, inputs, summed=model.training and num_items_in_batch is not None)
        return (loss, metrics) if return_outputs else loss

    def _sft_loss(self, model, inputs, items):
        flat = flatten_batch(inputs)

        def nll(hidden: Tensor, head: Head):
            output = linear_nll_loss(
                flat.take(hidden), head.weight, flat.target, bias=head.bias, normalizer=items, ignore_index=None, **head.transform
            )
            return output, head.aux_loss, head.aux_loss_coef

        output, *aux = model(**model_inputs(inputs), head=nll)
        # in evaluation the mean over tokens takes the place of the Trainer's, a mean of batches' means
        metrics = {} if model.training or aux[0] is not None else {"loss": -output.logps}
        return self._add_aux_loss(output.loss, metrics, *aux, self._items(inputs) / items)

    def _preference_loss(self, model, inputs, items):
        flat = flatten_batch(inputs)
        reference = self._reference(inputs, flat)

        def preference(hidden: Tensor, head: Head):
            output = linear_tis_dpo_loss(
                flat.take(hidden), head.weight, flat.target, flat.cu_seqlens, token_weights=flat.token_weights, bias=head.bias,
                objective=self.objective, normalizer=items, ignore_index=None, **reference, **head.transform,
            )  # fmt: skip
            return output, head.aux_loss, head.aux_loss_coef

        output, *aux = model(**model_inputs(inputs), head=preference)
        self._first_step.check(output, flat, exact=self.cache is None or self.cache.dtype == torch.float32)
        return self._add_aux_loss(output.loss, preference_metrics(output, flat), *aux, self._items(inputs) / items)

    @staticmethod
    def _add_aux_loss(loss: Tensor, metrics: dict, aux_loss: Tensor | None, coef: float, share) -> tuple[Tensor, dict]:
        """Loss and metrics with the routers' loss, the mean of a batch, of which this one is a `share`."""
        if aux_loss is None:
            return loss, metrics
        return loss + coef * share * aux_loss, metrics | {"aux_loss": aux_loss}

    def _reference(self, inputs, flat) -> dict:
        """The reference for this batch: precomputed log-probs, or its hidden states (cached or computed here) and head."""
        if flat.ref_logps is not None and self.objective.kl is None:
            return {"ref_logps": flat.ref_logps}
        if self.cache is not None:
            return {"ref_hidden": inputs["ref_hidden"].to(self.ref_head["ref_weight"]), **self.ref_head}
        policy = self.accelerator.unwrap_model(self.model)
        if self.ref_model is None and not is_peft_model(policy):
            raise InputError(
                "these rows have no reference log-probs, and there is no reference model to make them; give the rows to the constructor, "
                "to evaluate() or to predict(), or give the constructor a ref_model and precompute_ref=False"
            )
        off = nullcontext() if self.ref_model is not None else adapters_off(policy)
        with self.accelerator.autocast(), off:  # accelerate's own is around forwards it has prepared, and those without `head`
            return reference_inputs(self.ref_model if self.ref_model is not None else self.model, inputs, flat, policy)

    # Metrics

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the means, over all batches since the last log and all ranks, of what the losses reported."""
        evaluated = self._eval_prefix is not None and any(key.startswith(f"{self._eval_prefix}_") for key in logs)
        mode, prefix = ("eval", f"{self._eval_prefix}_") if evaluated else ("train", "")
        logs |= {prefix + name: mean for name, mean in self._mean_metrics(mode).items()}
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """`Trainer.evaluate`; rows given here are prepared like those of the constructor."""
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            eval_dataset = self._ready(eval_dataset)
        outer, self._eval_prefix = self._eval_prefix, metric_key_prefix
        self._sums["eval"].clear()
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._eval_prefix = outer

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test"):
        """`Trainer.predict`; rows are prepared like those of the constructor. No predictions, but all metrics of an evaluation."""
        self._sums["eval"].clear()
        output = super().predict(self._ready(test_dataset), ignore_keys, metric_key_prefix)
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in self._mean_metrics("eval").items()})
        return output

    def _ready(self, dataset):
        """Rows that come after the constructor, like those that came with it."""
        check_kind(dataset)
        known = brings_reference(dataset)
        moved = self._policy_scores and (not is_peft_model(self._scorer) or trained_base(self._scorer) is not None)
        if moved and not known and self.state.global_step > 0:
            raise InputError(
                "these rows have no reference log-probs, and the reference was the policy before training; give them to the "
                "constructor as eval_dataset, or give it a ref_model"
            )
        return self._with_reference(self._prepared(dataset, self.processing_class, self.args))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._unrepeated(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None


def preference_metrics(output, flat) -> dict[str, Tensor]:
    """What is logged of a `PreferenceOutput` and its `FlatBatch`: one value a pair, of weights one a token."""
    metrics = {
        "rewards/chosen": output.chosen_rewards,
        "rewards/rejected": output.rejected_rewards,
        "rewards/accuracies": (output.chosen_rewards > output.rejected_rewards).float(),
        "rewards/margins": output.logits,
        "logps/chosen": output.chosen_logps,
        "logps/rejected": output.rejected_logps,
    }
    if output.chosen_kl is not None:
        metrics |= {"kl/chosen": output.chosen_kl, "kl/rejected": output.rejected_kl}
    if output.chosen_nll is not None:
        metrics["nll_loss"] = output.chosen_nll
    if flat.token_weights is not None:
        lengths = flat.cu_seqlens.diff()
        chosen = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device) % 2 == 0, lengths)
        metrics |= {"weights/chosen": flat.token_weights[chosen], "weights/rejected": flat.token_weights[~chosen]}
    return metrics


def adapters_off(model):
    """A context in which a PEFT model is its base, and any other model what it is."""
    return model.disable_adapter() if is_peft_model(model) else nullcontext()


def fingerprint_if_here(model, adapters: bool = False) -> str | None:
    """Fingerprint of a model, with its adapters or of the base alone; None where its weights are not all here (meta device, sharded)."""
    elsewhere = any(p.is_meta or not p.numel() or hasattr(p, "placements") for p in model.parameters())
    return None if elsewhere else model_fingerprint(model, adapters and is_peft_model(model))
