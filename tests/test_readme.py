"""The code in README.md and docs/usage.md runs as it stands."""

import json
import math
import re
import runpy
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from tisdpo import cli
from tisdpo.hf import save_model
from tisdpo.scored import make_provenance, save_scored

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
PAGE = (README.parent / "docs/usage.md").read_text()
USAGE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """What the examples find of `make demo`: a model, and a scored set of its tokenizer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    save_model(tiny.model(), tiny.tokenizer(), tmp_path / "runs/demo/seed-0/base/model")
    provenance = make_provenance(tiny.tokenizer(), max_length=128, positive="a", negative="b", how={"construction": "S"})
    save_scored(tiny.contrast(tiny.rows(8)), tmp_path / "runs/demo/seed-0/scored/S", provenance)
    return tmp_path


def test_the_loss_functions_example():
    scope = {}
    exec(BLOCKS[0], scope)
    assert scope["hidden"].grad.abs().sum() > 0 and scope["weight"].grad.abs().sum() > 0


def test_the_trainer_example(demo):
    exec(USAGE[3], {})
    shutil.rmtree(demo / "out", ignore_errors=True)


def test_the_loop_of_the_usage_page(demo):
    assert USAGE[0].count("lr=1e-6") == 1
    loss = {}
    for rate in ("0.0", "1e-2"):  # of the second of two steps
        exec(USAGE[0].replace("lr=1e-6", f"lr={rate}"), scope := {})
        loss[rate] = scope["output"].loss.item()
    assert loss["0.0"] == pytest.approx(math.log(2), abs=1e-5) and 0 < loss["1e-2"] < 0.69


def test_the_log_probs_of_the_usage_page():
    exec(USAGE[1], scope := {})
    for name in ("policy_loss", "nll_loss"):
        grads = torch.autograd.grad(scope[name], (scope["hidden"], scope["head"].weight))
        assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads) and (grads[0][0, :3] == 0).all()


def test_lora_as_the_usage_page_has_it(tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="needs the extra peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(cli, "_quiet", lambda debug: None)
    save_model(tiny.model(), tiny.tokenizer(), tmp_path / "my-7b")
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in tiny.pairs(24)[:16]))
    commands = re.findall(r"^tisdpo ((?:plan|score) .*)$", PAGE[: PAGE.index("## Step by step")], flags=re.MULTILINE)
    assert [cli.main(command.split()) for command in commands] == [0, 0]
    exec(USAGE[2], scope := {})
    trainer = scope["trainer"]
    assert trainer.state.log_history[0]["grad_norm"] > 0 and (tmp_path / "out/adapter_model.safetensors").exists()
    moved = [x.abs().max() > 0 for name, x in trainer.model.named_parameters() if "lora_B" in name]  # which begin at 0
    assert moved and all(moved)


def test_the_trl_example_and_the_example_script(demo):
    pytest.importorskip("trl", reason="needs the extra trl")
    exec(BLOCKS[1], {})
    script = runpy.run_path(str(README.parent / "examples/trl_tisdpo.py"))
    script["main"]("runs/demo/seed-0/base/model", "runs/demo/seed-0/scored/S", "out-of-the-script")
    assert (demo / "out-of-the-script/model.safetensors").exists()


def test_every_command_of_the_pages_is_one_that_exists():
    from tisdpo.cli import _parser

    names = set(_parser()._subparsers._group_actions[0].choices)
    for page in (README.read_text(), PAGE):
        found = set(re.findall(r"^tisdpo (\w+)", page, flags=re.MULTILINE))
        assert found and found <= names


def test_links_between_pages_lead_somewhere():
    root, found = README.parent, 0
    pages = [README, *root.glob("docs/*.md"), *root.glob("benchmarks/*.md")]

    def anchors(page: Path) -> set[str]:
        titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not re.match(r"\w+:", link):
                name, _, anchor = link.partition("#")
                target = (page.parent / name) if name else page
                assert target.exists(), f"{page.name}: {link}"
                assert not anchor or anchor in anchors(target), f"{page.name}: {link}"
                found += 1
    assert found > 50
