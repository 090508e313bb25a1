"""Draw a run's loss curve with its folds: reads metrics.jsonl of a save folder.

python examples/quickstart/plot_loss.py SAVE --output loss.png
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> int:
    """Read the metrics and write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("save", type=Path, help="a run's --save folder")
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    arguments = parser.parse_args()
    records = read_metrics(arguments.save)
    draw(records, arguments.output)
    print(f"{arguments.output}: {len(records)} points")
    return 0


def read_metrics(save: Path) -> list[dict[str, Any]]:
    """Records by iteration; after a restart the later record of an iteration counts."""
    by_key: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        by_key[record["iteration"], "lm loss" in record] = record
    return [by_key[key] for key in sorted(by_key)]


def draw(records: list[dict[str, Any]], output: Path) -> None:
    """Loss over iterations, a line at each fold's start, and the validation losses."""
    training = [r for r in records if "lm loss" in r]
    iterations = [r["iteration"] for r in training]
    figure, axes = plt.subplots(figsize=(9, 4.5), dpi=120)
    axes.plot(iterations, [r["lm loss"] for r in training], color="#1f5a8c", label="training")
    top = max(r["lm loss"] for r in training)
    start, name = iterations[0], training[0]["fold"]
    for before, record in pairwise(training):
        if record["fold"] != name:
            end = before["iteration"]
            axes.axvline(end, color="#999999", linestyle="--", linewidth=0.8)
            axes.text((start + end) / 2, top, name, ha="center", va="bottom")
            start, name = end, record["fold"]
    axes.text((start + iterations[-1]) / 2, top, name, ha="center", va="bottom")
    for record in records:
        for key, value in record.items():
            if key.startswith("validation/"):
                label = key.replace("/", " ")
                axes.plot(record["iteration"], value, marker="o", linestyle="", label=label)
    axes.set(xlabel="iteration", ylabel="loss (nats per token)")
    axes.margins(y=0.12)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(output)


if __name__ == "__main__":
    raise SystemExit(main())
