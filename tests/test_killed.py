"""A run that is killed (SIGKILL) at random moments of training, scoring and saving ends with the figures of one that never was."""

import json
import multiprocessing
import os
import random
import shutil
import time

import pytest
from safetensors import safe_open

from tisdpo import pipeline
from tisdpo.config import load_config

SMALL = """
name: killed
threads: 1
data: {source: synthetic, limit: 24, heldout: 8, max_length: 96}
model: {hidden_size: 16, heads: 2, pretrain: {steps: 4, batch_size: 4, learning_rate: 1e-3}}
contrast:
  constructions: [S]
  sft: {steps: 4, batch_size: 4, learning_rate: 1e-3}
train: {steps: 8, batch_size: 4, learning_rate: 1e-3}
methods: [dpo, S]
evaluation: {prompts: 4, max_new_tokens: 8, checkpoints: 4, samples: 1, heatmaps: 1}
"""


def run(directory: str) -> None:
    """What a process does: the whole run, from where it is."""
    path = os.path.join(directory, "killed.yaml")
    pipeline.run(load_config(path, [f"output_dir={directory}/run"]))


def figures(directory) -> dict:
    """All results and learning curves of a run, without the seconds it took."""
    metrics = json.loads((directory / "run" / "metrics.json").read_text())
    curves = {}
    for state in sorted((directory / "run").rglob("trainer_state.json")):
        history = [
            {k: v for k, v in log.items() if "runtime" not in k and "per_second" not in k}
            for log in json.loads(state.read_text())["log_history"]
        ]
        curves[str(state.relative_to(directory))] = history
    return {name: metrics[name] for name in ("results", "frontier", "weights")} | {"curves": curves}


def check_files(directory) -> None:
    """No file is half-written, but in checkpoints that the trainer was saving, which are not used then."""
    for path in (directory / "run").rglob("*"):
        if any(part.startswith(("checkpoint-", "tmp")) or ".writing" in part for part in path.relative_to(directory).parts):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as content:
                assert list(content.keys())


def kill_and_resume(tmp_path, kills: int, seed: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tisdpo.pipeline", "tisdpo.trainer", "tisdpo.report"])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        directory.mkdir()
        (directory / "killed.yaml").write_text(SMALL)

    def process(function, *arguments):
        started = context.Process(target=function, args=arguments)
        started.start()
        return started

    process(str).join()  # the server has imported everything
    begin = time.monotonic()
    first = process(run, str(whole))
    first.join(300)
    duration = time.monotonic() - begin
    assert first.exitcode == 0
    draw, done, finished = random.Random(seed), 0, 0
    while done < kills or not finished:
        victim = process(run, str(killed))
        victim.join(draw.uniform(0.05, 0.7) * duration if done < kills else 300)
        if victim.is_alive():
            victim.kill()  # which may have ended by itself meanwhile
            done += 1
            victim.join(60)
            check_files(killed)
            continue
        assert victim.exitcode == 0
        check_files(killed)
        assert figures(killed) == figures(whole)
        assert not [p for p in (killed / "run").rglob("*") if p.name.endswith((".parts", ".writing"))]
        finished += 1
        shutil.rmtree(killed / "run")


@pytest.mark.slow
def test_killed_three_times(tmp_path):
    kill_and_resume(tmp_path, 3, seed=1)


@pytest.mark.long
def test_killed_twenty_times(tmp_path):
    kill_and_resume(tmp_path, 20, seed=2)
