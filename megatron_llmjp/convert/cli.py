"""``convert_checkpoint``: the command line.

torch is imported only when there is something to convert, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_llmjp.arguments import CommandLineParser, parse_size, positive_int
from megatron_llmjp.checkpoint.save_folder import NATIVE
from megatron_llmjp.config.megatron_flags import RENAMED_VALUES
from megatron_llmjp.convert.formats.registry import FORMATS
from megatron_llmjp.errors import (
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_USER_ERROR,
    UserError,
    did_you_mean,
)
from megatron_llmjp.tokenizers import TOKENIZER_TYPES

if TYPE_CHECKING:
    from megatron_llmjp.convert.conversion import Conversion

DTYPES = ("fp32", "fp16", "bf16")

DESCRIPTION = """\
Convert a checkpoint between this project's own format, Hugging Face, Megatron-LM and
Megatron-DeepSpeed. Needs no GPU and, whatever the model's size, a few gigabytes of memory."""

EXAMPLES = """\
examples:
  the newest checkpoint of a run, for transformers; compare both on the same tokens:
    convert_checkpoint --from native --to hf --input checkpoints --output model-hf --verify
  a Hugging Face model to go on training (pretrain_gpt.py --load start --finetune):
    convert_checkpoint --from hf --to native --input model-hf --output start
  see what would be written:
    convert_checkpoint --to hf --input checkpoints/iter_0001000 --output model-hf --dry-run
  see what a folder holds:
    convert_checkpoint inspect checkpoints

The input is never written to. The output appears under its name only when it is complete.
Exit codes: 0 done, 1 --verify found a difference, 2 a mistake in the arguments or the checkpoint.
"""


def _make_parser() -> CommandLineParser:
    parser = CommandLineParser(
        prog="convert_checkpoint",
        usage="convert_checkpoint --to FORMAT --input DIR --output DIR [options]\n"
        "       convert_checkpoint inspect DIR [--ignore-args NAME,...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    _add_places(parser.add_argument)
    _add_contents(parser.add_argument)
    _add_writing(parser.add_argument)
    return parser


def _names(capability: str) -> str:
    """Return the formats with a capability, an attribute of CheckpointFormat, as text."""
    return " or ".join(name for name, entry in FORMATS.items() if getattr(entry, capability))


def _add_places(add: Callable[..., Any]) -> None:
    """What is converted, from where to where."""
    add(
        "--from",
        dest="source",
        choices=FORMATS,
        metavar="FORMAT",
        help=f"{', '.join(FORMATS)}; told from the files when not given",
    )
    add(
        "--to",
        dest="target",
        choices=FORMATS,
        metavar="FORMAT",
        required=True,
        help="the same names",
    )
    add(
        "--input",
        type=Path,
        required=True,
        metavar="DIR",
        help="the checkpoint, or a run's folder, whose newest complete checkpoint is taken",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="a folder that does not exist")
    add(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help=f"to {_names('stores_tokenizer')}: the tokenizer's folder or file "
        "(default: the source's own)",
    )
    add(
        "--tokenizer-type",
        type=_tokenizer_type,
        metavar="TYPE",
        help="the run's tokenizer type, which decides what ends a text; the source's own when not "
        f"given: {', '.join(TOKENIZER_TYPES)}",
    )


def _add_contents(add: Callable[..., Any]) -> None:
    """What the output holds, and how it is cut."""
    add("--dtype", choices=DTYPES, help="type of the weights; kept when not given")
    add(
        "--vocab-size",
        type=positive_int,
        metavar="N",
        help="true size of the vocabulary, where the source does not tell it",
    )
    add(
        "--keep-vocab-padding",
        action="store_true",
        help="hf: keep the padding rows of the vocabulary",
    )
    add(
        "--target-tensor-parallel-size",
        type=positive_int,
        default=1,
        metavar="TP",
        help="ranks that the output is cut for (default: 1; any TP loads native)",
    )
    add(
        "--target-pipeline-parallel-size",
        type=positive_int,
        default=1,
        metavar="PP",
        help="stages that the output is cut for (default: 1; any PP loads native)",
    )
    add(
        "--main-weights",
        action="store_true",
        help=f"from {_names('has_main_weights')}: convert the fp32 weights of the ZeRO optimizer",
    )
    _add_ignored(add)
    add(
        "--with-optimizer",
        action="store_true",
        help=f"to {_names('writes_optimizer')}: also convert Adam's moments, the fp32 weights and "
        "the schedule, to resume without --finetune; if the source has no optimizer state (hf), "
        "megatron-deepspeed gets zero moments, which ds_to_universal requires",
    )
    add(
        "--no-pipeline",
        action="store_true",
        help="to megatron-deepspeed: for runs with --no-pipeline-parallel",
    )
    add(
        "--ckpt-format",
        choices=("torch_dist", "torch"),
        default="torch_dist",
        help="megatron-lm: Megatron-LM's flag of this name (default: torch_dist)",
    )
    add(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        default="transformer_engine",
        help="megatron-lm with --ckpt-format torch: the layers that will load it "
        "(default: transformer_engine, as in Megatron-LM)",
    )


def _add_ignored(add: Callable[..., Any]) -> None:
    """What of a Megatron run's arguments is not to be read."""
    add(
        "--ignore-args",
        type=lambda text: frozenset(text.split(",")),
        default=frozenset(),
        metavar="NAME,...",
        help=f"from {_names('has_megatron_args')}: arguments of the run to ignore because they do "
        "not change the network",
    )


def _add_writing(add: Callable[..., Any]) -> None:
    """How the work is done and checked."""
    add(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="largest file of weights, such as 500MB (default: 5GB)",
    )
    add(
        "--workers",
        type=positive_int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="threads that copy; memory does not grow with them (default: one per core, at most 4)",
    )
    add(
        "--verify",
        action="store_true",
        help="run both models on the same tokens in fp32 and compare logits and losses",
    )
    add(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="--verify: largest allowed logit difference, relative to the largest logit "
        "(default: 1e-4)",
    )
    add(
        "--no-checksums",
        dest="checksums",
        action="store_false",
        help="from native: do not read the parts of files that are not converted (the optimizer's "
        "state) in order to compare the files' checksums",
    )
    add("--dry-run", action="store_true", help="print every tensor and file; write nothing")


def _tokenizer_type(word: str) -> str:
    """A type as pretrain_gpt reads it: in any case, or by Megatron-DeepSpeed's name."""
    names = {name.lower(): name for name in TOKENIZER_TYPES} | RENAMED_VALUES["tokenizer_type"]
    if word.lower() not in names:
        raise argparse.ArgumentTypeError(
            f"no such type: '{word}'{did_you_mean(word, TOKENIZER_TYPES)} "
            f"Possible: {', '.join(TOKENIZER_TYPES)}"
        )
    return names[word.lower()]


def _size(text: str) -> int:
    try:
        return max(1, int(parse_size(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    """Run ``convert_checkpoint``; returns the exit code."""
    signal.signal(signal.SIGTERM, _stop)  # so that an interrupted conversion cleans up
    try:
        words = sys.argv[1:] if argv is None else argv
        if words[:1] == ["inspect"]:
            return _inspect(words[1:])
        return _convert(_make_parser().parse(words))
    except UserError as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("convert_checkpoint: interrupted; nothing was left behind", file=sys.stderr)
        return EXIT_FAILURE


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _inspect(words: list[str]) -> int:
    parser = CommandLineParser(
        prog="convert_checkpoint inspect",
        description="Say what a folder holds, and what it can be converted to.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a checkpoint, or a run's folder")
    _add_ignored(parser.add_argument)
    arguments = parser.parse(words)
    from megatron_llmjp.convert.inspection import describe_checkpoint

    print(describe_checkpoint(arguments.folder, arguments.ignore_args))
    return EXIT_DONE


def _convert(arguments: argparse.Namespace) -> int:
    from megatron_llmjp.convert.conversion import VerificationError, plan_conversion
    from megatron_llmjp.convert.files.storage import DTYPES as TORCH_TYPES
    from megatron_llmjp.convert.formats.base import ConversionOptions
    from megatron_llmjp.convert.inspection import format_plan, summarize

    options = ConversionOptions(
        dtype=TORCH_TYPES[arguments.dtype] if arguments.dtype else None,
        tensor_parallel=arguments.target_tensor_parallel_size,
        pipeline_parallel=arguments.target_pipeline_parallel_size,
        max_shard_size=arguments.max_shard_size,
        keep_vocabulary_padding=arguments.keep_vocab_padding,
        tokenizer=arguments.tokenizer,
        tokenizer_type=arguments.tokenizer_type,
        vocab_size=arguments.vocab_size,
        megatron_format=arguments.ckpt_format,
        transformer_impl=arguments.transformer_impl,
        main_weights=arguments.main_weights,
        with_optimizer=arguments.with_optimizer,
        no_pipeline=arguments.no_pipeline,
        checksums=arguments.checksums,
        ignored_args=arguments.ignore_args,
    )
    conversion = plan_conversion(arguments.source, arguments.target, arguments.input, options)
    print(summarize(conversion.source))
    if arguments.dry_run:
        print(format_plan(conversion))
        _print_notes(conversion)
        return EXIT_DONE
    check = None
    if arguments.verify:
        from megatron_llmjp.convert.verify import make_verifier

        check = make_verifier(conversion, options, arguments.tolerance)
    try:
        seconds = conversion.run(arguments.output, arguments.workers, False, check)
    except VerificationError as error:
        print(f"convert_checkpoint: {error}; {arguments.output} was not made", file=sys.stderr)
        return EXIT_FAILURE
    _print_notes(conversion)
    print(_checksums(conversion))
    size = conversion.output.nbytes / 1e9
    print(
        f"wrote {arguments.output}: {arguments.target}, {size:.3f} GB in {seconds:.1f} s, "
        f"{size / max(seconds, 1e-3):.2f} GB/s"
    )
    return EXIT_DONE


def _print_notes(conversion: Conversion) -> None:
    """Print what the user should know, warnings last."""
    for note in [*conversion.source.notes, *conversion.output.notes]:
        print(f"note: {note}", file=sys.stderr)
    for warning in conversion.output.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _checksums(conversion: Conversion) -> str:
    """What the bytes that were read were compared with."""
    if not FORMATS[conversion.source.format].has_checksums and not conversion.checksum_ranges():
        return "checksums: the files have none; compare them with those of the publisher"
    if conversion.source.format == NATIVE and not conversion.checksums:
        return "checksums: not compared (--no-checksums)"
    files = len({checksum_range.path for checksum_range in conversion.checksum_ranges()})
    if not files:
        return "checksums: those inside the files agree, where they have some"
    return f"checksums: those of {files} file(s) that were read agree"


if __name__ == "__main__":
    sys.exit(main())
