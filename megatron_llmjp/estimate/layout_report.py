"""Text of a parallel layout: its sizes, and where each pipeline stage runs."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_llmjp.config.pipeline_layout import ModelChunk
from megatron_llmjp.estimate.layout import ParallelLayout
from megatron_llmjp.formatting import format_table

SHOWN_NODES = 4
"""Nodes of a stage that are printed; of more, the first two and the last."""


def format_layout(layout: ParallelLayout) -> str:
    """Format a layout as ``TP 4 x PP 16 x DP 8``, with experts ``TP 2 x PP 1 x DP 32, EP 8``.

    The expert tensor parallel size is named if it differs from TP.
    """
    parts = [f"TP {layout.tp}", f"PP {layout.pp}"]
    parts += [f"VP {layout.vp}"] if layout.vp > 1 else []
    parts += [f"CP {layout.cp}"] if layout.cp > 1 else []
    text = " x ".join([*parts, f"DP {layout.dp}"])
    text += f", EP {layout.ep}" if layout.ep > 1 else ""
    return text + (f", expert TP {layout.etp}" if layout.etp != layout.tp else "")


def format_rank_placement(layout: ParallelLayout, per_node: int, parameters: Sequence[int]) -> str:
    """Format a table with the layers, parameters, ranks and nodes of each pipeline stage."""
    rows = [("stage", "layers", "parameters", "ranks", "nodes and their replicas")]
    for stage, chunks in enumerate(layout.stages):
        first, last = _ranks(layout, stage)
        layers, nodes = " ".join(map(_chunk, chunks)), _nodes(layout, stage, per_node)
        rows.append((str(stage), layers, f"{parameters[stage]:,}", _range(first, last), nodes))
    group = layout.tp * layout.cp
    kinds = f"TP {layout.tp}" + (f" x CP {layout.cp}" if layout.cp > 1 else "")
    gpus = f"{group} adjacent GPUs ({kinds})" if group > 1 else "1 GPU"
    notes = [f"one replica of a stage uses {gpus}; parameters are per GPU"]
    notes += ["E: embedding, L: output layer and loss"]
    if group > per_node:
        notes += ["tensor-parallel groups span nodes: they communicate over the network"]
    return "\n".join([format_table(rows, right=(2,)), *notes])


def _ranks(layout: ParallelLayout, stage: int) -> tuple[int, int]:
    """Return the first and the last rank of a stage."""
    last = layout.rank(layout.tp - 1, layout.cp - 1, layout.dp - 1, stage)
    return layout.rank(0, 0, 0, stage), last


def _nodes(layout: ParallelLayout, stage: int, per_node: int) -> str:
    """Format ``n0 d0-1  n1 d2-3``: two nodes with two replicas each; ``n0:4-7`` is half a node."""
    first, last = _ranks(layout, stage)
    cells = []
    for node in range(first // per_node, last // per_node + 1):
        start, end = max(first, node * per_node), min(last, (node + 1) * per_node - 1)
        gpus = f":{_range(start % per_node, end % per_node)}" if end - start + 1 < per_node else ""
        replicas = ((rank // (layout.tp * layout.cp)) % layout.dp for rank in (start, end))
        cells.append(f"n{node}{gpus} d{_range(*replicas)}")
    return "  ".join(cells if len(cells) <= SHOWN_NODES else [*cells[:2], "...", cells[-1]])


def _chunk(chunk: ModelChunk) -> str:
    layers = _range(chunk.first_layer + 1, chunk.first_layer + chunk.layers)
    parts = [*(["E"] if chunk.embedding else []), layers if chunk.layers else ""]
    return "+".join([part for part in [*parts, "L" if chunk.output else ""] if part]) or "-"


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
