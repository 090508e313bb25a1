"""The whole check with a process per node and real gloo: fit, sick and silent nodes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from pathlib import Path

import pytest

from megatron_llmjp.parallel.launcher import free_port
from megatron_llmjp.preflight import cli, node_check
from megatron_llmjp.preflight.settings import Thresholds
from tests.support.forks import Fork
from tests.support.processes import run_ranks
from tests.support.timeouts import PROCESS_TIMEOUT, TIMEOUT

SMALL = ["--device", "cpu", "--free-disk-gb", "0.001", "--disk-mib", "1", "--cpu-message-mib", "1"]
LIMITS = {"total": 2.0, "answer": 1.0, "local": 1.0, "command": 1.0, "link": 0.1}
PATIENT = [f"--{name}-seconds={part * PROCESS_TIMEOUT}" for name, part in LIMITS.items()]


def be_node(folder: str, sick: int | None, flags: list[str] | None = None) -> tuple[int, str]:
    """Check a node whose name is its rank; return exit code and output."""
    rank = os.environ["RANK"]
    os.environ |= {"SLURMD_NODENAME": f"n{rank}", "LOCAL_RANK": "0"}
    # Processes that share a loaded machine differ by any ratio.
    fair = Thresholds(cpu_link_ratio=1e9, cpu_gemm_ratio=0.0, disk_ratio=0.0)
    cli.Thresholds = lambda: fair  # type: ignore[assignment, misc]
    if int(rank) == sick:
        os.environ["GLOO_SOCKET_IFNAME"] = "none0"
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = cli.main(["--folder", folder, "--save", folder, *SMALL, *PATIENT, *(flags or [])])
    return code, output.getvalue()


def be_silent_node(folder: str, flags: list[str]) -> None:
    """Check a node that stops answering in its first test with another one."""
    node_check._test = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)  # type: ignore[assignment]
    be_node(folder, None, flags)


def read_report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_fit_nodes_pass(tmp_path):
    results = run_ranks(be_node, 3, str(tmp_path), None)
    assert [code for code, _ in results] == [0, 0, 0] and results[1][1] == ""
    table = results[0][1].splitlines()
    assert [line.split()[-1] for line in table[1:4]] == ["ok"] * 3
    assert "preflight: 3 nodes passed; slowest link" in table[-1]
    report = read_report(tmp_path)
    assert report["fit"] and report["unfit"] == {} and report["common"] == []
    assert report["network"]["all_reduce"]["nodes"] == 3
    assert len(report["network"]["pairs"]) == 2 == report["network"]["rounds"]
    assert all(node["gemm_tflops"][0] > 0 for node in report["nodes"].values())
    assert not list(tmp_path.glob(".preflight-*"))


@pytest.mark.parametrize("sick", [0, 2])
def test_a_node_with_broken_links_is_found(tmp_path, sick):
    results = run_ranks(be_node, 4, str(tmp_path), sick)
    assert [code for code, _ in results] == [1, 0, 0, 0]
    report = read_report(tmp_path)
    assert list(report["unfit"]) == [f"n{sick}"] and report["common"] == []
    assert "communication failed with 2 other nodes" in report["unfit"][f"n{sick}"][0]
    assert report["network"]["all_reduce"]["nodes"] == 3 and report["network"]["all_reduce"]["gbs"]


@pytest.mark.long
def test_silent_nodes_are_found_and_the_others_are_tested(tmp_path):
    """n2 never starts; n3 stops during the tests."""
    seconds = str(TIMEOUT / 15)
    flags = ["--answer-seconds", seconds, "--link-seconds", seconds]
    env = {**os.environ, "WORLD_SIZE": "5", "MASTER_ADDR": "127.0.0.1"}
    env["MASTER_PORT"] = str(free_port())
    nodes = {}
    for rank in (0, 1, 3, 4):
        function, arguments = (be_silent_node, (flags,)) if rank == 3 else (be_node, (None, flags))
        call = (str(tmp_path), *arguments)
        nodes[rank] = Fork(function, *call, env={**env, "RANK": str(rank)})
    try:
        for rank in (0, 1, 4):
            assert nodes[rank].wait() == 0, nodes[rank].stderr
    finally:
        for node in nodes.values():
            node.kill_all()
    (tmp_path / "n2.log").write_text("slurmstepd: error: execve(): No such file\n")
    assert cli.main(["report", "--folder", str(tmp_path), "--nodes", "n0,n1,n2,n3,n4"]) == 1
    report = read_report(tmp_path)
    # On a busy machine a transfer of 2 ms may take four times as long.
    silent = {n: why for n, why in report["unfit"].items() if "its links take" not in why[0]}
    assert silent == {
        "n2": ["no response. Its output ends with: slurmstepd: error: execve(): No such file"],
        "n3": ["stopped answering during a test with another node"],
    }
    assert report["common"] == [] and report["network"]["all_reduce"]["nodes"] == 3
