"""Samples of a run's loss over its whole length, without reading its whole metrics file."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_llmjp.metric_registry import ITERATION, LM_LOSS, METRICS_FILE
from megatron_llmjp.report.history import parse_record

MAX_SAMPLES = 240
SAMPLE_BYTES = 1 << 14
"""Bytes read per sample: several records."""

_STEP = f'"{LM_LOSS.name}":'


def sample_losses(folder: Path, samples: int = MAX_SAMPLES) -> list[tuple[int, float]]:
    """Return iterations and losses at evenly spaced places of the metrics file, in order.

    A short file is read completely. Of repeated iterations, the later records are valid.

    Returns:
        At most ``samples`` points of a long file; empty without losses.
    """
    path = folder / METRICS_FILE
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            if size <= samples * SAMPLE_BYTES:
                stream.seek(0)
                found = _losses(stream.read(size))
            else:
                found = []
                for number in range(samples):
                    # The last sample ends at the end of the file.
                    start = (size - SAMPLE_BYTES) * number // (samples - 1)
                    stream.seek(start)
                    chunk = stream.read(SAMPLE_BYTES)
                    at_start = b"\n" + chunk if number == 0 else chunk
                    points = _losses(at_start[at_start.find(b"\n") + 1 :])
                    found += points[-1:] if number == samples - 1 else points[:1]
    except OSError:
        return []
    valid: list[tuple[int, float]] = []
    for iteration, loss in reversed(found):
        if not valid or iteration < valid[-1][0]:
            valid.append((iteration, loss))
    return valid[::-1]


def _losses(text: bytes) -> list[tuple[int, float]]:
    """Return the losses in complete lines of the file; damaged lines are omitted."""
    found = []
    for line in text[: text.rfind(b"\n") + 1].decode(errors="replace").split("\n"):
        record = parse_record(line) if _STEP in line else None
        loss = record.get(LM_LOSS.name) if record is not None else None
        if record is not None and isinstance(loss, int | float) and math.isfinite(loss):
            found.append((int(record[ITERATION]), float(loss)))
    return found
