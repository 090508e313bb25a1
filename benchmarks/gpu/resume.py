"""Part ``resume``: with ``--deterministic-mode`` an interrupted run equals an uninterrupted one."""

from __future__ import annotations

import traceback

from benchmarks.gpu import runs
from benchmarks.gpu.results import Context
from benchmarks.gpu.scale import ARCHITECTURES
from megatron_llmjp.errors import EXIT_REQUEUE


def measure(context: Context) -> None:
    """Compare the losses of both runs bit by bit, for each architecture, in bf16 with dropout."""
    rows: list[dict[str, object]] = []
    for layers in runs.installed_layers(context):
        for architecture in context.scale.architectures:
            row: dict[str, object] = {"architecture": architecture, "layers": layers}
            rows.append(row)
            try:
                row |= _compare(context, architecture, layers)
            except Exception as error:
                traceback.print_exc()
                row["bit-exact"] = f"failed: {type(error).__name__}: {error}"[:300]
            context.results.add("resume", row)
    if different := [row for row in rows if row["bit-exact"] != "yes"]:
        raise RuntimeError(f"{len(different)} of {len(rows)} runs were not bit-exact")


def _compare(context: Context, architecture: str, layers: str) -> dict[str, object]:
    steps = context.scale.resume_steps
    folder = context.work / f"resume_{architecture}_{layers}"
    words = runs.run_flags(
        context,
        ARCHITECTURES[architecture],
        *context.scale.small_model,
        *("--hidden-dropout", "0.1", "--attention-dropout", "0.1", "--num-workers", "0"),
        *("--bf16", "--deterministic-mode", "--train-iters", str(steps)),
        *runs.layer_flags(layers),
        tokens=16_000 * steps,
    )
    stopped = [*words, "--save", str(folder / "stopped")]
    # The uninterrupted run is between the two halves: no state of the process passes from the
    # first half to the second.
    assert runs.train([*stopped, "--exit-interval", str(steps // 2)]) == EXIT_REQUEUE
    assert runs.train([*words, "--save", str(folder / "whole")]) == 0
    assert runs.train(stopped) == 0
    whole, resumed = (runs.losses(folder / name) for name in ("whole", "stopped"))
    different = [i + 1 for i, (a, b) in enumerate(zip(whole, resumed, strict=True)) if a != b]
    return {
        "steps": steps,
        "resumed after": steps // 2,
        "last loss": whole[-1],
        "bit-exact": "yes" if not different else f"NO, from step {different[0]}",
    }
