"""The whole method, start to end: pairs -> base model -> contrastive models -> token weights -> policies -> evaluation -> report.

A run is a directory. Every stage leaves one folder or file that appears complete or not at all, so that an interrupted run goes on
where it was when the same command is given again:

    <output_dir>/config.yaml  metrics.json  report.html
    <output_dir>/seed-0/rows/{train,heldout}  base/  contrastive/<name>/  scored/<construction>/  policy/<method>/
"""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import datasets
import torch
from tqdm.auto import tqdm

from tisdpo import contrastive, evaluate, report, sources
from tisdpo.config import RunConfig, StageConfig, dump, to_dict
from tisdpo.data import load_scored, save_scored
from tisdpo.errors import InputError
from tisdpo.findings import notes
from tisdpo.hf import load_model, load_tokenizer, save_model
from tisdpo.policies import METHOD_LABELS, PolicyRun, train_stage

UNTIL = ("weights", "train", "eval", "report")
