"""The command line: what every command does, what mistakes end in, and that --help and doctor tell enough."""

import logging
import re
import subprocess
import sys
import types
from importlib import metadata

import pytest
import tiny
import torch

import tisdpo
from tisdpo import cli, doctor
from tisdpo.errors import InputError
from tisdpo.ops import backend

CONFIG = """
data: {source: synthetic}
model: {pretrain: {steps: 10, learning_rate: 1e-3}}
contrast: {constructions: [P]}
methods: [dpo, P]
train: {steps: 6, learning_rate: 1.0e-4}
"""
COMMANDS = ("run", "weights", "train", "eval", "study", "score", "show", "annotate", "agreement", "plan", "doctor")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def calls(monkeypatch):
    """What reaches the pipeline, which is replaced."""
    seen = []
    fake = types.ModuleType("tisdpo.pipeline")
    fake.run = lambda config, until="report": seen.append((until, config)) or f"runs/{config.name}/{until}"
    fake.train_on = lambda config, scored: seen.append((scored, config)) or "runs/on-scored"
    monkeypatch.setitem(sys.modules, "tisdpo.pipeline", fake)
    monkeypatch.setattr(tisdpo, "pipeline", fake, raising=False)
    monkeypatch.setattr(cli, "_quiet", lambda debug: None)
    return seen


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A scored set inside a run, whose tokenizer is that of its base model."""
    from tisdpo.scored import make_provenance, save_scored

    seed = tmp_path_factory.mktemp("run") / "seed-0"
    rows = tiny.contrast(tiny.rows(6))
    provenance = make_provenance(tiny.tokenizer(), max_length=128, positive="a", negative="b", how={"construction": "S"})
    save_scored(rows, seed / "scored" / "S", provenance)
    tiny.tokenizer().save_pretrained(seed / "base" / "model")
    return seed / "scored" / "S"


def fails(capsys, *argv: str) -> str:
    """Run a command that must end with exit code 2; its one sentence."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("tisdpo: ") and err.count("\n") == 1, err
    return err.removeprefix("tisdpo: ").rstrip("\n")


# The pipeline's commands


@pytest.mark.parametrize(("command", "until"), [("run", "report"), ("weights", "weights"), ("train", "train"), ("eval", "eval")])
def test_a_command_goes_up_to_its_stage_and_prints_the_result(calls, config, capsys, command, until):
    assert cli.main([command, config, "train.steps=3", "name=x"]) == 0
    ((stage, seen),) = calls
    assert stage == until and seen.train.steps == 3 and seen.name == "x" and seen.train.learning_rate == 1e-4
    assert capsys.readouterr().out == f"runs/x/{until}\n"


@pytest.mark.parametrize("command", ["run", "weights", "train", "eval"])
def test_a_run_is_one_process_on_one_gpu(calls, config, capsys, monkeypatch, command):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
    monkeypatch.setattr(cli, "_check_backend", lambda: None)
    assert "uses one GPU, and 4 are visible; choose one, as in CUDA_VISIBLE_DEVICES=0" in fails(capsys, command, config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "is one process, and was started 2 times; start it once" in fails(capsys, command, config)
    assert not calls


def test_train_takes_an_existing_scored_set(calls, config, capsys):
    assert cli.main(["train", config, "--scored", "some/set", "train.steps=3"]) == 0
    ((stage, seen),) = calls
    assert stage == "some/set" and seen.train.steps == 3
    assert capsys.readouterr().out == "runs/on-scored\n"


@pytest.mark.parametrize("words", [["name=a", "--debug", "name=b"], ["--debug", "name=a", "name=b"], ["name=a", "name=b", "--debug"]])
def test_settings_may_stand_anywhere_and_the_last_wins(calls, config, words):
    assert cli.main(["run", config, *words]) == 0
    assert calls[0][1].name == "b"


def test_a_run_directory_serves_as_its_own_configuration(calls, config, tmp_path):
    from tisdpo.config import dump, load_config

    (tmp_path / "there").mkdir()
    dump(load_config(config), tmp_path / "there" / "config.yaml")
    assert cli.main(["eval", str(tmp_path / "there")]) == 0
    assert calls[0][1].output_dir == str(tmp_path / "there")


# Mistakes


def test_a_mistake_is_one_sentence_and_exit_code_2(calls, config, capsys):
    assert fails(capsys, "run", "nope.yaml") == "there is no file nope.yaml; give the path of a YAML file, such as examples/demo.yaml"
    assert fails(capsys, "run", config, "trian.steps=1") == "command line: unknown key trian; did you mean train?"
    assert fails(capsys, "eval", config, "objective.beta=-1") == "command line: objective.beta must be positive, got -1.0"
    assert fails(capsys, "weights", config, "contrast.constructions=[]", "methods=[dpo]").startswith("contrast.constructions is empty")
    assert calls == []


@pytest.mark.parametrize("where", ["_doctor", "_parser"])  # in the command, and where the words are read
def test_an_installation_without_dependencies_says_what_it_lacks(where, monkeypatch, capsys):
    def lacks(name):
        def raises(*args):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(cli, where, raises)

    lacks("datasets.arrow")
    assert cli.main(["doctor"]) == 2
    assert "this needs datasets.arrow, which is not installed; in the clone run: pip install -e ." in capsys.readouterr().err
    lacks("something_else")  # a fault of ours, or of a library
    with pytest.raises(ModuleNotFoundError):
        cli.main(["doctor"])


def test_debug_shows_the_traceback(config, capsys):
    assert cli.main(["run", config, "trian.steps=1", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.rstrip().endswith("InputError: command line: unknown key trian; did you mean train?")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (InputError("pair 3 is empty; remove it"), "pair 3 is empty; remove it"),
        (PermissionError(13, "Permission denied", "/runs/x"), "/runs/x: permission denied"),
        (OSError("the hub cannot be reached"), "the hub cannot be reached"),
    ],
)
def test_what_the_pipeline_refuses(calls, config, capsys, monkeypatch, error, sentence):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(tisdpo.pipeline, "run", refuse)
    assert fails(capsys, "run", config) == sentence


def test_a_mistake_of_ours_keeps_its_traceback(calls, config, monkeypatch):
    monkeypatch.setattr(tisdpo.pipeline, "run", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", config])


def test_interruption_says_how_to_go_on(calls, config, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tisdpo.pipeline, "run", interrupt)
    assert cli.main(["run", config]) == 130
    assert capsys.readouterr().err == "\ninterrupted; the same command goes on from here\n"


def test_a_forced_backend_that_cannot_run_is_refused_first(calls, config, capsys, monkeypatch):
    monkeypatch.setenv("TISDPO_BACKEND", "tortch")
    assert re.match(
        r"TISDPO_BACKEND must be one of .* got 'tortch'; unset TISDPO_BACKEND or see `tisdpo doctor`$", fails(capsys, "run", config)
    )
    monkeypatch.setenv("TISDPO_BACKEND", "cpp")
    monkeypatch.setattr(backend, "available", lambda device: {"torch": "", "triton": "", "cpp": "it was not built"})
    assert fails(capsys, "run", config).startswith("TISDPO_BACKEND='cpp' was asked for, but only torch and triton can do this: it was not")
    assert calls == []


def test_run_asks_for_the_report_packages_before_it_starts(calls, config, capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "jinja2" else object())
    assert fails(capsys, "run", config).startswith('the report needs jinja2; run: pip install "tisdpo[report]"')
    assert cli.main(["eval", config]) == 0


@pytest.mark.parametrize(
    "argv",
    [[], ["runn", "x"], ["run"], ["run", "x", "--bogus"], ["run", "x", "--scored", "y"], ["doctor", "a=1"], ["show", "x", "--index", "a"]],
)
def test_wrong_arguments_end_in_usage_and_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: tisdpo") and "error: " in err


# show


def test_show_prints_the_pair_with_its_weights(scored, capsys):
    assert cli.main(["show", str(scored), "--index", "2", "--no-color"]) == 0
    out = capsys.readouterr().out
    row = tiny.rows(6)[2]
    assert out.startswith("prompt    " + tiny.tokenizer().decode(row["prompt_ids"], skip_special_tokens=True).strip()[:20])
    assert "\nchosen " in out and "\nrejected " in out and "\x1b" not in out
    assert tiny.tokenizer().decode(row["chosen_ids"], skip_special_tokens=True).split(".")[0] in re.sub(r"\{.*?\}", "", out)
    # the contrast of tiny.contrast takes 7 values: exp(clamp(-1, ...)) and exp(clamp(1, ...)) are among the weights
    assert "{0.61}" in out and "{2.7}" in out


def test_show_takes_other_weights(scored, capsys):
    assert cli.main(["show", str(scored), "transform=equal", "k=3", "--no-color"]) == 0
    assert set(re.findall(r"\{(.*?)\}", capsys.readouterr().out)) == {"3"}
    assert cli.main(["show", str(scored), "preset=official-code", "--no-color"]) == 0
    weights = {float(w) for w in re.findall(r"\{(.*?)\}", capsys.readouterr().out)}
    assert 0.0 in weights and max(weights) <= 1.3 and min(weights - {0.0}) >= 0.7


def test_show_writes_a_page(scored, tmp_path, capsys):
    page = tmp_path / "pair.html"
    assert cli.main(["show", str(scored), "--html", str(page), "--index", "1"]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    html = page.read_text()
    assert "Token weights (S), row 1" in html and "contrast" in html


def test_show_looks_for_the_tokenizer_that_scored(scored, tmp_path, capsys):
    import shutil

    alone = tmp_path / "a" / "scored" / "S"
    shutil.copytree(scored, alone)
    expected = f"the tokenizer that {alone} was scored with is not in the run around it; name it with --tokenizer"
    assert fails(capsys, "show", str(alone)) == expected
    assert cli.main(["show", str(alone), "--tokenizer", str(scored.parents[1] / "base" / "model")]) == 0
    capsys.readouterr()
    # the base model of a run that has none of its own is named in its configuration
    base = scored.parents[1] / "base" / "model"
    text = CONFIG.replace("synthetic", "pairs.jsonl") + "\nname: x\n"
    (tmp_path / "config.yaml").write_text(text.replace("model: {", f"model: {{path: {base}, "))
    assert cli.main(["show", str(alone)]) == 0


def test_show_refuses_another_tokenizer(scored, tmp_path, capsys):
    from tisdpo.hf import train_bpe

    train_bpe(["some text"], 300).save_pretrained(tmp_path / "bpe")
    said = fails(capsys, "show", str(scored), "--tokenizer", str(tmp_path / "bpe"))
    assert said.startswith(f"--tokenizer {tmp_path / 'bpe'}: {scored} was scored with another tokenizer")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--index", "6"], r"--index 6: .* has rows 0 to 5$"),
        (["--index", "-1"], r"--index -1: .* has rows 0 to 5$"),
        (["uper=1"], r"command line: unknown key uper; did you mean upper\?$"),
        (["lower=2"], r"command line: lower must be below upper, got lower=2.0, upper=1.5$"),
        (["preset=papr"], r"command line: preset must be one of paper, "),
        (["k"], r"command line: 'k' is no setting"),
        (["--tokenizer", "no/such/dir"], r"no tokenizer could be loaded from 'no/such/dir'"),
    ],
)
def test_show_refuses_what_it_does_not_understand(scored, capsys, words, said):
    assert re.match(said, fails(capsys, "show", str(scored), *words))


def test_show_refuses_what_is_no_scored_set(tmp_path, capsys):
    assert fails(capsys, "show", str(tmp_path)).startswith(f"{tmp_path} is no scored set")


# doctor


def test_doctor_tells_versions_devices_backend_and_packages(capsys, monkeypatch):
    monkeypatch.delenv("TISDPO_BACKEND", raising=False)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for words in (
        f"tisdpo          {tisdpo.__version__}",
        f"torch           {metadata.version('torch')}",
        "cores usable",
        "TISDPO_BACKEND  not set",
    ):
        assert words in out, words
    assert re.search(rf"on cpu +{backend.resolve('auto', 'cpu')} \(", out)
    for name, reason in backend.available("cpu").items():
        assert re.search(rf"{name} on cpu +{'cannot run: ' + re.escape(reason) if reason else 'can run'}", out)
    assert re.search(r"bf16 on cpu +heads are (multiplied as they are|widened to float32)", out)
    for extra in doctor.EXTRAS:
        assert re.search(rf"^  {extra} ", out, re.MULTILINE)


LEVELS = [("avx2", "widened to float32 as they are packed"), ("avx512_bf16", "(in pairs, AVX-512 BF16)"), ("amx", "float32 sums (AMX)")]


@pytest.mark.parametrize("level, told", LEVELS)
def test_doctor_says_what_multiplies_bfloat16(monkeypatch, level, told):
    monkeypatch.setattr(doctor.products, "keeps_sums", lambda *a: True)
    monkeypatch.setattr(torch.ops.tisdpo_cpp, "capability", lambda: level, raising=False)  # of any CPU, and without an extension
    assert told in dict(doctor.backends())["bf16 on cpu"]


def test_doctor_says_whether_a_head_has_logits(monkeypatch):
    configs = pytest.importorskip("tisdpo.kernels.configs")
    monkeypatch.setattr(doctor.backend, "available", lambda device: {"torch": "", "triton": "", "cpp": ""})
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    assert "bfloat16 heads without KL have none" in dict(doctor.backends())["logits on cpu"]
    monkeypatch.setattr(configs, "architecture", lambda device: "gfx942")
    assert dict(doctor.backends())["logits on cpu"].endswith("was measured on sm_90, this is gfx942")
    monkeypatch.setattr(doctor.backend, "available", lambda device: {"torch": "", "triton": "not here", "cpp": ""})
    assert "logits on cpu" not in dict(doctor.backends())


def test_doctor_says_what_is_missing_and_how_to_get_it(monkeypatch):
    real = doctor.metadata.version

    def version(name):
        if name in ("matplotlib", "datasets"):
            raise doctor.metadata.PackageNotFoundError(name)
        return "0.1" if name == "transformers" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    packages, optional = dict(doctor.versions()), dict(doctor.optional_packages())
    assert packages["datasets"] == 'missing; run: pip install "datasets>=4.0"'
    assert packages["transformers"].startswith("0.1, but >=")
    assert optional["report"].startswith("matplotlib missing, jinja2 ") and optional["report"].endswith('run: pip install "tisdpo[report]"')


def test_doctor_survives_a_backend_that_cannot_run(capsys, monkeypatch):
    monkeypatch.setenv("TISDPO_BACKEND", "nonsense")
    assert cli.main(["doctor"]) == 0
    assert re.search(r"on cpu +none: TISDPO_BACKEND must be one of .* got 'nonsense'", capsys.readouterr().out)


def test_doctor_says_why_a_backend_runs(monkeypatch):
    monkeypatch.setenv("TISDPO_BACKEND", "torch")
    assert dict(doctor.backends())["on cpu"] == "torch (TISDPO_BACKEND says so)"
    monkeypatch.delenv("TISDPO_BACKEND")
    monkeypatch.setattr(backend, "_fastest", backend._fastest.__wrapped__)
    monkeypatch.setattr(backend, "available", lambda device: {"torch": "", "triton": "no GPU", "cpp": "not built"})
    assert dict(doctor.backends())["on cpu"] == "torch (the only one here)"


# Help and messages


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_is_enough_to_use_it(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    examples = re.findall(rf"^  (?:\w+=\w+ )?tisdpo {command}\b", out, re.MULTILINE)
    assert out.startswith(f"usage: tisdpo {command}") and len(examples) >= 2 and "--debug" in out
    if command in ("run", "weights", "train", "eval"):
        for key in ("learning_rate", "positive_prompt", "mu_rejected", "detach_chosen_kl", "length_bias", "heatmaps"):
            assert re.search(rf"\b{key}\b", out), key


def test_help_names_all_commands(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(re.search(rf"^    {command}\s+\w", out, re.MULTILINE) for command in COMMANDS)


def test_the_program_in_a_process_of_its_own(tmp_path):
    """`python -m tisdpo` and its exit code; --help loads neither transformers nor datasets."""
    done = subprocess.run([sys.executable, "-m", "tisdpo", "run", "nope.yaml"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("tisdpo: there is no file nope.yaml")
    code = """if True:
        import sys
        from tisdpo import cli
        try:
            cli.main(["run", "--help"])
        finally:
            print(sorted({"transformers", "datasets", "matplotlib"} & {m.split(".")[0] for m in sys.modules}), file=sys.stderr)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.strip() == "[]"


@pytest.fixture
def loggers():
    """Levels and handlers as they were."""
    import datasets
    import transformers

    log = logging.getLogger("tisdpo")
    before = (log.level, list(log.handlers), transformers.utils.logging.get_verbosity(), datasets.utils.logging.get_verbosity())
    yield log
    log.setLevel(before[0])
    log.handlers[:] = before[1]
    transformers.utils.logging.set_verbosity(before[2])
    transformers.utils.logging.enable_progress_bar()
    datasets.utils.logging.set_verbosity(before[3])
    datasets.enable_progress_bars()


def test_our_messages_stay_and_those_of_the_libraries_go(loggers, capsys):
    import transformers

    for _ in range(2):  # a second command in one process adds no second handler
        cli._quiet(debug=False)
    logging.getLogger("tisdpo.backend").info("the %s backend runs", "torch")
    transformers.utils.logging.get_logger("transformers.x").warning("something to ignore")
    assert capsys.readouterr().err == "the torch backend runs\n"
