"""preprocess_data as an array of a real Slurm, compared with one process."""

from __future__ import annotations

import re
import sys

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
    arguments = [SCRIPT, "--input", corpus, "--output-prefix", part, *BYTES]

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
