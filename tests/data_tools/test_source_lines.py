"""From JSON lines to the batch of an iteration and back, on a run that skipped samples later."""

from __future__ import annotations

import gzip
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from data_tools import preprocess_data
from data_tools.inspect_dataset import main
from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.convert import cli as converter
from tests.data_tools.conftest import make_documents
from tests.support.processes import run_ranks
from tests.support.training import Job, arguments, train_all

ITERATIONS, BATCH, LENGTH = 4, 4, 192


def write_corpus(path: Path, seed: int) -> list[bytes]:
    """Write Japanese and English documents with ids; return the lines."""
    lines = [
        json.dumps({"text": text, "meta": {"id": f"doc-{seed}-{at}"}}, ensure_ascii=False).encode()
        for at, text in enumerate(make_documents(60, seed))
    ]
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return lines


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model) -> Path:
    """Train on two datasets; then again from iteration 2, with iteration 3 skipped."""
    folder = tmp_path_factory.mktemp("run")
    paths = {"ja": folder / "corpus" / "ja.jsonl", "en": folder / "corpus" / "en.jsonl.gz"}
    paths["ja"].parent.mkdir()
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    for seed, (name, path) in enumerate(paths.items()):
        write_corpus(path, seed)
        words = ["--input", str(path), "--output-prefix", str(folder / name), *tokenizer]
        words += ["--append-eod", "--record-sources", "--id-key", "meta.id", "--workers", "1"]
        assert preprocess_data.main([*words, "--shuffle-seed", "3"] if seed else words) == 0
    blend = {name: {"path": f"{name}_text_document", "weight": 1} for name in paths}
    content = {"seed": 5, "folds": [{"name": "all", "blend": blend, "iterations": 8}]}
    folds = folder / "folds.yaml"
    folds.write_text(yaml.safe_dump(content, sort_keys=False))
    flags = arguments(
        "laptop-llama", folds, *tokenizer, "--save-interval", 1, "--num-layers", 1,
        "--num-attention-heads", 2, "--train-iters", ITERATIONS,
        # transformers computes the softmax without padding of the vocabulary.
        "--make-vocab-size-divisible-by", 1, tokenizer_type="", vocab_size="", seq_length=LENGTH,
    )  # fmt: skip
    load = folder / "first" / manifests.folder_name(2)
    skip = ["--load", str(load), "--skip-iterations", "3"]
    jobs = [Job("first", (0, 1), tuple(flags)), Job("second", (0, 1), (*flags, *skip))]
    train_all(jobs, 1, folder)
    return folder


def report(capsys, *words: Any) -> Any:
    code = main([*map(str, words), "--json"])
    output = capsys.readouterr()
    assert code == 0, output.err
    return json.loads(output.out)


def test_each_document_of_a_batch_is_the_line_of_its_file(trained, capsys):
    found = report(capsys, "--run", trained / "first", "--iteration", 3, "--source-line")
    assert len(found) == BATCH
    names = set()
    for part in (part for entry in found for part in entry["documents"]):
        source = part["source"]
        path = Path(source["file"])
        names.add(path.name)
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        line = data[source["offset"] :].split(b"\n")[0]
        assert line == data.split(b"\n")[source["line"] - 1]
        assert part["source_line"].encode() == line
        assert json.loads(line)["meta"]["id"] == source["id"]
    assert names == {"ja.jsonl", "en.jsonl.gz"}


def inspect_in_a_process(*words: str) -> str:
    """Return what inspect_dataset prints; it replaces torch.cuda on a machine without a GPU."""
    with redirect_stdout(io.StringIO()) as output:
        assert main(list(words)) == 0
    return output.getvalue()


def losses_of(*words: Any) -> dict[str, Any]:
    flags = [str(word) for word in (*words, "--losses", "--json")]
    (text,) = run_ranks(inspect_in_a_process, 1, *flags)
    return dict(json.loads(text))


def test_losses_are_those_of_the_run_and_of_transformers(trained, tmp_path, capsys):
    found = losses_of("--run", trained / "first", "--iteration", 3, "--source-line")
    assert found["checkpoint"].endswith(manifests.folder_name(2))
    records = map(json.loads, (trained / "first" / "metrics.jsonl").read_text().splitlines())
    (logged,) = [r["lm loss"] for r in records if r.get("iteration") == 3 and "lm loss" in r]
    assert found["logged_loss"] == logged == pytest.approx(found["loss"], rel=1e-5)
    assert found["tokens"] == BATCH * LENGTH == sum(d["tokens"] for d in found["documents"])
    words = ["--from", "native", "--to", "hf", "--input", found["checkpoint"]]
    assert converter.main([*words, "--output", str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    batch = report(capsys, "--run", trained / "first", "--iteration", 3)
    expected = []
    for entry in batch:
        parts = entry["documents"]
        tokens = torch.tensor([token for part in parts for token in part["tokens"]])
        logits = model(tokens[None, :-1]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").tolist()
        at = -1
        for part in parts:
            own = losses[max(at, 0) : at + len(part["tokens"])]
            at += len(part["tokens"])
            if own:
                worst = sorted(own, reverse=True)[:5]
                expected.append((sum(own) / len(own), part["document"], part["source"], worst))
    expected.sort(key=lambda row: -row[0])
    documents = [d for d in found["documents"] if d["loss"] is not None]
    assert len(documents) == len(expected) > BATCH
    for document, (loss, number, source, worst) in zip(documents, expected, strict=True):
        assert document["loss"] == pytest.approx(loss, rel=1e-4)
        assert (document["document"], document["source"]) == (number, source)
        losses = [token["loss"] for token in document["worst_tokens"]]
        assert losses == pytest.approx(worst, rel=1e-3)
        assert json.loads(document["source_line"])["meta"]["id"] == source["id"]
    assert sum(d["share"] for d in documents) == pytest.approx(1)


def test_an_iteration_that_was_repeated_with_other_samples(trained, capsys):
    """Attempt 1 is the batch before --skip-iterations, the last one the batch trained instead."""
    second = trained / "second"
    first = report(capsys, "--run", trained / "first", "--iteration", 3)
    later = report(capsys, "--run", second, "--iteration", 3)
    assert [entry["position"] for entry in first] == [8, 9, 10, 11]
    assert [entry["position"] for entry in later] == [12, 13, 14, 15]
    assert [entry["sample"] for entry in later] == [8, 9, 10, 11]
    assert report(capsys, "--run", second, "--iteration", 3, "--attempt", 1) == first
    assert report(capsys, "--run", second, "--iteration", 3, "--attempt", 2) == later
    skipped = report(capsys, "--run", second, "--positions", "8:12")
    texts = [[part["tokens"] for part in entry["documents"]] for entry in skipped]
    assert texts == [[part["tokens"] for part in entry["documents"]] for entry in first]
    assert main(["--run", str(second), "--iteration", "3"]) == 0
    note = "iteration 3, attempt 1: its samples were skipped later by --skip-iterations 3"
    assert note in capsys.readouterr().err
    checkpoint = trained / "first" / manifests.folder_name(2)
    losses = losses_of("--run", second, "--iteration", 3, "--checkpoint", checkpoint)
    records = map(json.loads, (second / "metrics.jsonl").read_text().splitlines())
    (logged,) = [r["lm loss"] for r in records if r.get("iteration") == 3 and "lm loss" in r]
    assert losses["loss"] == pytest.approx(logged, rel=1e-5)


def test_documents_by_their_own_id_and_moved_files(trained, capsys, tmp_path):
    part = report(capsys, "--run", trained / "first", "--iteration", 2)[0]["documents"][0]
    own = part["source"]["id"]
    (found,) = report(capsys, "--run", trained / "first", "--own-id", own)
    assert (found["path"], found["document"]) == (part["path"], part["document"])
    assert found["source"] == part["source"]
    by_number = ["--dataset", found["path"], "--document", found["document"]]
    assert found["samples"] == report(capsys, "--run", trained / "first", *by_number)
    assert 2 in {sample["iteration"] for sample in found["samples"]}
    corpus = trained / "corpus"
    moved = tmp_path / "archive" / "corpus"
    words = ["--run", str(trained / "first"), "--iteration", "2", "--source-line"]
    try:
        moved.parent.mkdir()
        corpus.rename(moved)
        assert main(words) == 0
        assert "(not read: " in capsys.readouterr().out
        text = report(capsys, *words, "--source-root", tmp_path / "archive")
        lines = [p["source_line"] for entry in text for p in entry["documents"]]
        assert all(json.loads(line)["meta"]["id"].startswith("doc-") for line in lines)
    finally:
        moved.rename(corpus)
    for more, message in (
        (["--own-id", "none"], "--own-id none: no document of the datasets has this id"),
        (["--iteration", "2", "--attempt", "2"], "--attempt 2: iteration 2 has attempts 1 to 1"),
        (["--iteration", "1", "--losses"], "has no checkpoint before iteration 1; give one with"),
        (["--iteration", "2", "--losses", "--checkpoint", "9"], "complete one in"),
        (["--iteration", "2", "--rank", "1"], "--rank 1: expected 0 to 0"),
        (["--sample", "2", "--losses"], "--losses requires --iteration"),
    ):
        assert main(["--run", str(trained / "first"), *more]) == 2
        assert message in capsys.readouterr().err
