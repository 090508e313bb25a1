"""Assessment of a preflight check: unfit nodes with their evidence, and common causes.

Faults of the same kind on most nodes are not faults of these nodes, but of the container, a path or
a setting: they are reported as a common cause, and no node is excluded for them. Pure functions.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from megatron_llmjp.formatting import format_names
from megatron_llmjp.preflight.facts import NetworkFacts, NodeFacts
from megatron_llmjp.preflight.link_faults import (
    Faults,
    Pair,
    PairResult,
    divide,
    locate,
    slow_pairs,
)
from megatron_llmjp.preflight.settings import Thresholds

_Texts = dict[str, list[str]]

_SLOW = frozenset({"slow gemm", "slow node", "slow disk", "slow links"})
_SLOWDOWN = "slowdown"
"""Reduced clocks explain a slow GPU, but those of a warm room need not make it slow."""


@dataclass
class Assessment:
    """Result of a preflight check."""

    unfit: _Texts = field(default_factory=dict)
    """Reasons of each unfit node."""
    common: list[str] = field(default_factory=list)
    """Causes that concern no single node: excluding nodes does not help."""
    notes: list[str] = field(default_factory=list)
    """Observations that prevent nothing."""

    @property
    def exit_code(self) -> int:
        """0 if all nodes are fit, 1 if some are not, 2 for a common cause."""
        return 2 if self.common else 1 if self.unfit else 0


@dataclass(frozen=True)
class _Problem:
    node: str
    kind: str
    text: str


def assess(
    names: Sequence[str],
    facts: Mapping[str, NodeFacts],
    network: NetworkFacts | None,
    thresholds: Thresholds,
    last_words: Mapping[str, str] = MappingProxyType({}),
) -> Assessment:
    """Assess all findings.

    Args:
        names: all nodes of the job, first the one that serves the store.
        facts: findings of the nodes that wrote any.
        network: findings of the coordinator; None if it wrote none.
        thresholds: limits of fit nodes.
        last_words: last line of the output of nodes.
    """
    result = Assessment()
    if not facts:
        result.common.append(
            "no node answered. Is the interpreter or container right (PYTHON, RUN_IN), and can all "
            f"nodes read the checkout and write the save folder?{_hint(last_words, *last_words)}"
        )
        return result
    problems = [
        _Problem(name, "answer", f"no response.{_hint(last_words, name)}".rstrip("."))
        for name in names
        if name not in facts
    ]
    problems += _answers(names, facts, network, result)
    for name, found in facts.items():
        problems += [_Problem(name, kind, text) for kind, text in found.problems]
    problems += _differences(facts, thresholds, result)
    problems += _slow_devices(facts, thresholds)
    if network is not None:
        problems += _links(network, thresholds, result)
        if network.is_finished and network.incomplete:
            result.notes.append(network.incomplete)
        if error := network.all_reduce.get("error"):
            count = network.all_reduce["nodes"]
            result.common.append(f"an all-reduce over {count} nodes failed: {error}")
    _divide(problems, len(names), thresholds, result)
    if network is not None and not network.is_finished:
        # Faults that were found until then hold, and may be the cause.
        (result.notes if result.unfit else result.common).append(
            "the check did not reach its end: its time is over, or the first node failed"
        )
    return result


def _hint(last_words: Mapping[str, str], *names: str) -> str:
    return next((f" Its output ends with: {last_words[n]}" for n in names if n in last_words), "")


def _divide(
    problems: Iterable[_Problem], nodes: int, limits: Thresholds, result: Assessment
) -> None:
    """Report kinds of problems of most nodes as common causes, others as those of the node.

    A slow run is better than none: if many nodes are slow, or the only one, it is a note.
    """
    by_kind: dict[str, list[_Problem]] = defaultdict(list)
    for problem in problems:
        by_kind[problem.kind].append(problem)
    most_slow = limits.slow_share * nodes
    for kind, same in by_kind.items():
        affected = list(dict.fromkeys(problem.node for problem in same))
        text = Counter(problem.text for problem in same).most_common(1)[0][0]
        together = f"{text} (on {len(affected)} of {nodes} nodes: {format_names(affected)})"
        many_slow = kind in _SLOW and len(affected) > max(most_slow, 1.0)
        if kind == _SLOWDOWN or many_slow or (kind in _SLOW and nodes == 1):
            result.notes.append(together)
        elif nodes > 1 and 2 * len(affected) > nodes:
            result.common.append(together)
        else:
            for problem in same:
                result.unfit.setdefault(problem.node, []).append(problem.text)


def _answers(
    names: Sequence[str],
    facts: Mapping[str, NodeFacts],
    network: NetworkFacts | None,
    result: Assessment,
) -> list[_Problem]:
    """Return the nodes that stopped answering, or do not reach the first node."""
    problems = []
    if network is not None:
        problems += [
            _Problem(name, "answer", f"stopped answering {when}")
            for name, when in network.silent.items()
        ]
        answered = {*network.names.values(), *names[:1]}
        problems += [
            _Problem(name, "answer", "started its check, but did not reach the first node")
            for name, one in facts.items()
            if name not in answered and not one.store_error
        ]
    elif len(names) > 1 and names[0] in facts:
        result.common.append(f"the coordinator on {names[0]} wrote no results; see its log")
    lost = {name: one.store_error for name, one in facts.items() if one.store_error}
    reached = set(facts) - set(lost) - set(names[:1])
    if lost and names[0] not in facts:
        result.notes.append(f"links were not tested: {names[0]} serves the rendezvous")
    elif lost and not reached:
        result.common.append(f"no node reaches the first one: {next(iter(lost.values()))}")
    else:
        silent = network.silent if network is not None else {}
        problems += [
            _Problem(name, "store", error) for name, error in lost.items() if name not in silent
        ]
    return problems


def _differences(
    facts: Mapping[str, NodeFacts], limits: Thresholds, result: Assessment
) -> list[_Problem]:
    """Return the nodes that differ from most others in clock, versions, devices, links' states."""
    problems = []
    clocks = {name: one.clock for name, one in facts.items() if one.clock and not one.store_error}
    median = statistics.median(clocks.values()) if clocks else 0.0
    for name, clock in clocks.items():
        if abs(clock - median) > limits.clock_seconds:
            problems.append(_Problem(name, "clock", f"its clock is off by {clock - median:+.0f} s"))
        elif abs(clock - median) > limits.clock_note_seconds:
            result.notes.append(f"{name}: its clock is off by {clock - median:+.1f} s")
    for kind, value in _COMPARED.items():
        problems += _unlike(facts, kind, value, result)
    drivers = Counter(one.driver for one in facts.values() if one.driver)
    if len(drivers) > 1:  # as while a cluster is updated
        counts = ", ".join(f"{name} on {count} nodes" for name, count in drivers.most_common())
        result.notes.append(f"drivers differ: {counts}")
    return problems + _missing_nvlinks(facts) + _missing_ports(facts)


def _device(facts: NodeFacts) -> str | None:
    return facts.device if facts.can_communicate() else None


def _versions(facts: NodeFacts) -> str | None:
    return json.dumps(facts.versions, sort_keys=True) if facts.versions else None


_COMPARED: dict[str, Callable[[NodeFacts], str | None]] = {
    "device": _device,
    "versions": _versions,
}
"""Properties that must be equal on all nodes."""


def _unlike(
    facts: Mapping[str, NodeFacts],
    kind: str,
    value: Callable[[NodeFacts], str | None],
    result: Assessment,
) -> list[_Problem]:
    """Return the nodes whose value differs from that of most nodes."""
    values = {name: text for name, one in facts.items() if (text := value(one)) is not None}
    if len(set(values.values())) < 2:
        return []
    common, count = Counter(values.values()).most_common(1)[0]
    if 2 * count <= len(values):
        (one, first), (other, second) = list(values.items())[:2]
        result.common.append(f"{kind} differ between the nodes: {one} {first}; {other} {second}")
        return []
    return [
        _Problem(name, f"{kind} differ", f"{kind}: {text}; on most nodes {common}")
        for name, text in values.items()
        if text != common
    ]


def _missing_nvlinks(facts: Mapping[str, NodeFacts]) -> list[_Problem]:
    """Return the GPUs with fewer NVLinks than most GPUs of all nodes."""
    active = [
        (name, gpu, int(links["active"]))
        for name, one in facts.items()
        for gpu, links in one.nvlinks.items()
    ]
    common = statistics.mode(count for _, _, count in active) if active else 0
    return [
        _Problem(name, "nvlink", f"GPU {gpu}: {count} NVLinks are up; most GPUs have {common}")
        for name, gpu, count in active
        if count < common
    ]


def _missing_ports(facts: Mapping[str, NodeFacts]) -> list[_Problem]:
    """Return InfiniBand ports that are not active at the rate that they have on most nodes.

    Ports that are not connected on some nodes, or that only some nodes have, are no faults.
    """
    nodes = {name: one.infiniband for name, one in facts.items() if one.device}
    active = Counter(
        (port, one["gigabits"])
        for ports in nodes.values()
        for port, one in ports.items()
        if one["state"] == "ACTIVE"
    )
    expected = {port: rate for (port, rate), count in active.items() if 2 * count > len(nodes)}
    problems = []
    for name, ports in nodes.items():
        for port, rate in expected.items():
            here = ports.get(port, {"state": "missing", "gigabits": None})
            if (here["state"], here["gigabits"]) != ("ACTIVE", rate):
                found = f"{here['state']} at {here['gigabits'] or 0:g} Gbit/s"
                text = f"{port}: {found}; on most nodes ACTIVE at {rate or 0:g} Gbit/s"
                problems.append(_Problem(name, "infiniband", text))
    return problems


def _slow_devices(facts: Mapping[str, NodeFacts], limits: Thresholds) -> list[_Problem]:
    """Return devices, nodes and disks that are slower than the median by a ratio."""
    problems = []
    rates = [rate for one in facts.values() for rate in one.gemm_tflops]
    median = statistics.median(rates) if rates else 0.0
    for name, one in facts.items():
        ratio = limits.gpu_gemm_ratio if one.device == "cuda" else limits.cpu_gemm_ratio
        for index, rate in enumerate(one.gemm_tflops):
            if rate < ratio * median:
                device = f"GPU {index}" if one.device == "cuda" else "CPU"
                text = f"{device}: GEMM {rate:.3g} TFLOP/s, median {median:.3g}"
                problems.append(_Problem(name, "slow gemm", text))
    inside = {n: one.all_reduce_gbs for n, one in facts.items() if one.all_reduce_gbs is not None}
    what = "all-reduce between its GPUs"
    problems += _below(inside, limits.node_all_reduce_ratio, "slow node", what)
    disks = {name: one.disk_gbs for name, one in facts.items() if one.disk_gbs is not None}
    return problems + _below(disks, limits.disk_ratio, "slow disk", "writing to the save folder")


def _below(values: Mapping[str, float], ratio: float, kind: str, what: str) -> list[_Problem]:
    median = statistics.median(values.values()) if values else 0.0
    return [
        _Problem(name, kind, f"{what}: {value:.3g} GB/s, median {median:.3g}")
        for name, value in values.items()
        if value < ratio * median
    ]


def _links(network: NetworkFacts, limits: Thresholds, result: Assessment) -> list[_Problem]:
    """Return the nodes at fault for failed and slow tests."""
    tests = network.pairs
    failed = {test.pair: test.error for test in tests if test.error}
    faults = locate(*divide(tests))
    problems = [
        _Problem(network.names[node], "links", _failures(network, node, partners, failed))
        for node, partners in faults.nodes.items()
    ]
    if faults.unexplained:
        pair = faults.unexplained[0]
        result.common.append(
            f"tests between nodes failed, and no single node is the cause: {len(failed)} of "
            f"{len(tests)} tests, such as {_name(network, pair)}: {failed[pair]}"
        )
    result.notes += [
        f"{_name(network, pair)}: the test failed, but both pass with others: {failed[pair]}"
        for pair in faults.paths
    ]
    return problems + _slow_links(network, tests, limits, result)


def _failures(
    network: NetworkFacts, node: int, partners: Sequence[int], failed: Mapping[Pair, str]
) -> str:
    names = format_names([network.names[partner] for partner in partners])
    error = next(text for pair, text in failed.items() if node in pair)
    return f"communication failed with {len(partners)} other nodes ({names}): {error}"


def _slow_links(
    network: NetworkFacts, tests: Sequence[PairResult], limits: Thresholds, result: Assessment
) -> list[_Problem]:
    ratio = limits.link_ratio(next((one.device for one in network.facts.values()), ""))
    slow = slow_pairs(tests, ratio)
    faults: Faults = locate(divide(tests)[0] - slow, slow)
    rails = list(zip(*(test.seconds for test in tests if not test.error), strict=False))
    median = statistics.median([value for rail in rails for value in rail]) if rails else 0.0
    problems = []
    for node in faults.nodes:
        mine = zip(*(t.seconds for t in tests if node in t.pair and not t.error), strict=False)
        best = [min(seconds) for seconds in mine]
        bad = [i for i, value in enumerate(best) if value > ratio * median]
        which = f"links of GPUs {', '.join(map(str, bad))}" if len(best) > 1 else "links"
        text = f"its {which} take {max(best) / median:.1f} times the median of "
        problems.append(_Problem(network.names[node], "slow links", f"{text}{median * 1e3:.0f} ms"))
    pairs = [_name(network, pair) for pair in faults.paths + faults.unexplained]
    if pairs:
        result.notes.append(f"slow paths, not explained by single nodes: {format_names(pairs)}")
    return problems


def _name(network: NetworkFacts, pair: Pair) -> str:
    return " - ".join(network.names[node] for node in pair)
