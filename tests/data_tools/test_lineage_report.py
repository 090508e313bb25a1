"""``inspect_dataset --run`` on a run of two data-parallel ranks, compared with its data loader."""

from __future__ import annotations

import json

import pytest
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_tools.inspect_dataset import main
from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.config.flags import parse
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.dataloader import MicroBatchSampler
from megatron_llmjp.data.dataset import FoldDataset
from megatron_llmjp.data.indices.epoch_index import EpochDatasets
from megatron_llmjp.run import resolve_run
from tests.data_tools.test_source_lines import inspect_in_a_process
from tests.support.datasets import write_folds
from tests.support.processes import run_ranks
from tests.support.training import Job, arguments, train_all

RANKS, ITERATIONS = 2, 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a save folder with checkpoints of iterations 4 and 6, and the resolved run."""
    folder = tmp_path_factory.mktemp("run")
    folds = write_folds(folder, iterations=(3, 4))
    content = yaml.safe_load(folds.read_text())
    folds.write_text(yaml.safe_dump({**content, "skip": [{"samples": [6, 10]}]}))
    flags = arguments(
        "laptop-llama", folds, "--train-iters", ITERATIONS, "--save-interval", 4,
        "--num-layers", 1, "--num-attention-heads", 2, "--rampup-batch-size", 2, 2, 4,
        "--eod-mask-loss", "--reset-attention-mask", "--z-loss-strength", 1e-2,
    )  # fmt: skip
    config = parse([*flags, "--save", str(folder / "save")]).config
    run = resolve_run(config, RANKS)
    train_all([Job("save", (0, RANKS), tuple(flags))], RANKS, folder)
    # The report depends on the checkpoints, not on later changes to the fold file.
    folds.write_text("folds: []")
    return folder / "save", run


def report(capsys, *words):
    code = main([*map(str, words), "--json"])
    output = capsys.readouterr()
    assert code == 0, output.err
    return json.loads(output.out)


def test_the_batch_of_an_iteration_equals_the_data_loader(trained, capsys):
    save, run = trained
    data = FoldDataset(run.schedule, EpochDatasets(run.config.data, run.tokenizer, run.cache))
    sizes = BatchSizeSchedule(run.config)
    assert [sizes.consumed_after(i) for i in range(ITERATIONS + 1)] == [0, 2, 4, 8, 12, 16, 20]
    for iteration in (1, 3, 5, 6):
        batch = report(capsys, "--run", save, "--iteration", iteration)
        told = {}
        for entry in batch:
            assert entry["iteration"] == iteration
            tokens = [token for part in entry["documents"] for token in part["tokens"]]
            place = (entry["data_parallel_rank"], entry["micro_batch"])
            told.setdefault(place, []).append(tokens)
            assert entry["position"] == run.schedule.position(entry["sample"])
            for part in entry["documents"]:
                whole = document(part["path"], part["document"])
                first = part["first_token"]
                assert whole[first : first + len(part["tokens"])] == part["tokens"]
        found = {}
        for rank in range(RANKS):
            span = sizes.consumed_after(iteration - 1), sizes.consumed_after(iteration)
            for number, micro in enumerate(MicroBatchSampler(*span, 1, rank, RANKS, sizes.at)):
                samples = [data[k] for k in micro]
                found[rank, number] = [
                    [*s["tokens"].tolist(), int(s["labels"][-1])] for s in samples
                ]
        assert told == found
    first = report(capsys, "--run", save, "--sample", 6)[0]
    assert (first["position"], first["iteration"]) == (10, 3)
    assert report(capsys, "--run", save, "--position", 10)[0] == first
    skipped = report(capsys, "--run", save, "--position", 7)[0]
    assert skipped["sample"] is skipped["iteration"] is None


def document(path, number):
    read = IndexedDataset(path)
    first, end = read.document_indices[number : number + 2]
    return [int(token) for sequence in range(first, end) for token in read[sequence]]


def test_a_document_is_found_in_its_samples(trained, capsys):
    save, run = trained
    part = report(capsys, "--run", save, "--iteration", 5)[0]["documents"][0]
    words = ["--run", save, "--dataset", part["dataset"], "--document", part["document"]]
    found = report(capsys, *words)
    assert found == report(capsys, *words[:3], part["path"], *words[4:])
    assert {e["iteration"] for e in found if e["iteration"]} >= {5}
    total = run.schedule.total_positions
    every = [report(capsys, "--run", save, "--position", p)[0] for p in range(total)]
    expected = [
        entry["position"]
        for entry in every
        for other in entry["documents"]
        if (other["path"], other["document"]) == (part["path"], part["document"])
    ]
    assert [entry["position"] for entry in found] == expected


def test_text_report(trained, capsys):
    save, _ = trained
    assert main(["--run", str(save), "--iteration", "5", "--max-tokens", "3"]) == 0
    text = capsys.readouterr().out
    assert "iteration 5: samples 12 to 15, according to " in text and "iter_0000006" in text
    assert "--- sample 13, position 17, iteration 5, fold 'fold01', epoch 0, " in text
    assert "micro-batch 0 of data-parallel rank 1" in text
    assert main(["--run", str(save), "--dataset", "ja", "--document", "0"]) == 0
    assert "document 0 of ja is " in capsys.readouterr().out
    for words, message in (
        (["--iteration", "9"], "--iteration 9: expected 1 to "),
        (["--dataset", "jp", "--document", "1"], "the datasets of the run are en, ja"),
        (["--dataset", "ja", "--document", "999"], "ja has documents 0 to 399"),
        (["--sample", "-1"], "--sample -1: expected 0 to "),
        (["--dataset", "ja"], "--run requires one of"),
        (["--iteration", "1", "--fold-file", "none.yaml"], "none.yaml cannot be read"),
    ):
        assert main(["--run", str(save), *words]) == 2
        assert message in capsys.readouterr().err


def test_the_losses_of_two_ranks_have_the_logged_mean(trained):
    """With a z-loss, masked tokens, attention within documents, and skipped samples."""
    save, _ = trained
    flags = ["--run", str(save), "--iteration", "5", "--losses", "--json"]
    (text,) = run_ranks(inspect_in_a_process, 1, *flags)
    found = json.loads(text)
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    (logged,) = [r["lm loss"] for r in records if r["iteration"] == 5 and "lm loss" in r]
    assert found["logged_loss"] == logged == pytest.approx(found["loss"], rel=1e-5)
    assert found["tokens"] == sum(d["tokens"] for d in found["documents"]) < 4 * 32


def test_changed_data_raises(trained, capsys):
    save, _ = trained
    copy = save / manifests.folder_name(6) / manifests.FOLDS
    content = yaml.safe_load(copy.read_text())
    content["folds"][0]["blend"]["ja"]["weight"] = 7
    other = save / "other.yaml"
    other.write_text(yaml.safe_dump(content, sort_keys=False))
    assert main(["--run", str(save), "--iteration", "5", "--fold-file", str(other)]) == 2
    message = capsys.readouterr().err
    assert "the data differs from" in message and "fold 'fold00'" in message
    assert "weight 1 -> 7: 6 samples instead of 3" in message
