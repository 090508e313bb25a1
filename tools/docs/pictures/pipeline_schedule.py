"""Pipeline schedules over time: 1F1B and the interleaved schedule of megatron-core.

The order of the passes on each stage is megatron-core's; their start times follow from what each
pass waits for, with backward passes twice as long as forward passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

from megatron_llmjp.config.pipeline_layout import pipeline_bubble
from tools.docs.pictures.svg import GREY, Picture

STAGES, MICRO_BATCHES = 4, 8
LEFT, UNIT, ROW = 70.0, 22.0, 30.0
FORWARD = ("#9ecae9", "#cfe5f5")
BACKWARD = ("#ffbf79", "#ffdfbc")
"""Fills of a pass by model chunk."""


@dataclass(frozen=True)
class Pass:
    """Forward or backward pass of one micro-batch through one model chunk."""

    forward: bool
    micro_batch: int
    chunk: int


@dataclass(frozen=True)
class TimedPass(Pass):
    """A pass with its start and end; a forward pass of a whole stage takes 1."""

    start: float
    end: float


def order(stage: int, stages: int, micro_batches: int, chunks: int) -> Iterator[Pass]:
    """Yield the passes of a stage in the order of megatron-core."""
    from megatron.core.pipeline_parallel.schedules import (
        get_pp_rank_microbatches,
        get_schedule_table,
    )

    group = SimpleNamespace(size=lambda: stages, rank=lambda: stage)
    communicator = SimpleNamespace(
        pp_group=group, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None
    )
    total, _, warm_up, _ = get_pp_rank_microbatches(
        micro_batches, chunks, stages, p2p_communicator=communicator
    )
    table = get_schedule_table(micro_batches, chunks, stages)
    forward = [Pass(True, micro_batch, chunk) for micro_batch, chunk in table]
    backward = [Pass(False, micro_batch, chunks - 1 - chunk) for micro_batch, chunk in table]
    yield from forward[:warm_up]
    for index in range(total - warm_up):
        yield forward[warm_up + index]
        yield backward[index]
    yield from backward[total - warm_up :]


def schedule(stages: int, micro_batches: int, chunks: int) -> list[list[TimedPass]]:
    """Return the passes of each stage with their times."""
    waiting = [list(order(stage, stages, micro_batches, chunks)) for stage in range(stages)]
    done: list[list[TimedPass]] = [[] for _ in range(stages)]
    ends: dict[tuple[bool, int, int], float] = {}
    last = stages * chunks - 1
    while any(waiting):
        for stage in range(stages):
            while waiting[stage]:
                step = waiting[stage][0]
                place = step.chunk * stages + stage
                before = (True, step.micro_batch, place - 1)
                if not step.forward:
                    before = (place == last, step.micro_batch, place + (place != last))
                if before not in ends and not (step.forward and place == 0):
                    break
                free = done[stage][-1].end if done[stage] else 0.0
                start = max(free, ends.get(before, 0.0))
                end = start + (1 if step.forward else 2) / chunks
                ends[step.forward, step.micro_batch, place] = end
                done[stage].append(
                    TimedPass(step.forward, step.micro_batch, step.chunk, start, end)
                )
                waiting[stage].pop(0)
    return done


def idle_share(rows: list[list[TimedPass]]) -> float:
    """Return the fraction of the step in which stages wait, of all stages together."""
    length = max(row[-1].end for row in rows)
    busy = sum(step.end - step.start for row in rows for step in row)
    return 1 - busy / (length * len(rows))


def draw() -> str:
    """Return the picture."""
    plans = [
        ("1F1B", 1, schedule(STAGES, MICRO_BATCHES, 1)),
        ("interleaved, 2 model chunks per stage", 2, schedule(STAGES, MICRO_BATCHES, 2)),
    ]
    length = max(row[-1].end for _, _, rows in plans for row in rows)
    picture = Picture(
        LEFT + length * UNIT + 20,
        2 * (STAGES * ROW + 62) + 40,
        f"Pipeline schedules of {STAGES} stages and {MICRO_BATCHES} micro-batches over time: "
        "1F1B and interleaved",
    )
    y = 12.0
    for name, chunks, rows in plans:
        y = _draw_plan(picture, y, name, chunks, rows)
    entries = [("#f1f1f4", "bubble")]
    for number in range(2):
        chunk = " of chunk 2" if number else ""
        entries += [(FORWARD[number], f"forward{chunk}"), (BACKWARD[number], f"backward{chunk}")]
    picture.legend(LEFT, y + 14, entries, 146)
    return picture.render()


def _draw_plan(
    picture: Picture, top: float, name: str, chunks: int, rows: list[list[TimedPass]]
) -> float:
    """Draw one schedule and return the y of its end."""
    share = idle_share(rows)
    formula = pipeline_bubble(STAGES, MICRO_BATCHES, chunks)
    assert abs(share - formula) < 1e-9, (share, formula)
    title = f"{name}: bubble {100 * share:.1f} % of the step"
    picture.text(LEFT, top + 14, title, size=14, bold=True)
    top += 24
    length = max(row[-1].end for row in rows)
    for stage, row in enumerate(rows):
        y = top + stage * ROW
        picture.text(LEFT - 8, y + 18, f"stage {stage}", anchor="end")
        picture.rect(LEFT, y, length * UNIT, ROW - 4, "#f1f1f4")
        for step in row:
            fill = (FORWARD if step.forward else BACKWARD)[step.chunk]
            x, width = LEFT + step.start * UNIT, (step.end - step.start) * UNIT
            picture.rect(x, y, width, ROW - 4, fill, "white", 0.7)
            size = 11 if width > 12 else 8
            picture.text(x + width / 2, y + 17, str(step.micro_batch + 1), size, "middle")
    y = top + STAGES * ROW
    picture.line([(LEFT, y + 2), (LEFT + length * UNIT, y + 2)], GREY)
    end = f"{length:g} x the time of a forward pass of one stage"
    picture.text(LEFT + length * UNIT, y + 16, end, 11, "end", GREY)
    return y + 34
