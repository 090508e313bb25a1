"""preprocess_data as an array of a real Slurm, compared with one process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from data_tools import merge_datasets, preprocess_data
from tests.data_tools.conftest import make_documents, write_jsonl
from tests.slurm.cluster import Cluster
from tests.support.processes import ROOT

pytestmark = pytest.mark.long

BYTES = ["--tokenizer-type", "ByteLevelTokenizer", "--append-eod"]
SCRIPT = ROOT / "slurm" / "preprocess_data.sh"


def test_array_with_a_missing_task(cluster: Cluster, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for at in range(7):
        write_jsonl(corpus / f"{at}.jsonl", make_documents(30, seed=at))
    (tmp_path / "whole").mkdir()
    whole, part = tmp_path / "whole" / "o", tmp_path / "parts" / "o"
    env = {"MEGATRON_LLMJP": str(ROOT), "PYTHON": sys.executable}
    alone = [SCRIPT, "--input", corpus, "--output-prefix", part, *BYTES]
    arguments = [*alone, "--no-finish-array"]

    incomplete = cluster.submit("--array=1-2", *arguments, cwd=tmp_path, env=env)
    cluster.wait(incomplete)  # the number of tasks of the whole array is unknown
    log = (tmp_path / f"preprocess_data_{incomplete}_1.log").read_text()
    assert cluster.state(incomplete) == "FAILED" and "add --shard slurm/COUNT" in log

    first = ["--array=0,1,3", "--cpus-per-task=2", *arguments, "--shard", "slurm/4"]
    job = cluster.submit(*first, cwd=tmp_path, env=env)
    log = tmp_path / f"preprocess_data_{job}_0.log"
    assert cluster.wait(job) == "COMPLETED", log.read_text()
    assert merge_datasets.main(["--parts", str(part)]) == 2
    message = capsys.readouterr().err
    again = re.search(r"(--array=\S+) slurm/preprocess_data.sh (--shard) (slurm/4)", message)
    assert again is not None, message
    array, *shard = again.groups()
    job = cluster.submit(array, "--cpus-per-task=2", *arguments, *shard, cwd=tmp_path, env=env)
    assert cluster.wait(job) == "COMPLETED"
    assert merge_datasets.main(["--parts", str(part)]) == 0

    assert (
        preprocess_data.main(["--input", str(corpus), "--output-prefix", str(whole), *BYTES]) == 0
    )
    for suffix in ("bin", "idx"):
        name = f"o_text_document.{suffix}"
        assert (part.parent / name).read_bytes() == (whole.parent / name).read_bytes()


def test_an_array_that_loses_a_task(cluster: Cluster, tmp_path):
    """Other tasks finish the lost parts, and one merges; a second submission changes nothing."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for at in range(12):
        write_jsonl(corpus / f"{at:02}.jsonl", make_documents(4000, seed=at))
    prefix = tmp_path / "parts" / "o"
    env = {"MEGATRON_LLMJP": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    arguments = ["--input", corpus, "--output-prefix", prefix, *BYTES]
    words = ["--array=0-5", "--cpus-per-task=1", SCRIPT, *arguments]
    job = cluster.submit(*words, cwd=tmp_path, env=env)
    cluster.wait_for(lambda: bool(owners(prefix)), "a part to be started")
    os.kill(owners(prefix)[0], signal.SIGKILL)  # as the kernel does if memory runs out
    cluster.wait_for(lambda: cluster.state(job) != "RUNNING" and not is_active(cluster, job), "end")
    assert preprocess_data.main(["--status", str(prefix)]) == 0, logs(tmp_path)
    assert "merge" in logs(tmp_path)
    again = cluster.submit(*words, cwd=tmp_path, env=env)
    assert cluster.wait(again) == "COMPLETED"
    assert "Already complete: all parts are merged" in logs(tmp_path)

    (tmp_path / "whole").mkdir()
    whole = tmp_path / "whole" / "o"
    words = ["--input", str(corpus), "--output-prefix", str(whole), *BYTES, "--workers", "1"]
    assert preprocess_data.main(words) == 0
    for suffix in ("bin", "idx"):
        name = f"o_text_document.{suffix}"
        assert (prefix.parent / name).read_bytes() == (whole.parent / name).read_bytes()


def owners(prefix: Path) -> list[int]:
    """Return the processes that write parts."""
    found = []
    for record in prefix.parent.glob(f"{prefix.name}_part0*.partial/.run.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(record.read_text())["pid"])
    return found


def is_active(cluster: Cluster, job: str) -> bool:
    states = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}
    return bool(states & set(cluster.state(job).split(",")))


def logs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("preprocess_data_*.log")))
