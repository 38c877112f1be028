"""The command line: `tisdpo run`, `weights`, `train`, `eval`, `study`, `score`, `show`, `annotate`, `agreement`, `plan` and `doctor`.

A mistake of the user ends in one sentence on stderr and exit code 2 (with --debug in a traceback), Ctrl-C in one line and 130. Results go
to stdout, progress to stderr. What a command needs is imported when it runs, so that --help is quick.
"""

import argparse
import errno
import importlib.util
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path

from tisdpo.errors import InputError

DESCRIPTION = """\
Preference training with a weight for every token (TIS-DPO, arXiv 2410.04350), start to end.

    tisdpo run examples/demo.yaml       pairs -> contrastive models -> token weights -> policies -> report.html

weights, train and eval do the same up to that stage, in the same directory, and whatever is there already is not done again.
score makes the weights (and a cache of the reference) from models of your own.
"""

EXAMPLES = {
    "run": """
        tisdpo run examples/demo.yaml
        tisdpo run examples/demo.yaml seeds=5 output_dir=runs/demo-5
        tisdpo run examples/hh.yaml data.source=pairs.jsonl.gz model.path=my-model "methods=[dpo, S]"
        tisdpo run runs/demo                      go on with, or extend, the run in this directory
    """,
    "weights": """
        tisdpo weights examples/demo.yaml
        tisdpo weights examples/demo.yaml "contrast.constructions=[S]"
        tisdpo show runs/demo/seed-0/scored/S     look at them
    """,
    "train": """
        tisdpo train examples/demo.yaml
        tisdpo train examples/demo.yaml "methods=[dpo, S]"
        tisdpo train examples/demo.yaml --scored runs/demo/seed-0/scored/S weighting.upper=2 output_dir=runs/upper-2
    """,
    "eval": """
        tisdpo eval examples/demo.yaml
        tisdpo eval runs/demo                     after a run was interrupted in its evaluation
    """,
    "study": """
        tisdpo study claims
        tisdpo study claims --smoke               in a minute, to see that it runs
        tisdpo study claims seeds=5 jobs=4
        tisdpo study claims base.train.steps=200 "search.objective.beta=[0.1, 1.0]" output_dir=runs/longer
        tisdpo study my-own-study.yaml --full
    """,
    "score": """
        tisdpo score pairs.jsonl scored/S --positive sft-chosen --negative sft-rejected
        tisdpo score pairs.jsonl scored/P --positive my-model --negative my-model --task harmless --reference my-model
        tisdpo score pairs.jsonl scored/R --positive dpo --negative base --reference base --reference-hidden
        tisdpo score pairs.jsonl scored/DPO --reference base                          no contrast: for method="dpo" without the reference
        torchrun --nproc-per-node 4 -m tisdpo score pairs.jsonl scored/S ...          four processes share the work
        tisdpo score pairs.jsonl scored/S ... --shard 0/4                             as one of four jobs of a cluster; then once without

        scored/S then holds the token weights, for `tisdpo train CONFIG --scored scored/S`, whose training pairs must be among these and
        be cut at the same length (--max-length here, data.max_length there), or in Python
        TISDPOTrainer(model, args, train_dataset=tisdpo.scored.load_scored("scored/S"), ...), which finds the cached reference there.
        The hidden states cost 2 H bytes for every completion token in bfloat16, 4 H in float32 (H the width of the model).
    """,
    "show": """
        tisdpo show runs/demo/seed-0/scored/S
        tisdpo show runs/demo/seed-0/scored/S --index 7 --html pair-7.html
        tisdpo show runs/demo/seed-0/scored/S transform=rank       other weights from the same scores
        tisdpo show my-scores --tokenizer my-model
    """,
    "annotate": """
        tisdpo annotate runs/demo                           a page for people, who see the tokens and not their weights
        tisdpo annotate my-scores --pairs 50 --seed 1 --tokenizer my-model --out sample-1.html
        tisdpo annotate runs/demo --from-truth truth.json   and the ratings that the known truth of a world would give
    """,
    "agreement": """
        tisdpo agreement ratings-ann.json ratings-bo.json
        tisdpo agreement ratings-*.json --weights runs/demo --out agreement.json
        tisdpo agreement ratings-ann.json --weights scored/S --weights scored/P
    """,
    "plan": """
        tisdpo plan --model Llama-3-8B --gpus 8 --sharding fsdp2
        tisdpo plan --model my-model --gpu-memory 24 --lora 16 --seq-len 2048
        tisdpo plan --model my-model/config.json --kl --reference resident --no-gradient-checkpointing
    """,
    "doctor": """
        tisdpo doctor
        TISDPO_BACKEND=torch tisdpo doctor
    """,
}


# modules of what every installation has, but one with --no-deps
DEPENDENCIES = ("accelerate", "datasets", "filelock", "packaging", "transformers", "yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command (default: that of sys.argv) and return its exit code."""
    try:
        arguments = _parse(argv)
    except ModuleNotFoundError as error:
        return _left_out(error)
    try:
        arguments.command(arguments)
        return 0
    except ModuleNotFoundError as error:
        if arguments.debug:
            traceback.print_exc()
        return _left_out(error)
    except KeyboardInterrupt:
        pass  # told below, when the frames are gone and with them the progress bars
    except BrokenPipeError:  # the reader of our output has seen enough, as in `tisdpo show ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to flush when Python ends
        return 1
    except (InputError, OSError) as error:
        if arguments.debug:
            traceback.print_exc()
        else:
            print(f"tisdpo: {_sentence(error)}", file=sys.stderr)
        return 2
    except Exception as error:  # libraries have errors of their own for a disk that is full
        from tisdpo.files import disk_trouble

        reason = disk_trouble(error)
        if reason is None or arguments.debug:
            raise
        print(f"tisdpo: a file could not be written: {reason}", file=sys.stderr)
        return 2
    print(f"\n{arguments.interrupted}", file=sys.stderr)
    return 130


def _left_out(error: ModuleNotFoundError) -> int:
    """Of an installation without its dependencies; any other missing module is raised."""
    if error.name is None or error.name.split(".")[0] not in DEPENDENCIES:
        raise error
    told = f"tisdpo: this needs {error.name}, which is not installed; in the clone run: pip install -e . --no-build-isolation"
    print(told, file=sys.stderr)
    return 2


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        from tisdpo.files import FULL

        return f"{error.filename or 'a file'} could not be written: {FULL}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
    return str(error) or type(error).__name__


# Arguments


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes positional arguments in one go: settings that stand behind an option are left over
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    unknown = [word for word in rest if word not in late]
    if unknown or (late and not hasattr(arguments, "settings")):
        parser.error(f"unknown arguments: {' '.join(unknown or late)}; see tisdpo {arguments.name} --help")
    if late:
        arguments.settings = [*arguments.settings, *late]
    return arguments


def _parser() -> argparse.ArgumentParser:
    import tisdpo

    parser = argparse.ArgumentParser(
        prog="tisdpo", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"tisdpo {tisdpo.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    pipeline = {
        "run": "the whole method: weights, training, evaluation, report.html",
        "weights": "train the contrastive models and score every token",
        "train": "train (and measure) the policies, after weights",
        "eval": "evaluate the policies and write metrics.json, after train",
    }
    for name, summary in pipeline.items():
        sub = _command(commands, name, _pipeline, summary, settings="config")
        sub.add_argument("config", help="YAML file, or the directory of a run")
        sub.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the file's, see below; values are YAML")
        if name == "train":
            sub.add_argument("--scored", metavar="DIR", help="train one policy on the scores in DIR instead of those of this run")

    study = _command(commands, "study", _study, "many policies under one search, claims with verdicts, study.html", settings="study")
    study.add_argument("study", help="a study of examples/studies, such as claims, or a YAML file")
    study.add_argument(
        "settings", nargs="*", metavar="key=value", help="keys that override the file's, see below; base.* are settings of the run"
    )
    study.add_argument(
        "--full", action="store_true", help="with the section `full` of the file on top: longer than the file itself promises"
    )
    study.add_argument("--smoke", action="store_true", help="as small as it can be, to see that everything runs")

    score = _command(commands, "score", _score, "token weights and a cache of the reference from models of your own, resumable")
    score.add_argument("pairs", help="file (.json, .jsonl, .parquet, also .gz), directory or hub id of preference pairs")
    score.add_argument("out", help="directory of the scored set, made when all is done")
    score.add_argument("--positive", metavar="MODEL", help="the model that prefers chosen responses (pi+), a directory or hub id")
    score.add_argument(
        "--negative", metavar="MODEL",
        help="the one that prefers rejected responses (pi-), or the same under a --task; without the two only the reference is stored",
    )  # fmt: skip
    score.add_argument("--task", choices=("harmless", "helpful", "summary"), help="put the task's system prompts in front (construction P)")
    score.add_argument("--positive-prompt", metavar="TEXT", help="system prompt of the positive model, instead of the task's")
    score.add_argument("--negative-prompt", metavar="TEXT", help="system prompt of the negative model, instead of the task's")
    score.add_argument("--reference", metavar="MODEL", help="store the log-probs of this reference, for training without it")
    score.add_argument("--reference-hidden", action="store_true", help="store its hidden states and its head, for training with a KL term")
    score.add_argument("--hidden-dtype", choices=("bfloat16", "float16", "float32"), help="of these hidden states (default: bfloat16)")
    score.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="float32",
        help="of the models' weights (default: float32); a policy that uses the stored reference must be loaded in the same",
    )  # fmt: skip
    score.add_argument("--tokenizer", metavar="PATH", help="tokenizer (default: that of pi+, and all models must have the same)")
    score.add_argument("--max-length", type=_count, default=1024, metavar="N", help="tokens of prompt and completion (default: 1024)")
    score.add_argument("--batch-tokens", type=_count, default=8192, metavar="N", help="tokens scored at a time (default: 8192)")
    score.add_argument("--split", default="train", metavar="NAME", help="split of a hub data set (default: train)")
    score.add_argument("--limit", type=_count, metavar="N", help="use the first so many pairs only")
    score.add_argument("--shard", type=_shard, metavar="I/N", help="score the I-th of N shares only, I from 0; default: RANK/WORLD_SIZE")
    score.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the models (default: refuse it)")

    show = _command(commands, "show", _show, "a pair with its token weights as a heat map", settings="weighting")
    show.add_argument("scored", help="directory of a scored set, such as runs/demo/seed-0/scored/S")
    show.add_argument("settings", nargs="*", metavar="key=value", help="fields of the weighting, or preset=NAME, see below")
    show.add_argument("--index", type=int, default=0, metavar="N", help="row of the set, from 0 (default: 0)")
    show.add_argument("--html", metavar="FILE", help="write a page instead of printing to the terminal")
    show.add_argument("--tokenizer", metavar="PATH", help="tokenizer the set was scored with (default: found in the run of the set)")
    show.add_argument("--no-color", action="store_true", help="weights as numbers in the text")

    annotate = _command(commands, "annotate", _annotate, "a page on which people rate the tokens of some pairs")
    annotate.add_argument("scored", help="directory of a scored set, or of a run (its first seed)")
    annotate.add_argument("--pairs", type=_count, default=20, metavar="N", help="pairs to rate (default: 20)")
    annotate.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw of the pairs (default: 0)")
    annotate.add_argument("--out", default="annotate.html", metavar="FILE", help="the page (default: annotate.html)")
    annotate.add_argument("--tokenizer", metavar="PATH", help="tokenizer the set was scored with (default: found in the run of the set)")
    annotate.add_argument("--from-truth", metavar="FILE", help="write ratings made from the known truth of a synthetic world, too")

    agreement = _command(commands, "agreement", _agreement, "ratings of people against each other and against the contrast")
    agreement.add_argument("ratings", nargs="+", metavar="FILE", help="files that the page of `tisdpo annotate` exported, one per rater")
    agreement.add_argument(
        "--weights", action="append", default=[], metavar="DIR", help="scored set to compare with, or a run (all its sets); may be repeated"
    )
    agreement.add_argument("--out", metavar="FILE", help="write all figures as JSON, too")

    plan = _command(commands, "plan", _plan, "what a training run would need of a GPU's memory, and whether it fits")
    plan.add_argument("--model", required=True, metavar="MODEL", help="directory, config.json, hub id, or a name such as Llama-3-8B")
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that train together (default: 1)")
    plan.add_argument("--gpu-memory", type=float, default=80, metavar="GIB", help="memory of each (default: 80)")
    plan.add_argument("--seq-len", type=int, default=4096, metavar="N", help="tokens of every sequence (default: 4096)")
    plan.add_argument("--pairs-per-gpu", type=int, default=1, metavar="N", help="pairs of a micro-batch (default: 1)")
    plan.add_argument("--lora", type=int, metavar="RANK", help="adapters on every linear layer but the head (default: train everything)")
    plan.add_argument("--kl", action="store_true", help="with the sequence KL term, which needs the reference at every step")
    plan.add_argument("--dtype", default="bfloat16", help="of the weights: bfloat16 (default), float16 or float32")
    plan.add_argument("--optimizer", default="adamw", help="adamw (default), adamw_8bit, adafactor or sgd")
    plan.add_argument("--sharding", default="ddp", help="between GPUs: ddp (default), zero2, zero3 or fsdp2")
    plan.add_argument("--attention", default="sdpa", help="sdpa (default; padded batches, padding_free=False) or flash (without padding)")
    plan.add_argument("--no-gradient-checkpointing", action="store_true", help="keep the activations of all layers")
    plan.add_argument("--reference", help="precomputed (default), resident (default with --kl) or cached-hidden")

    _command(commands, "doctor", _doctor, "versions, devices, and which backend would run and why")
    return parser


def _command(commands, name: str, command, summary: str, settings: str | None = None) -> argparse.ArgumentParser:
    examples = "examples:\n" + textwrap.indent(textwrap.dedent(EXAMPLES[name]).strip(), "  ")
    sub = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=examples, allow_abbrev=False, add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    sub.add_argument("-h", "--help", action=_Help, settings=settings, help="show this text")
    sub.add_argument("--debug", action="store_true", help="show tracebacks and all messages")
    resumable = settings in ("config", "study") or name == "score"
    again = "the same command goes on from here" if resumable else "nothing was changed"
    sub.set_defaults(command=command, name=name, interrupted=f"interrupted; {again}")
    return sub


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    pieces = text.split("/")
    if len(pieces) != 2 or not all(piece.isascii() and piece.isdigit() for piece in pieces) or int(pieces[0]) >= int(pieces[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard; write I/N with I from 0 to N-1, such as 0/4")
    return int(pieces[0]), int(pieces[1])


class _Help(argparse.Action):
    """--help that adds the list of all settings to a command's own text, and makes it only when asked."""

    def __init__(self, option_strings, dest, settings=None, **kwargs):
        super().__init__(option_strings, dest, nargs=0, **kwargs)
        self.settings = settings

    def __call__(self, parser, namespace, values, option_string=None):
        if self.settings is not None:
            parser.epilog += f"\n\n{_settings_help(self.settings)}"
        parser.print_help()
        parser.exit()


def _settings_help(kind: str) -> str:
    from tisdpo.config import WORLDS, describe
    from tisdpo.settings import settings_text
    from tisdpo.weighting import Weighting

    if kind == "weighting":
        return "settings\n" + settings_text(Weighting)
    if kind == "study":
        from tisdpo.study.config import describe_study

        return f"keys, in the file or as key=value\n\n{describe_study()}"
    worlds = [f"with data.source={source}, {settings_text(kind, 'data.world')}" for source, (_, kind) in WORLDS.items()]
    return "\n\n".join(["settings, in the file or as key=value", describe(), *worlds])


# Commands


def _check_report(otherwise: str = "") -> None:
    """Said now, not when the report is due."""
    for package in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f'the report needs {package}; run: pip install "tisdpo[report]"{otherwise}')


def _pipeline(arguments) -> None:
    """Read the configuration, go up to the stage that the command is named after, and print where the results are."""
    until, scored = "report" if arguments.name == "run" else arguments.name, getattr(arguments, "scored", None)
    if until == "report":
        _check_report(", or use `tisdpo eval`, which stops before it")
    from tisdpo.config import load_config

    config = load_config(arguments.config, arguments.settings)
    if until == "weights" and not config.contrast.constructions:
        raise InputError("contrast.constructions is empty, so there are no weights to estimate; name at least one of P, S, D, R")
    _quiet(arguments.debug)
    _check_backend()
    _check_alone(arguments.name)
    from tisdpo import pipeline

    print(pipeline.run(config, until=until) if scored is None else pipeline.train_on(config, scored))


def _study(arguments) -> None:
    _check_report()
    from tisdpo.study.config import load_study

    study = load_study(arguments.study, arguments.settings, full=arguments.full, smoke=arguments.smoke)
    _quiet(arguments.debug)
    _check_backend()
    _check_alone(arguments.name)
    from tisdpo.study.engine import run_study

    print(run_study(study))


def _check_alone(name: str) -> None:
    """A run is one process on at most one GPU."""
    import torch

    elsewhere = "several GPUs train by tisdpo.TISDPOTrainer and `accelerate launch`"
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise InputError(f"`tisdpo {name}` is one process, and was started {os.environ['WORLD_SIZE']} times; start it once ({elsewhere})")
    if torch.accelerator.is_available() and torch.accelerator.device_count() > 1:
        raise InputError(
            f"`tisdpo {name}` uses one GPU, and {torch.accelerator.device_count()} are visible; choose one, as in "
            f"CUDA_VISIBLE_DEVICES=0 tisdpo {name} ... ({elsewhere})"
        )


def _check_backend() -> None:
    """A backend that TISDPO_BACKEND forces and that cannot run is refused before anything is trained."""
    from tisdpo.doctor import default_device
    from tisdpo.ops import backend

    try:
        backend.resolve("auto", default_device())
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{error}; unset TISDPO_BACKEND or see `tisdpo doctor`") from error


def _score(arguments) -> None:
    if arguments.reference_hidden and arguments.reference is None:
        raise InputError("--reference-hidden needs the model whose hidden states are meant; add --reference MODEL")
    if arguments.hidden_dtype is not None and not arguments.reference_hidden:
        raise InputError("--hidden-dtype has no effect without --reference-hidden; add it or leave both out")
    _quiet(arguments.debug)
    _check_backend()
    from tisdpo import score
    from tisdpo.cached import DTYPES

    done = score.score(
        arguments.pairs, arguments.out, positive=arguments.positive, negative=arguments.negative,
        prompts=score.task_prompts(arguments.task, arguments.positive_prompt, arguments.negative_prompt),
        reference=arguments.reference, dtype=DTYPES[arguments.dtype],
        hidden_dtype=DTYPES[arguments.hidden_dtype or "bfloat16"] if arguments.reference_hidden else None,
        tokenizer=arguments.tokenizer, max_length=arguments.max_length, batch_tokens=arguments.batch_tokens,
        split=arguments.split, limit=arguments.limit, shard=arguments.shard, trust_remote_code=arguments.trust_remote_code,
    )  # fmt: skip
    if done is not None:
        print(done)
    elif arguments.shard is not None:
        print(f"share {arguments.shard[0]} of {arguments.shard[1]} is scored; when all are, the same command without --shard joins them")


def _show(arguments) -> None:
    _quiet(arguments.debug)
    from tisdpo.heatmap import heatmap_terminal
    from tisdpo.scored import load_contrast, load_provenance, load_tokenizer_of
    from tisdpo.summary import response

    weighting = _weighting(arguments.settings)
    provenance = load_provenance(arguments.scored)
    rows = load_contrast(arguments.scored)
    tokenizer = load_tokenizer_of(arguments.scored, arguments.tokenizer)
    if not 0 <= arguments.index < len(rows):
        raise InputError(f"--index {arguments.index}: {arguments.scored} has rows 0 to {len(rows) - 1}")
    row = rows[arguments.index]
    prompt = tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
    sides = {side: response(row, side, tokenizer, weighting) for side in ("chosen", "rejected")}
    if arguments.html is None:
        print(heatmap_terminal(prompt, **sides, color=not arguments.no_color))
        return
    from tisdpo.report import heatmap_html, write_html

    name = str(provenance["how"].get("construction", Path(arguments.scored).name))
    entry = {"construction": name, "seed": None, "prompt": prompt, **sides}
    write_html(heatmap_html([entry], title=f"Token weights ({name}), row {arguments.index}"), arguments.html)
    print(arguments.html)


def _weighting(settings: list[str]):
    """The weighting that `preset=` and single fields describe."""
    from dataclasses import asdict

    from tisdpo.settings import build, with_overrides
    from tisdpo.weighting import Weighting

    values, given = with_overrides({}, settings)
    try:
        start = asdict(Weighting.preset(values.pop("preset", "paper")))
    except (ValueError, TypeError) as error:
        raise InputError(f"command line: {error}") from error
    return build(Weighting, {**start, **values}, overridden=given)


def _annotate(arguments) -> None:
    _quiet(arguments.debug)
    from tisdpo import annotate

    for path in annotate.write(
        arguments.scored, arguments.out, pairs=arguments.pairs, seed=arguments.seed, tokenizer=arguments.tokenizer,
        truth=arguments.from_truth,
    ):  # fmt: skip
        print(path)


def _agreement(arguments) -> None:
    _quiet(arguments.debug)
    from tisdpo import agreement

    found = agreement.compare(arguments.ratings, arguments.weights)
    if arguments.out is not None:
        from tisdpo.files import write_json

        write_json(arguments.out, found, ensure_ascii=False)
    print(agreement.table(found))


def _plan(arguments) -> None:
    from dataclasses import fields

    from tisdpo import memory

    options = {f.name: getattr(arguments, f.name) for f in fields(memory.Plan) if hasattr(arguments, f.name)}
    plan = memory.Plan(**options, gradient_checkpointing=not arguments.no_gradient_checkpointing)
    print(memory.report(arguments.model, memory.shape_of(memory.load_config(arguments.model)), plan, arguments.gpu_memory))


def _doctor(arguments) -> None:
    from tisdpo.doctor import report

    print(report())


# Messages


class _BesideProgress(logging.Handler):
    """Messages above the progress bars instead of through them."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def _quiet(debug: bool) -> None:
    """Our own messages and progress stay, those of the libraries below are errors only; with --debug all come."""
    log = logging.getLogger("tisdpo")
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    if not log.handlers:
        log.addHandler(_BesideProgress())
    if debug:
        return
    from tisdpo.hf import quiet_libraries

    quiet_libraries()
