"""Step times of runs whose metrics are written out, and what they change in an estimate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_llmjp.checkpoint.manifest import CONFIG, MANIFEST, folder_name
from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import dump_config, replace_fields
from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.errors import EXIT_DONE, UserError
from megatron_llmjp.estimate.flops import flops_per_sample
from megatron_llmjp.estimate.run_estimate import estimate_run
from megatron_llmjp.estimate.speed.fitted_step_time import ACCURACY, CORRECTED_ACCURACY
from megatron_llmjp.estimate.speed.measured_runs import compare_run, correction, predict_step
from megatron_llmjp.planning import print_estimate
from megatron_llmjp.report.history import read_history
from megatron_llmjp.report.status import read_status
from megatron_llmjp.report.status_table import format_status
from megatron_llmjp.report.step_times import read_measured_run
from megatron_llmjp.report.summary import summary_rows
from tests.estimate.test_flops import preset

GPU = "32 x NVIDIA H100 80GB HBM3 on 4 nodes"
RUN = preset(
    "llm-jp-3-1.8b", global_batch_size=512, vocab_size=99_500, tensor_model_parallel_size=2,
    micro_batch_size=2,
)  # fmt: skip
WORDS = [
    "--config", "llm-jp-3-1.8b", "--estimate", "--world-size", "64", "--vocab-size", "99500",
]  # fmt: skip


def write_run(folder: Path, seconds: list[float], world_size: int = 32, **values: Any) -> Path:
    """Write a run with a log interval of two steps, whose times are given."""
    folder.mkdir(exist_ok=True)
    iteration = folder / folder_name(2 * len(seconds))
    iteration.mkdir()
    (iteration / MANIFEST).write_text("{}")
    (iteration / CONFIG).write_text(dump_config(RUN))
    with (folder / "metrics.jsonl").open("a") as stream:
        start = {"iteration": 0, "event": "start", "hardware": values.pop("hardware", GPU)}
        stream.write(json.dumps(start) + "\n")
        for number, each in enumerate(seconds):
            samples = 512 / each
            record = {
                "iteration": 2 * number + 2,
                "lm loss": 3.0,
                "global batch size": 512,
                "seconds per iteration": each,
                "tokens per second": samples * RUN.data.seq_length,
                "TFLOP/s per GPU": samples * flops_per_sample(RUN) / world_size / 1e12,
            }
            stream.write(json.dumps(record | values) + "\n")
    return folder


def test_a_measured_run(tmp_path):
    """The median without the first interval; the number of GPUs follows from the throughput."""
    values = {"longest computing seconds": 0.75}
    run = read_measured_run(write_run(tmp_path / "run", [9.0, 1, 1.5, 1, 1, 7], **values), "H100")
    assert (run.seconds, run.computing, run.world_size, run.iterations) == (1.0, 0.75, 32, 10)
    assert run.config == replace_fields(RUN, rampup_batch_size=None)


def test_only_intervals_like_the_last_are_counted(tmp_path):
    """After a restart on more GPUs, whose first interval is omitted, too."""
    folder = write_run(tmp_path / "run", [2.0] * 9)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"iteration": 18, "event": "start", "hardware": GPU}) + "\n")
    more = write_run(tmp_path / "more", [5.0] + [1.0] * 8, world_size=64)
    records = [json.loads(line) for line in (more / "metrics.jsonl").read_text().splitlines()[1:]]
    with (folder / "metrics.jsonl").open("a") as stream:
        for record in records:
            record["iteration"] += 18
            stream.write(json.dumps(record) + "\n")
    run = read_measured_run(folder, "H100")
    assert (run.seconds, run.world_size, run.iterations) == (1.0, 64, 16)


@pytest.mark.parametrize(("number", "values", "gpu", "message"), [
    (5, {}, "H100", "has 8 steps after the first log interval of each start; expected 10 or more"),
    (9, {"hardware": "NVIDIA A100-SXM4-40GB"}, "H100", "was on NVIDIA A100-SXM4-40GB, not on"),
    (9, {"hardware": "CPU, 1 thread(s) per rank"}, "H100", "was on CPU, 1 thread"),
    (9, {}, "A100", "was on 32 x NVIDIA H100 80GB HBM3 on 4 nodes, not on --gpu A100"),
])  # fmt: skip
def test_unusable_runs(tmp_path, number, values, gpu, message):
    folder = write_run(tmp_path / "run", [1.0] * number, **values)
    with pytest.raises(UserError, match=message):
        read_measured_run(folder, gpu)


def test_a_run_without_checkpoint_or_metrics(tmp_path):
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        read_measured_run(tmp_path, "H100")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no checkpoint, whose configuration is needed"):
        read_measured_run(tmp_path, "H100")


def test_measured_runs_correct_the_estimate(tmp_path):
    """By the geometric mean of measured by predicted times, whatever the layout of the runs."""
    machine = PlannedMachine(64, "H100")
    predicted = predict_step(RUN, PlannedMachine(32, "H100")).total
    folders = [write_run(tmp_path / str(factor), [predicted * factor] * 9) for factor in (1.2, 1.5)]
    runs = [compare_run(read_measured_run(f, "H100"), machine, RUN) for f in folders]
    assert [run.factor for run in runs] == pytest.approx([1.2, 1.5])
    assert correction(runs) == pytest.approx((1.2 * 1.5) ** 0.5)
    plain = estimate_run(RUN, machine)
    found = estimate_run(RUN, machine, measured_runs=runs)
    assert found.step_seconds == pytest.approx(plain.step_seconds * 1.8**0.5)
    assert found.step_time.total == pytest.approx(found.step_seconds)
    assert plain.error_range == (ACCURACY.low, ACCURACY.high)
    assert found.error_range == (CORRECTED_ACCURACY.low, CORRECTED_ACCURACY.high)


def test_the_estimate_names_its_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megatron_llmjp.planning._build_on_meta", lambda estimate: "built")
    predicted = predict_step(RUN, PlannedMachine(32, "H100"))
    values = {"longest computing seconds": predicted.computing}
    folder = str(write_run(tmp_path / "run", [predicted.total * 1.25] * 9, **values))
    assert print_estimate(parse([*WORDS, "--measured-runs", folder])) == EXIT_DONE
    text = capsys.readouterr().out
    assert "times 1.250, the measured by the predicted time of:" in text
    assert f"{folder}: 32 GPUs, 16 iterations" in text
    lines = text.split("16 iterations")[1].splitlines()[:5]
    rows = {line.strip().split("  ")[0]: line.split()[-1] for line in lines if line.strip()}
    assert rows["computing on the slowest stage"] == "+0%"
    assert rows["step"] == "+25%"
    # The run in --save is used, too; not one on other devices.
    assert print_estimate(parse([*WORDS, "--save", folder])) == EXIT_DONE
    assert "times 1.250" in capsys.readouterr().out
    cpu = str(write_run(tmp_path / "cpu", [9.0] * 9, hardware="CPU, 1 thread(s) per rank"))
    assert print_estimate(parse([*WORDS, "--save", cpu])) == EXIT_DONE
    assert "times" not in capsys.readouterr().out.split("memory per GPU")[1].split("failures")[0]
    with pytest.raises(UserError, match="--mfu and --measured-runs exclude each other"):
        parse([*WORDS, "--mfu", "0.4", "--measured-runs", folder])


def test_status_and_report_compare(tmp_path):
    """Of the last log interval, whose prediction the run has logged."""
    values = {
        "longest computing seconds": 0.8,
        "predicted seconds per iteration": 0.8,
        "predicted computing seconds": 0.5,
    }
    folder = write_run(tmp_path / "run", [9.0, 1.0], **values)
    expected = {
        "step": "1.000 s, predicted 0.800 s (+25%)",
        "computing on the slowest stage": "0.800 s, predicted 0.500 s (+60%)",
        "communication, waits and optimizer": "0.200 s, predicted 0.300 s (-33%)",
    }
    status = read_status(folder)
    assert status.compared == expected
    assert "step" in format_status(status) and "predicted 0.800 s (+25%)" in format_status(status)
    rows = dict(summary_rows(read_history(folder)))
    assert {name: rows.get(name) for name in expected} == expected
    without = write_run(tmp_path / "without", [9.0, 1.0])
    assert read_status(without).compared == {}
