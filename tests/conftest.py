"""Every test starts from the same seed and from poisoned memory, and never touches a network or a GPU at collection."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # a graph compiled before would call the operators as they were then

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

torch.set_num_threads(1)  # the tensors are tiny, and the suite may run in several processes


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` returns NaN (integers: the largest value), so that a read of memory nobody wrote shows up as a wrong result.

    On a GPU without the promise of deterministic algorithms that comes with it: cuBLAS would have to be told at the start.
    """
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def varlen_calls(monkeypatch):
    """In place of torch's varlen kernel, which needs a GPU, stands what it promises; the windows that it was called with."""
    from families import varlen_by_sdpa

    from tisdpo import attention

    calls = []

    def recorded(*args, **kwargs):
        calls.append(kwargs["window_size"])
        return varlen_by_sdpa(*args, **kwargs)

    monkeypatch.setattr(attention, "kernel", lambda: recorded)
    return calls
