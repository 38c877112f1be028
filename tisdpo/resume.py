"""What a checkpoint was trained on, written into it, and compared when training goes on from there."""

import json
import math
import os
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from tisdpo.errors import InputError
from tisdpo.files import write_json

FILE = "tisdpo_rows.json"


class RowsInCheckpoints(TrainerCallback):
    """Writes what the rows are, {name: text, number or list of numbers}, into every checkpoint."""

    def __init__(self, rows: dict):
        self.rows = rows

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_json(folder / FILE, self.rows)


def forget_rows(checkpoint: str | None) -> None:
    """Let training go on from a checkpoint on other rows."""
    if checkpoint is not None:
        (Path(checkpoint) / FILE).unlink(missing_ok=True)


def check_rows_of_checkpoint(checkpoint: str | os.PathLike | bool | None, output_dir: str, rows: dict) -> None:
    """InputError where the checkpoint (True: the last one in output_dir) was trained on other rows. Numbers may differ by 1e-4 of their
    size, as they do from machine to machine; a checkpoint that says nothing is taken as it is."""
    folder = get_last_checkpoint(output_dir) if checkpoint is True and Path(output_dir).is_dir() else checkpoint or None
    file = Path(folder) / FILE if isinstance(folder, str | os.PathLike) else None
    if file is None or not file.exists():
        return
    before = json.loads(file.read_text())
    different = [name for name in {**before, **rows} if not _same(before.get(name), rows.get(name))]
    if different:
        raise InputError(
            f"{folder} was trained on other rows: their {' and '.join(different)} differ; go on with the same rows and weighting, or begin "
            "anew in another output_dir"
        )


def _same(x, y) -> bool:
    if isinstance(x, list) and isinstance(y, list):
        return len(x) == len(y) and all(map(_same, x, y))
    if isinstance(x, float) and isinstance(y, float):
        return math.isclose(x, y, rel_tol=1e-4, abs_tol=1e-6)
    return x == y
