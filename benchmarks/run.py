"""Everybody's loss step at one head, in one process, beside the matrix products it cannot do without.

    python -m benchmarks.run                                            # float32, N=1024, H=1024, V=32000, this machine's device
    python -m benchmarks.run --dtype bfloat16 --hidden 896 --vocabulary 151936
    python -m benchmarks.run --providers tisdpo TRL --rounds 3          # only those whose name contains one of the words
    python -m benchmarks.run --list

Ratios are to the products in the same dtype, measured in the same rounds; errors are relative, against float64, for the loss and the
gradients. A provider that does not run here stands in the table with the reason. Peak memory on a CPU is in `python -m benchmarks.head`.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.device import environment, measure, table
from benchmarks.head import cpu_name
from benchmarks.registry import MODES, PROVIDERS, SMOKE, Size


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--modes",
        type=int,
        nargs="+",
        choices=range(4),
        default=[0, 1, 2, 3],
        help="; ".join(f"{i}: {m.name}" for i, m in enumerate(MODES)),
    )
    parser.add_argument("--providers", nargs="+", default=[""], help="words of the names to take part (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (default 5)")
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU")
    parser.add_argument("--no-check", action="store_true", help="leave out the comparison with float64, which takes memory and time")
    parser.add_argument("--smoke", action="store_true", help="a tiny size, two rounds: to see that it works")
    parser.add_argument("--list", action="store_true", help="print the providers and whether they run here")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    providers = [p for p in PROVIDERS if any(word.lower() in p.name.lower() for word in args.providers)]
    if not providers:
        print(
            f"no provider's name contains {' or '.join(args.providers)}; there are: {', '.join(p.name for p in PROVIDERS)}", file=sys.stderr
        )
        return 2
    if args.list:
        for p in providers:
            print(f"{p.name:<32}{p.missing(device) or p.version}{'' if p.kl else '; has no KL'}")
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    size = SMOKE if args.smoke else Size(args.tokens, args.hidden, args.vocabulary, args.pairs)
    report = environment(device) | {"dtype": args.dtype, "threads": torch.get_num_threads(), "steps": []}
    report.setdefault("device", {"name": cpu_name()})
    for mode in args.modes:
        print(f"{MODES[mode].name} ...", flush=True)
        rounds = 2 if args.smoke else args.rounds
        result = measure(size, MODES[mode], providers, rounds, device, getattr(torch, args.dtype), check=not args.no_check)
        report["steps"].append({"head": args.dtype} | result)
    print(table(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
