"""Flags of ``preprocess_data`` for parts of the input, and the processing of a part."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

from data_tools.preprocess.arrangement.arranged_output import ArrangedOutput
from data_tools.preprocess.array.merge import ArrayOutput
from data_tools.preprocess.array.parts import ArrayParts
from data_tools.preprocess.array.shards import ShardPlan, part_prefix
from data_tools.preprocess.array.status_program import STATUS_FLAG
from data_tools.preprocess.array.task import ArrayProgressLines, ArrayTask
from data_tools.preprocess.input.sources import InputSource
from data_tools.preprocess.job.job import PreprocessJob
from data_tools.preprocess.job.output import DatasetOutput
from data_tools.preprocess.job.status import RateMeter
from data_tools.preprocess.selection.selection import Selection
from megatron_llmjp.arguments import parse_shard
from megatron_llmjp.data.indexed_dataset import best_dtype
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers import Tokenizer


def add_array_flags(add: Callable[..., Any]) -> None:
    """Add the flags on parts of the input."""
    add(
        "--shard",
        metavar="NUMBER/COUNT",
        help="process only this part of the input, 0/16 to 15/16; parts have equal amounts of "
        "text, large files are cut. slurm/16 takes the number from the Slurm array. "
        "merge_datasets --parts PREFIX merges the parts",
    )
    add(
        "--finish-array",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="with --shard: then process parts that no task works on, because they were lost or "
        "not started, and merge all parts when the last one is complete",
    )
    add(
        STATUS_FLAG,
        nargs="+",
        metavar="PREFIX",
        help="show the progress of running, dead and finished jobs with this --output-prefix, and "
        "exit; for its options and exit codes see preprocess_data --status --help",
    )


def check_array_flags(args: argparse.Namespace) -> None:
    """Raise UserError if the flags contradict each other."""
    if args.finish_array and not args.shard:
        raise UserError("--finish-array requires --shard, such as --shard 0/16")
    if args.finish_array and args.overwrite:
        raise UserError(
            "--finish-array and --overwrite are mutually exclusive: a task cannot know which "
            f"parts are new. Remove {args.output_prefix}_part* and "
            f"{args.output_prefix}_*_document.* first, or give --no-finish-array."
        )


def preprocess_part(
    args: argparse.Namespace,
    sources: list[InputSource],
    tokenizer: Tokenizer,
    ignored: dict[str, Any],
    selection: Selection,
) -> int:
    """Process a part of the input, and with --finish-array all parts that are left."""
    number, count = parse_shard(args.shard)
    cut_streams = not selection.arrangement.is_needed
    plan = ShardPlan(sources, count, args.json_keys, cut_streams)
    if warning := plan.warning():
        print(warning, file=sys.stderr)
    parts = ArrayParts(args.output_prefix, count)
    lines, meter = ArrayProgressLines(parts), RateMeter()

    def make_job(number: int) -> PreprocessJob:
        of_part = copy.copy(args)
        of_part.output_prefix = part_prefix(args.output_prefix, number, count)
        of_part.report = [] if args.finish_array else args.report
        output = make_output(of_part, tokenizer, selection, is_part=True)
        shard = {"number": number, "count": count, "list": plan.digest}
        return PreprocessJob(
            of_part,
            plan.part(number),
            tokenizer,
            output,
            shard,
            ignored,
            selection,
            plan.bytes,
            lines,
            meter,
        )

    if not args.finish_array:
        return run_job(make_job(number))
    output = ArrayOutput(args, count, plan.digest)
    return ArrayTask(number, output, parts, make_job).run()


def make_output(
    args: argparse.Namespace, tokenizer: Tokenizer, selection: Selection, is_part: bool
) -> DatasetOutput:
    """Return the output of a job, whose documents are arranged at the end if that is needed."""
    prefix, keys, dtype = args.output_prefix, args.json_keys, best_dtype(tokenizer.vocab_size)
    if (order := selection.arrangement).is_needed:
        return ArrangedOutput(
            prefix, keys, dtype, order, keep_records=is_part, record_sources=args.record_sources
        )
    return DatasetOutput(prefix, keys, dtype, args.record_sources)


def run_job(job: PreprocessJob) -> int:
    """Run a job, unless its output is complete, and return the exit code."""
    if not job.args.overwrite and job.is_complete():
        return job.print_summary()
    with job.output.name_output_in_errors():
        return job.run()
