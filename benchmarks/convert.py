"""Benchmark: convert_checkpoint, compared with a plain copy of the same bytes and transformers.

    python benchmarks/convert.py --folder /scratch/benchmark --rounds 3

Each round converts a LLaMA model with random bf16 weights (1.55 B parameters, 3.1 GB) in every
direction without a change of type. Right before and after each conversion a folder in the form of
its output is copied with ``cp -r`` and synced; the ratio is the mean time of the two copies divided
by the time of the conversion, start of Python included. A ratio above 1 is faster than the copy.
Next to it: transformers' ``from_pretrained`` and ``save_pretrained`` of the same model.

All sources are in the page cache; ``--cold`` drops them from it. ``--sharded N`` divides each
conversion among N concurrent tasks with ``--shard``. The folder needs 22 GB.

``--large`` is for models above the memory of the machine, for example 12 B parameters
(``--layers 185 --only "hf to native"``): the source is copied instead, transformers is skipped,
and the folder needs twice the size of the model.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"layers": 22, "hidden": 2304, "heads": 18, "groups": 18, "ffn": 6144, "vocabulary": 32000}
_TP2 = ("--target-tensor-parallel-size", "2")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "hf": ("hf",),
    "native": ("native",),
    "megatron-lm": ("megatron-lm",),
    "megatron-lm torch TP2": ("megatron-lm", "--ckpt-format", "torch", *_TP2),
    "megatron-deepspeed TP2": ("megatron-deepspeed", *_TP2),
}
"""Value of ``--to`` and flags, by the name of the folder."""
DIRECTIONS = {
    f"{source} to {target}": (source, target)
    for source, target in (
        ("hf", "native"),
        ("native", "hf"),
        ("native", "megatron-lm"),
        ("megatron-lm", "native"),
        ("native", "megatron-lm torch TP2"),
        ("megatron-lm torch TP2", "native"),
        ("native", "megatron-deepspeed TP2"),
        ("megatron-deepspeed TP2", "native"),
    )
}
TRANSFORMERS = (
    "import sys, torch, transformers; "
    "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)"
    ".save_pretrained(sys.argv[2])"
)


@dataclass(frozen=True)
class Cost:
    """Wall-clock and processor seconds, and the peak memory of one process in bytes."""

    seconds: float
    cpu: float
    memory: int


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--folder",
        type=Path,
        required=True,
        help="folder on the disk to measure; removed at the end",
    )
    add("--rounds", type=int, default=5)
    add("--layers", type=int, default=SIZES["layers"], help="layers of the model (0.14 GB each)")
    add("--only", action="append", choices=DIRECTIONS, help="measure only these directions")
    add("--cold", action="store_true", help="drop the page cache of the source first")
    add("--large", action="store_true", help="copy the source, skip transformers")
    add("--sharded", type=int, default=0, metavar="N", help="convert with N concurrent tasks")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    try:
        Benchmark(arguments).run()
    finally:
        shutil.rmtree(arguments.folder)


class Benchmark:
    """All measurements."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments, self._folder = arguments, arguments.folder.absolute()
        self._large = arguments.large
        self._costs: dict[str, list[Cost]] = defaultdict(list)
        self._ratios: dict[str, list[float]] = defaultdict(list)

    def run(self) -> None:
        """Create the sources, measure all rounds, and print the table."""
        # In a process of its own: the peak memory of a process includes that of its parent.
        code = (
            "import sys, pathlib, benchmarks.convert as benchmark;"
            "benchmark.write_model(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
        )
        layers = str(self._arguments.layers)
        self._execute([[sys.executable, "-c", code, str(self._folder / "hf"), layers]])
        for source, target in map(DIRECTIONS.__getitem__, self._arguments.only or DIRECTIONS):
            for layout in (source,) if self._large else (source, target):
                self._create(layout)
        for _ in range(self._arguments.rounds):
            for name in self._arguments.only or DIRECTIONS:
                self._measure(name)
            if not self._large:
                self._measure_transformers()
        self._report()

    def _create(self, layout: str) -> None:
        """Create the folder of a layout if it does not exist."""
        if not (self._folder / layout).exists():
            source = "hf" if layout == "native" else "native"
            self._create(source)
            self._execute([self._command(source, layout, self._folder / layout)])

    def _command(self, source: str, layout: str, output: Path) -> list[str]:
        target, *flags = LAYOUTS[layout]
        command = [sys.executable, "-m", "megatron_llmjp.convert.cli", "--to", target, *flags]
        return [*command, "--input", str(self._folder / source), "--output", str(output)]

    def _measure(self, name: str) -> None:
        """Copy, convert and copy again."""
        source, layout = DIRECTIONS[name]
        copied = source if self._large else layout
        before = self._copy(copied)
        output = self._folder / "output"
        self._prepare(source)
        command = self._command(source, layout, output)
        tasks = self._arguments.sharded
        found = self._execute(
            [[*command, "--shard", f"{i}/{tasks}"] for i in range(tasks)] if tasks else [command]
        )
        shutil.rmtree(output)
        after = self._copy(copied)
        self._costs[name].append(found)
        self._costs[f"{name}: cp"] += [before, after]
        ratio = (before.seconds + after.seconds) / 2 / found.seconds
        self._ratios[name].append(ratio)
        print(f"{name}: {found}, ratio {ratio:.2f}", file=sys.stderr, flush=True)

    def _copy(self, layout: str) -> Cost:
        self._prepare(layout)
        copy = self._folder / "copy"
        found = self._execute(
            [["sh", "-c", 'cp -r "$0" "$1" && sync', str(self._folder / layout), str(copy)]]
        )
        shutil.rmtree(copy)
        return found

    def _measure_transformers(self) -> None:
        output = self._folder / "transformers"
        self._prepare("hf")
        command = [sys.executable, "-c", TRANSFORMERS, str(self._folder / "hf"), str(output)]
        script = 'python=$1; shift; "$python" "$@" && sync'
        found = self._execute([["sh", "-c", script, "sh", *command]])
        shutil.rmtree(output)
        self._costs["transformers: load and save, sync"].append(found)

    def _prepare(self, layout: str) -> None:
        """Finish all writes, so that no measurement waits for another one's; read the source."""
        os.sync()
        if self._arguments.cold:
            drop_page_cache(self._folder / layout)
        else:
            fill_page_cache(self._folder / layout)

    def _execute(self, commands: Sequence[Sequence[str]]) -> Cost:
        """Run commands at the same time."""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        started = time.perf_counter()
        processes = [
            subprocess.Popen(c, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for c in commands
        ]
        usages = []
        for process in processes:
            assert process.stderr is not None
            errors = process.stderr.read().decode()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"{process.args!r}: {errors}")
            usages.append(usage)
        seconds = time.perf_counter() - started
        return Cost(seconds, sum(map(cpu_seconds, usages)), max(u.ru_maxrss for u in usages) * 1024)

    def _report(self) -> None:
        """Print medians over the rounds, and ratios within each round."""
        print(f"\n{os.cpu_count()} cores, median of {self._arguments.rounds} rounds")
        titles = f"{'GB':>5} {'s':>6} {'CPU s':>6} {'peak GB':>7} {'cp + sync s':>11} {'CPU s':>6}"
        print(f"{'':36} {titles}  ratio (range)")
        for name, ratios in self._ratios.items():
            copies = self._costs[f"{name}: cp"]
            copy = f"{median(copies, 'seconds'):11.2f} {median(copies, 'cpu'):6.2f}"
            span = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{self._row(name, size_of(self._folder / DIRECTIONS[name][0]))} {copy}  {span}")
        if self._large:
            return
        name = "transformers: load and save, sync"
        print(self._row(name, size_of(self._folder / "hf")))

    def _row(self, name: str, size: int) -> str:
        costs = self._costs[name]
        seconds, cpu = median(costs, "seconds"), median(costs, "cpu")
        memory = max(cost.memory for cost in costs) / 1e9
        return f"{name:36} {size / 1e9:5.2f} {seconds:6.2f} {cpu:6.2f} {memory:7.2f}"


def median(costs: Sequence[Cost], field: str) -> float:
    """Return the median of one field."""
    return statistics.median(getattr(cost, field) for cost in costs)


def cpu_seconds(usage: resource.struct_rusage) -> float:
    """Return the time in user and kernel mode."""
    return usage.ru_utime + usage.ru_stime


def write_model(folder: Path, layers: int) -> None:
    """Write a LLaMA model with random weights, without holding it in memory."""
    import torch

    from megatron_llmjp.config.schema import ModelConfig
    from megatron_llmjp.convert.files.dtypes import DType
    from megatron_llmjp.convert.files.safetensors import plan_safetensors
    from megatron_llmjp.convert.formats.hugging_face.architectures.llama import ARCHITECTURE
    from megatron_llmjp.convert.plan import write_slot
    from megatron_llmjp.convert.tensors import part_shapes, tensor_shapes

    model = ModelConfig(
        num_layers=layers,
        hidden_size=SIZES["hidden"],
        num_attention_heads=SIZES["heads"],
        num_query_groups=SIZES["groups"],
        ffn_hidden_size=SIZES["ffn"],
        max_position_embeddings=4096,
        vocab_size=SIZES["vocabulary"],
    )
    shapes = tensor_shapes(model, SIZES["vocabulary"])
    tensors = {
        key: (shape, DType.bfloat16)
        for rule in ARCHITECTURE.expanded_rules(model)
        for key, shape in zip(rule.keys, part_shapes(rule.layout, shapes[rule.name]), strict=True)
    }
    folder.mkdir()
    file = plan_safetensors("model.safetensors", tensors)
    file.create(folder)
    generator = torch.Generator().manual_seed(1)
    for slot in file.slots.values():
        write_slot(folder, slot, torch.randn(slot.shape, generator=generator) / 50)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": SIZES["vocabulary"],
        "tie_word_embeddings": False,
        **ARCHITECTURE.to_config(model),
    }
    (folder / "config.json").write_text(json.dumps(config))


def size_of(folder: Path) -> int:
    """Return the size of all files below a folder in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fill_page_cache(folder: Path) -> None:
    """Read all files in a folder."""
    buffer = bytearray(1 << 22)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def drop_page_cache(folder: Path) -> None:
    """Drop the page cache of all files in a folder, so that reads access the disk."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()
