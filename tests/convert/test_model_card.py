"""Model cards (``--model-card``) of models without and with the record of a run."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.convert.publishing.card import unfilled_fields
from tests.convert.hf_models import MODELS, llama
from tests.convert.test_model_tokenizer import VOCABULARY, train
from tests.convert.test_reference_model import save_tokenizer


def rows(card: str) -> dict[str, str]:
    """Return the rows of the tables with two columns."""
    return dict(re.findall(r"^\|([^|]+)\|([^|]*)\|$", card, re.M))


@pytest.mark.parametrize("architecture", MODELS)
def test_a_model_without_a_run_has_its_sizes_and_fields_to_fill(tmp_path, convert, architecture):
    model = MODELS[architecture]()
    model.save_pretrained(tmp_path / "source")
    text = convert("--to", "hf", "--input", tmp_path / "source", "--output", tmp_path / "out",
                   "--model-card")  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    embedding = model.get_input_embeddings().weight.numel()
    embedding *= 1 if model.config.tie_word_embeddings else 2
    total = sum(parameter.numel() for parameter in model.parameters())
    heads = model.config.num_attention_heads
    sizes = [total, 3, 64, heads, 64, embedding, total - embedding]
    assert f"|{'|'.join(f'{size:,}' for size in sizes)}|" in card
    assert rows(card)["Vocabulary size (rows of the embedding)"] == "101"
    expected = ["license", "language", "who developed", "usage", "number of training tokens",
                "accelerators", "training program", "training settings", "tokenizer",
                "datasets", "benchmarks", "known risks", "contact", "license", "names"]  # fmt: skip
    fields = unfilled_fields(card)
    assert len(fields) == len(expected)
    assert all(start in field for start, field in zip(expected, fields, strict=True))
    assert "has fields to fill: identifier of the license" in text
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata == {"library_name": "transformers", "pipeline_tag": "text-generation"}


def test_the_usage_runs(tmp_path, convert, monkeypatch, capsys):
    llama(vocab_size=VOCABULARY).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    convert("--to", "hf", "--input", tmp_path / "source", "--output", tmp_path / "out",
            "--model-card")  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.S)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code[1].replace("max_new_tokens=100", "max_new_tokens=2"), names)
    assert names["model"].dtype == torch.bfloat16
    assert capsys.readouterr().out.startswith("自然言語処理とは何か")
    assert "- **Vocabulary size:** " in card
    assert "EOS `</s>` (2)" in card


@pytest.fixture
def trained(tmp_path, convert):
    """A native checkpoint with the manifest and the metrics of a run; 3 of 4 iterations saved."""
    llama(vocab_size=VOCABULARY).save_pretrained(tmp_path / "hf")
    train(tmp_path / "tok" / "a.model")
    convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "run",
            "--tokenizer", tmp_path / "tok", "--tokenizer-type", "Llama2Tokenizer")  # fmt: skip
    folder = (tmp_path / "run" / "iter_0000000").rename(tmp_path / "run" / "iter_0000003")
    content = json.loads((folder / "manifest.json").read_text())
    datasets = {
        "ja": {"path": "/secret/ja", "key": "k1", "start": 0, "samples": 6},
        "en": {"path": "/secret/en", "key": "k2", "start": 0, "samples": 2},
    }
    fold = {"digest": "d", "seed": 7, "sequence_length": 64, "datasets": datasets}
    del content["checksum"]
    content |= {
        "iteration": 3,
        "consumed_samples": 12,
        "contents": "full",
        "versions": {"megatron_llmjp": "1.2.3", "torch": "2.13.0"},
        "data_parallel_size": 5,
        "folds": {
            "fold00": {**fold, "first_sample": 0, "samples": 8},
            "fold01": {**fold, "first_sample": 8, "samples": 8},
        },
    }
    manifests.write_manifest(folder, manifests.Manifest.model_validate(content))
    records = [{"iteration": 0, "event": "start", "hardware": "8 x NVIDIA H100 on 1 node"}]
    records += [{"iteration": i, "consumed samples": 4 * i, "lm loss": 9.0 - i} for i in (1, 2, 3)]
    records += [{"iteration": 3, "event": "start", "hardware": "1 x later GPU on 1 node"}]
    records += [{"iteration": 4, "consumed samples": 16, "lm loss": 1.25}]
    metrics = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "run" / "metrics.jsonl").write_text(metrics)
    return folder


def test_a_run_gives_data_hardware_software_and_curve_up_to_the_checkpoint(
    tmp_path, convert, trained
):
    convert("--to", "hf", "--input", trained, "--output", tmp_path / "out", "--model-card",
            "--no-checksums")  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- **Total seen tokens:** 768\n" in card
    # The first fold gives 6 and 2 samples; half of the second one 3 and 1.
    assert "|ja|fold00, fold01|about 576|\n|en|fold00, fold01|about 192|\n" in card
    assert "- **Hardware:** 8 x NVIDIA H100 on 1 node\n" in card
    assert "- **Software:** megatron_llmjp 1.2.3, torch 2.13.0\n" in card
    assert "- **Training loss:** 6.0000 at iteration 3\n" in card
    assert "later GPU" not in card and "1.25" not in card
    assert "/secret" not in card and str(tmp_path) not in card
    assert rows(card)["Data parallel size"] == "5"
    assert "![Loss curve](training_loss.png)" in card
    assert (tmp_path / "out" / "training_loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "- **Tokenizer type in training:** `Llama2Tokenizer`" in card
    for what in (
        "accelerators",
        "training program",
        "training settings",
        "picture",
        "datasets and",
    ):
        assert what not in " ".join(unfilled_fields(card))


def test_what_a_run_did_not_record_is_a_field(tmp_path, convert, trained):
    (trained.parent / "metrics.jsonl").unlink()
    content = json.loads((trained / "manifest.json").read_text())
    content["folds"] = {"fold00": "digest of an older version"}
    content.pop("checksum")
    manifests.write_manifest(trained, manifests.Manifest.model_validate(content))
    convert("--to", "hf", "--input", trained, "--output", tmp_path / "out", "--model-card",
            "--no-checksums")  # fmt: skip
    fields = " ".join(unfilled_fields((tmp_path / "out" / "README.md").read_text()))
    for what in ("accelerators", "picture of the loss curve", "datasets and their tokens"):
        assert what in fields
    assert not (tmp_path / "out" / "training_loss.png").exists()
