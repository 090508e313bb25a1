"""The parts of the program, most important first, and how each is started."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.gpu.results import Context


@dataclass(frozen=True)
class Part:
    """One measurement, which runs in a process of its own."""

    name: str
    title: str
    seconds: float
    """Time limit."""
    function: str
    """``module:function`` in this package, called with a :class:`Context`."""
    arguments: tuple[str, ...] = ()
    """Further arguments of the function."""
    alongside: str = ""
    """Part that runs at the same time, on the CPU."""
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, context: Context) -> None:
        """Run the part in this process."""
        module, _, name = self.function.partition(":")
        function: Callable[..., None] = getattr(
            importlib.import_module(f"benchmarks.gpu.{module}"), name
        )
        function(context, *self.arguments)


COMPILE_IN_PARALLEL = {"TORCHINDUCTOR_COMPILE_THREADS": str(min(16, os.cpu_count() or 1))}
"""More than this project's one thread, for the layers of transformers."""

PARTS = (
    Part("machine", "Machine", 60, "machine:measure"),
    Part("step-1.8b", "Step of llm-jp-3-1.8b", 130, "step:measure", ("llm-jp-3-1.8b",)),
    Part(
        "curves",
        "Losses on the GPU and on the CPU",
        130,
        "curves:measure",
        alongside="references",
        # Transformer Engine multiplies fp32 matrices in TF32 otherwise.
        environment={"NVIDIA_TF32_OVERRIDE": "0"},
    ),
    Part("step-1.3b", "Step of llm-jp-1.3b-v1.0", 100, "step:measure", ("llm-jp-1.3b-v1.0",)),
    Part("resume", "Resume in deterministic mode", 90, "resume:measure"),
    Part(
        "compare-1.8b",
        "llm-jp-3-1.8b and transformers",
        120,
        "compare:measure",
        ("llm-jp-3-1.8b",),
        environment=COMPILE_IN_PARALLEL,
    ),
    Part("save", "Saves", 100, "saves:measure"),
    Part(
        "compare-1.3b",
        "llm-jp-1.3b-v1.0 and transformers",
        100,
        "compare:measure",
        ("llm-jp-1.3b-v1.0",),
        environment=COMPILE_IN_PARALLEL,
    ),
    Part(
        "step-1.8b-te",
        "Step of llm-jp-3-1.8b with Transformer Engine",
        130,
        "step:measure",
        ("llm-jp-3-1.8b", "TE"),
    ),
    Part(
        "step-1.3b-te",
        "Step of llm-jp-1.3b-v1.0 with Transformer Engine",
        100,
        "step:measure",
        ("llm-jp-1.3b-v1.0", "TE"),
    ),
)

COMPANIONS = (Part("references", "References on the CPU", 0, "curves:train_references"),)
"""Parts that run alongside another one and end with it."""


def find_part(name: str) -> Part:
    """Return a part or companion by name."""
    return next(part for part in (*PARTS, *COMPANIONS) if part.name == name)
