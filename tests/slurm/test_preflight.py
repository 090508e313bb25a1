"""Preflight without Slurm: devices and links of nodes, as ranks of one machine."""

from __future__ import annotations

import os

import pytest

from slurm import preflight
from tests.support.processes import run_ranks


def be_node(kinds: list[str], broken: int | None) -> object:
    """Measure the links of a node, whose name is its rank; return the error if there is one."""
    rank = int(os.environ["RANK"])
    preflight.MESSAGE_MIB = 1
    try:
        return preflight._links(kinds[rank], rank == broken)
    except RuntimeError as error:
        return str(error)


def test_links_between_neighbors():
    found = run_ranks(be_node, 3, ["cpu"] * 3, None)
    assert [len(seconds) for seconds in found] == [2, 2, 2]
    assert min(min(seconds) for seconds in found) > 0.0


@pytest.mark.parametrize(
    ("kinds", "broken", "expected"),
    [
        (["cuda", "cpu", "cuda"], 1, [[], [], []]),  # reported by the broken node itself
        (["cpu", "cuda", "cuda"], None, ["this node uses cpu, most nodes cuda", [], []]),
    ],
)
def test_nodes_with_different_devices_do_not_wait_for_each_other(kinds, broken, expected):
    assert run_ranks(be_node, 3, kinds, broken) == expected


def test_a_node_without_the_gpus_of_its_job_is_unfit(monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    kind, problem = preflight._find_device("auto")
    assert kind == "cpu" and "SLURM_GPUS_ON_NODE=8 is set" in problem
    assert preflight._find_device("cpu") == ("cpu", "")
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    assert preflight._find_device("auto") == ("cpu", "")
