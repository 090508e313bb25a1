"""Print or install the completion of all programs for bash, zsh or fish."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from data_tools.common import ToolParser, run_tool
from megatron_llmjp.completion import COMPLETION_FLAG, SHELLS
from megatron_llmjp.errors import EXIT_DONE, UserError
from megatron_llmjp.filesystem import write_atomically

DISTRIBUTION = "megatron_llmjp"
FILE_NAMES = {"bash": "{}", "zsh": "_{}", "fish": "{}.fish"}
"""File of a program's completion, by shell."""

EXAMPLES = """\
  bash: in this shell, or in all (bash-completion reads that folder):
    eval "$(shell_completion bash)"
    shell_completion bash --output-dir ~/.local/share/bash-completion/completions

  zsh: in this shell, or in all, with fpath=(~/.zfunc $fpath) before compinit in ~/.zshrc:
    eval "$(shell_completion zsh)"
    shell_completion zsh --output-dir ~/.zfunc

  fish:
    shell_completion fish --output-dir ~/.config/fish/completions

The scripts are static: repeat the command after an update."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = ToolParser(
        "shell_completion", "Write the completion of all programs for a shell.", EXAMPLES
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="write a file per program into this folder (default: print all)",
    )
    args = parser.parse(argv)
    return run_tool("shell_completion", lambda: write_completion(args.shell, args.output_dir))


def write_completion(shell: str, output: Path | None) -> int:
    """Print the scripts of all programs, or write a file for each."""
    programs = dict(completion_scripts(shell))
    if output is None:
        print("\n".join(programs.values()))
        return EXIT_DONE
    output.mkdir(parents=True, exist_ok=True)
    for name, script in programs.items():
        write_atomically(output / FILE_NAMES[shell].format(name), script)
    print(f"wrote the completion of {len(programs)} programs to {output}")
    return EXIT_DONE


def completion_scripts(shell: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the completion script of each program.

    Raises:
        UserError: the project is not installed, or a program does not print its script.
    """
    try:
        points = metadata.distribution(DISTRIBUTION).entry_points
    except metadata.PackageNotFoundError as error:
        raise UserError(f"{DISTRIBUTION} is not installed: pip install -e .") from error
    for point in sorted(points.select(group="console_scripts"), key=lambda point: point.name):
        printed, words = io.StringIO(), sys.argv
        sys.argv = [point.name, COMPLETION_FLAG, shell]
        try:
            with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
                point.load()()
        finally:
            sys.argv = words
        if not printed.getvalue():
            raise UserError(f"{point.name} {COMPLETION_FLAG} {shell} printed nothing")
        yield point.name, printed.getvalue()


if __name__ == "__main__":
    sys.exit(main())
