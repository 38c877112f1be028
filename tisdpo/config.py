"""The configuration of a run: nested dataclasses, read from YAML with overrides from the command line.

    config = load_config("examples/demo.yaml", ["seeds=5", "train.learning_rate=1e-3"])

`describe()` lists every key with its default; `dump` writes a configuration that reads back as the same one.
"""
# ruff: noqa: RUF009 (`option` is dataclasses.field with a help text)

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tisdpo.arithmetic import Arithmetic, ArithmeticConfig
from tisdpo.errors import InputError
from tisdpo.losses import Objective
from tisdpo.settings import COMMAND_LINE, build, nearest, read_yaml, settings_text, with_overrides, write_yaml
from tisdpo.synthetic import World, WorldConfig
from tisdpo.weighting import Weighting

# data.source: the world of that name, where every token's reward is known, and its settings
WORLDS = {"synthetic": (World, WorldConfig), "arithmetic": (Arithmetic, ArithmeticConfig)}
CONSTRUCTIONS = ("P", "S", "D", "R")
METHODS = ("dpo", "random", "equal", "swapped", "truth", "oracle", *CONSTRUCTIONS)

# TrainingArguments that a run sets itself: the key to use instead
_SET_ELSEWHERE = {
    "data_seed": "seeds",
    "label_smoothing_factor": "objective.label_smoothing",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "scheduler",
    "max_grad_norm": "max_grad_norm",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "output_dir": "output_dir",
    "padding_free": "padding_free",
    "per_device_train_batch_size": "batch_size",
    "seed": "seeds",
    "tokens_per_batch": "tokens_per_batch",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
}


def option(help: str, **default) -> Any:
    """A dataclass field with its help text; `default=` or `default_factory=`, without either the field is required."""
    return field(metadata={"help": help}, **default)


def _at_least(config, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise InputError(f"{name} must be at least {least}, got {value}")


def _positive(config, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"{name} must be positive and finite, got {getattr(config, name)}")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One training run on the Trainer of `transformers`."""

    steps: int = option("optimiser steps")
    learning_rate: float = option("peak learning rate")
    batch_size: int = option("pairs (base model and SFT: texts) a step and device", default=32)
    tokens_per_batch: int | None = option(
        "batches of as many whole pairs (texts) as have at most so many tokens, instead of batch_size", default=None
    )
    padding_free: bool | None = option(
        "batches without padding; true: an error where the model cannot; null: where its attention is made for it", default=None
    )
    warmup_steps: int = option("steps until the peak learning rate", default=0)
    scheduler: str = option("learning-rate schedule: linear, cosine, constant, ... (names of transformers)", default="linear")
    weight_decay: float = option("weight decay of AdamW", default=0.0)
    max_grad_norm: float = option("clip the gradient to this norm; 0: never", default=1.0)
    arguments: dict = option("any other transformers.TrainingArguments, e.g. {gradient_accumulation_steps: 4}", default_factory=dict)

    def __post_init__(self):
        _at_least(self, 1, "steps", "batch_size")
        _at_least(self, 0, "warmup_steps", "weight_decay", "max_grad_norm")
        _positive(self, "learning_rate")
        if self.tokens_per_batch is not None and self.batch_size != type(self).batch_size:
            raise InputError(f"batch_size={self.batch_size} has no effect with tokens_per_batch; leave one of the two out")
        if self.warmup_steps > self.steps:
            raise InputError(f"warmup_steps={self.warmup_steps} would end after the last of steps={self.steps}; lower it")
        if self.scheduler != "linear":
            _check_scheduler(self.scheduler)
        if self.arguments:
            _check_arguments(self.arguments)


@dataclass(frozen=True, kw_only=True)
class DPOStageConfig(StageConfig):
    """A stage that trains a contrastive DPO model."""

    beta: float = option("strength of the pull towards the reference", default=0.1)

    def __post_init__(self):
        super().__post_init__()
        _positive(self, "beta")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the preference pairs come from."""

    source: str = option("'synthetic' or 'arithmetic' (worlds with known truth), a file or directory of pairs, or a hub id")
    split: str = option("split of a hub data set", default="train")
    limit: int | None = option("use the first so many pairs only", default=None)
    heldout: int | float = option("pairs kept for evaluation: a number, or a share below 1", default=0.1)
    max_length: int = option("tokens of prompt and completion; longer pairs are truncated at the end", default=512)
    streaming: bool = option("read a hub data set without downloading all of it", default=False)
    world: dict = option(
        "settings of the world with known truth (its seed is the run's); only with source: synthetic or arithmetic", default_factory=dict
    )

    def __post_init__(self):
        if not self.source:
            raise InputError(f"source must name a file, a directory, a hub id or a world ({_or(WORLDS)}), got ''")
        _at_least(self, 1, "limit")
        _at_least(self, 2, "max_length")
        if not (0 < self.heldout < 1 if isinstance(self.heldout, float) else self.heldout >= 1):
            raise InputError(f"heldout must be a whole number of pairs or a share between 0 and 1, got {self.heldout}")
        if self.source not in WORLDS and self.world:
            raise InputError(f"world has no effect with source={self.source!r}; it belongs to source: {_or(WORLDS)}")
        for name in ("streaming", "split"):
            if self.source in WORLDS and getattr(self, name) != getattr(DataConfig, name):
                raise InputError(f"{name} has no effect with source: {self.source}; remove it")
        if "seed" in self.world:
            raise InputError("world.seed is the seed of the run; set seeds instead, e.g. seeds: [3]")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model, which is also the reference of every policy."""

    path: str | None = option("directory or hub id of a causal language model; null: a small Llama trained from scratch", default=None)
    tokenizer: str | None = option("directory or hub id; null: that of the model, or one made from the training text", default=None)
    vocab_size: int = option("from scratch: tokens of the byte-level BPE", default=4096)
    hidden_size: int = option("from scratch: width", default=64)
    layers: int = option("from scratch: layers", default=2)
    heads: int = option("from scratch: attention heads", default=4)
    pretrain: StageConfig | None = option("from scratch: how the base model is trained; not used with model.path", default=None)

    def __post_init__(self):
        _at_least(self, 300, "vocab_size")  # 256 bytes, special tokens and a few merges
        _at_least(self, 1, "hidden_size", "layers", "heads")
        if self.hidden_size % (2 * self.heads):
            raise InputError(
                f"hidden_size={self.hidden_size} must be a multiple of 2 * heads={2 * self.heads} (rotary positions need even heads)"
            )
        if self.path is None and self.pretrain is None:
            raise InputError(
                "pretrain is missing: without model.path the base model is trained from scratch and needs steps and learning_rate"
            )


@dataclass(frozen=True, kw_only=True)
class ContrastConfig:
    """The contrastive models that the token weights come from."""

    constructions: list[Literal["P", "S", "D", "R"]] = option(
        "P: one model under two system prompts; S: SFT on chosen, SFT on rejected; D: DPO, DPO with the pairs swapped; "
        "R: DPO against the reference, half the contrastive training of D",
        default_factory=lambda: ["P", "S", "D"],
    )
    sft: StageConfig | None = option("training of the SFT models of S", default=None)
    dpo: DPOStageConfig | None = option("training of the DPO models of D and R", default=None)
    models_from: str | None = option(
        "directory of another run with the same tokenizer, whose models of the same seed give the weights; sft and dpo are then not used",
        default=None,
    )
    task: Literal["harmless", "helpful", "summary"] = option(
        "picks the system prompts of P: harmless, helpful or summary", default="harmless"
    )
    positive_prompt: str | None = option("system prompt of P, instead of the task's", default=None)
    negative_prompt: str | None = option("its opposite", default=None)
    batch_tokens: int = option("tokens (padding included) that are scored at a time", default=8192)
    model: ModelConfig | None = option(
        "what the contrastive models start from, such as a smaller model; null: the base model", default=None
    )
    pairs: int = option("pairs of contrastive models of S, D or R, trained in different order, whose contrasts are averaged", default=1)
    checkpoints: int = option("contrasts are averaged over so many models of the second half of the contrastive training", default=1)
    crossfit: bool = option(
        "every pair is trained without the rows that it scores, an equal share of them each (of text: of the prompts)", default=False
    )
    smooth: int = option("moving average of the contrast over so many neighbouring tokens, an odd number", default=1)
    data: DataConfig | None = option(
        "pairs that the contrastive models learn from, of the same tokenizer; null: those of the run", default=None
    )
    rounds: int = option(
        "the weights are estimated so often, evenly over the training of the policy, each time but the first from the policy as it is then",
        default=1,
    )
    std: float | None = option("scale the contrast to this standard deviation over all tokens (nats), before the clamp", default=None)

    def __post_init__(self):
        _at_least(self, 1, "batch_tokens", "pairs", "checkpoints", "rounds")
        _unique(self, "constructions")
        if self.smooth < 1 or self.smooth % 2 == 0:
            raise InputError(f"smooth must be an odd number of tokens, 1 for none, got {self.smooth}")
        if self.std is not None:
            _positive(self, "std")
        if self.crossfit and self.pairs < 2:
            raise InputError("crossfit needs pairs of at least 2: each is trained on the rows that the others score")
        if self.crossfit and self.data is not None:
            raise InputError("crossfit has no effect with contrast.data: no row that is scored was trained on; leave one of them out")
        if self.rounds > 1 and self.model is not None:
            raise InputError("with rounds the contrastive models start from the policy, not from contrast.model; leave one of them out")
        if self.models_from is not None and (self.pairs > 1 or self.checkpoints > 1 or self.rounds > 1 or self.data or self.model):
            raise InputError("pairs, checkpoints, rounds, data and model say how contrastive models are trained; with models_from none are")
        idle = [n for n, on in (("pairs", self.pairs > 1), ("checkpoints", self.checkpoints > 1), ("data", self.data is not None)) if on]
        if idle and self.constructions == ["P"]:
            raise InputError(f"{idle[0]} has no effect on construction P, for which nothing is trained; leave it out")
        for stage, users in (("sft", "S"), ("dpo", "DR")):
            needed = [c for c in self.constructions if c in users]
            if needed and getattr(self, stage) is None and self.models_from is None:
                raise InputError(
                    f"{stage} is missing: construction {needed[0]} needs its steps and learning_rate; give them, "
                    f"or leave {needed[0]} out of constructions"
                )
        if "" in (self.positive_prompt, self.negative_prompt):
            raise InputError("positive_prompt and negative_prompt must not be empty; null means the prompts of the task")
        if self.positive_prompt is not None and self.positive_prompt == self.negative_prompt:
            raise InputError("positive_prompt and negative_prompt are the same, so their contrast would be 0 for every token; change one")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured of every policy, and what the report shows of it."""

    prompts: int = option("held-out prompts that are answered", default=256)
    max_new_tokens: int = option("tokens of a response at most", default=48)
    temperature: float = option("of the sampled responses; 0: the most likely token", default=1.0)
    checkpoints: int = option(
        "points of the curve of reward against KL, evenly over the training steps; the run can be resumed at each", default=4
    )
    reward_model: str | None = option("directory or hub id of a sequence classifier that scores the responses", default=None)
    samples: int = option("responses shown side by side", default=5)
    data: DataConfig | None = option(
        "where held-out pairs, prompts and the true reward come from, of the same tokenizer; null: from those of the run", default=None
    )
    heatmaps: int = option("pairs shown as heat maps, for each construction", default=2)
    batch_size: int = option("prompts answered at a time", default=64)

    def __post_init__(self):
        _at_least(self, 1, "prompts", "max_new_tokens", "batch_size")
        _at_least(self, 0, "temperature", "checkpoints", "samples", "heatmaps")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run of the whole method.

    `weighting` and `objective` start from `preset` where that is set; given fields override its. Raises InputError for settings that
    contradict each other.
    """

    name: str = option("name of the run, and of its directory", default="run")
    description: str = option("shown in the report", default="")
    output_dir: str = option("directory of the run; empty: runs/<name>", default="")
    seeds: int | list[int] = option("a number n of seeds (0 .. n-1), or a list of them", default=1)
    threads: int | None = option("CPU threads of torch; null: its own choice. Tiny models are fastest with 1", default=None)
    data: DataConfig = option("the preference pairs")
    model: ModelConfig = option("the base model")
    contrast: ContrastConfig = option("the contrastive models")
    preset: str | None = option("paper, official-code, dpo, tdpo1 or tdpo2: where weighting and objective start", default=None)
    weighting: Weighting | None = option("how the contrast becomes weights; null: the preset's", default=None)
    objective: Objective | None = option("the loss; null: the preset's", default=None)
    train: StageConfig = option("training of the policies, the same for every method")
    methods: list[str] = option(
        "policies to train: dpo, TIS-DPO with the weights of P, S, D or R, and controls: random, equal, swapped (signs exchanged), "
        "truth (the known rewards), oracle (truth, 0 on tokens without reward); both with the worlds of known truth only",
        default_factory=lambda: ["dpo", "random", "P", "S", "D"],
    )
    evaluation: EvaluationConfig = option("measurements", default_factory=EvaluationConfig)

    def __post_init__(self):
        for name, kind in (("weighting", Weighting), ("objective", Objective)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, kind() if self.preset is None else kind.preset(self.preset))
        if not self.name or self.name in (".", "..") or "/" in self.name or "\\" in self.name:
            raise InputError(f"name must be a plain name without a path, got {self.name!r}; directories go into output_dir")
        if not self.output_dir:
            object.__setattr__(self, "output_dir", f"runs/{self.name}")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads must be at least 1 or null, got {self.threads}")
        if not self.seed_list or min(self.seed_list) < 0:
            raise InputError(f"seeds must be a number of at least 1 or a list of seeds of at least 0, got {self.seeds}")
        if isinstance(self.seeds, list):
            _unique(self, "seeds")
        self._check_methods()
        self._check_tokens()
        if self.model.path is not None and self.contrast.model is not None and self.contrast.model.path is None:
            raise InputError(
                "contrast.model is to be trained from scratch, but with model.path there is no text for it; give contrast.model.path"
            )
        smaller = self.contrast.model
        idle = smaller is not None and {
            "vocab_size": smaller.vocab_size != ModelConfig.vocab_size,
            "tokenizer": smaller.tokenizer is not None and smaller.path is None,
        }
        for key in (key for key, on in (idle or {}).items() if on):
            raise InputError(f"contrast.model.{key} has no effect: its tokens are those of the base model; leave it out")
        if self.contrast.rounds > self.train.steps:
            raise InputError(f"contrast.rounds={self.contrast.rounds} is more than train.steps={self.train.steps}; lower it")
        brought = self.model.path or self.model.tokenizer or self.model.vocab_size != ModelConfig.vocab_size
        if self.data.source in WORLDS and brought:
            raise InputError(
                f"data.source={self.data.source} brings its own tokenizer and corpus; leave model.path, model.tokenizer and "
                "model.vocab_size out"
            )

    def _check_methods(self):
        if not self.methods:
            raise InputError(f"methods is empty; name at least one of {', '.join(METHODS)}")
        _unique(self, "methods")
        constructions = self.contrast.constructions
        for method in self.methods:
            if method not in METHODS:
                hint = nearest(method, METHODS)
                raise InputError(
                    f"methods has {method!r}, which is none of {', '.join(METHODS)}" + (f"; did you mean {hint}?" if hint else "")
                )
            if method in CONSTRUCTIONS and method not in constructions:
                raise InputError(
                    f"methods has {method}, but contrast.constructions ({', '.join(constructions) or 'empty'}) does not; "
                    "add it there or leave it out here"
                )
        for control, what in (("random", "shuffles the weights"), ("swapped", "exchanges the signs")):
            if control in self.methods and not constructions:
                raise InputError(
                    f"methods has {control}, which {what} of the first construction, but contrast.constructions is empty; add one"
                )
        for known in ("truth", "oracle"):
            if known in self.methods and self.data.source not in WORLDS:
                raise InputError(f"methods has {known}, but the true rewards are known with data.source={_or(WORLDS)} only; leave it out")

    def construction(self, method: str) -> str | None:
        """The construction whose contrast a method's weights are made of, if any."""
        return method if method in CONSTRUCTIONS else self.control if method in ("random", "swapped") else None

    def _check_tokens(self):
        """Now, not when a stage begins hours later: batches must hold the longest pairs (base model and SFT: texts)."""
        for place, stage in self.stages.items():
            data = self.contrast.data if place in ("contrast.sft", "contrast.dpo") and self.contrast.data is not None else self.data
            least = data.max_length * (2 if place in ("train", "contrast.dpo") else 1)
            if stage.tokens_per_batch is not None and stage.tokens_per_batch < least:
                raise InputError(
                    f"{place}.tokens_per_batch={stage.tokens_per_batch} cannot hold every row of data.max_length={data.max_length}; "
                    f"give at least {least}, or lower data.max_length"
                )

    @property
    def stages(self) -> dict[str, StageConfig]:
        """The training stages that have settings, by their keys."""
        stages = {"model.pretrain": self.model.pretrain, "contrast.sft": self.contrast.sft, "contrast.dpo": self.contrast.dpo}
        stages |= {"contrast.model.pretrain": self.contrast.model and self.contrast.model.pretrain, "train": self.train}
        return {place: stage for place, stage in stages.items() if stage is not None}

    @property
    def control(self) -> str | None:
        """The construction whose weights the controls `random` and `swapped` are made of: the first, if there is one."""
        return next(iter(self.contrast.constructions), None)

    @property
    def seed_list(self) -> list[int]:
        """The seeds themselves."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds


def _or(names) -> str:
    return " or ".join(names)


def _unique(config, name: str) -> None:
    values = getattr(config, name)
    double = [v for v in values if values.count(v) > 1]
    if double:
        raise InputError(f"{name} has {double[0]} more than once; remove one")


def _check_scheduler(name: str) -> None:
    from transformers.trainer_utils import SchedulerType

    names = [kind.value for kind in SchedulerType]
    if name not in names:
        hint = nearest(name, names)
        raise InputError(f"scheduler must be one of {', '.join(names)}, got {name!r}" + (f"; did you mean {hint}?" if hint else ""))


def _check_arguments(arguments: dict) -> None:
    """Refuse names that TrainingArguments does not have, and those that a run sets by its own keys."""
    from transformers import TrainingArguments

    known = TrainingArguments.__dataclass_fields__
    for name in arguments:
        if name in _SET_ELSEWHERE:
            raise InputError(f"arguments.{name} is set by the run itself; use {_SET_ELSEWHERE[name]}")
        if name not in known:
            hint = nearest(str(name), known)
            raise InputError(f"arguments.{name} is unknown to transformers.TrainingArguments" + (f"; did you mean {hint}?" if hint else ""))


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The configuration in a YAML file, with `key.sub=value` overrides, which win.

    `path` may also be the directory of a run: its config.yaml is read, and output_dir is where it lies now.

    Raises InputError for a file that cannot be read, an unknown key (with the nearest known one), a value of the wrong type or out of
    range, and settings that contradict each other.
    """
    path = Path(path)
    place = {}
    if path.is_dir():
        path, place = path / "config.yaml", {"output_dir": str(path)}
    values, overridden = with_overrides({**read_yaml(path), **place}, overrides)
    return config_from(values, str(path), overridden)


def config_from(values: dict, file: str, overridden: Iterable[str] = ()) -> RunConfig:
    """The configuration in a mapping as `load_config` reads it; `file` and the dotted keys in `overridden` are for messages."""
    preset = values.get("preset")
    if isinstance(preset, str):
        for name, kind in (("weighting", Weighting), ("objective", Objective)):
            try:
                start = asdict(kind.preset(preset))
            except ValueError as error:
                raise InputError(f"{COMMAND_LINE if 'preset' in overridden else file}: {error}") from error
            given = values.get(name) or {}
            values[name] = {**start, **given} if isinstance(given, dict) else given
    return build(RunConfig, values, file=file, overridden=overridden)


def to_dict(config: RunConfig) -> dict:
    """The configuration as nested plain dicts, ready for JSON and YAML."""
    return _plain(asdict(config))


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def dump(config: RunConfig, path: str | Path) -> None:
    """Write the resolved configuration as YAML; `load_config(path)` gives an equal one. The file appears complete or not at all."""
    write_yaml(to_dict(config), Path(path))


def describe() -> str:
    """Every key of a run with its default and meaning, as --help prints it."""
    return settings_text(RunConfig)
