"""Exported tokenizers and end-of-text tokens, as transformers loads them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
import transformers

from megatron_llmjp.tokenizers.comparison import COMMON_TEXTS, RARE_TEXTS
from megatron_llmjp.tokenizers.registry import stored_tokenizer_fields
from megatron_llmjp.tokenizers.sentencepiece import load_sentencepiece
from megatron_llmjp.tokenizers.sentencepiece_fast import export_hugging_face
from tests.convert.hf_models import MODELS, llama
from tests.support.tokenizer_files import write_tiktoken

VOCABULARY = 600
"""Vocabulary size of all models here: larger than the tokenizers', like a padded embedding."""


def train(path: Path, kind: str = "unigram", **settings) -> Path:
    """Save a SentencePiece model with <EOD>, like LLM-jp's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in COMMON_TEXTS * 3 for line in text.split("\n") if line),
        model_writer=model, vocab_size=560, hard_vocab_limit=False, character_coverage=0.98,
        model_type=kind, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2, num_threads=1,
        control_symbols=["<MASK>", "<EOD>"], **settings,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path


def save_gpt2_bpe(folder: Path) -> None:
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(COMMON_TEXTS, trainer)
    folder.mkdir()
    fast.model.save(str(folder))


@pytest.fixture(scope="module")
def megatron(tmp_path_factory) -> Path:
    """Write a checkpoint of Megatron-LM without a tokenizer type in its arguments."""
    from megatron_llmjp.convert.cli import main

    folder = tmp_path_factory.mktemp("megatron")
    llama(vocab_size=VOCABULARY).save_pretrained(folder / "hf")
    words = ["--to", "megatron-lm", "--input", folder / "hf", "--output", folder / "lm"]
    assert main(list(map(str, words))) == 0
    return folder / "lm"


def ends(folder: Path) -> tuple[object, object, object]:
    """Return the end of text in config.json, generation_config.json and the tokenizer."""
    return (
        transformers.AutoConfig.from_pretrained(folder).eos_token_id,
        transformers.GenerationConfig.from_pretrained(folder).eos_token_id,
        transformers.AutoTokenizer.from_pretrained(folder).eos_token_id,
    )


SENTENCE_PIECE = {
    "SentencePieceTokenizer": "<EOD>",
    "GPTSentencePieceTokenizer": "</s>",
    "Llama2Tokenizer": "</s>",
}


@pytest.mark.parametrize("model", ["unigram", "bpe"])
@pytest.mark.parametrize("kind", SENTENCE_PIECE)
def test_a_sentencepiece_run_loads_with_its_end_of_text(tmp_path, convert, megatron, kind, model):
    path = train(tmp_path / "tok" / "any.model", model)
    convert("--to", "native", "--input", megatron, "--output", tmp_path / "native",
            "--tokenizer", path, "--tokenizer-type", kind)  # fmt: skip
    text = convert("--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "out")
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    eod = plain.piece_to_id(SENTENCE_PIECE[kind])
    assert f"tokenizer.json was built from any.model as {kind}" in text
    assert "give the same ids in SentencePiece and Hugging Face, 0 differ" in text
    assert f"{kind}, in " in convert("inspect", tmp_path / "native")
    assert ends(tmp_path / "out") == (eod, eod, eod)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for sample in (*COMMON_TEXTS, *RARE_TEXTS):
        assert fast(sample, add_special_tokens=False).input_ids == plain.encode(sample)
    assert (fast("a").input_ids[0] == plain.bos_id()) == (kind == "Llama2Tokenizer")
    assert (tmp_path / "out" / "any.model").read_bytes() == path.read_bytes()


def test_a_fast_tokenizer_with_another_end_of_text_is_rebuilt(tmp_path, convert, megatron):
    """train_tokenizer built it with <EOD>, the run used the model as Llama2Tokenizer."""
    path = train(tmp_path / "tok" / "tokenizer.model")
    export_hugging_face(load_sentencepiece("SentencePieceTokenizer", path), path.parent)
    (path.parent / "chat_template.jinja").write_text("{{ messages }}")
    for kind in ("Llama2Tokenizer", "SentencePieceTokenizer"):
        text = convert("--to", "hf", "--input", megatron, "--output", tmp_path / kind,
                       "--tokenizer", path.parent, "--tokenizer-type", kind.lower())  # fmt: skip
        eod = 2 if kind == "Llama2Tokenizer" else 4
        assert ends(tmp_path / kind) == (eod, eod, eod)
        assert (tmp_path / kind / "chat_template.jinja").read_text() == "{{ messages }}"
        assert ("it was rebuilt" in text) == (kind == "Llama2Tokenizer")
    same = (path.parent / "tokenizer.json").read_bytes()
    assert (tmp_path / "SentencePieceTokenizer" / "tokenizer.json").read_bytes() == same


def test_a_tokenizer_json_gets_the_runs_end_of_text(tmp_path, convert, megatron):
    """A Hugging Face tokenizer with the run's vocabulary, and the type of Megatron's arguments."""
    path = train(tmp_path / "tok.model")
    folder = tmp_path / "fast"
    folder.mkdir()
    export_hugging_face(load_sentencepiece("GPTSentencePieceTokenizer", path), folder)
    convert("--to", "native", "--input", megatron, "--output", tmp_path / "native",
            "--tokenizer", path, "--tokenizer-type", "SentencePieceTokenizer")  # fmt: skip
    convert("--to", "megatron-lm", "--input", tmp_path / "native", "--output", tmp_path / "lm")
    for source in ("native", "lm"):
        text = convert("--to", "hf", "--input", tmp_path / source, "--tokenizer", folder,
                       "--output", tmp_path / "out" / source)  # fmt: skip
        assert "eos_token of the tokenizer is <EOD> (4) in the export, </s> before" in text
        assert "its end-of-document token is" not in text  # it is replaced by the run's
        assert ends(tmp_path / "out" / source) == (4, 4, 4)


def test_a_hugging_face_run_ends_with_its_eos_token(tmp_path, convert, megatron):
    """Without tokenizer_config.json, eos is chosen by the token's name."""
    path = train(tmp_path / "tok.model")
    export_hugging_face(load_sentencepiece("GPTSentencePieceTokenizer", path), tmp_path)
    for name, files in (("bare", ["tokenizer.json"]),
                        ("full", ["tokenizer.json", "tokenizer_config.json"])):  # fmt: skip
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes((tmp_path / file).read_bytes())
        convert("--to", "native", "--input", megatron, "--output", tmp_path / "n" / name,
                "--tokenizer", tmp_path / name,
                "--tokenizer-type", "HuggingFaceTokenizer")  # fmt: skip
        text = convert(
            "--to", "hf", "--input", tmp_path / "n" / name, "--output", tmp_path / "o" / name
        )
        eod = 4 if name == "bare" else 2
        note = "eos_token of the tokenizer is <EOD> (4) in the export, none before"
        assert (note in text) == (name == "bare")
        assert ends(tmp_path / "o" / name) == (eod, eod, eod)


def test_a_gpt2_bpe_run_ends_with_its_token(tmp_path, convert, megatron):
    save_gpt2_bpe(tmp_path / "tok")
    convert("--to", "native", "--input", megatron, "--output", tmp_path / "native",
            "--tokenizer", tmp_path / "tok", "--tokenizer-type", "GPT2BPETokenizer")  # fmt: skip
    convert("--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "out")
    assert ends(tmp_path / "out") == (1, 1, 1)
    plain = transformers.GPT2Tokenizer.from_pretrained(tmp_path / "tok")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (*COMMON_TEXTS, *RARE_TEXTS):
        assert fast(text).input_ids == plain(text).input_ids


@pytest.mark.parametrize(
    "kind, eod", [("NullTokenizer", VOCABULARY - 1), ("ByteLevelTokenizer", 256)]
)
def test_types_without_files_have_an_end_of_text_id(tmp_path, convert, megatron, kind, eod):
    convert("--to", "native", "--input", megatron, "--output", tmp_path / "native",
            "--tokenizer-type", kind)  # fmt: skip
    text = convert("--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "out")
    assert "warning: the export has no tokenizer for AutoTokenizer" in text
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == eod


def test_a_null_tokenizer_is_replaced_by_the_given_tokenizer(tmp_path, convert, megatron):
    """The run's NullTokenizer has no tokens; --tokenizer defines them."""
    path = train(tmp_path / "tokenizer.model")
    convert("--to", "native", "--input", megatron, "--output", tmp_path / "null",
            "--tokenizer-type", "NullTokenizer")  # fmt: skip
    convert("--to", "native", "--input", tmp_path / "null", "--output", tmp_path / "native",
            "--tokenizer", path)  # fmt: skip
    text = convert("--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "out")
    assert "the run's tokenizer type is NullTokenizer, which has no files" in text
    assert "assumed SentencePieceTokenizer" in text
    assert ends(tmp_path / "out") == (4, 4, 4)


def test_an_unknown_type_is_assumed_with_a_note(tmp_path, convert, megatron):
    path = train(tmp_path / "tok.model")
    text = convert("--to", "hf", "--input", megatron, "--output", tmp_path / "out",
                   "--tokenizer", path)  # fmt: skip
    assert "assumed SentencePieceTokenizer, with the end-of-document token <EOD> (4)" in text
    assert "--tokenizer-type" in text
    text = convert("--to", "hf", "--input", megatron, "--output", tmp_path / "none")
    assert "warning: the export has no tokenizer" in text


@pytest.mark.parametrize("architecture", MODELS)
def test_generate_stops_at_the_end_of_text(tmp_path, convert, architecture):
    model = MODELS[architecture](vocab_size=VOCABULARY)
    model.save_pretrained(tmp_path / "hf")
    path = train(tmp_path / "tokenizer.model")
    convert("--to", "hf", "--input", tmp_path / "hf", "--output", tmp_path / "out",
            "--tokenizer", path, "--tokenizer-type", "SentencePieceTokenizer")  # fmt: skip
    assert ends(tmp_path / "out") == (4, 4, 4)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("日本の", return_tensors="pt").input_ids

    def third_is_the_end(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, 4 if ids.shape[1] == prompt.shape[1] + 2 else 9] = 0.0
        return forced

    generated = loaded.generate(prompt, max_new_tokens=9, logits_processor=[third_is_the_end])
    assert generated[0, prompt.shape[1] :].tolist() == [9, 9, 4]


GENERATION = {
    "_from_model_config": False, "bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 3,
    "do_sample": True, "temperature": 0.6, "top_p": 0.9, "suppress_tokens": [9],
    "transformers_version": "4.51.0",
}  # fmt: skip


def test_generation_config_is_kept_in_native_checkpoints(tmp_path, convert):
    llama(vocab_size=VOCABULARY, eos_token_id=[2, 5]).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(GENERATION))
    path = train(tmp_path / "tok" / "tokenizer.model")
    export_hugging_face(load_sentencepiece("Llama2Tokenizer", path), tmp_path / "hf")
    convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native")
    for source in ("hf", "native"):
        text = convert(
            "--to", "hf", "--input", tmp_path / source, "--output", tmp_path / "o" / source
        )
        assert "warning" not in text
        out = tmp_path / "o" / source
        assert json.loads((out / "generation_config.json").read_text()) == GENERATION
        config = json.loads((out / "config.json").read_text())
        assert (config["eos_token_id"], config["bos_token_id"]) == ([2, 5], 1)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (out / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    text = convert("--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "other",
                   "--tokenizer", path, "--tokenizer-type", "SentencePieceTokenizer")  # fmt: skip
    assert "eos_token_id [2, 5] were replaced by 4" in text
    changed = json.loads((tmp_path / "other" / "generation_config.json").read_text())
    assert (changed["eos_token_id"], changed["temperature"]) == (4, 0.6)
    assert ends(tmp_path / "other") == (4, 4, 4)


@pytest.mark.parametrize(
    "damage", ["[1]", "{", '{"eos_token_id": ["2"]}', '{"eos_token_id": true}']
)
def test_damaged_generation_configs_are_refused(tmp_path, convert, damage):
    llama(vocab_size=VOCABULARY).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text(damage)
    text = convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "o", code=2)
    assert "generation_config.json: " in text and text.count("\n") == 1


def test_tokenizers_of_other_models_are_errors_or_warnings(tmp_path, convert, megatron):
    (tmp_path / "empty").mkdir()
    words = ("--to", "hf", "--output", tmp_path / "out", "--tokenizer-type", "Llama2Tokenizer")
    text = convert(*words, "--input", megatron, "--tokenizer", tmp_path / "empty", code=2)
    assert "empty: contains no tokenizer; expected" in text
    (tmp_path / "empty" / "tokenizer_config.json").write_text("{}")
    text = convert(*words, "--input", megatron, "--tokenizer", tmp_path / "empty", code=2)
    assert "empty: contains no tokenizer; expected" in text
    own = train(tmp_path / "own.model")
    other = train(tmp_path / "other.model", split_digits=True)
    convert("--to", "native", "--input", megatron, "--output", tmp_path / "native",
            "--tokenizer", own, "--tokenizer-type", "Llama2Tokenizer")  # fmt: skip
    text = convert(*words, "--input", tmp_path / "native", "--tokenizer", other, code=2)
    assert "its ids differ from those of the tokenizer that the model was trained with" in text
    assert "differs at token" in text and not (tmp_path / "out").exists()
    text = convert(*words, "--input", megatron, "--tokenizer", other)
    assert f"ids, the model's vocabulary {VOCABULARY}: the model may generate ids" in text
    text = convert("--to", "megatron-lm", "--input", megatron, "--output", tmp_path / "lm",
                   "--tokenizer", own, code=2)  # fmt: skip
    assert "megatron-lm checkpoints do not contain a tokenizer" in text
    text = convert("--to", "hf", "--input", megatron, "--output", tmp_path / "typo",
                   "--tokenizer-type", "Llama2Tokeniser", code=2)  # fmt: skip
    assert "did you mean" in text.lower() and "Llama2Tokenizer" in text
    fast = tmp_path / "model_only"
    text = convert("--to", "hf", "--input", megatron, "--output", fast, "--tokenizer-type",
                   "HuggingFaceTokenizer", "--tokenizer", own, code=2)  # fmt: skip
    assert "HuggingFaceTokenizer" in text


def test_a_model_without_an_equal_fast_tokenizer_is_copied(
    tmp_path, convert, megatron, monkeypatch
):
    path = train(tmp_path / "tokenizer.model", "char")
    text = convert("--to", "hf", "--input", megatron, "--output", tmp_path / "out",
                   "--tokenizer", path, "--tokenizer-type", "Llama2Tokenizer")  # fmt: skip
    assert (
        "warning: AutoTokenizer cannot load the export, which has only sentencepiece.model" in text
    )
    assert "expected Unigram (1) or BPE (2)" in text
    assert (tmp_path / "out" / "sentencepiece.model").read_bytes() == path.read_bytes()
    with pytest.raises((ValueError, OSError)):
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_a_tiktoken_run_ends_with_its_token(tmp_path, pattern):
    from megatron_llmjp.convert.formats.hugging_face.tokenizer import export_tokenizer
    from megatron_llmjp.convert.model_tokenizer import ModelTokenizer
    from megatron_llmjp.tokenizers.base import TikTokenSettings
    from megatron_llmjp.tokenizers.tiktoken import TikTokenizer

    path = write_tiktoken(tmp_path / "tiktoken.json", 300)
    plain = TikTokenizer(path, TikTokenSettings(pattern, 10, ("<unk>", "<s>", "</s>", "<pad>")))
    chosen = ModelTokenizer("TikTokenizer", plain.files(), plain, plain.eod_id, True, (), ())
    exported = export_tokenizer(chosen, False, VOCABULARY)
    assert exported.warnings == []
    (tmp_path / "out").mkdir()
    for name, data in exported.files.items():
        (tmp_path / "out" / name).write_bytes(data)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (fast.eos_token_id, fast.bos_token_id, fast.pad_token_id) == (2, 1, 3)
    for text in (*COMMON_TEXTS, *RARE_TEXTS):
        assert fast(text).input_ids == plain.encode(text).tolist(), text


def test_a_run_from_converted_weights_uses_the_tokenizer_type(tmp_path, convert, megatron):
    from megatron_llmjp.checkpoint.resume import add_stored_config
    from megatron_llmjp.config.flags import parse

    path = train(tmp_path / "tok.model")
    for kind in ("Llama2Tokenizer", None):
        folder = tmp_path / str(kind)
        flags = ("--tokenizer-type", kind) if kind else ()
        convert("--to", "native", "--input", megatron, "--output", folder,
                "--tokenizer", path, *flags)  # fmt: skip
        words = ["--load", str(folder), "--finetune", "--lr", "1e-3"]
        config = parse(words, add_stored_config=add_stored_config).config
        assert config.data.tokenizer_type == (kind or "SentencePieceTokenizer")
        assert Path(config.data.tokenizer_model).name == "tok.model"


def test_generation_settings_are_not_a_tokenizer(tmp_path, convert):
    llama(vocab_size=VOCABULARY).save_pretrained(tmp_path / "hf")
    convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native")
    folder = tmp_path / "native" / "iter_0000000" / "tokenizer"
    assert [path.name for path in folder.iterdir()] == ["hf_generation.json"]
    assert stored_tokenizer_fields(folder, "HuggingFaceTokenizer") == {}
