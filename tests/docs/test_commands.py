"""Commands of the documentation: existing programs and valid flags.

Commands of this project are parsed by their own parsers; programs of others must be listed in
``documented_commands.py``. ``test_command_runs.py`` runs the commands that only plan or print, and
the README's steps on a tiny corpus, ``tests/examples`` the scripts of ``examples/``.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.docs.documented_commands import (
    COMMANDS,
    DEPENDENCIES,
    ENVIRONMENT,
    FOREIGN,
    MODULES,
    PROGRAMS,
    program_of,
    program_or_none,
    script_path,
)
from tests.docs.program_arguments import argument_problem, makefile_parser
from tests.docs.shell_commands import (
    Command,
    comment_commands,
    inline_commands,
    parse_block,
    suspicious_lines,
)
from tests.support.forks import ROOT


def _problem(command: Command, folder: Path) -> str:
    """Return what is wrong with a command; empty if it is correct."""
    problem = _assignment_problem(command)
    if problem:
        return problem
    try:
        program, arguments, is_partial = program_of(command)
    except AssertionError as error:
        return str(error)
    if program == "make":
        return _make_problem(command, arguments, folder)
    if program in FOREIGN or program in DEPENDENCIES or program == "export":
        return ""
    if program.endswith(".sh"):
        return ""
    return argument_problem(program, arguments, folder, is_partial)


def _assignment_problem(command: Command) -> str:
    """Return which environment variable no file of the repository reads; empty if none."""
    script = script_path(command.words[0], command.page) if command.words else ROOT
    for name, _ in command.assignments:
        if name in ENVIRONMENT:
            continue
        if script.suffix == ".sh":
            files = [script, *script.parents[1].glob("*.sh"), *script.parent.glob("*.py")]
        else:
            files = [ROOT / "Makefile", *_SOURCES]
        if not any(re.search(rf"\b{name}\b", _text(path)) for path in files):
            return f"nothing reads the variable {name}"
    return ""


_SOURCES = [
    path
    for folder in ("tools", "slurm", "megatron_llmjp", "data_tools", "tests/support", "tests/fuzz")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".sh")
]
_TEXTS: dict[Path, str] = {}


def _text(path: Path) -> str:
    if path not in _TEXTS:
        _TEXTS[path] = path.read_text(encoding="utf-8")
    return _TEXTS[path]


def _make_problem(command: Command, arguments: list[str], folder: Path) -> str:
    makefile = _text(ROOT / "Makefile")
    targets = [word for word in arguments if "=" not in word]
    for target in targets:
        if not re.search(rf"^{target}:", makefile, re.M):
            return f"no target {target} in the Makefile"
    for name, _, value in (word.partition("=") for word in arguments if "=" in word):
        if f"$({name})" not in makefile:
            return f"the Makefile does not use {name}"
        module = makefile_parser(targets[0], name)
        if module:
            problem = argument_problem(module, shlex.split(value), folder)
            if problem:
                return problem
    return ""


@pytest.mark.parametrize("page", COMMANDS)
def test_commands_of_a_page(page, tmp_path):
    problems = []
    for command in COMMANDS[page]:
        problem = _problem(command, tmp_path)
        if problem:
            problems.append(f"{command}\n    {problem}")
    assert suspicious_lines(page, PROGRAMS) == [], "mark the block as bash, or as text"
    assert problems == [], "\n" + "\n".join(problems)


@pytest.mark.parametrize("page", COMMANDS)
def test_commands_in_the_text_of_a_page(page, tmp_path, capsys):
    problems = []
    for command in inline_commands(page, {*MODULES, "make", "python"}):
        problem = _problem(command, tmp_path)
        if problem and not re.search("expected (one|at least one) argument", problem):
            problems.append(f"{command}\n    {problem}")
    assert problems == [], "\n" + "\n".join(problems)


def test_commands_in_the_comments_of_scripts(tmp_path):
    found = [
        command
        for path in sorted((ROOT / "slurm").rglob("*"))
        if path.suffix in (".sh", ".pbs", ".example")
        for command in comment_commands(path, PROGRAMS)
    ]
    assert len(found) > 15
    problems = [(str(command), _problem(command, tmp_path)) for command in found]
    assert [(command, problem) for command, problem in problems if problem] == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("preprocess_data --input a --output-prefx b", "unknown flag --output-prefx"),
        ("run_status", "the following arguments are required"),
        ("sbatch slurm/pretrain_llm-jp-3-13b.sh --sav checkpoints", "--sav"),
        ("slurm/pretrain_llm-jp-3-13b.sh ... --estimat", "--estimat"),
        (
            "pretrain_gpt --config llm-jp-3-13b \\\n  --estimate --world-size 8 --no-flag",
            "--no-flag",
        ),
        ("pretrain_gpt --config llm-jp-3-14b --estimate --world-size 8", "llm-jp-3-14b"),
        ("cd x && plan_folds --new folds.yaml --data-lst train.sh", "--data-lst"),
        ("sbatch --array=0-3 slurm/convert_checkpoint.sh --too hf", "--too"),
        ('eval "$(shell_completion bsh)"', "bsh"),
        ("convert_checkpoint inspect a --josn", "--josn"),
        ("torchrun --nproc-per-node 8 pretrain_gpt.py --savee x", "--savee"),
        ("python benchmarks/convert.py --folder x --roundz 2", "--roundz"),
        ("python benchmarks/record_sources.py --corpus a --apend-eod", "--apend-eod"),
        ("make relese", "no target relese"),
        ("make release RELEASE_FLAGS='--pyton x'", "--pyton"),
        ("make mutants MUTANT_FLAGS='--only x'", "does not use MUTANT_FLAGS"),
        ("MODLE=native examples/inference/run.sh", "nothing reads the variable MODLE"),
        ("python -m tools.no_tool", "no tools.no_tool"),
        ("sbatch slurm/pretrain_llm-jp-3-14b.sh --save x", "starts no script"),
        ("pretrian_gpt --save x", "neither a known program nor a file"),
    ],
)
def test_wrong_commands_are_found(text, problem, tmp_path):
    assert problem in _problem(list(parse_block(text, "README.md", 1))[-1], tmp_path)


def test_commands_in_a_block():
    text = """\
$ A=1 B="x y" make docs  # a comment
export C=2
for n in 1 2; do run_status $n ... | tee log; done > out 2> errors
cat > file <<'END'
not a command
END
python pretrain_gpt.py --config a \\
    --save "b c"
"""
    found = list(parse_block(text, "page.md", 10))
    assert [(c.line, c.words, c.assignments, c.is_partial) for c in found] == [
        (10, ("make", "docs"), (("A", "1"), ("B", "x y")), False),
        (11, ("export",), (("C", "2"),), False),
        (12, ("run_status",), (), True),
        (12, ("tee", "log"), (), False),
        (13, ("cat",), (), False),
        (16, ("python", "pretrain_gpt.py", "--config", "a", "--save", "b c"), (), False),
    ]


def test_all_entries_of_the_lists_are_used():
    commands = [command for found in COMMANDS.values() for command in found]
    programs = {program for program, _, _ in map(program_or_none, commands)}
    assert set(FOREIGN) - programs == set()
    variables = {name for command in commands for name, _ in command.assignments}
    assert set(ENVIRONMENT) - variables == set()
    assert len(commands) > 100
