"""Compatibility of a resumed run's data with the run history, and its overrides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from data_tools.run_history import open_run
from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint.manifest import Manifest
from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import dump_config
from megatron_llmjp.data.folds import datasets as fold_datasets
from megatron_llmjp.data.folds import resolve
from megatron_llmjp.data.folds.datasets import compute_keys
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import file_crc32
from megatron_llmjp.run import Run, resolve_run
from tests.support.datasets import write_dataset, write_folds
from tests.support.training import arguments

BATCH = 4


@pytest.fixture
def folds(tmp_path):
    """Folds of 6, 5 and 4 iterations."""
    return write_folds(tmp_path, repeat=True)


def run_of(path: Path, *flags: object) -> Run:
    return resolve_run(parse(arguments("laptop-llama", path, *flags))[0], 1)


def save(run: Run, iteration: int, root: Path) -> Path:
    """Write the checkpoint of a run after an iteration, without tensors."""
    folder = root / manifests.folder_name(iteration)
    folder.mkdir(parents=True)
    (folder / manifests.CONFIG).write_text(dump_config(run.config))
    contents = Manifest(
        iteration=iteration,
        consumed_samples=iteration * BATCH,
        contents="full",
        folds=run.schedule.consumed_folds(iteration * BATCH),
        skips=list(run.schedule.skips.ranges),
        skipped_iterations=dict(run.history.skipped_iterations),
        overrides=list(run.history.overrides),
        files=manifests.file_entries(folder, manifests.all_files(folder)),
    )
    manifests.write_manifest(folder, contents)
    return folder


def edited(path: Path, change) -> Path:
    content = yaml.safe_load(path.read_text())
    change(content)
    other = path.with_name("edited.yaml")
    other.write_text(yaml.safe_dump(content, sort_keys=False))
    return other


def weigh(content):
    content["folds"][1]["blend"]["ja"]["weight"] = 2


CHANGES = {
    # edit -> message; ja and en are 3 to 1 in fold01 of 20 samples
    "weight": (weigh, "fold 'fold01' has changed: dataset en: 7 samples instead of 5; dataset ja: "
               "weight 3 -> 2: 13 samples instead of 15"),
    "budget": (lambda c: c["folds"][0].update(iterations=7), "fold 'fold00' has changed: it has "
               "28 samples instead of 24"),
    "seed": (lambda c: c.update(seed=8), "fold 'fold00' has changed: seed 7 -> 8"),
    "dataset": (lambda c: c["folds"][1]["blend"].pop("en"), "dataset en was removed"),
    "more": (lambda c: c["folds"][1]["blend"].update(x={"path": "valid", "weight": 1}),
             "dataset x was added"),
    "restart": (lambda c: c["folds"][1]["blend"]["ja"].update(restart=True),
                "dataset ja: continues from sample 632 of its stream instead of 8"),
    "order": (lambda c: c["folds"][0].update(order="megatron"), "order folds -> megatron"),
    "shuffle": (lambda c: c.update(shuffle="blocks"), "shuffle documents -> blocks"),
    "skip": (lambda c: c.update(skip=[{"samples": [3, 5]}]),
             "samples skipped so far: none -> [3, 5)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_changes_of_consumed_folds_are_reported(folds, tmp_path, case):
    change, expected = CHANGES[case]
    save(run_of(folds), 7, tmp_path / "run")
    with pytest.raises(UserError) as caught:
        run_of(edited(folds, change), "--load", tmp_path / "run")
    assert expected in str(caught.value) and "--override-resume folds" in str(caught.value)


@pytest.mark.parametrize("shuffle", ["documents", "blocks"])
def test_a_resumed_run_keeps_its_shuffle(folds, tmp_path, monkeypatch, shuffle):
    """Whatever the default is, which depends on the datasets, also of the validation sets."""
    before = run_of(edited(folds, lambda c: c.update(shuffle=shuffle)))
    folder = save(before, 7, tmp_path / "run")
    monkeypatch.setattr(resolve, "MAX_STORED_ENTRIES", 0 if shuffle == "documents" else 10**9)
    new = run_of(folds)
    assert new.schedule.shuffle != shuffle
    noted = "shuffle: blocks, because the datasets have more than" in "".join(new.notes)
    assert noted == (shuffle == "documents")
    resumed = run_of(folds, "--load", tmp_path / "run")
    assert resumed.schedule == before.schedule and resumed.schedule.shuffle == shuffle
    assert resumed.validation == before.validation
    assert open_run(tmp_path / "run", lambda _: True, folds).schedule.shuffle == shuffle
    if shuffle == "documents":  # earlier versions did not record it
        content = json.loads((folder / manifests.MANIFEST).read_text())
        for record in content["folds"].values():
            del record["shuffle"]
        del content["checksum"]
        (folder / manifests.MANIFEST).write_text(json.dumps(content))
        assert run_of(folds, "--load", tmp_path / "run").schedule == before.schedule


def test_changed_datasets_are_reported(folds, tmp_path):
    save(run_of(folds), 7, tmp_path / "run")
    write_dataset(tmp_path / "ja", 400, seed=9)
    with pytest.raises(UserError, match=f"dataset ja: contents of {tmp_path / 'ja'} changed"):
        run_of(folds, "--load", tmp_path / "run")


def state_checksums(prefix: Path, wrong: str = "") -> None:
    """Write a dataset's manifest, which was part of its key in earlier versions."""
    checksums = {
        suffix: {"crc32": wrong or f"{file_crc32(prefix.with_suffix(f'.{suffix}')):08x}"}
        for suffix in ("bin", "idx")
    }
    prefix.with_suffix(".json").write_text(json.dumps(checksums))


def test_a_dataset_manifest_does_not_change_a_dataset(folds, tmp_path):
    """Adding or removing it changes no sample and does not prevent a resume."""
    without = run_of(folds)
    save(without, 7, tmp_path / "run")
    for name in ("ja", "valid"):
        state_checksums(tmp_path / name)
    assert run_of(folds).schedule.folds[0].digest == without.schedule.folds[0].digest
    resumed = run_of(folds, "--load", tmp_path / "run")
    assert [f.digest for f in resumed.schedule.folds] == [f.digest for f in without.schedule.folds]
    save(resumed, 8, tmp_path / "run")
    state_checksums(tmp_path / "ja", wrong="00000000")  # edited outside the digested bytes
    with pytest.raises(
        UserError, match=r"dataset ja: contents of .* changed .checksums in its manifest"
    ):
        run_of(folds, "--load", tmp_path / "run")
    (tmp_path / "ja.json").unlink()
    assert run_of(folds, "--load", tmp_path / "run").validation == without.validation


@pytest.mark.parametrize("records", [True, False], ids=["records", "digests only"])
@pytest.mark.parametrize("lost", [True, False], ids=["manifest lost", "manifest kept"])
def test_runs_of_earlier_versions_keep_their_order(folds, tmp_path, records, lost, monkeypatch):
    """Their keys included the checksums in the manifests: all folds keep their order."""
    for name in ("ja", "valid"):
        state_checksums(tmp_path / name)

    def earlier(prefix):
        keys = compute_keys(prefix)
        return replace(keys, key=keys.earlier or keys.key)

    with monkeypatch.context() as patch:
        patch.setattr(fold_datasets, "compute_keys", earlier)
        before = run_of(folds)
        file = save(before, 7, tmp_path / "run") / manifests.MANIFEST
    content = json.loads(file.read_text())
    for record in content["folds"].values():
        for dataset in record["datasets"].values():
            del dataset["checksums"]
    if not records:
        content["folds"] = {name: record["digest"] for name, record in content["folds"].items()}
    del content["checksum"]
    file.write_text(json.dumps(content))
    assert run_of(folds).schedule.folds[0].digest != before.schedule.folds[0].digest
    if lost:
        (tmp_path / "ja.json").unlink()
        if not records:  # the datasets are not recorded
            with pytest.raises(UserError, match="has changed"):
                run_of(folds, "--load", tmp_path / "run")
            return
    after = run_of(folds, "--load", tmp_path / "run")
    assert [fold.digest for fold in after.schedule.folds] == [
        fold.digest for fold in before.schedule.folds
    ]
    assert after.validation == before.validation


def test_later_folds_may_change(folds, tmp_path):
    save(run_of(folds), 7, tmp_path / "run")

    def later(content):
        content["folds"][2]["blend"]["ja"]["weight"] = 9
        content["folds"].append({**content["folds"][2], "name": "added"})
        content["skip"] = [{"samples": [28, 30]}]  # the first sample that is not consumed

    run = run_of(edited(folds, later), "--load", tmp_path / "run")
    assert run.history.overrides == () and run.schedule.position(28) == 30


def test_overrides_are_recorded(folds, tmp_path):
    save(run_of(folds), 7, tmp_path / "run")
    flags = ("--load", tmp_path / "run", "--override-resume", "folds")
    run = run_of(edited(folds, weigh), *flags)
    said = "dataset ja: weight 3 -> 2"
    assert [note for note in run.notes if "--override-resume folds" in note and said in note]
    save(run, 8, tmp_path / "run")
    # Later checkpoints contain it once, and compare with the changed fold.
    again = run_of(edited(folds, weigh), *flags)
    assert [(o.iteration, said in o.difference) for o in again.history.overrides] == [(7, True)]
    assert not [note for note in again.notes if "--override-resume folds" in note]


def test_checkpoints_of_earlier_versions_are_read(folds, tmp_path):
    """Manifests that contain a digest instead of a fold's fingerprint."""
    run = run_of(folds)
    file = save(run, 7, tmp_path / "run") / manifests.MANIFEST
    content = json.loads(file.read_text())
    content["folds"] = {name: record["digest"] for name, record in content["folds"].items()}
    for name in ("skips", "skipped_iterations", "overrides", "checksum"):
        del content[name]
    file.write_text(json.dumps(content))
    assert run_of(folds, "--load", tmp_path / "run").resume is not None
    with pytest.raises(UserError, match=r"fold01' has changed: .*does not record how"):
        run_of(edited(folds, weigh), "--load", tmp_path / "run")


def positions(run: Run) -> list[int]:
    return [run.schedule.position(n) for n in range(run.schedule.total_samples)]


def without(*iterations: int) -> list[int]:
    """Positions of all 15 iterations except these."""
    return [p for p in range(15 * BATCH) if p // BATCH + 1 not in iterations]


def test_skipped_iterations_stay_skipped(folds, tmp_path):
    """With and without the flag, also after several resumes."""
    save(run_of(folds), 7, tmp_path / "run")
    load = ("--load", tmp_path / "run")
    first = run_of(folds, *load, "--skip-iterations", "9-10, 12")
    assert positions(first) == without(9, 10, 12)
    assert first.train_iters == 12
    assert "samples 32 to 39 are skipped: --skip-iterations 9-10" in first.notes
    save(first, 8, tmp_path / "run")
    # Iteration numbers refer to the resumed run: iteration 10 is now 13.
    for flags, gone in {
        (): (9, 10, 12),
        ("--skip-iterations", "9-10,12"): (9, 10, 12),
        ("--skip-iterations", "9-10,12,10"): (9, 10, 12, 13),
    }.items():
        assert positions(run_of(folds, *load, *flags)) == without(*gone)
    # Iterations that the fold file skips are not counted.
    skip = edited(folds, lambda c: c.update(skip=[{"samples": [32, 36]}]))
    assert positions(run_of(skip, *load[:1], tmp_path / "run" / manifests.folder_name(7),
                            "--skip-iterations", "9")) == without(9, 10)  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "message"),
    {
        "7": "iteration 7 is already trained, the checkpoint is at iteration 7",
        "9-16": "the run has 15 iterations",
        "9-8": "expected iterations from 1 such as 1050-1060,2000, found '9-8'",
        "x": "found 'x'",
        "0-3": "found '0-3'",
    }.items(),
)
def test_invalid_skip_iterations(folds, tmp_path, flag, message):
    save(run_of(folds), 7, tmp_path / "run")
    with pytest.raises(UserError) as caught:
        run_of(folds, "--load", tmp_path / "run", "--skip-iterations", flag)
    assert message in str(caught.value)


def test_skip_iterations_with_train_iters(folds):
    run = run_of(folds, "--train-iters", 15, "--skip-iterations", "2-3")
    assert run.train_iters == 13
    expected = "the run ends at iteration 13, not with train_iters 15 at iteration 15: samples are "
    assert expected + "skipped" in run.notes
