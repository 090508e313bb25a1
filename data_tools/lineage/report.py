"""Reports on a run's training data: contents of a global batch, occurrences of a document."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.document_sources.lookup import SourceLookup
from data_tools.lineage.attempts import (
    Attempt,
    choose_attempt,
    describe_attempts,
    find_attempts,
)
from data_tools.lineage.batch import BatchSources, describe_sample, print_batch
from data_tools.lineage.loss_report import (
    choose_loss_checkpoint,
    describe_losses,
    logged_loss,
    print_losses,
)
from data_tools.lineage.occurrences import print_occurrences
from data_tools.run_history import RecordedRun, open_lineage, open_run
from megatron_llmjp.arguments import positive_int
from megatron_llmjp.errors import EXIT_DONE, UserError

if TYPE_CHECKING:
    from megatron_llmjp.data.lineage import Lineage

EXAMPLES = """\
  Show the folds, datasets, documents and texts of a global batch, for example of a loss spike:
    inspect_dataset --run checkpoints --iteration 61203 | less

  Also print the lines of the JSONL files that its documents come from (preprocess_data
  --record-sources), which were moved to another folder:
    inspect_dataset --run checkpoints --iteration 61203 --source-line --source-root /data/corpus

  Find the document of a loss spike: losses under the newest checkpoint before the iteration:
    inspect_dataset --run checkpoints --iteration 61203 --losses

  List the iterations that contain a document, past and future, by its number or its own id:
    inspect_dataset --run checkpoints --dataset ja_wiki --document 1234
    inspect_dataset --run checkpoints --own-id wiki-815"""


def add_flags(add: Callable[..., Any]) -> None:
    """Add the flags of inspect_dataset that concern a run."""
    add("--run", type=Path, metavar="FOLDER", help="save folder, or a checkpoint of it")
    add("--iteration", type=int, metavar="N", help="show the global batch of this iteration")
    add(
        "--rank",
        type=int,
        metavar="R",
        help="with --iteration: only the samples of this data-parallel rank",
    )
    add(
        "--attempt",
        type=positive_int,
        metavar="A",
        help="with --iteration: an earlier batch of an iteration that a rollback or "
        "--skip-iterations repeated with other samples, counted from 1 (default: the last)",
    )
    add("--sample", type=int, metavar="K", help="show trained sample K, counted from 0")
    add(
        "--position",
        "--positions",
        dest="position",
        type=_parse_positions,
        metavar="P[:END]",
        help="show the sample at this position, which counts skipped samples too, or those from P "
        "to END - 1",
    )
    add("--dataset", metavar="NAME|PREFIX", help="dataset of --document, by name or prefix")
    add(
        "--document",
        type=int,
        metavar="D",
        help="list the samples that contain this document, counted from 0",
    )
    add(
        "--own-id",
        metavar="ID",
        help="list the samples that contain the documents with this id (preprocess_data --id-key)",
    )
    add(
        "--source-line",
        action="store_true",
        help="also print the original line of each document, or the row as JSON",
    )
    add(
        "--source-root",
        type=Path,
        metavar="FOLDER",
        help="folder with the input files of preprocess_data, if they have moved",
    )
    add(
        "--losses",
        action="store_true",
        help="with --iteration: compute the loss of each token under the newest checkpoint before "
        "it, and list the documents by their mean loss, with their worst tokens",
    )
    add(
        "--checkpoint",
        metavar="N|FOLDER",
        help="with --losses: use the checkpoint of this iteration, or in this folder",
    )
    add(
        "--data-parallel-size",
        type=int,
        metavar="N",
        help="for the data-parallel rank, if the checkpoint does not record it",
    )
    add(
        "--fold-file",
        type=Path,
        metavar="FILE",
        help="fold file with the current paths of the datasets",
    )
    add("--data-cache-path", type=Path, metavar="FOLDER", help="folder of the run's sample indices")


def _parse_positions(text: str) -> range:
    """Parse ``P`` or ``P:END``, for argparse."""
    first, colon, end = text.partition(":")
    try:
        found = range(int(first), int(end) if colon else int(first) + 1)
    except ValueError:
        found = range(0)
    if not found:
        raise argparse.ArgumentTypeError(f"expected P or P:END such as 10:20, found {text}")
    return found


def report_lineage(args: argparse.Namespace) -> int:
    """Print the requested report."""
    _check(args)
    run = open_run(args.run, _checkpoint_filter(args), args.fold_file)
    if args.document is not None or args.own_id is not None:
        with open_lineage(run, args.data_cache_path) as lineage:
            print_occurrences(run, lineage, args)
        return EXIT_DONE
    attempts = [Attempt(run.schedule)]
    if args.iteration is not None:
        attempts = find_attempts(run, args.iteration)
    attempt = choose_attempt(attempts, args.attempt, args.iteration)
    folder = None
    if args.losses:
        folder = choose_loss_checkpoint(args.run, args.iteration, args.checkpoint)
    with open_lineage(run, args.data_cache_path, attempt.schedule) as lineage:
        _report_batch(run, lineage, args, folder)
    for line in describe_attempts(attempts):
        print(f"note: iteration {args.iteration:,}, {line}", file=sys.stderr)
    return EXIT_DONE


def _check(args: argparse.Namespace) -> None:
    names = ("iteration", "sample", "position", "document", "own_id")
    requested = [name for name in names if getattr(args, name) is not None]
    needs_dataset = args.document is not None and args.dataset is None
    has_no_use = args.dataset is not None and not {"document", "own_id"} & set(requested)
    if len(requested) != 1 or needs_dataset or has_no_use:
        raise UserError(
            "--run requires one of --iteration N, --sample K, --position P, --own-id ID, or "
            "--dataset NAME with --document D"
        )
    for name in ("rank", "attempt", "losses"):
        if getattr(args, name) not in (None, False) and args.iteration is None:
            raise UserError(f"--{name} requires --iteration N")
    if args.checkpoint is not None and not args.losses:
        raise UserError(f"--checkpoint {args.checkpoint} requires --losses")
    if args.source_root is not None and not args.source_line:
        raise UserError(f"--source-root {args.source_root} requires --source-line")


def _report_batch(
    run: RecordedRun, lineage: Lineage, args: argparse.Namespace, checkpoint: Path | None
) -> None:
    """Print samples with their documents, or with a checkpoint the documents by their losses."""
    replicas = args.data_parallel_size or run.manifest.data_parallel_size
    sources = BatchSources(SourceLookup())
    positions = _positions(run, lineage, args)
    batch = [describe_sample(run, lineage, p, replicas, sources) for p in positions]
    if args.rank is not None:
        batch = _of_rank(batch, args.rank, replicas)
    if args.source_line:
        sources.read_lines(args.source_root)
        sources.add_lines(batch)
    if checkpoint is not None:
        from data_tools.lineage.losses import compute_losses

        places = [entry["position"] for entry in batch]
        losses = compute_losses(run, lineage.epochs, checkpoint, places)
        logged = logged_loss(args.run, args.iteration)
        described = {
            "iteration": args.iteration,
            "checkpoint": str(checkpoint),
            "logged_loss": logged,
            **describe_losses(batch, losses, run),
        }
        print_losses(described, args, checkpoint, sources)
    elif args.json:
        print(json.dumps(batch, indent=1, ensure_ascii=False))
    else:
        print_batch(run, args.iteration, batch, sources, args.max_tokens)


def _of_rank(batch: list[dict[str, Any]], rank: int, replicas: int | None) -> list[dict[str, Any]]:
    """Return the samples of a data-parallel rank."""
    if replicas is None:
        raise UserError(
            f"--rank {rank}: the checkpoint does not record the number of data-parallel ranks: "
            "give --data-parallel-size"
        )
    if not 0 <= rank < replicas:
        raise UserError(f"--rank {rank}: expected 0 to {replicas - 1}")
    return [entry for entry in batch if entry["data_parallel_rank"] == rank]


def _checkpoint_filter(args: argparse.Namespace) -> Callable[[Any], bool]:
    """Return a test whether a checkpoint's manifest covers the requested samples."""
    if args.iteration is not None:
        return lambda manifest: bool(manifest.iteration >= args.iteration)
    if args.sample is not None:
        return lambda manifest: bool(manifest.consumed_samples > args.sample)
    return lambda manifest: False  # use the newest checkpoint


def _positions(run: RecordedRun, lineage: Lineage, args: argparse.Namespace) -> list[int]:
    schedule = lineage.schedule
    if args.iteration is not None:
        return [schedule.position(number) for number in run.samples_of(args.iteration)]
    wanted = args.position if args.sample is None else range(args.sample, args.sample + 1)
    total = schedule.total_positions if args.sample is None else schedule.total_samples
    for number in (wanted[0], wanted[-1]):
        if not 0 <= number < total:
            flag = "--position" if args.sample is None else "--sample"
            raise UserError(f"{flag} {number}: expected 0 to {total - 1:,}")
    return [number if args.sample is None else schedule.position(number) for number in wanted]
