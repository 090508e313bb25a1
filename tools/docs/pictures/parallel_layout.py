"""Parallel layout of a run: the GPUs of all nodes by pipeline stage, and the groups of one rank."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_llmjp.estimate.layout import ParallelLayout, make_layout
from tools.docs.pictures.plans import config
from tools.docs.pictures.svg import DARK, FILLS, GREY, Picture

PRESET, WORLD_SIZE, NODE = "llm-jp-13b-v2.0", 128, 8
CELL, GAP, TOP, LEFT, RIGHT = 34.0, 14.0, 84.0, 20.0, 196.0
GROUPS = ("#c2185b", "#00695c", "#1a237e")
"""Frames of the tensor-parallel, data-parallel and pipeline-parallel group of rank 0."""


def groups_of_rank_0(layout: ParallelLayout) -> tuple[list[int], list[int], list[int]]:
    """Return the tensor-parallel, data-parallel and pipeline-parallel group of rank 0."""
    return (
        [layout.rank(tp, 0, 0, 0) for tp in range(layout.tp)],
        [layout.rank(0, 0, dp, 0) for dp in range(layout.dp)],
        [layout.rank(0, 0, 0, pp) for pp in range(layout.pp)],
    )


def draw() -> str:
    """Return the picture: one row of nodes per pipeline stage."""
    layout = make_layout(config(f"--config {PRESET}"), WORLD_SIZE)
    per_stage = WORLD_SIZE // layout.pp // NODE
    width = LEFT + per_stage * (4 * CELL + GAP) + RIGHT
    row = 2 * CELL + 40
    sizes = f"TP {layout.tp} x PP {layout.pp} x DP {layout.dp}"
    title = f"{PRESET}: {WORLD_SIZE} GPUs, {sizes}"
    picture = Picture(width, TOP + layout.pp * row + 70, f"Parallel layout of {title}")
    picture.text(LEFT, 26, title, size=16, bold=True)
    layers = sum(chunk.layers for stage in layout.stages for chunk in stage)
    texts = (
        f"Each box is a node of {NODE} GPUs with their ranks; each row is a pipeline stage, which "
        f"has {layout.stages[0][0].layers} of {layers} layers.",
        "Pairs of neighbours divide the matrices of a layer; a replica has one pair in each row. "
        f"{layout.micro_batches} micro-batches per replica and step.",
    )
    for index, text in enumerate(texts):
        picture.text(LEFT, 48 + 17 * index, text, fill=GREY)
    for rank in range(WORLD_SIZE):
        _draw_gpu(picture, layout, rank, row)
    for stage in range(layout.pp):
        _label_stage(picture, layout, stage, width - RIGHT + 4, TOP + stage * row)
    for ranks, stroke, inset in zip(groups_of_rank_0(layout), GROUPS, (1.5, 5.0, 8.5), strict=True):
        for rank in ranks:
            x, y = _place(layout, rank, row)
            size = CELL - 2 * inset
            picture.rect(x + inset, y + inset, size, size, "none", stroke, 2.5)
    names = ("tensor-parallel", "data-parallel", "pipeline-parallel")
    _draw_legend(picture, zip(names, groups_of_rank_0(layout), GROUPS, strict=True))
    return picture.render()


def _place(layout: ParallelLayout, rank: int, row: float) -> tuple[float, float]:
    """Return the upper left corner of a rank's GPU."""
    stage, within = divmod(rank, WORLD_SIZE // layout.pp)
    node, local = divmod(within, NODE)
    x = LEFT + node * (4 * CELL + GAP) + local % 4 * CELL
    return x, TOP + stage * row + 18 + local // 4 * CELL


def _draw_gpu(picture: Picture, layout: ParallelLayout, rank: int, row: float) -> None:
    x, y = _place(layout, rank, row)
    stage = rank // (WORLD_SIZE // layout.pp)
    if rank % NODE == 0:
        picture.text(x, y - 5, f"node {rank // NODE}", 11, fill=GREY)
        picture.rect(x - 3, y - 1, 4 * CELL + 6, 2 * CELL + 4, "white", GREY, 1.2)
    picture.rect(x + 1.5, y + 1.5, CELL - 3, CELL - 3, FILLS[stage], "white")
    picture.text(x + CELL / 2, y + CELL / 2 + 4, str(rank), 10, "middle")


def _label_stage(picture: Picture, layout: ParallelLayout, stage: int, x: float, y: float) -> None:
    chunk = layout.stages[stage][0]
    parts = [f"layers {chunk.first_layer} to {chunk.first_layer + chunk.layers - 1}"]
    parts = ["embedding"] * chunk.embedding + parts + ["final norm, output layer"] * chunk.output
    picture.text(x, y + 34, f"stage {stage}", 14, bold=True)
    for index, part in enumerate(parts):
        picture.text(x, y + 52 + 15 * index, part, fill=DARK)


def _draw_legend(picture: Picture, groups: Iterable[tuple[str, list[int], str]]) -> None:
    for index, (name, ranks, stroke) in enumerate(groups):
        x, y = LEFT, picture.height - 52 + 19 * index
        shown = ", ".join(map(str, ranks if len(ranks) <= 4 else [*ranks[:3], "..."]))
        shown += f", {ranks[-1]}" if len(ranks) > 4 else ""
        picture.rect(x, y - 11, 12, 12, "none", stroke, 2.5)
        picture.text(x + 20, y, f"{name} group of rank 0: ranks {shown}")
