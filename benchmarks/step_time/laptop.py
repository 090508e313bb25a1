"""Step times of the laptop presets on this machine's CPU, measured and predicted.

    python -m benchmarks.step_time.laptop --folder /tmp/laptop_step_times

Each preset trains on random tokens with TP, PP and DP on one, two and four processes of one thread
each. The model of the estimate (``estimate/speed/step_time.py``) predicts the step times: its
parameters are fitted to the measured runs, and each run is predicted from a fit to all others.
Ranks share cores where there are more ranks than cores. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.step_time.least_squares import Model, Vector
from megatron_llmjp.config.loading import ConfigLayers, build_config, read_config, replace_fields
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.indexed_dataset_writer import write_idx
from megatron_llmjp.estimate.layout import make_layout
from megatron_llmjp.estimate.speed.step_parameters import StepParameters
from megatron_llmjp.estimate.speed.step_time import RunLoad, run_load, step_time
from megatron_llmjp.estimate.speed.step_work import Software
from megatron_llmjp.estimate.speed.target_gpu import TargetGpu
from megatron_llmjp.metric_registry import SECONDS_PER_ITERATION
from megatron_llmjp.report.history import read_history

ROOT = Path(__file__).parents[2]
PRESETS = ("laptop-gpt2", "laptop-llama", "laptop-gpt-neox")
LAYOUTS = (
    (1, 1, 1),
    (2, 1, 1),
    (1, 2, 1),
    (1, 1, 2),
    (4, 1, 1),
    (1, 4, 1),
    (1, 1, 4),
    (2, 2, 1),
    (2, 1, 2),
    (1, 2, 2),
)
"""Tensor-, pipeline- and data-parallel sizes."""
VOCAB_SIZE = 4096
BATCH_SIZE = 32
MAX_ERROR = 0.15
WARM_UP = 3
"""Steps that are not counted."""
TOKENS = 1 << 21
CPU = TargetGpu(
    name="CPU",
    memory=16e9,
    peak=100e9,
    per_node=4,
    memory_bandwidth=10e9,
    link_bandwidth=2e9,
    network_bandwidth=2e9,
    products="ampere",
)
"""A core: only the products of these numbers with fitted parameters matter."""


@dataclass(frozen=True)
class CpuParameters:
    """Fitted parameters."""

    products: float
    """As :attr:`StepParameters.ampere_products`, of :data:`CPU`."""
    product_traffic: float
    attention: float
    link: float
    kernel: float
    shared: float
    """Speed of a core while the others are busy, too: cores share caches, and may share units."""
    switching: float
    """Factor of the time of messages where ranks share cores: a rank that waits for a message is
    not running when it arrives."""

    @property
    def step(self) -> StepParameters:
        """Parameters of the step-time model; there are no stragglers."""
        return StepParameters(
            ampere_products=self.products,
            hopper_products=1.0,
            product_traffic=self.product_traffic,
            attention=self.attention,
            link=self.link,
            stragglers=0.0,
            kernel=self.kernel,
        )


START = CpuParameters(0.5, 30.0, 0.5, 0.5, 5e-4, 0.8, 1.0)
LIMITS = np.log([[0.01, 0.1, 0.05, 0.02, 1e-6, 0.3, 0.5], [10.0, 1e3, 5.0, 20.0, 1e-1, 1.0, 5.0]])


@dataclass(frozen=True)
class LaptopRun:
    """A measured run."""

    name: str
    load: RunLoad
    seconds: float
    """Per step."""
    cores: int


def predicted_seconds(run: LaptopRun, parameters: CpuParameters) -> float:
    """Predict the seconds per step.

    Where ranks share cores, a step takes at least the work of all ranks divided by the cores, which
    are never idle while a rank has work.
    """
    layout, step = run.load.layout, parameters.step
    if layout.world_size > run.cores:
        step = replace(step, link=step.link / parameters.switching)
    total = step_time(run.load, CPU, step).total
    if layout.world_size > run.cores:
        stages = [replace(run.load, stages=(stage,) * layout.pp) for stage in run.load.stages]
        alone = [step_time(stage, CPU, step) for stage in stages]
        work = sum(time.total - time.bubble for time in alone) * layout.tp * layout.dp
        total = max(total, work / run.cores)
    return total / (parameters.shared if layout.world_size > 1 else 1.0)


def log_errors(runs: Sequence[LaptopRun], logs: Vector) -> Vector:
    """Return the logarithm of predicted by measured seconds of each run."""
    parameters = CpuParameters(*np.exp(logs))
    return np.array([np.log(predicted_seconds(run, parameters) / run.seconds) for run in runs])


def corrected_errors(runs: Sequence[LaptopRun], errors: Vector) -> Vector:
    """Return the errors after correction by the median of the other runs of the same preset."""
    found = errors.copy()
    for number, run in enumerate(runs):
        others = [
            errors[n]
            for n, other in enumerate(runs)
            if n != number and other.load.config.model == run.load.config.model
        ]
        found[number] -= np.median(others)
    return found


def configure(preset: str, t: int, p: int, d: int) -> Config | None:
    """Return the preset in a layout; None if its heads cannot be divided."""
    layers = ConfigLayers()
    read_config(preset, layers)
    config = build_config(layers)
    if config.model.query_groups % t:
        return None
    return replace_fields(
        config,
        vocab_size=VOCAB_SIZE,
        global_batch_size=BATCH_SIZE,
        micro_batch_size=BATCH_SIZE // 4 // d,
        tensor_model_parallel_size=t,
        pipeline_model_parallel_size=p,
    )


def measure(config: Config, preset: str, folder: Path, steps: int) -> float:
    """Train and return the seconds of the fastest step: others include those of other programs."""
    parallel, save = config.parallel, folder / "run"
    t, p = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    size = config.training.micro_batch_size
    processes = BATCH_SIZE // 4 // size * t * p
    shutil.rmtree(save, ignore_errors=True)
    command = [
        *(sys.executable, str(ROOT / "pretrain_gpt.py"), "--config", preset),
        *("--data-path", str(folder / "tokens"), "--tokenizer-type", "NullTokenizer"),
        *("--vocab-size", str(VOCAB_SIZE - 1), "--split", "1", "--save", str(save)),
        *("--nproc-per-node", str(processes), "--global-batch-size", str(BATCH_SIZE)),
        *("--micro-batch-size", str(size), "--train-iters", str(WARM_UP + steps)),
        *("--tensor-model-parallel-size", str(t), "--pipeline-model-parallel-size", str(p)),
        *("--log-interval", "1", "--lr-warmup-iters", "0", "--no-sequence-parallel"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    _, seconds = read_history(save).values(SECONDS_PER_ITERATION.name)
    return float(np.min(seconds[WARM_UP:]))


def measured_runs(folder: Path, steps: int, rounds: int) -> Iterator[LaptopRun]:
    """Measure all runs, one after the other in each round; the fastest step counts."""
    write_tokens(folder / "tokens")
    cores = len(os.sched_getaffinity(0))
    configs = {
        f"{preset}, TP {t} x PP {p} x DP {d}": (preset, t * p * d, config)
        for preset, (t, p, d) in product(PRESETS, LAYOUTS)
        if (config := configure(preset, t, p, d)) is not None
    }
    found: dict[str, list[float]] = {name: [] for name in configs}
    for number in range(rounds):
        for name, (preset, _, config) in configs.items():
            found[name].append(measure(config, preset, folder, steps))
            print(f"round {number + 1}: {name:36} {found[name][-1]:.4f} s", flush=True)
    for name, (_, world_size, config) in configs.items():
        load = run_load(config, make_layout(config, world_size), Software())
        yield LaptopRun(name, load, min(found[name]), cores)


def write_tokens(prefix: Path) -> None:
    """Write a dataset of random tokens in documents of 512."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokens = np.random.default_rng(0).integers(VOCAB_SIZE - 1, size=TOKENS).astype(np.uint16)
    tokens.tofile(prefix.with_suffix(".bin"))
    lengths = np.full(TOKENS // 512, 512, np.int32)
    pointers = 2 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    counts = np.ones(len(lengths), np.int32)
    write_idx(prefix.with_suffix(".idx"), np.dtype(np.uint16), lengths, counts, pointers)


def main() -> None:
    """Measure, fit and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="folder for data and runs")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each layout")
    args = parser.parse_args()
    runs = list(measured_runs(args.folder, args.steps, args.rounds))
    model = Model(log_errors, LIMITS)
    logs = model.fit(runs, np.log(astuple(START)))
    errors = model.left_out_errors(runs, logs, [run.name for run in runs])
    corrected = corrected_errors(runs, errors)
    print(f"\n{'run':36} measured  predicted from the others, corrected by the same preset")
    for run, error, rest in zip(runs, errors, corrected, strict=True):
        columns = [f"{run.seconds * np.exp(e):9.4f} {np.expm1(e):+6.1%}" for e in (error, rest)]
        print(f"{run.name:36} {run.seconds:8.4f}  {'  '.join(columns)}")
    for kind, found in (("predicted", errors), ("corrected", corrected)):
        absolute = np.abs(np.expm1(found))
        print(
            f"{kind}: median error {np.median(absolute):.1%}, largest {np.max(absolute):.1%}, "
            f"{np.sum(absolute <= MAX_ERROR)} of {len(runs)} within {MAX_ERROR:.0%}"
        )
    print(CpuParameters(*(float(f"{value:.3g}") for value in np.exp(logs))))


if __name__ == "__main__":
    main()
