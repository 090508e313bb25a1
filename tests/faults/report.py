"""Write the results of the fault suite into docs/reliability.md.

python -m tests.faults.report fault_results.json docs/reliability.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- counts: written by make faults -->", "<!-- end of counts -->"


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    faults = results["faults"]
    passed, failed, skipped = (
        sum(entry[kind] for entry in faults.values()) for kind in ("passed", "failed", "skipped")
    )
    lines = [
        f"{results['day']}, {results['cores']} cores, {results['minutes']} minutes, "
        f"seed {results['seed']}: {passed + failed} faults injected, {failed} tests failed, "
        f"{skipped} skipped (not possible on that machine).",
        "",
        "| fault | injected | passed | outcome |",
        "|---|---:|---:|---|",
    ]
    for name, entry in sorted(faults.items()):
        tried = entry["passed"] + entry["failed"]
        lines.append(f"| {name} | {tried} | {entry['passed']} | {entry['outcome']} |")
    return "\n".join(lines)


def main() -> None:
    results, document = Path(sys.argv[1]), Path(sys.argv[2])
    text = document.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    new = f"{before}{BEGIN}\n{table(json.loads(results.read_text()))}\n{END}{after}"
    document.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
