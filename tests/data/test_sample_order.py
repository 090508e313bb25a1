"""Sample order, for random folds, layouts, batch size ramp-ups, skips and interruptions."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.dataloader import MicroBatchSampler
from megatron_llmjp.data.folds.schedule import DatasetSlice, FoldPlan, Schedule, SkippedSamples
from megatron_llmjp.data.indices.interleave import StoredOrder, blend_order, fold_order

CONFIG = parse(["--config", "laptop-llama"])[0]
UNIT = 8
"""Divisor of all batch sizes, so that all these layouts can run them."""
LAYOUTS = [(d, m) for d in (1, 2, 4, 8) for m in (1, 2, 4, 8) if UNIT % (d * m) == 0]
"""Data-parallel size and micro-batch size; all ranks of a replica read the same samples."""

Ids = list[tuple[str, str, int]]


@st.composite
def schedules(draw, skipping: bool = True) -> Schedule:
    """Draw folds over three streams that continue from fold to fold."""
    cursors, folds, first = dict.fromkeys("abc", 0), [], 0
    for number in range(draw(st.integers(1, 4))):
        counts = draw(st.lists(st.integers(0, 60), min_size=3, max_size=3).filter(any))
        slices = tuple(
            DatasetSlice(name, name, name, cursors[name], n, 1000)
            for name, n in zip("abc", counts, strict=True)
        )
        for piece in slices:
            cursors[piece.name] = piece.end
        folds.append(FoldPlan(f"f{number}", first, sum(counts), slices, ""))
        first += sum(counts)
    schedule = Schedule(1, 16, tuple(folds))
    if draw(st.booleans()):
        schedule = replace(schedule, shuffle="blocks")
    return schedule.with_skips(draw(skips(first))) if skipping else schedule


def skips(end: int) -> st.SearchStrategy[SkippedSamples]:
    place = st.integers(0, end)
    return st.lists(st.tuples(place, place), max_size=4).map(
        lambda pairs: SkippedSamples.of(tuple(sorted(pair)) for pair in pairs)
    )


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=5))
@example([(5, 8), (2, 5)])  # they touch
def test_skipped_ranges_are_the_runs_of_a_mask(pairs):
    mask = np.zeros(15, bool)
    for a, b in pairs:
        mask[a:b] = True
    found, kept = SkippedSamples.of(pairs), np.flatnonzero(~mask)
    edges = np.flatnonzero(np.diff(mask, prepend=False))
    assert found.ranges == tuple(map(tuple, edges.reshape(-1, 2)))
    assert bool(found) == mask.any()
    assert [found.position(n) for n in range(len(kept))] == kept.tolist()
    for p in range(15):
        assert found.kept_before(p) == np.count_nonzero(~mask[:p])
        assert found.before(p) == SkippedSamples.of([(a, min(b, p)) for a, b in found.ranges])
        assert found.kept(p, 15) == np.count_nonzero(~mask[p:]) and found.kept(15, p) == 0


@st.composite
def batch_sizes(draw) -> BatchSizeSchedule:
    increments, step, start = (draw(st.integers(low, 3)) for low in (0, 1, 1))
    size = UNIT * (start + increments * step)
    ramp = (UNIT * start, UNIT * step, draw(st.integers(1, 200))) if increments else None
    return BatchSizeSchedule(replace_fields(CONFIG, global_batch_size=size, rampup_batch_size=ramp))


@dataclass
class Data:
    """Return the samples by number, as the dataset locates them."""

    schedule: Schedule

    def __post_init__(self) -> None:
        # The cache is not used: a stored order is what blend_order returns.
        blocks = self.schedule.shuffle == "blocks"
        self.orders = {
            fold.name: fold_order("blocks", Path(), fold)
            if blocks
            else StoredOrder(*blend_order(fold))
            for fold in self.schedule.folds
        }

    def __getitem__(self, number: int) -> tuple[str, str, int]:
        position = self.schedule.position(number)
        fold = self.schedule.fold_at_position(position)
        which, inside = self.orders[fold.name].locate(position - fold.first_sample)
        piece = fold.slices[which]
        return fold.name, piece.name, piece.start + inside


def train(
    data: Data, sizes: BatchSizeSchedule, start: int, end: int, layout: tuple[int, int]
) -> list[Ids]:
    """Return the global batches of iterations ``(start, end]``, merged from all ranks."""
    replicas, micro = layout
    span = sizes.consumed_after(start), sizes.consumed_after(end)
    readers = [
        iter(MicroBatchSampler(*span, micro, rank, replicas, sizes.at)) for rank in range(replicas)
    ]
    batches: list[Ids] = []
    for iteration in range(start, end):
        size = sizes.at(sizes.consumed_after(iteration))
        turns = itertools.islice(itertools.cycle(readers), size // micro)
        batches.append([data[number] for reader in turns for number in next(reader)])
    assert all(next(reader, None) is None for reader in readers)
    return batches


@given(schedules(), batch_sizes(), st.data())
def test_an_interrupted_run_trains_on_the_same_batches(schedule, sizes, draw):
    data = Data(schedule)
    end, rest = sizes.iterations(schedule.total_samples)
    straight = train(data, sizes, 0, end, (1, 1))
    stops = sorted(draw.draw(st.lists(st.integers(0, end), max_size=4)))
    resumed = []
    for first, last in itertools.pairwise([0, *stops, end]):
        resumed += train(data, sizes, first, last, draw.draw(st.sampled_from(LAYOUTS)))
    assert resumed == straight
    # Every position once, in order, except skipped ones and the last partial batch.
    flat = [sample for batch in straight for sample in batch]
    everything = Data(schedule.with_skips(SkippedSamples()))
    kept = [
        everything[position]
        for position in range(schedule.total_positions)
        if not any(a <= position < b for a, b in schedule.skips.ranges)
    ]
    assert flat == kept[: len(kept) - rest]
    assert len(set(flat)) == len(flat)


@given(schedules(), st.data())
def test_counts_follow_the_order(schedule, draw):
    """Fold, end of the consumed samples and samples per dataset agree with the order itself."""
    data = Data(schedule)
    consumed = draw.draw(st.integers(0, schedule.total_samples))
    seen = [data[number] for number in range(consumed)]
    assert [schedule.fold_of_sample(n).name for n in range(consumed)] == [
        fold for fold, _, _ in seen
    ]
    if consumed:
        assert schedule.consumed_end(consumed) == schedule.position(consumed - 1) + 1
    counts = schedule.consumed_by_dataset(consumed)
    assert sum(counts.values()) == consumed
    assert {fold for fold, _ in counts} == set(schedule.consumed_folds(consumed))
    for fold in schedule.folds:
        whole = schedule.skips.kept(fold.first_sample, fold.end) == fold.samples
        for piece in fold.slices:
            exact = sum(sample[:2] == (fold.name, piece.name) for sample in seen)
            near = 0 if whole and schedule.sample_range(fold)[1] <= consumed else 3
            if schedule.shuffle == "blocks":
                assert counts.get((fold.name, piece.name), 0) == exact
            elif not any(a < fold.end and b > fold.first_sample for a, b in schedule.skips.ranges):
                assert abs(counts.get((fold.name, piece.name), 0) - exact) <= near


@given(schedules(skipping=False), st.data())
def test_skipping_moves_no_position(schedule, draw):
    """Skipping later samples does not affect earlier ones, or any samples but the skipped ones."""
    found = draw.draw(skips(schedule.total_positions))
    skipping, before = schedule.with_skips(found), Data(schedule)
    after = Data(skipping)
    first = found.ranges[0][0] if found else schedule.total_positions
    assert [after[n] for n in range(first)] == [before[n] for n in range(first)]
    dropped = {before[p] for a, b in found.ranges for p in range(a, b)}
    trained = [after[n] for n in range(skipping.total_samples)]
    assert set(trained) == {before[p] for p in range(schedule.total_positions)} - dropped
    positions = np.array([skipping.position(n) for n in range(skipping.total_samples)], dtype=int)
    assert (np.diff(positions) > 0).all()
    for number, position in enumerate(positions):
        assert skipping.skips.kept_before(int(position)) == number
