"""Print a run's fold schedule, or write a new fold file and print its schedule."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from data_tools.common import ToolParser, run_tool
from data_tools.new_folds import program as new_folds
from data_tools.run_flags import add_data_flags, parse_run_flags, split_flags
from megatron_llmjp.errors import EXIT_DONE, UserError
from megatron_llmjp.estimate.data_plan import as_json, as_rows, format_data_plan
from megatron_llmjp.planning import plan_data

EXAMPLES = """\
  Print the schedule of a fold file; reads only the indices of its datasets:
    plan_folds --fold-file folds.yaml --seq-length 2048 --global-batch-size 1536

  Include the learning rates at both ends of each fold (imports torch, which takes seconds):
    plan_folds --config llm-jp-3-13b --fold-file folds.yaml --lr 2e-4 --lr-warmup-iters 2000

  Print exact numbers for another program:
    plan_folds --fold-file folds.yaml --seq-length 2048 --global-batch-size 1536 --json > plan.json

{new}

All flags of pretrain_gpt.py are accepted, so a run's command line can be used unchanged; with
--plan-data, pretrain_gpt.py prints the same table. By default the folds determine the number of
iterations. Warnings follow the table, such as a decay that ends before the run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = ToolParser(
        "plan_folds",
        "Print a run's fold schedule, or write a new fold file; needs no GPU.",
        EXAMPLES.format(new=new_folds.EXAMPLES),
    )
    add_data_flags(parser.add_argument)
    args, words = split_flags(parser, argv, _add_own_flags)
    return run_tool("plan_folds", lambda: plan_folds(args, words))


def _add_own_flags(add: Callable[..., Any]) -> None:
    add("--json", action="store_true", help="print exact numbers and warnings as JSON")
    add(
        "--csv",
        action="store_true",
        help="print exact numbers as CSV, one row per fold and dataset",
    )
    new_folds.add_new_flags(add)


def plan_folds(args: argparse.Namespace, words: list[str]) -> int:
    """Print the schedule in the requested format; with ``--new``, write its fold file before.

    Raises:
        UserError: two formats are requested, or the run's flags or data are invalid.
    """
    if args.json and args.csv:
        raise UserError("--json and --csv are mutually exclusive")
    command = parse_run_flags(words, "plan_folds")
    if args.new is not None:
        plan, warnings = new_folds.write_new_file(args, command)
    else:
        new_folds.refuse_without_new(args)
        plan, warnings = plan_data(command.config, with_learning_rate="lr" in command.origin)
    if args.json:
        print(json.dumps(as_json(plan, warnings), indent=1, ensure_ascii=False))
    elif args.csv:
        rows = as_rows(plan)
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    else:
        print(format_data_plan(plan, warnings))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
