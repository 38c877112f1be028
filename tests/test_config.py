"""The run configuration: what is read, what wins, and what every mistake says."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from tisdpo.config import ContrastConfig, DataConfig, ModelConfig, RunConfig, StageConfig, describe, dump, load_config, to_dict
from tisdpo.errors import InputError
from tisdpo.losses import Objective
from tisdpo.prompts import PROMPTS
from tisdpo.settings import build, with_overrides
from tisdpo.synthetic import WorldConfig
from tisdpo.weighting import Weighting

MINIMAL = """
name: small
data: {source: synthetic}
model: {pretrain: {steps: 10, learning_rate: 1e-3}}
contrast:
  sft: {steps: 5, learning_rate: 1e-3}
  dpo: {steps: 5, learning_rate: 1e-3, beta: 0.5}
train: {steps: 6, learning_rate: 1.0e-4}
"""
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))


@pytest.fixture
def file(tmp_path):
    def write(text=MINIMAL):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def load(file, *overrides, text=MINIMAL):
    return load_config(file(text), overrides)


# What is read


def test_minimal_file_has_the_documented_defaults(file):
    config = load(file)
    assert config.data.source == "synthetic" and config.data.heldout == 0.1 and config.data.limit is None
    assert config.model.pretrain == StageConfig(steps=10, learning_rate=1e-3)
    assert config.contrast.constructions == ["P", "S", "D"] and config.contrast.dpo.beta == 0.5
    assert config.methods == ["dpo", "random", "P", "S", "D"]
    assert config.weighting == Weighting() and config.objective == Objective()
    assert config.output_dir == "runs/small" and config.seed_list == [0]


def test_the_same_configuration_can_be_made_in_python(file):
    stage = {"learning_rate": 1e-3}
    made = RunConfig(
        name="small",
        data=DataConfig(source="synthetic"),
        model=ModelConfig(pretrain=StageConfig(steps=10, **stage)),
        contrast=ContrastConfig(sft=StageConfig(steps=5, **stage), dpo=load(file).contrast.dpo),
        train=StageConfig(steps=6, learning_rate=1e-4),
    )
    assert made == load(file)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_valid(path):
    assert load_config(path).methods


@pytest.mark.parametrize(("seeds", "expected"), [("3", [0, 1, 2]), ("[7, 2]", [7, 2]), ("1", [0])])
def test_seeds_are_a_count_or_a_list(file, seeds, expected):
    assert load(file, f"seeds={seeds}").seed_list == expected


@pytest.mark.parametrize("written", ["1e-3", "1E-3", '"1e-3"', "0.001", "1.0e-03", ".1e-2"])
def test_a_number_may_be_written_in_any_way(file, written):
    assert load(file, f"train.learning_rate={written}").train.learning_rate == 1e-3
    assert load(file, text=MINIMAL.replace("1.0e-4", written)).train.learning_rate == 1e-3


def test_exponents_are_numbers_also_where_the_type_is_open(file):
    arguments = load(file, "train.arguments.adam_epsilon=1e-9").train.arguments
    assert arguments == {"adam_epsilon": 1e-9} and isinstance(arguments["adam_epsilon"], float)


def test_heldout_keeps_its_kind(file):
    assert isinstance(load(file, "data.heldout=5").data.heldout, int)
    assert isinstance(load(file, "data.heldout=0.5").data.heldout, float)


# What wins


def test_the_command_line_wins_and_leaves_the_rest(file):
    config = load(file, "train.steps=3", "contrast.dpo.beta=2", "name=other")
    assert (config.train.steps, config.train.learning_rate) == (3, 1e-4)
    assert (config.contrast.dpo.beta, config.contrast.dpo.steps) == (2.0, 5)
    assert config.output_dir == "runs/other"


def test_the_last_of_two_overrides_wins(file):
    assert load(file, "train.steps=3", "train.steps=4").train.steps == 4


def test_a_section_on_the_command_line_is_merged(file):
    assert load(file, "train={steps: 2, batch_size: 8}").train == StageConfig(steps=2, batch_size=8, learning_rate=1e-4)


def test_an_override_may_make_a_section(file):
    text = MINIMAL.replace("  sft: {steps: 5, learning_rate: 1e-3}\n", "")
    assert load(file, "contrast.sft={steps: 2, learning_rate: 1}", text=text).contrast.sft.steps == 2


def test_overrides_do_not_change_what_they_are_laid_over():
    values = {"a": {"b": 1, "c": 2}}
    assert with_overrides(values, ["a.b=3"]) == ({"a": {"b": 3, "c": 2}}, {"a.b"})
    assert values == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize("preset", ["paper", "official-code", "dpo", "tdpo1", "tdpo2"])
def test_a_preset_is_where_weighting_and_objective_start(file, preset):
    config = load(file, f"preset={preset}", "objective.beta=0.3", "weighting.k=2")
    assert config.objective == Objective.preset(preset, beta=0.3)
    assert config.weighting == Weighting.preset(preset, k=2.0)
    made = dataclasses.replace(config, objective=None, weighting=None)
    assert made.objective == Objective.preset(preset) and made.weighting == Weighting.preset(preset)


def test_a_field_of_the_file_overrides_the_preset(file):
    text = MINIMAL + "preset: tdpo2\nobjective: {alpha: 0.25}\n"
    assert load(file, text=text).objective == Objective.preset("tdpo2", alpha=0.25)


# Writing and reading back


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["seeds=[4, 2]", "data.heldout=7", "data.world={flip: 0.1, sentences: [1, 2]}"],
        ["preset=tdpo2", "objective.alpha=0.7", "weighting.lower=-.inf"],
        ["preset=official-code", "weighting.eos_weight=null"],
        ["train.arguments={gradient_accumulation_steps: 2, optim: sgd}", "train.scheduler=cosine", "train.learning_rate=3.3e-7"],
        ['description="äöü: 1e-3, \\"quoted\\"\\nsecond line"', "name='1e-3'", "contrast.positive_prompt='yes'"],
    ],
    ids=["minimal", "lists", "preset", "null over preset", "arguments", "texts"],
)
def test_dump_reads_back_as_the_same(file, tmp_path, overrides):
    config = load(file, *overrides)
    dump(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config
    assert [p.name for p in tmp_path.iterdir() if "writing" in p.name] == []


def test_a_dumped_file_is_complete_and_plain(file, tmp_path):
    config = load(file)
    dump(config, tmp_path / "resolved.yaml")
    assert yaml.safe_load((tmp_path / "resolved.yaml").read_text()) == to_dict(config)
    assert set(to_dict(config)) == {f.name for f in dataclasses.fields(RunConfig)}
    assert to_dict(config)["weighting"]["upper"] == 1.5 and to_dict(config)["output_dir"] == "runs/small"


def test_tuples_become_lists(file):
    config = load(file)
    config = dataclasses.replace(config, data=DataConfig(source="synthetic", world={"sentences": (1, 2)}))
    assert to_dict(config)["data"]["world"] == {"sentences": [1, 2]}


def test_a_run_directory_is_a_configuration_and_its_own_place(file, tmp_path):
    (tmp_path / "moved").mkdir()
    config = load(file, "output_dir=elsewhere")
    dump(config, tmp_path / "moved" / "config.yaml")
    assert load_config(tmp_path / "moved") == dataclasses.replace(config, output_dir=str(tmp_path / "moved"))
    assert load_config(tmp_path / "moved", ["output_dir=x"]).output_dir == "x"


# Mistakes: (override, the whole message without its place, or the start of it)

UNKNOWN = {
    "train.stepz=1": "unknown key train.stepz; did you mean train.steps?",
    "contrast.dpo.learning-rate=1": "unknown key contrast.dpo.learning-rate; did you mean contrast.dpo.learning_rate?",
    "trian.steps=1": "unknown key trian; did you mean train?",
    "steps=1": "unknown key steps; did you mean model.pretrain.steps or contrast.sft.steps or contrast.dpo.steps or "
    "contrast.model.pretrain.steps or train.steps?",
    "train.beta=1": "unknown key train.beta; did you mean contrast.dpo.beta or objective.beta?",
    "weighting.uper=1": "unknown key weighting.uper; did you mean weighting.upper?",
    "xyzzy=1": "unknown key xyzzy; known there: name, description,",
    "train.arguments.bf61=true": "train.arguments.bf61 is unknown to transformers.TrainingArguments; did you mean bf16?",
}
TYPES = {
    "train.steps=1.5": "train.steps must be a whole number, got 1.5",
    "train.steps=true": "train.steps must be a whole number, got true",
    "train.steps=": "train.steps must be a whole number, got null",
    "train.learning_rate=fast": "train.learning_rate must be a number, got 'fast'",
    "train.learning_rate=.nan": "train.learning_rate must be a number, got nan",
    "train.learning_rate=true": "train.learning_rate must be a number, got true",
    "data.streaming=1": "data.streaming must be true or false, got 1",
    "name=2024": "name must be text, got 2024; text that looks like something else needs quotes",
    "description=dear: all": "description must be text, got {'dear': 'all'}; text that looks like",
    "data.limit=many": "data.limit must be a whole number or null, got 'many'",
    "data.world=3": "data.world must be a section of 'key: value' lines, got 3",
    "seeds=[0, a]": "seeds must be a whole number or a list, [a, b, ...], each a whole number, got [0, 'a']",
    "methods=dpo": "methods must be a list, [a, b, ...], each text, got 'dpo'",
    "contrast.task=rude": "contrast.task must be one of harmless, helpful, summary, got 'rude'",
    "contrast.constructions=[X]": "contrast.constructions must be a list, [a, b, ...], each one of P, S, D, R, got ['X']",
    "train=fast": "train must be a section of 'key: value' lines, got 'fast'",
    "train.steps.x=1": "train.steps must be a whole number, got {'x': 1}",
}
RANGES = {
    "train.steps=0": "train.steps must be at least 1, got 0",
    "train.batch_size=0": "train.batch_size must be at least 1, got 0",
    "train.learning_rate=0": "train.learning_rate must be positive and finite, got 0.0",
    "train.learning_rate=.inf": "train.learning_rate must be positive and finite, got inf",
    "train.warmup_steps=7": "train.warmup_steps=7 would end after the last of steps=6; lower it",
    "train.max_grad_norm=-1": "train.max_grad_norm must be at least 0, got -1.0",
    "train.scheduler=cosin": "train.scheduler must be one of linear, cosine,",
    "train.arguments.padding_free=true": "train.arguments.padding_free is set by the run itself; use padding_free",
    "train={steps: 6, learning_rate: 1, batch_size: 4, tokens_per_batch: 2000}": "train.batch_size=4 has no effect with tokens_per_batch",
    "train.tokens_per_batch=1023": "train.tokens_per_batch=1023 cannot hold every row of data.max_length=512; give at least 1024, or lower",
    "contrast.sft.tokens_per_batch=511": "contrast.sft.tokens_per_batch=511 cannot hold every row of data.max_length=512; give at least",
    "train.arguments.max_steps=3": "train.arguments.max_steps is set by the run itself; use steps",
    "contrast.dpo.beta=0": "contrast.dpo.beta must be positive and finite, got 0.0",
    "contrast.dpo=null": "contrast.dpo is missing: construction D needs its steps and learning_rate",
    "contrast.sft=null": "contrast.sft is missing: construction S needs its steps and learning_rate",
    "contrast.constructions=[S, S]": "contrast.constructions has S more than once; remove one",
    "contrast.positive_prompt=''": "contrast.positive_prompt and negative_prompt must not be empty",
    "contrast={positive_prompt: a, negative_prompt: a}": "contrast.positive_prompt and negative_prompt are the same",
    "data.limit=0": "data.limit must be at least 1, got 0",
    "data.heldout=1.0": "data.heldout must be a whole number of pairs or a share between 0 and 1, got 1.0",
    "data.heldout=0": "data.heldout must be a whole number of pairs or a share between 0 and 1, got 0",
    "data.max_length=1": "data.max_length must be at least 2, got 1",
    "data.streaming=true": "data.streaming has no effect with source: synthetic; remove it",
    "data.split=test": "data.split has no effect with source: synthetic; remove it",
    "model.vocab_size=500": "data.source=synthetic brings its own tokenizer and corpus; leave model.path, model.tokenizer and model.vocab",
    "contrast.model={vocab_size: 500, pretrain: {steps: 1, learning_rate: 1}}": "contrast.model.vocab_size has no effect: its tokens are",
    "contrast.model={tokenizer: x, pretrain: {steps: 1, learning_rate: 1}}": "contrast.model.tokenizer has no effect: its tokens are",
    "data.world.seed=3": "data.world.seed is the seed of the run; set seeds instead",
    "data={source: x.jsonl, world: {flip: 0.1}}": "data.world has no effect with source='x.jsonl'",
    "data.source=''": "data.source must name a file, a directory, a hub id or a world (synthetic or arithmetic), got ''",
    "model.heads=3": "model.hidden_size=64 must be a multiple of 2 * heads=6",
    "model.vocab_size=100": "model.vocab_size must be at least 300, got 100",
    "model.pretrain=null": "model.pretrain is missing: without model.path the base model is trained from scratch",
    "model.path=gpt2": "data.source=synthetic brings its own tokenizer and corpus",
    "preset=papre": "preset must be one of paper, official-code, dpo, tdpo1, tdpo2, got 'papre'",
    "preset=[paper]": "preset must be text or null, got ['paper']",
    "weighting.transform=expo": "weighting.transform must be one of exp, rank,",
    "weighting.lower=2": "weighting.lower must be below upper, got lower=2.0, upper=1.5",
    "objective.beta=-1": "objective.beta must be positive, got -1.0",
    "objective={loss: ipo, label_smoothing: 0.1}": "objective.label_smoothing has no effect with loss='ipo'",
    "seeds=0": "seeds must be a number of at least 1 or a list of seeds of at least 0, got 0",
    "seeds=[]": "seeds must be a number of at least 1 or a list of seeds of at least 0, got []",
    "seeds=[1, 1]": "seeds has 1 more than once; remove one",
    "name=a/b": "name must be a plain name without a path, got 'a/b'; directories go into output_dir",
    "methods=[]": "methods is empty; name at least one of dpo, random,",
    "methods=[dpo, dop]": "methods has 'dop', which is none of",
    "methods=[R]": "methods has R, but contrast.constructions (P, S, D) does not; add it there or leave it out here",
    "evaluation.prompts=0": "evaluation.prompts must be at least 1, got 0",
    "evaluation.temperature=-1": "evaluation.temperature must be at least 0, got -1.0",
}


@pytest.mark.parametrize(("override", "message"), [*UNKNOWN.items(), *TYPES.items(), *RANGES.items()], ids=lambda x: x.split("=")[0][:40])
def test_a_mistake_on_the_command_line(file, override, message):
    with pytest.raises(InputError) as error:
        load(file, override)
    assert str(error.value).startswith(f"command line: {message}"), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 6", "stepz: 6", "unknown key train.stepz; did you mean train.steps?"),
        ("steps: 6", "steps: six", "train.steps must be a whole number, got 'six'"),
        ("steps: 6", "steps: 0", "train.steps must be at least 1, got 0"),
        ("steps: 6, ", "", "train.steps is missing; it is: optimiser steps"),
        ("train: {steps: 6, learning_rate: 1.0e-4}", "", "train.steps is missing; it is: optimiser steps"),
        ("{source: synthetic}", "", "data.source is missing; it is: 'synthetic' or 'arithmetic'"),
        ("{source: synthetic}", "{source: }", "data.source must be text, got null"),
        ("name: small", "methods: [truth]\ndata: {source: x.jsonl}", None),
    ],
)
def test_a_mistake_in_the_file(file, old, new, message):
    path = file(MINIMAL.replace(old, new))
    with pytest.raises(InputError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: {message}" if message else f"{path}, line ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; examples/demo.yaml shows what belongs into it"),
        ("# nothing\n", "is empty; examples/demo.yaml shows what belongs into it"),
        ("- a\n- b\n", "must hold 'key: value' lines, got ['a', 'b']"),
        ("name: a\ntrain: {steps: 1\n", "line 3, column 1, is not valid YAML"),
        ("name: a\nname: b\n", "line 2, column 1, is not valid YAML: the key 'name' stands twice in one section"),
        ("train: {steps: 1, steps: 2}", "line 1, column 19, is not valid YAML: the key 'steps' stands twice in one section"),
        ("a: !!python/object:x.y {}", "is not valid YAML: could not determine a constructor"),
    ],
)
def test_files_that_are_no_configuration(file, text, message):
    path = file(text)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load_config(path)
    assert str(error.value).startswith(str(path))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*nope.yaml; give the path of a YAML file"):
        load_config(tmp_path / "nope.yaml")


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"x.yaml cannot be read as a text file"):
        load_config(tmp_path / "x.yaml")


@pytest.mark.parametrize("override", ["train.steps", "=3", ".steps=3", "train..steps=3", "train.=3"])
def test_what_is_no_override(file, override):
    with pytest.raises(InputError, match=f"command line: {re.escape(repr(override))} is no setting; write key=value"):
        load(file, override)


def test_an_override_that_is_not_yaml(file):
    with pytest.raises(InputError, match=r"command line: the value of description is not valid YAML .*; put text in quotes"):
        load(file, "description=a: b: c")


@pytest.mark.parametrize("method", ["truth", "oracle"])
def test_truth_needs_a_known_truth(file, method):
    with pytest.raises(
        InputError, match=rf"methods has {method}, but the true rewards are known with data.source=synthetic or arithmetic only"
    ):
        load(file, "data.source=x.jsonl", f"methods=[dpo, {method}]")


def test_swapped_needs_a_construction(file):
    with pytest.raises(InputError, match=r"methods has swapped, .* but contrast.constructions is empty; add one"):
        load(file, "contrast.constructions=[]", "methods=[swapped]")


def test_a_run_without_constructions_needs_no_contrastive_models(file):
    config = load(file, "contrast={constructions: [], sft: null, dpo: null}", "methods=[dpo]")
    assert config.contrast.sft is None and config.contrast.dpo is None


def test_errors_of_values_made_in_python_have_no_place():
    with pytest.raises(InputError, match=r"^steps must be at least 1, got 0$"):
        StageConfig(steps=0, learning_rate=1.0)


# Other dataclasses, help, prompts


def test_build_serves_any_dataclass():
    assert build(WorldConfig, {"sentences": [1, 3], "flip": "1e-1"}) == WorldConfig(sentences=(1, 3), flip=0.1)
    with pytest.raises(InputError, match=r"^unknown key data.world.flop; did you mean data.world.flip\?$"):
        build(WorldConfig, {"flop": 1}, place="data.world")
    with pytest.raises(InputError, match=r"^data.world.sentences must be a list of 2, each a whole number, got \[1, 2, 3\]$"):
        build(WorldConfig, {"sentences": [1, 2, 3]}, place="data.world")
    with pytest.raises(InputError, match=r"^run.yaml: data.world: world: flip=0.9 must lie between"):
        build(WorldConfig, {"flip": 0.9}, place="data.world", file="run.yaml")


def test_help_names_every_key():
    text = describe()
    for kind in (RunConfig, DataConfig, ModelConfig, ContrastConfig, StageConfig, Weighting, Objective):
        for field in dataclasses.fields(kind):
            assert re.search(rf"\b{field.name}\b", text), field.name
    assert "model.pretrain.*, contrast.sft.*, contrast.model.pretrain.*, train.*: " in text
    assert all(len(line) <= 140 for line in text.splitlines())


def test_prompts_of_every_task_are_a_pair():
    assert set(PROMPTS) == {"harmless", "helpful", "summary"}
    for positive, negative in PROMPTS.values():
        assert positive != negative and abs(len(positive.split()) - len(negative.split())) <= 3
