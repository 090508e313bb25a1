"""Conversions that are divided over tasks: disjoint files, lost tasks, one publication."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_llmjp.convert.cli import main
from megatron_llmjp.convert.conversion import plan_conversion
from megatron_llmjp.convert.copying.sharded_conversion import ShardedConversion
from megatron_llmjp.convert.copying.sharding import files_of_shard, share_evenly
from megatron_llmjp.convert.formats.base import ConversionOptions
from tests.convert.hf_models import llama
from tests.convert.test_block_copy import FIXTURE, same_files
from tests.convert.test_checksums import flip
from tests.support.timeouts import PROCESS_TIMEOUT, wait_until

COUNT = 3


@pytest.fixture
def hf(tmp_path) -> Path:
    model = llama(rope_theta=10000.0, num_key_value_heads=8)
    model.save_pretrained(tmp_path / "hf", max_shard_size="100kB")
    return tmp_path / "hf"


def words(source: Path, output: Path, target: str = "native", *flags: object) -> list[object]:
    size = ("--max-shard-size", "100kB")
    return ["--to", target, "--input", source, "--output", output, *size, *flags]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


TARGETS = {
    "native": [],
    "hf": [],
    "megatron-lm": [],
    "megatron-lm torch": [
        "--ckpt-format",
        "torch",
        "--target-tensor-parallel-size",
        2,
        "--target-pipeline-parallel-size",
        3,
    ],
    "megatron-deepspeed": ["--target-tensor-parallel-size", 2],
}


@pytest.mark.parametrize("target", TARGETS)
def test_tasks_in_any_order_write_what_one_conversion_writes(tmp_path, hf, convert, target):
    flags = (target.split()[0], *TARGETS[target])
    convert(*words(hf, tmp_path / "whole", *flags))
    for number in (2, 0, 1):
        assert not (tmp_path / "o").exists()
        text = convert(*words(hf, tmp_path / "o", *flags, "--shard", f"{number}/{COUNT}"))
    assert "o is complete" in text
    same_files(tmp_path / "o", tmp_path / "whole")
    assert names(tmp_path) == [".o.plan.json", "hf", "o", "whole"]
    again = convert(*words(hf, tmp_path / "o", *flags, "--shard", f"1/{COUNT}"))
    assert "wrote 0.000 GB" in again and "o is complete" in again


def test_an_output_of_another_conversion_is_refused(tmp_path, hf, convert):
    """Not taken for this one, though its files have the same names and sizes."""
    convert(*words(hf, tmp_path / "o"))
    flags = ("native", "--shard", "0/1")
    assert "already exists" in convert(*words(hf, tmp_path / "o", *flags), code=2)
    convert(*words(hf, tmp_path / "p", *flags))
    weights = next(hf.glob("*.safetensors"))
    os.utime(weights, ns=(1, 1))
    assert "already exists" in convert(*words(hf, tmp_path / "p", *flags), code=2)


def test_optimizer_state_and_checksums_of_the_source_are_divided(tmp_path, convert):
    source = tmp_path / "native"
    convert("--to", "native", "--with-optimizer", "--max-shard-size", "20kB", "--input", FIXTURE,
            "--output", source)  # fmt: skip
    convert(*words(source, tmp_path / "whole", "hf"))
    for number in range(COUNT):
        convert(*words(source, tmp_path / "o", "hf", "--shard", f"{number}/{COUNT}"))
    same_files(tmp_path / "o", tmp_path / "whole")
    plan = plan_conversion("native", "hf", source, ConversionOptions())
    for path in sorted(found.path for found in plan.checksum_ranges())[::3]:
        flip(path, path.stat().st_size // 2)
        codes = [
            main([str(w) for w in words(source, tmp_path / "x", "hf", "--shard", f"{n}/{COUNT}")])
            for n in range(COUNT)
        ]
        assert sorted(codes) == [0, 0, 2]  # one task verifies each file
        assert not (tmp_path / "x").exists()
        flip(path, path.stat().st_size // 2)
        os.utime(path, ns=(0, 0))
        for leftover in tmp_path.glob(".x.shards"):
            leftover.rename(tmp_path / f"old-{path.name}")


def test_files_are_disjoint_and_shares_are_even(hf):
    plan = plan_conversion("hf", "native", hf, ConversionOptions(max_shard_size=30_000))
    files = plan.output.files
    shares = [files_of_shard(files, plan.copies, n, COUNT) for n in range(COUNT)]
    assert sorted(f.name for share in shares for f in share) == sorted(f.name for f in files)
    sizes = [sum(file.size for file in share) for share in shares]
    assert max(sizes) - min(sizes) < 2 * max(file.size for file in files)
    for sizes, count in (([], 3), ([0, 0], 2), ([5], 4), ([1] * 7, 7), ([9, 1, 1, 1], 2)):
        found = [share_evenly(sizes, n, count) for n in range(count)]
        assert [i for share in found for i in share] == list(range(len(sizes)))


def test_a_lost_task_continues_with_its_incomplete_files(tmp_path, hf, convert):
    convert(*words(hf, tmp_path / "whole"))
    convert(*words(hf, tmp_path / "o", "native", "--shard", "0/2"))
    text = convert(*words(hf, tmp_path / "o", "native", "--shard", "0/2"))
    assert "wrote 0.000 GB" in text and "files are incomplete" in text
    work = tmp_path / ".o.shards"
    complete = {path: path.stat().st_mtime_ns for path in work.glob("output/*/*")}
    victim = sorted(complete)[0]
    plan = plan_conversion("hf", "native", hf, ConversionOptions(max_shard_size=100_000))
    index = [Path(file.name).name for file in plan.output.files].index(victim.name)
    (work / "records" / f"file-{index:05d}.json").unlink()
    victim.write_bytes(b"half")  # as left by a kill
    convert(*words(hf, tmp_path / "o", "native", "--shard", "0/2"))
    rewritten = {p for p, time in complete.items() if p.stat().st_mtime_ns != time}
    assert rewritten == {victim}
    convert(*words(hf, tmp_path / "o", "native", "--shard", "1/2"))
    same_files(tmp_path / "o", tmp_path / "whole")


def test_the_number_of_tasks_may_change(tmp_path, hf, convert):
    convert(*words(hf, tmp_path / "whole"))
    convert(*words(hf, tmp_path / "o", "native", "--shard", "2/4"))
    convert(*words(hf, tmp_path / "o", "native", "--shard", "0/1"))
    same_files(tmp_path / "o", tmp_path / "whole")


def test_other_arguments_and_a_changed_source_are_refused(tmp_path, hf, convert):
    convert(*words(hf, tmp_path / "o", "native", "--shard", "0/2"))
    other = words(hf, tmp_path / "o", "native", "--dtype", "bf16", "--shard", "1/2")
    assert "unfinished conversion with other arguments" in convert(*other, code=2)
    os.utime(next(hf.glob("*.safetensors")), ns=(0, 0))
    text = convert(*words(hf, tmp_path / "o", "native", "--shard", "1/2"), code=2)
    assert ".o.shards: contains an unfinished conversion" in text
    assert not (tmp_path / "o").exists()


def test_existing_output_is_kept(tmp_path, hf, convert):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine").write_text("precious")
    text = convert(*words(hf, tmp_path / "o", "native", "--shard", "0/2"), code=2)
    assert "already exists" in text
    assert names(tmp_path / "o") == ["mine"] and names(tmp_path) == ["hf", "o"]


def test_two_tasks_that_publish_at_the_same_time(tmp_path, hf, monkeypatch):
    """On a file system without locks: the first rename decides."""
    monkeypatch.setattr(
        "megatron_llmjp.convert.copying.sharded_conversion.acquire_lock",
        lambda _: type("Lock", (), {"release": lambda *_, **__: None})(),
    )
    options = ConversionOptions(max_shard_size=100_000)
    tasks = [
        ShardedConversion(plan_conversion("hf", "native", hf, options), tmp_path / "o", 0, 1)
        for _ in range(2)
    ]
    published = []

    def verify(folder: Path) -> None:  # the other task publishes meanwhile
        published.append(folder)
        if len(published) == 1:
            assert tasks[1].run(1, True, verify).pending == ""

    assert tasks[0].run(1, True, verify).pending == ""
    assert len(published) == 2
    assert names(tmp_path) == [".o.plan.json", "hf", "o"]
    assert plan_conversion("native", "hf", tmp_path / "o", options).source.iteration == 0


def test_dry_run_prints_the_share_of_a_task(tmp_path, hf, convert):
    text = convert(*words(hf, tmp_path / "o", "native", "--shard", "1/2", "--dry-run"))
    assert "task 1 of 2: " in text and "% of all bytes" in text
    assert names(tmp_path) == ["hf"]


def test_a_task_outside_of_the_range_is_refused(tmp_path, hf, convert):
    assert "task 2 is outside 0 to 1" in convert(
        *words(hf, tmp_path / "o", "native", "--shard", "2/2"), code=2
    )


def test_killed_tasks(tmp_path, hf, convert):
    """Three tasks start together; all are killed at some moment, and repeated."""
    convert(*words(hf, tmp_path / "whole"))

    def start(number: int) -> subprocess.Popen[bytes]:
        command = words(hf, tmp_path / "o", "native", "--workers", 1, "--shard", f"{number}/3")
        program = [sys.executable, "-m", "megatron_llmjp.convert.cli", *map(str, command)]
        return subprocess.Popen(program, stdout=subprocess.DEVNULL)

    tasks = [start(number) for number in range(3)]
    wait_until(lambda: (tmp_path / ".o.shards" / "plan.json").exists(), 0.001)
    for task in random.Random(3).sample(tasks, 2):
        task.send_signal(signal.SIGKILL)
    for task in tasks:
        task.wait(PROCESS_TIMEOUT)
    again = [start(number) for number in range(3)]
    assert [task.wait(PROCESS_TIMEOUT) for task in again] == [0, 0, 0]
    same_files(tmp_path / "o", tmp_path / "whole")
    assert names(tmp_path) == [".o.plan.json", "hf", "o", "whole"]
