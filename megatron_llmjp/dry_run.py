"""``--dry-run``: the resolved configuration of a run, with where each value is from.

What is printed is a YAML file that ``--config`` reads back.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_llmjp.config.checks import data_parallel_size
from megatron_llmjp.config.load import dump
from megatron_llmjp.config.schema import SECTIONS, Config
from megatron_llmjp.data.batch_sizes import BatchSizes
from megatron_llmjp.prepare import Run


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
