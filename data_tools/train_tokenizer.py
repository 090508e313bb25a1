"""Train a SentencePiece Unigram tokenizer with LLM-jp's settings and export it to Hugging Face."""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_tools.common import ToolParser, run_tool
from data_tools.preprocess.encoding.sample import sample_texts
from data_tools.preprocess.input.remote.addresses import refuse_remote_output, shown
from data_tools.preprocess.input.sources import PLAIN_TEXT_SUFFIXES, SUFFIXES, find_input
from megatron_llmjp.arguments import positive_int
from megatron_llmjp.errors import EXIT_DONE, UserError

FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<MASK>", "<PAD>", "<CLS>", "<SEP>", "<EOD>")
TRAINING_THREADS = 16  # fixed, because the vocabulary depends on it
BYTE_TOKENS = 256
MAX_LINE_BYTES = 16384

EXAMPLES = """\
  Train a vocabulary of 32,000 for SentencePieceTokenizer (<EOD> ends a document):
    train_tokenizer --input ja.jsonl en.jsonl.gz --vocab-size 32000 --output-dir tokenizer

  Train one for Llama2Tokenizer (<s> document </s>):
    train_tokenizer --input corpus/ --vocab-size 32000 --output-dir tokenizer --eod-token '</s>'

The output folder contains tokenizer.model (SentencePiece, for preprocess_data) and the same
vocabulary as a Hugging Face fast tokenizer (for AutoTokenizer.from_pretrained). At the end both are
compared on text of the input."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    args = _parser().parse(argv)
    return run_tool("train_tokenizer", lambda: train_tokenizer(args))


def _parser() -> ToolParser:
    parser = ToolParser(
        "train_tokenizer",
        "Train a SentencePiece Unigram tokenizer with byte fallback on JSON lines or plain text, "
        "and export it\nas a Hugging Face fast tokenizer.",
        EXAMPLES,
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders, glob patterns, s3://, hf:// or https:// addresses, or -; "
        "JSON lines by file name, otherwise plain text",
    )
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="JSON keys of the text")
    add(
        "--output-dir",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="output folder, created if needed",
    )
    add(
        "--vocab-size",
        type=positive_int,
        required=True,
        metavar="N",
        help="vocabulary size, including 8 special tokens and 256 bytes",
    )
    add(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="share of characters covered by the vocabulary; others are encoded as bytes. "
        "Reduced automatically for a small vocabulary",
    )
    add(
        "--max-input-mb",
        type=positive_int,
        default=200,
        metavar="MB",
        help="train on a random sample of the lines of about this size",
    )
    add(
        "--eod-token",
        choices=("<EOD>", "</s>"),
        default="<EOD>",
        help="end-of-document token, and eos_token of the Hugging Face tokenizer",
    )
    add(
        "--check-documents",
        type=positive_int,
        default=1000,
        metavar="N",
        help="number of lines on which both tokenizers are compared",
    )
    add("--overwrite", action="store_true", help="replace an existing tokenizer")
    return parser


def train_tokenizer(args: argparse.Namespace) -> int:
    """Sample, train, export and compare, and then rename the files to their final names."""
    refuse_remote_output("--output-dir", args.output_dir)
    existing = [args.output_dir / name for name in FILES if (args.output_dir / name).exists()]
    if existing and not args.overwrite:
        raise UserError(
            f"{existing[0]} already exists. Datasets and models that use it need it: choose "
            "another --output-dir, or give --overwrite to replace it."
        )
    found = find_input(args.input, (*SUFFIXES, *PLAIN_TEXT_SUFFIXES))
    found.report()
    texts = sample_texts(found.sources, args.json_keys, args.max_input_mb * 1_000_000)
    if not texts:
        raise UserError(f"--input {' '.join(map(shown, args.input))}: no text found to train on")
    model = train_unigram(texts, args.vocab_size, args.character_coverage)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output_dir, prefix=".train_tokenizer.") as work:
        folder = Path(work)
        (folder / FILES[0]).write_bytes(model)
        step = max(1, len(texts) // args.check_documents)
        _export_hugging_face(folder, args.eod_token, texts[::step][: args.check_documents])
        for name in FILES:
            (folder / name).replace(args.output_dir / name)
    print(f"{args.output_dir}: {', '.join(FILES)}")
    return EXIT_DONE


def _export_hugging_face(folder: Path, eod_token: str, texts: Sequence[str]) -> None:
    """Export the SentencePiece model in a folder to Hugging Face, and compare both on texts."""
    from megatron_llmjp.tokenizers import load_tokenizer
    from megatron_llmjp.tokenizers.comparison import RARE_TEXTS, compare_tokenizers
    from megatron_llmjp.tokenizers.sentencepiece import load_sentencepiece
    from megatron_llmjp.tokenizers.sentencepiece_fast import (
        export_hugging_face,
        model_specific_texts,
    )

    kind = "SentencePieceTokenizer" if eod_token == "<EOD>" else "Llama2Tokenizer"
    model = load_sentencepiece(kind, folder / FILES[0])
    export_hugging_face(model, folder)
    exported = load_tokenizer("HuggingFaceTokenizer", folder)
    print(
        compare_tokenizers(
            model, exported, [*texts, *RARE_TEXTS, *model_specific_texts(model)]
        ).report()
    )


def train_unigram(texts: Sequence[str], vocab_size: int, coverage: float = 0.9995) -> bytes:
    """Return a serialized SentencePiece model; deterministic on any machine.

    LLM-jp's settings (ver3): Unigram with byte fallback, no normalization, a space before the
    text, spaces kept, special tokens at ids 0 to 7, then the 256 bytes. Digits are split.

    Raises:
        UserError: the vocabulary size does not suit the text.
    """
    import sentencepiece

    learned = vocab_size - len(SPECIAL_TOKENS) - BYTE_TOKENS
    if learned < 1:
        raise UserError(
            f"--vocab-size {vocab_size}: special tokens and bytes alone require "
            f"{len(SPECIAL_TOKENS) + BYTE_TOKENS}; choose at least 1000"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in _split_lines(text)),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=_reduce_coverage(texts, learned // 2, coverage),
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # encodes code indentation as single tokens
            split_digits=True,
            pad_id=SPECIAL_TOKENS.index("<PAD>"),
            pad_piece="<PAD>",
            control_symbols=["<MASK>", "<CLS>", "<SEP>", "<EOD>"],
            max_sentence_length=MAX_LINE_BYTES + 1,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or str(error)
        raise UserError(f"--vocab-size {vocab_size}: {reason} ({len(texts):,} lines)") from error
    return model.getvalue()


def _reduce_coverage(texts: Sequence[str], most: int, wanted: float) -> float:
    """Return the share of all characters that the ``most`` frequent characters account for.

    At most ``wanted``, and at least 98 %, SentencePiece's minimum.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    share = sum(n for _, n in counts.most_common(most)) / max(counts.total(), 1)
    return max(0.98, min(share, wanted))


def _split_lines(text: str) -> list[str]:
    """Return the lines of a text, split to the maximum length of SentencePiece's trainer."""
    longest = MAX_LINE_BYTES // 4  # characters; four bytes each at most
    return [
        line[at : at + longest]
        for line in text.split("\n")
        for at in range(0, len(line), longest)
        if line.strip()
    ]


if __name__ == "__main__":
    sys.exit(main())
