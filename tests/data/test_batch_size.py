"""Batch size schedule with ramp-up, compared with megatron-core's calculator."""

from __future__ import annotations

import pytest

from megatron_llmjp.config.flags import parse
from megatron_llmjp.data.batch_size import BatchSizeSchedule

MODEL = ("--num-layers", "1", "--hidden-size", "8", "--num-attention-heads", "1")


def batch_sizes(batch: int, *ramp: int) -> BatchSizeSchedule:
    flags = ["--rampup-batch-size", *map(str, ramp)] if ramp else []
    config = parse([*MODEL, "--global-batch-size", str(batch), *flags]).config
    return BatchSizeSchedule(config)


@pytest.mark.parametrize(
    ("batch", "ramp"),
    [
        (32, (8, 8, 300)),  # 300 / 3 divides
        (24, (4, 2, 1000)),
        (1536, (16, 16, 23457)),  # parts that are not whole numbers
        (40, (10, 10, 7)),  # sizes that are skipped
        (6, (2, 4, 1)),
    ],
)
def test_same_sizes_as_megatron_core(batch, ramp):
    core = pytest.importorskip("megatron.core.num_microbatches_calculator")
    calculator = core._build_num_microbatches_calculator(1, list(ramp), batch, 1, 1, False)
    ours = batch_sizes(batch, *ramp)
    consumed, sizes = 0, set()
    for iteration in range(1, ramp[2] // ramp[0] + 50):
        calculator.update(consumed, consistency_check=True)
        size = calculator.get_current_global_batch_size()
        sizes.add(size)
        assert ours.at(consumed) == size == calculator.get()
        for sample in {consumed, consumed + size // 2, consumed + size - 1}:
            assert ours.iteration_of(sample) == iteration
            assert ours.iterations(sample) == (iteration - 1, sample - consumed)
        consumed += size
        assert ours.consumed_after(iteration) == consumed
        if size == batch and len(sizes) > 1 and consumed > ramp[2] + 3 * batch:
            break
    assert size == batch and ours.sizes() == sorted(sizes)


def test_without_ramp_up():
    ours = batch_sizes(8)
    assert ours.at(12345) == 8 and ours.sizes() == [8]
    assert ours.consumed_after(10) == 80
    assert ours.iterations(85) == (10, 5)
    assert ours.iteration_of(0) == 1 and ours.iteration_of(80) == 11
