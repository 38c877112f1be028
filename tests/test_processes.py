"""Two processes are one: losses, gradients, parameters and metrics at the same global batch, under DDP and FSDP2; what is refused."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="half of the cases run on TRL")
pytest.importorskip("peft", reason="two of the cases train LoRA")

import processes_cases as cases
import tiny

from tisdpo.batches import TokenBatches, first_sequences, flatten_batch
from tisdpo.data import PairCollator
from tisdpo.errors import InputError
from tisdpo.processes import REPEATED, GlobalBatches, check_parallelism, check_whole_weights

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes found, all cases in one launch, for a start costs more than a case."""
    out = tmp_path_factory.mktemp("processes") / "found"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(ROOT / "tests/processes_cases.py"),
    ]
    done = subprocess.run([*command, str(out)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(f"{out}.{rank}", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one():
    found = {}

    def run(name):
        if name not in found:
            found[name] = cases.run(cases.CASES[name])
        return found[name]

    return run


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", cases.CASES)
def test_two_processes_are_one(name, kind, two, one, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    alone = one(name)
    assert len({entry["loss"] for entry in alone["logged"] if "loss" in entry}) > 1 and "eval_loss" in alone["logged"][-2]
    for found in (rank[kind][name] for rank in two):
        assert found["policy"] == {"ddp": "DistributedDataParallel", "fsdp2": "FSDP2"}[kind]  # accelerate falls back without a word
        assert found["reference"] in ("NoneType", {"ddp": alone["reference"], "fsdp2": "FSDP2"}[kind], "DistributedDataParallel")
        assert len(found["logged"]) == len(alone["logged"])
        for ours, theirs in zip(found["logged"], alone["logged"]):
            ours, theirs = ({k: v for k, v in entry.items() if k != "epoch"} for entry in (ours, theirs))  # counts batches, not pairs
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        assert found["parameters"].keys() == alone["parameters"].keys()
        for parameter, value in alone["parameters"].items():
            torch.testing.assert_close(found["parameters"][parameter], value, rtol=1e-5, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("layout", ["head apart", "root"])
@pytest.mark.parametrize("tied", ["untied", "tied"])
def test_a_freed_head_is_gathered_forward_and_backward(tied, layout, two):
    for rank in two:
        expected, found = (rank["freed heads"][f"{tied}, {x}"] for x in ("whole", layout))
        torch.testing.assert_close(found["loss"], expected["loss"])
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


# What is refused


def test_a_head_split_over_the_vocabulary_is_refused(two):
    for rank in two:
        assert "tensor-parallel heads are not supported" in rank["split vocabulary"]


@pytest.mark.parametrize("rank, expected", [(0, 3), (1, 0)])
def test_rows_repeated_at_the_end_of_a_resumed_epoch_count_nothing(rank, expected):
    """accelerate does not tell how many there are when it skips batches (remainder -1): 11 rows, batches of 4 on two processes."""

    class Trainer(GlobalBatches):
        train_dataset, _train_batch_size = range(11), 4
        args = SimpleNamespace(dataloader_drop_last=False, accelerator_config=SimpleNamespace(split_batches=False))

        def _rows(self, batch):
            return len(batch["rows"])

        def _first(self, batch, rows):
            return {"rows": batch["rows"][:rows]}

    trainer = Trainer()
    for remainder in (3, -1):
        state = SimpleNamespace(end_of_dataloader=True, remainder=remainder)
        trainer.accelerator = SimpleNamespace(gradient_state=state, process_index=rank, num_processes=2)
        left = trainer._unrepeated({"rows": [1, 2, 3, 4]}, remainder=trainer._remainder())
        assert (0 if REPEATED in left else len(left["rows"])) == expected


def test_batches_move_without_a_cast():
    """DeepSpeed has `Trainer` cast every number to the format of the weights: log-probs and token weights are float32."""
    trainer = type("T", (GlobalBatches,), {"args": SimpleNamespace(device="cpu")})()
    assert trainer._prepare_input(torch.tensor([0.1])).dtype == torch.float32


def test_a_head_on_another_device_than_the_tokens_is_refused(monkeypatch):
    """As device_map places it: there is one device here, so what is told of the head is made up."""
    accelerator, model = SimpleNamespace(parallelism_config=None), tiny.model()
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 1, "lm_head": 0}
    check_parallelism(model, accelerator)
    head = SimpleNamespace(weight=torch.empty(3, 2, device="meta"))
    monkeypatch.setattr(model, "get_output_embeddings", lambda: head)
    with pytest.raises(InputError, match=r"embeddings are on cpu and its head on meta \(device_map"):
        check_parallelism(model, accelerator)


def test_tensor_and_context_parallel_training_is_refused():
    accelerator = SimpleNamespace(parallelism_config=None)
    model = tiny.model()
    check_parallelism(model, accelerator)
    model._tp_size = 2
    with pytest.raises(InputError, match="split over 2 processes by tensor or context parallelism"):
        check_parallelism(model, accelerator)
    with pytest.raises(InputError, match="split over 4 processes"):
        check_parallelism(tiny.model(), SimpleNamespace(parallelism_config=SimpleNamespace(non_data_parallel_size=4)))


def test_weights_that_are_elsewhere_before_training_are_refused(monkeypatch):
    check_whole_weights(SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2)))
    with pytest.raises(InputError, match="DeepSpeed ZeRO-3 splits at loading; use ZeRO-2 or FSDP2"):
        check_whole_weights(SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3)))
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    check_whole_weights(SimpleNamespace())  # without FSDP it says nothing
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="fsdp_cpu_ram_efficient_loading leaves all processes but one without weights"):
        check_whole_weights(SimpleNamespace())


# Parts


@pytest.mark.parametrize("flat", [False, True])
def test_the_first_sequences_of_a_batch(flat):
    rows = [
        dict(row, chosen_weights=[1.5] * len(row["chosen_ids"]), rejected_weights=[0.5] * len(row["rejected_ids"])) for row in tiny.rows(24)
    ]
    collate = PairCollator(0, flat=flat)
    batch, expected = collate(rows[:4]), flatten_batch(collate(rows[:2]))
    total = len(flatten_batch(batch).target)
    cut = first_sequences({**batch, "ref_hidden": torch.arange(total)[:, None]}, 4)
    for found, wanted in zip(flatten_batch(cut)[1:4], expected[1:4]):
        assert torch.equal(found, wanted)
    assert cut["ref_hidden"].flatten().tolist() == list(range(len(expected.target)))


@pytest.mark.parametrize("count", [1, 4, 5, 6])
def test_repeated_token_batches_are_known(count):
    for world in (1, 2, 3):
        ranks = [TokenBatches([(10,)] * count, 10, rank=r, world=world) for r in range(world)]
        seen = set()
        for step, batches in enumerate(zip(*ranks)):
            for sampler, batch in zip(ranks, batches):
                assert (tuple(batch) in seen) == (step == len(sampler) - 1 and sampler.ends_repeated)
                seen.add(tuple(batch))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_are_accelerates(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}[path.stem]
    assert config.distributed_type == kind and config.num_processes == 2
    assert f"accelerate launch --config_file examples/accelerate/{path.name} " in path.read_text()
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2 and config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])


def test_all_four_configurations_are_there():
    assert [path.stem for path in CONFIGS] == ["ddp", "fsdp2", "zero2", "zero3"]
