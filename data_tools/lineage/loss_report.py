"""Report on the losses of a batch: its documents by loss, and their worst tokens."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.lineage.batch import BatchSources
from data_tools.run_history import RecordedRun
from data_tools.tables import format_rows
from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.errors import UserError
from megatron_llmjp.metric_registry import LM_LOSS
from megatron_llmjp.report.history import read_history

if TYPE_CHECKING:
    from data_tools.lineage.losses import SampleLosses

DOCUMENTS_SHOWN = 20
TOKENS_SHOWN = 5
TEXT_SHOWN = 300


def choose_loss_checkpoint(root: Path, iteration: int, requested: str | None) -> Path:
    """Return the checkpoint whose weights give the losses of an iteration.

    Args:
        root: the save folder, or a checkpoint in it.
        iteration: the iteration; training computed its losses with the weights after the previous
            one.
        requested: iteration or folder of the checkpoint to use; by default the newest one before.

    Raises:
        UserError: there is no such checkpoint.
    """
    save = root.parent if (root / manifests.MANIFEST).is_file() else root
    known = manifests.complete_iterations(save)
    if requested is not None and (Path(requested) / manifests.MANIFEST).is_file():
        return Path(requested)
    if requested is not None and (not requested.isdecimal() or int(requested) not in known):
        raise UserError(
            f"--checkpoint {requested}: expected the folder of a checkpoint, or the iteration of a "
            f"complete one in {save}: {', '.join(map(str, known)) or 'it has none'}"
        )
    before = [found for found in known if found < iteration]
    if requested is None and not before:
        raise UserError(
            f"--losses: {save} has no checkpoint before iteration {iteration:,}; give one with "
            f"--checkpoint, of {', '.join(map(str, known)) or 'none'}"
        )
    return save / manifests.folder_name(before[-1] if requested is None else int(requested))


def describe_losses(
    batch: Sequence[dict[str, Any]], losses: Sequence[SampleLosses], run: RecordedRun
) -> dict[str, Any]:
    """Return the mean loss of a batch and its documents, the largest mean loss first.

    A document gets the losses of its own tokens. The first one of a sample is not predicted, and
    those outside the loss mask do not count.

    Args:
        batch: the samples, from :func:`~data_tools.lineage.batch.describe_sample`.
        losses: their losses.
        run: the run, for its tokenizer.
    """
    documents = []
    for entry, found in zip(batch, losses, strict=True):
        end = -1  # of the document among the labels, which begin with the second token
        for part in entry["documents"]:
            first, end = max(end, 0), end + len(part["tokens"])
            unpredicted = len(part["tokens"]) - (end - first)
            if found.labels[first:end].tolist() != part["tokens"][unpredicted:]:
                raise UserError(
                    f"the tokens of {part['path']} document {part['document']} are not those of "
                    "the sample: the dataset has changed"
                )
            counted = np.flatnonzero(found.mask[first:end]) + first
            documents.append(_describe_document(entry, part, found, counted, run))
    total = sum(float(found.losses[found.mask].sum()) for found in losses)
    tokens = sum(int(found.mask.sum()) for found in losses)
    for document in documents:
        document["share"] = document.pop("sum") / total if total else math.nan
    documents.sort(key=_order)
    return {
        "loss": total / tokens if tokens else math.nan,
        "tokens": tokens,
        "documents": documents,
    }


def _order(document: dict[str, Any]) -> float:
    """Return a key that sorts NaN first, then the largest loss; documents without a loss last."""
    loss = document["loss"]
    if loss is None:
        return math.inf
    return -math.inf if math.isnan(loss) else -float(loss)


def _describe_document(
    entry: dict[str, Any], part: dict[str, Any], found: SampleLosses, counted: Any, run: RecordedRun
) -> dict[str, Any]:
    """Return the losses of one document of a sample."""
    values = found.losses[counted]
    worst = counted[np.argsort(-values, kind="stable")[:TOKENS_SHOWN]]
    described = {name: part[name] for name in ("dataset", "path", "document", "first_token")}
    return {
        "loss": float(values.mean()) if len(values) else None,
        "sum": float(values.sum()),
        "tokens": len(values),
        "sample": entry["sample"],
        "position": entry["position"],
        **described,
        **{name: part[name] for name in ("source", "source_line") if name in part},
        "worst_tokens": [
            {
                "place": int(at) + 1,
                "token": int(found.labels[at]),
                "text": _text(run, [int(found.labels[at])]),
                "loss": float(found.losses[at]),
            }
            for at in worst
        ],
        "text": _text(run, part["tokens"]),
    }


def _text(run: RecordedRun, ids: list[int]) -> str:
    if run.tokenizer is None:
        return " ".join(map(str, ids))
    known = [token for token in ids if 0 <= token < run.tokenizer.vocab_size]
    return run.tokenizer.decode(known) if len(ids) > 1 else run.tokenizer.piece(ids[0])


def logged_loss(root: Path, iteration: int) -> float | None:
    """Return the loss that the run logged for an iteration; None if it is not known."""
    save = root.parent if (root / manifests.MANIFEST).is_file() else root
    try:
        history = read_history(save)
    except UserError:
        return None
    known = dict(zip(*history.values(LM_LOSS.name), strict=True))
    intervals = sorted(known)
    if iteration not in known or not (iteration == 1 or iteration - 1 in intervals):
        return None  # a mean over several iterations
    return known[iteration]


def print_losses(
    report: dict[str, Any], args: argparse.Namespace, checkpoint: Path, sources: BatchSources
) -> None:
    """Print the documents of a batch by loss.

    Args:
        report: result of :func:`describe_losses`.
        args: the command line.
        checkpoint: the checkpoint.
        sources: sources of the documents.
    """
    logged = report["logged_loss"]
    if args.json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
        return
    note = "" if logged is None else f"; the run logged {logged:.6f}"
    print(
        f"iteration {args.iteration:,}: mean loss {report['loss']:.6f} over "
        f"{report['tokens']:,} tokens, with the weights of {checkpoint}{note}"
    )
    shown = report["documents"][:DOCUMENTS_SHOWN]
    print(format_rows([_row(document) for document in shown]))
    for document in shown:
        name = f"{document['dataset']} document {document['document']:,}"
        loss = "-" if document["loss"] is None else f"{document['loss']:.4f}"
        print(f"\n--- loss {loss}: {name}, sample {document['sample']}")
        print(sources.format(document["path"], document["document"]), end="")
        worst = [
            f"{t['text']} {t['loss']:.2f} (token {t['place']})" for t in document["worst_tokens"]
        ]
        print(f"worst tokens: {', '.join(worst)}")
        text = document["text"]
        print(text if len(text) <= TEXT_SHOWN else f"{text[:TEXT_SHOWN]} ...")
    if len(report["documents"]) > len(shown):
        rest = len(report["documents"]) - len(shown)
        print(f"... {rest:,} more documents: --json prints all", file=sys.stderr)


def _row(document: dict[str, Any]) -> dict[str, Any]:
    source = document.get("source") or {}
    place = f"{source.get('file')}:{source.get('line')}" if source.get("file") else ""
    return {
        "dataset": document["dataset"],
        "document": document["document"],
        "loss": "" if document["loss"] is None else f"{document['loss']:.4f}",
        "tokens": document["tokens"],
        "share": f"{document['share']:.1%}",
        "sample": "" if document["sample"] is None else document["sample"],
        "source": place,
    }
