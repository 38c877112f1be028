"""`SeedRun` for a study: what several policies need is made once, in a directory named after all it depends on.

    <study>/stages/base-<digest>/  contrastive-<model>-<digest>/  scored-<construction>-<digest>/  ...
    <study>/policies/<digest>/policy.json

Any number of processes may work in one study: a stage is made under a lock, and who comes second finds it made.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from tisdpo.config import WORLDS, DataConfig, ModelConfig, RunConfig, to_dict
from tisdpo.estimation import CONTRASTIVE_MODELS, numbered_stage
from tisdpo.files import content_digest, write_json
from tisdpo.fingerprints import tokenizer_fingerprint
from tisdpo.pipeline import SeedRun
from tisdpo.scored import ids_fingerprint
from tisdpo.study.costs import costs, tokens_of
from tisdpo.summary import CURVES, weights

REMEMBERED = 48  # data sets and models that a process keeps in memory
_memory: dict[str, Any] = {}


def digest(content) -> str:
    """16 hexadecimal digits of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def remembered(key: str, make: Callable[[], Any]):
    """What `make` gives, made once a process; the oldest are forgotten."""
    if key not in _memory:
        while len(_memory) >= REMEMBERED:
            _memory.pop(next(iter(_memory)))
        _memory[key] = make()
    return _memory[key]


def data_settings(data: DataConfig) -> dict:
    """The settings of data, with what their file holds, if it is one here: a file that has changed is another one."""
    content = content_digest(data.source) if data.source not in WORLDS else None
    return asdict(data) | ({} if content is None else {"content": content})


def identity(config: RunConfig, seed: int) -> str:
    """The name of a policy: a digest of its method, its seed and exactly the settings that it depends on."""
    settings, method = to_dict(config), config.methods[0]
    for key in ("name", "description", "output_dir", "seeds", "threads", "preset"):
        settings.pop(key)
    for key in ("samples", "heatmaps", "batch_size"):
        settings["evaluation"].pop(key)
    contrast = settings.pop("contrast")
    settings["data"] = data_settings(config.data)
    for place, data in ((settings["evaluation"], config.evaluation.data), (contrast, config.contrast.data)):
        place["data"] = data if data is None else data_settings(data)
    construction = config.construction(method)
    if construction is not None:
        settings["contrast"] = _contrast_settings(contrast, construction) | {"construction": construction}
    if method == "dpo":
        settings.pop("weighting")
    return digest([settings, seed])


def _contrast_settings(contrast: dict, construction: str) -> dict:
    """Those settings of the contrastive models that this construction depends on."""
    unused = {"constructions", "batch_tokens"}
    unused |= {"P": {"sft", "dpo", "pairs", "checkpoints", "crossfit", "data"}, "S": {"dpo"}, "D": {"sft"}, "R": {"sft"}}[construction]
    if construction != "P":
        unused |= {"task", "positive_prompt", "negative_prompt"}
    return {key: value for key, value in contrast.items() if key not in unused}


def _size(model) -> int:
    """Parameters of a model."""
    return sum(p.numel() for p in model.parameters())


class StudyRun(SeedRun):
    """The stages of one policy of a study."""

    def __init__(self, config: RunConfig, seed: int, study: Path):
        self.study = study
        super().__init__(config, seed, study / "policies" / identity(config, seed))

    def label(self, what: str) -> None:
        """No progress bars: a study tells one line a policy."""

    # Where the stages are

    def place(self, stage: str) -> Path:
        kind, _, name = stage.partition("/")
        if kind == "policy":  # one policy, one directory
            return self.directory
        return self.study / "stages" / f"{stage.replace('/', '-')}-{digest(self.made_of(kind, name))}"

    def made_of(self, kind: str, name: str = "") -> dict:
        """All that a stage depends on."""
        config = self.config
        if kind == "base":
            return self._pretrained(config.model)
        data, contrast = {"data": data_settings(config.data), "model": asdict(config.model), "seed": self.seed}, to_dict(config)["contrast"]
        if config.contrast.data is not None:
            contrast["data"] = data_settings(config.contrast.data)
        if kind == "base-result.json":
            others = {} if config.evaluation.data is None else {"data": data_settings(config.evaluation.data)}
            return {"base": self.made_of("base"), **data, "evaluation": asdict(config.evaluation) | others}
        start = self._pretrained(config.contrast.model or config.model)
        if name == "base":  # of the contrastive models
            return start
        if kind == "contrastive":
            learns = data | {"data": data_settings(self._learned), "fold": self.fold_rule}
            stage = contrast["sft" if name.startswith("sft") else "dpo"]
            return {"base": start, **learns, "stage": stage, "checkpoints": config.contrast.checkpoints}
        # scored: with the contrast of one pair of models; weights: with that of all of them, smoothed and scaled
        if isinstance(self.fold_rule, list):
            contrast["crossfit"] = self.fold_rule
        settings = _contrast_settings(contrast, name[0]) | {"batch_tokens": config.contrast.batch_tokens}
        together = {"smooth", "std", "rounds"} | (set() if config.contrast.crossfit else {"pairs"})
        if kind == "scored":
            settings = {key: value for key, value in settings.items() if key not in together}
        return {"base": start, **data, "contrast": settings} | ({"weighting": asdict(config.weighting)} if kind == "weights" else {})

    def _pretrained(self, model: ModelConfig) -> dict:
        """All that a pretrained model depends on."""
        if model.path is not None:
            return {"path": model.path}
        return {"model": asdict(model), "text": self._text, "seed": self.seed, "max_length": self.config.data.max_length, "room": self.room}

    @cached_property
    def _text(self) -> str:
        """Fingerprint of the text that the base model learns and of its tokenizer: worlds that differ in their labels alone share it."""
        path = self.study / "stages" / f"text-{digest(self._source_key)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.alone(path):
            if not path.exists():
                documents = self.source.documents()
                texts = [list(documents[name]) for name in ("prompt_ids", "chosen_ids")]
                write_json(path, digest([texts, tokenizer_fingerprint(self.tokenizer)]))
        return json.loads(path.read_text())

    @contextmanager
    def alone(self, path: Path):
        """No other process of the study makes what belongs at this path meanwhile."""
        locks = self.study / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{path.name}.lock", is_singleton=True):
            yield

    # The stages, each made by one process

    def pretrained(self, model: ModelConfig, stage: str):
        if model.path is not None:
            return super().pretrained(model, stage)
        with self.alone(self.place(stage)):
            return super().pretrained(model, stage)

    def contrastive_model(self, name: str, pair: int = 0, checkpoint: int = 0):
        with self.alone(self.place(f"contrastive/{numbered_stage(name, pair)}")):
            return super().contrastive_model(name, pair, checkpoint)

    def scored_by(self, construction: str, pair: int = 0, checkpoint: int = 0):
        path = self.place(f"scored/{numbered_stage(construction, pair, checkpoint)}")
        with self.alone(path):
            return remembered(f"scored {path}", lambda: SeedRun.scored_by(self, construction, pair, checkpoint))

    def scored(self, construction: str):
        return remembered(f"scored {self.place(f'weights/{construction}')}", lambda: SeedRun.scored(self, construction))

    def base_results(self) -> dict:
        with self.alone(self.place("base-result.json")):
            return super().base_results()

    # What several policies in one process share

    @property
    def _source_key(self) -> dict:
        return self._key_of(self.config.data)

    def _key_of(self, data: DataConfig) -> dict:
        config = self.config
        return {"data": data_settings(data), "model": asdict(config.model), "seed": self.seed, "prompts": config.evaluation.prompts}

    @cached_property
    def source(self):
        return remembered(f"source {digest(self._source_key)}", lambda: super(StudyRun, self).source)

    def other_source(self, data: DataConfig | None, key: str):
        if data is None:
            return self.source
        return remembered(f"source {digest(self._key_of(data))}", lambda: SeedRun.other_source(self, data, key))

    @cached_property
    def reference(self):
        return remembered(f"reference {self.place('base')}", lambda: super(StudyRun, self).reference)

    @cached_property
    def contrast_reference(self):
        if self.config.contrast.model is None:
            return self.reference
        return remembered(f"reference {self.place('contrastive/base')}", lambda: super(StudyRun, self).contrast_reference)

    def _with_reference(self, rows, reference=None):
        model = "base" if reference is None or reference is self.reference else "contrastive/base"
        key = f"reference of rows {self.place(model)} {ids_fingerprint(rows)}"
        return remembered(key, lambda: SeedRun._with_reference(self, rows, reference))

    # A policy with all that the study asks of it

    def outcome(self) -> dict:
        """The content of policy.json: metrics, points of the frontier, learning curves, figures of the weights, cost."""
        path, method = self.directory / "policy.json", self.config.methods[0]
        with self.alone(self.directory):
            if not path.exists():
                result = self.policy(method)
                base = self.base_results()["metrics"]
                history = [h for h in json.loads((self.directory / "log.json").read_text()) if "loss" in h]
                parameters = _size(self.reference)
                small = self.config.contrast.model is not None and self.config.construction(method) is not None
                estimating = _size(self.contrast_reference) if small else parameters
                tokens = [tokens_of(self, source.train) for source in (self.source, self.contrast_source)]
                content = {
                    "metrics": result["metrics"],
                    "base": base,
                    "quality": self.quality,
                    "points": result["points"],
                    "curves": {"step": [h["step"] for h in history], **{name: [h.get(name) for h in history] for name in CURVES}},
                    "weights": self.weight_figures(method),
                    "costs": costs(self.config, *tokens, parameters, estimating),
                    "parameters": parameters,
                    "data": {"train": len(self.source.train), "heldout": len(self.source.heldout), "kind": self.source.kind},
                    "seconds": self.seconds,
                }
                for cost in content["costs"]:
                    cost["key"] = self._cost_key(cost["stage"])
                write_json(path, content)
                for made in (self.directory / "model", *self.directory.glob("round-*")):  # a study keeps figures, not models
                    shutil.rmtree(made, ignore_errors=True)
        return json.loads(path.read_text())

    def _cost_key(self, stage: str) -> str:
        """Stages with the same key are one stage, wherever they are counted."""
        if stage.startswith(("contrastive/", "scored/")):
            return str(self.place(stage).name)
        if stage in ("reference", "contrast-reference"):  # one, where both models start from the same
            base, data = ("base", self.config.data) if stage == "reference" else ("contrastive/base", self._learned)
            return digest([self.made_of(*base.split("/")), data_settings(data)])
        return f"{stage} {self.directory.name}"

    @property
    def _learned(self) -> DataConfig:
        """What the contrastive models learn from."""
        return self.config.contrast.data or self.config.data

    def weight_figures(self, method: str) -> dict | None:
        """How the weights of a construction are distributed and agree with the truth; None for the other methods."""
        if method not in CONTRASTIVE_MODELS:
            return None
        path = self.place(f"weights/{method}").with_suffix(".json")
        with self.alone(path):
            if not path.exists():
                figures = weights([self], method)[0]
                write_json(path, {key: value for key, value in figures.items() if key not in ("histogram", "position")})
        return json.loads(path.read_text())
