"""Runs that must not depend on the number of processes: `torchrun processes_cases.py OUT`, or `run(case)` for one process.

Every case is one epoch with the same global batches: what one process holds in one batch, two processes share.
"""

import os
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial

import tiny
import torch
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass
class Case:
    pairs: int
    batch: int  # pairs of a global batch
    accumulate: int = 1  # of two processes; one process has the whole global batch at once
    tied: bool = False
    lora: bool = False
    trl: bool = False
    options: dict = field(default_factory=dict)


CASES = {
    # 4 + 4 + 3 pairs: of the last batch the second process has one pair and one repeated pair; 5 to evaluate: it has repeated ones only
    "uneven": Case(11, 4),
    "kl, tied, accumulated": Case(9, 8, accumulate=2, tied=True, options=dict(kl="reverse")),  # 8 + 1 pairs: one process has none
    "kl": Case(7, 4, options=dict(kl="forward", padding_free=True)),
    "by tokens": Case(11, 0, options=dict(tokens_per_batch=400, max_length=128, train_sampling_strategy="sequential")),
    "sft": Case(7, 4, tied=True, options=dict(method="sft")),
    "lora": Case(7, 4, lora=True, options=dict(kl="reverse")),
    "lora, log-probs": Case(7, 4, lora=True),
    "padding-free, nll": Case(7, 4, options=dict(padding_free=True, nll_coef=0.5)),
    "trl": Case(11, 4, trl=True, options=dict(kl="reverse")),
    "trl, tied, accumulated": Case(9, 8, accumulate=2, tied=True, trl=True),
    "trl, lora": Case(7, 4, lora=True, trl=True),
    "trl, lora, kl": Case(7, 4, lora=True, trl=True, options=dict(kl="reverse")),
    "trl, log-probs": Case(11, 4, trl=True, options=dict(precompute_ref_log_probs=True)),
}


def model(tied: bool, seed: int = 0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tiny.tokenizer()), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=160, tie_word_embeddings=tied, initializer_range=0.2,
        )
    )  # fmt: skip


def trainer(case: Case, folder: str, processes: int):
    each = case.batch // processes // (case.accumulate if processes > 1 else 1)
    options = dict(
        output_dir=folder, num_train_epochs=1, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=1.0,
        logging_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=True, report_to="none", train_sampling_strategy="sequential",
        gradient_accumulation_steps=case.accumulate if processes > 1 else 1, per_device_eval_batch_size=4 // processes,
        eval_strategy="epoch",
    ) | case.options  # fmt: skip
    if case.batch:
        options["per_device_train_batch_size"] = each
    else:  # as many batches of tokens a step
        options["gradient_accumulation_steps"] = 2 // processes
    policy = model(case.tied)
    if case.lora:
        import peft

        torch.manual_seed(1)
        policy = peft.get_peft_model(policy, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    # of LoRA the base is the reference; it differs from the start, for the adapters are not 0
    reference = None if case.lora or options.get("method") == "sft" else model(case.tied, seed=5)
    rows = tiny.rows(24) if options.get("method") == "sft" else tiny.contrast(tiny.rows(24))
    train, held_out = rows.select(range(case.pairs)), rows.select(range(12, 17))
    if case.trl:
        from tisdpo.integrations.trl import TISDPOConfig, TISDPOTrainer

        args = TISDPOConfig(**options, bf16=False, gradient_checkpointing=False)
        return TISDPOTrainer(policy, reference, args, train_dataset=train, eval_dataset=held_out, processing_class=tiny.tokenizer())
    from tisdpo import TISDPOConfig, TISDPOTrainer

    args = TISDPOConfig(**options, sanity_check=False)
    return TISDPOTrainer(
        policy, args, train_dataset=train, eval_dataset=held_out, processing_class=tiny.tokenizer(), ref_model=reference
    )  # fmt: skip


def wrapper_of(module) -> str:
    return "FSDP2" if isinstance(module, FSDPModule) else type(module).__name__


def run(case: Case) -> dict:
    """What was logged, and the parameters afterwards, whole."""
    with tempfile.TemporaryDirectory() as folder:
        t = trainer(case, folder, int(os.environ.get("WORLD_SIZE", 1)))
        t.train()
    timing = ("runtime", "per_second", "total_flos")
    logged = [{k: float(v) for k, v in entry.items() if not any(x in k for x in timing)} for entry in t.state.log_history]
    whole = {name: p.detach() for name, p in t.accelerator.unwrap_model(t.model).named_parameters() if p.requires_grad}
    whole = {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for name, p in whole.items()}
    return {
        "logged": logged,
        "parameters": whole,
        "kind": str(t.accelerator.distributed_type),
        "policy": wrapper_of(t.model_wrapped),
        "reference": wrapper_of(getattr(t, "ref_model", None)),
    }


def shard_on_cpu() -> None:
    """accelerate uses FSDP on accelerators only and DDP on a CPU, without a word; do here what it does there."""
    from accelerate.state import AcceleratorState, DistributedType

    own = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        own(self, *args, **kwargs)  # takes the type from the kind of process, at every call
        if vars(self).get("fsdp_plugin", kwargs.get("fsdp_plugin")) is not None:
            self.fsdp_plugin = kwargs.get("fsdp_plugin") or self.fsdp_plugin
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


# Heads that are freed outside of their own forward, which accelerate's way of sharding leaves whole


def freed_heads() -> dict[str, dict]:
    """Loss and gradients of a policy with an online reference: whole, and sharded so that the head is freed after its forward."""
    from tisdpo import Objective, linear_tis_dpo_loss
    from tisdpo.batches import flatten_batch
    from tisdpo.data import PairCollator
    from tisdpo.hf import attach_head, is_sharded, model_inputs, reference_inputs

    batch = PairCollator(0)(list(tiny.rows(24).select(range(3))))
    flat, found = flatten_batch(batch), {}
    for tied in (False, True):
        for layout in ("whole", "head apart", "root"):
            policy, reference = attach_head(model(tied)), attach_head(model(tied, seed=5))
            for each in (policy, reference) if layout != "whole" else ():
                if layout == "head apart":
                    head = [each.get_input_embeddings(), each.lm_head] if tied else each.lm_head
                    fully_shard(head, reshard_after_forward=True)
                fully_shard(each, reshard_after_forward=True)
                assert is_sharded(each) and all(hasattr(p, "placements") for p in each.parameters())
            loss = partial(
                linear_tis_dpo_loss, target=flat.target, cu_seqlens=flat.cu_seqlens, objective=Objective(kl="reverse"),
                **reference_inputs(reference, batch, flat, policy),
            )  # fmt: skip
            output = policy(**model_inputs(batch), head=lambda hidden, head, loss=loss: loss(flat.take(hidden), head.weight))
            output.loss.backward()
            gradients = {name: p.grad for name, p in policy.named_parameters()}
            gradients = {name: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for name, g in gradients.items()}
            found[f"{'tied' if tied else 'untied'}, {layout}"] = {"loss": output.loss.detach(), "gradients": gradients}
    return found


def split_vocabulary() -> str:
    """What is said of a head that is split over the vocabulary."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    from tisdpo.errors import InputError
    from tisdpo.hf import attach_head

    split = attach_head(model(tied=False))
    parallelize_module(split, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), {"lm_head": ColwiseParallel()})
    try:
        split(input_ids=torch.tensor([[5, 6, 7]]), head=lambda hidden, head: hidden @ head.weight.T)
    except InputError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {"ddp": {name: run(case) for name, case in CASES.items()}}
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    os.environ |= {"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    shard_on_cpu()
    found["fsdp2"] = {name: run(case) for name, case in CASES.items()}
    found |= {"freed heads": freed_heads(), "split vocabulary": split_vocabulary()}
    torch.save(found, f"{sys.argv[1]}.{os.environ['RANK']}")
    torch.distributed.destroy_process_group()
