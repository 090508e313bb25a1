"""Table of all presets in docs/configuration.md, generated from the presets.

python tools/preset_table.py            # write the table
python tools/preset_table.py --check    # exit code 1 if it is out of date
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from megatron_llmjp.config.loading import ConfigLayers, build_config, preset_names, read_preset
from megatron_llmjp.config.schema import Config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
HEADER = (
    "| preset | layers / hidden / heads (groups) | TP x PP | micro / global batch | peak lr |\n"
    "|---|---|---|---|---|\n"
)
_TABLE = re.compile(re.escape(HEADER) + r"(?:\|[^\n]*\n)*")


def preset_table() -> str:
    """Return the Markdown table of all presets."""
    return HEADER + "".join(map(_row, preset_names()))


def with_table(page: str) -> str:
    """Return a page with its table of presets replaced by the current one."""
    return _TABLE.sub(lambda _: preset_table(), page)


def _row(name: str) -> str:
    layers = ConfigLayers()
    read_preset(layers, name, name)
    config: Config = build_config(layers)
    model, parallel, training = config.model, config.parallel, config.training
    groups = f" ({model.num_query_groups})" if model.num_query_groups else ""
    lr = re.sub(r"e-0?", "e-", f"{config.optimizer.lr:.3e}")
    lr = re.sub(r"\.?0+e", "e", lr)
    return (
        f"| {name} "
        f"| {model.num_layers} / {model.hidden_size} / {model.num_attention_heads}{groups} "
        f"| {parallel.tensor_model_parallel_size} x {parallel.pipeline_model_parallel_size} "
        f"| {training.micro_batch_size} / {training.global_batch_size} | {lr} |\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Write or check the table; return the exit code."""
    parser = argparse.ArgumentParser(description="Write the table of presets in the documentation.")
    parser.add_argument("--check", action="store_true", help="only check that it is up to date")
    check = parser.parse_args(argv).check
    old = PAGE.read_text(encoding="utf-8")
    new = with_table(old)
    if old == new:
        return 0
    if not check:
        PAGE.write_text(new, encoding="utf-8")
        return 0
    print(f"{PAGE.name} is out of date: run python tools/preset_table.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
