"""What a checkpoint was trained on, written into it, and compared when training goes on from there."""

import json
import logging
import math
import os
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from tisdpo.data import ids_fingerprint, token_sums
from tisdpo.errors import InputError
from tisdpo.files import write_json
from tisdpo.weighting import Weighting

log = logging.getLogger("tisdpo")

FILE = "tisdpo_rows.json"


def forget_rows(checkpoint: str | None) -> None:
    """Let training go on from a checkpoint on other rows."""
    if checkpoint is not None:
        (Path(checkpoint) / FILE).unlink(missing_ok=True)


def check_rows_of_checkpoint(checkpoint: str | os.PathLike | bool | None, output_dir: str, rows: dict) -> None:
    """InputError where the checkpoint (True: the last one in output_dir) was trained on other rows or another reference. Numbers may differ
    by 1e-4 of their size, as they do from machine to machine; a checkpoint that says nothing is taken as it is."""
    folder = get_last_checkpoint(output_dir) if checkpoint is True and Path(output_dir).is_dir() else checkpoint or None
    file = Path(folder) / FILE if isinstance(folder, str | os.PathLike) else None
    if file is None or not file.exists():
        return
    before = json.loads(file.read_text())
    different = [name for name in rows if name in before and not _same(before[name], rows[name])]
    if "tokens_per_batch" in different:  # out of memory, perhaps: it goes on, but the batches it has seen are not those of now
        different.remove("tokens_per_batch")
        log.warning(
            "batches were formed by other tokens_per_batch or padding (%s, now %s): pairs of the interrupted epoch may be seen twice, or "
            "not at all",
            before["tokens_per_batch"], rows["tokens_per_batch"],
        )  # fmt: skip
    if "kl" in different:  # with it goes what the reference is
        different = [name for name in different if not name.startswith("reference")]
    if different:
        raise InputError(
            f"{folder} was trained with other {' and '.join(different)}; go on with the same rows, weighting, kl and reference (the model "
            "that training began with, not the checkpoint's), or begin anew in another output_dir"
        )


class RemembersRows:
    """For a `transformers.Trainer`, to stand before it among the bases: its checkpoints say what they were trained on, and going on from
    one with something else is refused (InputError)."""

    _trained_on: dict | None = None

    def _remember_rows(self, kl: str | None, weighting: Weighting | None, reference: str | None, more: dict | None = None) -> None:
        """What checkpoints say of `train_dataset`; nothing of a stream. weighting: None where weights are 1; reference: fingerprint of the
        model, None where the rows bring its log-probs, which `kl` does not use; more: what else checkpoints say."""
        rows = self.train_dataset
        if not isinstance(rows, Dataset):
            return
        self._trained_on = {
            "kl": kl,
            "token ids": ids_fingerprint(rows),
            "weights": token_sums(rows, "weights"),
            "weighting": None if weighting is None else asdict(weighting),
            "reference log-probs": token_sums(rows, "ref_logps") if reference is None else None,
            "reference model": reference,
            **(more or {}),
        }

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self._trained_on is not None and self.is_world_process_zero() and folder.is_dir():
            write_json(folder / FILE, self._trained_on)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint and getattr(self.args, "sync_ref_model", False):
            log.warning("sync_ref_model moves the reference, which checkpoints do not hold: it begins again as it was at the start")
        if self._trained_on is not None:
            check_rows_of_checkpoint(resume_from_checkpoint, self.args.output_dir, self._trained_on)
        return super().train(resume_from_checkpoint, *args, **kwargs)


def _same(x, y) -> bool:
    if isinstance(x, list) and isinstance(y, list):
        return len(x) == len(y) and all(map(_same, x, y))
    if isinstance(x, float) and isinstance(y, float):
        return math.isclose(x, y, rel_tol=1e-4, abs_tol=1e-6)
    return x == y
