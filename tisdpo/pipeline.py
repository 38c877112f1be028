"""The whole method, start to end: pairs -> base model -> contrastive models -> token weights -> policies -> evaluation -> report.

A run is a directory. Every stage leaves files that appear complete or not at all, so that an interrupted run goes on where it was when
the same command is given again:

    <output_dir>/config.yaml  metrics.json  report.html
    <output_dir>/seed-<n>/base/  contrastive/<model>/  scored/<construction>/  policy/<method>/
"""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from tqdm.auto import tqdm

from tisdpo import contrastive, evaluate
from tisdpo.config import RunConfig, dump, load_config, to_dict
from tisdpo.doctor import default_device
from tisdpo.errors import InputError
from tisdpo.files import remove, write_json
from tisdpo.fingerprints import tokenizer_fingerprint
from tisdpo.hf import load_model, tiny_llama
from tisdpo.prompts import PROMPTS
from tisdpo.scored import load_provenance, load_scored, make_provenance, save_scored
from tisdpo.sources import Source, load_source
from tisdpo.stages import read_points, train_stage
from tisdpo.summary import collect
from tisdpo.trainer import add_reference_logps, apply_weighting

UNTIL = ("weights", "train", "eval", "report")

# construction: its positive and negative model (of `SeedRun.contrastive_model`)
CONTRASTIVE_MODELS = {"P": ("base", "base"), "S": ("sft-chosen", "sft-rejected"), "D": ("dpo", "dpo-swapped"), "R": ("dpo", "base")}


def run(config: RunConfig, until: str = "report") -> Path:
    """Run (or go on with) everything up to a stage: "weights", "train", "eval" or "report". Returns the run's directory or the report."""
    directory = _prepare(config)
    seeds = [SeedRun(config, seed, directory / f"seed-{seed}") for seed in config.seed_list]
    for seed_run in seeds:
        for construction in config.contrast.constructions:
            seed_run.scored(construction)
        if until != "weights":
            seed_run.base_results()
            for method in config.methods:
                seed_run.policy(method)
    if until in ("weights", "train"):
        return directory
    metrics = collect(config, seeds)
    write_json(directory / "metrics.json", metrics)
    if until == "eval":
        return directory
    from tisdpo.report import write_report  # matplotlib and jinja2 are an extra

    write_report(metrics, directory / "report.html")
    return directory / "report.html"


def train_on(config: RunConfig, scored: str | Path) -> Path:
    """Train and evaluate one policy on a scored set made elsewhere, of the training rows of this run; returns its directory."""
    directory = _prepare(config)
    seed_run = SeedRun(config, config.seed_list[0], directory / f"seed-{config.seed_list[0]}", scored=Path(scored))
    record, provenance = seed_run.directory / "scored-set.json", load_provenance(scored)
    if (seed_run.directory / "policy" / "scored").exists() and json.loads(record.read_text()) != provenance:
        raise InputError(
            f"{directory} holds a policy trained on another scored set; give another output_dir, or remove "
            f"{seed_run.directory / 'policy' / 'scored'}"
        )
    write_json(record, provenance)
    metrics = seed_run.policy("scored")["metrics"]
    print(", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if isinstance(value, float)))
    return seed_run.directory / "policy" / "scored"


def ready(model):
    """A model to be asked, not trained: on the device that computes here, without dropout."""
    return model.to(default_device()).eval()


def _prepare(config: RunConfig) -> Path:
    """Make the run's directory, or check that what lies there belongs to the same configuration; set the number of threads."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    directory = Path(config.output_dir)
    path = directory / "config.yaml"
    # a configuration of which nothing was done yet (its data could not be read, say) binds nobody
    if path.exists() and any(directory.glob("seed-*/*")):
        earlier, now = to_dict(load_config(path, [])), to_dict(config)
        # a run may grow (seeds, methods, constructions); what was trained may not change
        shuffled = [
            config.control != load_config(path, []).control and m in now["methods"] and any(directory.glob(f"seed-*/policy/{m}"))
            for m in ("random", "swapped")
        ]
        if any(shuffled):
            raise InputError(
                f"{directory} holds a control (random or swapped) made from the contrasts of another construction than now the first of "
                "contrast.constructions; keep the order, or give another output_dir"
            )
        for settings in (earlier, now):
            settings["contrast"].pop("constructions")
        changed = [
            key
            for key in now
            if key not in ("seeds", "methods", "description", "name", "output_dir", "threads") and earlier.get(key) != now[key]
        ]
        if changed:
            raise InputError(
                f"{directory} holds a run with other settings ({', '.join(changed)} differ); "
                "give another output_dir, or remove that directory to start again"
            )
    directory.mkdir(parents=True, exist_ok=True)
    dump(config, path)
    return directory


class SeedRun:
    """All stages of one seed; each method returns what its stage made, and makes it if it is not there."""

    def __init__(self, config: RunConfig, seed: int, directory: Path, scored: Path | None = None):
        self.config, self.seed, self.directory, self.external = config, seed, directory, scored
        self._inside = 0.0  # seconds of the stages inside the one that is timed
        directory.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def timed(self, stage: str):
        """Add the seconds of a stage to those of earlier, interrupted tries; a stage inside another is not counted in both."""
        start, before, self._inside = time.monotonic(), self._inside, 0.0
        try:
            yield
        finally:
            passed, seconds = time.monotonic() - start, self.seconds
            seconds[stage] = seconds.get(stage, 0.0) + passed - self._inside
            self._inside = before + passed
            write_json(self.directory / "seconds.json", seconds)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of every stage so far."""
        path = self.directory / "seconds.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def label(self, what: str) -> str:
        return f"seed {self.seed} · {what}".ljust(34)

    # Data and base model

    @cached_property
    def source(self) -> Source:
        return load_source(self.config, self.seed)

    @property
    def tokenizer(self):
        return self.source.tokenizer

    def base(self):
        """A fresh copy of the base model, which is also the reference of every policy."""
        model = self.config.model
        if model.path is not None:
            return load_model(model.path)
        path = self.directory / "base"
        if not (path / "model").is_dir():
            fresh = tiny_llama(
                self.tokenizer,
                hidden_size=model.hidden_size,
                layers=model.layers,
                heads=model.heads,
                seed=self.seed,
                max_length=self.config.data.max_length + max(64, self.config.evaluation.max_new_tokens),
            )
            options = {"method": "sft", "sft_prompt_loss": True, "max_length": self.config.data.max_length}
            with self.timed("base model"):
                train_stage(
                    fresh,
                    self.tokenizer,
                    self.source.documents(),
                    model.pretrain,
                    path,
                    label=self.label("base model"),
                    seed=self.seed,
                    options=options,
                )
        return load_model(str(path / "model"))

    @cached_property
    def reference(self):
        """The base model, for evaluation."""
        return ready(self.base())

    @cached_property
    def rows(self):
        """Training rows, with the reference's log-probs where the objective does not need its distribution."""
        rows = self.source.train
        return rows if self.config.objective.kl is not None else self._with_reference(rows)

    @cached_property
    def rows_for_contrast(self):
        """Training rows with the reference's log-probs: contrastive DPO has no KL term."""
        return self.rows if self.config.objective.kl is None else self._with_reference(self.source.train)

    def _with_reference(self, rows):
        with self.timed("reference log-probs"):
            return add_reference_logps(rows, self.reference, self.tokenizer.pad_token_id)

    # Contrastive models and weights

    def contrastive_model(self, name: str):
        """`base`, `sft-chosen`, `sft-rejected`, `dpo` or `dpo-swapped`; of another run with contrast.models_from."""
        if self.config.contrast.models_from is not None:
            return ready(contrastive.model_of_run(self.config.contrast.models_from, self.seed, name, self.tokenizer))
        if name == "base":
            return self.reference
        path = self.directory / "contrastive" / name
        if not (path / "model").is_dir():
            contrast = self.config.contrast
            options = {"max_length": self.config.data.max_length}
            if name.startswith("sft"):
                stage, rows, options = contrast.sft, self.source.train, options | {"method": "sft", "sft_side": name.removeprefix("sft-")}
            else:
                stage, rows = contrast.dpo, self.rows_for_contrast
                options |= {"method": "dpo", "beta": stage.beta, "swap_pairs": name == "dpo-swapped"}
            start = self.base()  # may train it, which is a stage of its own
            with self.timed(f"contrastive {name}"):
                train_stage(
                    start, self.tokenizer, rows, stage, path, label=self.label(f"contrastive {name}"), seed=self.seed, options=options
                )
        return ready(load_model(str(path / "model")))

    def scored(self, construction: str):
        """Training rows with the raw contrast of a construction."""
        if construction == "scored":
            return load_scored(self.external, dataset=self.source.train, expect={"tokenizer": tokenizer_fingerprint(self.tokenizer)})
        path = self.directory / "scored" / construction
        how = {"construction": construction}
        if construction == "P":
            how |= dict(zip(("positive_prompt", "negative_prompt"), self.prompts_of_contrast()))
        parts = path.with_name(path.name + ".parts")
        if path.is_dir():
            remove(parts)  # of a run that was killed before it could
            return load_scored(path, dataset=self.source.train, expect={"tokenizer": tokenizer_fingerprint(self.tokenizer), "how": how})
        positive, negative = (contrastive.Scorer(self.contrastive_model(name)) for name in CONTRASTIVE_MODELS[construction])
        rows = self.source.train
        if construction == "P":
            for scorer, text in zip((positive, negative), self.prompts_of_contrast()):
                scorer.prompts = contrastive.system_prompts(self.source.pairs, rows, self.tokenizer, text)
        label = f"scoring {construction}"
        with (
            self.timed(label),
            tqdm(total=contrastive.tokens_to_score(rows, positive, negative), desc=self.label(label), unit="tok", unit_scale=True) as bar,
        ):
            rows = contrastive.score_contrast(
                rows,
                positive,
                negative,
                pad_token_id=self.tokenizer.pad_token_id,
                parts=parts,
                batch_tokens=self.config.contrast.batch_tokens,
                progress=bar.update,
            )
        provenance = make_provenance(
            self.tokenizer, max_length=self.config.data.max_length, positive=positive.model, negative=negative.model, how=how
        )
        save_scored(rows, path, provenance)
        return self.scored(construction)

    def prompts_of_contrast(self) -> tuple[str, str]:
        """The positive and the negative system prompt of construction P."""
        contrast = self.config.contrast
        positive, negative = PROMPTS[contrast.task]
        return contrast.positive_prompt or positive, contrast.negative_prompt or negative

    # Policies

    def method_rows(self, method: str):
        """(rows, trainer options) of a method: which weights it trains with."""
        objective, weighting = self.config.objective, self.config.weighting
        options = {
            "method": "tis-dpo", "max_length": self.config.data.max_length, "beta": objective.beta, "loss_type": objective.loss,
            "kl": objective.kl, "alpha": objective.alpha, "detach_chosen_kl": objective.detach_chosen_kl,
            "label_smoothing": objective.label_smoothing,
        }  # fmt: skip
        if method == "dpo":
            return self.rows, options | {"method": "dpo"}
        if method == "scored":  # its rows bring their reference along
            return self.scored(method), options | {"weighting": asdict(weighting)}
        if method in ("random", "equal", "swapped"):
            weighting = replace(weighting, transform=method, **({"seed": self.seed} if method == "random" else {}))
        if method == "equal":  # the rule does not look at the contrast
            contrast = {side: [[0.0] * len(ids) for ids in self.rows[f"{side}_ids"]] for side in ("chosen", "rejected")}
        elif method in ("truth", "oracle"):  # the reward itself, scaled to fill the clamp
            scale = max(abs(weighting.lower), abs(weighting.upper))
            contrast = {side: [[scale * x for x in values] for values in self.rows[f"{side}_truth"]] for side in ("chosen", "rejected")}
        else:
            scored = self.scored(self.config.control if method in ("random", "swapped") else method)
            contrast = {side: scored[f"{side}_contrast"] for side in ("chosen", "rejected")}
        rows = self.rows
        for side, values in contrast.items():
            rows = rows.add_column(f"{side}_contrast", values)
        if method == "oracle":  # the same, but 0 wherever there is nothing to learn
            rows = apply_weighting(rows, weighting, self.tokenizer.eos_token_id).map(_only_where_it_counts)
            return rows, options
        return rows, options | {"weighting": asdict(weighting)}

    def policy(self, method: str) -> dict:
        """Train and evaluate the policy of a method: {"metrics", "points", "samples"}."""
        path = self.directory / "policy" / method
        result = path / "result.json"
        if result.exists():
            return json.loads(result.read_text())
        settings = self.config.evaluation
        if not (path / "model").is_dir():
            rows, options = self.method_rows(method)
            with self.timed(f"policy {method}"):
                train_stage(
                    self.base(), self.tokenizer, rows, self.config.train, path, label=self.label(f"policy {method}"),
                    seed=self.seed, options=options,
                    checkpoints=settings.checkpoints, measure=self.measure_checkpoint,
                )  # fmt: skip
        with self.timed(f"evaluation {method}"):
            content = self.evaluated(ready(load_model(str(path / "model"))))
        write_json(result, content | {"points": read_points(path / "points.json")})
        shutil.rmtree(path / "checkpoints", ignore_errors=True)
        return self.policy(method)

    def base_results(self) -> dict:
        """Evaluation of the base model itself."""
        path = self.directory / "base-result.json"
        if not path.exists():
            with self.timed("evaluation base"):
                write_json(path, self.evaluated(self.reference, is_base=True) | {"points": []})
        return json.loads(path.read_text())

    # Evaluation

    @cached_property
    def reward(self) -> Callable | None:
        """The true reward, or that of a reward model."""
        if self.config.evaluation.reward_model is not None:
            return evaluate.load_reward_model(self.config.evaluation.reward_model)
        return self.source.reward

    @cached_property
    def heldout_reference(self):
        """The reference's log-probs of the held-out pairs, computed once for all checkpoints and methods."""
        return self._with_reference(self.source.heldout)

    def generations(self, model, temperature: float | None = None):
        settings = self.config.evaluation
        return evaluate.generate(
            model, self.tokenizer, self.source.prompts[: settings.prompts], max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature if temperature is None else temperature, seed=self.seed, batch_size=settings.batch_size,
        )  # fmt: skip

    def kl(self, model, generations) -> dict:
        """KL to the reference; its estimate needs samples of the policy itself, at temperature 1."""
        samples = generations if self.config.evaluation.temperature == 1.0 else self.generations(model, temperature=1.0)
        return evaluate.kl_to_reference(model, self.reference, samples, pad_token_id=self.tokenizer.pad_token_id)

    def response_metrics(self, generations) -> dict:
        return evaluate.response_metrics(generations, self.reward, self.source.right)

    def preference(self, model) -> dict:
        return evaluate.preference_metrics(
            model, None, self.heldout_reference, pad_token_id=self.tokenizer.pad_token_id, beta=self.config.objective.beta
        )

    @property
    def quality(self) -> str:
        """The metric that methods are compared by: right answers where there are such, else the reward, else the held-out accuracy."""
        if self.source.right is not None and self.config.evaluation.reward_model is None:
            return "right"
        return "accuracy" if self.reward is None else "reward"

    def measure_checkpoint(self, model) -> dict:
        """A point of the frontier: KL to the reference, and the quality."""
        model.eval()
        generations = self.generations(model)
        kl = self.kl(model, generations)["kl"]
        metrics = self.preference(model) if self.quality == "accuracy" else self.response_metrics(generations)
        return {"kl": kl, "y": metrics[self.quality]}

    def evaluated(self, model, is_base: bool = False) -> dict:
        """{"metrics": {...}, "samples": [...]} of a policy; of the base only what does not compare it with itself."""
        generations = self.generations(model)
        metrics = self.response_metrics(generations)
        if not is_base:
            metrics |= self.preference(model)
            metrics |= self.kl(model, generations)
        samples = [
            {"prompt": g.prompt, "text": g.text, "reward": self.reward(g) if self.reward else None}
            for g in generations[: self.config.evaluation.samples]
        ]
        return {"metrics": metrics, "samples": samples}


def _only_where_it_counts(row: dict) -> dict:
    """The weights of a row, 0 on tokens without reward."""
    return {f"{s}_weights": [w if t else 0.0 for w, t in zip(row[f"{s}_weights"], row[f"{s}_truth"])] for s in ("chosen", "rejected")}
