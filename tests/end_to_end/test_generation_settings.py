"""Generation settings and chat template are kept through training and conversion."""

from __future__ import annotations

import json
from pathlib import Path

import transformers
import yaml

from data_tools.preprocess_data import main as preprocess
from megatron_llmjp.convert.cli import main as convert
from megatron_llmjp.tokenizers.comparison import COMMON_TEXTS
from megatron_llmjp.tokenizers.sentencepiece import load_sentencepiece
from megatron_llmjp.tokenizers.sentencepiece_fast import export_hugging_face
from tests.convert.hf_models import llama
from tests.convert.test_model_tokenizer import GENERATION, VOCABULARY, train
from tests.support.processes import pretrain


def test_ids_and_sampling_defaults_survive_training(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    llama(vocab_size=VOCABULARY, eos_token_id=[2, 5]).save_pretrained(source)
    (source / "generation_config.json").write_text(json.dumps(GENERATION))
    model = train(tmp_path / "tok.model")
    export_hugging_face(load_sentencepiece("Llama2Tokenizer", model), source)
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    run(convert, "--to", "native", "--input", source, "--output", tmp_path / "start",
        "--chat-template", tmp_path / "chat.jinja")  # fmt: skip

    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", source)
    with (tmp_path / "raw.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in COMMON_TEXTS)
    run(preprocess, "--input", tmp_path / "raw.jsonl", "--output-prefix", tmp_path / "d",
        "--append-eod", "--workers", 1, *flags)  # fmt: skip
    blend = {"only": {"path": "d_text_document", "weight": 1, "repeat": True}}
    folds = {"folds": [{"name": "fold00", "iterations": 2, "blend": blend}]}
    (tmp_path / "folds.yaml").write_text(yaml.safe_dump(folds))
    words = ("--load", tmp_path / "start", "--finetune", "--fold-file", tmp_path / "folds.yaml",
             "--save", tmp_path / "run", "--nproc-per-node", 1, "--micro-batch-size", 1,
             "--global-batch-size", 1, "--lr", 1e-3, "--seq-length", 32)  # fmt: skip
    done = pretrain(*map(str, words))
    assert done.returncode == 0, done.stderr

    run(convert, "--to", "hf", "--input", tmp_path / "run", "--output", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == GENERATION
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 5]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    before, after = (
        json.loads((folder / "tokenizer_config.json").read_text())
        for folder in (source, tmp_path / "out")
    )
    assert after.pop("chat_template", "{{ messages }}") == "{{ messages }}" and after == before


def run(program, *words: object) -> None:
    assert program(list(map(str, words))) == 0
