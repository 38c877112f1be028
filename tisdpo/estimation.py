"""From preference pairs to a contrast for every token: data, base model, contrastive models and scores of one seed."""

import itertools
import json
import time
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from tqdm.auto import tqdm

from tisdpo import contrastive
from tisdpo.config import WORLDS, DataConfig, ModelConfig, RunConfig
from tisdpo.doctor import default_device
from tisdpo.errors import InputError
from tisdpo.files import remove, write_json
from tisdpo.fingerprints import tokenizer_fingerprint
from tisdpo.hf import load_model, load_tokenizer, tiny_llama
from tisdpo.parts import Scoring
from tisdpo.prompts import PROMPTS
from tisdpo.rows import add_reference_logps
from tisdpo.scored import load_scored, make_provenance, save_scored, scores_of
from tisdpo.sources import Source, load_source
from tisdpo.stages import kept_model, train_stage

# construction: its positive and negative model (of `Estimation.contrastive_model`)
CONTRASTIVE_MODELS = {"P": ("base", "base"), "S": ("sft-chosen", "sft-rejected"), "D": ("dpo", "dpo-swapped"), "R": ("dpo", "base")}


def ready(model):
    """A model to be asked, not trained: on the device that computes here, without dropout."""
    return model.to(default_device()).eval()


class Estimation:
    """The stages of one seed up to the scores; each method returns what its stage made, and makes it if it is not there."""

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

    def label(self, what: str) -> str | None:
        """What stands before the progress bar of a stage; None: no bar."""
        return f"seed {self.seed} · {what}".ljust(34)

    def place(self, stage: str) -> Path:
        """Where a stage ("base", "contrastive/<model>", "scored/<construction>", "policy/<method>", ...) leaves what it makes."""
        return self.directory / stage

    # Data and base model

    @cached_property
    def source(self) -> Source:
        return load_source(self.config, self.seed)

    def other_source(self, data: DataConfig | None, key: str) -> Source:
        """The source of the settings under a key such as contrast.data, which must share the tokenizer; None: that of the run."""
        if data is None:
            return self.source
        source = load_source(self.config, self.seed, data)
        self._check_tokenizer(source.tokenizer, f"{key}, source={data.source},")
        return source

    @property
    def tokenizer(self):
        return self.source.tokenizer

    def base(self):
        """A fresh copy of the base model, which is also the reference of every policy."""
        return self.pretrained(self.config.model, "base")

    def contrast_base(self):
        """A fresh copy of the model that the contrastive models start from: the base model, or that of contrast.model."""
        model = self.config.contrast.model
        if model is None:
            return self.base()
        if model.path is not None:
            self._check_tokenizer(load_tokenizer(model.tokenizer or model.path), f"contrast.model.path={model.path}")
        return self.pretrained(model, "contrastive/base")

    def _check_tokenizer(self, tokenizer, what: str) -> None:
        if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(self.tokenizer):
            raise InputError(f"{what} has another tokenizer than the base model; give one that shares it")

    def pretrained(self, model: ModelConfig, stage: str):
        """A fresh copy of a given model, or of one trained from scratch on the text of the source."""
        if model.path is not None:
            return load_model(model.path)
        path = self.place(stage)
        if not (path / "model").is_dir():
            fresh = tiny_llama(
                self.tokenizer, hidden_size=model.hidden_size, layers=model.layers, heads=model.heads, seed=self.seed, max_length=self.room
            )
            options = {"method": "sft", "sft_prompt_loss": True, "max_length": self.config.data.max_length}
            name = "base model" if stage == "base" else "base of the contrastive models"
            with self.timed(name):
                train_stage(
                    fresh, self.tokenizer, self.source.documents(), model.pretrain, path, label=self.label(name), seed=self.seed,
                    options=options,
                )  # fmt: skip
        return load_model(str(path / "model"))

    @property
    def room(self) -> int:
        """Positions of a model trained from scratch: for the longest pair of any of the data, and for a response."""
        config = self.config
        longest = max(data.max_length for data in (config.data, config.contrast.data, config.evaluation.data) if data is not None)
        return longest + max(64, config.evaluation.max_new_tokens)

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
        """Rows that contrastive DPO learns from, with the log-probs of its own start: it has no KL term."""
        contrast = self.config.contrast
        if contrast.model is None and contrast.data is None and self.config.objective.kl is None:
            return self.rows
        return self._with_reference(self.contrast_source.train, self.contrast_reference)

    def _with_reference(self, rows, reference=None):
        with self.timed("reference log-probs"):
            return add_reference_logps(rows, reference or self.reference, self.tokenizer.pad_token_id)

    # Contrastive models and weights

    @cached_property
    def contrast_source(self) -> Source:
        """What the contrastive models learn from: the data of the run, or contrast.data."""
        return self.other_source(self.config.contrast.data, "contrast.data")

    @cached_property
    def contrast_reference(self):
        """What the contrastive models start from, to be asked."""
        return self.reference if self.config.contrast.model is None else ready(self.contrast_base())

    def fold(self, pair: int) -> list[int]:
        """Numbers of the training rows that the contrastive pair of this number scores: all, or with `crossfit` every n-th, of text those
        of every n-th prompt: the pairs of a prompt may share a response."""
        contrast, rows = self.config.contrast, self.source.train
        if not contrast.crossfit:
            return list(range(len(rows)))
        if not isinstance(self.fold_rule, list):
            return list(range(pair, len(rows), contrast.pairs))
        prompts = [tuple(ids) for ids in rows["prompt_ids"][:]]
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        if len(places) < contrast.pairs:
            raise InputError(f"crossfit shares prompts out to contrast.pairs={contrast.pairs}, and there are {len(places)}; lower it")
        return [number for number, prompt in enumerate(prompts) if places[prompt] % contrast.pairs == pair]

    @property
    def fold_rule(self):
        """What `fold` does, for those who keep what is made of it: False, the number of folds, or with whole prompts in each."""
        contrast = self.config.contrast
        if not contrast.crossfit or self.config.data.source in WORLDS:
            return contrast.crossfit and contrast.pairs
        return [contrast.pairs, "prompts"]

    def contrastive_model(self, name: str, pair: int = 0, checkpoint: int = 0):
        """`base`, `sft-chosen`, `sft-rejected`, `dpo` or `dpo-swapped`; of the pair of this number, as many checkpoints before its end.

        With contrast.models_from, that of another run.
        """
        if self.config.contrast.models_from is not None:
            return ready(contrastive.model_of_run(self.config.contrast.models_from, self.seed, name, self.tokenizer))
        if name == "base":
            return self.contrast_reference
        numbered = numbered_stage(name, pair)
        path = self.place(f"contrastive/{numbered}")
        if not (path / "model").is_dir():
            contrast = self.config.contrast
            options = {"max_length": (contrast.data or self.config.data).max_length}
            if name.startswith("sft"):
                stage, rows, side = contrast.sft, self.contrast_source.train, name.removeprefix("sft-")
                options |= {"method": "sft", "sft_side": side}
            else:
                stage, rows = contrast.dpo, self.rows_for_contrast
                options |= {"method": "dpo", "beta": stage.beta, "swap_pairs": name == "dpo-swapped"}
            if contrast.crossfit:
                rows = rows.select(sorted(set(range(len(rows))) - set(self.fold(pair))))
            start, seed = self.contrast_base(), self.seed + 1000 * pair  # the base may have to be trained, a stage of its own
            with self.timed(f"contrastive {numbered}"):
                train_stage(
                    start, self.tokenizer, rows, stage, path, label=self.label(f"contrastive {numbered}"), seed=seed, options=options,
                    kept=contrast.checkpoints,
                )  # fmt: skip
        return ready(load_model(str(path / kept_model(checkpoint))))

    def scored(self, construction: str):
        """Training rows with the contrast of a construction: raw, or averaged, cross-fitted, smoothed and scaled as `contrast` says."""
        if construction == "scored":
            return scores_of(self.external, self.source.train, expect={"tokenizer": tokenizer_fingerprint(self.tokenizer)})
        contrast = self.config.contrast
        pairs, checkpoints = (1, 1) if construction == "P" else (contrast.pairs, contrast.checkpoints)  # nothing is trained for P
        several = list(itertools.product(range(pairs), range(checkpoints)))
        if len(several) == 1 and contrast.smooth == 1 and contrast.std is None:
            return self.scored_by(construction)
        folds = [self.fold(pair) if len(several) > 1 else None for pair, _ in several]
        parts = list(zip((self.scored_by(construction, *one) for one in several), folds))
        return contrastive.combined(self.source.train, parts, smooth=contrast.smooth, std=contrast.std)

    def scored_by(self, construction: str, pair: int = 0, checkpoint: int = 0):
        """The rows of its fold with the raw contrast of one contrastive pair, as many checkpoints before its end."""
        name = numbered_stage(construction, pair, checkpoint)
        path = self.place(f"scored/{name}")
        how = {"construction": construction}
        rows = self.source.train
        if self.config.contrast.crossfit and construction != "P":
            rows = rows.select(self.fold(pair))
            rule = self.fold_rule
            how |= {"fold": [pair, *(rule if isinstance(rule, list) else [rule])]}
        if construction == "P":
            how |= dict(zip(("positive_prompt", "negative_prompt"), self.prompts_of_contrast()))
        parts = path.with_name(path.name + ".parts")
        if path.is_dir():
            remove(parts)  # of a run that was killed before it could
            return load_scored(path, dataset=rows, expect={"tokenizer": tokenizer_fingerprint(self.tokenizer), "how": how})
        positive, negative = (
            contrastive.Scorer(self.contrastive_model(model, pair, checkpoint)) for model in CONTRASTIVE_MODELS[construction]
        )
        if construction == "P":
            for scorer, text in zip((positive, negative), self.prompts_of_contrast()):
                scorer.prompts = contrastive.system_prompts(self.source.pairs, rows, self.tokenizer, text)
        stage = f"scoring {name}"
        pad, batch_tokens, label = self.tokenizer.pad_token_id, self.config.contrast.batch_tokens, self.label(stage)
        with self.timed(stage):
            scoring = Scoring(rows, positive, negative, pad_token_id=pad, parts=parts, batch_tokens=batch_tokens)
            with tqdm(total=scoring.tokens(), desc=label, disable=label is None, unit="tok", unit_scale=True) as bar:
                scoring.score(progress=bar.update)
            rows = scoring.joined()
        provenance = make_provenance(
            self.tokenizer, max_length=self.config.data.max_length, positive=positive.model, negative=negative.model, how=how
        )
        save_scored(rows, path, provenance)
        return self.scored_by(construction, pair, checkpoint)

    def prompts_of_contrast(self) -> tuple[str, str]:
        """The positive and the negative system prompt of construction P."""
        contrast = self.config.contrast
        positive, negative = PROMPTS[contrast.task]
        return contrast.positive_prompt or positive, contrast.negative_prompt or negative


def numbered_stage(name: str, pair: int, checkpoint: int = 0) -> str:
    """The stage of a contrastive pair: "S" of the first, "S.1" and "S.2" of the others, "S.1-1" one checkpoint before the end of that."""
    return name + (f".{pair}" if pair else "") + (f"-{checkpoint}" if checkpoint else "")
