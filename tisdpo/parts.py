"""Scoring in parts: what models say of every completion token, in files that a killed run goes on from and that processes share out."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tisdpo.cached import hidden_name, write_reference
from tisdpo.errors import InputError
from tisdpo.files import beside
from tisdpo.fingerprints import model_fingerprint
from tisdpo.hf import head_of
from tisdpo.scoring import iterate_logps, plan_batches

PART_TOKENS = 200_000  # tokens scored between two files of a resumable run


@dataclass
class Scorer:
    """A model, and the prompts it sees if they are not those of the rows."""

    model: torch.nn.Module
    prompts: Sequence[Sequence[int]] | None = None


def _lengths(prompts, completions) -> list[int]:
    """Tokens of prompt and completion, with the longest of the prompts."""
    return [max(len(p[i]) for p in prompts) + len(c) for i, c in enumerate(completions)]


class Scoring:
    """The contrast of all completions of tokenised rows, and where a reference is given its log-probs (and hidden states).

    positive, negative   pi+ and pi-; the contrast is log pi+ - log pi- of every completion token, EOS included, float32, nats; both None:
                         no contrast, the reference's values alone
    reference            gives *_ref_logps, under the prompts of the rows; the same forward as a scorer that is the same model
    hidden_dtype         the reference's hidden states at the completion tokens are kept in this dtype; None: not at all
    parts                directory for the work in progress, the caller's to remove once the result is stored
    batch_tokens         padded tokens of a batch; batches are of similar length and depend on the lengths alone

    After every PART_TOKENS tokens a file appears in a folder of `parts` that is named after the ids, the models and the batch size. So
    a run killed at any moment goes on where it was, processes can share the parts out without talking to each other, and the result is
    the same bit for bit; the files of another scoring are never used.
    """

    def __init__(
        self,
        rows,
        positive: Scorer | None,
        negative: Scorer | None,
        *,
        pad_token_id: int,
        parts: str | Path,
        batch_tokens: int = 8192,
        reference: torch.nn.Module | None = None,
        hidden_dtype: torch.dtype | None = None,
    ):
        if hidden_dtype is not None and reference is None:
            raise InputError("hidden_dtype is given, but there is no reference whose hidden states could be kept; give the reference")
        self.rows, self.reference, self.pad_token_id, self.hidden_dtype = rows, reference, pad_token_id, hidden_dtype
        self.prompts, self.completions = list(rows["prompt_ids"]), [*rows["chosen_ids"], *rows["rejected_ids"]]
        pair = [scorer for scorer in (positive, negative) if scorer is not None]
        scorers = [*pair, *([] if reference is None else [Scorer(reference)])]
        contexts = [(scorer.model.eval(), list(scorer.prompts or self.prompts) * 2) for scorer in scorers]
        # the reference is often one of the two (construction R): one forward serves both
        self.shared = next((i for i, scorer in enumerate(pair) if scorer.model is reference and scorer.prompts is None), None)
        self.contexts = contexts if self.shared is None else contexts[: len(pair)]
        self.with_contrast = bool(pair)
        self.lengths = _lengths([p for _, p in contexts], self.completions)
        self.groups = _grouped(plan_batches(self.lengths, batch_tokens), self.lengths)
        self.directory = Path(parts) / self._fingerprint(contexts, batch_tokens)

    def _fingerprint(self, contexts, batch_tokens: int) -> str:
        parts = [model_fingerprint(model) for model, _ in contexts] + [[list(p) for p in prompts] for _, prompts in contexts]
        parts += [[list(c) for c in self.completions], batch_tokens, PART_TOKENS, str(self.hidden_dtype)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _path(self, part: int) -> Path:
        return self.directory / f"part-{part:05d}.safetensors"

    def missing(self) -> list[int]:
        """Numbers of the parts that are not there yet."""
        return [part for part in range(len(self.groups)) if not self._path(part).exists()]

    def score(self, *, shard: tuple[int, int] = (0, 1), progress: Callable[[int], None] | None = None) -> None:
        """Score what is missing of every n-th part from the i-th on, shard = (i, n). `progress` is called with tokens as they are done."""
        for part in range(shard[0], len(self.groups), shard[1]):
            if not self._path(part).exists():
                self._score(part)
            if progress is not None:
                progress(sum(self.lengths[i] for batch in self.groups[part] for i in batch))

    def tokens(self, shard: tuple[int, int] = (0, 1)) -> int:
        """How many tokens `score` reports for this shard."""
        return sum(self.lengths[i] for batches in self.groups[shard[0] :: shard[1]] for batch in batches for i in batch)

    def _score(self, part: int) -> None:
        """Write the file of a part, its hidden states first: where the part is, they are."""
        number = None if self.reference is None else len(self.contexts) - 1 if self.shared is None else self.shared
        contrast, reference, hidden = [], [], []
        found = iterate_logps(
            self.contexts, self.completions, self.groups[part], self.pad_token_id, None if self.hidden_dtype is None else number
        )
        for _, logps, kept in found:
            contrast += [p - n for p, n in zip(logps[0], logps[1])] if self.with_contrast else []
            reference += logps[number] if number is not None else []
            hidden += [] if kept is None else [kept.to(self.hidden_dtype).cpu()]
        if hidden:
            with beside(self.directory / hidden_name(part)) as temporary:
                save_file({"hidden": torch.cat(hidden)}, temporary)
        values = {name: torch.cat(x) for name, x in (("contrast", contrast), ("ref_logps", reference)) if x}
        with beside(self._path(part)) as temporary:
            save_file(values, temporary)

    def joined(self):
        """The rows with *_contrast, and *_ref_logps where there is a reference; all parts must be there."""
        columns: dict[str, list[Tensor | None]] = {}
        for part, batches in enumerate(self.groups):
            members = [i for batch in batches for i in batch]
            for name, flat in load_file(self._path(part)).items():
                values = columns.setdefault(name, [None] * len(self.completions))
                for i, x in zip(members, flat.split([len(self.completions[i]) for i in members])):
                    values[i] = x
        rows, half = self.rows, len(self.prompts)
        for name in ("contrast", "ref_logps"):
            for side, values in (("chosen", columns.get(name, [])[:half]), ("rejected", columns.get(name, [])[half:])):
                if values:
                    rows = rows.add_column(f"{side}_{name}", [x.tolist() for x in values])
        return rows

    def write_reference(self, directory: Path) -> None:
        """Put the hidden states and the head of the reference into the directory of a scored set (`tisdpo.cached`)."""
        where: list[tuple[int, int]] = [(0, 0)] * len(self.completions)
        for part, batches in enumerate(self.groups):
            start = 0
            for i in (i for batch in batches for i in batch):
                where[i] = (part, start)
                start += len(self.completions[i])
        write_reference(directory, head_of(self.reference), zip(self.prompts * 2, self.completions), where, self.directory)


def _grouped(batches: list[list[int]], lengths: list[int]) -> list[list[list[int]]]:
    """Batches in groups of about PART_TOKENS tokens."""
    groups, tokens = [], PART_TOKENS
    for batch in batches:
        if tokens >= PART_TOKENS:
            groups.append([])
            tokens = 0
        groups[-1].append(batch)
        tokens += sum(lengths[i] for i in batch)
    return groups
