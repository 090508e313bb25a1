"""Tasks of an array: balance, lost parts, one writer per part, one merge and one table."""

from __future__ import annotations

import csv
import gzip
import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_tools import preprocess_data
from data_tools.preprocess.array import task as array_task
from data_tools.preprocess.array.parts import array_folder
from data_tools.preprocess.array.shards import ShardPlan, part_prefix
from data_tools.preprocess.input.sources import find_input
from data_tools.preprocess.job.work_folder import WorkFolder
from data_tools.statistics.summary import summarize
from megatron_llmjp.data.indexed_dataset_writer import IndexedDatasetWriter
from tests.data_tools.conftest import make_documents, write_jsonl
from tests.support.processes import ROOT
from tests.support.timeouts import PROCESS_TIMEOUT

PROGRAM = [sys.executable, "-m", "data_tools.preprocess_data"]
BYTES = ["--tokenizer-type", "ByteLevelTokenizer", "--append-eod", "--workers", "1"]


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory) -> Path:
    """One large plain file, one large file of several streams, and small ones."""
    folder = tmp_path_factory.mktemp("array_corpus")
    write_jsonl(folder / "a.jsonl", make_documents(150, seed=1))
    large = write_jsonl(folder / "b.jsonl", make_documents(200, seed=2)).read_bytes()
    pieces = [large[at : at + 9000] for at in range(0, len(large), 9000)]
    (folder / "b.jsonl.gz").write_bytes(b"".join(map(gzip.compress, pieces)))
    (folder / "b.jsonl").unlink()
    for at in range(5):
        write_jsonl(folder / f"c{at}.jsonl", make_documents(15, seed=9 + at))
    with (folder / "c0.jsonl").open("a") as file:
        file.write("broken\n")
    return folder


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr("data_tools.preprocess.array.shards.MIN_SPLIT_BYTES", 1000)
    monkeypatch.setattr("data_tools.preprocess.input.blocks.BLOCK_BYTES", 8000)


def arguments(folder: Path, prefix: Path, number: int, count: int, *more: str) -> list[str]:
    words = ["--input", str(folder), "--output-prefix", str(prefix), *BYTES, "--on-error", "skip"]
    words += ["--max-rejected", "50%", *more]
    return words if count == 0 else [*words, "--shard", f"{number}/{count}", "--finish-array"]


@pytest.fixture(scope="module")
def whole(corpus_folder, tmp_path_factory) -> Path:
    """Output of one task, with its table."""
    folder = tmp_path_factory.mktemp("whole")
    report = ["--report", str(folder / "t.csv")]
    assert preprocess_data.main(arguments(corpus_folder, folder / "o", 0, 0, *report)) == 0
    return folder


def assert_same(prefix: Path, whole: Path) -> None:
    for suffix in ("bin", "idx"):
        merged = prefix.with_name(f"{prefix.name}_text_document.{suffix}").read_bytes()
        assert merged == (whole / f"o_text_document.{suffix}").read_bytes()


def test_parts_have_equal_amounts_of_text(corpus_folder):
    plan = ShardPlan(find_input([str(corpus_folder)]).sources, 16)
    weights = []
    for number in range(16):
        sources = plan.part(number)
        weights.append(sum(s.length * (8 if s.name.endswith("gz") else 1) for s in sources))
    # gzip compresses these texts eightfold, more or less; streams and lines are cut at read time.
    assert max(weights) < 1.6 * sum(weights) / 16


def test_one_task_finishes_all_parts_and_the_table_is_that_of_one_job(
    corpus_folder, whole, tmp_path, capsys
):
    report = ["--report", str(tmp_path / "t.csv")]
    assert preprocess_data.main(arguments(corpus_folder, tmp_path / "o", 3, 6, *report)) == 0
    assert "All 6 parts are complete and merged" in capsys.readouterr().out
    assert_same(tmp_path / "o", whole)
    assert list(csv.DictReader((tmp_path / "t.csv").open())) == list(
        csv.DictReader((whole / "t.csv").open())
    )
    made = json.loads((tmp_path / "o_text_document.json").read_text())
    alone = json.loads((whole / "o_text_document.json").read_text())
    assert made["tallies"] == alone["tallies"]
    assert made["statistics"] == alone["statistics"]
    assert (made["bin"], made["idx"]) == (alone["bin"], alone["idx"])

    before = (tmp_path / "o_text_document.json").stat().st_mtime_ns
    assert preprocess_data.main(arguments(corpus_folder, tmp_path / "o", 5, 6)) == 0
    assert "Already complete: all parts are merged" in capsys.readouterr().out
    assert (tmp_path / "o_text_document.json").stat().st_mtime_ns == before
    for part in tmp_path.glob("o_part*"):
        part.unlink()
    assert preprocess_data.main(arguments(corpus_folder, tmp_path / "o", 0, 6, *report)) == 0
    assert len(list(csv.DictReader((tmp_path / "t.csv").open()))) == 8
    assert not list(tmp_path.glob("*.partial"))


def test_merged_parts_are_counted_once(corpus_folder, tmp_path):
    assert preprocess_data.main(arguments(corpus_folder, tmp_path / "o", 0, 3)) == 0
    prefixes = sorted(str(path.with_suffix("")) for path in tmp_path.glob("*.idx"))
    assert len(prefixes) == 4
    summary = summarize(prefixes)
    alone = summarize([str(tmp_path / "o_text_document")])
    assert summary.total == alone.total
    assert any("3 parts are merged in it" in text for text in summary.warnings)
    (tmp_path / "o_text_document.idx").unlink()
    assert summarize([p for p in prefixes if "o_part" in p]).total == alone.total


class Killed(BaseException):
    """Simulates kill -9."""


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (IndexedDatasetWriter, "add", 40),
        (IndexedDatasetWriter, "finish", 3),
        (Path, "replace", 40),
        (Path, "rename", 3),
    ],
)
def test_kills_of_tasks(owner, name, calls, corpus_folder, whole, tmp_path, monkeypatch):
    """Tasks die in random calls, one after the other; the next ones take over."""
    original, draw = getattr(owner, name), random.Random(name)
    code, kills = None, 0
    for attempt in range(200):
        left = [draw.randint(1, calls)]

        def dying(self, *args, _left=left, **kwargs):
            _left[0] -= 1
            if _left[0] == 0 and draw.random() < 0.5:
                raise Killed
            result = original(self, *args, **kwargs)
            if _left[0] == 0:
                raise Killed
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying)
            patch.setattr("data_tools.preprocess.job.job.SECONDS_BETWEEN_SAVES", 0.0)
            try:
                words = arguments(corpus_folder, tmp_path / "o", attempt % 4, 4)
                code = preprocess_data.main(words)
                break
            except Killed:
                kills += 1
    assert code == 0 and kills
    assert_same(tmp_path / "o", whole)


def test_kill_9_of_real_tasks(corpus_folder, whole, tmp_path):
    """Two tasks at once are killed at random moments, and started again until one has merged."""
    draw = random.Random(5)
    for attempt in range(8):
        tasks = [
            subprocess.Popen(
                [*PROGRAM, *arguments(corpus_folder, tmp_path / "o", number, 4)],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for number in (attempt % 4, (attempt + 1) % 4)
        ]
        if attempt < 2:
            time.sleep(draw.uniform(0.3, 0.9))
            tasks[attempt % 2].send_signal(signal.SIGKILL)
        for task in tasks:  # returns when the last worker has closed the inherited stderr
            _, err = task.communicate(timeout=PROCESS_TIMEOUT)
            assert task.returncode in (0, -signal.SIGKILL), err.decode()
        if attempt >= 2 and (tmp_path / "o_text_document.idx").exists():
            break
    assert_same(tmp_path / "o", whole)


def _hold(folder: Path, ready: multiprocessing.synchronize.Event) -> None:
    held = WorkFolder(folder)
    ready.set()
    time.sleep(PROCESS_TIMEOUT)
    held.release()


@contextmanager
def held_by_another(folder: Path) -> Iterator[multiprocessing.Process]:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(folder, ready))
    holder.start()
    assert ready.wait(PROCESS_TIMEOUT)
    try:
        yield holder
    finally:
        holder.kill()
        holder.join()


def test_a_part_in_other_hands_is_not_written_until_its_process_dies(
    corpus_folder, whole, tmp_path, monkeypatch, capsys
):
    prefix = tmp_path / "o"
    folder = Path(f"{part_prefix(str(prefix), 1, 3)}.partial")
    looks = []
    with held_by_another(folder) as holder:

        def wait(seconds: float) -> None:
            looks.append(sorted(path.name for path in folder.iterdir()))
            assert not list(tmp_path.glob("o_part00001*.idx"))
            assert not (tmp_path / "o_text_document.idx").exists()
            if len(looks) == 2:
                holder.kill()
                holder.join()

        monkeypatch.setattr(array_task.ArrayTask.__init__, "__defaults__", (wait,))
        assert preprocess_data.main(arguments(corpus_folder, prefix, 0, 3)) == 0
    assert looks == [[".run.json", ".run.lock"]] * 2  # nothing was written
    assert "Processing part 1 of 3 as well: dead (process" in capsys.readouterr().err
    assert_same(prefix, whole)


def test_only_one_task_waits_and_merges(corpus_folder, tmp_path, capsys):
    prefix = tmp_path / "o"
    with held_by_another(array_folder(str(prefix))):
        assert preprocess_data.main(arguments(corpus_folder, prefix, 0, 2)) == 0
    assert "No part is left for this task; process" in capsys.readouterr().err
    assert not (tmp_path / "o_text_document.idx").exists()
    assert preprocess_data.main(arguments(corpus_folder, prefix, 1, 2)) == 0
    assert (tmp_path / "o_text_document.idx").exists()


def test_a_failed_part_prevents_the_merge(corpus_folder, tmp_path, capsys):
    """Other tasks do not repeat it; its own task does."""
    bad = tmp_path / "in"
    shutil.copytree(corpus_folder, bad)
    with (bad / "c4.jsonl").open("a") as file:
        file.write('{"text": 5}\n')
    (bad / "c0.jsonl").write_bytes((bad / "c0.jsonl").read_bytes().replace(b"broken\n", b""))
    words = [word if word != "skip" else "stop" for word in arguments(bad, tmp_path / "o", 0, 3)]
    assert preprocess_data.main(words) == 2
    err = capsys.readouterr().err
    assert "1 of 3 parts are not complete" in err and "--array=2" in err
    assert "c4.jsonl" in err and "not a string" in err
    assert not (tmp_path / "o_text_document.idx").exists()
    assert preprocess_data.main(words) == 2  # not repeated: reported again
    assert "Processing part 2" not in capsys.readouterr().err
    lines = (bad / "c4.jsonl").read_bytes().splitlines(keepends=True)
    (bad / "c4.jsonl").write_bytes(b"".join(lines[:-1]) + b" " * (len(lines[-1]) - 1) + b"\n")
    again = [word.replace("0/3", "2/3") for word in words]
    assert preprocess_data.main(again) == 0
    assert preprocess_data.main([*words[:-3], "--output-prefix", str(tmp_path / "w" / "o")]) == 0
    assert_same(tmp_path / "o", tmp_path / "w")


def test_other_options_arrays_and_outputs_are_refused(corpus_folder, tmp_path, capsys):
    prefix = tmp_path / "o"
    assert preprocess_data.main(arguments(corpus_folder, prefix, 0, 2)[:-1]) == 0  # one part
    without = [word for word in arguments(corpus_folder, prefix, 1, 2) if word != "--append-eod"]
    assert preprocess_data.main(without) == 2
    assert "was written with another input, tokenizer or other options" in capsys.readouterr().err
    assert preprocess_data.main(arguments(corpus_folder, prefix, 1, 5)) == 2
    assert "there are parts of an array of 2 tasks" in capsys.readouterr().err
    assert preprocess_data.main(arguments(corpus_folder, prefix, 0, 2, "--overwrite")) == 2
    assert "mutually exclusive" in capsys.readouterr().err
    (tmp_path / "o_text_document.bin").write_bytes(b"")
    assert preprocess_data.main(arguments(corpus_folder, prefix, 0, 2)) == 2
    assert "but not as the merged output of this array" in capsys.readouterr().err
    assert preprocess_data.main([*arguments(corpus_folder, prefix, 0, 0), "--finish-array"]) == 2
    assert "--finish-array requires --shard" in capsys.readouterr().err


def test_a_part_that_is_lost_without_progress_is_given_up(
    corpus_folder, tmp_path, monkeypatch, capsys
):
    """For example because its text needs more memory than there is."""
    prefix = tmp_path / "o"
    part = arguments(corpus_folder, prefix, 1, 2)[:-1]
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr("data_tools.preprocess.job.job.PreprocessJob._encode_all", _die)
            with pytest.raises(Killed):
                preprocess_data.main(part)
        folder = Path(f"{part_prefix(str(prefix), 1, 2)}.partial")
        assert json.loads((folder / "status.json").read_text())["stage"] == "starting"
    assert preprocess_data.main(arguments(corpus_folder, prefix, 0, 2)) == 2
    assert "part 1" in capsys.readouterr().err
    assert preprocess_data.main(arguments(corpus_folder, prefix, 1, 2)) == 0  # its own task does


def _die(*_: object) -> None:
    raise Killed
