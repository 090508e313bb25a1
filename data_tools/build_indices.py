"""Build all sample indices of a run in advance; needs no GPU."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.common import ToolParser, cores, run_tool
from data_tools.run_flags import add_data_flags, parse_run_flags, split_flags
from data_tools.tables import check_table_path, format_rows, write_table
from megatron_llmjp.arguments import positive_int
from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.folds.datasets import check_datasets, save_facts
from megatron_llmjp.data.folds.schedule import DatasetInfo
from megatron_llmjp.data.indices.index_cache import (
    CachedIndex,
    ensure_index,
    find_damage,
    size_on_disk,
)
from megatron_llmjp.errors import EXIT_DONE, UserError
from megatron_llmjp.run_data import (
    ResolvedData,
    check_run_tokenizer,
    index_cache_folder,
    load_run_tokenizer,
    resolve_data,
    train_iterations,
    validation_sets,
    with_stored_keys,
)

EXAMPLES = """\
  Build all indices before the job, with the data flags of the run:
    build_indices --fold-file folds.yaml --seq-length 4096 --global-batch-size 1024 --workers 8
  All flags of pretrain_gpt.py are accepted, so a run's command line can be used unchanged:
    build_indices --config llm-jp-3-13b --fold-file folds.yaml --data-cache-path /fast/index_cache

  Build the indices of one fold only; compare the checksums of existing indices:
    build_indices ... --folds fold03
    build_indices ... --verify

Otherwise a run builds the indices of its first fold at the start, and those of each following fold
in the background. With `shuffle: blocks` there are none: only the datasets are checked. The same
command resumes an interrupted build, and a run may start meanwhile. A worker uses about 30 bytes of
memory per document of its dataset. See docs/folds.md."""

VALIDATION, ORDER = "(validation)", "(order)"


@dataclass
class IndexTask:
    """An index that a fold requires for a dataset."""

    index: CachedIndex
    fold: str
    dataset: str
    samples: int
    """Number of samples of this dataset in this fold."""
    is_first: bool
    """Whether no earlier fold requires the same index."""
    seconds: float | None = None
    """Build time; None if the index existed or was built for an earlier fold."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = ToolParser("build_indices", "Build all sample indices of a run in advance.", EXAMPLES)
    add = parser.add_argument
    add_data_flags(add)
    add(
        "--data-cache-path",
        metavar="FOLDER",
        help="cache folder (default: index_cache next to the fold file)",
    )
    args, flags = split_flags(parser, argv, _add_own_flags)
    return run_tool("build_indices", lambda: build_indices(args, flags))


def _add_own_flags(add: Callable[..., Any]) -> None:
    add(
        "--workers",
        type=positive_int,
        default=min(8, cores()),
        metavar="N",
        help="number of worker processes (default: the number of CPU cores, at most 8)",
    )
    add(
        "--folds", nargs="+", metavar="NAME", help="build only these folds, and the validation sets"
    )
    add("--verify", action="store_true", help="compare checksums and rebuild damaged indices")
    add(
        "--report", type=Path, metavar="FILE", help="write the whole table to FILE.csv or FILE.json"
    )


def build_indices(args: argparse.Namespace, flags: list[str]) -> int:
    """Build the missing indices and print the table."""
    if args.report is not None:
        check_table_path(args.report)
    config = parse_run_flags(flags, "build_indices").config
    data = read_data(config)
    cache = index_cache_folder(config, data.folds)
    save_facts(data.datasets, cache)
    tasks = find_index_tasks(config, data, args.folds)
    check_entries(data.datasets, cache, args.workers)
    if not tasks:
        print(f"all facts about the datasets are in {cache}: the sample order needs no indices")
        return EXIT_DONE
    first = [task for task in tasks if task.is_first]
    missing = [e for e in first if find_damage(e.index.folder, thorough=args.verify) is not None]
    started = time.monotonic()
    if missing:
        build_missing(missing, args.workers, args.verify)
    table = table_rows(tasks)
    print(format_rows(table))
    if args.report is not None:
        write_table(args.report, table)
    where = f"in {cache}"
    if missing:
        seconds = time.monotonic() - started
        print(f"built {len(missing)} of {len(first)} indices {where}, {seconds:.1f} s")
    else:
        checked = ", with correct checksums" if args.verify else ""
        print(f"all {len(first)} indices exist {where}{checked}")
    return EXIT_DONE


def read_data(config: Config) -> ResolvedData:
    """Return the data of a run, as its newest checkpoint records it if there is one.

    Raises:
        UserError: the data is invalid.
    """
    data = resolve_data(config)
    root = config.checkpoint.load or config.checkpoint.save
    if root is not None:
        with suppress(UserError):  # no checkpoint yet
            manifest = manifests.read_manifest(manifests.newest_checkpoint(Path(root)))
            data = with_stored_keys(data, config, manifest.folds)
    return data


def check_entries(datasets: Mapping[str, DatasetInfo], cache: Path, workers: int) -> None:
    """Check all entries of the datasets for which a run would do so in the background.

    Raises:
        DataError: an index is damaged.
    """
    unchecked = {path: info for path, info in datasets.items() if not info.checked}
    if not unchecked:
        return
    from tqdm import tqdm

    print(f"checking the entries of {len(unchecked)} datasets", file=sys.stderr, flush=True)
    quiet = not sys.stderr.isatty()
    with ThreadPoolExecutor(workers) as pool:  # numpy does the work
        checks = [
            pool.submit(check_datasets, {path: info}, cache) for path, info in unchecked.items()
        ]
        for check in tqdm(as_completed(checks), total=len(checks), disable=quiet):
            if check.exception() is not None:
                pool.shutdown(wait=False, cancel_futures=True)
            check.result()


def find_index_tasks(
    config: Config, data: ResolvedData, folds: Sequence[str] | None
) -> list[IndexTask]:
    """Return the stored indices that the folds of a run require, in order.

    Raises:
        UserError: a fold name is unknown, or a dataset was made with another tokenizer.
    """
    run = load_run_tokenizer(config)
    for warning in check_run_tokenizer(config, data.datasets, run) if run else []:
        print(f"warning: {warning}", file=sys.stderr)
    names = [fold.name for fold in data.schedule.folds]
    for name in folds or ():
        if name not in names:
            raise UserError(f"--folds {name}: the folds are {', '.join(names)}")
    from megatron_llmjp.data.dataset import FoldDataset, ValidationDataset  # imports torch
    from megatron_llmjp.data.indices.epoch_index import EpochDatasets
    from megatron_llmjp.tokenizers import load_tokenizer

    # Indices do not depend on the tokenizer.
    tokenizer = load_tokenizer("NullTokenizer", None, vocab_size=1)
    epochs = EpochDatasets(config.data, tokenizer, index_cache_folder(config, data.folds))
    samples = FoldDataset(data.schedule, epochs)
    found: list[IndexTask] = []
    seen: set[Path] = set()

    def add(index: CachedIndex, fold: str, dataset: str, samples: int) -> None:
        found.append(IndexTask(index, fold, dataset, samples, index.folder not in seen))
        seen.add(index.folder)

    for fold in data.schedule.folds:
        if folds and fold.name not in folds:
            continue
        by_key = {dataset_slice.key: dataset_slice for dataset_slice in fold.slices}
        for index in samples.indices(fold):
            dataset_slice = by_key.get(getattr(index, "key", ""))
            of = (
                (dataset_slice.name, dataset_slice.samples)
                if dataset_slice
                else (ORDER, fold.samples)
            )
            add(index, fold.name, *of)
    train_iters, _ = train_iterations(config, data.schedule)
    validation, _ = validation_sets(config, data, train_iters)
    for name, held_out in validation.items():
        for index in ValidationDataset(held_out, epochs).indices:
            add(index, VALIDATION, name, 0)
    return found


def build_missing(missing: Sequence[IndexTask], workers: int, verify: bool) -> None:
    """Build indices in several processes, the largest first, and show the progress."""
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    by_cost = sorted(missing, key=lambda task: -task.index.build_cost)
    with ProcessPoolExecutor(min(workers, len(missing)), mp_context=spawn) as pool:
        futures: dict[Future[float], IndexTask] = {
            pool.submit(timed_build, task.index, verify): task for task in by_cost
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
    """Build an index and return the time taken in seconds."""
    started = time.monotonic()
    ensure_index(index.folder, index.build, thorough=verify)
    return time.monotonic() - started


@contextmanager
def show_progress(tasks: Iterable[IndexTask]) -> Iterator[Any]:
    """Show a bar on a terminal, else a line per index; yields a callback."""
    tasks = list(tasks)
    if not sys.stderr.isatty():
        yield partial(_log_finished, len(tasks), [])
        return
    from tqdm import tqdm

    total = sum(task.index.build_cost for task in tasks)
    with tqdm(total=total, dynamic_ncols=True, bar_format="{percentage:3.0f}%|{bar}| {postfix} "
              "[{elapsed}<{remaining}]") as bar:  # fmt: skip
        left = {id(task) for task in tasks}

        def done(task: IndexTask) -> None:
            left.discard(id(task))
            bar.set_postfix_str(f"{len(tasks) - len(left)} of {len(tasks)} indices")
            bar.update(task.index.build_cost)

        yield done


def _log_finished(total: int, finished: list[IndexTask], task: IndexTask) -> None:
    finished.append(task)
    what = f"{task.fold} {task.dataset}, {task.seconds:.1f} s"
    print(f"index {len(finished)} of {total}: {what}", file=sys.stderr, flush=True)


def table_rows(tasks: Sequence[IndexTask]) -> list[dict[str, Any]]:
    """Return one row per fold and dataset, and their total.

    The seconds and bytes of an index that several folds require are counted for the first one.
    """
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for task in tasks:
        empty = {"epochs": 0, "samples": task.samples, "built": 0, "seconds": 0.0, "bytes": 0}
        place = {"fold": task.fold, "dataset": task.dataset}
        row = table.setdefault((task.fold, task.dataset), place | empty)
        row["epochs"] += task.dataset != ORDER
        row["built"] += task.seconds is not None
        row["seconds"] = round(row["seconds"] + (task.seconds or 0.0), 2)
        row["bytes"] += size_on_disk(task.index.folder) if task.is_first else 0
    found = list(table.values())
    total: dict[str, Any] = {"fold": "total", "dataset": ""}
    for name in ("epochs", "samples", "built", "seconds", "bytes"):
        of = [row for row in found if name != "samples" or row["dataset"] != ORDER]
        total[name] = round(sum(row[name] for row in of), 2)
    return [*found, total]


if __name__ == "__main__":
    sys.exit(main())
