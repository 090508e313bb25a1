"""Samples of a run that contain a document, given by its number or its own id."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.document_sources.lookup import SourceLookup, format_origin
from data_tools.lineage.batch import place_in_batch
from data_tools.run_history import RecordedRun
from data_tools.tables import format_rows
from megatron_llmjp.data.indexed_dataset import read_index
from megatron_llmjp.errors import UserError

if TYPE_CHECKING:
    from megatron_llmjp.data.lineage import Lineage


def print_occurrences(run: RecordedRun, lineage: Lineage, args: argparse.Namespace) -> None:
    """Print the samples that contain the requested documents.

    Raises:
        UserError: there is no such dataset, document or id.
    """
    if args.own_id is None:
        path = dataset_path(run, args.dataset)
        found = document_occurrences(run, lineage, path, args.document)
        name = f"document {args.document:,} of {args.dataset}"
        print(json.dumps(found, indent=1) if args.json else _format_occurrences(run, name, found))
        return
    lookup, described = SourceLookup(), []
    for path, document in documents_with_id(run, lookup, args.own_id, args.dataset):
        origin = lookup.origin(path, document)
        assert origin is not None
        samples = document_occurrences(run, lineage, path, document)
        source = {"source": origin.to_json()}
        described.append({"path": path, "document": document, **source, "samples": samples})
        if not args.json:
            name = f"document {document:,} of {path}, {format_origin(origin)},"
            print(_format_occurrences(run, name, samples))
    if args.json:
        print(json.dumps(described, indent=1, ensure_ascii=False))


def documents_with_id(
    run: RecordedRun, lookup: SourceLookup, own_id: str, dataset: str | None
) -> list[tuple[str, int]]:
    """Return the documents with an id, as path of the dataset and number.

    Args:
        run: the run.
        lookup: sources of the documents.
        own_id: the id.
        dataset: search this dataset only.

    Raises:
        UserError: there are none.
    """
    paths = list(run.datasets) if dataset is None else [dataset_path(run, dataset)]
    found = [(path, number) for path in paths for number in lookup.find_id(path, own_id)]
    if not found:
        without = [path for path in paths if not lookup.has_ids(path)]
        note = (
            f"; no ids are recorded for {', '.join(without)} (preprocess_data --record-sources "
            "--id-key KEY)"
            if without
            else ""
        )
        raise UserError(f"--own-id {own_id}: no document of the datasets has this id{note}")
    return found


def document_occurrences(
    run: RecordedRun, lineage: Lineage, path: str, document: int
) -> list[dict[str, Any]]:
    """Return one entry for each sample that contains a part of a document.

    Raises:
        UserError: the dataset has no such document.
    """
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


def dataset_path(run: RecordedRun, dataset: str) -> str:
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


def _format_occurrences(run: RecordedRun, name: str, found: list[dict[str, Any]]) -> str:
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
