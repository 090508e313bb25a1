"""Encoding with gigatoken: the ids and files of the tokenizer's own library, or none."""

from __future__ import annotations

import itertools
import json
import unicodedata
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from data_tools.preprocess.encoding import gigatoken_choice, gigatoken_tokenizer
from data_tools.preprocess.encoding.gigatoken_choice import choose_encoder, difficult_texts
from data_tools.preprocess.encoding.gigatoken_tokenizer import MAX_CACHE_BYTES
from data_tools.preprocess.encoding.new_characters import has_new_characters
from data_tools.preprocess_data import main
from megatron_llmjp.data.indexed_dataset_writer import IndexedDatasetWriter
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers.hugging_face import HuggingFaceTokenizer
from tests.data_tools.conftest import make_documents
from tests.support.tokenizer_files import write_gpt2

gigatoken = pytest.importorskip("gigatoken", reason="gigatoken is not installed")

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern in the tokenizer.json of Llama 3; that of Qwen 2 splits each digit."""
HOSTILE = [
    "",
    " ",
    "a<|endoftext|>b <|endoftext|> <|end<|pad|>",
    "\0\r\n\r\n \t\u3000x\u00a0",
    "👩\u200d👩\u200d👧 🇯🇵 e\u0301\u0301 が が",
    "\U00010ffd \U000323c0's \u088f's 1\u0c5c",
    "x" * 20_000,
    "\n" * 20_000 + " " * 5_000,
    "'Re'LL ſ's İ ǅ Ⅷ² ٣٤٥٦",
    "<tool> <tool>\n\n <tool>x<tool>",
]


def write_tokenizer(folder: Path, kind: str) -> Path:
    """Train a tokenizer that splits texts as a published family does."""
    fast = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    pattern = LLAMA3 if kind == "llama3" else LLAMA3.replace("{1,3}", "")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    fast.pre_tokenizer = by_bytes
    if kind != "gpt2":
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        fast.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    if kind == "qwen2":
        fast.normalizer = normalizers.NFC()
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([*make_documents(200, seed=3), "it's we'll they've " * 20], trainer)
    fast.add_tokens([AddedToken("<tool>", normalized=False)])
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("bpe")
    return {kind: write_tokenizer(base / kind, kind) for kind in ("gpt2", "llama3", "qwen2")}


@pytest.fixture(scope="module")
def hostile_corpus(tmp_path_factory) -> Path:
    texts = [*HOSTILE, *make_documents(150, seed=5)] * 2
    path = tmp_path_factory.mktemp("hostile") / "corpus.jsonl"
    bad = ["not JSON", '{"text": "\\ud800"}', '{"other": 1}', ""]
    lines = [
        json.dumps({"text": text, "lang": "ja"}, ensure_ascii=at % 2 > 0)
        for at, text in enumerate(texts)
    ]
    path.write_text("\n".join([*lines[:20], *bad, *lines[20:]]) + "\n")
    return path


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "qwen2"])
def test_same_ids_for_every_character_and_hostile_text(kind, folders):
    """Assigned and unassigned characters, before and after a contraction, a letter and a number."""
    original = HuggingFaceTokenizer(folders[kind])
    fast, _ = choose_encoder(original, "required", [], ["text"])
    assert fast.library == f"gigatoken {metadata.version('gigatoken')}"
    others = [c for c in map(chr, range(0x40000)) if unicodedata.category(c) != "Cs"]
    step = 1 if kind == "llama3" else 9
    probes = [
        f"{c}'s 1{c}a {c}{c}\n" for c in (*others[::step], *map(chr, range(0xE0000, 0xE0200)))
    ]
    new = {probe for probe in probes if has_new_characters(probe.encode())}
    assert len(new) > 500
    known = [probe for probe in probes if probe not in new]
    joined = ["".join(known[at : at + 64]) for at in range(0, len(known), 64)]
    texts = [*joined, *sorted(new)[:2000], *HOSTILE, *difficult_texts(original)]
    for text, ids in zip(texts, original.encode_batch(texts), strict=True):
        assert np.array_equal(fast.encode(text), ids), text[:80]


def run(corpus: Path, folder: Path, output: Path, mode: str, *more: str) -> dict[str, bytes]:
    """Preprocess a corpus, and return the files without the record of the library."""
    arguments = ["--input", str(corpus), "--output-prefix", str(output / "o"), "--append-eod"]
    arguments += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder)]
    assert main([*arguments, "--workers", "2", "--gigatoken", mode, *more]) == 0
    return read_files(output)


def read_files(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in filter(lambda name: name.endswith(".json"), found):
        manifest = json.loads(found[name])
        manifest["recipe"].pop("encoders", None)
        found[name] = json.dumps(manifest).encode()
    return found


@pytest.mark.parametrize(
    "flags",
    [
        ["--append-bos", "--min-characters", "5", "--max-tokens", "4000"],
        ["--shuffle-seed", "3", "--remove-duplicates"],
        ["--hooks", "hooks.py", "--on-error", "skip"],
        ["--shard", "1/2"],
    ],
    ids=lambda flags: flags[0],
)
def test_same_files_with_all_options(flags, folders, hostile_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.preprocess.input.blocks.BLOCK_BYTES", 20_000)
    monkeypatch.chdir(tmp_path)
    Path("hooks.py").write_text(
        "def transform(document):\n    return {'text': document['text'] * 2}\n"
    )
    config = json.loads((folders["llama3"] / "tokenizer_config.json").read_text())
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((folders["llama3"] / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<|pad|>"}))
    flags = ["--on-error", "quarantine", "--max-rejected", "5%", *flags]
    written = []
    for mode in ("off", "required"):
        (tmp_path / mode).mkdir()
        written.append(run(hostile_corpus, folder, tmp_path / mode, mode, *flags))
    assert written[0] == written[1]
    assert any(name.endswith(".bin") and data for name, data in written[0].items())


def test_a_run_continues_with_the_other_library(
    folders, hostile_corpus, tmp_path, monkeypatch, capfd
):
    """The files are the same, and the manifest records that gigatoken encoded a part."""

    class Killed(BaseException):
        pass

    monkeypatch.setattr("data_tools.preprocess.input.blocks.BLOCK_BYTES", 20_000)
    clock = itertools.count()
    ticking = SimpleNamespace(monotonic=lambda: 20.0 * next(clock))
    monkeypatch.setattr("data_tools.preprocess.job.job.time", ticking)
    flags = ["--on-error", "skip", "--max-rejected", "5%"]
    folder = folders["gpt2"]
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    whole = run(hostile_corpus, folder, tmp_path / "whole", "off", *flags)
    calls, original = itertools.count(), IndexedDatasetWriter.add

    def dying(self, *args):
        if next(calls) == 3:
            raise Killed
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(IndexedDatasetWriter, "add", dying)
        with pytest.raises(Killed):
            run(hostile_corpus, folder, tmp_path / "resumed", "required", *flags)
    assert run(hostile_corpus, folder, tmp_path / "resumed", "off", *flags) == whole
    assert "documents are done" in capfd.readouterr().err
    manifest = json.loads((tmp_path / "resumed/o_text_document.json").read_text())
    assert manifest["recipe"]["encoders"] == [f"gigatoken {metadata.version('gigatoken')}"]
    run(hostile_corpus, folder, tmp_path / "resumed", "required", *flags)
    assert "Already complete" in capfd.readouterr().out


def test_gpt2_files_and_added_special_tokens(tmp_path, folders):
    """GPT2BPETokenizer does not recognize <|endoftext|> in a text, and neither does gigatoken."""
    from megatron_llmjp.tokenizers.gpt2 import GPT2BPETokenizer

    original = GPT2BPETokenizer(*write_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt"))
    fast, _ = choose_encoder(original, "required", [], ["text"])
    assert len(fast.encode("<|endoftext|>")) > 1
    assert fast.encode(HOSTILE[2]).tolist() == original.encode(HOSTILE[2]).tolist()
    around = HuggingFaceTokenizer(folders["gpt2"])
    around.added = around.added._replace(before=[1], after=[0])
    fast, _ = choose_encoder(around, "required", [], ["text"])
    assert fast.encode("a b").tolist() == around.encode("a b").tolist()
    assert fast.encode("a b").tolist()[0] == 1


def test_wrong_ids_are_found_at_the_start(folders, hostile_corpus, tmp_path, monkeypatch, capsys):
    load = gigatoken.Tokenizer.from_json

    def load_wrong(data):
        encode = load(data).backend.encode

        def encode_wrong(text):
            ids = encode(text)
            ids[-1:] += text == HOSTILE[2]  # a text of the corpus
            return ids

        return SimpleNamespace(backend=SimpleNamespace(encode=encode_wrong))

    (tmp_path / "right").mkdir()
    (tmp_path / "wrong").mkdir()
    right = run(
        hostile_corpus,
        folders["gpt2"],
        tmp_path / "right",
        "off",
        "--on-error",
        "skip",
        "--max-rejected",
        "5%",
    )
    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", load_wrong)
    flags = ["--on-error", "skip", "--max-rejected", "5%"]
    assert run(hostile_corpus, folders["gpt2"], tmp_path / "wrong", "auto", *flags) == right
    assert "Not encoding with gigatoken: 2 of" in capsys.readouterr().err
    arguments = ["--input", str(hostile_corpus), "--output-prefix", str(tmp_path / "o"), *flags]
    arguments += ["--tokenizer-type", "HuggingFaceTokenizer", "--gigatoken", "required"]
    assert main([*arguments, "--tokenizer-model", str(folders["gpt2"])]) == 2
    assert "texts give other ids, such as 'a<|endoftext|>b" in capsys.readouterr().err


def test_reasons_not_to_use_it(folders, tokenizer_folder, monkeypatch):
    unigram = HuggingFaceTokenizer(tokenizer_folder)
    chosen, message = choose_encoder(unigram, "auto", [], ["text"])
    assert chosen is unigram and "does not support this tokenizer" in message
    original = HuggingFaceTokenizer(folders["gpt2"])
    original.tokenizer.encode_special_tokens = True
    assert "split_special_tokens" in choose_encoder(original, "auto", [], ["text"])[1]
    original.tokenizer.encode_special_tokens = False
    with monkeypatch.context() as patch:
        patch.setattr(gigatoken_choice.metadata, "version", lambda name: "0.11.0")
        assert "version 0.11.0 is not one of" in choose_encoder(original, "auto", [], ["text"])[1]

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gigatoken_choice.metadata, "version", missing)
    chosen, message = choose_encoder(original, "auto", [], ["text"])
    assert chosen is original and "fast-data" in message
    with pytest.raises(UserError, match="--gigatoken required: it is not installed"):
        choose_encoder(original, "required", [], ["text"])


def test_a_text_that_gigatoken_fails_on_is_encoded_by_the_original(folders, monkeypatch):
    fast, _ = choose_encoder(HuggingFaceTokenizer(folders["gpt2"]), "required", [], ["text"])
    panic = type("PanicException", (BaseException,), {})
    encode = fast._encode

    def fail(text):
        if text == "bad":
            raise panic("index out of bounds")
        return encode(text)

    monkeypatch.setattr(fast, "_encode", fail)
    expected = fast.original.encode_batch(["a b", "bad", "猫"])
    assert all(map(np.array_equal, fast.encode_batch(["a b", "bad", "猫"]), expected))
    with pytest.raises(UnicodeEncodeError):
        fast.encode_batch(["a", "\ud800"])


def test_memory_of_the_cache_is_limited(folders, monkeypatch):
    fast, _ = choose_encoder(HuggingFaceTokenizer(folders["gpt2"]), "required", [], ["text"])
    loads = []
    load = gigatoken.Tokenizer.from_json
    monkeypatch.setattr(
        gigatoken.Tokenizer, "from_json", lambda data: loads.append(1) or load(data)
    )
    memory = itertools.count(1 << 30, MAX_CACHE_BYTES // 3)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=next(memory)))
    monkeypatch.setattr(gigatoken_tokenizer.psutil, "Process", lambda: process)
    monkeypatch.setattr(gigatoken_tokenizer, "CHARACTERS_BETWEEN_CHECKS", 1)
    expected = fast.original.encode_batch(HOSTILE)
    for _ in range(11):
        assert all(map(np.array_equal, fast.encode_batch(HOSTILE), expected))
    assert len(loads) == 2
