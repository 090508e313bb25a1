"""Reports on a run's data lineage: contents of a global batch, occurrences of a document."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.run_history import RecordedRun, open_lineage, open_run
from data_tools.tables import format_rows
from megatron_llmjp.data.indexed_dataset import read_index
from megatron_llmjp.errors import EXIT_DONE, UserError

if TYPE_CHECKING:
    from megatron_llmjp.data.lineage import Lineage, SampleOrigin

EXAMPLES = """\
  Show the folds, datasets, documents and texts of a global batch, for example of a loss spike:
    inspect_dataset --run checkpoints --iteration 61203 | less

  List the iterations that contain document 1234 of a dataset, past and future:
    inspect_dataset --run checkpoints --dataset ja_wiki --document 1234"""


def add_flags(add: Callable[..., Any]) -> None:
    """Add the flags of inspect_dataset that concern a run."""
    add("--run", type=Path, metavar="FOLDER", help="save folder, or a checkpoint of it")
    add("--iteration", type=int, metavar="N", help="show the global batch of this iteration")
    add("--sample", type=int, metavar="K", help="show trained sample K, counted from 0")
    add(
        "--position",
        type=int,
        metavar="P",
        help="show the sample at this position, which counts skipped samples too",
    )
    add("--dataset", metavar="NAME|PREFIX", help="dataset of --document, by name or prefix")
    add(
        "--document",
        type=int,
        metavar="D",
        help="list the samples that contain this document, counted from 0",
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


def report_lineage(args: argparse.Namespace) -> int:
    """Print the requested report."""
    requested = [
        n for n in ("iteration", "sample", "position", "document") if _get(args, n) is not None
    ]
    if len(requested) != 1 or (args.dataset is None) != (args.document is None):
        raise UserError(
            "--run requires one of --iteration N, --sample K, --position P, or --dataset NAME with "
            "--document D"
        )
    run = open_run(args.run, _checkpoint_filter(args), args.fold_file)
    with open_lineage(run, args.data_cache_path) as lineage:
        if args.document is not None:
            found = document_occurrences(run, lineage, args.dataset, args.document)
            print(
                json.dumps(found, indent=1) if args.json else _format_occurrences(run, args, found)
            )
            return EXIT_DONE
        replicas = args.data_parallel_size or run.manifest.data_parallel_size
        batch = [describe_sample(run, lineage, p, replicas) for p in _positions(run, args)]
    if args.json:
        print(json.dumps(batch, indent=1, ensure_ascii=False))
    else:
        _print_batch(run, args, batch)
    return EXIT_DONE


def describe_sample(
    run: RecordedRun, lineage: Lineage, position: int, replicas: int | None
) -> dict[str, Any]:
    """Return the origin of one sample, with its documents' tokens, as plain values."""
    from megatron_llmjp.data.lineage import read_tokens

    origin = lineage.origin(position)
    return {
        "sample": origin.number,
        "position": origin.position,
        "fold": origin.fold,
        "epoch": origin.epoch,
        **place_in_batch(run, origin, replicas),
        "documents": [
            {
                "dataset": span.dataset,
                "path": span.path,
                "document": span.document,
                "first_token": span.first_token,
                "tokens": read_tokens(span).tolist(),
            }
            for span in origin.spans
        ],
    }


def place_in_batch(
    run: RecordedRun, origin: SampleOrigin, replicas: int | None
) -> dict[str, int | None]:
    """Return the iteration, data-parallel rank and micro-batch of a sample (the latter two from 0).

    Micro-batch k of a run without data parallelism goes to rank k mod d (``data/dataloader.py``).
    """
    if origin.number is None:
        return {"iteration": None, "data_parallel_rank": None, "micro_batch": None}
    iteration = run.sizes.iteration_of(origin.number)
    inside = origin.number - run.sizes.consumed_after(iteration - 1)
    micro_batch, rank = divmod(inside // run.config.training.micro_batch_size, replicas or 1)
    known = replicas is not None
    return {
        "iteration": iteration,
        "data_parallel_rank": rank if known else None,
        "micro_batch": micro_batch if known else None,
    }


def document_occurrences(
    run: RecordedRun, lineage: Lineage, dataset: str, document: int
) -> list[dict[str, Any]]:
    """Return one entry for each sample that contains a part of a document.

    Raises:
        UserError: the run has no such dataset or document.
    """
    path = _dataset_path(run, dataset)
    documents = read_index(path).documents
    if not 0 <= document < documents:
        raise UserError(f"--document {document}: {path} has documents 0 to {documents - 1:,}")
    entries = []
    for position in lineage.positions_of(run.datasets[path].key, document):
        origin = lineage.origin(position)
        spans = [s for s in origin.spans if s.path == path and s.document == document]
        place = place_in_batch(run, origin, None)
        entries.append(
            {
                "iteration": place["iteration"],
                "sample": origin.number,
                "position": position,
                "fold": origin.fold,
                "epoch": origin.epoch,
                "first_token": spans[0].first_token,
                "tokens": sum(span.tokens for span in spans),
            }
        )
    return entries


def _get(args: argparse.Namespace, name: str) -> Any:
    return getattr(args, name)


def _checkpoint_filter(args: argparse.Namespace) -> Callable[[Any], bool]:
    """Return a test whether a checkpoint's manifest covers the requested samples."""
    if args.iteration is not None:
        return lambda manifest: bool(manifest.iteration >= args.iteration)
    if args.sample is not None:
        return lambda manifest: bool(manifest.consumed_samples > args.sample)
    return lambda manifest: False  # use the newest checkpoint


def _positions(run: RecordedRun, args: argparse.Namespace) -> list[int]:
    if args.iteration is not None:
        return [run.schedule.position(number) for number in run.samples_of(args.iteration)]
    number = args.sample if args.sample is not None else args.position
    total = run.schedule.total_samples
    if args.position is not None:
        total = run.schedule.total_positions
    if not 0 <= number < total:
        flag = "--sample" if args.sample is not None else "--position"
        raise UserError(f"{flag} {number}: expected 0 to {total - 1:,}")
    return [run.schedule.position(number) if args.sample is not None else number]


def _dataset_path(run: RecordedRun, dataset: str) -> str:
    """Return the path of a dataset, given by its name in a fold or its prefix."""
    wanted = dataset.removesuffix(".idx").removesuffix(".bin")
    paths: dict[str, str] = {}
    names: dict[str, set[str]] = {}
    for fold in run.schedule.folds:
        for dataset_slice in fold.slices:
            paths[str(Path(dataset_slice.path).resolve())] = dataset_slice.path
            names.setdefault(dataset_slice.name, set()).add(dataset_slice.path)
    if str(Path(wanted).resolve()) in paths:
        return paths[str(Path(wanted).resolve())]
    found = sorted(names.get(dataset, ()))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"--dataset {dataset}: give one of these prefixes: {', '.join(found)}")
    raise UserError(f"--dataset {dataset}: the datasets of the run are {', '.join(sorted(names))}")


def _print_batch(run: RecordedRun, args: argparse.Namespace, batch: list[dict[str, Any]]) -> None:
    if args.iteration is not None:
        print(
            f"iteration {args.iteration:,}: samples {batch[0]['sample']:,} to "
            f"{batch[-1]['sample']:,}, according to {run.folder}\n{format_rows(_summary(batch))}"
        )
    for entry in batch:
        print(f"\n{_heading(entry)}")
        for part in entry["documents"]:
            print(_format_document(run, part, args.max_tokens))


def _summary(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return samples, documents and tokens of a batch by fold and dataset, the largest first."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in batch:
        for number, part in enumerate(entry["documents"]):
            key = (entry["fold"], part["dataset"])
            empty = {"fold": key[0], "dataset": key[1], "samples": 0, "documents": 0, "tokens": 0}
            row = rows.setdefault(key, empty)
            row["samples"] += number == 0
            row["documents"] += 1
            row["tokens"] += len(part["tokens"])
    return sorted(rows.values(), key=lambda row: -int(row["tokens"]))


def _heading(entry: dict[str, Any]) -> str:
    if entry["sample"] is None:
        return f"--- position {entry['position']:,}, fold '{entry['fold']}': skipped"
    words = [f"--- sample {entry['sample']:,}", f"iteration {entry['iteration']:,}"]
    words.append(f"fold '{entry['fold']}'")
    if entry["position"] != entry["sample"]:
        words.insert(1, f"position {entry['position']:,}")
    if entry["epoch"] is not None:
        words.append(f"epoch {entry['epoch']}")
    if entry["data_parallel_rank"] is not None:
        words.append(f"micro-batch {entry['micro_batch']} of data-parallel rank")
        words[-1] += f" {entry['data_parallel_rank']}"
    return ", ".join(words)


def _format_document(run: RecordedRun, part: dict[str, Any], max_tokens: int) -> str:
    ids = part["tokens"]
    shown = ids[:max_tokens]
    text = run.tokenizer.decode(shown) if run.tokenizer else " ".join(map(str, shown))
    cut = f", the first {max_tokens:,} shown" if len(ids) > max_tokens else ""
    first = part["first_token"]
    return (
        f"{part['dataset']} document {part['document']:,}, tokens {first:,} to "
        f"{first + len(ids) - 1:,}{cut}:\n{text}"
    )


def _format_occurrences(
    run: RecordedRun, args: argparse.Namespace, found: list[dict[str, Any]]
) -> str:
    name = f"document {args.document:,} of {args.dataset}"
    if not found:
        return f"{name} is not in any sample of the run"
    done = run.manifest.iteration
    past = sum(e["iteration"] is not None and e["iteration"] <= done for e in found)
    skipped = sum(e["iteration"] is None for e in found)
    rows = [{k: "skipped" if v is None else v for k, v in entry.items()} for entry in found]
    later = len(found) - past - skipped
    counts = f"{past} trained on by iteration {done:,}, {later} in later iterations"
    return (
        f"{name} is in {len(found)} samples: {counts}"
        + (f", {skipped} skipped" if skipped else "")
        + f"\n{format_rows(rows)}"
    )
