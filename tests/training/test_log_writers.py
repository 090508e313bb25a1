"""Log line, metrics.jsonl, TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import resource
import sys
import types

import pytest

from megatron_llmjp.config.flags import parse
from megatron_llmjp.errors import UserError
from megatron_llmjp.formatting import format_count, format_duration
from megatron_llmjp.training.log_writers import MetricsRecord, MetricsWriters

MODEL = ("--num-layers", "1", "--hidden-size", "8", "--num-attention-heads", "1")


def config(*flags):
    return parse([*MODEL, *map(str, flags)])[0]


def record(iteration, **values):
    return MetricsRecord(iteration, 4 * iteration, 128 * iteration, values)


@pytest.fixture
def wandb(monkeypatch):
    """Replacement of wandb that records its calls."""
    runs = []

    class Run:
        def __init__(self, settings):
            self.settings, self.logged, self.axes, self.finished = settings, [], {}, False

        def define_metric(self, name, step_metric=None):
            self.axes[name] = step_metric

        def log(self, values):
            self.logged.append(values)

        def finish(self):
            self.finished = True

    def init(**settings):
        runs.append(Run(settings))
        return runs[-1]

    module = types.ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_all_destinations_get_the_same_records(tmp_path, wandb):
    save = tmp_path / "run"
    run = config("--save", save, "--wandb-project", "llm-jp", "--wandb-entity", "lab")
    for start in (0, 2):  # the second process resumes from iteration 2
        writers = MetricsWriters(run)
        writers.write(MetricsRecord(start, 4 * start, 128 * start, {}, {"event": "start"}))
        for iteration in (start + 1, start + 2, start + 3):
            writers.write(record(iteration, **{"lm loss": 5.0 - iteration}))
        writers.close()

    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 2, 3, 4, 5]
    assert [line.get("event") for line in lines] == ["start", *[None] * 3, "start", *[None] * 3]
    assert lines[1] == {"iteration": 1, "consumed samples": 4, "lm loss": 4.0}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(save / "tensorboard")).Reload()
    by_iteration = {e.step: e.value for e in events.Scalars("lm loss")}
    against_tokens = EventAccumulator(str(save / "tensorboard" / "vs_tokens")).Reload()
    by_tokens = {e.step: e.value for e in against_tokens.Scalars("lm loss")}
    assert by_iteration == {i: 5.0 - i for i in range(1, 6)}
    assert by_tokens == {128 * i: 5.0 - i for i in range(1, 6)}
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "hidden_size: 8" in text

    first, second = wandb
    assert first.settings["project"] == "llm-jp" and first.settings["name"] == "run"
    assert first.settings["id"] == second.settings["id"] and first.settings["resume"] == "allow"
    assert (save / "wandb_run_id.txt").read_text() == first.settings["id"]  # a name of releases
    assert first.settings["config"]["model"]["hidden_size"] == 8
    assert (first.settings["entity"], first.settings["dir"]) == ("lab", str(save))
    assert first.axes == {"iteration": None, "consumed tokens": None, "*": "iteration"}
    assert first.logged[0] == {"iteration": 1, "consumed tokens": 128, "lm loss": 4.0}
    assert len(first.logged) == 3 and first.finished and second.finished
    MetricsWriters(config("--wandb-project", "x", "--wandb-exp-name", "y")).close()
    alone = wandb[2].settings
    assert (alone["name"], alone["id"], alone["dir"], alone["entity"]) == ("y", None, None, None)


def test_events_are_texts_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writers = MetricsWriters(config("--save", tmp_path))
    for kind, why in (("start", ""), ("straggler", "rank 17 on node2 is slow"), ("fold", "")):
        writers.write(MetricsRecord(20, 80, 2560, {}, {"event": kind, "why": why}))
    writers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["tensors"] == ["config/text_summary", "straggler/text_summary"]
    (found,) = events.Tensors("straggler/text_summary")
    assert (found.step, found.tensor_proto.string_val) == (20, [b"rank 17 on node2 is slow"])


def test_nan_is_null(tmp_path):
    """JSON has no NaN: strict parsers can read every line."""
    writers = MetricsWriters(config("--save", tmp_path))
    writers.write(record(1, **{"lm loss": float("nan"), "grad norm": float("inf"), "spikes": 0}))
    writers.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=pytest.fail)
    assert (found["lm loss"], found["grad norm"], found["spikes"]) == (None, None, 0)


def test_without_wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    MetricsWriters(config()).close()
    with pytest.raises(UserError, match="wandb is not installed: `pip install wandb`"):
        MetricsWriters(config("--wandb-project", "x"))


def test_errors_of_libraries_do_not_end_a_run(tmp_path, wandb, monkeypatch, capfd):
    run = config("--save", tmp_path / "run", "--wandb-project", "llm-jp")
    writers = MetricsWriters(run)

    def broken(values):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(wandb[0], "log", broken, raising=False)
    for iteration in (1, 2):
        writers.write(record(iteration, **{"lm loss": 5.0}))
    writers.close()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    output = capfd.readouterr().err
    assert output.count("warning: WandbWriter: BrokenPipeError: [Errno 32] Broken pipe") == 1

    def unreachable(**settings):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(sys.modules["wandb"], "init", unreachable)
    writers = MetricsWriters(run)
    writers.write(record(3, **{"lm loss": 5.0}))
    writers.close()
    assert "WandbWriter: ConnectionError: no route to host; the run" in capfd.readouterr().err
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_logs_that_cannot_be_written(tmp_path, capfd):
    """Files and folders in place of logs are reported, and the run continues."""
    save = tmp_path / "run"
    (save / "metrics.jsonl").mkdir(parents=True)
    (save / "tensorboard").write_text("")
    (save / "wandb_run_id.txt").write_text("")
    writers = MetricsWriters(config("--save", save))
    for iteration in (1, 2):
        writers.write(record(iteration, **{"lm loss": 5.0}))
    writers.close()
    output = capfd.readouterr().err
    assert output.count(f"warning: {save / 'metrics.jsonl'} cannot be written: Is a directory") == 1
    assert f"{save / 'tensorboard'}/events.out" in output


def test_formatted_numbers():
    assert [format_count(n) for n in (12, 1234, 1.234e6, 27.6e9, 2.1e12)] == [
        "12", "1.23K", "1.23M", "27.60B", "2.10T",
    ]  # fmt: skip
    assert format_duration(59.6) == "00:01:00" and format_duration(90061) == "1d 01:01:01"


def test_a_disk_that_is_full_for_a_while(tmp_path, capfd):
    """No record is lost, and an incomplete line is not completed with a later one."""
    save = tmp_path / "run"
    save.mkdir()
    (save / "metrics.jsonl").write_text('{"iteration": 1, "lm lo')  # the previous run was killed
    writers = MetricsWriters(config("--save", save))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for iteration in range(1, 21):
            full = iteration in range(3, 15)
            resource.setrlimit(resource.RLIMIT_FSIZE, (400 if full else limits[0], limits[1]))
            writers.write(record(iteration, **{"lm loss": 5.0 - iteration}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writers.close()
    broken, *lines = (save / "metrics.jsonl").read_text().splitlines()
    assert broken == '{"iteration": 1, "lm lo'
    assert [json.loads(line)["iteration"] for line in lines] == list(range(1, 21))
    assert "waits for free disk space: File too large" in capfd.readouterr().err

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(save / "tensorboard")).Reload().Scalars("lm loss")
    assert {e.step: e.value for e in events} == {i: 5.0 - i for i in range(1, 21)}
