"""Print what a run is trained on when: tokens, epochs, iterations and learning rates by fold."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from contextlib import suppress

from data_tools.cli import Parser, run
from data_tools.run_flags import add_data_flags, parse_run_flags
from megatron_llmjp.errors import EXIT_DONE
from megatron_llmjp.plan.data_table import as_json, as_rows, show
from megatron_llmjp.plan_data import plan_data

EXAMPLES = """\
  The table of a fold file; reads only the indices of its datasets:
    plan_folds --fold-file folds.yaml --seq-length 2048 --global-batch-size 1536

  With learning rates at both ends of each fold, where lr is known (imports torch: seconds):
    plan_folds --config llm-jp-3-13b --fold-file folds.yaml --lr 2e-4 --lr-warmup-iters 2000

  The exact numbers for another program:
    plan_folds --fold-file folds.yaml --seq-length 2048 --global-batch-size 1536 --json > plan.json

All flags of pretrain_gpt.py are taken, so that a run's command line can be pasted; --plan-data on
that command line prints the same. The number of iterations follows from the folds when
--train-iters is not given. Warnings stand at the end, as in: decay that ends before the run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = Parser("plan_folds", "Print the plan of a run's data, without GPUs.", EXAMPLES)
    add = parser.add_argument
    add_data_flags(add)
    add("--json", action="store_true", help="exact numbers and warnings as JSON")
    add("--csv", action="store_true", help="exact numbers as CSV, a row per fold and dataset")
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        with suppress(SystemExit):
            parser.parse_args(["--help"])
        return EXIT_DONE
    return run("plan_folds", lambda: plan(words))


def plan(words: list[str]) -> int:
    """Print the plan in the form asked for."""
    flags = [word for word in words if word not in ("--json", "--csv", "--plan-data")]
    config, layers = parse_run_flags(flags, "plan_folds")
    planned = plan_data(config, with_learning_rate="lr" in layers.origin)
    if "--json" in words:
        print(json.dumps(as_json(planned.plan, planned.warnings), indent=1, ensure_ascii=False))
    elif "--csv" in words:
        rows = as_rows(planned.plan)
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        for warning in planned.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    else:
        print(show(planned.plan, planned.warnings))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
