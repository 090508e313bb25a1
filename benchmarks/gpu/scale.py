"""Sizes of the measurements: ``full`` for a GPU, ``tiny`` to try the program on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

ARCHITECTURES = {"GPT-2": "laptop-gpt2", "LLaMA": "laptop-llama", "GPT-NeoX": "laptop-gpt-neox"}
"""Presets of the small models, by architecture; the LLaMA one has grouped queries."""

SAVE_PRESETS = ("llm-jp-3-1.8b", "llm-jp-3-980m", "llm-jp-3-440m", "llm-jp-3-150m")
"""The first whose checkpoints the disk takes in time is saved."""

Flags = tuple[str, ...]


@dataclass(frozen=True)
class Scale:
    """Sizes and lengths of all parts."""

    name: str
    small_model: Flags
    """Flags of the small models, in addition to :data:`ARCHITECTURES`."""
    architectures: tuple[str, ...]
    """Of the small models."""
    curve_steps: int
    resume_steps: int
    """Even; the run is interrupted in the middle."""
    shrink: Flags
    """Flags that shrink the presets with published sizes; empty to keep the sizes."""
    samples_per_step: int
    """Global batch on one GPU."""
    micro_batch_sizes: tuple[int, ...]
    """To try; the first is measured longest and profiled."""
    measured_steps: int
    """At the first micro-batch size; a third of it at the others."""
    rounds: int
    """Turns of each side of the comparison with transformers, two steps each."""
    compile_backend: str
    """Backend of ``torch.compile`` for transformers' model."""
    save_presets: tuple[str, ...] = SAVE_PRESETS

    @property
    def longest_sample(self) -> int:
        """Most tokens of a sample of the presets with published sizes, for the size of the data."""
        return 32 if self.shrink else 4096


def _small(width: int, length: int) -> Flags:
    return (
        "--num-layers", "4", "--hidden-size", str(width), "--ffn-hidden-size", str(2 * width),
        "--num-attention-heads", "4", "--seq-length", str(length),
        "--max-position-embeddings", str(length), "--vocab-size", "1000",
        "--micro-batch-size", "4", "--global-batch-size", "8",
        "--lr", "1e-3", "--min-lr", "1e-4", "--lr-warmup-iters", "2",
    )  # fmt: skip


FULL = Scale(
    name="full",
    small_model=_small(256, 128),
    architectures=tuple(ARCHITECTURES),
    curve_steps=15,
    resume_steps=12,
    shrink=(),
    samples_per_step=16,
    micro_batch_sizes=(4, 1, 2, 8, 16),
    measured_steps=9,
    rounds=5,
    compile_backend="inductor",
)

TINY = Scale(
    name="tiny",
    small_model=_small(32, 32),
    architectures=("LLaMA",),
    curve_steps=4,
    resume_steps=4,
    shrink=(
        "--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "64",
        "--num-attention-heads", "2", "--seq-length", "32", "--max-position-embeddings", "32",
        "--vocab-size", "200",
    ),
    samples_per_step=2,
    micro_batch_sizes=(2, 1),
    measured_steps=3,
    rounds=1,
    compile_backend="eager",
    save_presets=("llm-jp-3-150m",),
)  # fmt: skip

SCALES = {scale.name: scale for scale in (FULL, TINY)}
