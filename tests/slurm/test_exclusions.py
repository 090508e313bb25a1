"""Nodes that a job excludes: evidence, limits, and how the job continues. Without Slurm."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from megatron_llmjp.report.exclusions import Exclusion, read_exclusions
from megatron_llmjp.report.jobs import job_folders
from megatron_llmjp.report.status import read_status
from slurm import allocated_nodes, job_nodes, node_review, requeue
from slurm.exclusions import (
    Decision,
    JobNodes,
    Limits,
    decide_exclusions,
    describe,
    excluded_names,
    record_exclusions,
    still_excluded,
)
from slurm.node_review import NodeReview
from slurm.requeue import END, REQUEUE, RESTART, Next, decide_next
from slurm.sick_nodes import (
    SickNode,
    failed_gpus,
    hung_nodes,
    one_per_node,
    slow_nodes,
    unfit_nodes,
)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"n{i}" for i in range(count))


def sick(*nodes: int, kind: str = "hardware", iteration: int | None = None) -> list[SickNode]:
    return [SickNode(f"n{i}", kind, "GPU is lost", iteration) for i in nodes]


def earlier(*nodes: int, kind: str = "hardware", iteration: int = 0) -> list[Exclusion]:
    return [Exclusion(f"n{i}", "GPU is lost", kind, 0.0, "7", iteration) for i in nodes]


def decided(
    found: list[SickNode], count: int, needed: int, *before: Exclusion, partition_size: int = 0
):
    job = JobNodes(names(count), needed, count, frozenset(names(partition_size)))
    return decide_exclusions(found, job, before, Limits())


def test_spare_nodes_take_the_place_of_sick_ones():
    decision = decided(sick(3), 65, 64)
    assert [node.node for node in decision.excluded] == ["n3"] and decision.action == "restart"
    assert len(decision.healthy) == 64 and "n3" not in decision.healthy and not decision.refusal
    assert decided(sick(3), 64, 64).action == "requeue"
    assert decided([], 65, 64) == Decision(healthy=names(65))
    assert decided(sick(70), 65, 64).excluded == ()  # not a node of this job


def test_no_more_than_a_share_is_excluded():
    """A tenth of the nodes, at least one of several; earlier exclusions count."""
    assert len(decided(sick(*range(6)), 64, 64).excluded) == 6
    refused = decided(sick(*range(7)), 64, 64)
    assert refused.excluded == () and refused.action == "requeue"
    assert refused.refusal.startswith("7 of 64 nodes seem sick, more than 6 (MAX_EXCLUDED_SHARE")
    assert decided(sick(3), 64, 64, *earlier(50, 51, 52, 53, 54)).refusal == ""
    refused = decided(sick(3), 64, 64, *earlier(*range(50, 56)))
    assert "1 of 64 nodes seem sick, 6 other excluded before" in refused.refusal
    assert decided(sick(0), 2, 2).excluded and decided(sick(0, 1), 2, 2).refusal
    assert decided(sick(0), 1, 1).refusal


def test_lost_nodes_are_left_behind_whatever_their_number():
    decision = decided(sick(*range(8), kind="lost"), 64, 64)
    assert len(decision.excluded) == 8 and decision.action == "requeue"
    decision = decided([*sick(0, kind="lost"), *sick(*range(1, 9))], 64, 60)
    assert [node.node for node in decision.excluded] == ["n0"] and decision.refusal
    assert decision.action == "restart" and decision.healthy == names(64)[1:]


def test_a_hang_that_moves_with_the_run_is_its_own():
    before = earlier(1, kind="hang", iteration=70)
    moved = decided(sick(2, kind="hang", iteration=70), 64, 64, *before)
    assert moved.excluded == () and "hung at iteration 70 on n1 before" in moved.refusal
    for found in (sick(2, kind="hang", iteration=71), sick(2), sick(1, kind="hang", iteration=70)):
        assert decided(found, 64, 64, *before).excluded


def test_a_partition_without_other_nodes_cannot_replace_one():
    """A requeued job would wait for ever: it continues on fewer nodes."""
    assert decided(sick(0), 64, 64, partition_size=65).action == "requeue"
    decision = decided(sick(0), 64, 64, partition_size=64)
    assert decision.action == "fewer" and decision.healthy == names(64)[1:]
    assert decided(sick(0), 64, 64, *earlier(64), partition_size=65).action == "fewer"
    assert decided(sick(0), 65, 64, partition_size=65).action == "restart"
    # After a restart on 64 of its 65 nodes it still gets 65 when it is requeued.
    job = JobNodes(names(64), 64, 65, frozenset(names(65)))
    assert decide_exclusions(sick(0), job, [], Limits()).action == "fewer"


def test_how_a_job_continues():
    left, refused = decided(sick(0), 3, 2), decided(sick(0, 1), 3, 2)
    away = decided(sick(0), 2, 2)
    again, over = Next(REQUEUE, "failed; requeued: there is a new checkpoint"), Next(END, "over")

    def after(decision: Decision, history: Next, preflight: bool = False, **k: str):
        return decide_next(preflight, NodeReview(decision, **k), history)

    assert after(left, again).code == RESTART and "restarted in this job" in after(left, again).why
    assert after(left, over) == over and after(refused, again) == again
    assert after(left, over, preflight=True).code == RESTART
    assert after(away, again, preflight=True) == again and after(away, over, preflight=True) == over
    for failed in (refused, Decision(healthy=names(3))):
        assert after(failed, again, preflight=True).code == END
    common = after(away, again, preflight=True, common="no node answered")
    assert common == Next(END, "not requeued: the preflight check failed: no node answered")


def test_exclusions_end_after_a_day(tmp_path: Path):
    record_exclusions(tmp_path, sick(1, kind="hang", iteration=70), "7", 60)
    record_exclusions(tmp_path, sick(2), "8", 60)
    with (tmp_path / "exclusions.jsonl").open("a") as stream:
        stream.write('{"node": "n5"}\nnull\n{"node": "n3", "reason": "old", "kind": "hang", ')
        stream.write(f'"time": {time.time() - 90000}, "job": "7"}}\n')
    found = read_exclusions(tmp_path)
    assert [(e.node, e.job, e.iteration) for e in found] == [
        ("n1", "7", 70), ("n2", "8", 60), ("n3", "7", 0),
    ]  # fmt: skip
    now = time.time()
    assert [e.node for e in still_excluded(found, "7", Limits(), now)] == ["n1"]


def test_a_requeued_job_gets_its_nodes():
    """The user's exclusions stay; of others, the oldest that Slurm needs are dropped."""
    before = earlier(1, 2, 9, 3)

    def excluded(available: int) -> tuple[list[str], list[str]]:
        job = JobNodes(names(4), 4, 4, frozenset(names(available)) - {"n0"})
        return excluded_names(["n0"], before, job)

    assert excluded(8) == (["n0", "n1", "n2", "n9", "n3"], [])
    assert excluded(0) == excluded(8)  # unknown
    assert excluded(7) == (["n0", "n2", "n9", "n3"], ["n1"])
    assert excluded(6) == (["n0", "n9", "n3"], ["n1", "n2"])  # n9 is down: it would not help


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_evidence_of_preflight(tmp_path: Path):
    assert unfit_nodes(tmp_path) == ([], "")
    report = {"unfit": {"n1": ["7 of 8 GPUs", "its clock is off"]}, "common": [], "notes": ["x"]}
    write(tmp_path / "preflight" / "report.json", report)
    assert unfit_nodes(tmp_path) == (
        [SickNode("n1", "preflight", "7 of 8 GPUs; its clock is off")],
        "",
    )
    write(tmp_path / "preflight" / "report.json", {"common": ["no node answered"]})
    assert unfit_nodes(tmp_path) == ([], "no node answered")


def test_evidence_of_a_hang(tmp_path: Path):
    """Only of this start; ranks of unknown hosts are no evidence against a node."""
    suspects = [
        {"rank": 2, "host": "n1", "why": "no response"},
        {"rank": 3, "host": "n1", "why": "no response"},
        {"rank": 4, "host": "", "why": "no response"},
    ]
    path = tmp_path / "hang" / "suspects.json"
    assert hung_nodes(tmp_path, 0.0) == []
    write(path, {"iteration": 70, "suspects": suspects})
    reason = "hang at iteration 70: rank 2: no response"
    assert hung_nodes(tmp_path, 0.0) == [SickNode("n1", "hang", reason, 70)]
    os.utime(path, (1000.0, 1000.0))
    assert hung_nodes(tmp_path, 1001.0) == []
    for damaged in ([], {"iteration": "70", "suspects": suspects}, {"suspects": 3}):
        write(path, damaged)
        assert hung_nodes(tmp_path, 0.0) == []


def test_evidence_of_a_failed_gpu(tmp_path: Path):
    """Errors of the device, not those of the program, on the node of the rank."""
    errors = {0: "CUDA error: out of memory", 5: "CUDA error: uncorrectable ECC error encountered"}
    errors |= {4: "torch.AcceleratorError: CUDA error: device-side assert triggered", 99: errors[5]}
    for rank, text in errors.items():
        (tmp_path / f"rank_{rank:04d}.log").write_text(f"start\n{text}\nmore\n")
    found = failed_gpus(tmp_path, ("n0", "n1", "n3"), 2)
    assert found == [SickNode("n3", "hardware", f"rank 5: {errors[5]}")]


@pytest.mark.parametrize(
    ("shares", "host", "found"),
    [
        ([0.3] * 5, "n2", ["n2"]),
        ([0.0, *[0.3] * 5], "n2", ["n2"]),
        ([0.3] * 4, "n2", []),
        ([0.3, 0.3, 0.05, 0.3, 0.3], "n2", []),
        ([0.3] * 5, "n2, n3", []),
        ([0.3] * 5, None, []),
    ],
)
def test_evidence_of_a_slow_node(tmp_path: Path, shares, host, found):
    rows = [{"lm loss": 1.0, "slowest host": host, "straggler share": share} for share in shares]
    rows.insert(1, {"iteration": 3, "event": "save"})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [node.node for node in slow_nodes(tmp_path, 0.0)] == found
    assert slow_nodes(tmp_path, time.time() + 100) == []


def test_the_first_evidence_of_a_node_is_its_reason():
    both = [*sick(1, kind="lost"), *sick(1, 2)]
    assert one_per_node(both) == [both[0], both[2]]


def test_lines_of_the_log():
    assert describe(Decision(healthy=names(3))) == []
    assert describe(decided(sick(1), 3, 2)) == [
        "n1 is excluded: GPU is lost",
        "continuing in this job on 2 nodes: n0, n2",
    ]
    assert describe(decided(sick(1, 2), 3, 2))[0].startswith("no node is excluded: 2 of 3 nodes")


class FakeSlurm:
    """A job that lost a node; Slurm excludes n9, as the user asked."""

    kept: tuple[str, ...] = ()

    def __init__(self, *_: object) -> None: ...

    def lost_nodes(self, nodes: tuple[str, ...]) -> list[SickNode]:
        return [
            SickNode(node, "lost", "does not respond to srun") for node in nodes if node == "n1"
        ]

    def keep_only(self, nodes: list[str]) -> None:
        FakeSlurm.kept = tuple(nodes)

    def excluded(self) -> list[str]:
        return ["n9"]

    def usable_nodes(self) -> set[str]:
        return set()


def test_records_and_files_of_a_lost_node(tmp_path: Path, monkeypatch, capsys):
    """With a spare node the job restarts, without one it is requeued; n1 is excluded."""
    monkeypatch.setattr(node_review, "SlurmJob", FakeSlurm)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    logs = tmp_path / "logs"
    logs.mkdir()
    common = ["--save", str(tmp_path), "--logs", str(logs), "--code", "1", "--nodes", "n0,n1,n2"]
    assert requeue.main([*common, "--rank-nodes", "n0,n1"]) == RESTART
    assert (logs / "healthy_nodes").read_text() == "n0\nn2\n" and FakeSlurm.kept == ("n0", "n2")
    assert "n1 is excluded: does not respond to srun" in capsys.readouterr().out
    assert requeue.main([*common, "--rank-nodes", "n0,n1,n2"]) == REQUEUE
    assert (logs / "exclude").read_text() == "n9,n1"
    assert requeue.main([*common, "--rank-nodes", "n0,n1"]) == END  # no new checkpoint
    ends = [json.loads(line) for line in (tmp_path / "requeues.jsonl").read_text().splitlines()]
    assert [end["requeued"] for end in ends] == [True, True, False]
    assert [end.get("in this job") for end in ends] == [True, None, None]
    assert ends[0]["excluded"] == [{"node": "n1", "reason": "does not respond to srun"}]
    assert "excluded" not in ends[2]
    assert [e.node for e in read_exclusions(tmp_path)] == ["n1", "n1"]
    off = [*common, "--rank-nodes", "n0,n1", "--exclude-bad-nodes", "0"]
    assert requeue.main(off) == REQUEUE and len(read_exclusions(tmp_path)) == 2


def test_a_preflight_that_goes_on_is_no_end(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(node_review, "SlurmJob", FakeSlurm)
    write(tmp_path / "preflight" / "report.json", {"unfit": {"n1": ["no response"]}})
    common = ["--save", str(tmp_path), "--logs", str(tmp_path), "--code", "1", "--preflight"]
    common += ["--nodes", "n0,n1,n2"]
    assert requeue.main([*common, "--rank-nodes", "n0,n1"]) == RESTART
    assert not (tmp_path / "requeues.jsonl").exists()
    assert [e.node for e in read_exclusions(tmp_path)] == ["n1"]
    write(tmp_path / "preflight" / "report.json", {"common": ["no node answered"]})
    assert requeue.main([*common, "--rank-nodes", "n0,n1"]) == END


def test_a_preflight_that_fails_after_training_is_repeated(tmp_path: Path, monkeypatch):
    """As in an outage of the file system; three failures end the job."""
    monkeypatch.setattr(node_review, "SlurmJob", FakeSlurm)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    write(tmp_path / "preflight" / "report.json", {"common": ["/save cannot be written"]})
    end = {"job": "7", "restart": 0, "iteration": 10, "requeued": True, "exit code": 3}
    (tmp_path / "requeues.jsonl").write_text(json.dumps(end) + "\n")
    monkeypatch.setattr(requeue, "complete_iterations", lambda save: [10])
    command = ["--save", str(tmp_path), "--logs", str(tmp_path), "--code", "1", "--preflight"]
    command += ["--nodes", "n0,n1,n2", "--rank-nodes", "n0,n1"]
    assert [requeue.main(command) for _ in range(3)] == [REQUEUE, REQUEUE, END]
    why = [json.loads(line).get("why") for line in (tmp_path / "requeues.jsonl").open()]
    assert why[1].startswith(
        "the preflight check failed: /save cannot be written; requeued without"
    )
    assert why[3] == "not requeued: the preflight check failed: /save cannot be written"
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert requeue.main(command) == END


def test_status_of_a_run_that_left_a_node(tmp_path: Path):
    """It is shown with its reason, also while the job that left it behind still runs."""
    for name in ("job7_0", "job7_0.1"):
        (tmp_path / "logs" / name).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").touch()
    record_exclusions(tmp_path, sick(1), "7", 60)
    assert read_status(tmp_path).excluded == {"n1": "GPU is lost"}
    assert {(one.job, one.restart) for one in job_folders(tmp_path)} == {("7", 0)}


@pytest.mark.parametrize("code", [1, 3])
def test_no_restart_at_the_time_limit(tmp_path: Path, monkeypatch, capsys, code: int):
    """Slurm signals once: ranks that start later would be killed, and the job not requeued."""
    monkeypatch.setattr(node_review, "SlurmJob", FakeSlurm)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    if code == 1:  # otherwise the ranks have stopped on the signal
        (tmp_path / "time_limit").touch()
    row = {"lm loss": 1.0, "slowest host": "n1", "straggler share": 0.3}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(row)}\n" * 5)
    words = ["--save", str(tmp_path), "--logs", str(tmp_path), "--code", str(code)]
    assert requeue.main([*words, "--nodes", "n0,n1,n2", "--rank-nodes", "n0,n1"]) == REQUEUE
    shown = capsys.readouterr().out
    assert "n1 is excluded: " in shown and "continuing in this job" not in shown


def test_a_job_that_its_scheduler_does_not_continue(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PBS_JOBID", "7.head")
    monkeypatch.setenv("PBS_RESTART_COUNT", "2")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    words = ["--save", str(tmp_path), "--code", "3"]
    assert requeue.main(words) == REQUEUE and requeue.main([*words, "--end", "qsub failed"]) == END
    ends = [json.loads(line) for line in (tmp_path / "requeues.jsonl").read_text().splitlines()]
    assert [(end["job"], end["restart"], end["requeued"]) for end in ends] == [
        ("7.head", 2, True), ("7.head", 2, False),
    ]  # fmt: skip
    assert ends[1]["why"] == "not requeued: qsub failed"


def fake_run(starting: set[str], log: list[int]):
    """Return a stand-in for srun, in which a step of several nodes aborts, and for scontrol."""

    def run(command: list[str], *_: object) -> str:
        if command[0] == "sinfo":
            return "n1|down*|Not responding\nn2|drained|Kill task failed\nn3|idle|none\n"
        if command[0] == "scontrol":
            return (
                "JobId=7 NodeList=n[0-4] Partition=main" if "job" in command else "n0 n1 n2 n3 n4"
            )
        (listed,) = (word for word in command if word.startswith("--nodelist="))
        nodes = listed.removeprefix("--nodelist=").split(",")
        log.append(len(nodes))
        shown = starting & set(nodes) - ({"n3"} if len(nodes) > 1 else set())
        return "".join(f"responds: {node}\n" for node in sorted(shown))

    return run


def test_nodes_without_an_answer_are_probed_on_their_own(tmp_path: Path, monkeypatch):
    """One dead node aborts the step of all: n3 is not lost because it was slower than others."""
    probes: list[int] = []
    monkeypatch.setattr(job_nodes, "PROBE_PAUSE", 0.0)
    monkeypatch.setattr(job_nodes, "_run", fake_run({"n0", "n2", "n3", "n4"}, probes))
    job = job_nodes.SlurmJob("7", tmp_path)
    found = job.lost_nodes([*names(5), "n7"])
    assert [(node.node, node.kind) for node in found] == [
        ("n1", "silent"), ("n2", "drained"), ("n7", "lost"),
    ]  # fmt: skip
    assert sorted(probes) == [1, 1, 1, 1, 5]
    assert job.usable_nodes() == {"n3"}
    monkeypatch.setattr(job_nodes, "_run", fake_run(set(), probes))  # srun does not work at all
    assert [node.node for node in job.lost_nodes(names(5))] == ["n1", "n2"]
    assert {node.kind for node in job.lost_nodes(names(5))} == {"drained"}


def test_a_node_that_slurm_allocates_again(tmp_path: Path, monkeypatch, capsys):
    """The job is requeued without it, but not for ever."""
    monkeypatch.setattr(node_review, "SlurmJob", FakeSlurm)
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def check(start: int, nodes: str) -> int:
        logs = tmp_path / "logs" / f"job7_{start}"
        logs.mkdir(parents=True)
        return allocated_nodes.main(
            ["--save", str(tmp_path), "--logs", str(logs), "--nodes", nodes]
        )

    assert check(0, "n0,n1") == 0
    record_exclusions(tmp_path, sick(1), "7", 60)
    assert check(1, "n0,n2") == 0
    assert check(2, "n0,n1") == allocated_nodes.REQUEUE
    assert (tmp_path / "logs" / "job7_2" / "exclude").read_text() == "n9,n1"
    assert "allocated excluded nodes: n1; requeued" in capsys.readouterr().out
    assert check(3, "n0,n1") == 0 and "n1; using them" in capsys.readouterr().out
    assert check(4, "n0,n1") == allocated_nodes.REQUEUE
