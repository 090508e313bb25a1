"""Relative tolerances of the tests, and comparisons that use them.

Kernels of different CPUs round differently. Each tolerance is at least 5 times the largest
difference measured with different kernels, and below the effect of any mutation. To measure again,
for example with kernels without vector instructions:

    export TOLERANCE_REPORT=$PWD/report.jsonl
    ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE TEST_THREADS=3 make test
    .venv/bin/python -m tests.support.tolerances report.jsonl
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ELEMENTWISE = 2e-6
"""Few fp32 operations per element: an AdamW update, a softmax over few classes, a norm."""

LOSS = 2e-6
"""The loss of the same weights and tokens: a mean over tokens."""

LOGITS = 1e-5
"""Outputs of the same weights and tokens."""

GRADIENT_NORM = 1e-5
"""The gradient norm of the same weights and tokens."""

GRADIENT = 1e-4
"""A gradient of the same weights and tokens, relative to its largest element: in the first layers,
where rounding errors accumulate, fp32 itself differs from fp64 by 1e-5."""

TRAINED = 1e-5
"""Losses, norms and weights after several steps, which accumulate rounding errors."""

REPORT = "TOLERANCE_REPORT"
"""Environment variable with a file that every measured distance is appended to."""


def distance(found: Any, expected: Any) -> float:
    """Return the largest difference of two results, relative to the expected one.

    Args:
        found: a number, a sequence or a mapping of numbers, or a tensor.
        expected: the same; a mapping has the same keys in the same order.

    Numbers are compared individually, elements of a tensor relative to its largest one: elements
    near 0 are sums of canceling terms, as exact as these terms.
    """
    if isinstance(expected, torch.Tensor):
        assert found.shape == expected.shape
        difference = (found.detach().double() - expected.detach().double()).abs().max()
        return _relative(float(difference), float(expected.abs().max()))
    if isinstance(expected, Mapping):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if not isinstance(expected, Sequence):
        found, expected = [found], [expected]
    return max(_relative(abs(a - b), abs(b)) for a, b in zip(found, expected, strict=True))


def _relative(difference: float, size: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / size if size and difference == difference else float("inf")


def assert_close(found: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Fail unless the :func:`distance` of two results is within a tolerance."""
    assert_within(distance(found, expected), tolerance, what)


def assert_within(relative: float, tolerance: float, what: str = "") -> None:
    """Fail unless a relative distance is within a tolerance; report it if that is requested."""
    path = os.environ.get(REPORT)
    if path is not None:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0]
        entry = {"test": test, "what": what, "tolerance": tolerance, "distance": relative}
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    assert relative <= tolerance, f"{what} differs by {relative:.2e}, {tolerance:.0e} is allowed"


def main() -> None:
    """Print the largest distances in report files, by test, the smallest margin first."""
    worst: dict[tuple[str, str, float], float] = {}
    for name in sys.argv[1:]:
        for line in Path(name).read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            key = (entry["test"].split("[")[0], entry["what"], entry["tolerance"])
            worst[key] = max(worst.get(key, 0.0), entry["distance"])
    print("   margin  distance  tolerance  test")
    for key in sorted(worst, key=lambda key: -worst[key] / key[2]):
        test, what, tolerance = key
        margin = tolerance / worst[key] if worst[key] else float("inf")
        print(f"{margin:9.1f}  {worst[key]:8.1e}  {tolerance:9.0e}  {test} {what}")


if __name__ == "__main__":
    main()
