"""Command line of ``convert_checkpoint``.

torch is imported only where values are computed, which most conversions do not need.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_llmjp.arguments import CommandLineParser, parse_shard, parse_size, positive_int
from megatron_llmjp.checkpoint.save_folder import NATIVE
from megatron_llmjp.config.tokenizer_types import TOKENIZER_TYPES, find_tokenizer_type
from megatron_llmjp.convert.cli_sources import (
    add_derived_sources,
    averaged_folders,
    check_sources,
    follow_run,
)
from megatron_llmjp.convert.formats.registry import FORMATS
from megatron_llmjp.convert.layout_flags import add_layout_flags, target_layout
from megatron_llmjp.convert.publishing.flags import add_hugging_face_flags
from megatron_llmjp.convert.subcommands import add_ignored_args, extract_adapter, inspect
from megatron_llmjp.errors import (
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_USER_ERROR,
    UserError,
    did_you_mean,
)

if TYPE_CHECKING:
    from megatron_llmjp.convert.conversion import Conversion
    from megatron_llmjp.convert.formats.base import ConversionOptions

DTYPES = ("fp32", "fp16", "bf16")

DESCRIPTION = """\
Convert a checkpoint between this project's own format, Hugging Face, Megatron-LM and
Megatron-DeepSpeed. Needs no GPU, and a few gigabytes of memory for any model size."""

EXAMPLES = """\
examples:
  convert the newest checkpoint of a run for transformers, and compare logits of both:
    convert_checkpoint --from native --to hf --input checkpoints --output model-hf --verify
  convert a Hugging Face model to train it (pretrain_gpt.py --load start --finetune):
    convert_checkpoint --from hf --to native --input model-hf --output start
  print the tensors and files that would be written:
    convert_checkpoint --to hf --input checkpoints/iter_0001000 --output model-hf --dry-run
  let 16 tasks write the files of a large model (slurm/convert_checkpoint.sh in a job array):
    convert_checkpoint --to hf --input checkpoints --output model-hf --shard 0/16
  export in the form of a published model, and upload it with a model card:
    convert_checkpoint --to hf --input checkpoints --output model-hf --like llm-jp-3-13b \\
        --push-to-hub my-org/my-model
  describe the checkpoint in a folder; print the tensors in which two checkpoints differ:
    convert_checkpoint inspect checkpoints
    convert_checkpoint inspect checkpoints model-hf
  average checkpoints of a run:
    convert_checkpoint --to native --input checkpoints --average 8000 9000 10000 --output mean
  convert each checkpoint of a running run, and evaluate it:
    convert_checkpoint --follow checkpoints --to hf --output models --command 'eval $CHECKPOINT'
  merge a LoRA adapter into a model, and write the difference of two models as an adapter:
    convert_checkpoint --to hf --input model-hf --adapter adapter --output merged
    convert_checkpoint extract-adapter model-hf tuned --rank 16 --output adapter

The input is never modified. The output folder is created only when it is complete.
Exit codes: 0 success, 1 --verify or inspect found a difference, the upload or --follow had a
failure, 2 invalid arguments or checkpoint, 130 --follow was stopped.
"""


def _make_parser() -> CommandLineParser:
    parser = CommandLineParser(
        prog="convert_checkpoint",
        usage="convert_checkpoint --to FORMAT --input DIR --output DIR [options]\n"
        "       convert_checkpoint --to FORMAT --average DIR DIR... --output DIR [options]\n"
        "       convert_checkpoint --to FORMAT --follow SAVE --output DIR [options]\n"
        "       convert_checkpoint inspect DIR [DIR] [--json] [--ignore-args NAME,...]\n"
        "       convert_checkpoint extract-adapter BASE TUNED --rank R --output DIR",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    _add_input_and_output(parser.add_argument)
    add_derived_sources(parser.add_argument)
    _add_output_options(parser.add_argument)
    add_hugging_face_flags(parser.add_argument)
    _add_execution_options(parser.add_argument)
    return parser


def _names(capability: str) -> str:
    """Return the formats with a capability, an attribute of CheckpointFormat, as text."""
    return " or ".join(name for name, entry in FORMATS.items() if getattr(entry, capability))


def _add_input_and_output(add: Callable[..., Any]) -> None:
    """Add the flags for formats, folders and tokenizer."""
    add(
        "--from",
        dest="source",
        choices=FORMATS,
        metavar="FORMAT",
        help=f"format of the input: {', '.join(FORMATS)} (default: detected from the files)",
    )
    add(
        "--to",
        dest="target",
        choices=FORMATS,
        metavar="FORMAT",
        required=True,
        help="format of the output: one of the same names",
    )
    add(
        "--input",
        type=Path,
        metavar="DIR",
        help="checkpoint, or folder of a run: its newest complete checkpoint is converted",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="folder to create")
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
        help="tokenizer type of the run, which determines the end-of-document token (default: the "
        f"source's own): {', '.join(TOKENIZER_TYPES)}",
    )


def _add_output_options(add: Callable[..., Any]) -> None:
    """Add the flags for the contents and the parallel layout of the output."""
    add("--dtype", choices=DTYPES, help="type of the weights (default: the source's own)")
    add(
        "--vocab-size",
        type=positive_int,
        metavar="N",
        help="vocabulary size without padding, if the source does not store it",
    )
    add(
        "--keep-vocab-padding",
        action="store_true",
        help="to hf: keep the padding rows of the vocabulary",
    )
    add_layout_flags(add)
    add(
        "--main-weights",
        action="store_true",
        help=f"from {_names('has_main_weights')}: convert the fp32 weights of the ZeRO optimizer",
    )
    add_ignored_args(add)
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
        help="to megatron-deepspeed: write a checkpoint for --no-pipeline-parallel",
    )
    add(
        "--ckpt-format",
        choices=("torch_dist", "torch"),
        default="torch_dist",
        help="to megatron-lm: same as Megatron-LM's flag (default: torch_dist)",
    )
    add(
        "--distrib-optim-sharding-type",
        choices=("fully_sharded_model_space", "fully_reshardable"),
        default="fully_sharded_model_space",
        metavar="TYPE",
        help="to megatron-lm with --with-optimizer: format of the optimizer state, "
        "fully_sharded_model_space for LLM-jp's fork and core 0.8 to 0.15 (default), or "
        "fully_reshardable for core 0.15 and newer",
    )
    add(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        default="transformer_engine",
        help="to megatron-lm with --ckpt-format torch: same as Megatron-LM's flag "
        "(default: transformer_engine)",
    )


def _add_execution_options(add: Callable[..., Any]) -> None:
    """Add the flags for files, threads and verification."""
    add(
        "--max-shard-size",
        type=_size,
        metavar="SIZE",
        help="maximum size of a weight file, such as 500MB (default: 5GB)",
    )
    add(
        "--workers",
        type=positive_int,
        default=4,
        metavar="N",
        help="number of copying threads, which wait for the disk most of the time; does not change "
        "memory use (default: 4)",
    )
    add(
        "--shard",
        type=parse_shard,
        metavar="NUMBER/COUNT",
        help="write only the output files of task NUMBER of 0 to COUNT - 1, or slurm/COUNT in a "
        "job array; the last task creates the output folder, repeated tasks continue",
    )
    add(
        "--verify",
        action="store_true",
        help="compute logits and losses of both models on the same tokens in fp32 and compare them",
    )
    add(
        "--verify-length",
        type=int,
        metavar="N",
        help="for --verify: number of tokens of the compared sequence, up to "
        "max_position_embeddings (default: two sequences of 128)",
    )
    add(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="for --verify: maximum logit difference, relative to the largest logit "
        "(default: 1e-4)",
    )
    add(
        "--no-checksums",
        dest="checksums",
        action="store_false",
        help="from native: do not verify checksums, which requires reading files completely, "
        "including optimizer state that is not converted",
    )
    add("--dry-run", action="store_true", help="print all tensors and files; write nothing")


def _tokenizer_type(word: str) -> str:
    """Parse a tokenizer type like pretrain_gpt: in any case, or Megatron-DeepSpeed's name."""
    found = find_tokenizer_type(word)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"invalid tokenizer type: '{word}'{did_you_mean(word, TOKENIZER_TYPES)} "
            f"Expected one of: {', '.join(TOKENIZER_TYPES)}"
        )
    return found


def _size(text: str) -> int:
    try:
        return max(1, int(parse_size(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    """Run ``convert_checkpoint``; returns the exit code."""
    with _interrupt_at_termination():
        return _main(sys.argv[1:] if argv is None else argv)


def _main(words: list[str]) -> int:
    try:
        if words[:1] == ["inspect"]:
            return inspect(words[1:])
        if words[:1] == ["extract-adapter"]:
            return extract_adapter(words[1:])
        return _convert(_make_parser().parse(words))
    except UserError as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("convert_checkpoint: interrupted; the output was not created", file=sys.stderr)
        return EXIT_FAILURE


@contextlib.contextmanager
def _interrupt_at_termination() -> Iterator[None]:
    """Let SIGTERM interrupt the block, which removes the incomplete output.

    Only the main thread can set handlers: in another one, the caller's stay.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        # None: not set by Python, and not known to it
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _convert(arguments: argparse.Namespace) -> int:
    check_sources(arguments)
    options = _options(arguments)
    if arguments.follow is not None:
        return follow_run(arguments, lambda path, out: _convert_one(arguments, path, out, options))
    from megatron_llmjp.convert.conversion import check_output_path

    for folder in (*options.average, *filter(None, [options.adapter])):
        check_output_path(arguments.output, folder)
    path = options.average[0] if options.average else arguments.input
    return _convert_one(arguments, path, arguments.output, options)


def _options(arguments: argparse.Namespace) -> ConversionOptions:
    from megatron_llmjp.convert.files.storage import DTYPES as TORCH_TYPES
    from megatron_llmjp.convert.formats.base import ConversionOptions

    return ConversionOptions(
        dtype=TORCH_TYPES[arguments.dtype] if arguments.dtype else None,
        parallel=target_layout(arguments),
        max_shard_size=arguments.max_shard_size or ConversionOptions.max_shard_size,
        shard_size_given=arguments.max_shard_size is not None,
        like=arguments.like,
        keep_vocabulary_padding=arguments.keep_vocab_padding,
        tokenizer=arguments.tokenizer,
        tokenizer_type=arguments.tokenizer_type,
        vocab_size=arguments.vocab_size,
        megatron_format=arguments.ckpt_format,
        optimizer_sharding=arguments.distrib_optim_sharding_type,
        transformer_impl=arguments.transformer_impl,
        main_weights=arguments.main_weights,
        with_optimizer=arguments.with_optimizer,
        no_pipeline=arguments.no_pipeline,
        checksums=arguments.checksums,
        ignored_args=arguments.ignore_args,
        average=averaged_folders(arguments),
        ema_decay=arguments.ema_decay,
        adapter=arguments.adapter,
        chat_template=arguments.chat_template,
    )


def _convert_one(
    arguments: argparse.Namespace, path: Path, output: Path, options: ConversionOptions
) -> int:
    """Convert one checkpoint to a folder, and return the exit code."""
    from megatron_llmjp.convert.conversion import VerificationError, plan_conversion
    from megatron_llmjp.convert.inspection import format_plan, summarize
    from megatron_llmjp.convert.publishing import publication

    conversion = plan_conversion(arguments.source, arguments.target, path, options)
    repository = publication.plan_publication(
        conversion, output, arguments.model_card, arguments.push_to_hub, arguments.public
    )
    print(summarize(conversion.source))
    if arguments.dry_run:
        print(format_plan(conversion, arguments.shard))
        _print_notes(conversion)
        return EXIT_DONE
    repository = publication.prepare_upload(repository)
    check = None
    if arguments.verify:
        from megatron_llmjp.convert.verification.verify import make_verifier

        check = make_verifier(conversion, options, arguments.tolerance, arguments.verify_length)
    try:
        if arguments.shard is not None:
            from megatron_llmjp.convert.copying.sharded_conversion import ShardedConversion

            shard = ShardedConversion(conversion, output, *arguments.shard)
            print(shard.run(arguments.workers, False, check).report(output))
            return EXIT_DONE
        seconds = conversion.run(output, arguments.workers, False, check)
    except VerificationError as error:
        print(f"convert_checkpoint: {error}; {output} was not created", file=sys.stderr)
        return EXIT_FAILURE
    _print_notes(conversion)
    print(_checksum_summary(conversion))
    size = conversion.output.nbytes / 1e9
    print(
        f"wrote {output}: {arguments.target}, {size:.3f} GB in {seconds:.1f} s, "
        f"{size / max(seconds, 1e-3):.2f} GB/s"
    )
    return publication.finish_publication(repository, output)


def _print_notes(conversion: Conversion) -> None:
    """Print notes, then warnings."""
    for note in [*conversion.source.notes, *conversion.output.notes]:
        print(f"note: {note}", file=sys.stderr)
    for warning in conversion.output.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _checksum_summary(conversion: Conversion) -> str:
    """Return which checksums were verified."""
    if not FORMATS[conversion.source.format].has_checksums and not conversion.checksum_ranges():
        return "checksums: the files have none; compare their hashes with those of the publisher"
    if conversion.source.format == NATIVE and not conversion.options.checksums:
        return "checksums: not verified (--no-checksums)"
    files = len({known.path for known in conversion.checksum_ranges()})
    if not files:
        return "checksums: those inside the files verified"
    return f"checksums: {files} file(s) verified"


if __name__ == "__main__":
    sys.exit(main())
