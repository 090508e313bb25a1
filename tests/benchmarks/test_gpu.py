from __future__ import annotations

import importlib.metadata
import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import compare, curves, step, wheels
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.results import Context, Results
from benchmarks.gpu.runner import Runner
from benchmarks.gpu.scale import FULL, TINY
from benchmarks.gpu.table import to_markdown
from benchmarks.gpu.trace import summarize
from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.estimate.flops import step_flops
from megatron_llmjp.parallel.device import Device
from tests.support.forks import Fork, be_program

ONE_OF_A_KIND = ["machine", "step-1.8b", "curves", "resume", "save", "compare-1.3b", "step-1.8b-te"]
"""Parts without a second one that runs the same code on another preset."""


class ForkedPart:
    """A part in a forked process, without the imports of a new one."""

    def __init__(self, words, environment, log):
        self._log, self._fork = log, Fork(be_program, words, env=environment)

    def poll(self):
        return self._fork.poll()

    def kill(self):
        self._fork.kill_all()
        self._log.write_text(self._fork.stdout + self._fork.stderr)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of a run on the CPU, and its table."""
    output = tmp_path_factory.mktemp("gpu")
    only = [word for name in ONE_OF_A_KIND for word in ("--only", name)]
    words = ["--device", "cpu", "--scale", "tiny", "--output", str(output), *only]
    code = program.main(words, start=ForkedPart)
    found = json.loads((output / "gpu.json").read_text())
    logs = {log.stem: log.read_text()[-2000:] for log in (output / "logs").iterdir()}
    assert code == 0, [(p, logs) for p in found["parts"].values() if p["status"] != "done"]
    return found, (output / "gpu.md").read_text()


def rows(report, part, table):
    return report[0]["parts"][part]["tables"][table]


def test_the_report_says_where_it_was_made(report):
    found, table = report
    assert list(found["parts"]) == ONE_OF_A_KIND
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", found["commit"])
    assert importlib.metadata.version("torch") in found["machine"]
    assert "needs a GPU" not in found["machine"]
    assert "nothing about a GPU" in table.split("###")[0]
    assert found["commit"][:12] in table


def test_curves_agree_with_the_references(report):
    found = rows(report, "curves", "losses")
    assert [(r["precision"], r["attention mask"]) for r in found] == [
        ("fp32", "causal"), ("fp32", "reset"), ("bf16", "causal"), ("bf16", "reset"),
    ]  # fmt: skip
    assert all(row["agreed"] == "yes" and row["steps"] == TINY.curve_steps for row in found)
    assert [row["largest difference"] for row in found[:2]] == [0.0, 0.0]  # the same device
    assert 0 < found[2]["largest difference"] < 5e-3
    assert found[1]["effect of the mask"] > 1e-4  # else a mask without effect would agree


def test_a_resumed_run_is_bit_exact(report):
    assert [row["bit-exact"] for row in rows(report, "resume", "resume")] == ["yes"]


def test_a_step_is_measured_at_every_micro_batch_size(report):
    found = rows(report, "step-1.8b", "speed and memory")
    assert [row["micro-batch size"] for row in found] == list(TINY.micro_batch_sizes)
    for row in found:  # 32 tokens in each of two samples
        assert row["tokens/s"] == pytest.approx(2 * 32 / row["s per step"])
        assert row["predicted GB"] > 0
        assert row["peak GB"] == "needs a GPU"


def test_both_sides_of_the_comparison_are_measured(report):
    (row,) = rows(report, "compare-1.3b", "speeds")
    ratio = row["ours tokens/s"] / row["transformers tokens/s"]
    assert float(row["ratio (range)"].split()[0]) == pytest.approx(ratio, abs=0.006)


def test_a_part_without_its_library_is_skipped(report):
    entry = report[0]["parts"]["step-1.8b-te"]
    assert entry["status"] == "skipped"
    assert "Transformer Engine is not installed" in entry["message"]


def test_saves_are_timed(report):
    found = rows(report, "save", "saves")
    assert [row["mode"] for row in found] == ["synchronous"] * 2 + ["asynchronous"] * 2
    for row in found:
        assert row["GB"] > 0
        assert row["training blocked, s"] > 0
    assert all(row["complete after, s"] >= row["training blocked, s"] for row in found[2:])


def test_the_table_has_every_row(report):
    found, table = report
    for part in found["parts"].values():
        assert f"### {part['title']}" in table
    tables = [t for part in found["parts"].values() for t in part.get("tables", {}).values()]
    assert len(re.findall(r"^\| ", table, re.M)) == sum(len(t) + 2 for t in tables)


def test_curves_that_differ_or_diverge_do_not_agree():
    assert curves.compare([2.0, 1.0], [2.0, 1.001], 1e-2)["agreed"] == "yes"
    assert curves.compare([2.0, 1.1], [2.0, 1.0], 1e-2)["agreed"] == "NO"
    assert curves.compare([math.nan, 1.0], [2.0, 1.0], 1e-2)["agreed"] == "NO"
    assert curves.compare([2.0, math.nan], [2.0, 1.0], 1e-2)["agreed"] == "NO"


class EndedPart:
    """A part that writes a row and has ended, or never ends."""

    code: int | None = None

    def __init__(self, words, environment, log):
        name, output = (words[words.index(w) + 1] for w in ("--run-part", "--output"))
        Results(Path(output) / "parts" / f"{name}.json").add("rows", {"a": 1, "b": math.inf})
        log.write_text("Traceback\n  somewhere\nValueError: no luck\n")

    def poll(self):
        return self.code

    def kill(self):
        pass


@pytest.mark.parametrize(
    ("exit_code", "status", "message"),
    [(None, "time limit", "0 s"), (1, "failed", "no luck"), (77, "skipped", "no luck")],
)
def test_a_part_that_does_not_finish_is_recorded_with_its_rows(
    tmp_path, monkeypatch, exit_code, status, message
):
    monkeypatch.setattr(EndedPart, "code", exit_code)
    for name in ("parts", "logs"):
        (tmp_path / name).mkdir()
    part = Part("some", "Some", 1, "machine:measure")
    entry = Runner("cuda", "full", tmp_path, tmp_path, EndedPart).run(part, 0.0)
    assert (entry["status"], entry["tables"]) == (status, {"rows": [{"a": 1, "b": "inf"}]})
    assert message in entry["message"]
    report = {
        "machine": "M", "started": "S", "seconds": 1, "commit": "c" * 40, "device": "cuda",
        "uncommitted changes": True, "scale": "full", "parts": {"some": entry},
    }  # fmt: skip
    table = to_markdown(report)
    assert message in table
    assert "| 1 | inf |" in table
    assert "nothing about a GPU" not in table


def test_without_a_gpu_the_program_says_so(tmp_path, capsys):
    assert program.main(["--output", str(tmp_path)]) == 2
    assert "--device cpu --scale tiny" in capsys.readouterr().err


def test_the_parts_fit_the_limit_at_their_expected_durations():
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert PARTS[1].name.startswith("step")  # what is most important comes first
    assert FULL.samples_per_step % max(FULL.micro_batch_sizes) == 0


class SessionOnPaper:
    """A session whose steps wait once, and whose micro-batches of 8 are too large."""

    def __init__(self, *arguments):
        words = ["--config", "llm-jp-3-1.8b", "--global-batch-size", "16", "--bf16"]
        self.config, self.parameters = parse(words).config, 1_868_000_000
        self.device = Device("cuda", "nccl", "NVIDIA H200")
        self.tokens_per_step, self.layer_classes = 16 * 4096, "Linear"

    def use_micro_batch_size(self, size):
        self.config = replace_fields(self.config, micro_batch_size=size)

    def step(self):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        if self.config.training.micro_batch_size == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def close(self):
        pass


@pytest.fixture
def h200(monkeypatch):
    """Replace the functions of torch.cuda that the parts call by those of an idle H200."""
    gigabytes = 10**9
    functions = {
        "synchronize": lambda: None, "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None, "set_sync_debug_mode": lambda mode: None,
        "max_memory_allocated": lambda: 78 * gigabytes, "memory_allocated": lambda: 0,
        "memory_reserved": lambda: 90 * gigabytes,
        "mem_get_info": lambda: (50 * gigabytes, 143 * gigabytes),
    }  # fmt: skip
    for function, replacement in functions.items():
        monkeypatch.setattr(torch.cuda, function, replacement)
    monkeypatch.setattr(step, "Session", SessionOnPaper)


def test_a_step_on_a_gpu(tmp_path, h200):
    results = Results(tmp_path / "step.json")
    step.measure(Context("cuda", FULL, tmp_path, results), "llm-jp-3-1.8b")
    speeds = results.tables["speed and memory"]
    assert [row["micro-batch size"] for row in speeds] == [4, 1, 2, 8]  # 16 is not tried
    assert speeds[-1]["s per step"].startswith("out of memory")
    # 78 GB of tensors and 143 - 50 - 90 = 3 GB of CUDA's own.
    assert [(row["fits 80 GB"], row["fits 141 GB"]) for row in speeds[:3]] == [("no", "yes")] * 3
    first = speeds[0]
    flops = step_flops(replace_fields(SessionOnPaper().config, micro_batch_size=4), 16)
    assert first["TFLOP/s"] == pytest.approx(flops / first["s per step"] / 1e12)
    assert first["MFU"] == f"{first['TFLOP/s'] / 989.4:.1%}"
    assert speeds[2]["predicted GB"] < first["predicted GB"]
    (place,) = results.tables["lines that wait"]
    assert place["per step"] == 1
    assert "test_gpu.py" in place["line"]
    assert {row["per step"] for row in results.tables["host waits"]} == {0.0}
    assert "the profiler recorded no kernel" in results.notes


@pytest.mark.parametrize(("free", "size"), [(141, 4), (100, 2), (70, 1)])
def test_the_comparison_fits_the_gpu(tmp_path, h200, monkeypatch, free, size):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 10**9, 141 * 10**9))
    context = Context("cuda", FULL, tmp_path, Results(tmp_path / "compare.json"))
    assert compare._micro_batch_size(context, SessionOnPaper()) == size


def event(category, name, start, duration):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}


def test_a_trace_is_summarized():
    events = [
        {"ph": "M", "name": "process_name"},
        event("cpu_op", "aten::mm", 0, 1000),
        event("kernel", "gemm", 0, 600),
        event("kernel", "gemm", 500, 500),  # overlaps on another stream
        event("kernel", "norm" + "x" * 200, 1500, 300),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 1800, 200),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1900, 100),
        event("cuda_runtime", "cudaStreamSynchronize", 10, 4000),
        event("cuda_runtime", "cudaStreamSynchronize", 5000, 2000),
        event("cuda_runtime", "cudaMalloc", 0, 5),
        event("cuda_runtime", "cudaMemcpyAsync", 0, 5),
    ]
    found = summarize(events, steps=2)
    waits = {row["call"]: (row["per step"], row["ms per step"]) for row in found.waits}
    assert waits["cudaStreamSynchronize"] == (1.0, 3.0)
    assert waits["cudaDeviceSynchronize"] == (0.0, 0.0)
    assert waits["cudaMalloc"][0] == 0.5
    assert waits["copies from or to pageable memory"] == (0.5, 0.1)
    assert [row["kernel"][:4] for row in found.kernels] == ["gemm", "norm", "Memc", "Memc"]
    assert found.kernels[0]["share of GPU time"] == "64.7%"  # 1100 of 1700
    assert found.kernels[0]["per step"] == 1.0
    assert "2 kernels" in found.note
    assert "75.0%" in found.note  # 1500 of 2000


def test_the_wheels_have_all_their_requirements():
    brought = {name(p) for p in (*wheels.TRAINING, *wheels.COMPARISON)}
    available = brought | requirements("torch") | {"torch"}
    missing = {
        needed
        for package in brought
        for needed in requirements(package)
        if needed not in available and needed not in wheels.NOT_IMPORTED
    }
    assert missing == set()


def requirements(package):
    """Names of the packages that an installed package requires on this machine."""
    from packaging.requirements import Requirement

    found = map(Requirement, importlib.metadata.requires(package) or ())
    return {name(r.name) for r in found if r.marker is None or r.marker.evaluate({"extra": ""})}


def name(package):
    return package.lower().replace("_", "-")


def test_the_wheels_are_those_of_the_tested_versions(tmp_path):
    words = wheels.pip_command(tmp_path, "3.12")
    assert f"megatron-core=={importlib.metadata.version('megatron-core')}" in words
    assert {"--no-deps", "cp312", "--only-binary=:all:"} <= set(words)
    assert not [word for word in words if word.startswith(("torch", "triton", "nvidia"))]
