"""``--dry-run``: all checks of a run, and its resolved configuration with where each value is from.

What is printed is a YAML file that ``--config`` reads back. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_llmjp.checkpoint import lock as locks
from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.config.checks import data_parallel_size
from megatron_llmjp.config.load import dump
from megatron_llmjp.config.schema import SECTIONS, Config
from megatron_llmjp.data.batch_sizes import BatchSizes
from megatron_llmjp.prepare import Run, prepare


def checked(run: Run, world_size: int) -> Run:
    """The run with a checkpoint that passes what the run itself checks of it, and its save folder.

    Raises:
        UserError: another run holds the save folder, or no checkpoint is whole.
    """
    save = run.config.checkpoint.save
    if save and not run.config.training.eval_only:
        locks.refuse_if_in_use(Path(save))
    damaged: dict[str, str] = {}
    while run.resume is not None and run.config.checkpoint.verify_checkpoint:
        folder = run.resume.folder
        problems = manifests.problems(folder, run.resume.manifest, checksums=True)
        if not problems:
            break
        damaged[str(folder)] = problems[0]
        run = prepare(run.asked, world_size, damaged)
    return run


def check_model(run: Run) -> None:
    """Have megatron-core check the model's configuration, and vet the checkpoint's files.

    Imports torch, which takes seconds.

    Raises:
        UserError: megatron-core refuses the model, or the checkpoint holds more than data.
    """
    from megatron_llmjp.checkpoint import safety
    from megatron_llmjp.model.gpt import transformer_config
    from megatron_llmjp.runtime import device

    transformer_config(run.config, device.setup(0))
    if run.resume is not None:
        safety.vet(run.resume.folder)


def describe(run: Run, parsed: Config, origin: Mapping[str, str], world_size: int) -> str:
    """The whole run as commented YAML.

    Args:
        run: the resolved run.
        parsed: the configuration before it was resolved.
        origin: by field, where its value was given.
        world_size: processes of the run.
    """
    parallel = run.config.parallel
    replicas = data_parallel_size(run.config, world_size)
    samples = BatchSizes(run.config).consumed_after(run.train_iters)
    tokens = samples * run.config.data.seq_length
    lines = [
        f"# {world_size} processes: TP {parallel.tensor_model_parallel_size} x PP "
        f"{parallel.pipeline_model_parallel_size} x CP {parallel.context_parallel_size} x DP "
        f"{replicas}",
        f"# {run.train_iters:,} iterations, {tokens:,} tokens, {len(run.schedule.folds)} fold(s)",
        f"# goes on from {run.resume.folder}" if run.resume else "# starts anew",
        *(f"# note: {note}" for note in run.notes),
    ]
    return "\n".join([*lines, *_fields(run.config, parsed, origin)])


def _fields(config: Config, parsed: Config, origin: Mapping[str, str]) -> list[str]:
    """The lines of the configuration, each with the origin of what is no default."""
    section, lines = "", []
    for line in dump(config).splitlines():
        name = line.strip().partition(":")[0]
        if not line.startswith((" ", "-")) and name in SECTIONS:
            section = name
        elif name in SECTIONS[section].model_fields:
            values = (getattr(getattr(c, section), name) for c in (config, parsed))
            resolved, given = values
            where = "resolved" if resolved != given else origin.get(name, "")
            line = f"{line:48}  # {where}" if where else line
        lines.append(line)
    return lines
