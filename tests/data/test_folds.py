"""Arithmetic of the fold schedule, as properties of random folds."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llmjp.config.flags import parse
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.folds.loading import read_fold_file
from megatron_llmjp.data.folds.resolve import default_shuffle, resolve_folds
from megatron_llmjp.data.folds.schedule import DatasetInfo, apportion, epoch_seed
from megatron_llmjp.data.folds.schema import FoldFile
from megatron_llmjp.errors import UserError

LENGTH, BATCH = 16, 8
BATCHES = BatchSizeSchedule(
    parse(["--config", "laptop-llama", "--global-batch-size", str(BATCH)])[0]
)

weights = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)


@given(st.integers(0, 10**12), weights)
def test_apportion_is_exact_and_proportional(total, weights):
    counts = apportion(total, weights)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        quota = total * weight / sum(weights)
        assert abs(count - quota) < 1 + 1e-9 * quota


@given(st.integers(0, 10**6), st.integers(1, 9))
def test_equal_weights_give_equal_shares_earlier_first(total, parts):
    counts = apportion(total, [0.1] * parts)
    assert counts == [total // parts + (i < total % parts) for i in range(parts)]


@st.composite
def fold_files(draw):
    """Draw a fold file over three datasets that may be repeated, and the dataset facts."""
    sizes = draw(st.lists(st.integers(2 * LENGTH, 400 * LENGTH), min_size=3, max_size=3))
    datasets = {f"d{i}": DatasetInfo(f"key{i}", size) for i, size in enumerate(sizes)}
    folds = []
    for number in range(draw(st.integers(1, 5))):
        names = draw(st.lists(st.sampled_from(sorted(datasets)), min_size=1, unique=True))
        kind = draw(st.sampled_from(["weight", "tokens", "epochs", "fold epochs"]))
        amount = {
            "weight": st.floats(0.01, 10),
            "tokens": st.integers(LENGTH * 3, 300 * LENGTH),
            "epochs": st.floats(0.1, 3),
            "fold epochs": st.none(),
        }[kind]
        blend = {
            name: {"path": name, "repeat": True}
            | ({} if kind == "fold epochs" else {kind: draw(amount)})
            for name in names
        }
        fold = {"name": f"fold{number}", "blend": blend}
        if kind == "weight":
            budget = draw(st.sampled_from(["tokens", "iterations"]))
            fold[budget] = draw(st.integers(1, 40)) * (1 if budget == "iterations" else 3 * LENGTH)
        if kind == "fold epochs":
            fold["epochs"] = draw(st.floats(0.1, 2))
        folds.append(fold)
    return {"seed": draw(st.integers(0, 99)), "folds": folds}, datasets


def schedule_of(content, datasets):
    return resolve_folds(FoldFile.model_validate(content), datasets, LENGTH, BATCHES)


@given(fold_files())
def test_slices_are_contiguous(case):
    """No sample of a dataset is omitted, or drawn twice before its epoch is complete."""
    schedule = schedule_of(*case)
    streams = {}
    end = 0
    for fold in schedule.folds:
        assert fold.first_sample == end
        assert fold.samples == sum(piece.samples for piece in fold.slices) > 0
        end = fold.end
        for piece in fold.slices:
            assert piece.start == streams.get(piece.key, 0)
            streams[piece.key] = piece.start + piece.samples
    assert schedule.total_samples == end


@given(fold_files())
def test_budgets_are_kept(case):
    content, datasets = case
    for fold, plan in zip(content["folds"], schedule_of(*case).folds, strict=True):
        blend = fold["blend"]
        if "iterations" in fold:
            assert plan.samples == fold["iterations"] * BATCH
        elif "tokens" in fold:
            assert plan.samples == fold["tokens"] // LENGTH
        elif "tokens" in next(iter(blend.values())):
            assert plan.samples == sum(s["tokens"] for s in blend.values()) // LENGTH
        else:
            for piece, source in zip(plan.slices, blend.values(), strict=True):
                epochs = source.get("epochs") or fold["epochs"]
                whole = (datasets[piece.path].tokens - 1) // LENGTH
                assert abs(piece.samples - epochs * whole) <= 1


def test_iterations_are_counted_as_they_are_trained():
    """During batch size ramp-up, from the middle of a batch, and with skipped samples."""
    flags = ["--config", "laptop-llama", "--global-batch-size", "32", "--rampup-batch-size"]
    sizes = BatchSizeSchedule(parse([*flags, "8", "8", "300"])[0])
    blend = {"d0": {"path": "d0", "weight": 1, "repeat": True}}
    budgets = [{"iterations": 7}, {"iterations": 9}, {"samples": 100}, {"iterations": 40}]
    folds = [{"name": str(i), "blend": blend, **b} for i, b in enumerate(budgets)]
    datasets = {"d0": DatasetInfo("key", 400 * LENGTH)}
    content = {"folds": folds, "skip": [{"samples": [5, 25]}]}
    schedule = resolve_folds(FoldFile.model_validate(content), datasets, LENGTH, sizes)
    first, second, third, last = schedule.folds
    assert first.end == sizes.consumed_after(7) and second.end == sizes.consumed_after(16)
    begun, rest = sizes.iterations(third.end)
    assert rest and last.samples == sizes.consumed_after(begun + 40) - sizes.consumed_after(begun)
    assert schedule.total_samples == schedule.total_positions - 20


@given(fold_files(), st.data())
def test_a_change_to_a_fold_moves_nothing_before_it(case, data):
    content, datasets = case
    before = schedule_of(content, datasets)
    changed = data.draw(st.integers(0, len(content["folds"]) - 1))
    folds = [dict(fold) for fold in content["folds"]]
    fold = folds[changed]
    fold.pop("tokens", None), fold.pop("epochs", None)
    fold["iterations"] = 41
    fold["blend"] = {"other": {"path": "d1", "weight": 1, "repeat": True}}
    after = schedule_of({**content, "folds": folds}, datasets)
    assert after.folds[:changed] == before.folds[:changed]
    assert all(
        a.digest != b.digest
        for a, b in zip(after.folds[changed:], before.folds[changed:], strict=True)
        if a.first_sample != b.first_sample or a.slices != b.slices
    )
    assert after.folds[changed].digest != before.folds[changed].digest
    # The order also depends on the seed and on the contents of the datasets.
    assert schedule_of({**content, "seed": 100}, datasets).folds[0].digest != before.folds[0].digest
    first = before.folds[0].slices[0].path
    other = {**datasets, first: DatasetInfo("new contents", datasets[first].tokens)}
    assert schedule_of(content, other).folds[0].digest != before.folds[0].digest


@given(fold_files())
def test_digests_identify_the_samples_of_a_fold(case):
    """A closed form that no version may change: checkpoints contain the digests."""
    content, _ = case
    for fold in schedule_of(*case).folds:
        drawn = [[piece.key, piece.start, piece.samples] for piece in fold.slices]
        text = json.dumps([content["seed"], LENGTH, fold.name, fold.first_sample, drawn])
        assert fold.digest == hashlib.sha256(text.encode()).hexdigest()


@given(fold_files())
def test_digests_identify_the_shuffle(case):
    """A closed form that no version may change, either."""
    content, datasets = case
    plain, blocks = (
        schedule_of({**content, "shuffle": shuffle}, datasets).folds
        for shuffle in ("documents", "blocks")
    )
    for one, other in zip(plain, blocks, strict=True):
        text = json.dumps([one.digest, "shuffle", "blocks"])
        assert other.digest == hashlib.sha256(text.encode()).hexdigest()
        assert replace(other, digest="") == replace(one, digest="")


def test_the_default_shuffle_depends_on_the_size():
    """The indices of 10 M documents and samples take seconds to build."""

    def of(blocks: int, samples: int) -> DatasetInfo:
        return DatasetInfo("key", samples * LENGTH, block_tokens=np.zeros(blocks, np.int64))

    # 1,000 blocks are 4,096,000 documents
    assert default_shuffle([of(1000, 904_000), of(1000, 904_000)], LENGTH) == "documents"
    assert default_shuffle([of(1000, 904_000), of(1000, 904_001)], LENGTH) == "blocks"
    assert default_shuffle([DatasetInfo("key", 10**15)], LENGTH) == "documents"


@given(fold_files())
def test_every_sample_is_in_one_fold(case):
    schedule = schedule_of(*case)
    for fold in schedule.folds:
        for sample in {fold.first_sample, (fold.first_sample + fold.end) // 2, fold.end - 1}:
            assert schedule.fold_of_sample(sample) is fold
        names = [f.name for f in schedule.folds]
        place = names.index(fold.name)
        assert list(schedule.consumed_folds(fold.first_sample)) == names[:place]
        assert list(schedule.consumed_folds(fold.first_sample + 1)) == names[: place + 1]
    assert schedule.fold_of_sample(schedule.total_samples) is schedule.folds[-1]


SEEDS = [1342772630, 3562703572, 515370307]


def test_seeds_differ_between_epochs_and_datasets():
    seeds = [epoch_seed(s, k, e) for s in range(9) for k in ("a", "b") for e in range(9)]
    assert Counter(seeds).most_common(1)[0][1] == 1
    assert all(0 <= seed < 2**32 for seed in seeds)
    # Pinned: a resumed run must draw the same samples with every version of this program.
    assert [epoch_seed(7, "a", 0), epoch_seed(7, "a", 1), epoch_seed(7, "b", 0)] == SEEDS


WRONG = {
    "folds: []": "folds: ",
    "": "folds: Field required",
    "[1]": "the file: ",
    "folds: [f]": "fold '1': ",
    "fold: []": "fold: unknown key; did you mean 'folds'?",
    "folds: [{name: f, blends: BLEND}]": "fold 'f', blends: unknown key; did you mean 'blend'?",
    "folds: [{name: f, tokens: 9, blend: {a: {path: d, wieght: 1}}}]": (
        "fold 'f', blend, a, wieght: unknown key; did you mean 'weight'?"
    ),
    "folds: [{name: f, tokens: 9, iterations: 9, blend: BLEND}]": (
        "fold 'f': budget given as tokens and iterations"
    ),
    "folds: [{name: f, tokens: 9, blend: {a: {path: d, weight: 1}, b: {path: e, tokens: 9}}}]": (
        "fold 'f': the blend mixes tokens, weight"
    ),
    "folds: [{name: f, tokens: 9, blend: {a: {path: d, weight: 1, tokens: 3}}}]": (
        "mutually exclusive: give one of them"
    ),
    "folds: [{name: f, blend: BLEND}]": "weights require a budget",
    "folds: [{name: f, tokens: 9, blend: BLEND}, {name: f, tokens: 9, blend: BLEND}]": (
        "two folds are named 'f'"
    ),
    "folds: [{name: f, tokens: 9 G, blend: BLEND}]": (
        "fold 'f', tokens: expected a number such as 27600000000, 27.6B or 1e9, found '9 G'"
    ),
    "folds: [{name: f, iterations: -1, blend: BLEND}]": (
        "fold 'f', iterations: must be greater than 0"
    ),
    "folds: [{tokens: 9, blend: BLEND}]": "fold '1', name",
    "folds: [": "not valid YAML",
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_their_cause(tmp_path, case):
    path = tmp_path / "folds.yaml"
    path.write_text(case.replace("BLEND", "{a: {path: d, weight: 1}}"))
    with pytest.raises(UserError) as caught:
        read_fold_file(path)
    assert WRONG[case] in str(caught.value)
    lines = str(caught.value).splitlines()
    assert all(line.startswith((f"{path}, line 1: ", f"{path}: ")) for line in lines)
    assert (
        WRONG[case] in ("the file: ", "folds: Field required", "not valid YAML")
        or f"{path}, line 1: " in lines[-1]
    )


def test_too_small_and_repeated_datasets_raise():
    datasets = {"d0": DatasetInfo("key", 10 * LENGTH + 1), "d1": DatasetInfo("tiny", LENGTH)}

    def fails(fold):
        with pytest.raises(UserError) as caught:
            schedule_of({"folds": [{"name": "f", **fold}]}, datasets)
        return str(caught.value)

    more = {"blend": {"a": {"path": "d0", "weight": 1}}}
    message = fails({"tokens": 11 * LENGTH, **more})
    assert "fold 'f', dataset 'a'" in message and "1.10 epochs of d0" in message
    assert "repeat: true" in message
    message = fails({"epochs": 1, "blend": {"b": {"path": "d1"}}})
    assert "d1 has fewer tokens than one sample" in message
    assert "less than one sample" in fails({"tokens": LENGTH - 1, **more})
    # The second use of a dataset counts with the first.
    folds = [{"name": f"f{i}", "tokens": 6 * LENGTH, **more} for i in range(2)]
    with pytest.raises(UserError, match=r"fold 'f1'.*1\.20 epochs"):
        schedule_of({"folds": folds}, datasets)
    assert math.isclose(schedule_of({"folds": folds[:1]}, datasets).total_samples, 6)
