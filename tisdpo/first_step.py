"""Where no reference was given the policy is its own: which adapters allow that, and what the first step says about it."""

import torch
from accelerate.utils import is_peft_model

from tisdpo.errors import InputError
from tisdpo.fingerprints import base_parameters


def check_base(model, moves: bool) -> None:
    """InputError for adapters that change the base they are put on: it is no reference then. moves: the reference is computed while
    training goes on, so that a base which is trained itself is none either."""
    for config in model.peft_config.values() if is_peft_model(model) else ():
        how = getattr(config, "init_lora_weights", True)
        if isinstance(how, str) and how.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
            raise InputError(
                f"init_lora_weights={how!r} changes the weights of the base, so with its adapters off it is no longer the reference; pass "
                "the model as it was before as ref_model"
            )
    trained = trained_base(model) if moves else None
    if trained is not None:
        raise InputError(
            f"{trained}, a weight of the base, is trained (LoraConfig(bias=...)? unfrozen by hand?), so with the adapters off the model is "
            "no longer the reference; freeze it, or pass the model as it was before as ref_model"
        )


def trained_base(model) -> str | None:
    """Name of a weight of a PEFT model's base that is trained; None where there is none."""
    return next((name for name, x in base_parameters(model) if x.requires_grad), None) if is_peft_model(model) else None


def is_its_base(model) -> bool:
    """Whether the policy computes what its reference does: not a PEFT model, or one whose LoRA adapters are new (what is added is 0)."""
    if not is_peft_model(model):
        return True
    added = [p for name, p in model.named_parameters() if ".lora_B." in name or ".lora_embedding_A." in name]
    return bool(added) and not any(p.any() for p in added)


class FirstStep:
    """Stops a trainer at its first step unless policy and reference have the same log-probs there."""

    def __init__(self, trainer, starts_at_reference: bool):
        """starts_at_reference: whether no other reference was given; what makes a policy differ from itself in training is found here."""
        args = trainer.args
        quiet = args.disable_dropout and getattr(args, "neftune_noise_alpha", None) is None
        self.trainer, self.waits = trainer, starts_at_reference and args.sanity_check and quiet

    def check(self, output, flat, exact: bool = True) -> None:
        """RuntimeError unless every log-ratio and KL is 0, and so the rewards, whatever the weights (sigmoid: a loss of ln 2); once.

        output: `PreferenceOutput` of the batch `flat`; exact: what comes of the reference is in float32, whatever the trainer computes in.
        """
        trainer = self.trainer
        if not self.waits or not trainer.model.training:
            return
        self.waits = False
        if trainer.state.global_step > 0:
            return  # a resumed run has moved away from the reference
        rewards = torch.stack([output.chosen_rewards, output.rejected_rewards], 1).flatten()
        weights = torch.ones_like(flat.target, dtype=rewards.dtype) if flat.token_weights is None else flat.token_weights
        squares = torch.stack([w.square().sum() for w in weights.split(flat.cu_seqlens.diff().tolist())])
        # rounding has no direction: the sum over tokens grows with the root of their number, where another model's grows with the number
        found = (rewards.abs() / (trainer.objective.beta * squares.sqrt().clamp(min=1e-6))).mean()
        found = trainer.accelerator.reduce(found, "mean").item()  # all processes stop, or none
        exact = exact and trainer.accelerator.mixed_precision == "no" and not trainer.args.tf32
        exact = exact and all(p.dtype == torch.float32 for p in trainer.model.parameters())
        if not found <= (1e-3 if exact else 0.1):  # 16-bit hidden states depend on the padding of their batch
            raise RuntimeError(
                "at the first step policy and reference are the same model, so their log-probs must be the same, but they differ by "
                f"{found:.2g} nats times the root of a sequence's tokens (the loss is {output.losses.mean().item():.6f}): are the "
                "reference log-probs those of this model, tokenizer and max_length? Was the model changed after it was loaded (TRL loads "
                "the reference again)? Pass the reference as ref_model, or sanity_check=False if they differ on purpose or by chance, "
                "such as that of a noisy router"
            )
