"""Copies to host memory that run while training continues, on streams that are simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from megatron_llmjp.checkpoint import host_copy
from megatron_llmjp.checkpoint.host_copy import HostBuffers
from tests.support.datasets import write_folds
from tests.support.processes import run_ranks
from tests.support.training import DISTRIBUTED, Job, arguments


class Event:
    """An event that is complete once its stream has reached it."""

    def __init__(self, device: Device) -> None:
        self.device, self.done = device, False

    def record(self, stream: Stream) -> None:
        self.done = False
        stream.submit(lambda: setattr(self, "done", True))

    def synchronize(self) -> None:
        self.device.run(lambda: self.done)


class Stream:
    """Work that has been submitted, each with the event that it waits for."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.work: list[tuple[Callable[[], object], Event | None]] = []
        device.streams.append(self)

    def submit(self, action: Callable[[], object], after: Event | None = None) -> None:
        self.work.append((action, after))

    def wait_event(self, event: Event) -> None:
        self.submit(lambda: None, event)

    def wait_stream(self, other: Stream) -> None:
        event = Event(self.device)
        event.record(other)
        self.wait_event(event)


class Device:
    """Runs the work of its streams in the order of ``priority``, as far as events allow."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.current = self.main = Stream(self)
        self.newest_first = False

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        previous, self.current = self.current, stream
        yield
        self.current = previous

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        while not until():
            order = self.streams[::-1] if self.newest_first else self.streams
            ready = [s for s in order if s.work and (s.work[0][1] is None or s.work[0][1].done)]
            if not ready:
                assert not any(stream.work for stream in self.streams), "deadlock"
                return
            ready[0].work.pop(0)[0]()


class Buffer:
    """Host memory that a copy is submitted to."""

    def __init__(self, device: Device, tensor: torch.Tensor) -> None:
        self.device, self.value = device, torch.full_like(tensor, torch.nan)
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def copy_(self, source: torch.Tensor, non_blocking: bool) -> None:
        assert non_blocking
        self.device.current.submit(lambda: self.value.copy_(source))


@pytest.fixture(params=["main first", "copies first"])
def device(monkeypatch, request):
    device = Device()
    device.newest_first = request.param == "copies first"
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(device))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: device.current)
    monkeypatch.setattr(torch.cuda, "stream", device.stream)
    monkeypatch.setattr(host_copy, "_empty_on_host", lambda tensor: Buffer(device, tensor))
    return device


def copy_amid_updates(device: Device, saves: int, hold: bool) -> list[float]:
    """Return what reaches the host when a weight is updated after each save."""
    weight, host, found = torch.zeros(3), HostBuffers(), []
    for number in range(saves):
        device.main.submit(lambda value=number: weight.fill_(value))
        with host.copying():
            buffer = host.copy(("a", 0), weight)
        assert device.main.work  # nothing has waited
        if hold:
            host.hold_device()
        device.main.submit(lambda: weight.fill_(-1.0))
        host.wait()
        device.run()
        found.append(float(buffer.value.mean()))
    return found


def test_the_update_waits_for_the_copies(device):
    assert copy_amid_updates(device, 3, hold=True) == [0.0, 1.0, 2.0]


def test_without_waiting_the_update_overtakes_them(device):
    found = copy_amid_updates(device, 2, hold=False)
    assert found == ([0.0, 1.0] if device.newest_first else [-1.0, -1.0])


def test_no_copy_yet(device):
    host = HostBuffers()
    host.hold_device()
    host.wait()
    assert not device.main.work


def train_and_record(job: dict, folder: str) -> list[str]:
    """Return the updates, and the calls that let them wait, of a run."""
    from megatron_llmjp.checkpoint.saver import Saver
    from megatron_llmjp.patches.fused_adamw import FusedAdamW
    from tests.support.training import train_on_rank

    found: list[str] = []
    hold, step = Saver.hold_update, FusedAdamW.step

    def held(self):
        found.append("hold")
        hold(self)

    def stepped(self):
        found.append("update")
        step(self)

    Saver.hold_update, FusedAdamW.step = held, stepped
    train_on_rank([job], folder)
    return found


def test_each_update_of_a_run_waits(tmp_path):
    flags = ("--save-interval", 1, "--async-save", *DISTRIBUTED)
    words = arguments("laptop-llama", write_folds(tmp_path, (3,)), *flags)
    found = run_ranks(train_and_record, 1, vars(Job("run", (0, 1), tuple(words))), str(tmp_path))
    assert found[0] == ["hold", "update"] * 3
