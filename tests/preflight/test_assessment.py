"""Unfit nodes and common causes, from the findings of simulated nodes."""

from __future__ import annotations

import json

import pytest

from megatron_llmjp.errors import UserError
from megatron_llmjp.preflight.assessment import Assessment, assess
from megatron_llmjp.preflight.facts import NetworkFacts, NodeFacts
from megatron_llmjp.preflight.link_faults import PairResult
from megatron_llmjp.preflight.report import report
from megatron_llmjp.preflight.settings import Settings, Thresholds

NAMES = [f"n{i}" for i in range(5)]
PORTS = {
    "mlx5_0/1": {"state": "ACTIVE", "gigabits": 400.0},
    "mlx5_9/1": {"state": "DOWN", "gigabits": 10.0},
}


def node(name: str, **other) -> NodeFacts:
    rates = {"gemm_tflops": [600.0] * 8, "all_reduce_gbs": 350.0, "disk_gbs": 1.0}
    standard = {"versions": {"torch": "2.6"}, "clock": 1000.0, "device": "cuda", "devices": 8}
    links = {"infiniband": PORTS, "nvlinks": {gpu: {"active": 18} for gpu in "01"}}
    return NodeFacts(name, **{**standard, **rates, **links, **other})


def network(names=NAMES, bad=(), error="timeout", seconds=None, **other) -> NetworkFacts:
    """All pairs of nodes, of which some fail or take longer."""
    pairs = []
    for i in range(len(names)):
        for j in range(i):
            text = error if (j, i) in bad else ""
            times = [] if text else (seconds or {}).get((j, i), [0.01, 0.01])
            pairs.append(PairResult((j, i), text, tuple(times)))
    known = {"names": dict(enumerate(names)), "is_finished": True, "pairs": pairs}
    return NetworkFacts(**{**known, **other})


def run(found=None, between=None, names=NAMES) -> Assessment:
    found = found if found is not None else [node(name) for name in names]
    facts = {one.node: one for one in found}
    between = between if between is not None else network(names)
    between.facts = between.facts or facts
    return assess(names, facts, between, Thresholds())


def test_fit_nodes():
    assert run() == Assessment() and run().exit_code == 0


@pytest.mark.parametrize(
    ("sick", "reason"),
    [
        ({"problems": [("gpus", "7 of 8 GPUs")]}, "7 of 8 GPUs"),
        ({"gemm_tflops": [600.0] * 7 + [480.0]}, "GPU 7: GEMM 480 TFLOP/s, median 600"),
        ({"all_reduce_gbs": 200.0}, "all-reduce between its GPUs: 200 GB/s, median 350"),
        ({"disk_gbs": 0.05}, "writing to the save folder: 0.05 GB/s, median 1"),
        ({"clock": 4600.0}, "its clock is off by +3600 s"),
        ({"versions": {"torch": "2.5"}}, '{"torch": "2.5"}; on most nodes {"torch": "2.6"}'),
        ({"device": "cpu"}, "device: cpu; on most nodes cuda"),
        (
            {"infiniband": {**PORTS, "mlx5_0/1": {"state": "DOWN", "gigabits": 10.0}}},
            "mlx5_0/1: DOWN at 10 Gbit/s; on most nodes ACTIVE at 400 Gbit/s",
        ),
        ({"infiniband": {}}, "mlx5_0/1: missing at 0 Gbit/s; on most nodes ACTIVE"),
        (
            {"nvlinks": {"0": {"active": 17}, "1": {"active": 18}}},
            "GPU 0: 17 NVLinks are up; most GPUs have 18",
        ),
        ({"store_error": "cannot reach n0 port 1: timed out"}, "cannot reach n0 port 1: timed out"),
    ],
)
def test_one_sick_node_is_unfit(sick, reason):
    result = run([node(name, **(sick if name == "n3" else {})) for name in NAMES])
    assert list(result.unfit) == ["n3"] and result.common == [] and result.exit_code == 1
    assert any(reason in text for text in result.unfit["n3"]), result.unfit


def test_values_within_the_limits_are_fit():
    other = node("n0", gemm_tflops=[520.0], disk_gbs=0.2, clock=1005.0)
    result = run([other, *map(node, NAMES[1:])])
    assert result.unfit == {} and result.notes == ["n0: its clock is off by +5.0 s"]


def test_differences_that_are_no_faults():
    """A cluster whose driver is being updated, a connected spare port, a warm GPU at full speed."""
    spare = {**PORTS, "mlx5_9/1": {"state": "ACTIVE", "gigabits": 100.0}}
    warm = {"problems": [("slowdown", "GPU 3: software thermal slowdown")]}
    nodes = [node("n0", driver="570", infiniband=spare), node("n1", driver="550", **warm)]
    result = run([*nodes, *(node(name, driver="570") for name in NAMES[2:])])
    assert result.unfit == {} and result.exit_code == 0
    assert result.notes == [
        "drivers differ: 570 on 4 nodes, 550 on 1 nodes",
        "GPU 3: software thermal slowdown (on 1 of 5 nodes: n1)",
    ]


def test_a_job_trains_where_many_nodes_are_slow():
    """As in a rack without enough power; nor does it end on the only node that it has."""
    slow = {"gemm_tflops": [600.0] * 4 + [480.0] * 4}
    result = run([*(node(name, **slow) for name in NAMES[:2]), *map(node, NAMES[2:])])
    assert result.exit_code == 0
    text = "GPU 4: GEMM 480 TFLOP/s, median 600"
    assert result.notes == [f"{text} (on 2 of 5 nodes: n0, n1)"]
    alone = assess(
        ["n0"], {"n0": node("n0", gemm_tflops=[600.0, 480.0, 600.0])}, None, Thresholds()
    )
    assert alone.exit_code == 0 and "GEMM 480" in alone.notes[0]


def test_the_same_fault_on_most_nodes_is_a_common_cause():
    fault = {"problems": [("save folder", "/save cannot be written: Permission denied")]}
    other = {"problems": [("gpus", "7 of 8 GPUs")]}
    result = run([node("n0"), node("n1", **other), *(node(name, **fault) for name in NAMES[2:])])
    assert result.unfit == {"n1": ["7 of 8 GPUs"]} and result.exit_code == 2
    assert result.common == [
        "/save cannot be written: Permission denied (on 3 of 5 nodes: n2, n3, n4)"
    ]


def test_nodes_without_an_answer():
    found = [node(name) for name in NAMES if name not in ("n1", "n2")]
    between = network(pairs=[], silent={"n4": "in a test"})
    result = run(found, between, ["n0", "n1", "n3", "n4"])
    assert result.unfit == {"n1": ["no response"], "n4": ["stopped answering in a test"]}
    result = run(found, between, ["n0", "n1", "n3", "n4", "n5"])
    assert result.unfit == {}
    assert result.common == ["no response (on 3 of 5 nodes: n1, n5, n4)"]


def test_the_first_node_does_not_answer():
    found = {n: node(n, store_error="cannot reach n0 port 1") for n in NAMES[1:]}
    result = assess(NAMES, found, None, Thresholds())
    assert result.unfit == {"n0": ["no response"]} and result.common == []
    result = assess(NAMES, {**found, "n0": node("n0")}, network(["n0"]), Thresholds())
    assert result.unfit == {} and "no node reaches the first one: cannot reach" in result.common[0]


def test_a_check_that_was_killed_does_not_pass():
    between = network(is_finished=False, pairs=[])
    assert run(between=between).common == [
        "the check did not reach its end: its time is over, or the first node failed"
    ]
    sick = [node("n1", problems=[("gpus", "7 of 8 GPUs")]), *map(node, NAMES[2:]), node("n0")]
    result = run(sick, network(is_finished=False, pairs=[]))
    assert list(result.unfit) == ["n1"] and result.exit_code == 1
    assert "did not reach its end" in result.notes[0]
    facts = {name: node(name) for name in NAMES}
    assert "wrote no results" in assess(NAMES, facts, None, Thresholds()).common[0]


def test_links_of_a_sick_node():
    between = network(bad={(0, 3), (1, 3), (2, 3), (3, 4)}, error="NCCL error")
    assert run(between=between).unfit == {
        "n3": ["communication failed with 4 other nodes (n0, n1, n2 and 1 more): NCCL error"]
    }


def test_a_slow_rail_of_a_node():
    slow = {(min(i, 2), max(i, 2)): [0.01, 0.045] for i in (0, 1, 3, 4)}
    assert run(between=network(seconds=slow)).unfit == {
        "n2": ["its links of GPUs 1 take 4.5 times the median of 10 ms"]
    }


def test_failures_between_many_nodes_blame_none():
    every = {(i, j) for j in range(5) for i in range(j)}
    result = run(between=network(bad=every))
    assert result.unfit == {} and "10 of 10 tests, such as n0 - n1: timeout" in result.common[0]
    failed = network(all_reduce={"nodes": 5, "error": "timeout"})
    assert run(between=failed).common == ["an all-reduce over 5 nodes failed: timeout"]
    silent = network(all_reduce={"nodes": 5, "silent": 1}, silent={"n1": "during a test"})
    result = run(between=silent)
    assert list(result.unfit) == ["n1"] and result.common == []


def test_two_nodes_that_differ_blame_neither():
    found = [node("n0"), node("n1", versions={"torch": "2.5"})]
    result = run(found, network(["n0", "n1"]), ["n0", "n1"])
    assert result.unfit == {} and "versions differ between the nodes" in result.common[0]


def test_a_container_that_starts_on_no_node(tmp_path, capsys):
    (tmp_path / "n0.log").write_text("FATAL: could not open image run.sif: no such file\n\n")
    assert report(tmp_path, ["n0", "n1"], Settings(), Thresholds()) == 2
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["unfit"] == {} and found["nodes"] == {"n0": None, "n1": None}
    assert "could not open image run.sif" in found["common"][0]
    assert "preflight: common cause: no node answered" in capsys.readouterr().out
    with pytest.raises(UserError, match="missing: No such file"):
        report(tmp_path / "missing", ["n0"], Settings(), Thresholds())
