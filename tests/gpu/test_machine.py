"""The fake GPU machine itself: devices, host waits, errors."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.gpu.machine.library import why_missing
from tests.gpu.machine.process import run_on_machine
from tests.support.forks import ROOT
from tests.support.timeouts import wait_until

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


def devices(machine: Any) -> dict[str, str]:
    import torch

    torch.cuda.set_device(3)
    leaf = torch.ones(4, 4, device="cuda", requires_grad=True)
    (leaf @ leaf).sum().backward()
    with torch.cuda.device(5):
        inner = torch.zeros(1).cuda()
    linear = torch.nn.Linear(2, 2)
    weight = linear.weight
    linear.to("cuda").bfloat16()
    found = {
        "leaf": leaf,
        "gradient": leaf.grad,
        "inner": inner,
        "outer": torch.zeros(1).cuda(),
        "constant": torch.tensor([1.0], device="cuda"),
        "weight": weight,
    }
    assert weight is linear.weight and weight.dtype == torch.bfloat16
    return {name: str(tensor.device) for name, tensor in found.items()}


def test_tensors_without_an_index_are_on_the_current_device():
    assert run_on_machine(devices) == {
        "leaf": "cuda:3",
        "gradient": "cuda:3",
        "inner": "cuda:5",
        "outer": "cuda:3",
        "constant": "cuda:3",
        "weight": "cuda:3",
    }


def add_across_devices(machine: Any) -> None:
    import torch

    torch.ones(2, device="cuda:1") + torch.ones(2, device="cuda:2")


def test_an_operation_across_devices_is_an_error():
    with pytest.raises(AssertionError, match="cuda:1 and cuda:2"):
        run_on_machine(add_across_devices)


def host_waits(machine: Any) -> dict[str, list[str]]:
    """Return the operations that wait, for each expression."""
    import torch

    x, scalar = torch.ones(4, device="cuda"), torch.ones((), device="cuda")
    mask, host = torch.ones(4, device="cuda", dtype=torch.bool), torch.ones(4)
    pinned = host.pin_memory()

    def assign() -> None:
        x[mask] = 0.0

    expressions: dict[str, Callable[[], Any]] = {
        "x.item()": scalar.item,
        "float(x)": lambda: float(scalar),
        "bool(x)": lambda: bool(scalar > 0),
        "x.tolist()": x.tolist,
        "x.cpu()": x.cpu,
        "x.to(cpu, non_blocking)": lambda: x.to("cpu", non_blocking=True),
        "host.cuda()": host.cuda,
        "host.cuda(non_blocking)": lambda: host.cuda(non_blocking=True),
        "pinned.cuda()": pinned.cuda,
        "pinned.cuda(non_blocking)": lambda: pinned.cuda(non_blocking=True),
        "pinned.copy_(x, non_blocking)": lambda: pinned.copy_(x, non_blocking=True),
        "x.nonzero()": x.nonzero,
        "x[mask]": lambda: x[mask],
        "x[mask] = 0": assign,
        "torch.tensor([x, x])": lambda: torch.tensor([scalar, scalar]),
        "torch.tensor(1, device)": lambda: torch.tensor(1.0, device="cuda"),
        "torch.full(1, device)": lambda: torch.full((), 1.0, device="cuda"),
        "torch.equal": lambda: torch.equal(x, x),
        "synchronize": torch.cuda.synchronize,
        "stream.synchronize": torch.cuda.current_stream().synchronize,
        "stream.wait_stream": lambda: torch.cuda.Stream().wait_stream(torch.cuda.current_stream()),
    }
    machine.waits.take()
    found = {}
    for name, expression in expressions.items():
        expression()
        found[name] = [wait.operation for wait in machine.waits.take()]
    return found


def test_host_waits_are_recorded():
    assert run_on_machine(host_waits) == {
        "x.item()": ["item"],
        "float(x)": ["item"],
        "bool(x)": ["item"],
        "x.tolist()": ["tolist"],
        "x.cpu()": ["copy cuda to cpu"],
        "x.to(cpu, non_blocking)": [],
        "host.cuda()": ["copy cpu to cuda"],
        "host.cuda(non_blocking)": ["copy of pageable memory cpu to cuda"],
        "pinned.cuda()": ["copy cpu to cuda"],
        "pinned.cuda(non_blocking)": [],
        "pinned.copy_(x, non_blocking)": [],
        "x.nonzero()": ["nonzero"],
        "x[mask]": ["boolean index"],
        "x[mask] = 0": [],
        "torch.tensor([x, x])": ["item", "item"],
        "torch.tensor(1, device)": ["copy cpu to cuda"],
        "torch.full(1, device)": [],
        "torch.equal": ["equal"],
        "synchronize": ["torch.cuda.synchronize"],
        "stream.synchronize": ["Stream.synchronize"],
        "stream.wait_stream": [],
    }


def raise_error(machine: Any) -> None:
    raise ValueError("an error on the machine")


def test_errors_are_those_of_the_function():
    with pytest.raises(AssertionError, match="ValueError: an error on the machine"):
        run_on_machine(raise_error)


def never_return(machine: Any, path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    threading.Event().wait()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl(2)")
def test_processes_end_with_the_one_that_started_them(tmp_path: Path):
    file = tmp_path / "pid"
    code = (
        "from tests.gpu.machine.process import run_on_machine; import tests.gpu.test_machine as t"
    )
    command = f"{code}; run_on_machine(t.never_return, {str(file)!r})"
    caller = subprocess.Popen([sys.executable, "-c", command], cwd=ROOT)
    wait_until(lambda: caller.poll() is not None or (file.exists() and file.read_text()))
    assert caller.poll() is None
    hanging = psutil.Process(int(file.read_text()))
    caller.kill()
    caller.wait()
    wait_until(lambda: has_ended(hanging))


def has_ended(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True
