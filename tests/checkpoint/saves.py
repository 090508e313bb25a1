"""The two-rank program of ``test_saver.py``: saves that succeed, fail and succeed again."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIMIT = 20_000
"""File-size limit in bytes, smaller than every rank's tensors."""


def save_on_rank(folder: str, words: list[str], port: str) -> dict[str, Any]:
    """Save in all modes; return what was printed and the folder's contents after each save."""
    import torch

    from megatron_llmjp.checkpoint import sharded_state
    from megatron_llmjp.checkpoint.save import RunDescription, SaveProgress
    from megatron_llmjp.checkpoint.saver import FoldEnds, SaveError, Saver
    from megatron_llmjp.checkpoint.sharded_state import RunState
    from megatron_llmjp.config.flags import parse
    from megatron_llmjp.config.loading import replace_fields
    from megatron_llmjp.data.batch_size import BatchSizeSchedule
    from megatron_llmjp.errors import UserError
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import Ranks
    from megatron_llmjp.run import resolve_run
    from megatron_llmjp.training import run_setup
    from megatron_llmjp.training.optimizer import LearningRateSchedule

    device = setup()
    rank, world = int(os.environ["RANK"]), 2
    run = resolve_run(parse(words)[0], world)
    process_groups.initialize(run.config, Ranks(rank, world, 0, "127.0.0.1", port, "test"), device)
    rates = LearningRateSchedule(
        run.config, run.schedule, BatchSizeSchedule(run.config), run.train_iters
    )
    model = run_setup.setup_model_and_optimizer(run, device, rates)
    state = RunState(model.chunks, model.optimizer, model.scheduler, {"counter": [1]})
    parameter = next(model.chunks[0].parameters())
    told: dict[str, Any] = {}

    def saver(root: Path, **fields: Any) -> Saver:
        config = replace_fields(run.config, save=str(root), **fields)
        return Saver(RunDescription(config), FoldEnds((), frozenset({2})), lambda: None, 0)

    def attempt(name: str, saves: Saver, iteration: int, obstacle: Any = None) -> None:
        with printed() as text:
            with obstacle or contextlib.nullcontext():
                saves.save(state, SaveProgress(iteration, 4 * iteration))
            before = sorted(p.name for p in Path(saves._root).glob("iter_*"))
            with torch.no_grad():
                parameter.add_(1.0)  # training continues; its updates must not reach the checkpoint
            saves.wait()
        told[name] = {"text": text.getvalue(), "before": before, **listing(saves._root)}

    for kind in ("sync", "async"):
        root = Path(folder) / kind
        saves = saver(root, async_save=kind == "async", keep_last=1)
        value = float(parameter.sum())
        attempt(f"{kind} good", saves, 1)
        if rank == 0:  # rank 0 removes leftovers
            (root / ".iter_0000009.tmp").mkdir()  # leftover of a killed run
        with file_size_limit():
            attempt(f"{kind} limited", saves, 2)
        with contextlib.suppress(SaveError):
            saves.close()
            told[f"{kind} limited"]["closed"] = True
        with torch.no_grad():
            parameter.fill_(0.0)
        counters = sharded_state.load_checkpoint(root / "iter_0000001", state)
        told[f"{kind} value"] = [value, float(parameter.sum()), counters]
        if rank == 0:
            torch.save(dict(model.chunks[0].module.named_parameters()), root.with_suffix(".pt"))
        attempt(f"{kind} again", saves, 2)
        attempt(f"{kind} third", saves, 3)
        attempt(f"{kind} fourth", saves, 4)
        attempt(f"{kind} read-only", saves, 5, unprivileged())
        saves.save(state, SaveProgress(5, 20))
        saves.close()

    for name in ("common.pt", ".metadata"):
        damage = Path(folder) / "sync" / "iter_0000005" / name
        whole = damage.read_bytes()
        torch.distributed.barrier()
        if rank == 0:
            damage.write_bytes(b"\0" * len(whole))
        torch.distributed.barrier()
        try:
            sharded_state.load_checkpoint(damage.parent, state)
        except UserError as error:
            told[f"damaged {name}"] = str(error)
        torch.distributed.barrier()
    told["threads"] = [t.name for t in threading.enumerate() if t.name == "checkpoint"]
    process_groups.destroy()
    return told


def listing(root: Path) -> dict[str, Any]:
    """Return the names in a save folder and the content of its tracker."""
    tracker = root / "latest_checkpointed_iteration.txt"
    names = sorted(p.name for p in root.iterdir() if "iter_" in p.name)
    names = [name for name in names if not name.endswith(".removed.tmp")]  # being deleted
    return {"names": names, "tracker": tracker.read_text().strip()}


@contextlib.contextmanager
def printed() -> Iterator[io.StringIO]:
    """Capture standard output and standard error."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        yield text


@contextlib.contextmanager
def file_size_limit() -> Iterator[None]:
    """Limit the file size to :data:`LIMIT`, like a quota or a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Run as user ``nobody``, who cannot write to the folder."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
