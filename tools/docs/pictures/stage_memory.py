"""Memory of a GPU on each pipeline stage by kind, from the estimate of a run."""

from __future__ import annotations

from megatron_llmjp.estimate.run_estimate import CUDA_RESERVE
from tools.docs.pictures.plans import estimate
from tools.docs.pictures.svg import FILLS, GREY, Picture

LINE = "--config llm-jp-3-172b --world-size 512"
NAME = "llm-jp-3-172b on 512 H100: memory of a GPU by pipeline stage"
KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
LEFT, TOP, WIDTH, HEIGHT, BAR = 64.0, 66.0, 760.0, 300.0, 32.0
GB = 1e9


def stage_bytes() -> tuple[list[list[float]], float]:
    """Return the gigabytes of each stage by kind, CUDA and NCCL last, and those of the GPU."""
    found = estimate(LINE)
    rows = [
        [*(getattr(memory, kind) / GB for kind in KINDS), CUDA_RESERVE / GB]
        for memory in found.memory
    ]
    return rows, found.gpu.memory / GB


def draw() -> str:
    """Return the picture: one bar per stage."""
    rows, capacity = stage_bytes()
    top = 20 * (int(max(capacity, *map(sum, rows)) / 20) + 1)
    picture = Picture(LEFT + WIDTH + 20, TOP + HEIGHT + 84, NAME)
    picture.text(LEFT, 26, NAME, size=16, bold=True)
    picture.text(LEFT, 46, f"pretrain_gpt {LINE} --estimate", fill=GREY)

    def height(gigabytes: float) -> float:
        return gigabytes / top * HEIGHT

    for value in range(0, top + 1, 20):
        y = TOP + HEIGHT - height(value)
        picture.line([(LEFT, y), (LEFT + WIDTH, y)], "#ddd")
        picture.text(LEFT - 8, y + 4, f"{value} GB", 11, "end", GREY)
    step = WIDTH / len(rows)
    for stage, row in enumerate(rows):
        x, y = LEFT + (stage + 0.5) * step - BAR / 2, TOP + HEIGHT
        for gigabytes, fill in zip(row, FILLS, strict=False):
            y -= height(gigabytes)
            picture.rect(x, y, BAR, height(gigabytes), fill)
        picture.text(x + BAR / 2, y - 5, f"{sum(row):.0f}", 11, "middle")
        picture.text(x + BAR / 2, TOP + HEIGHT + 16, str(stage), 11, "middle")
    y = TOP + HEIGHT - height(capacity)
    picture.line([(LEFT, y), (LEFT + WIDTH, y)], "#b71c1c", 1.5)
    picture.text(LEFT + WIDTH, y - 5, f"GPU: {capacity:.0f} GB", 11, "end", "#b71c1c")
    picture.text(LEFT + WIDTH / 2, TOP + HEIGHT + 34, "pipeline stage", 11, "middle", GREY)
    names = [*KINDS, "CUDA, NCCL"]
    picture.legend(LEFT, TOP + HEIGHT + 62, list(zip(FILLS, names, strict=False)), 112)
    return picture.render()
