"""The summary of a run: model, layout, progress, throughput, losses, anomalies."""

from __future__ import annotations

from statistics import median

from megatron_llmjp.config.parameter_counts import count_parameters
from megatron_llmjp.config.schema import Config
from megatron_llmjp.formatting import format_count, format_duration
from megatron_llmjp.metric_registry import (
    CONSUMED_SAMPLES,
    EVENT,
    LM_LOSS,
    METRICS_FILE,
    MFU,
    NAN_ITERATIONS,
    ROLLBACKS,
    SECONDS_PER_ITERATION,
    SECONDS_REMAINING,
    SKIPPED_ITERATIONS,
    SPIKES,
    TOKENS_PER_SECOND,
    perplexity,
)
from megatron_llmjp.report.history import ROUTINE_EVENTS, MetricsHistory
from megatron_llmjp.report.step_times import compared_step_rows, world_size_of


def summary_rows(history: MetricsHistory) -> list[tuple[str, str]]:
    """Return the labels and values of the summary, in display order."""
    config = history.config
    rows = [("folder", str(history.folder))]
    if config is not None:
        rows += _model(config)
        rows.append(("layout", _layout(config, history)))
    rows += _progress(history)
    rows += _speed(history)
    rows += _losses(history)
    rows += _anomalies(history)
    return [(label, value) for label, value in rows if value]


def _model(config: Config) -> list[tuple[str, str]]:
    model = config.model
    heads = f"{model.num_attention_heads} heads"
    if model.query_groups != model.num_attention_heads:
        heads += f" in {model.query_groups} groups"
    kind = f"{model.normalization}, {model.activation_function}, {model.position_embedding_type}"
    parameters = count_parameters(config)
    return [
        ("model", f"{model.num_layers} layers, hidden {model.hidden_size}, {heads}; {kind}"),
        (
            "parameters",
            f"{parameters.total:,}, of which {parameters.non_embedding:,} are not embeddings",
        ),
    ]


def _layout(config: Config, history: MetricsHistory) -> str:
    parallel = config.parallel
    parts = [
        f"TP {parallel.tensor_model_parallel_size}",
        f"PP {parallel.pipeline_model_parallel_size}",
    ]
    if parallel.virtual_pipeline_model_parallel_size:
        parts.append(f"VP {parallel.virtual_pipeline_model_parallel_size}")
    if parallel.context_parallel_size > 1:
        parts.append(f"CP {parallel.context_parallel_size}")
    processes = world_size_of(config, history.training[-1]) if history.training else None
    if processes is None:
        return " x ".join(parts)
    parts.append(f"DP {processes // parallel.model_parallel_size}")
    return f"{' x '.join(parts)} on {processes} processes"


def _progress(history: MetricsHistory) -> list[tuple[str, str]]:
    config = history.config
    rows = [("iterations", f"{history.iteration:,}")]
    samples = history.last(CONSUMED_SAMPLES)
    if config is not None and samples is not None:
        tokens = int(samples) * config.data.seq_length
        rows.append(("tokens", f"{tokens:,} ({format_count(tokens)})"))
    folds = history.folds()
    if folds:
        rows.append(("folds", f"{len(folds)}, current: {folds[-1].name}"))
    return rows


def _speed(history: MetricsHistory) -> list[tuple[str, str]]:
    seconds = training_seconds(history)
    rows = [("time in steps", format_duration(seconds) if seconds else "")]
    tokens = history.values(TOKENS_PER_SECOND.name)[1]
    if tokens:
        text = f"{format_count(median(tokens))} tokens/s"
        mfu = history.values(MFU.name)[1]
        rows.append(("speed", text + (f", MFU {median(mfu):.1%}" if mfu else "") + " (median)"))
    if history.training:
        rows += compared_step_rows(history.training[-1])
    remaining = history.last(SECONDS_REMAINING.name)
    if remaining:
        rows.append(("remaining", format_duration(remaining)))
    return rows


def training_seconds(history: MetricsHistory) -> float:
    """Return the time spent in valid steps, without saves, validations and abandoned iterations."""
    iterations, seconds = history.values(SECONDS_PER_ITERATION.name)
    return sum(
        (iteration - before) * each
        for before, iteration, each in zip([0, *iterations], iterations, seconds, strict=False)
    )


def _losses(history: MetricsHistory) -> list[tuple[str, str]]:
    rows = []
    iterations, losses = history.values(LM_LOSS.name)
    if losses:
        rows.append(("training loss", f"{losses[-1]:.4f} at iteration {iterations[-1]:,}"))
    for name, (iterations, losses) in history.validation_sets().items():
        if losses:
            loss, iteration = min(zip(losses, iterations, strict=True))
            text = f"{loss:.4f} (perplexity {perplexity(loss):.2f}) at {iteration:,}"
            rows.append((f"best validation {name}", text))
    return rows


def _anomalies(history: MetricsHistory) -> list[tuple[str, str]]:
    again = sum(
        int(lost[-1]["iteration"]) - int(lost[0]["iteration"]) for lost in history.abandoned
    )
    restarts = str(len(history.restarts))
    if history.restarts:
        restarts += f", from {', '.join(f'{i:,}' for i in history.restarts[-5:])}"
        restarts += f"; about {again:,} iterations repeated" if again else ""
    skipped = int(sum(history.values(SKIPPED_ITERATIONS.name)[1]))
    exceptional = [e for e in history.events if e[EVENT] not in ROUTINE_EVENTS]
    rows = [("restarts", restarts), (SKIPPED_ITERATIONS.name, str(skipped) if skipped else "")]
    for label in (NAN_ITERATIONS.name, SPIKES.name):
        times = int(sum(history.values(label)[1]))
        rows.append((label, str(times) if times else ""))
    rollbacks = int(history.last(ROLLBACKS.name) or 0)
    rows.append((ROLLBACKS.name, str(rollbacks) if rollbacks else ""))
    if exceptional:
        last = exceptional[-1]
        event = ": ".join(filter(None, (str(last[EVENT]), str(last.get("why", "")))))
        at = f"{int(last['iteration']):,}"
        rows.append(("exceptional events", f"{len(exceptional)}, the last at {at}: {event}"))
    if history.damaged_lines:
        rows.append(("damaged lines", f"{history.damaged_lines} in {METRICS_FILE}, ignored"))
    return rows
