"""Train whatever of a study is missing, then write its results and its report."""

import multiprocessing
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tisdpo.config import RunConfig
from tisdpo.errors import InputError
from tisdpo.hf import quiet_libraries
from tisdpo.settings import write_yaml
from tisdpo.study.config import Study
from tisdpo.study.page import write_page
from tisdpo.study.results import collect, note_wall, write_results
from tisdpo.study.shared import StudyRun, identity


@dataclass(frozen=True)
class Job:
    """One policy: `name` is for people."""

    config: RunConfig
    seed: int
    study: Path
    name: str

    @property
    def run(self) -> StudyRun:
        return StudyRun(self.config, self.seed, self.study)

    @property
    def done(self) -> bool:
        return (self.study / "policies" / identity(self.config, self.seed) / "policy.json").exists()


def run_study(study: Study) -> Path:
    """Run (or go on with) a study; returns its page. What is finished is not done again, whatever else of the file has changed."""
    directory = study.directory
    directory.mkdir(parents=True, exist_ok=True)
    write_yaml(study.settings, directory / "study.yaml")
    train(study)
    results = collect(study)
    write_results(results, directory)
    return write_page(results, directory / "study.html")


def jobs_of(study: Study) -> list[Job]:
    """All policies, each once (two arms may share one), seeds innermost: neighbours rarely wait for the same stage."""
    found = {}
    for (arm, point), config in study.runs.items():
        for seed in study.config.seed_list:
            where = ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in study.point(arm, point).items())
            name = " · ".join(part for part in (arm, where, f"seed {seed}") if part)
            found.setdefault(identity(config, seed), Job(config, seed, study.directory, name))
    return list(found.values())


def train(study: Study) -> None:
    """Every policy that is not there yet, `jobs` at a time; one line on stderr for each."""
    every = jobs_of(study)
    todo = [job for job in every if not job.done]
    if len(todo) < len(every):
        print(f"{len(every) - len(todo)} of {len(every)} policies are there already", file=sys.stderr)
    if not todo:
        return
    start = time.monotonic()
    try:
        for number, (job, metrics) in enumerate(_outcomes(todo, min(study.config.jobs, len(todo))), start=1):
            passed = time.monotonic() - start
            left = passed / number * (len(todo) - number)
            y = "reward" if "reward" in metrics else "accuracy"
            print(
                f"{len(every) - len(todo) + number}/{len(every)}  {job.name}: {y} {metrics[y]:.2f} at {metrics['kl']:.2f} nats"
                f"  ({_minutes(passed)}, {_minutes(left)} left)",
                file=sys.stderr,
                flush=True,
            )
    finally:  # an interruption, too, has taken its time
        note_wall(study.directory, time.monotonic() - start, sum(job.done for job in todo), study.config.jobs)


def _outcomes(jobs: list[Job], workers: int):
    """(job, metrics) as they are finished; in this process where one worker is enough."""
    if workers <= 1:
        for job in jobs:
            with _threads(job.config.threads):
                yield job, job.run.outcome()["metrics"]
        return
    with _pool(workers) as pool:
        futures = {pool.submit(_outcome, job): job for job in jobs}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool as error:
                raise InputError(
                    "a process of the study was killed, perhaps for want of memory; the same command goes on, with jobs=1 in one process"
                ) from error


@contextmanager
def _pool(workers: int):
    """Processes that end at once when this one is interrupted or fails: stages are whole or not there, so nothing is lost but time."""
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends us
    quiet_libraries()


def _outcome(job: Job) -> dict:
    with _threads(job.config.threads):
        return job.run.outcome()["metrics"]


@contextmanager
def _threads(number: int | None):
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
