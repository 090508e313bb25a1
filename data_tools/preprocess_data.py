"""Tokenize JSON lines into Megatron-LM's indexed datasets.

The output is byte for byte that of Megatron-LM's tools/preprocess_data.py. Worker processes encode
blocks of lines; the main process only orders and writes the results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_tools.common import ToolParser, cores, run_tool
from data_tools.document_sources.flags import add_source_flags, check_source_flags
from data_tools.preprocess.array.program import (
    add_array_flags,
    check_array_flags,
    make_output,
    preprocess_part,
    run_job,
)
from data_tools.preprocess.array.status_program import (
    show_status,
    status_parser,
    wants_status,
)
from data_tools.preprocess.encoding.text_counts import DEFAULT_LANGUAGE_KEY
from data_tools.preprocess.input.remote.addresses import refuse_remote_output
from data_tools.preprocess.input.sources import find_input, ignored_record
from data_tools.preprocess.job.job import PreprocessJob
from data_tools.preprocess.job.rejection import parse_share
from data_tools.preprocess.selection.selection import add_selection_flags, selection_from_args
from data_tools.tables import check_table_path
from data_tools.tokenizer_flags import add_tokenizer_flags, tokenizer_from_args
from megatron_llmjp.arguments import normalize_dashes, positive_int
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers import Tokenizer

EXAMPLES = """\
  Tokenize one file as LLM-jp does (no BOS, <EOD> after each document):
    preprocess_data --input ja.jsonl --output-prefix data/ja \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tok.model --append-eod
  writes data/ja_text_document.bin, .idx and .json (the manifest).

  Read folders, glob patterns, compressed files, Parquet and standard input (-); several keys:
    preprocess_data --input corpus/ 'more/*.jsonl.zst' - --json-keys title text ...

  Read from S3, the Hugging Face Hub or a web server (packages s3fs, aiohttp):
    preprocess_data --input s3://corpus/ja/ hf://datasets/ORG/NAME/data/*.parquet https://... ...

  Continue after bad lines and store them in data/ja_rejected.jsonl, with the reasons in .csv:
    preprocess_data ... --on-error quarantine

  Shuffle all documents, remove copies and short ones, and filter them by functions in hooks.py:
    preprocess_data ... --shuffle-seed 1 --remove-duplicates --min-characters 200 --hooks hooks.py

  Record file, line and byte offset of each document, and its own id, for inspect_dataset --run:
    preprocess_data ... --record-sources --id-key meta.id

  After an interruption or a full disk, run the same command again to resume.

  Show MB/s, documents/s, tokens so far and remaining time of a job, or of all parts of an array:
    preprocess_data --status data/ja

  Process the input in 4 parts at once, on any machines with the same file system; the last one
  merges the parts into data/ja_text_document:
    for n in 0 1 2 3; do preprocess_data ... --shard $n/4 --finish-array & done; wait

tokenizer types:
  SentencePieceTokenizer     no BOS; --append-eod adds <EOD>, or </s> if there is no <EOD>
  GPTSentencePieceTokenizer  no BOS; --append-eod adds </s>
  Llama2Tokenizer            <s> before each document; --append-eod adds </s>
  HuggingFaceTokenizer       a tokenizer.json or its folder; --append-eod adds its eos_token
  GPT2BPETokenizer           --vocab-file and --merge-file; --append-eod adds <|endoftext|>
  TikTokenizer               a JSON list of token_bytes; --append-eod adds </s>
  ByteLevelTokenizer         UTF-8 bytes; --append-eod adds 256
  NullTokenizer              integers separated by spaces; --append-eod adds --vocab-size"""

GIGATOKEN_KINDS = ("HuggingFaceTokenizer", "GPT2BPETokenizer")
"""Tokenizer types that gigatoken may read."""
PROBE_CHARACTERS = "aZ5éя猫あ한ض🐈"
"""Characters of several scripts that a tokenizer should not drop."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    words = normalize_dashes(sys.argv[1:] if argv is None else argv)
    if wants_status(words):
        asked = status_parser().parse(words)
        return run_tool("preprocess_data", lambda: show_status(asked))
    args = _parser().parse(words)
    return run_tool("preprocess_data", lambda: preprocess(args))


def _parser() -> ToolParser:
    parser = ToolParser(
        "preprocess_data", "Tokenize JSON lines into Megatron-LM's .bin/.idx datasets.", EXAMPLES
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders, glob patterns, s3://, hf:// or https:// addresses, or -",
    )
    add(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="JSON keys of the text; one dataset per key",
    )
    add(
        "--language-key",
        default=DEFAULT_LANGUAGE_KEY,
        metavar="KEY",
        help="optional JSON key of a document's language, such as meta.lang, for the statistics of "
        "inspect_dataset --summary",
    )
    add_source_flags(add)
    add(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="output is PREFIX_KEY_document.{bin,idx,json}",
    )
    _add_encoding(add)
    add(
        "--workers",
        type=positive_int,
        default=cores(),
        metavar="N",
        help="number of encoding processes (default: the number of CPU cores)",
    )
    _add_limits(add)
    add_selection_flags(add)
    add(
        "--log-interval",
        type=positive_int,
        metavar="N",
        help="documents between progress lines (default: one every 10 seconds)",
    )
    add(
        "--report",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="also write the summary table to FILE.csv or FILE.json; may be repeated",
    )
    add_array_flags(add)
    add("--overwrite", action="store_true", help="replace existing datasets and unfinished runs")
    # Flags of Megatron-LM that have no effect: the order of documents is always preserved.
    for flag in ("--dataset-impl", "--partitions"):
        add(flag, help=argparse.SUPPRESS)
    add("--keep-sequential-samples", action="store_true", help=argparse.SUPPRESS)
    return parser


def _add_encoding(add: Callable[..., Any]) -> None:
    """Add the flags that determine the ids of a document."""
    add_tokenizer_flags(add)
    add(
        "--fast-encoder",
        "--sentencepiece-twin",  # deprecated alias
        dest="fast_encoder",
        metavar="MODEL",
        help="with HuggingFaceTokenizer: encode with this SentencePiece model, 8 to 15 times "
        "faster, if it gives the same ids on text of the corpus",
    )
    add(
        "--gigatoken",
        choices=("auto", "off", "required"),
        default="auto",
        help="encode HuggingFaceTokenizer and GPT2BPETokenizer with the gigatoken library, 10 to "
        "50 times faster, if it is installed, supports the tokenizer and gives the same ids on "
        "text of the corpus; required: fail otherwise",
    )
    add("--append-eod", action="store_true", help="append the EOD token to each document")
    add(
        "--append-bos",
        "--prepend-bos",
        action="store_true",
        help="prepend the BOS token to each document",
    )
    add(
        "--tokenizer-hf-include-special-tokens",
        action="store_true",
        help="with HuggingFaceTokenizer: write the special tokens that transformers adds around "
        "each text, as Megatron-LM does up to core 0.14 and from 0.17 on",
    )
    add(
        "--tokenizer-hf-no-include-special-tokens",
        dest="tokenizer_hf_include_special_tokens",
        action="store_false",
        help="do not write them (default)",
    )


def _add_limits(add: Callable[..., Any]) -> None:
    """Add the flags on bad lines and on input without documents."""
    add(
        "--on-error",
        choices=("stop", "skip", "quarantine"),
        default="stop",
        help="on a bad line: stop the run, skip the line, or skip it and write it to "
        "PREFIX_rejected.jsonl",
    )
    add(
        "--max-rejected",
        type=parse_share,
        default=0.01,
        metavar="SHARE",
        help="maximum share of rejected lines, such as 5%% or 0.05; above it the run fails "
        "(default: 1%%)",
    )
    add(
        "--allow-empty",
        action="store_true",
        help="write a dataset without tokens if the input has no documents",
    )
    add(
        "--max-line-mb",
        type=positive_int,
        default=32,
        metavar="MB",
        help="maximum line length; longer lines are bad lines. Encoding a line takes about 30 "
        "times its size in memory",
    )


def preprocess(args: argparse.Namespace) -> int:
    """Validate the arguments and the input, and run the job."""
    _check(args)
    _check_gigatoken(args)
    found = find_input(args.input)
    found.report()
    sources = found.sources
    selection = selection_from_args(args, sources)
    tokenizer = tokenizer_from_args(args)
    if tokenizer.kind == "HuggingFaceTokenizer":
        _warn_of_dropped_characters(tokenizer)
    if args.tokenizer_hf_include_special_tokens:
        _include_special_tokens(tokenizer, args)
    if args.append_bos:
        _check_bos(tokenizer)
    if args.fast_encoder:
        from data_tools.preprocess.encoding.fast_encoder import (
            use_fast_encoder,  # imports the tokenizers library
        )

        tokenizer, message = use_fast_encoder(
            tokenizer, args.fast_encoder, sources, args.json_keys, selection.hooks
        )
        print(message, file=sys.stderr)
    elif tokenizer.kind in GIGATOKEN_KINDS and args.gigatoken != "off":
        from data_tools.preprocess.encoding.gigatoken_choice import choose_encoder

        tokenizer, message = choose_encoder(
            tokenizer, args.gigatoken, sources, args.json_keys, selection.hooks
        )
        print(message, file=sys.stderr)
    ignored = ignored_record(found.ignored)
    if args.shard:
        return preprocess_part(args, sources, tokenizer, ignored, selection)
    output = make_output(args, tokenizer, selection, is_part=False)
    return run_job(PreprocessJob(args, sources, tokenizer, output, None, ignored, selection))


def _warn_of_dropped_characters(tokenizer: Tokenizer) -> None:
    """Warn if the vocabulary has neither all bytes nor an unknown token, so that text is lost."""
    if dropped := [
        character for character in PROBE_CHARACTERS if not len(tokenizer.encode(character))
    ]:
        print(
            "warning: the tokenizer drops characters that it has no token for, as AutoTokenizer "
            f"does: {' '.join(dropped)} and others",
            file=sys.stderr,
        )


def _check_gigatoken(args: argparse.Namespace) -> None:
    if args.gigatoken != "required":
        return
    if args.fast_encoder:
        raise UserError("--gigatoken required and --fast-encoder are mutually exclusive")
    if args.tokenizer_type not in GIGATOKEN_KINDS:
        raise UserError(
            f"--gigatoken required: expected --tokenizer-type {' or '.join(GIGATOKEN_KINDS)}, "
            f"found {args.tokenizer_type}"
        )


def _check_bos(tokenizer: Tokenizer) -> None:
    if tokenizer.bos_id is None:
        raise UserError(f"--append-bos: {tokenizer.kind} has no BOS token in this vocabulary")
    if tokenizer.bos_id in tokenizer.encode("")[:1]:
        raise UserError(
            f"--append-bos: {tokenizer.kind} always writes BOS before each text: remove "
            "--append-bos"
        )


def _include_special_tokens(tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Make the tokenizer write special tokens around texts, and print them.

    Raises:
        UserError: it has no such tokens, or the flag contradicts another one.
    """
    flag = "--tokenizer-hf-include-special-tokens"
    if args.fast_encoder:
        raise UserError(f"{flag} and --fast-encoder are mutually exclusive")
    if args.tokenizer_type != "HuggingFaceTokenizer":
        raise UserError(
            f"{flag} requires --tokenizer-type HuggingFaceTokenizer; with {args.tokenizer_type}, "
            "--append-bos and --append-eod write special tokens"
        )
    from megatron_llmjp.tokenizers.hugging_face import HuggingFaceTokenizer

    assert isinstance(tokenizer, HuggingFaceTokenizer)
    tokenizer.include_special_tokens()
    before, after = ([tokenizer.piece(i) for i in ids] for ids in tokenizer.added)
    print(f"Special tokens before each text: {before}, after it: {after}", file=sys.stderr)
    if args.append_eod and tokenizer.eod_id in tokenizer.added.after:
        print(
            f"warning: --append-eod writes a second {tokenizer.piece(tokenizer.eod_id)} after "
            "each document, as in Megatron-LM; remove it to write only one",
            file=sys.stderr,
        )


def _check(args: argparse.Namespace) -> None:
    refuse_remote_output("--output-prefix", args.output_prefix)
    check_array_flags(args)
    check_source_flags(args)
    for path in args.report:
        refuse_remote_output("--report", path)
        check_table_path(path)
    name = Path(args.output_prefix).name
    if not name or args.output_prefix.endswith("/"):
        raise UserError(
            f"--output-prefix {args.output_prefix}: expected a folder and a file name prefix, "
            "such as data/ja"
        )
    for key in args.json_keys:
        if "/" in key or args.json_keys.count(key) > 1:
            raise UserError(f"--json-keys {key}: keys must be unique and must not contain '/'")


if __name__ == "__main__":
    sys.exit(main())
