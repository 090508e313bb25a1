"""Train a SentencePiece Unigram tokenizer with LLM-jp's settings, also for Hugging Face."""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_tools.common import ToolParser, run_tool
from data_tools.preprocess.sample import sample_texts
from data_tools.preprocess.sources import PLAIN_TEXT_SUFFIXES, SUFFIXES, find_input
from megatron_llmjp.arguments import positive_int
from megatron_llmjp.errors import EXIT_DONE, UserError

FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
SPECIALS = ("<unk>", "<s>", "</s>", "<MASK>", "<PAD>", "<CLS>", "<SEP>", "<EOD>")
TRAINING_THREADS = 16  # fixed: another number gives another vocabulary
BYTES = 256
LONGEST_LINE = 16384

EXAMPLES = """\
  A vocabulary of 32,000 from two corpora, for SentencePieceTokenizer (<EOD> ends a document):
    train_tokenizer --input ja.jsonl en.jsonl.gz --vocab-size 32000 --output-dir tokenizer

  For Llama2Tokenizer (<s> document </s>):
    train_tokenizer --input corpus/ --vocab-size 32000 --output-dir tokenizer --eod-token '</s>'

The folder then holds tokenizer.model (SentencePiece: preprocess_data reads it) and the same
vocabulary as a Hugging Face fast tokenizer (AutoTokenizer.from_pretrained reads the folder).
Both are compared on real text at the end."""


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
        help="files, folders, patterns, -; JSON lines by their names, all else plain text",
    )
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys that hold text")
    add("--output-dir", type=Path, required=True, metavar="FOLDER", help="made if it is not there")
    add(
        "--vocab-size",
        type=positive_int,
        required=True,
        metavar="N",
        help="number of pieces, with 8 special tokens and 256 bytes",
    )
    add(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="share of the characters that get a piece each; the rest is written in bytes. "
        "Lowered by itself where the vocabulary is small",
    )
    add(
        "--max-input-mb",
        type=positive_int,
        default=200,
        metavar="MB",
        help="train on an even sample of the lines, of about this size",
    )
    add(
        "--eod-token",
        choices=("<EOD>", "</s>"),
        default="<EOD>",
        help="what ends a document, the eos_token of the Hugging Face tokenizer",
    )
    add(
        "--check-documents",
        type=positive_int,
        default=1000,
        metavar="N",
        help="lines on which both tokenizers are compared",
    )
    add("--overwrite", action="store_true", help="replace a tokenizer that is there")
    return parser


def train_tokenizer(args: argparse.Namespace) -> int:
    """Sample, train, export, compare, and only then give the files their names."""
    there = [args.output_dir / name for name in FILES if (args.output_dir / name).exists()]
    if there and not args.overwrite:
        raise UserError(
            f"{there[0]} exists already. Data and models made with it would lose their "
            "tokenizer: choose another --output-dir, or give --overwrite."
        )
    found = find_input(args.input, (*SUFFIXES, *PLAIN_TEXT_SUFFIXES))
    found.report()
    texts = sample_texts(found.sources, args.json_keys, args.max_input_mb * 1_000_000)
    if not texts:
        raise UserError(f"--input {' '.join(args.input)}: no text in it to train on")
    model = train_unigram(texts, args.vocab_size, args.character_coverage)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output_dir, prefix=".train_tokenizer.") as work:
        folder = Path(work)
        (folder / FILES[0]).write_bytes(model)
        step = max(1, len(texts) // args.check_documents)
        _export(folder, args.eod_token, texts[::step][: args.check_documents])
        for name in FILES:
            (folder / name).replace(args.output_dir / name)
    print(f"{args.output_dir}: {', '.join(FILES)}")
    return EXIT_DONE


def _export(folder: Path, eod_token: str, texts: Sequence[str]) -> None:
    """Write the model of a folder as a Hugging Face tokenizer, and compare both on texts."""
    from megatron_llmjp.tokenizers import load_tokenizer
    from megatron_llmjp.tokenizers.comparison import RARE_TEXTS, compare
    from megatron_llmjp.tokenizers.sentencepiece import load_sentencepiece
    from megatron_llmjp.tokenizers.sentencepiece_fast import export_hugging_face, own_texts

    kind = "SentencePieceTokenizer" if eod_token == "<EOD>" else "Llama2Tokenizer"
    model = load_sentencepiece(kind, folder / FILES[0])
    export_hugging_face(model, folder)
    exported = load_tokenizer("HuggingFaceTokenizer", folder)
    print(compare(model, exported, [*texts, *RARE_TEXTS, *own_texts(model)]).report())


def train_unigram(texts: Sequence[str], vocab_size: int, coverage: float = 0.9995) -> bytes:
    """Return a serialized SentencePiece model; the same for the same texts on any machine.

    LLM-jp's settings (ver3): Unigram with byte fallback, no normalization, a space before the
    text, spaces kept, special tokens at ids 0 to 7, then the 256 bytes. Digits are split.

    Raises:
        UserError: the vocabulary size does not fit the text.
    """
    import sentencepiece

    learned = vocab_size - len(SPECIALS) - BYTES
    if learned < 1:
        raise UserError(
            f"--vocab-size {vocab_size}: the special tokens and bytes alone take "
            f"{len(SPECIALS) + BYTES}; choose at least 1000"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in _cut(text)),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=_affordable_coverage(texts, learned // 2, coverage),
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation of code becomes single tokens
            split_digits=True,
            pad_id=SPECIALS.index("<PAD>"),
            pad_piece="<PAD>",
            control_symbols=["<MASK>", "<CLS>", "<SEP>", "<EOD>"],
            max_sentence_length=LONGEST_LINE + 1,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or str(error)
        raise UserError(f"--vocab-size {vocab_size}: {reason} ({len(texts):,} lines)") from error
    return model.getvalue()


def _affordable_coverage(texts: Sequence[str], most: int, wanted: float) -> float:
    """Return the share of all characters that the ``most`` frequent ones make up.

    At most ``wanted``, at least the 98 % below which SentencePiece refuses to go.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    share = sum(n for _, n in counts.most_common(most)) / max(counts.total(), 1)
    return max(0.98, min(share, wanted))


def _cut(text: str) -> list[str]:
    """Return the lines of a text, none too long for SentencePiece's trainer."""
    longest = LONGEST_LINE // 4  # characters; four bytes each at most
    return [
        line[at : at + longest]
        for line in text.split("\n")
        for at in range(0, len(line), longest)
        if line.strip()
    ]


if __name__ == "__main__":
    sys.exit(main())
