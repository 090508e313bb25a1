"""The commands of all pages, and their programs."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from tests.docs.program_arguments import (
    PRETRAIN,
    declared_programs,
    job_size,
    script_program,
)
from tests.docs.shell_commands import Command, commands_of, pages
from tests.support.forks import ROOT

MODULES = {
    name: PRETRAIN if name == PRETRAIN else target.partition(":")[0]
    for name, target in declared_programs().items()
}

FOREIGN = {
    "apptainer": "builds containers/apptainer.def, which a machine without apptainer cannot",
    "cd": "shell",
    "cp": "shell",
    "docker": "builds containers/Dockerfile, which a machine without docker cannot",
    "git": "clones repositories",
    "jupyter": "opens a browser; tests/api executes the notebook",
    "module": "loads CUDA on a cluster",
    "pip": "installs packages",
    "python -m pip": "installs packages",
    "python -m pytest": "runs tests",
    "python -m venv": "creates an environment",
    "source": "activates an environment",
    "tail": "shell",
    "touch": "shell",
}
"""Programs of others, and why their commands are not run."""

DEPENDENCIES = {
    point.name
    for package in ("huggingface_hub", "tensorboard", "lm_eval", "ruff", "mypy", "mkdocs")
    for point in metadata.distribution(package).entry_points.select(group="console_scripts")
}
"""Programs that packages of pyproject.toml install: downloads, servers, tools of development."""

LAUNCHERS = ("sbatch", "qsub", "srun", "torchrun", "mpirun", "bash")
"""Programs that start a script of the repository, with its arguments after it."""

PROGRAMS = (
    frozenset({*MODULES, *(name.split()[0] for name in FOREIGN), *DEPENDENCIES, *LAUNCHERS})
    | {"make", "python", "export"}
    | {f"python3.{minor}" for minor in range(10, 15)}
)

ENVIRONMENT = {
    "APEX_CPP_EXT": "Apex's setup",
    "APEX_CUDA_EXT": "Apex's setup",
    "PIP_EXTRA_INDEX_URL": "pip",
    "SBATCH_ACCOUNT": "Slurm",
    "SBATCH_PARTITION": "Slurm",
}
"""Environment variables that only programs of others read."""

PLANNED = {"--estimate", "--suggest-layout"}
"""Modes of pretrain_gpt that need no files."""

COMMANDS = {page: commands_of(page, PROGRAMS) for page in pages()}


def program_of(command: Command) -> tuple[str, list[str], bool]:
    """Return a command's program, its arguments, and whether more arguments follow.

    The program is a module or a script of the repository, :data:`PRETRAIN`, ``make``, ``export``, a
    key of :data:`FOREIGN`, or ``examples/.../run.sh``.
    """
    name, arguments = _name_and_arguments(command)
    if name in MODULES:
        return MODULES[name], arguments, command.is_partial
    if name in FOREIGN or name in DEPENDENCIES or name in ("make", "export"):
        return name, arguments, command.is_partial
    if name.startswith("python -m "):
        module = name.split()[-1]
        package = ROOT / module.replace(".", "/")
        assert package.is_dir() or package.with_suffix(".py").is_file(), f"{command}: no {module}"
        return f"{module}.__main__" if package.is_dir() else module, arguments, command.is_partial
    path = script_path(name, command.page)
    assert path.is_file(), f"{command}: {name} is neither a known program nor a file"
    if path.name == "pretrain_gpt.py":
        return PRETRAIN, arguments, command.is_partial
    if path.parent == ROOT / "slurm" and path.suffix in (".sh", ".pbs"):
        program, own = script_program(path)
        if PLANNED & {*arguments}:
            own += ["--world-size", str(job_size(path))]
        return program, [*own, *arguments], command.is_partial
    return path.relative_to(ROOT).as_posix(), arguments, command.is_partial


def _name_and_arguments(command: Command) -> tuple[str, list[str]]:
    """Return the program as it is written, without launcher and interpreter, and its arguments."""
    words = list(command.words) or ["export"]
    if words[0] in LAUNCHERS:
        launcher, words = words[0], _from_script(words[1:], command.page)
        assert words, f"{command}: {launcher} starts no script of the repository"
    name = words[0]
    is_installed = name.startswith((".venv/", "$PWD/.venv/"))  # .venv exists in checkouts only
    if is_installed or ("bin/" in name and not script_path(name, command.page).is_file()):
        name = Path(name).name  # of a virtual environment
    if not re.fullmatch(r"python[\d.]*", name):
        return name, words[1:]
    assert len(words) > 1 + (words[1:2] == ["-m"]), f"{command}: python without a program"
    if words[1] == "-m":
        return f"python -m {words[2]}", words[3:]
    return words[1], words[2:]


def program_or_none(command: Command) -> tuple[str, list[str], bool]:
    """Return :func:`program_of`; no program if there is an error, which another test reports."""
    try:
        return program_of(command)
    except AssertionError:
        return "", [], True


def _from_script(words: list[str], page: str) -> list[str]:
    """Return the words from the first script or program on; the words before are options."""
    for number, word in enumerate(words):
        path = script_path(word, page)
        if word in MODULES or word == "python" or (path.suffix and path.is_file()):
            return words[number:]
    return []


def script_path(word: str, page: str) -> Path:
    """Return the path of a script, of the repository, the page's folder or a copy of both."""
    word = re.sub(r"^\$\{?(PWD|PBS_O_WORKDIR|MEGATRON_LLMJP)\}?/", "", word)
    copies = [c.words[1] for c in COMMANDS.get(page, []) if c.words[:1] == ("copy_examples",)]
    for folder in copies:
        word = word.removeprefix(f"{folder}/")
    local = (ROOT / page).parent / word
    return local if local.is_file() else ROOT / word
