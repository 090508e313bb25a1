"""Epochs, up-sampling and how often tokens are seen, counted in the samples of real schedules."""

from __future__ import annotations

from collections import Counter

import pytest
import yaml

from megatron_llmjp.data.dataset import FoldDataset
from megatron_llmjp.data.folds.schedule import DatasetInfo
from megatron_llmjp.data.folds.schema import FoldFile
from megatron_llmjp.estimate.data_plan import format_data_plan
from megatron_llmjp.estimate.repetition import DatasetUse, dataset_uses, repetition_warnings
from tests.data.test_dataset import LENGTH, epochs_of, lengths_of, schedule_of, write_numbered
from tests.estimate.test_data_plan import config_of, planned

DOCUMENTS = {"a": 120, "b": 150, "c": 90}
A = {"path": "a", "repeat": True}
CASES = {
    "one epoch": [{"name": "x", "epochs": 1, "blend": {"a": {"path": "a"}}}],
    "two and a half": [{"name": "x", "blend": {"a": {"path": "a", "epochs": 2.5}}}],
    "continued": [
        {"name": f"x{i}", "samples": 150, "blend": {"a": A | {"weight": 2}, "b": {"path": "b",
         "weight": 1}}} for i in range(3)
    ],
    "restarted": [
        {"name": f"x{i}", "samples": 80, "blend": {"a": A | {"weight": 1, "restart": i > 0}}}
        for i in range(3)
    ],
    "two names": [
        {"name": "x", "blend": {"a": A | {"tokens": 3000}, "again": A | {"tokens": 5000}}}
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repetition")
    for i, (name, documents) in enumerate(DOCUMENTS.items()):
        write_numbered(folder / name, lengths_of(i, documents), 10_000 * i)
    return folder


def times_seen(run: FoldDataset, number: int, samples: int) -> Counter[int]:
    """Count how often each token of a dataset occurs in the first samples of a run."""
    seen: Counter[int] = Counter()
    for i in range(samples):
        tokens = run[i]["tokens"].tolist()
        seen.update(t for t in tokens if number * 10_000 <= t < (number + 1) * 10_000)
    return seen


def check(folder, folds, samples=None, tolerance=0.01, few=0) -> dict[str, DatasetUse]:
    """Compare the computed use of each dataset with the samples that the schedule gives.

    The number of its samples may differ by ``few``.
    """
    (folder / "folds.yaml").write_text(yaml.safe_dump({"seed": 3, "folds": folds}))
    schedule = schedule_of(folder)
    run = FoldDataset(schedule, epochs_of(folder))
    samples = samples or len(run)
    uses = {use.path: use for use in dataset_uses(schedule, samples)}
    trained, stored = 0, 0
    for path, use in uses.items():
        number = list(DOCUMENTS).index(path[-1])
        tokens = sum(lengths_of(number, DOCUMENTS[path[-1]]))
        seen = times_seen(run, number, samples)
        assert use.tokens == (tokens - 1) // LENGTH * LENGTH
        assert abs(use.trained_tokens - seen.total()) <= LENGTH * few
        assert use.epochs == use.trained_tokens / use.tokens
        found = Counter(seen.values()) + Counter({0: tokens - len(seen)})
        for times in {*found, *dict(use.seen)}:
            expected = dict(use.seen).get(times, 0.0)
            assert found[times] / tokens == pytest.approx(expected, abs=tolerance)
        assert sum(share for _, share in use.seen) == pytest.approx(1)
        trained, stored = trained + use.trained_tokens, stored + use.tokens
    for use in uses.values():
        share = (use.trained_tokens / trained) / (use.tokens / stored)
        assert use.upsampling == pytest.approx(share)
    return uses


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_seen_as_often_as_reported(case, folder):
    # Independent shuffles: expected values, to within the variation of few samples.
    check(folder, CASES[case], tolerance=0.06 if case == "restarted" else 0.01)


def test_a_run_that_ends_early(folder):
    uses = check(folder, CASES["continued"], samples=200, few=1)
    assert len(uses) == 2 and max(use.epochs for use in uses.values()) < 1


@pytest.mark.parametrize("samples", [150, 330, 400])
def test_order_of_megatron_lm(samples, folder):
    """The last of several epochs is shuffled with the others if most of it is used."""
    blend = {"a": {"path": "a", "repeat": True}}
    fold = {"name": "x", "order": "megatron", "samples": samples, "blend": blend}
    check(folder, [fold], tolerance=0.06)
    weights = {n: {"path": n, "weight": w, "repeat": True} for n, w in (("a", 3), ("c", 1))}
    check(folder, [fold | {"blend": weights}], tolerance=0.06, few=2)


def test_the_table_and_the_warning():
    blend = {
        "much": {"path": "a", "epochs": 8},
        "four": {"path": "b", "epochs": 4},
        "once": {"path": "c", "epochs": 1},
    }
    file = FoldFile.model_validate({"folds": [{"name": "x", "blend": blend}]})
    sizes = dict.fromkeys("abc", 16 * 100 + 1)
    plan, warnings = planned(file, sizes, config_of(16, 100))
    (warning,) = [text for text in warnings if "2305.16264" in text]
    assert warning.startswith("used for more than 4 epochs: a (8.00 epochs): repeated data")
    lines = [line.split() for line in format_data_plan(plan).splitlines()]
    assert ["much", "1.60K", "12.80K", "8.000", "1.85x", "8x"] in lines
    assert ["once", "1.60K", "1.60K", "1.000", "0.23x", "1x"] in lines
    assert plan.datasets[1].seen == ((4, 1.0),)
    # Once, and in proportion to the sizes: nothing to report.
    even = {name: {"path": name} for name in "abc"}
    file = FoldFile.model_validate({"folds": [{"name": "x", "epochs": 1, "blend": even}]})
    plan, warnings = planned(file, sizes, config_of(16, 100))
    assert "tokens seen" not in format_data_plan(plan) and not warnings
    assert [use.upsampling for use in plan.datasets] == [1, 1, 1]


def test_many_epochs_of_a_tiny_dataset():
    blend = {"a": {"path": "a", "repeat": True}}
    for order, size in (("folds", {"epochs": 10**7}), ("megatron", {"samples": 3 * 10**7 + 1})):
        folds = [{"name": "x", "order": order, "blend": blend, **size}]
        file = FoldFile.model_validate({"folds": folds})
        plan, _ = planned(file, {"a": 16 * 3 + 1}, config_of(16, 100))
        (use,) = plan.datasets
        assert use.epochs == pytest.approx(10**7) and use.seen[0][0] == pytest.approx(10**7, abs=1)
        assert len(repetition_warnings(plan.datasets)) == 1


def test_names_of_datasets_that_occur_twice():
    folds = [
        {"name": f"x{i}", "epochs": 1, "blend": {"ja": {"path": f"fold{i}/ja"}}} for i in range(2)
    ]
    file = FoldFile.model_validate({"folds": folds})
    infos = {f"fold{i}/ja": DatasetInfo(str(i), 1601).tokens for i in range(2)}
    plan, _ = planned(file, infos, config_of(16, 100))
    assert [use.name for use in plan.datasets] == ["fold0/ja", "fold1/ja"]
