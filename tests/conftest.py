"""Environment of all tests, independent of the machine, shell or job that pytest runs in.

Tests run on a CPU, in processes that they start themselves. Inside a Slurm job, under MPI, on a
machine with GPUs or with threads configured for training, the programs under test would behave
differently. The environment is set before torch is imported, and inherited by all processes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.timeouts import TIMEOUT

LAUNCHERS = ("SLURM_", "SBATCH_", "PBS_", "OMPI_", "PMI", "MPI_", "MASTER_", "TORCHELASTIC_")
SERVICES = ("WANDB_", "NCCL_", "GLOO_")
RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MEGATRON_LLMJP_LAUNCHER")
THREADS = "TEST_THREADS"
"""Variable with the threads per process, which tests vary (:mod:`tests.support.tolerances`)."""

for name in list(os.environ):
    if name.startswith((*LAUNCHERS, *SERVICES)) or name in RANK or name.endswith("_NUM_THREADS"):
        del os.environ[name]
os.environ |= {
    "OMP_NUM_THREADS": os.environ.get(THREADS, "1"),
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",  # tests do not download; without a network each attempt would time out
}

# Background jobs ignore SIGINT and nohup ignores SIGHUP; child processes would inherit that.
DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
for number, handler in DEFAULTS.items():
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

os.environ.setdefault("PYTEST_TIMEOUT", str(TIMEOUT))  # of a test, for pytest-timeout
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

SLOWEST_FIRST = (
    "slurm/test_pretrain.py",
    "distributed/test_layouts.py",
    "examples/",
    "faults/",
    "parity/",
    "checkpoint/test_resume.py",
    "slurm/",
    "gpu/test_training.py",
    "convert/",
)
"""Files and folders that workers of pytest-xdist run first, so that they end at the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        return next((i for i, p in enumerate(SLOWEST_FIRST) if path.startswith(p)), 100)

    items.sort(key=place)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed torch before the fixtures of each test: weights do not depend on earlier tests."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def torch_stays_as_it_is() -> Iterator[None]:
    """Refuse tests that replace ``torch.cuda`` in pytest's process: later ones would use the CPU.

    The replacement cannot be undone; such a test has to run in a process of its own.
    """

    def is_replaced() -> bool:
        module = sys.modules.get("megatron_llmjp.patches.torch_cuda_on_cpu")
        return module is not None and module.is_substituted()

    before = is_replaced()
    yield
    if is_replaced() and not before:
        pytest.fail("this test replaced torch.cuda in pytest's process; run it in its own")
