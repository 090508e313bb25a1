"""Report what this installation and this machine have, what is missing, and what for."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from data_tools.common import ToolParser, run_tool
from megatron_llmjp.doctor.findings import format_findings, summarize
from megatron_llmjp.doctor.machine import machine_findings
from megatron_llmjp.doctor.packages import import_torch, package_findings
from megatron_llmjp.errors import EXIT_DONE, EXIT_FAILURE
from megatron_llmjp.versions import format_versions

EXAMPLES = """\
  Check the installation, the machine, and the disk of the current folder:
    doctor

  Check the file system of the checkpoints; print JSON for an issue or another program:
    doctor --folder /data/checkpoints --json

Exit codes: 0 usable (something optional may be missing), 1 something required is missing or
broken, 2 the arguments are wrong. The nodes of a job are checked by slurm/preflight.py."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = ToolParser(
        "doctor",
        "Report what is installed, what is missing, what it is needed for, and how to install it.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("--folder", type=Path, default=Path(), metavar="DIR", help="disk to check (default: here)")
    add("--no-import", action="store_true", help="do not import torch, which takes seconds")
    add("--json", action="store_true", help="print versions and findings as JSON")
    args = parser.parse(argv)
    return run_tool("doctor", lambda: diagnose(args.folder, not args.no_import, args.json))


def diagnose(folder: Path, with_import: bool, as_json: bool) -> int:
    """Print the findings and return the exit code."""
    torch = import_torch() if with_import else None
    findings = [*package_findings(torch), *machine_findings(torch, folder.resolve())]
    if as_json:
        found = {
            "summary": summarize(findings),
            "versions": format_versions("doctor").splitlines(),
            "findings": [{**asdict(one), "error": one.is_error} for one in findings],
        }
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        print(format_findings(findings))
        print(f"\n{summarize(findings)}")
    return EXIT_FAILURE if any(one.is_error for one in findings) else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
