"""Relative tolerances of the tests, and the comparisons that use them.

Every CPU's kernels round differently. A tolerance leaves a factor of 5 or more above the largest
difference that was measured with varied kernels, and stays below what any fault changes. To measure
again, for example with kernels that use no vector instructions:

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
"""Few fp32 operations per element: an update of AdamW, a softmax over few classes, a norm."""

LOSS = 2e-6
"""The loss of the same weights and tokens: a mean over tokens."""

LOGITS = 1e-5
"""Outputs of the same weights and tokens."""

GRADIENT_NORM = 1e-5
"""The gradient norm of the same weights and tokens."""

GRADIENT = 1e-4
"""A gradient of the same weights and tokens, relative to its largest element: fp32 itself is 1e-5
away from fp64 in the first layers, behind which the rounding of all others adds up."""

TRAINED = 1e-5
"""Losses, norms and weights after several steps, each of which builds on earlier rounding."""

REPORT = "TOLERANCE_REPORT"
"""The environment variable that names a file to append every measured distance to."""


def distance(found: Any, expected: Any) -> float:
    """Return the largest difference of two results, relative to the expected one.

    Args:
        found: a number, a sequence or a mapping of numbers, or a tensor.
        expected: the same; a mapping has the same keys in the same order.

    Numbers are compared one by one. The elements of a tensor are compared relative to its largest
    one: those near 0 are sums whose terms cancel, and are as exact as their terms.
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
