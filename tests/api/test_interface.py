"""The Python interface, compared with the files of a run and with other libraries."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
import transformers

import megatron_llmjp as ml
from megatron_llmjp.api.errors import only_user_errors
from megatron_llmjp.errors import DataError
from tests.support.forks import warm_context
from tests.support.tiny_run import ENGLISH, JAPANESE
from tests.support.tolerances import LOGITS, assert_close


def test_documents(tiny_run):
    dataset = ml.open_dataset(tiny_run / "data/en_text_document.bin")
    assert len(dataset) == 60 and dataset.tokens == sum(map(len, dataset))
    assert bytes(dataset[-1][:-1].tolist()).decode() == ENGLISH * 2
    with pytest.raises(ml.UserError, match=r"document 60: .* has documents 0 to 59"):
        dataset[60]
    with pytest.raises(ml.UserError, match="text requires a tokenizer"):
        dataset.text(0)


def test_samples_are_the_documents_that_their_lineage_names(tiny_run):
    run = ml.open_run(tiny_run / "checkpoints")
    datasets = {
        name: ml.open_dataset(tiny_run / f"data/{name}_text_document") for name in ("ja", "en")
    }
    for sample in run.batch(2) + run.batch(9):
        parts = [
            datasets[part.dataset][part.document][part.first_token :][: part.tokens]
            for part in sample.documents
        ]
        assert np.array_equal(sample.tokens, np.concatenate(parts))
    schedule = ml.open_schedule(tiny_run / "folds.yaml", seq_length=32, global_batch_size=4)
    assert np.array_equal(schedule.sample(33).tokens, run.schedule.sample(33).tokens)
    text = run.tokenizer.decode(schedule.sample(33).tokens).strip("\ufffd")  # parts of characters
    assert text in JAPANESE * 4
    with pytest.raises(ml.OutOfRangeError, match="iteration 11: expected 1 to 10"):
        run.batch(11)
    with pytest.raises(IndexError, match="sample 40: expected 0 to 39"):
        schedule.sample(40)


def test_metrics_are_those_of_the_file(tiny_run):
    lines = (tiny_run / "checkpoints/metrics.jsonl").read_text().splitlines()
    losses = {r["iteration"]: r["lm loss"] for r in map(json.loads, lines) if "lm loss" in r}
    metrics = ml.read_metrics(tiny_run / "checkpoints")
    assert metrics.to_pandas()["lm loss"].to_dict() == losses
    (record,) = (r for r in map(json.loads, lines) if "validation/valid" in r)
    table = metrics.to_pandas("validation")
    assert table["validation/valid"].to_dict() == {10: record["validation/valid"]}


def test_pandas_is_required_only_when_it_is_used(tiny_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    metrics = ml.read_metrics(tiny_run / "checkpoints")
    with pytest.raises(ml.NotInstalledError, match=r"pip install 'megatron_llmjp\[pandas\]'"):
        metrics.to_pandas()


def use_model(folder: str) -> list[object]:
    """Return logits and errors of a model, computed in this process."""
    model = ml.load_model(folder)
    assert model.logits(torch.tensor([5, 6])).shape == (2, model.vocab_size)
    errors = []
    for call in (
        lambda: model.logits([[300]]),
        lambda: model.logits([[1] * 33]),
        lambda: model.logits([0.5]),
        lambda: model.generate("a", topp=0.5),
        lambda: model.generate(["a", ""]),
        lambda: next(model.stream("")),
    ):
        try:
            call()
        except ml.UserError as error:
            errors.append(str(error))
    return [model.logits([[97, 98, 99]]).tolist(), errors]


def test_logits_are_those_of_transformers(tiny_run, tmp_path, capsys):
    converted = ml.convert_checkpoint(tiny_run / "checkpoints", tmp_path / "hf", to="hf")
    assert capsys.readouterr().out == ""
    reference = transformers.AutoModelForCausalLM.from_pretrained(converted.path)
    with ProcessPoolExecutor(1, mp_context=warm_context()) as pool:
        logits, errors = pool.submit(use_model, str(tiny_run / "checkpoints")).result()
    with torch.no_grad():
        expected = reference(torch.tensor([[97, 98, 99]])).logits
    assert_close(torch.tensor(logits), expected, LOGITS)
    problems = [
        "tokens: expected ids of 0 to 257",
        "tokens: 33 per sequence, but the model has",
        "tokens: expected integers of the shape [b, s] or [s], found torch.float32 [1]",
        "topp: unknown parameter; did you mean 'top_p'",
        "prompt 1: is empty",
        "prompt: is empty",
    ]
    assert len(errors) == len(problems)
    assert all(problem in error for problem, error in zip(problems, errors, strict=True))


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: ml.open_dataset("missing"), "missing.idx: no such file"),
        (lambda: ml.open_run("missing"), "missing: no such folder"),
        (lambda: ml.read_metrics("missing"), "missing has no metrics.jsonl"),
        (lambda: ml.load_model("missing"), "missing: does not exist"),
        (lambda: ml.load_config("laptop-llama", num_layer=2), "num-layers"),
        (lambda: ml.estimate_run("llm-jp-3-13b", gpus=8, gpu_type="X9"), "X9"),
        (lambda: ml.estimate_run("llm-jp-3-13b", gpus=7, gpu_type="H100"), "7"),
        (lambda: ml.convert_checkpoint("missing", "out", to="gguf"), "to 'gguf': expected one of"),
        (lambda: ml.convert_checkpoint("missing", "out", to="hf"), "missing"),
        (lambda: ml.load_tokenizer("Sentencepiece"), "unknown type"),
        (
            lambda: ml.open_schedule("missing.yaml", seq_length=8, global_batch_size=1),
            "missing.yaml",
        ),
    ],
)
def test_errors_are_user_errors_and_nothing_is_printed(
    call, problem, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ml.UserError) as caught:
        call()
    assert problem in str(caught.value)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DataError("x"), ml.DatasetError),
        (FileNotFoundError(2, "No such file", "f"), ml.OperationError),
        (SystemExit(2), ml.OperationError),
    ],
)
def test_other_errors_become_user_errors(error, kind):
    with pytest.raises(kind), only_user_errors():
        raise error
