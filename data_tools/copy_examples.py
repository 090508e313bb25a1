"""Copies of the job scripts, examples and documentation in a folder of the user.

A package installed by pip contains these files where no one would look for them. The copies work
as those of a checkout do: a job script uses the ``pretrain_gpt.py`` next to its folder.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shlex
import shutil
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from data_tools.common import ToolParser, run_tool
from megatron_llmjp import project_files
from megatron_llmjp.errors import EXIT_DONE, UserError
from megatron_llmjp.filesystem import write_atomically

EXAMPLES = """\
  Copy everything, run the quickstart, and estimate and submit a job:
    copy_examples llm
    python llm/examples/quickstart/run.py
    llm/slurm/pretrain_llm-jp-3-13b.sh --estimate
    sbatch llm/slurm/pretrain_llm-jp-3-13b.sh --save checkpoints --fold-file folds.yaml ...

  List the files:
    copy_examples --list

  After an update of the package, replace the copies; slurm/site.sh is kept:
    copy_examples llm --overwrite"""

SITE_EXAMPLE = "slurm/site.sh.example"
PYTHON_LINE = "# PYTHON="
"""Start of the line of the example that sets the interpreter."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = ToolParser(
        "copy_examples", "Copy the job scripts, examples and documentation to a folder.", EXAMPLES
    )
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="DIR", help="output folder; created if missing")
    add("--list", action="store_true", help="list the files and exit")
    add("--overwrite", action="store_true", help="replace files that differ, except slurm/site.sh")
    args = parser.parse(argv)
    if args.folder is None and not args.list:
        parser.error("DIR is required: the folder to copy to")
    return run_tool("copy_examples", lambda: copy(args))


def copy(args: argparse.Namespace) -> int:
    """List or copy the files.

    Raises:
        UserError: the folder contains other files under the same names, or is the source.
    """
    source = project_files.source_folder()
    paths = project_files.list_files(source)
    if args.list:
        print("\n".join(map(str, paths)))
        return EXIT_DONE
    folder: Path = args.folder
    if folder.resolve() == source:
        raise UserError(f"{folder}: is the checkout that contains the files; no copy is needed")
    if not args.overwrite:
        _refuse_changed(source, folder, paths)
    for path in paths:
        _copy_file(source / path, folder / path)
    print(f"{folder}: {len(paths)} files: {', '.join(project_files.COPIED)}")
    _write_site_settings(source, folder)
    return EXIT_DONE


def _refuse_changed(source: Path, folder: Path, paths: Sequence[Path]) -> None:
    """Raise a UserError if a file exists with another content."""
    changed = [
        path
        for path in paths
        if os.path.lexists(folder / path)
        and not ((folder / path).is_file() and _is_same(source / path, folder / path))
    ]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{folder}: {', '.join(map(str, changed[:3]))}{more} would be replaced, and differ: "
            "choose another folder, or give --overwrite"
        )


def _is_same(one: Path, other: Path) -> bool:
    return filecmp.cmp(one, other, shallow=False)


def _copy_file(source: Path, target: Path) -> None:
    """Copy a file with its permissions; an interrupted copy leaves the former file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.copyfile(source, partial)
        # The files of a package may be read-only.
        partial.chmod(0o755 if source.stat().st_mode & stat.S_IXUSR else 0o644)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _write_site_settings(source: Path, folder: Path) -> None:
    """Write ``slurm/site.sh`` unless it exists; jobs use the interpreter of this process."""
    path = folder / project_files.SITE_SETTINGS
    if path.exists():
        print(f"{path}: kept")
        return
    lines = (source / SITE_EXAMPLE).read_text(encoding="utf-8").splitlines()
    (number,) = (i for i, line in enumerate(lines) if line.startswith(PYTHON_LINE))
    python = os.path.normpath(sys.executable)  # a link in a virtual environment: not resolved
    lines[0] = "# The settings of your cluster. Every job sources this file."
    lines[number] = f"PYTHON={shlex.quote(python)}"
    write_atomically(path, "\n".join(lines) + "\n")
    print(f"{path}: written, for jobs with {python}; add the settings of your cluster")


if __name__ == "__main__":
    sys.exit(main())
