"""Search over parallel layouts: those that fit into memory, ranked by predicted step time.

Memory is predicted closely enough to decide whether a layout fits (``memory.py``). The step time is
that of ``step_time.py``, also at a given ``--mfu``, which would be the same for all layouts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.config.schema import Config
from megatron_llmjp.config.validation import check_config
from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.run_estimate import RunEstimate, estimate_run
from megatron_llmjp.estimate.search.expert_candidates import coarse_candidates, refinements
from megatron_llmjp.estimate.search.layout_candidates import candidates, layout_key, variants
from megatron_llmjp.estimate.speed.measured_runs import ComparedRun

MAX_MEMORY_FRACTION = 0.95
"""Fraction of GPU memory that a suggested layout may use: predictions are off by up to 5 %."""
REFINED = 8
"""Number of fastest combinations of sizes whose layouts are all tried, with experts."""
VARIED = 10
"""Number of fastest layouts whose variants are tried."""


@dataclass(frozen=True)
class LayoutCandidate:
    """Layout that fits into memory, with its estimated step time."""

    estimate: RunEstimate
    given: bool
    """Whether it is the layout of the given configuration."""

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.estimate.step_seconds


def search_layouts(
    config: Config,
    machine: PlannedMachine,
    measured_runs: Sequence[ComparedRun] = (),
    beyond_node: bool = False,
) -> list[LayoutCandidate]:
    """Return all layouts that fit, fastest first, including the given one if it fits.

    Options that seldom make a layout faster are only tried on the fastest ones.

    Args:
        config: the run's configuration.
        machine: its GPUs.
        measured_runs: runs on the same machine that correct the predicted step times.
        beyond_node: whether to try only tensor-parallel groups that are larger than a node.
    """
    own = layout_key(config)
    # The padded vocabulary size depends on the tensor-parallel size.
    config = replace_fields(config, padded_vocab_size=None)
    machine = replace(machine, mfu=None)
    search = _Search(machine, tuple(measured_runs), own)
    if config.model.has_experts:
        found = search.fitting([config]) | search.with_experts(config, beyond_node)
    else:
        found = search.fitting([config, *candidates(config, machine, beyond_node)])
    for candidate in sorted(found.values(), key=_seconds)[:VARIED]:
        layout = candidate.estimate.layout
        more = variants(candidate.estimate.config, layout.copies)
        found = search.fitting(more) | found
    return sorted(found.values(), key=_seconds)


def has_divisible_layout(config: Config, machine: PlannedMachine) -> bool:
    """Return whether any searched layout divides GPUs, layers and batch, fitting or not."""
    return next(candidates(config, machine), None) is not None


@dataclass(frozen=True)
class _Search:
    """What all layouts of a search have in common."""

    machine: PlannedMachine
    measured_runs: tuple[ComparedRun, ...]
    own: object
    """Key of the given layout."""

    def fitting(self, configs: Iterable[Config]) -> dict[object, LayoutCandidate]:
        """Return the valid layouts that fit, by :func:`layout_key`; of equal ones the first."""
        found: dict[object, LayoutCandidate] = {}
        for config in configs:
            key = layout_key(config)
            if key in found:
                continue
            try:
                check_config(config, self.machine.world_size)
                estimate = estimate_run(config, self.machine, measured_runs=self.measured_runs)
            except UserError:
                continue
            given = key == self.own
            if estimate.memory_fraction <= (1.0 if given else MAX_MEMORY_FRACTION):
                found[key] = LayoutCandidate(estimate, given)
        return found

    def with_experts(self, config: Config, beyond_node: bool) -> dict[object, LayoutCandidate]:
        """Return layouts of a model with experts that fit: coarse ones, and all of fast sizes."""
        found: dict[object, LayoutCandidate] = {}
        for leanest, *others in coarse_candidates(config, self.machine, beyond_node):
            fits = self.fitting([leanest])
            if fits:
                found |= fits | self.fitting(others)
        fastest: dict[tuple[int, ...], LayoutCandidate] = {}
        for candidate in sorted(found.values(), key=_seconds):
            fastest.setdefault(_expert_sizes(candidate), candidate)
        for candidate in list(fastest.values())[:REFINED]:
            found = self.fitting(refinements(candidate.estimate.config, self.machine)) | found
        return found


def _expert_sizes(candidate: LayoutCandidate) -> tuple[int, ...]:
    layout = candidate.estimate.layout
    return layout.tp, layout.pp, layout.cp, layout.ep, layout.etp


def _seconds(candidate: LayoutCandidate) -> float:
    return candidate.seconds
