"""``plan_folds --new``: write a fold file, after the planner has checked it."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.find_datasets import find_datasets
from data_tools.new_folds.build import (
    find_budget,
    inventory,
    make_fold_file,
    make_megatron_file,
    refuse_split,
)
from data_tools.new_folds.requests import (
    DataRequest,
    check_weights,
    merge_duplicates,
    request_from_flags,
    request_from_folders,
    request_from_list,
    request_from_table,
)
from megatron_llmjp.arguments import positive_int
from megatron_llmjp.config.flags import Command, Mode
from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.folds.data_path import given_data_flags
from megatron_llmjp.data.folds.datasets import inspect_datasets, save_facts
from megatron_llmjp.data.folds.loading import read_fold_file
from megatron_llmjp.data.folds.rendering import render_fold_file
from megatron_llmjp.data.folds.resolve import resolve_folds
from megatron_llmjp.data.folds.schedule import DatasetInfo, Schedule
from megatron_llmjp.data.folds.schema import FoldFile
from megatron_llmjp.data.indexed_dataset import read_index
from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.data_plan import DataPlan
from megatron_llmjp.filesystem import write_atomically
from megatron_llmjp.formatting import format_count
from megatron_llmjp.planning import plan_resolved_data
from megatron_llmjp.run_data import ResolvedData, index_cache_folder

EXAMPLES = """\
  Write a fold file with all datasets in a folder, each used once, and print its schedule:
    plan_folds --new folds.yaml --datasets data/ --validation data/valid --seq-length 4096 \\
        --global-batch-size 1024

  Ten disjoint folds of the same mixture, 87,870 iterations in all:
    plan_folds --new folds.yaml --datasets data/ --split 10 --train-iters 87870 ...

  From a table (.csv, .tsv, .json) with the columns `path` and `weight`, `tokens` or `epochs`:
    plan_folds --new folds.yaml --table mixture.csv ...

  From a script of llm-jp-3, whose weights are tokens x repeat; --order megatron keeps the order of
  Megatron-LM, sample by sample:
    plan_folds --new folds.yaml --data-list train.sh ...
    plan_folds --new folds.yaml --data-list train.sh --order megatron --train-iters 494120 ..."""

_OWN = ("datasets", "table", "data_list", "validation", "order", "overwrite")
_DATA_FIELDS = (
    "data_path",
    "train_data_path",
    "valid_data_path",
    "test_data_path",
)


def add_new_flags(add: Callable[..., Any]) -> None:
    """Add the flags of ``--new``."""
    add(
        "--new",
        type=Path,
        metavar="FILE",
        help="write a new fold file and print its schedule; --split N makes N disjoint folds",
    )
    add("--datasets", nargs="+", metavar="PATH", help="--new: all datasets in folders, or prefixes")
    add(
        "--table",
        type=Path,
        metavar="FILE",
        help="--new: table of datasets with weights, tokens or epochs (.csv, .tsv, .json)",
    )
    add(
        "--data-list",
        metavar="FILE",
        help="--new: list for Megatron-LM's --data-path, or a script with one; - is standard "
        "input. --data-path and its variants are accepted as well",
    )
    add("--validation", nargs="+", default=[], metavar="PATH", help="--new: validation sets")
    add(
        "--order",
        choices=("folds", "megatron"),
        help="--new: megatron for the sample order of Megatron-LM (default: folds)",
    )
    add("--overwrite", action="store_true", help="--new: replace an existing file")


def refuse_without_new(args: argparse.Namespace) -> None:
    """Raise UserError if flags of ``--new`` are given without it."""
    given = [f"--{name.replace('_', '-')}" for name in _OWN if getattr(args, name)]
    if given:
        raise UserError(f"{given[0]} requires --new FILE, the fold file to write")


def write_new_file(args: argparse.Namespace, command: Command) -> tuple[DataPlan, list[str]]:
    """Write the requested fold file, and return its plan and warnings.

    With ``--dry-run`` the file is printed instead.

    Raises:
        UserError: the request is invalid, or the planner refuses the file; nothing is written.
    """
    target, config = args.new, command.config
    _check_target(target, args.overwrite or command.mode is Mode.DRY_RUN)
    if config.data.fold_file is not None:
        raise UserError("--new writes a fold file: remove --fold-file, which names an existing one")
    config, parts = _number_of_folds(config)
    request = _read_request(args, config)
    config = _with_split_of_list(config, request)
    placed = replace_fields(config, fold_file=str(target))
    cache = index_cache_folder(placed, inventory(request))
    file, infos, notes = _make_file(request, config, parts, args.order or "folds", cache)
    config = replace_fields(
        config, fold_file=str(target), split=None, data_args_path=None,
        per_split_data_args_path=None, **dict.fromkeys(_DATA_FIELDS, ()),
    )  # fmt: skip
    text, data = _render_and_read_back(file, infos, config, target)
    plan, warnings = plan_resolved_data(config, data, "lr" in command.origin)
    if command.mode is Mode.DRY_RUN:
        print(text, file=sys.stderr)
    else:
        write_atomically(target, text)
        save_facts(data.datasets, cache)
        print(f"{target}: written", file=sys.stderr)
    return plan, [*notes, *warnings]


def _check_target(target: Path, may_exist: bool) -> None:
    if not target.parent.is_dir():
        raise UserError(f"--new {target}: the folder {target.parent} does not exist")
    if target.is_dir():
        raise UserError(f"--new {target}: is a folder; expected the name of a file")
    if target.exists() and not may_exist:
        raise UserError(f"--new {target}: already exists; give --overwrite to replace it")


def _number_of_folds(config: Config) -> tuple[Config, int]:
    """Return the folds that ``--split N`` requests; other splits are those of Megatron-LM."""
    split = config.data.split
    if split is None or not re.fullmatch(r"\d+", split):
        return config, 1
    try:
        return replace_fields(config, split=None), positive_int(split)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--split {split}: {error}") from None


def _read_request(args: argparse.Namespace, config: Config) -> DataRequest:
    flags = [flag for flag in given_data_flags(config.data) if flag != "--split"]
    given = [
        *(f"--{name.replace('_', '-')}" for name in _OWN[:3] if getattr(args, name)),
        *flags[:1],
    ]
    if len(given) != 1:
        found = f"found {' and '.join(given)}" if given else "found none"
        raise UserError(
            "--new requires one source of datasets: --datasets, --table, --data-list or "
            f"--data-path; {found}"
        )
    held_out = find_datasets(args.validation)
    if args.datasets:
        request = request_from_folders(args.datasets, held_out)
    elif args.table:
        request = request_from_table(args.table)
    elif args.data_list:
        request = request_from_list(args.data_list)
    else:
        request = request_from_flags(config.data)
    return replace(request, held_out=tuple(held_out))


def _with_split_of_list(config: Config, request: DataRequest) -> Config:
    split = request.lists.split if request.lists else None
    if split is None or config.data.split == split:
        return config
    if config.data.split is not None:
        raise UserError(
            f"--split {config.data.split} differs from --split {split} of the script: remove it"
        )
    print(f"note: --split {split} is taken from the script", file=sys.stderr)
    return replace_fields(config, split=split)


def _make_file(
    request: DataRequest, config: Config, parts: int, order: str, cache: Path
) -> tuple[FoldFile, dict[str, DatasetInfo], list[str]]:
    """Return the fold file, the facts of its datasets by path, and warnings."""
    if order == "megatron":
        if parts > 1:
            raise UserError(
                "Megatron-LM's order cannot be divided into folds: remove --split or --order"
            )
        infos = inspect_datasets(inventory(request), cache) if request.kind == "epochs" else {}
        file = make_megatron_file(request, infos, config)
        return file, inspect_datasets(file, cache), []
    refuse_split(config.data.split, f"--split {config.data.split}")
    request = merge_duplicates(request)
    infos = inspect_datasets(inventory(request), cache)
    _refuse_copies(request, infos)
    tokens = {path: info.tokens for path, info in infos.items()}
    file, warnings = make_fold_file(request, infos, config, parts)
    is_tokens = request.weights_are_tokens and request.kind == "weight" and not find_budget(config)
    return file, infos, [*warnings, *(check_weights(request, tokens) if is_tokens else [])]


def _refuse_copies(request: DataRequest, infos: Mapping[str, DatasetInfo]) -> None:
    """Raise UserError if two datasets have the same contents: their samples would be repeated."""
    seen: dict[str, str] = {}
    for entry in request.datasets:
        first = seen.setdefault(infos[entry.path].key, entry.path)
        if first != entry.path:
            raise UserError(
                f"{first} and {entry.path} have the same contents: keep one of them, and to use it "
                "more often, give it the sum of the amounts"
            )


def _render_and_read_back(
    file: FoldFile, infos: Mapping[str, DatasetInfo], config: Config, target: Path
) -> tuple[str, ResolvedData]:
    """Return the text of a fold file, and the data that the text resolves to when it is read.

    Raises:
        RuntimeError: the text gives another schedule, which is an error of this program.
    """
    schedule = _resolve(file, infos, config)
    text = render_fold_file(file, target.parent, _comments(schedule, infos), _header(file, infos))
    work = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        work.write_text(text, encoding="utf-8")
        read = read_fold_file(work)
    except UserError as error:
        raise UserError(str(error).replace(str(work), str(target))) from None
    finally:
        work.unlink(missing_ok=True)
    by_place = {os.path.realpath(path): info for path, info in infos.items()}
    found = {path: by_place[os.path.realpath(path)] for path in read.dataset_paths()}
    again = _resolve(read, found, config)
    if [f.digest for f in again.folds] != [f.digest for f in schedule.folds]:
        raise RuntimeError(f"{target}: the text gives another schedule than requested")
    return text, ResolvedData(read, found, again)


def _resolve(file: FoldFile, infos: Mapping[str, DatasetInfo], config: Config) -> Schedule:
    return resolve_folds(file, infos, config.data.seq_length, BatchSizeSchedule(config))


def _comments(schedule: Schedule, infos: Mapping[str, DatasetInfo]) -> dict[str, str]:
    """Return the size of each dataset, and its epochs in the run, by path."""
    samples: dict[str, int] = {}
    epochs: dict[str, float] = {}
    for fold in schedule.folds:
        for piece in fold.slices:
            samples[piece.path] = samples.get(piece.path, 0) + piece.samples
            epochs[piece.path] = samples[piece.path] / piece.samples_per_epoch
    return {
        path: f"{format_count(infos[path].tokens)} tokens, {read_index(path).documents:,} "
        f"documents, {number:.3f} epochs"
        for path, number in epochs.items()
    }


def _header(file: FoldFile, infos: Mapping[str, DatasetInfo]) -> list[str]:
    paths = {source.path for fold in file.folds for source in fold.blend.values()}
    tokens = sum(infos[path].tokens for path in paths)
    return [
        f"Written by plan_folds --new: {len(paths):,} dataset{'s' if len(paths) > 1 else ''} of "
        f"{format_count(tokens)} tokens, {len(file.folds)} fold"
        f"{'s' if len(file.folds) > 1 else ''}. The format is described in docs/folds.md."
    ]
