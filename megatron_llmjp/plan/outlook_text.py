"""A run on paper as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_llmjp.numbers import human
from megatron_llmjp.plan.communication import Communication
from megatron_llmjp.plan.flops import flops_per_sample
from megatron_llmjp.plan.layout import Chunk, Layout
from megatron_llmjp.plan.memory import Memory
from megatron_llmjp.plan.outlook import RESERVE, Outlook
from megatron_llmjp.plan.parameters import count_parameters

ANCHORS = {
    "llm-jp-3-172b": "about 2,000 steps a day on 512 H100 (llm-jp/scripts), 34 % MFU",
    "llm-jp-13b-v1.0": "87,870 steps for the ten folds of 13b-v1.0, on 96 A100 40 GB",
    "llm-jp-1.3b-v1.0": "87,430 steps for the ten folds of 1.3b-v1.0, on 96 A100 40 GB",
}
"""Published figures of the models that presets are named for."""


def show(outlook: Outlook, mfu: float, name: str | None = None) -> str:
    """The whole report, without warnings."""
    parts = [
        _head(outlook),
        picture(outlook.layout, outlook.machine.per_node, outlook.parameters),
        _memory(outlook),
        _traffic(outlook),
        _time(outlook, mfu),
    ]
    if name in ANCHORS:
        parts.append(f"published: {ANCHORS[name]}")
    return "\n\n".join(parts)


def _head(outlook: Outlook) -> str:
    layout, counts = outlook.layout, count_parameters(outlook.config)
    return (
        f"{layout.world_size} {outlook.machine.name}: {shape(layout)}, "
        f"{layout.micro_batches} micro-batches of {outlook.config.training.micro_batch_size} per "
        f"replica and step\n"
        f"{counts.total:,} parameters, {counts.non_embedding:,} without embeddings; "
        f"{outlook.config.rows:,} rows"
    )


def shape(layout: Layout) -> str:
    """``TP 4 x PP 16 x DP 8``."""
    parts = [f"TP {layout.tp}", f"PP {layout.pp}"]
    parts += [f"VP {layout.vp}"] if layout.vp > 1 else []
    parts += [f"CP {layout.cp}"] if layout.cp > 1 else []
    return " x ".join([*parts, f"DP {layout.dp}"])


def picture(layout: Layout, per_node: int, parameters: Sequence[int]) -> str:
    """Which node holds which part: a line per pipeline stage, and the GPUs of its first node."""
    rows = [("stage", "ranks", "nodes", "layers", "parameters", "first node, GPU by GPU")]
    for stage, chunks in enumerate(layout.stages):
        first = layout.rank(0, 0, 0, stage)
        last = layout.rank(layout.tp - 1, layout.cp - 1, layout.dp - 1, stage)
        nodes = _range(first // per_node, last // per_node)
        layers = " ".join(map(_chunk, chunks))
        gpus = _gpus(layout, first // per_node * per_node, per_node)
        rows.append(
            (str(stage), _range(first, last), nodes, layers, f"{parameters[stage]:,}", gpus)
        )
    text = table(rows, right=(4,))
    notes = "t: tensor rank, d: replica, p: stage; E: embedding, L: output layer and loss"
    if layout.tp * layout.cp > per_node:
        notes += "\na tensor-parallel group spans nodes: its traffic goes over the network"
    return f"{text}\n{notes}"


def _gpus(layout: Layout, first: int, per_node: int) -> str:
    """What the GPUs of a node hold, those of one replica and stage in brackets."""
    groups: dict[tuple[int, int], list[int]] = {}
    for rank in range(first, min(first + per_node, layout.world_size)):
        tensor, rest = rank % layout.tp, rank // (layout.tp * layout.cp)
        groups.setdefault((rest // layout.dp, rest % layout.dp), []).append(tensor)
    cells = [
        f"[p{stage} d{replica} t{_range(tensors[0], tensors[-1])}]"
        for (stage, replica), tensors in groups.items()
    ]
    return " ".join(cells if len(cells) <= 4 else [*cells[:2], "...", cells[-1]])


def _chunk(chunk: Chunk) -> str:
    layers = _range(chunk.first_layer + 1, chunk.first_layer + chunk.layers)
    parts = [*(["E"] if chunk.embedding else []), layers if chunk.layers else ""]
    return "+".join([part for part in [*parts, "L" if chunk.output else ""] if part]) or "-"


def _memory(outlook: Outlook) -> str:
    """Memory by kind of the first, the fullest and the last stage."""
    stages = sorted({0, outlook.worst, outlook.layout.pp - 1})
    kinds = list(Memory.__dataclass_fields__)
    rows = [("memory per GPU", *(f"stage {s}" for s in stages))]
    for kind in kinds:
        rows.append((f"  {kind}", *(_gb(getattr(outlook.memory[s], kind)) for s in stages)))
    rows.append(("  together", *(_gb(outlook.memory[s].total) for s in stages)))
    capacity = outlook.machine.memory
    most = outlook.memory[outlook.worst].total
    verdict = "fits" if outlook.fits else "DOES NOT FIT"
    return (
        f"{table(rows, right=range(1, len(stages) + 1))}\n"
        f"{verdict}: {most / 1e9:.1f} GB and {RESERVE / 1e9:.1f} GB for CUDA and NCCL, of "
        f"{capacity / 1e9:.0f} GB"
    )


def _traffic(outlook: Outlook) -> str:
    stages = sorted({0, outlook.layout.pp // 2, outlook.layout.pp - 1})
    rows = [("sent per GPU and step", *(f"stage {s}" for s in stages))]
    for kind in Communication.__dataclass_fields__:
        sent = [getattr(outlook.traffic[s], kind) for s in stages]
        if any(sent):
            rows.append((f"  {kind}", *map(_gb, sent)))
    return table(rows, right=range(1, len(stages) + 1))


def _time(outlook: Outlook, mfu: float) -> str:
    config, layout = outlook.config, outlook.layout
    batch = config.training.global_batch_size
    tokens = batch * config.data.seq_length
    steps = outlook.steps_per_day
    lines = [
        f"a step: {tokens:,} tokens, {human(flops_per_sample(config) * batch)}FLOP; "
        f"pipeline bubble {layout.bubble:.1%}",
        f"at {mfu:.0%} MFU: {outlook.step_seconds:.2f} s a step, {steps:,.0f} steps and "
        f"{human(steps * tokens)} tokens a day",
    ]
    size, total = outlook.checkpoint_bytes, outlook.train_iters
    if total is None:
        return "\n".join([*lines, f"a checkpoint: {size / 1e9:,.0f} GB"])
    lines.append(
        f"{total:,} steps, {human(total * tokens)} tokens: {total / steps:,.1f} days at that"
    )
    interval = config.checkpoint.save_interval
    count = -(-total // interval) if interval else 1
    every = f"every {interval:,} steps" if interval else "at the end; no --save-interval is given"
    lines.append(
        f"{count:,} checkpoint(s) of {size / 1e9:,.0f} GB, {every}: {count * size / 1e12:,.1f} TB"
    )
    return "\n".join(lines)


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def table(rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """Rows as aligned text; the columns in ``right`` are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
