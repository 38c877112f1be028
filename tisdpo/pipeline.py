"""The whole method, start to end: pairs -> base model -> contrastive models -> token weights -> policies -> evaluation -> report.

A run is a directory. Every stage leaves files that appear complete or not at all, so that an interrupted run goes on where it was when
the same command is given again:

    <output_dir>/config.yaml  data.json (digests of the files of pairs)  metrics.json  report.html
    <output_dir>/seed-<n>/base/  contrastive/<model>/  scored/<construction>/  policy/<method>/
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from tqdm.auto import tqdm

from tisdpo import evaluate
from tisdpo.config import WORLDS, ModelConfig, RunConfig, dump, load_config, to_dict
from tisdpo.errors import InputError
from tisdpo.estimation import Estimation, ready
from tisdpo.files import content_digest, write_json
from tisdpo.hf import load_model, save_model
from tisdpo.rows import apply_weighting
from tisdpo.scored import load_provenance
from tisdpo.sources import Source
from tisdpo.stages import read_points, train_stage
from tisdpo.summary import collect

log = logging.getLogger("tisdpo")


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
    if len(config.seed_list) > 1:
        log.warning("one policy is trained, with seed %d: the other seeds are for the policies of a whole run", config.seed_list[0])
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


def _prepare(config: RunConfig) -> Path:
    """Make the run's directory, or check that what lies there belongs to the same configuration; set the number of threads."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    directory = Path(config.output_dir)
    path, contents = directory / "config.yaml", directory / "data.json"
    sources = {data.source for data in (config.data, config.contrast.data, config.evaluation.data) if data is not None} - set(WORLDS)
    before = json.loads(contents.read_text()) if contents.exists() else {}
    here = {source: content for source in sorted(sources) if (content := content_digest(source)) is not None}
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
        if other := [source for source, content in here.items() if before.get(source, content) != content]:
            raise InputError(
                f"{directory} holds a run on what {other[0]} held before it was changed; give another output_dir, or remove that directory "
                "to start again"
            )
    directory.mkdir(parents=True, exist_ok=True)
    dump(config, path)
    if here:
        write_json(contents, before | here)
    return directory


class SeedRun(Estimation):
    """All stages of one seed: those of `Estimation`, then policies and their evaluation."""

    # Policies

    def method_rows(self, method: str, scored: Callable | None = None):
        """(rows, trainer options) of a method: which weights it trains with; `scored(construction)` gives the rows with their contrast."""
        objective, weighting = self.config.objective, self.config.weighting
        options = {
            "method": "tis-dpo", "max_length": self.config.data.max_length, "beta": objective.beta, "loss_type": objective.loss,
            "kl": objective.kl, "alpha": objective.alpha, "detach_chosen_kl": objective.detach_chosen_kl,
            "label_smoothing": objective.label_smoothing, "nll_coef": objective.nll_coef,
        }  # fmt: skip
        if method == "dpo":
            return self.rows, options | {"method": "dpo"}
        if method == "scored":  # its rows bring their reference along
            return self.scored(method), options | {"weighting": asdict(weighting)}
        if method == "swapped" and weighting.transform != "exp":  # the same as its own transform, of any rule
            weighting = replace(weighting, mu_chosen=weighting.mu_rejected, mu_rejected=weighting.mu_chosen)
        elif method == "equal" or (method in ("random", "swapped") and weighting.transform == "exp"):
            weighting = replace(weighting, transform=method, **({"seed": self.seed} if method == "random" else {}))
        if method == "equal":  # the rule does not look at the contrast
            contrast = {side: [[0.0] * len(ids) for ids in self.rows[f"{side}_ids"]] for side in ("chosen", "rejected")}
        elif method in ("truth", "oracle"):  # the reward itself, scaled to fill the clamp
            scale = max(abs(weighting.lower), abs(weighting.upper))
            contrast = {side: [[scale * x for x in values] for values in self.rows[f"{side}_truth"]] for side in ("chosen", "rejected")}
        else:
            rows = (scored or self.scored)(self.config.construction(method) or method)  # or "scored", a set made elsewhere
            contrast = {side: rows[f"{side}_contrast"][:] for side in ("chosen", "rejected")}  # a lazy column is read row by row
            if method == "random" and weighting.transform != "random":
                contrast = {side: _shuffled(values, self.seed) for side, values in contrast.items()}
        rows = self.rows
        for side, values in contrast.items():
            rows = rows.add_column(f"{side}_contrast", values)
        if method == "oracle":  # the same, but 0 wherever there is nothing to learn
            rows = apply_weighting(rows, weighting, self.tokenizer.eos_token_id).map(_only_where_it_counts)
            return rows, options
        return rows, options | {"weighting": asdict(weighting)}

    def policy(self, method: str) -> dict:
        """Train and evaluate the policy of a method: {"metrics", "points", "samples"}."""
        path = self.place(f"policy/{method}")
        result = path / "result.json"
        if result.exists():
            return json.loads(result.read_text())
        if not (path / "model").is_dir():
            self._train_policy(method, path)
        with self.timed(f"evaluation {method}"):
            content = self.evaluated(ready(load_model(str(path / "model"))))
        write_json(result, content | {"points": read_points(path / "points.json")})
        shutil.rmtree(path / "checkpoints", ignore_errors=True)
        return self.policy(method)

    def _train_policy(self, method: str, path: Path) -> None:
        """With contrast.rounds, training stops in between, and the weights are estimated anew from the policy as it is then."""
        steps, construction = self.config.train.steps, self.config.construction(method)
        rounds = 1 if construction is None else self.config.contrast.rounds
        for number in range(rounds):
            start, end = path / f"round-{number}", path / f"round-{number + 1}"
            if (end / "model").is_dir():
                continue
            rows, options = self.method_rows(method, Round(self, start).scored if number else None)
            model = self.base()
            with self.timed(f"policy {method}"):
                train_stage(
                    model, self.tokenizer, rows, self.config.train, path, label=self.label(f"policy {method}"),
                    seed=self.seed, options=options, until=steps * (number + 1) // rounds,
                    checkpoints=self.config.evaluation.checkpoints, measure=self.measure_checkpoint, new_rows=number > 0,
                )  # fmt: skip
            if number + 1 < rounds:
                save_model(model, self.tokenizer, end / "model")

    def base_results(self) -> dict:
        """Evaluation of the base model itself."""
        path = self.place("base-result.json")
        if not path.exists():
            with self.timed("evaluation base"):
                write_json(path, self.evaluated(self.reference, is_base=True) | {"points": []})
        return json.loads(path.read_text())

    # Evaluation

    @cached_property
    def evaluation_source(self) -> Source:
        """Where held-out pairs, prompts and the true reward come from: the data of the run, or evaluation.data."""
        return self.other_source(self.config.evaluation.data, "evaluation.data")

    @cached_property
    def reward(self) -> Callable | None:
        """The true reward, or that of a reward model."""
        if self.config.evaluation.reward_model is not None:
            return evaluate.load_reward_model(self.config.evaluation.reward_model)
        return self.evaluation_source.reward

    @cached_property
    def heldout_reference(self):
        """The reference's log-probs of the held-out pairs, computed once for all checkpoints and methods."""
        return self._with_reference(self.evaluation_source.heldout)

    def generations(self, model, temperature: float | None = None):
        settings, source = self.config.evaluation, self.evaluation_source
        prompts, label = source.prompts[: settings.prompts], self.label("responses")
        with tqdm(total=len(prompts), desc=label, disable=label is None, unit="response", leave=False) as bar:
            found = evaluate.generate(
                model, self.tokenizer, prompts, max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature if temperature is None else temperature, seed=self.seed, batch_size=settings.batch_size,
                progress=bar.update,
            )  # fmt: skip
        if source.conversations is None:
            return found
        return [replace(one, messages=messages) for one, messages in zip(found, source.conversations)]

    def kl(self, model, generations) -> dict:
        """KL to the reference; its estimate needs samples of the policy itself, at temperature 1."""
        samples = generations if self.config.evaluation.temperature == 1.0 else self.generations(model, temperature=1.0)
        return evaluate.kl_to_reference(model, self.reference, samples, pad_token_id=self.tokenizer.pad_token_id)

    def response_metrics(self, generations) -> dict:
        return evaluate.response_metrics(generations, self.reward, self.evaluation_source.right)

    def preference(self, model) -> dict:
        return evaluate.preference_metrics(
            model, None, self.heldout_reference, pad_token_id=self.tokenizer.pad_token_id, beta=self.config.objective.beta
        )

    @property
    def quality(self) -> str:
        """The metric that methods are compared by: right answers where there are such, else the reward, else the held-out accuracy."""
        if self.evaluation_source.right is not None and self.config.evaluation.reward_model is None:
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


class Round(Estimation):
    """Weights estimated anew while a policy is trained: the contrastive models start from the policy in `path`/model."""

    def __init__(self, run: SeedRun, path: Path):
        contrast = replace(run.config.contrast, model=ModelConfig(path=str(path / "model")), rounds=1)
        super().__init__(replace(run.config, contrast=contrast), run.seed, run.directory)
        self.path, self.label, self.source = path, run.label, run.source

    def place(self, stage: str) -> Path:
        return self.path / stage


def _shuffled(contrasts: list[list[float]], seed: int) -> list[list[float]]:
    """The contrasts of one side, of all its tokens, dealt out anew."""
    flat = torch.tensor([x for values in contrasts for x in values], dtype=torch.float64)
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))
    return [part.tolist() for part in flat[order].split([len(values) for values in contrasts])]


def _only_where_it_counts(row: dict) -> dict:
    """The weights of a row, 0 on tokens without reward."""
    return {f"{s}_weights": [w if t else 0.0 for w, t in zip(row[f"{s}_weights"], row[f"{s}_truth"])] for s in ("chosen", "rejected")}
