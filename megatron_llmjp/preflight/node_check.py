"""Check of one node, and its part in the tests between nodes.

Every node writes its findings to a file and to the store of the first node, follows the plan of the
coordinator there, and returns when the coordinator ends the plan or no longer answers.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_llmjp.parallel.ranks import node_name
from megatron_llmjp.preflight.facts import NodeFacts
from megatron_llmjp.preflight.local_checks import Expectations, LocalChecks
from megatron_llmjp.preflight.measurements import GroupTest, measure_group
from megatron_llmjp.preflight.place import Place
from megatron_llmjp.preflight.settings import Settings, Thresholds
from megatron_llmjp.preflight.shared_store import SharedStore, StoreError
from megatron_llmjp.preflight.workers import WorkerError, call_all

PARTNER_FAILED = "stopped: "
"""Start of the error of a node whose partner failed first."""


def check_node(
    place: Place, folder: Path, expected: Expectations, settings: Settings, thresholds: Thresholds
) -> NodeFacts:
    """Check this node and take part in the tests between nodes; return the findings."""
    facts = NodeFacts(node_name(), clock=time.time())
    facts.write(folder)
    checks = LocalChecks(facts, expected, settings)
    try:
        store = SharedStore(place.address, settings.answer_seconds) if place.nodes > 1 else None
    except StoreError as error:
        facts.store_error, store = str(error), None
    if store is None:
        checks.run()
        checks.finish(thresholds)
    else:
        try:
            _follow(store, place, facts, checks, settings, thresholds)
        except StoreError as error:
            facts.store_error = str(error)
    facts.write(folder)
    return facts


def _follow(
    store: SharedStore,
    place: Place,
    facts: NodeFacts,
    checks: LocalChecks,
    settings: Settings,
    thresholds: Thresholds,
) -> None:
    """Run the coordinator's plan.

    Raises:
        StoreError: the coordinator does not answer.
    """
    rank = place.rank
    store.put(f"answer/{rank}", facts.node)
    store.get("start", 2 * settings.answer_seconds)
    facts.clock = time.time()
    checks.run()
    store.put(f"facts/{rank}", asdict(facts))
    number = 0
    while True:
        plan = store.get(f"plan/{number}", 2 * settings.total_seconds)
        if plan["end"]:
            break
        group = next((group for group in plan["groups"] if rank in group["ranks"]), None)
        if group is not None:
            store.put(f"result/{number}/{rank}", _test(store, place, group, settings))
        number += 1
    checks.finish(thresholds)
    store.put(f"final/{rank}", asdict(facts))
    with contextlib.suppress(StoreError):
        store.get("done", settings.command_seconds)


def _test(
    store: SharedStore, place: Place, group: dict[str, Any], settings: Settings
) -> dict[str, Any]:
    """Run a test of a group of nodes; return its times or error."""
    test = GroupTest(
        kind=group["kind"],
        devices=group["devices"],
        nodes=len(group["ranks"]),
        address=place.address,
        name=group["name"],
        message_mib=group["message_mib"],
        seconds=settings.link_seconds,
    )
    failed = f"failed/{group['name']}"

    def partner_failed() -> str:
        error = store.find(failed)
        return PARTNER_FAILED + error if error else ""

    position = group["ranks"].index(place.rank)
    calls = [(test, position, local, "", dict(os.environ)) for local in range(test.devices)]
    try:
        results = call_all(measure_group, calls, settings.link_seconds, partner_failed)
    except WorkerError as error:
        if not str(error).startswith(PARTNER_FAILED):
            store.put(failed, str(error))  # the others do not wait for the time limit
        return {"error": str(error)}
    return {
        "exchanges": [max(times) for times, _ in results if times],
        "all_reduce": max(seconds for _, seconds in results),
    }
