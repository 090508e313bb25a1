"""Which documents go into the refined selection: a list of numbers, or the best scores."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_llmjp.errors import UserError


def read_selection(args: argparse.Namespace, documents: int) -> npt.NDArray[Any] | None:
    """Return the selected document numbers in ascending order, or None if none are asked for.

    Raises:
        UserError: both ways are given, or a file does not fit the dataset.
    """
    if args.refined_list and args.refined_scores:
        raise UserError("give --refined-list or --refined-scores, not both")
    if args.refined_list:
        numbers = _numbers(args.refined_list).astype(np.int64)
        for wrong in numbers[(numbers < 0) | (numbers >= documents)][:1]:
            raise UserError(
                f"--refined-list {args.refined_list}: document {wrong} is not among 0 to "
                f"{documents - 1}"
            )
        return np.unique(numbers)
    if args.refined_scores:
        scores = _numbers(args.refined_scores)
        if len(scores) != documents:
            raise UserError(
                f"--refined-scores {args.refined_scores}: {len(scores):,} scores for "
                f"{documents:,} documents; expected one a line, in the order of the documents"
            )
        best = max(1, round(documents * args.refined_share))
        return np.sort(np.argsort(-scores, kind="stable")[:best])
    return None


def _numbers(path: Path) -> npt.NDArray[np.float64]:
    try:
        with path.open(encoding="utf-8") as file:
            return np.array([float(line) for line in file if line.strip()])
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except ValueError as error:
        raise UserError(f"{path}: expected one number a line ({error})") from error
