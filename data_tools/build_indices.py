"""Build all sample indices of a run ahead, on a machine without GPUs."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.common import ToolParser, cores, run_tool
from data_tools.run_flags import add_data_flags, parse_run_flags, split_flags
from data_tools.tables import check_table_path, format_table, write_table
from megatron_llmjp.arguments import positive_int
from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.folds.datasets import save_facts
from megatron_llmjp.data.indices.index_cache import (
    CachedIndex,
    ensure_index,
    find_damage,
    size_on_disk,
)
from megatron_llmjp.errors import EXIT_DONE, UserError
from megatron_llmjp.run_data import (
    check_run_tokenizer,
    index_cache_folder,
    load_run_tokenizer,
    resolve_data,
    train_iterations,
    validation_sets,
    with_stored_keys,
)

EXAMPLES = """\
  Before the job, with the flags of the run that have to do with data:
    build_indices --fold-file folds.yaml --seq-length 4096 --global-batch-size 1024 --workers 8
  or with all of them: the flags of pretrain_gpt.py are taken, a run's command line can be pasted.
    build_indices --config llm-jp-3-13b --fold-file folds.yaml --data-cache-path /fast/index_cache

  Only what the next fold needs; and to compare the checksums of all that is there:
    build_indices ... --folds fold03
    build_indices ... --verify

Without this a run makes the indices of its first fold at the start and each next fold's in the
background. The same command goes on where it was interrupted, and a run may start meanwhile. A
worker needs about 30 bytes per document of its dataset. See docs/folds.md."""

VALIDATION, ORDER = "(validation)", "(order)"


@dataclass
class IndexTask:
    """An index that a fold needs for a dataset."""

    index: CachedIndex
    fold: str
    dataset: str
    samples: int
    """Of this dataset in this fold."""
    is_first: bool
    """Whether no fold before needs the same index."""
    seconds: float | None = None
    """What making it took; None where it was there or is made for a fold before."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = ToolParser("build_indices", "Build all sample indices of a run ahead.", EXAMPLES)
    add = parser.add_argument
    add_data_flags(add)
    add("--data-cache-path", metavar="FOLDER", help="where; index_cache beside the fold file")
    args, flags = split_flags(parser, argv, _add_own_flags)
    return run_tool("build_indices", lambda: build_indices(args, flags))


def _add_own_flags(add: Callable[..., Any]) -> None:
    add("--workers", type=positive_int, default=min(8, cores()), metavar="N", help="processes")
    add("--folds", nargs="+", metavar="NAME", help="only these, and validation sets")
    add("--verify", action="store_true", help="compare checksums and rebuild what is damaged")
    add("--report", type=Path, metavar="FILE", help="the whole table as .csv or .json")


def build_indices(args: argparse.Namespace, flags: list[str]) -> int:
    """Build what is missing and print the table."""
    if args.report is not None:
        check_table_path(args.report)
    config = parse_run_flags(flags, "build_indices").config
    entries, cache = find_tasks(config, args.folds)
    first = [entry for entry in entries if entry.is_first]
    missing = [e for e in first if find_damage(e.index.folder, thorough=args.verify) is not None]
    started = time.monotonic()
    if missing:
        build_missing(missing, args.workers, args.verify)
    table = table_rows(entries)
    print(format_table(table))
    if args.report is not None:
        write_table(args.report, table)
    where = f"in {cache}"
    if missing:
        seconds = time.monotonic() - started
        print(f"built {len(missing)} of {len(first)} indices {where}, {seconds:.1f} s")
    else:
        checked = ", their checksums are right" if args.verify else ""
        print(f"all {len(first)} indices are there already {where}{checked}")
    return EXIT_DONE


def find_tasks(config: Config, folds: Sequence[str] | None) -> tuple[list[IndexTask], Path]:
    """What the folds of a run need, in their order, and the folder of it.

    Raises:
        UserError: the data is wrong, or a fold's name is unknown.
    """
    data = resolve_data(config)
    root = config.checkpoint.load or config.checkpoint.save
    if root is not None:
        with suppress(UserError):  # no checkpoint yet
            manifest = manifests.read_manifest(manifests.newest_checkpoint(Path(root)))
            data = with_stored_keys(data, config, manifest.folds)
    run = load_run_tokenizer(config)
    for warning in check_run_tokenizer(config, data.datasets, run) if run else []:
        print(f"warning: {warning}", file=sys.stderr)
    names = [fold.name for fold in data.schedule.folds]
    for name in folds or ():
        if name not in names:
            raise UserError(f"--folds {name}: the folds are {', '.join(names)}")
    from megatron_llmjp.data.dataset import FoldDataset, ValidationDataset  # torch: seconds
    from megatron_llmjp.data.indices.epoch_index import EpochDatasets
    from megatron_llmjp.tokenizers import load_tokenizer

    # An index does not depend on the tokenizer.
    tokenizer = load_tokenizer("NullTokenizer", None, vocab_size=1)
    epochs = EpochDatasets(config.data, tokenizer, index_cache_folder(config, data.folds))
    save_facts(data.datasets, epochs.cache)
    samples = FoldDataset(data.schedule, epochs)
    found: list[IndexTask] = []
    seen: set[Path] = set()

    def add(index: CachedIndex, fold: str, dataset: str, samples: int) -> None:
        found.append(IndexTask(index, fold, dataset, samples, index.folder not in seen))
        seen.add(index.folder)

    for fold in data.schedule.folds:
        if folds and fold.name not in folds:
            continue
        by_key = {piece.key: piece for piece in fold.slices}
        for index in samples.indices(fold):
            piece = by_key.get(getattr(index, "key", ""))
            of = (piece.name, piece.samples) if piece else (ORDER, fold.samples)
            add(index, fold.name, *of)
    train_iters, _ = train_iterations(config, data.schedule)
    validation, _ = validation_sets(config, data, train_iters)
    for name, held_out in validation.items():
        add(ValidationDataset(held_out, epochs).index, VALIDATION, name, 0)
    return found, epochs.cache


def build_missing(missing: Sequence[IndexTask], workers: int, verify: bool) -> None:
    """Make indices in several processes, the largest first, and show how far that is."""
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    by_cost = sorted(missing, key=lambda entry: -entry.index.build_cost)
    with ProcessPoolExecutor(min(workers, len(missing)), mp_context=spawn) as pool:
        futures: dict[Future[float], IndexTask] = {
            pool.submit(timed_build, entry.index, verify): entry for entry in by_cost
        }
        try:
            with show_progress(futures.values()) as done:
                for future in as_completed(futures):
                    futures[future].seconds = future.result()
                    done(futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def timed_build(index: CachedIndex, verify: bool) -> float:
    """Make an index and return the seconds it took."""
    started = time.monotonic()
    ensure_index(index.folder, index.build, thorough=verify)
    return time.monotonic() - started


@contextmanager
def show_progress(entries: Iterable[IndexTask]) -> Iterator[Any]:
    """A bar on a terminal, a line per index elsewhere; yields what to call with a finished one."""
    entries = list(entries)
    if not sys.stderr.isatty():
        yield partial(_say, len(entries), [])
        return
    from tqdm import tqdm

    total = sum(entry.index.build_cost for entry in entries)
    with tqdm(total=total, dynamic_ncols=True, bar_format="{percentage:3.0f}%|{bar}| {postfix} "
              "[{elapsed}<{remaining}]") as bar:  # fmt: skip
        left = {id(entry) for entry in entries}

        def done(entry: IndexTask) -> None:
            left.discard(id(entry))
            bar.set_postfix_str(f"{len(entries) - len(left)} of {len(entries)} indices")
            bar.update(entry.index.build_cost)

        yield done


def _say(total: int, finished: list[IndexTask], entry: IndexTask) -> None:
    finished.append(entry)
    what = f"{entry.fold} {entry.dataset}, {entry.seconds:.1f} s"
    print(f"index {len(finished)} of {total}: {what}", file=sys.stderr, flush=True)


def table_rows(entries: Sequence[IndexTask]) -> list[dict[str, Any]]:
    """One row per fold and dataset, and their total.

    An index that several folds need counts, in seconds and bytes, for the first of them.
    """
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries:
        empty = {"epochs": 0, "samples": entry.samples, "built": 0, "seconds": 0.0, "bytes": 0}
        place = {"fold": entry.fold, "dataset": entry.dataset}
        row = table.setdefault((entry.fold, entry.dataset), place | empty)
        row["epochs"] += entry.dataset != ORDER
        row["built"] += entry.seconds is not None
        row["seconds"] = round(row["seconds"] + (entry.seconds or 0.0), 2)
        row["bytes"] += size_on_disk(entry.index.folder) if entry.is_first else 0
    found = list(table.values())
    total: dict[str, Any] = {"fold": "total", "dataset": ""}
    for name in ("epochs", "samples", "built", "seconds", "bytes"):
        of = [row for row in found if name != "samples" or row["dataset"] != ORDER]
        total[name] = round(sum(row[name] for row in of), 2)
    return [*found, total]


if __name__ == "__main__":
    sys.exit(main())
