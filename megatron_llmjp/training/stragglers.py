"""Stragglers: the rank that computes longest, its host, and the share of a step that it costs.

Ranks of one pipeline stage have the same work. Those of a tensor- or context-parallel group wait
for each other in every layer, so that they are compared as one with the groups of the other
data-parallel replicas.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, median_low

import torch

from megatron_llmjp.config.schema import Config, ParallelConfig
from megatron_llmjp.formatting import format_names, format_ranks
from megatron_llmjp.interval_stats import RankTimes
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.training.compute_timer import WINDOW, ComputeTimer

MIN_STEPS = WINDOW
"""With fewer measured steps ranks are not compared: medians of few steps differ by chance."""
END_FRACTION = 0.5
"""Stragglers are over when the slowest rank costs less than this fraction of the limit."""


@dataclass(frozen=True)
class RankPlace:
    """Place of a rank: its host, and its part of the model."""

    host: str
    stage: int
    """Pipeline stage."""
    replica: int
    """Data-parallel replica."""


def rank_places(hosts: Sequence[str], parallel: ParallelConfig) -> list[RankPlace]:
    """Return the places of all ranks, which are ordered TP, CP, DP, PP.

    Args:
        hosts: host of each rank.
        parallel: the layout.
    """
    lockstep = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    per_stage = len(hosts) // parallel.pipeline_model_parallel_size
    return [
        RankPlace(host, rank // per_stage, rank % per_stage // lockstep)
        for rank, host in enumerate(hosts)
    ]


@dataclass(frozen=True)
class SlowestRank:
    """The ranks that compute longest in comparison with others of their pipeline stage."""

    ranks: tuple[int, ...]
    """One rank, or a tensor- and context-parallel group."""
    hosts: tuple[str, ...]
    computing: float
    """Seconds per step."""
    typical: float
    """Seconds per step of the other ranks of the stage (their lower median)."""

    @property
    def excess(self) -> float:
        """Seconds per step that the other ranks wait for these."""
        return self.computing - self.typical


def find_slowest(computing: Sequence[float], places: Sequence[RankPlace]) -> SlowestRank | None:
    """Return the slowest ranks; None if no two ranks have the same work.

    Args:
        computing: seconds that each rank computes per step.
        places: place of each rank.
    """
    groups: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, place in enumerate(places):
        groups[place.stage][place.replica].append(rank)
    found = []
    for replicas in groups.values():
        if len(replicas) < 2:
            continue
        times = {tuple(ranks): fmean(computing[r] for r in ranks) for ranks in replicas.values()}
        # Of two replicas the lower median is the faster one.
        typical = median_low(times.values())
        slowest = max(times, key=times.__getitem__)
        hosts = tuple(dict.fromkeys(places[rank].host for rank in slowest))
        found.append(SlowestRank(slowest, hosts, times[slowest], typical))
    return max(found, key=lambda slowest: slowest.excess, default=None)


@dataclass(frozen=True)
class Comparison:
    """Times of all ranks in a log interval, and a message if a straggler appears or is over."""

    times: RankTimes
    hosts: str = ""
    """Hosts of the slowest ranks; empty if there is no comparison."""
    warning: str = ""
    """Names a straggler that has not been reported before."""
    note: str = ""
    """Says that the stragglers that were reported are over."""


class StragglerMonitor:
    """Compare the computing times of all ranks, and report each straggler once until all are over.

    All GPUs of a node may be slow, so that the slowest rank changes with every log line.

    Args:
        timer: measures the steps of this rank.
        places: place of each rank.
        limit: share of a step that a straggler costs at least; None to compare no ranks.
    """

    def __init__(
        self, timer: ComputeTimer, places: Sequence[RankPlace], limit: float | None
    ) -> None:
        self.timer = timer
        self._places, self._limit = places, limit
        self._reported: dict[tuple[int, ...], SlowestRank] = {}

    @property
    def own(self) -> tuple[float, float]:
        """Computing and waiting time of this rank, to be gathered from all ranks."""
        return self.timer.medians()[:2]

    def compare(self, ranks: Sequence[Sequence[float]]) -> Comparison | None:
        """Compare the gathered times of all ranks.

        Args:
            ranks: :attr:`own` of each rank.

        Returns:
            None before :data:`MIN_STEPS` steps.
        """
        if self.timer.steps < MIN_STEPS:
            return None
        computing, waiting = ([times[i] for times in ranks] for i in (0, 1))
        slowest = find_slowest(computing, self._places)
        if slowest is None or self._limit is None:
            return Comparison(RankTimes(median(computing), max(computing), median(waiting)))
        share = slowest.excess / max(self.timer.medians().total, slowest.computing)
        measured = RankTimes(
            median(computing), max(computing), median(waiting), slowest.ranks[0], share
        )
        warning, note = self._report(slowest, share, self._limit)
        return Comparison(measured, ", ".join(slowest.hosts), warning, note)

    def _report(self, slowest: SlowestRank, share: float, limit: float) -> tuple[str, str]:
        """Return a warning of a new straggler and a note that all are over, if any."""
        if share >= limit and slowest.ranks not in self._reported:
            self._reported[slowest.ranks] = slowest
            return describe_straggler(slowest, share, limit), ""
        if self._reported and share < END_FRACTION * limit:
            over = format_ranks(rank for ranks in self._reported for rank in ranks)
            hosts = dict.fromkeys(host for each in self._reported.values() for host in each.hosts)
            self._reported = {}
            return "", (
                f"no longer slow: {over} on {format_names(list(hosts))}; no rank costs {limit:.0%} "
                "of an iteration"
            )
        return "", ""


def describe_straggler(slowest: SlowestRank, share: float, limit: float) -> str:
    """Return a line that names a straggler, its host and its cost."""
    return (
        f"{_who(slowest)} slow: {slowest.computing:.3g} s of computation per iteration, "
        f"{slowest.typical:.3g} s on other ranks with the same work, which wait; this costs "
        f"{share:.0%} of the iteration (--straggler-share {limit:g}). Check the GPU's clock and "
        "temperature, other processes and the input files on this host"
    )


def _who(slowest: SlowestRank) -> str:
    ranks = format_ranks(slowest.ranks)
    several = len(slowest.ranks) > 1
    group = " (which wait for each other in every layer)" if several else ""
    return f"{ranks} on {format_names(slowest.hosts)}{group} {'are' if several else 'is'}"


def build_straggler_monitor(
    config: Config, timer: ComputeTimer, device: Device, hosts: Sequence[str]
) -> StragglerMonitor | None:
    """Return the monitor of a run; None if it is disabled.

    It names no rank where the ranks of a host compete for its cores: which of them is slow then
    changes by chance.

    Args:
        config: the run's configuration.
        timer: measures the steps of this rank.
        device: the device of this rank.
        hosts: host of each rank; the first one is this rank's on rank 0, which reports.
    """
    if not config.logging.log_straggler:
        return None
    threads = hosts.count(hosts[0]) * torch.get_num_threads()
    is_crowded = not device.is_cuda and threads > (os.cpu_count() or 1)
    limit = None if is_crowded else config.logging.straggler_share
    return StragglerMonitor(timer, rank_places(hosts, config.parallel), limit)
