"""Location of network faults: every node that is at fault is found, and no other."""

from __future__ import annotations

import itertools

import pytest

from megatron_llmjp.preflight.link_faults import (
    RETEST_ROUNDS,
    Faults,
    PairResult,
    condemned,
    locate,
    pair_rounds,
    retest_pairs,
    slow_pairs,
)


def examine(nodes: int, is_bad) -> tuple[Faults, int]:
    """Run all rounds as the coordinator does; return the faults and the number of rounds."""
    good, bad, rounds = set(), set(), 0
    for pairs in pair_rounds(range(nodes)):
        rounds += 1
        out = condemned(good, bad)
        for pair in pairs:
            if not out.intersection(pair):
                (bad if is_bad(*pair) else good).add(pair)
    for _ in range(RETEST_ROUNDS):
        out = condemned(good, bad)
        pairs = retest_pairs([node for node in range(nodes) if node not in out], good, bad)
        assert len({node for pair in pairs for node in pair}) == 2 * len(pairs)
        if not pairs:
            break
        rounds += 1
        for pair in pairs:
            (bad if is_bad(*pair) else good).add(pair)
    return locate(good, bad), rounds


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 7, 8, 13, 64, 100])
def test_rounds_are_logarithmic_and_contain_every_node(nodes):
    rounds = pair_rounds(range(nodes))
    assert 2 ** len(rounds) >= nodes and (not rounds or 2 ** (len(rounds) - 1) < nodes)
    for pairs in rounds:
        members = [node for pair in pairs for node in pair]
        assert len(members) == len(set(members)) == nodes - nodes % 2
    everyone = {node for pairs in rounds for pair in pairs for node in pair}
    assert everyone == (set(range(nodes)) if nodes > 1 else set())
    tests = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(tests) == len(set(tests))


@pytest.mark.parametrize("nodes", [3, 4, 5, 8, 13, 64])
def test_a_sick_node_is_found_and_its_partners_are_not_blamed(nodes):
    for sick in range(nodes):
        faults, rounds = examine(nodes, lambda a, b, sick=sick: sick in (a, b))
        assert set(faults.nodes) == {sick} and not faults.paths and not faults.unexplained
        assert 2 <= len(faults.nodes[sick]) <= 3  # each of its tests may take the whole limit
        assert rounds <= (nodes - 1).bit_length() + RETEST_ROUNDS


@pytest.mark.parametrize("nodes", [5, 8, 16])
def test_any_two_sick_nodes_are_found(nodes):
    for sick in itertools.combinations(range(nodes), 2):
        faults, _ = examine(nodes, lambda a, b, sick=sick: a in sick or b in sick)
        assert set(faults.nodes) == set(sick), sick
        assert not faults.paths and not faults.unexplained


def test_a_node_that_fails_with_some_partners_is_found():
    faults = locate({(3, 4), (0, 1), (2, 5), (6, 7)}, {(3, 7), (2, 3), (1, 3)})
    assert faults == Faults(nodes={3: [1, 2, 7]})


def test_a_broken_path_blames_neither_end():
    faults, _ = examine(8, lambda a, b: (a, b) == (2, 5))
    assert faults == Faults(paths=[(2, 5)])


def test_two_nodes_do_not_say_which_is_at_fault():
    faults, _ = examine(2, lambda a, b: True)
    assert faults == Faults(unexplained=[(0, 1)])


def test_a_broken_network_blames_no_node():
    assert examine(8, lambda a, b: True)[0].nodes == {}
    divided, _ = examine(16, lambda a, b: (a < 8) != (b < 8))
    assert divided.nodes == {} and divided.paths == [] and len(divided.unexplained) >= 8


@pytest.mark.parametrize("nodes", [4, 5, 8, 13, 64])
def test_a_slow_node_is_in_fewer_than_half_of_the_pairs(nodes):
    for slow in range(nodes):
        results = [
            PairResult(pair, seconds=(0.05 if slow in pair else 0.01,))
            for pairs in pair_rounds(range(nodes))
            for pair in pairs
        ]
        assert slow_pairs(results, 2.0) == {r.pair for r in results if slow in r.pair}


def test_slow_pairs_are_relative_to_the_median_device():
    results = [
        PairResult((0, 1), seconds=(0.010, 0.011)),
        PairResult((2, 3), seconds=(0.010, 0.025)),
        PairResult((0, 2), seconds=(0.010, 0.019)),
        PairResult((1, 3), error="timeout"),
    ]
    assert slow_pairs(results, ratio=2.0) == {(2, 3)}
    assert slow_pairs([], ratio=2.0) == set()
