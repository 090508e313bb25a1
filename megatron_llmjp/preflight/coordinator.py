"""Coordinator of the tests between nodes: a process of the first node, which serves the store.

Nodes are tested in pairs, in rounds of disjoint pairs. A node that stops answering is not part of
later rounds, and no node waits for another without a limit. The findings are written after each
round: they are complete up to the moment in which the check is killed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mode
from typing import Any

from megatron_llmjp.preflight.facts import NetworkFacts, NodeFacts, node_facts
from megatron_llmjp.preflight.link_faults import (
    RETEST_ROUNDS,
    Pair,
    PairResult,
    condemned,
    divide,
    locate,
    pair_rounds,
    retest_pairs,
    slow_pairs,
)
from megatron_llmjp.preflight.measurements import bus_bandwidth
from megatron_llmjp.preflight.node_check import PARTNER_FAILED
from megatron_llmjp.preflight.place import Place
from megatron_llmjp.preflight.settings import Settings, Thresholds
from megatron_llmjp.preflight.shared_store import SharedStore, StoreError

_GRACE_SECONDS = 20.0
"""Time beyond a limit for its error to be reported: a node first kills its processes."""


def serve(
    place: Place, folder: Path, settings: Settings, thresholds: Thresholds, ready: Connection
) -> None:
    """Serve the store and coordinate the tests; sends an error or an empty text when listening."""
    try:
        store = SharedStore(place.address, settings.answer_seconds, serve=True)
    except StoreError as error:
        ready.send(str(error))
        return
    ready.send("")
    Coordinator(store, place.nodes, folder, settings, thresholds).run()


class Coordinator:
    """Plan of the tests between nodes, and their results."""

    def __init__(
        self,
        store: SharedStore,
        nodes: int,
        folder: Path,
        settings: Settings,
        thresholds: Thresholds,
    ) -> None:
        self._store, self._nodes, self._folder = store, nodes, folder
        self._settings, self._thresholds = settings, thresholds
        self._network = NetworkFacts(nodes)
        self._alive: list[int] = []
        self._plans = 0
        self._end = time.monotonic() + settings.total_seconds

    def run(self) -> None:
        """Run all tests and write the findings."""
        try:
            self._gather_facts()
            self._test_pairs()
            self._test_all()
        finally:
            self._finish()

    def _gather_facts(self) -> None:
        network, settings = self._network, self._settings
        names = self._store.collect("answer", range(self._nodes), settings.answer_seconds)
        network.names = names
        self._store.put("start", True)
        seconds = settings.local_seconds + settings.link_seconds + _GRACE_SECONDS
        found = self._store.collect("facts", names, seconds)
        network.facts = {names[rank]: node_facts(values) for rank, values in found.items()}
        for rank in names.keys() - found.keys():
            network.silent[names[rank]] = "during the checks of the node itself"
        kinds = [one.device for one in network.facts.values() if one.can_communicate()]
        common = mode(kinds) if kinds else ""
        self._alive = [
            rank
            for rank in sorted(found)
            if self._of(rank).can_communicate() and self._of(rank).device == common
        ]
        network.write(self._folder)

    def _of(self, rank: int) -> NodeFacts:
        return self._network.facts[self._network.names[rank]]

    def _test_pairs(self) -> None:
        for pairs in pair_rounds(self._alive):
            out = self._condemned()
            self._run_pairs([pair for pair in pairs if not out.intersection(pair)])
        for _ in range(RETEST_ROUNDS):
            good, bad = self._divide()
            out = self._condemned()
            if not (pairs := retest_pairs([n for n in self._alive if n not in out], good, bad)):
                break
            self._run_pairs(pairs)

    def _condemned(self) -> set[int]:
        return condemned(*divide(self._network.pairs))

    def _divide(self) -> tuple[set[Pair], set[Pair]]:
        """Return good and bad pairs."""
        kind = self._of(self._alive[0]).device if self._alive else ""
        passed, failed = divide(self._network.pairs)
        slow = slow_pairs(self._network.pairs, self._thresholds.link_ratio(kind))
        return passed - slow, failed | slow

    def _run_pairs(self, pairs: Sequence[Pair]) -> None:
        pairs = [pair for pair in pairs if set(pair) <= set(self._alive)]
        if not pairs or not self._has_time():
            return
        self._network.rounds += 1
        results = self._run_groups([list(pair) for pair in pairs])
        for a, b in pairs:
            if a not in results or b not in results:
                continue  # one was silent, which says nothing about the other
            result = PairResult((a, b), _first_error([results[a], results[b]]))
            if not result.error:
                times = zip(results[a]["exchanges"], results[b]["exchanges"], strict=True)
                result = PairResult((a, b), "", tuple(max(both) for both in times))
            self._network.pairs.append(result)
        self._network.write(self._folder)

    def _has_time(self) -> bool:
        if time.monotonic() + self._settings.link_seconds + _GRACE_SECONDS < self._end:
            return True
        self._network.incomplete = (
            f"tests between nodes ended after {self._network.rounds} rounds: another one may take "
            f"longer than the limit of {self._settings.total_seconds:.0f} s"
        )
        return False

    def _run_groups(self, groups: Sequence[list[int]]) -> dict[int, dict[str, Any]]:
        """Run one test of each group at the same time; return the results of nodes that answer."""
        number = self._plans
        self._plans += 1
        ranks = [rank for group in groups for rank in group]
        plan = [self._describe(f"test{number}.{i}", group) for i, group in enumerate(groups)]
        self._store.put(f"plan/{number}", {"end": False, "groups": plan})
        seconds = self._settings.link_seconds + _GRACE_SECONDS
        results = self._store.collect(f"result/{number}", ranks, seconds)
        for rank in set(ranks) - results.keys():
            self._network.silent[self._network.names[rank]] = "during a test with another node"
            self._alive.remove(rank)
        return results

    def _describe(self, name: str, ranks: list[int]) -> dict[str, Any]:
        kind, settings = self._of(ranks[0]).device, self._settings
        return {
            "name": name,
            "ranks": ranks,
            "kind": kind,
            "devices": min(self._of(rank).devices for rank in ranks),
            "message_mib": settings.gpu_message_mib if kind == "cuda" else settings.cpu_message_mib,
        }

    def _test_all(self) -> None:
        """Measure an all-reduce over all nodes whose links work."""
        faults = locate(*divide(self._network.pairs))
        fit = [rank for rank in self._alive if rank not in faults.nodes]
        if len(fit) < 2 or faults.unexplained or not self._has_time():
            return
        test = self._describe("", fit)
        results = self._run_groups([fit])
        world = len(fit) * test["devices"]
        found: dict[str, Any] = {"nodes": len(fit), "devices": world}
        if silent := len(fit) - len(results):
            found["silent"] = silent  # the cause of the errors of the others
        elif error := _first_error(list(results.values())):
            found["error"] = error
        else:
            slowest = max(result["all_reduce"] for result in results.values())
            found["gbs"] = bus_bandwidth(test["message_mib"], slowest, world)
        self._network.all_reduce = found

    def _finish(self) -> None:
        """End the plan, gather the last findings, and release the nodes."""
        network = self._network
        self._store.put(f"plan/{self._plans}", {"end": True})
        waiting = [rank for rank, name in network.names.items() if name not in network.silent]
        final = self._store.collect("final", waiting, 3 * self._settings.command_seconds)
        for rank, values in final.items():
            network.facts[network.names[rank]] = node_facts(values)
        for rank in set(waiting) - final.keys():
            network.silent[network.names[rank]] = "at the end of the check"
        network.is_finished = True
        network.write(self._folder)
        self._store.put("done", True)
        time.sleep(1.0)  # until the nodes have read it


def _first_error(results: Sequence[dict[str, Any]]) -> str:
    """Return the error of the node that failed first; empty if none failed."""
    errors = [result["error"] for result in results if "error" in result]
    return min(errors, key=lambda error: error.startswith(PARTNER_FAILED), default="")
