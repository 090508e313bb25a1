"""Pictures of the documentation: up to date, and true to closed forms and megatron-core."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tools.docs.pictures import parallel_layout, pipeline_schedule
from tools.docs.pictures.__main__ import FOLDER, PICTURES


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_up_to_date(name):
    picture = (FOLDER / name).read_text(encoding="utf-8")
    assert picture == PICTURES[name](), "run python -m tools.docs.pictures"
    root = ElementTree.fromstring(picture)
    assert len(root) > 50
    width = float(root.attrib["width"])
    assert all(0 <= float(e.attrib["x"]) <= width for e in root.iter() if "x" in e.attrib)


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), [(4, 8, 1), (4, 8, 2), (2, 6, 3)])
def test_the_bubble_is_that_of_the_closed_form(stages, micro_batches, chunks):
    rows = pipeline_schedule.schedule(stages, micro_batches, chunks)
    expected = (stages - 1) / (chunks * micro_batches + stages - 1)
    assert pipeline_schedule.idle_share(rows) == pytest.approx(expected)
    for row in rows:  # each stage runs every pass once, a backward pass after its forward pass
        passes = {(p.forward, p.micro_batch, p.chunk): p.start for p in row}
        assert len(passes) == len(row) == 2 * micro_batches * chunks
        assert all(passes[True, m, c] < start for (f, m, c), start in passes.items() if not f)


def test_groups_are_those_of_megatron_core():
    from megatron.core.parallel_state import RankGenerator

    layout = parallel_layout.make_layout(
        parallel_layout.config(f"--config {parallel_layout.PRESET}"), parallel_layout.WORLD_SIZE
    )
    ranks = RankGenerator(layout.tp, 1, layout.dp, layout.pp, layout.cp, order="tp-cp-ep-dp-pp")
    expected = tuple(ranks.get_ranks(kind)[0] for kind in ("tp", "dp", "pp"))
    assert parallel_layout.groups_of_rank_0(layout) == expected
