"""TIS-DPO on TRL's DPOTrainer: python examples/trl_tisdpo.py <model> <scored set> [output]

The scored set is what `tisdpo weights` writes: pairs as token ids with the raw contrast of every completion token.
"""

import sys

import torch

from tisdpo.hf import load_model, load_tokenizer
from tisdpo.integrations.trl import TISDPOConfig, TISDPOTrainer
from tisdpo.scored import load_scored


def main(path: str, scored: str, output: str = "out") -> None:
    args = TISDPOConfig(
        output, weighting={"upper": 1.5}, kl="reverse", beta=0.1, max_steps=10, logging_steps=1, bf16=torch.cuda.is_available()
    )
    model, reference, rows = load_model(path), load_model(path), load_scored(scored)
    trainer = TISDPOTrainer(model, reference, args, train_dataset=rows, processing_class=load_tokenizer(path))
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
