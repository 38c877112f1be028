"""The code in README.md runs as it stands."""

import re
import runpy
import shutil
from pathlib import Path

import pytest
import tiny

from tisdpo.hf import save_model
from tisdpo.scored import make_provenance, save_scored

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_loss_functions_example():
    scope = {}
    exec(BLOCKS[0], scope)
    assert scope["hidden"].grad.abs().sum() > 0 and scope["weight"].grad.abs().sum() > 0


def test_the_trainer_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    save_model(tiny.model(), tiny.tokenizer(), tmp_path / "my-model")
    rows = tiny.contrast(tiny.rows(8))
    provenance = make_provenance(tiny.tokenizer(), max_length=128, positive="a", negative="b", how={"construction": "S"})
    save_scored(rows, tmp_path / "runs/demo/seed-0/scored/S", provenance)
    exec(BLOCKS[1], {})
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_the_trl_example_and_the_example_script(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="needs the extra trl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    save_model(tiny.model(), tiny.tokenizer(), tmp_path / "my-model")
    provenance = make_provenance(tiny.tokenizer(), max_length=128, positive="a", negative="b", how={"construction": "S"})
    save_scored(tiny.contrast(tiny.rows(8)), tmp_path / "runs/demo/seed-0/scored/S", provenance)
    exec(BLOCKS[2], {})
    script = runpy.run_path(str(README.parent / "examples/trl_tisdpo.py"))
    script["main"]("my-model", "runs/demo/seed-0/scored/S", "out-of-the-script")
    assert (tmp_path / "out-of-the-script/model.safetensors").exists()


def test_every_command_of_the_readme_is_one_that_exists():
    from tisdpo.cli import _parser

    names = set(_parser()._subparsers._group_actions[0].choices)
    assert set(re.findall(r"^tisdpo (\w+)", README.read_text(), flags=re.MULTILINE)) <= names
