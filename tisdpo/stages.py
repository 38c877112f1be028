"""One training stage of a run: a model, rows and a `StageConfig` in; a trained model in a directory and its log out. Resumable."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from tisdpo.config import StageConfig
from tisdpo.files import remove, write_json
from tisdpo.hf import load_model, save_model
from tisdpo.resume import forget_rows
from tisdpo.trainer import TISDPOConfig, TISDPOTrainer

LOGGED_POINTS = 50  # of a learning curve


class Progress(TrainerCallback):
    """One bar a stage, with the loss and the reward margin; none without a label."""

    def __init__(self, label: str | None):
        self.label = label

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.label, unit="step", disable=self.label is None)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {short: f"{logs[name]:.3f}" for short, name in (("loss", "loss"), ("margin", "rewards/margins")) if name in logs}
        if shown:
            self.bar.set_postfix(shown)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class LogAtCheckpoints(TrainerCallback):
    """Logs before every checkpoint: a mean that is open there would be lost, and a resumed run would log another one."""

    def __init__(self, every: int):
        self.every = every

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            control.should_log = True


class AtCheckpoints(TrainerCallback):
    """Calls `measure(model)` after every `every` steps and keeps its results by step in a file, also across interruptions."""

    def __init__(self, measure: Callable[[torch.nn.Module], dict], every: int, path: Path):
        self.measure, self.every, self.path = measure, every, path

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            points = {p["step"]: p for p in read_points(self.path)}
            points[state.global_step] = {"step": state.global_step, **self.measure(model)}
            write_json(self.path, sorted(points.values(), key=lambda p: p["step"]))


class KeepModels(TrainerCallback):
    """Saves the model at the last `kept` of 2 * kept evenly spaced points of the training, but for the last one: `kept_model(n)`."""

    def __init__(self, tokenizer, kept: int, directory: Path):
        self.tokenizer, self.kept, self.directory = tokenizer, kept, directory

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for number in range(1, self.kept):
            if state.global_step == max(1, round(state.max_steps * (1 - number / (2 * self.kept)))):
                remove(self.directory / kept_model(number))  # of a run that was killed before its end, and began anew
                save_model(model, self.tokenizer, self.directory / kept_model(number))


def kept_model(number: int) -> str:
    """Folder of a model that a stage kept, so many checkpoints before the end."""
    return f"model-{number}" if number else "model"


class StopAt(TrainerCallback):
    """Ends the training after a step, with a checkpoint from which it goes on."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def read_points(path: Path) -> list[dict]:
    """What `AtCheckpoints` kept."""
    return json.loads(path.read_text()) if path.exists() else []


def _state(checkpoint: str | Path) -> dict:
    """What the Trainer wrote of itself into a checkpoint."""
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end (trainer_state.json comes last); newer, half-written ones are removed."""
    numbered = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in numbered:
        try:
            _state(path)
            return str(path)
        except (FileNotFoundError, ValueError):  # killed before the file, or within it
            shutil.rmtree(path)
    return None


def train_stage(
    model,
    tokenizer,
    rows,
    stage: StageConfig,
    directory: Path,
    *,
    label: str | None,
    seed: int,
    options: dict,
    checkpoints: int = 0,
    measure: Callable | None = None,
    kept: int = 1,
    until: int | None = None,
    new_rows: bool = False,
) -> list[dict]:
    """Train `model` on `rows` with `TISDPOConfig(**options)`; writes directory/model, directory/log.json (and points.json).

    With `checkpoints`, the run is measured and saved that many times on its way, and an interrupted one goes on from the last of them.
    `kept` models of its second half are saved, the final one included. `until`, smaller than the number of steps, ends the stage there,
    unfinished: `model` is what it was then, and the next call goes on; with `new_rows` on others than before.
    Returns the log history.
    """
    directory.mkdir(parents=True, exist_ok=True)
    saved = directory / "checkpoints"
    every = max(1, -(-stage.steps // checkpoints)) if checkpoints else stage.steps
    by_rows = {"per_device_train_batch_size": stage.batch_size} if stage.tokens_per_batch is None else {}
    settings = {
        "max_steps": stage.steps,
        **by_rows,
        "tokens_per_batch": stage.tokens_per_batch,
        "padding_free": stage.padding_free,
        "learning_rate": stage.learning_rate,
        "warmup_steps": stage.warmup_steps,
        "lr_scheduler_type": stage.scheduler,
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "logging_steps": max(1, stage.steps // LOGGED_POINTS),
        "save_strategy": "steps" if checkpoints else "no",
        "save_steps": every,
        "save_total_limit": 1,
        "disable_tqdm": True,  # `Progress` shows one line a stage instead
        "dataloader_pin_memory": torch.cuda.is_available(),
        **options,
        **stage.arguments,
    }
    args = TISDPOConfig(output_dir=str(saved), seed=seed, data_seed=seed, **settings)
    callbacks = [Progress(label), *([LogAtCheckpoints(every)] if checkpoints else [])]
    if measure is not None:
        callbacks.append(AtCheckpoints(measure, every, directory / "points.json"))
    if kept > 1:
        callbacks.append(KeepModels(tokenizer, kept, directory))
    unfinished = until is not None and until < stage.steps
    if unfinished:
        callbacks.append(StopAt(until))
    checkpoint = last_complete_checkpoint(saved)
    if unfinished and checkpoint is not None and (state := _state(checkpoint))["global_step"] >= until:
        # killed after it had come so far, and before its caller had the model
        model.load_state_dict(load_model(checkpoint).state_dict())
        history = state["log_history"]
    else:
        trainer = TISDPOTrainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        if new_rows:
            forget_rows(checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)
        history = trainer.state.log_history
    history = [entry for entry in history if "train_runtime" not in entry]  # the Trainer's summary counts from the last resume on
    write_json(directory / "log.json", history)
    if not unfinished:
        save_model(model, tokenizer, directory / "model")  # last: the stage is done when its model is there
    return history
