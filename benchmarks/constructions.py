"""What decides between the constructions (S) and (D): their contrasts against the truth, for several settings of the contrastive models.

    tisdpo run examples/demo.yaml seeds=5 output_dir=runs/demo-5     # makes the base models, the world and the demo's own settings
    python -m benchmarks.constructions runs/demo-5                   # five settings a seed, about a minute each; goes on where it was

Writes benchmarks/results/constructions-<seeds>-seeds.json. Per setting and seed: AUC of |contrast| for tokens that carry reward, over all
tokens and among rewarded words alone (the same words about people, which count, and about things, which don't); mean |contrast| in nats on
both kinds of tokens; the ratio of their |log w| after the clamp; the share of both that the clamp cuts.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from tisdpo import contrastive, pipeline
from tisdpo.config import load_config
from tisdpo.evaluate import truth_agreement
from tisdpo.files import write_json
from tisdpo.hf import load_model
from tisdpo.intervals import estimate
from tisdpo.stages import train_stage
from tisdpo.synthetic import BAD, GOOD

# setting: (construction, learning rate, beta of the contrastive DPO)
SETTINGS = {
    "S, 1e-4": ("S", 1e-4, None),
    "S, 3e-4": ("S", 3e-4, None),
    "S, 1e-3": ("S", 1e-3, None),
    "D, beta 1": ("D", 3e-4, 1.0),
    "D, beta 0.1": ("D", 3e-4, 0.1),
}
COLUMNS = ("auc", "auc_rewarded_words", "important", "other", "signal_to_noise", "important_clipped", "other_clipped")
RESULTS = Path(__file__).parent / "results"


def contrastive_model(run: pipeline.SeedRun, side: str, learning_rate: float, beta: float | None, path: Path):
    """One model of the pair, trained on the run's base model with another setting."""
    if not (path / "model").is_dir():
        contrast, options = run.config.contrast, {"max_length": run.config.data.max_length}
        if beta is None:
            stage, rows, options = contrast.sft, run.source.train, options | {"method": "sft", "sft_side": side}
        else:
            stage, rows = contrast.dpo, run.rows_for_contrast
            options |= {"method": "dpo", "beta": beta, "swap_pairs": side == "rejected"}
        stage = replace(stage, learning_rate=learning_rate)
        train_stage(run.base(), run.tokenizer, rows, stage, path, label=run.label(path.name), seed=run.seed, options=options)
    return load_model(str(path / "model")).eval()


def scored(run: pipeline.SeedRun, name: str):
    """Training rows with the contrast of a setting."""
    _, learning_rate, beta = SETTINGS[name]
    folder = run.directory / "settings" / name.replace(", ", "-").replace(" ", "-")
    models = [contrastive_model(run, side, learning_rate, beta, folder / side) for side in ("chosen", "rejected")]
    scorers = [contrastive.Scorer(model) for model in models]
    pad, batch = run.tokenizer.pad_token_id, run.config.contrast.batch_tokens
    return contrastive.score_contrast(run.source.train, *scorers, pad_token_id=pad, parts=folder / "parts", batch_tokens=batch)


def measured(run: pipeline.SeedRun, rows) -> dict[str, float]:
    """How well a contrast finds the important tokens, and what the clamp leaves of it."""
    sides = ("chosen", "rejected")
    r, truth, ids = (torch.tensor([x for s in sides for v in rows[f"{s}_{kind}"] for x in v]) for kind in ("contrast", "truth", "ids"))
    r, important = r.double(), truth != 0
    rewarded = torch.tensor([run.tokenizer.decode([i]).strip() in GOOD + BAD for i in range(len(run.tokenizer))])[ids]
    rule = run.config.weighting
    clipped, log_weight = (r <= rule.lower) | (r >= rule.upper), r.clamp(rule.lower, rule.upper).abs()
    return {
        "auc": truth_agreement(r, truth)["auc"],
        "auc_rewarded_words": truth_agreement(r[rewarded], truth[rewarded])["auc"],
        "important": r[important].abs().mean().item(),
        "other": r[~important].abs().mean().item(),
        "signal_to_noise": (log_weight[important].mean() / log_weight[~important].mean()).item(),
        "important_clipped": clipped[important].double().mean().item(),
        "other_clipped": clipped[~important].double().mean().item(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a finished run of examples/demo.yaml")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    config = load_config(args.run / "config.yaml", [])
    torch.set_num_threads(config.threads or torch.get_num_threads())
    output = args.output or RESULTS / f"constructions-{len(config.seed_list)}-seeds.json"
    results = json.loads(output.read_text()) if output.exists() else []
    for seed in config.seed_list:
        run = pipeline.SeedRun(config, seed, args.run / f"seed-{seed}")
        for name in SETTINGS:
            if not any(r["setting"] == name and r["seed"] == seed for r in results):
                results.append({"setting": name, "seed": seed} | measured(run, scored(run, name)))
                write_json(output, results)
    print(f"{'setting':<14}" + "".join(f"{column:>22}" for column in COLUMNS))
    for name in SETTINGS:
        found = [estimate(r[column] for r in results if r["setting"] == name) for column in COLUMNS]
        print(f"{name:<14}" + "".join(f"{f'{e.mean:.3f} ± {e.half_width or 0:.3f}':>22}" for e in found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
