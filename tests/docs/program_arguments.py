"""Arguments of this project's programs, parsed by their own parsers in this process."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import itertools
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from data_tools import run_flags
from megatron_llmjp.config import flags as pretrain_flags
from megatron_llmjp.config.loading import ConfigLayers
from tests.support.forks import ROOT

PRETRAIN = "pretrain_gpt"
_MODEL = {"num_layers": 1, "hidden_size": 1, "num_attention_heads": 1}
"""A model for command lines that take theirs from a checkpoint, or are shortened by ``...``."""
_FORWARDS = {"benchmarks/record_sources.py": "data_tools.preprocess_data"}
"""Programs that pass the flags that they do not know to another."""
_MISSING = re.compile(r"the following arguments are required|one of the arguments .* is required")


class Parsed(BaseException):
    """Ends a program after it has parsed its arguments; ``rest`` are those for another one."""

    def __init__(self, rest: Sequence[str] = ()) -> None:
        super().__init__()
        self.rest = rest


def declared_programs() -> dict[str, str]:
    """Return the programs in pyproject.toml, by name; tomllib is missing from Python 3.10."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.scripts]\n")[2].partition("\n[")[0]
    return dict(re.findall(r'^(\w+) = "([\w.:]+)"$', section, re.M))


def argument_problem(
    program: str, words: Sequence[str], folder: Path, is_partial: bool = False
) -> str:
    """Return the error of a program's parser; empty if the arguments are valid.

    Args:
        program: a module, a script of the repository, or :data:`PRETRAIN`.
        words: the arguments.
        folder: working directory, in which missing YAML files of ``--config`` are created.
        is_partial: whether required arguments may be missing.
    """
    values = [_example_value(before, word) for before, word in itertools.pairwise(["", *words])]
    problem = ""
    for attempt in dict.fromkeys((tuple(words), tuple(values))):
        if program == PRETRAIN:
            problem = _pretrain_problem(attempt, folder)
        else:
            problem = _program_problem(program, attempt, folder)
        if not problem or (is_partial and _MISSING.search(problem)):
            return ""
    return problem


def makefile_parser(target: str, variable: str) -> str:
    """Return the module whose flags a variable of a make target contains; empty if none."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n|ifn?eq.*\n|else\n|endif\n)+)", makefile, re.M)
    used = re.search(rf"-m ([\w.]+) [^\n]*\$\({variable}\)", recipe[1] if recipe else "")
    if not used or used[1] == "pytest":
        return ""
    return f"{used[1]}.__main__" if (ROOT / used[1].replace(".", "/")).is_dir() else used[1]


def script_program(path: Path) -> tuple[str, list[str]]:
    """Return the program to which a launcher in ``slurm/`` passes its arguments, and its own."""
    text = path.read_text(encoding="utf-8")
    pretrain = re.search(r'^pretrain (.*)"\$@"', text, re.M)
    if pretrain:
        return PRETRAIN, shlex.split(pretrain[1])
    if re.search(r'^pretrain_in_pbs "\$@"', text, re.M):
        return PRETRAIN, []
    module = re.search(r"^exec .*-m ([\w.]+)", text, re.M)
    if module:
        return module[1], []
    raise AssertionError(f"{path}: it passes its arguments to no known program")


def job_size(path: Path) -> int:
    """Return the number of GPUs that a Slurm script requests."""
    text = path.read_text(encoding="utf-8")
    counts = re.findall(r"^#SBATCH --(?:nodes|ntasks-per-node)=(\d+)", text, re.M)
    assert len(counts) == 2, path
    return int(counts[0]) * int(counts[1])


@contextlib.contextmanager
def working_directory(folder: Path) -> Iterator[None]:
    """Change the working directory (contextlib.chdir needs Python 3.11)."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def stops_after_parsing(forwards: bool = False) -> Iterator[None]:
    """Make programs raise :class:`Parsed` when they have parsed their arguments.

    Args:
        forwards: whether the program passes unknown flags to another one.
    """
    parser = argparse.ArgumentParser
    parse_args, parse_known, parse_flags = (
        parser.parse_args,
        parser.parse_known_args,
        run_flags.parse,
    )

    def after_args(*arguments: Any) -> NoReturn:
        parse_args(*arguments)
        raise Parsed

    def after_known(*arguments: Any) -> NoReturn:
        raise Parsed(parse_known(*arguments)[1])

    def after_flags(*arguments: Any) -> NoReturn:
        parse_flags(*arguments)
        raise Parsed

    with contextlib.ExitStack() as patches:
        patch = lambda *what: patches.enter_context(mock.patch.object(*what))  # noqa: E731
        patch(run_flags, "parse", after_flags)
        if forwards:
            patch(parser, "parse_known_args", after_known)
        else:
            patch(parser, "parse_args", after_args)
        yield


def run_in_process(program: str, words: Sequence[str]) -> tuple[int, str, str]:
    """Run a module or script here; return its exit code, output and errors."""
    output, errors = io.StringIO(), io.StringIO()
    script = ROOT / program if program.endswith(".py") else None
    with (
        mock.patch.object(sys, "argv", [program, *words]),
        mock.patch.object(sys, "path", [str(script.parent), *sys.path] if script else sys.path),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            if script:
                runpy.run_path(str(script), run_name="__main__")
                code = 0
            else:
                main = importlib.import_module(program).main
                code = main(list(words)) if inspect.signature(main).parameters else main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return code or 0, output.getvalue(), errors.getvalue()


def _program_problem(program: str, words: Sequence[str], folder: Path) -> str:
    _write_configurations(words, folder)
    with working_directory(folder), stops_after_parsing(forwards=program in _FORWARDS):
        try:
            code, _, errors = run_in_process(program, words)
        except Parsed as parsed:
            if not parsed.rest:
                return ""
            return argument_problem(_FORWARDS[program], parsed.rest, folder, is_partial=True)
    return errors or (f"exit code {code}" if code else "")


def _pretrain_problem(words: Sequence[str], folder: Path) -> str:
    _write_configurations(words, folder)
    layers = ConfigLayers()
    for name, value in _MODEL.items():
        layers.set(name, value, "the test")
    with working_directory(folder):
        try:
            pretrain_flags.parse(words, layers)
        except SystemExit as end:  # --help, --version
            return str(end.code or "")
        except Exception as error:
            return str(error)
    return ""


def _write_configurations(words: Sequence[str], folder: Path) -> None:
    for flag, value in itertools.pairwise(words):
        path = folder / value
        is_file = flag == "--config" and value.endswith(".yaml")
        if is_file and path.is_relative_to(folder) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("preset: laptop-llama\n")


def _example_value(before: str, word: str) -> str:
    """Return a value for a placeholder, after the word before it; other words unchanged."""
    if not re.fullmatch(r"[A-Z][A-Z_]*|\$\{?\w+\}?", word):
        return word
    return "laptop-llama" if before == "--config" else "1"
