"""Whole training steps and scoring on small models with real vocabularies: this library, TRL's DPO trainer, the unfused equations.

    python -m benchmarks.end_to_end                    # Llama, Qwen3 and Gemma3 shapes with random weights; JSON into benchmarks/results/
    python -m benchmarks.end_to_end --smoke            # tiny sizes, to see that it works
    python -m benchmarks.end_to_end --only Llama --no-longest

A step is the trainer's loss, its backward and AdamW, on one batch of pairs that all get alike; the losses must agree before anything is
timed. Tokens are those of prompts and completions, padding not counted. Peak memory is that of loss and backward in a fresh process,
gradients included, weights and reference not; of scoring, that of the log-probs of a batch. `longest`: pairs of one length, of which peak
memory is measured until it exceeds the limit.
"""

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks import baselines
from benchmarks.measure import MIB, default_path, environment, fresh_process, growth, interleaved, op_tests, reason, save

PROMPT = 32
BETA = 0.1
ANYWHERE = tempfile.gettempdir()  # the trainers make their output directory, and write nothing here


@dataclass(frozen=True)
class Shape:
    """A small model with the vocabulary of a real one."""

    family: str
    vocabulary: int
    hidden: int = 256
    layers: int = 4
    tied: bool = False


SHAPES = {
    "Llama": Shape("llama", 128256),
    "Qwen3": Shape("qwen3", 151936, tied=True),
    "Gemma3": Shape("gemma3_text", 262208, tied=True),
}
SMOKE = Shape("llama", 503, hidden=32, layers=2)


@dataclass(frozen=True)
class Batch:
    """`pairs` pairs whose completions have between half of `length` and `length` tokens (all of them `length` where not `ragged`)."""

    pairs: int = 4
    length: int = 128
    ragged: bool = True


def model(shape: Shape, seed: int):
    """A causal language model with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        shape.family, vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=3 * shape.hidden, head_dim=shape.hidden // 4,
        num_hidden_layers=shape.layers, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1 << 16,
        tie_word_embeddings=shape.tied, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def tokenizer(vocabulary: int):
    """One word a token: `t<id>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, vocabulary)}
    words = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def pairs(vocabulary: int, batch: Batch):
    """Pairs as text, with a weight for every completion token (EOS included)."""
    from datasets import Dataset

    g = torch.Generator().manual_seed(0)

    def text(n: int) -> str:
        return " ".join(f"t{i}" for i in torch.randint(3, vocabulary, (n,), generator=g).tolist())

    rows = []
    for _ in range(batch.pairs):
        lengths = [int(torch.randint(batch.length // 2, batch.length, (), generator=g)) if batch.ragged else batch.length - 1 for _ in "cr"]
        row = {"prompt": text(PROMPT) + " "}
        for side, n in zip(("chosen", "rejected"), lengths):
            row[side] = text(n)
            row[f"{side}_weights"] = (0.5 + 1.5 * torch.rand(n + 1, generator=g)).tolist()
        rows.append(row)
    return Dataset.from_list(rows)


# Who takes a step: (shape, batch, weighted with KL or not) -> (model, function that returns the loss)


def ours(shape: Shape, batch: Batch, weighted: bool):
    import tisdpo

    rows, policy = pairs(shape.vocabulary, batch), model(shape, 0)
    if not weighted:
        rows = rows.remove_columns(["chosen_weights", "rejected_weights"])
    args = tisdpo.TISDPOConfig(
        ANYWHERE, method="tis-dpo" if weighted else "dpo", kl="reverse" if weighted else None, beta=BETA, precompute_ref=False,
        per_device_train_batch_size=batch.pairs, max_length=1 << 16, use_cpu=not torch.cuda.is_available(), save_strategy="no",
    )  # fmt: skip
    words, reference = tokenizer(shape.vocabulary), model(shape, 1)
    trainer = tisdpo.TISDPOTrainer(policy, args, train_dataset=rows, processing_class=words, ref_model=reference)
    return _prepared(trainer, policy)


def trl(shape: Shape, batch: Batch, weighted: bool):
    from trl import DPOConfig, DPOTrainer

    policy = model(shape, 0)
    args = DPOConfig(
        ANYWHERE, beta=BETA, per_device_train_batch_size=batch.pairs, max_length=None, use_cpu=not torch.cuda.is_available(), bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no",
    )  # fmt: skip
    rows = pairs(shape.vocabulary, batch).remove_columns(["chosen_weights", "rejected_weights"])
    return _prepared(DPOTrainer(policy, model(shape, 1), args, train_dataset=rows, processing_class=tokenizer(shape.vocabulary)), policy)


def trl_without_its_log(shape: Shape, batch: Batch, weighted: bool):
    """TRL's trainer without what it computes of every token for its log alone (entropy, mean logit, accuracy), which the others don't."""
    from trl.trainer.utils import add_fused_lm_head

    policy, loss = trl(shape, batch, weighted)
    add_fused_lm_head(policy)
    forward = policy.forward

    def with_zeros(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.entropy = output.mean_logits = output.log_probs.detach().new_zeros(()).expand_as(output.log_probs)
        output.is_top1 = output.entropy > 0
        return output

    policy.forward = with_zeros
    return policy, loss


def _prepared(trainer, policy):
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    policy.train()
    return policy, lambda: trainer.compute_loss(policy, inputs)


def unfused(shape: Shape, batch: Batch, weighted: bool):
    from tisdpo.data import PairCollator, tokenize_pairs

    rows, _ = tokenize_pairs(pairs(shape.vocabulary, batch), tokenizer(shape.vocabulary), max_length=1 << 16)
    inputs = PairCollator(0, weights=weighted)(list(rows))
    policy, reference = model(shape, 0).train(), model(shape, 1).eval().requires_grad_(False)
    return policy, partial(baselines.tis_dpo_loss, policy, reference, inputs, BETA, kl=weighted)


PROVIDERS = {"tisdpo": ours, "TRL": trl, "TRL, without its log": trl_without_its_log, "unfused": unfused}
TASKS = {"DPO, online reference": False, "TIS-DPO, KL, online reference": True}


def takes_part(provider: str, weighted: bool) -> str:
    """ "" or why not."""
    return "has no token weights and no sequence KL" if provider.startswith("TRL") and weighted else ""


def tokens(vocabulary: int, batch: Batch) -> int:
    rows = pairs(vocabulary, batch)
    return sum(2 * PROMPT + len(row["chosen_weights"]) + len(row["rejected_weights"]) for row in rows)


def peak(provider: str, shape: Shape, batch: Batch, weighted: bool, threads: int) -> int:
    """Bytes of loss and backward; to be called in a fresh process."""
    torch.set_num_threads(threads)
    _, warm = PROVIDERS[provider](SMOKE, Batch(2, 8), weighted)
    warm().backward()
    _, loss = PROVIDERS[provider](shape, batch, weighted)
    return growth(lambda: loss().backward())


def steps(name: str, shape: Shape, batch: Batch, rounds: int, memory: bool) -> list[dict]:
    """Every task by everybody: loss, seconds, tokens a second, peak memory."""
    results, count = [], tokens(shape.vocabulary, batch)
    for task, weighted in TASKS.items():
        print(f"{name}: {task} ...", flush=True)
        rows, jobs = {}, {}
        for provider, make in PROVIDERS.items():
            if why := takes_part(provider, weighted):
                rows[provider] = {"skipped": why}
                continue
            try:
                policy, loss = make(shape, batch, weighted)
                rows[provider] = {"loss": loss().item()}
                jobs[provider] = _training_step(policy, loss)
                if memory:
                    arguments = (peak, provider, shape, batch, weighted, torch.get_num_threads())
                    rows[provider]["peak_bytes"] = fresh_process(*arguments)
            except ImportError as error:
                rows[provider] = {"skipped": reason(error)}
        losses = [row["loss"] for row in rows.values() if "loss" in row]
        if max(losses) - min(losses) > 1e-4 * max(losses):
            raise RuntimeError(f"{name}, {task}: the losses differ ({rows}), so nothing is timed")
        for job in jobs.values():
            job()  # makes the optimiser's state
        for provider, figures in interleaved(jobs, rounds, "cpu").items():
            rows[provider] |= figures | {"tokens_per_second": count / figures["seconds"]}
        results.append({"model": name, "shape": asdict(shape), "batch": asdict(batch), "task": task, "tokens": count, "rows": rows})
    return results


def _training_step(policy, loss):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def scorers(shape: Shape, batch: Batch) -> dict:
    """Log-probs of all completions of a batch: the library's `completion_logps` against all logits at once."""
    from tisdpo.data import PairCollator, tokenize_pairs
    from tisdpo.scoring import completion_logps

    rows, _ = tokenize_pairs(pairs(shape.vocabulary, batch), tokenizer(shape.vocabulary), max_length=1 << 16)
    scorer, inputs = model(shape, 0).eval(), PairCollator(0)(list(rows))
    prompts = [row["prompt_ids"] for row in rows for _ in "cr"]
    completions = [row[f"{side}_ids"] for row in rows for side in ("chosen", "rejected")]
    return {
        "tisdpo": lambda: torch.cat(completion_logps(scorer, prompts, completions, pad_token_id=0)),
        "unfused": lambda: baselines.score(scorer, inputs)[inputs["completion_mask"][:, 1:].bool()],
    }


def peak_of_scoring(provider: str, shape: Shape, batch: Batch, threads: int) -> int:
    """Bytes of the log-probs of a batch; to be called in a fresh process."""
    torch.set_num_threads(threads)
    scorers(SMOKE, Batch(2, 8))[provider]()
    return growth(scorers(shape, batch)[provider])


def scoring(name: str, shape: Shape, batch: Batch, rounds: int, memory: bool) -> dict:
    """Seconds, tokens a second and peak memory of `scorers`."""
    print(f"{name}: scoring ...", flush=True)
    jobs = scorers(shape, batch)
    torch.testing.assert_close(*(job() for job in jobs.values()), rtol=0, atol=1e-3)
    count = tokens(shape.vocabulary, batch)
    rows = {k: v | {"tokens_per_second": count / v["seconds"]} for k, v in interleaved(jobs, rounds, "cpu").items()}
    for provider in rows if memory else ():
        rows[provider]["peak_bytes"] = fresh_process(peak_of_scoring, provider, shape, batch, torch.get_num_threads())
    return {"model": name, "task": "scoring", "tokens": count, "rows": rows}


def longest(name: str, shape: Shape, limit: int, lengths: list[int]) -> dict:
    """For everybody: peak memory of one pair with completions of growing length, and the longest that stays within `limit` bytes, by
    straight lines between the lengths that were measured."""
    rows = {}
    for task, weighted in TASKS.items():
        for provider in PROVIDERS:
            if takes_part(provider, weighted):
                continue
            points = []
            for length in lengths:
                print(f"{name}: {task}, {provider}, completions of {length} tokens ...", flush=True)
                batch = Batch(1, length, ragged=False)
                points.append((length, fresh_process(peak, provider, shape, batch, weighted, torch.get_num_threads())))
                if points[-1][1] > limit:
                    break
            rows.setdefault(task, {})[provider] = {"points": points, "longest": _crossing(points, limit)}
    return {"model": name, "shape": asdict(shape), "limit_bytes": limit, "rows": rows}


def _crossing(points: list[tuple[int, int]], limit: int) -> int | None:
    """The length at which memory reaches the limit; None: not within the lengths that were tried."""
    for (short, low), (long, high) in pairwise(points):
        if low <= limit < high:
            return int(short + (long - short) * (limit - low) / (high - low))
    return 0 if points[0][1] > limit else None


def table(report: dict) -> str:
    lines = []
    for result in report["steps"] + report["scoring"]:
        lines.append(f"\n{result['model']}, {result['task']}: {result['tokens']} tokens")
        for name, row in sorted(result["rows"].items(), key=lambda item: item[1].get("seconds", 9e9)):
            if "seconds" not in row:
                lines.append(f"  {name:<21}{row['skipped']}")
                continue
            memory = f"{row['peak_bytes'] / MIB:9.0f} MiB" if "peak_bytes" in row else ""
            lines.append(f"  {name:<21}{1e3 * row['seconds']:10.1f} ms{row['tokens_per_second']:10.0f} tokens/s{memory}")
    for result in report["longest"]:
        lines.append(f"\n{result['model']}, one pair within {result['limit_bytes'] / MIB:.0f} MiB, tokens a completion")
        for task, rows in result["rows"].items():
            found = (f"{n} {'more than ' + str(r['points'][-1][0]) if r['longest'] is None else r['longest']}" for n, r in rows.items())
            lines.append(f"  {task:<32}" + ", ".join(found))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SHAPES, help="these models only")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (default 5)")
    parser.add_argument("--limit", type=int, default=2048, metavar="MIB", help="memory for `longest` (default 2048)")
    parser.add_argument("--no-longest", action="store_true", help="leave out the longest sequence, a dozen fresh processes")
    parser.add_argument("--no-tests", action="store_true", help="don't run the tests of the measured functions first")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, two rounds, no tests, nothing written without --output")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/end-to-end-<device>-<date>.json)")
    args = parser.parse_args(argv)
    if torch.cuda.is_available():
        print("this benchmark measures the CPU so far; on a GPU run python -m benchmarks.device", file=sys.stderr)
        return 2
    if not (args.smoke or args.no_tests) and (failures := op_tests()):
        print(failures, "the tests failed, so nothing is timed", sep="\n", file=sys.stderr)
        return 1
    report = environment("cpu") | {"steps": [], "scoring": [], "longest": []}
    output = args.output or (None if args.smoke else default_path("end-to-end", "cpu", report["date"]))
    shapes = {"smoke": SMOKE} if args.smoke else {name: SHAPES[name] for name in args.only or SHAPES}
    batch, rounds = (Batch(2, 16), 2) if args.smoke else (Batch(), args.rounds)
    for name, shape in shapes.items():
        report["steps"] += steps(name, shape, batch, rounds, memory=not args.smoke)
        report["scoring"].append(scoring(name, shape, replace(batch, pairs=2 * batch.pairs), rounds, memory=not args.smoke))
        if name == next(iter(shapes)) and not (args.no_longest or args.smoke):
            lengths = [256 * 2**i for i in range(8)]
            report["longest"].append(longest(name, shape, args.limit * MIB, lengths))
        if output is not None:
            save(report, output)
    print(table(report))
    if output is not None:
        print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
