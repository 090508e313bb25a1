"""Report of a preflight check: table of nodes, ``report.json``, exit code. Without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import write_atomically
from megatron_llmjp.formatting import format_table
from megatron_llmjp.preflight.assessment import Assessment, assess
from megatron_llmjp.preflight.facts import NetworkFacts, NodeFacts, read_network, read_nodes
from megatron_llmjp.preflight.result import REPORT_FILE
from megatron_llmjp.preflight.settings import Settings, Thresholds

_HEADS = ("node", "devices", "GEMM TFLOP/s", "inside GB/s", "link GB/s", "disk GB/s", "result")


def report(folder: Path, names: Sequence[str], settings: Settings, thresholds: Thresholds) -> int:
    """Assess the files of a check, print the report and write ``report.json``.

    Keys of the file: ``fit`` (whether the job can start), ``unfit`` (reasons by node), ``common``
    (causes that concern no single node), ``notes``, ``nodes`` (findings by node; null without an
    answer), ``network`` (findings of the tests between nodes).

    Args:
        folder: folder of the files.
        names: all nodes of the job; empty for those that answered.
        settings: settings of the check.
        thresholds: limits of fit nodes.

    Returns:
        The exit code: 0 if all nodes are fit, 1 if some are not, 2 for a common cause.

    Raises:
        UserError: the folder cannot be written.
    """
    network = read_network(folder)
    facts = read_nodes(folder)
    if network is not None:
        facts |= network.facts  # may be newer than the files as this node sees them
        known = network.names
        names = names or [known.get(rank, f"rank {rank}") for rank in range(network.nodes)]
    names = names or sorted(facts)
    facts = {name: facts[name] for name in names if name in facts}
    result = assess(names, facts, network, thresholds, _last_words(folder))
    content = {
        "fit": result.exit_code == 0,
        "unfit": result.unfit,
        "common": result.common,
        "notes": result.notes,
        "nodes": {name: asdict(facts[name]) if name in facts else None for name in names},
        "network": asdict(replace(network, facts={})) if network is not None else None,
    }
    for line in format_report(names, facts, network, settings, result):
        print(line, flush=True)
    try:
        write_atomically(folder / REPORT_FILE, json.dumps(content, indent=1))
    except OSError as error:
        raise UserError(f"--folder {folder}: {error.strerror}") from None
    return result.exit_code


def _last_words(folder: Path) -> dict[str, str]:
    """Return the last line of the output of each node, by the name of the file."""
    found = {}
    for path in sorted(folder.glob("*.log")):
        with suppress(OSError, StopIteration):
            lines = path.read_text(errors="replace").splitlines()
            found[path.stem] = next(line.strip() for line in reversed(lines) if line.strip())
    return found


def format_report(
    names: Sequence[str],
    facts: Mapping[str, NodeFacts],
    network: NetworkFacts | None,
    settings: Settings,
    result: Assessment,
) -> list[str]:
    """Return the lines of the report: a table by node, notes, problems, and the result."""
    links = _link_bandwidths(network, settings)
    rows = [_row(name, facts.get(name), links.get(name), result) for name in names]
    lines = format_table([_HEADS, *rows], right=(1, 2, 3, 4, 5)).splitlines() if facts else []
    lines += [f"preflight: note: {note}" for note in result.notes]
    for name, reasons in result.unfit.items():
        lines += [f"preflight: {name}: {reason}" for reason in reasons]
    lines += [f"preflight: common cause: {cause}" for cause in result.common]
    if result.exit_code == 0:
        lines.append(f"preflight: {len(names)} nodes passed{_summary(network, links)}")
    else:
        blamed = f"{len(result.unfit)} of {len(names)} nodes are unfit"
        lines.append(f"preflight: failed; {blamed}" if result.unfit else "preflight: failed")
    return lines


def _row(
    name: str, facts: NodeFacts | None, link: float | None, result: Assessment
) -> tuple[str, ...]:
    state = "unfit" if name in result.unfit else "ok" if facts is not None else "no answer"
    if facts is None:
        return (name, "", "", "", "", "", state)
    rates = facts.gemm_tflops
    low, high = (f"{min(rates):.3g}", f"{max(rates):.3g}") if rates else ("", "")
    return (
        name,
        f"{facts.devices} {facts.device}" if facts.device else "",
        low if low == high else f"{low}-{high}",
        _number(facts.all_reduce_gbs),
        _number(link),
        _number(facts.disk_gbs),
        state,
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _link_bandwidths(network: NetworkFacts | None, settings: Settings) -> dict[str, float]:
    """Return the best bandwidth of the slowest device of each node, in GB/s in each direction."""
    best: dict[str, float] = {}
    if network is None:
        return best
    for test in network.pairs:
        if test.error or not test.seconds:
            continue
        for node in test.pair:
            name = network.names[node]
            is_gpu = name in network.facts and network.facts[name].device == "cuda"
            mib = settings.gpu_message_mib if is_gpu else settings.cpu_message_mib
            best[name] = max(best.get(name, 0.0), (mib << 20) / max(test.seconds) / 1e9)
    return best


def _summary(network: NetworkFacts | None, links: Mapping[str, float]) -> str:
    parts = [f"; slowest link {min(links.values()):.3g} GB/s"] if links else []
    if network is not None and "gbs" in network.all_reduce:
        found = network.all_reduce
        parts.append(f"; all-reduce of {found['devices']} devices {found['gbs']:.3g} GB/s")
    return "".join(parts)
