"""What a person sees of the run: one line per interval, a JSONL file and tensorboard events."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from megatron_llmjp.config.load import dump
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.folds import Schedule
from megatron_llmjp.training.evaluate import mean_loss
from megatron_llmjp.training.step import StepResult

METRICS = "metrics.jsonl"


class Metrics:
    """Gathers over an interval and writes on the first rank.

    Losses stay on the device until a line is due: logging is the only place that waits for it.
    """

    def __init__(
        self, config: Config, schedule: Schedule, train_iters: int, writer: Writer | None
    ) -> None:
        self._config = config
        self._schedule = schedule
        self._train_iters = train_iters
        self._writer = writer
        self._loss: torch.Tensor | None = None
        self._steps = self._skipped = 0
        self._since = self._paused_at = time.perf_counter()
        self.last: dict[str, float] = {}

    def add(self, result: StepResult) -> None:
        """Count one step."""
        self._loss = result.loss if self._loss is None else self._loss + result.loss
        self._steps += 1
        self._skipped += not result.updated

    def pause(self) -> None:
        """Leave out of the step time what follows until :meth:`go_on`: a save or a validation."""
        self._paused_at = time.perf_counter()

    def go_on(self) -> None:
        """End a pause."""
        self._since += time.perf_counter() - self._paused_at

    def log(
        self, iteration: int, consumed: int, learning_rate: float, result: StepResult, scale: float
    ) -> None:
        """Write the interval that ends with this iteration; all ranks call it."""
        assert self._loss is not None
        loss = mean_loss(self._loss)
        seconds = (time.perf_counter() - self._since) / self._steps
        batch = self._config.training.global_batch_size
        values = {
            "lm loss": loss,
            "grad norm": result.grad_norm,
            "learning rate": learning_rate,
            "seconds per iteration": seconds,
            "tokens per second": batch * self._config.data.seq_length / seconds,
            "global batch size": batch,
            "loss scale": scale,
            "skipped iterations": self._skipped,
        }
        self.last = {"lm loss": loss, "tokens per second": values["tokens per second"]}
        if self._writer:
            fold = self._schedule.fold_at(consumed - 1)
            part = (consumed - fold.first_sample) / fold.samples
            print(self._line(iteration, consumed, f"{fold.name} {part:.0%}", values), flush=True)
            self._writer.write(iteration, consumed, {**values, "fold progress": part}, fold.name)
        self._loss, self._steps, self._skipped = None, 0, 0
        self._since = time.perf_counter()

    def log_validation(self, iteration: int, consumed: int, losses: dict[str, float]) -> None:
        """Write validation losses."""
        if not self._writer:
            return
        parts = [
            f"{name} loss: {loss:.6E} | {name} PPL: {_perplexity(loss):.6E}"
            for name, loss in losses.items()
        ]
        print(f" validation at iteration {iteration} | {' | '.join(parts)} |", flush=True)
        values = {f"validation/{name}": loss for name, loss in losses.items()}
        self._writer.write(iteration, consumed, values)

    def _line(self, iteration: int, consumed: int, fold: str, values: dict[str, Any]) -> str:
        total = self._train_iters
        left = (total - iteration) * values["seconds per iteration"]
        return (
            f" iteration {iteration:8d}/{total:8d} | consumed samples: {consumed:12d} | "
            f"fold: {fold} | "
            f"elapsed time per iteration (ms): {values['seconds per iteration'] * 1000:.1f} | "
            f"tokens/s: {human(values['tokens per second'])} | "
            f"learning rate: {values['learning rate']:.6E} | "
            f"global batch size: {values['global batch size']:5d} | "
            f"lm loss: {values['lm loss']:.6E} | loss scale: {values['loss scale']:.1f} | "
            f"grad norm: {values['grad norm']:.3f} | "
            f"number of skipped iterations: {values['skipped iterations']:3d} | "
            f"remaining: {duration(left)} |"
        )


class Writer:
    """``metrics.jsonl`` in the save folder, and tensorboard events beside it."""

    def __init__(self, config: Config, iteration: int) -> None:
        save = config.checkpoint.save
        self._file = None
        if save is not None:
            Path(save).mkdir(parents=True, exist_ok=True)
            self._file = (Path(save) / METRICS).open("a", encoding="utf-8")
        self._config = config
        self._iteration = iteration
        self._sequence_length = config.data.seq_length
        self._events: Any = None

    def write(
        self, iteration: int, consumed: int, values: dict[str, float], fold: str | None = None
    ) -> None:
        """Add one record."""
        if self._file:
            record: dict[str, Any] = {"iteration": iteration, "consumed samples": consumed}
            record.update(values)
            if fold is not None:
                record["fold"] = fold
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._file.flush()
        events = self._tensorboard()
        if events:
            for name, value in values.items():
                events.add_scalar(name, value, iteration)
            if "lm loss" in values:
                tokens = consumed * self._sequence_length
                events.add_scalar("lm loss vs tokens", values["lm loss"], tokens)

    def close(self) -> None:
        """Write out what is pending."""
        if self._events:
            self._events.close()
        if self._file:
            self._file.close()

    def _tensorboard(self) -> Any:
        """Opened with the first record: its import is slow and start-up should not be."""
        config = self._config
        folder = config.logging.tensorboard_dir or (
            config.checkpoint.save and str(Path(config.checkpoint.save) / "tensorboard")
        )
        if folder and self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(folder, purge_step=self._iteration + 1)
            self._events.add_text("config", f"```yaml\n{dump(config)}```", self._iteration)
        return self._events


def human(number: float) -> str:
    """A number as people say it: 1234567 -> 1.23M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds as ``1d 02:03:04``."""
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock


def _perplexity(loss: float) -> float:
    return math.exp(min(20.0, loss))
