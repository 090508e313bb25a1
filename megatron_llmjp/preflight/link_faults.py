"""Location of network faults: the pairs of nodes to test, and the nodes that explain the failures.

A failed test of two nodes does not say which one is at fault. A node is at fault if tests with
working nodes fail, while those nodes pass other tests. Pure functions, without torch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field

RETEST_ROUNDS = 3
"""Largest number of rounds in which members of failed pairs are tested with other nodes."""

ENOUGH_TESTS = 2
"""Tests with working nodes after which a node is not tested again."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class PairResult:
    """Result of one test of two nodes."""

    pair: Pair
    error: str = ""
    """Why it failed; empty if it passed."""
    seconds: tuple[float, ...] = ()
    """Duration of an exchange by each device of the nodes, at the same time."""


def divide(results: Sequence[PairResult]) -> tuple[set[Pair], set[Pair]]:
    """Return the pairs that passed their tests, and those that failed."""
    failed = {result.pair for result in results if result.error}
    return {result.pair for result in results} - failed, failed


def pair_rounds(nodes: Sequence[int]) -> list[list[Pair]]:
    """Return the first rounds of a round-robin tournament (circle method), log2 of the nodes.

    A node pauses in at most one round, so that all nodes are in about as many pairs.
    """
    count = len(nodes) + len(nodes) % 2
    rounds = []
    for number in range((len(nodes) - 1).bit_length()):
        places = [(number, count - 1)]
        for i in range(1, count // 2):
            places.append(((number + i) % (count - 1), (number - i) % (count - 1)))
        rounds.append(
            [
                (nodes[min(place)], nodes[max(place)])
                for place in places
                if max(place) < len(nodes)  # the last place of an odd number is a pause
            ]
        )
    return rounds


def slow_pairs(results: Iterable[PairResult], ratio: float) -> set[Pair]:
    """Return the pairs of which a device takes ``ratio`` times the median of all devices."""
    passed = [result for result in results if not result.error]
    seconds = sorted(value for result in passed for value in result.seconds)
    if not seconds:
        return set()
    limit = ratio * seconds[(len(seconds) - 1) // 2]
    return {result.pair for result in passed if max(result.seconds, default=0.0) > limit}


def retest_pairs(alive: Sequence[int], good: Set[Pair], bad: Set[Pair]) -> list[Pair]:
    """Return the next round of tests that locate the faults; empty if nothing is left to learn.

    Members of bad pairs are tested with nodes without bad pairs. If there are none, they are tested
    with each other.

    Args:
        alive: nodes that answer.
        good: pairs that passed.
        bad: pairs that failed or are slow.
    """
    suspects = [node for node in alive if any(node in pair for pair in bad)]
    working = [node for node in alive if node not in suspects and any(node in p for p in good)]
    tested = {frozenset(pair) for pair in good | bad}

    def is_new(a: int, b: int) -> bool:
        return a != b and frozenset((a, b)) not in tested

    open_cases = [
        node
        for node in suspects
        if sum(frozenset((node, other)) in tested for other in working) < ENOUGH_TESTS
    ]
    return _match(open_cases, working or open_cases, is_new)


def condemned(passed: Set[Pair], failed: Set[Pair]) -> set[int]:
    """Return nodes of which no test passed, and that failed with enough working ones.

    Each further test of such a node may take its whole time limit. Empty if other pairs failed as
    well: then more tests are needed to decide between nodes and the network.
    """
    works = {node for pair in passed for node in pair}
    failures = Counter(node for pair in failed for node in pair if works.intersection(pair))
    found = {node for node, n in failures.items() if n >= ENOUGH_TESTS} - works
    return found if all(found.intersection(pair) for pair in failed) else set()


def _match(
    first: Sequence[int], second: Sequence[int], is_new: Callable[[int, int], bool]
) -> list[Pair]:
    taken: set[int] = set()
    pairs = []
    for node in first:
        partner = next((o for o in second if o not in taken and is_new(node, o)), None)
        if node in taken or partner is None:
            continue
        taken |= {node, partner}
        pairs.append((min(node, partner), max(node, partner)))
    return pairs


@dataclass
class Faults:
    """Explanation of the bad pairs."""

    nodes: dict[int, list[int]] = field(default_factory=dict)
    """Nodes at fault, and the partners of their bad tests."""
    paths: list[Pair] = field(default_factory=list)
    """Bad pairs of which both nodes pass with others: a cable or switch between them."""
    unexplained: list[Pair] = field(default_factory=list)
    """Bad pairs between so many nodes that no single node is the cause."""


def locate(good: Set[Pair], bad: Set[Pair]) -> Faults:
    """Explain bad pairs by the fewest nodes.

    1. A node is at fault if none of its tests passed and it failed with a node that passed others.
    2. Of the other bad pairs, a node is at fault if it is in at least two, and in more than any
       other node.
    3. The rest are faults of paths, or unexplained if no test passed or they concern most nodes.
    """
    faults = Faults()
    works = {node for pair in good for node in pair}
    partners: dict[int, list[int]] = defaultdict(list)
    for a, b in sorted(bad):
        partners[a].append(b)
        partners[b].append(a)
    for node in sorted(partners):
        if node not in works and any(other in works for other in partners[node]):
            faults.nodes[node] = partners[node]
    rest = {pair for pair in bad if not any(node in faults.nodes for node in pair)}
    while (worst := _unique_worst(rest)) is not None:
        faults.nodes[worst] = partners[worst]
        rest = {pair for pair in rest if worst not in pair}
    concerned = {node for pair in rest for node in pair}
    if not works or 2 * len(concerned) > len(works):
        faults.unexplained = sorted(rest)
    else:
        faults.unexplained = sorted(pair for pair in rest if not works.issuperset(pair))
        faults.paths = sorted(pair for pair in rest if works.issuperset(pair))
    return faults


def _unique_worst(pairs: Set[Pair]) -> int | None:
    """Return the node that is in at least two pairs and in more than any other."""
    counts: dict[int, int] = defaultdict(int)
    for pair in pairs:
        for node in pair:
            counts[node] += 1
    ordered = sorted(counts, key=lambda node: -counts[node])
    if not ordered or counts[ordered[0]] < 2:
        return None
    if len(ordered) > 1 and counts[ordered[1]] == counts[ordered[0]]:
        return None
    return ordered[0]
