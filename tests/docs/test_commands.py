"""Commands of the documentation: existing programs, valid flags, and plans that can be printed.

A command of a foreign program must be listed in :data:`FOREIGN`. Commands of this project are
parsed by their own parsers; those that only plan or print are run. ``test_readme_chain.py`` runs
the README's steps on a tiny corpus, ``tests/examples`` the scripts of ``examples/``.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from megatron_llmjp import cli as pretrain_cli
from tests.docs.program_arguments import (
    PRETRAIN,
    argument_problem,
    declared_programs,
    job_size,
    makefile_parser,
    run_in_process,
    script_program,
    working_directory,
)
from tests.docs.shell_commands import (
    Command,
    commands_of,
    pages,
    parse_block,
    readme_fold_file,
    suspicious_lines,
)
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
    "hf": "downloads from the Hugging Face Hub",
    "jupyter": "opens a browser; tests/api executes the notebook",
    "module": "loads CUDA on a cluster",
    "pip": "installs packages; tests/test_packages.py checks the names of extras",
    "python -m pip": "installs packages",
    "python -m pytest": "runs tests",
    "python -m venv": "creates an environment",
    "source": "activates an environment",
    "tail": "shell",
    "touch": "shell",
}
"""Programs of others, and why their commands are not run."""

LAUNCHERS = ("sbatch", "qsub", "srun", "torchrun", "mpirun", "bash")
"""Programs that start a script of the repository, with its arguments after it."""

PROGRAMS = frozenset(
    {*MODULES, *(name.split()[0] for name in FOREIGN), *LAUNCHERS, "make", "python", "export"}
) | {f"python3.{minor}" for minor in range(10, 15)}

ENVIRONMENT = {
    "APEX_CPP_EXT": "Apex's setup",
    "APEX_CUDA_EXT": "Apex's setup",
    "PIP_EXTRA_INDEX_URL": "pip",
    "SBATCH_ACCOUNT": "Slurm",
    "SBATCH_PARTITION": "Slurm",
}
"""Environment variables that only programs of others read."""

USER_FILES = {"train_here.sh": "written by the reader"}
"""Scripts that do not exist in the repository."""

PLANNED = {"--estimate", "--suggest-layout"}
"""Modes of pretrain_gpt that need no files."""

PRINTING = ("data_tools.doctor", "data_tools.shell_completion", "data_tools.copy_examples")
"""Programs that need no files."""

NOT_PLANNED = {"--measured-runs": "needs the metrics of a run on GPUs"}
"""Flags of plans that cannot be printed here."""

COMMANDS = {page: commands_of(page, PROGRAMS) for page in pages()}


def program_of(command: Command) -> tuple[str, list[str], bool]:
    """Return a command's program, its arguments, and whether more arguments follow.

    The program is a module or a script of the repository, :data:`PRETRAIN`, ``make``, ``export``, a
    key of :data:`FOREIGN`, or ``examples/.../run.sh``.
    """
    words = list(command.words) or ["export"]
    while words and words[0] in LAUNCHERS:
        name, before = words[0], list(words)
        words = _from_script(words[1:], command.page)
        assert words, f"{command}: {name} starts no script of the repository"
        words = words if words[0] != name else before[1:]
    name = words[0]
    if not _script(name, command.page).is_file() or "/" not in name:
        name = Path(name).name if "bin/" in name else name
    if re.fullmatch(r"python[\d.]*", name):
        words = words[1:]
        name = f"python -m {words[1]}" if words[0] == "-m" else words[0]
        words = words[1:] if words[0] == "-m" else words
    arguments = words[1:]
    if name in MODULES:
        return MODULES[name], arguments, command.is_partial
    if name in FOREIGN or name in ("make", "export"):
        return name, arguments, command.is_partial
    if name.startswith("python -m "):
        module = name.split()[-1]
        package = ROOT / module.replace(".", "/")
        assert package.is_dir() or package.with_suffix(".py").is_file(), f"{command}: no {module}"
        return f"{module}.__main__" if package.is_dir() else module, arguments, command.is_partial
    path = _script(name, command.page)
    assert path.is_file(), f"{command}: {name} is neither a known program nor a file"
    if path.name == "pretrain_gpt.py":
        return PRETRAIN, arguments, command.is_partial
    if path.parent == ROOT / "slurm" and path.suffix in (".sh", ".pbs"):
        program, own = script_program(path)
        if PLANNED & {*arguments}:
            own += ["--world-size", str(job_size(path))]
        return program, [*own, *arguments], command.is_partial
    return path.relative_to(ROOT).as_posix(), arguments, command.is_partial


def _from_script(words: list[str], page: str) -> list[str]:
    """Return the words from the first script or program on; the words before are options."""
    for number, word in enumerate(words):
        path = _script(word, page)
        if word in MODULES or word == "python" or (path.suffix and path.is_file()):
            return words[number:]
    return []


def _script(word: str, page: str) -> Path:
    """Return the path of a script, of the repository, the page's folder or a copy of both."""
    word = re.sub(r"^\$\{?(PWD|PBS_O_WORKDIR|MEGATRON_LLMJP)\}?/", "", word)
    copies = [c.words[1] for c in COMMANDS[page] if c.words[:1] == ("copy_examples",)]
    for folder in copies:
        word = word.removeprefix(f"{folder}/")
    local = (ROOT / page).parent / word
    return local if local.is_file() else ROOT / word


def _problem(command: Command, folder: Path) -> str:
    """Return what is wrong with a command; empty if it is correct."""
    problem = _assignment_problem(command)
    if problem:
        return problem
    program, arguments, is_partial = program_of(command)
    if program == "make":
        return _make_problem(command, arguments, folder)
    if program in FOREIGN or program == "export" or program.endswith(".sh"):
        return ""
    return argument_problem(program, arguments, folder, is_partial)


def _assignment_problem(command: Command) -> str:
    """Return which environment variable no file of the repository reads; empty if none."""
    script = _script(command.words[0], command.page) if command.words else ROOT
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


def _plans() -> list[Command]:
    """Return the commands that print without a run's files, each once."""
    found: dict[tuple[str, ...], Command] = {}
    for command in (command for commands in COMMANDS.values() for command in commands):
        try:
            program, words, is_partial = program_of(command)
        except AssertionError:  # reported by test_commands_of_a_page
            continue
        plans = program == PRETRAIN and {*PLANNED, "--plan-data"} & {*words}
        plans = plans or (program == "data_tools.plan_folds" and "--new" not in words)
        plans = plans or program in PRINTING or {"--help", "--version"} & {*words}
        if plans and not is_partial and not any(word in NOT_PLANNED for word in words):
            found.setdefault((program, *words), command)
    return list(found.values())


PLANS = _plans()


@pytest.mark.parametrize("page", COMMANDS)
def test_commands_of_a_page(page, tmp_path):
    problems = []
    for command in COMMANDS[page]:
        problem = _problem(command, tmp_path)
        if problem:
            problems.append(f"{command}\n    {problem}")
    assert suspicious_lines(page, PROGRAMS) == [], "mark the block as bash, or as text"
    assert problems == [], "\n" + "\n".join(problems)


@pytest.fixture
def planning(monkeypatch, tmp_path):
    """A folder with the files of plans, where no run can be started."""

    def not_reached(*_):
        raise AssertionError("a run was started")

    for name in ("_run_rank", "launch"):
        monkeypatch.setattr(pretrain_cli, name, not_reached)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    # It replaces torch.cuda in this process; tests/estimate compares it with the estimate.
    monkeypatch.setattr("megatron_llmjp.planning._build_on_meta", lambda _: "")
    names = ("ja", "en", "curated", "valid_ja")
    sizes = {f"data/{name}_text_document": {"tokens": "100B"} for name in names}
    declared = yaml.safe_dump({"datasets": sizes})
    (tmp_path / "folds.yaml").write_text(readme_fold_file() + declared)
    return tmp_path


@pytest.mark.parametrize("command", PLANS, ids=lambda command: command.text)
def test_plans_are_printed(planning, command):
    program, arguments, _ = program_of(command)
    module = "megatron_llmjp.cli" if program == PRETRAIN else program
    # Each number of GPUs is a search of its own.
    arguments = [re.sub(r"^(\d+),\d+(,\d+)+$", r"\1", word) for word in arguments]
    with working_directory(planning):
        code, output, errors = run_in_process(module, arguments)
    assert (code, bool(output)) == (0, True), errors


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
    command = list(parse_block(text, "README.md", 1))[-1]
    try:
        found = _problem(command, tmp_path)
    except AssertionError as error:
        found = str(error)
    assert problem in found


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
        (12, ("run_status", "$n"), (), True),
        (12, ("tee", "log"), (), False),
        (13, ("cat",), (), False),
        (16, ("python", "pretrain_gpt.py", "--config", "a", "--save", "b c"), (), False),
    ]


def test_all_entries_of_the_lists_are_used():
    commands = [command for found in COMMANDS.values() for command in found]
    programs = {program_of(command)[0] for command in commands}
    assert all(any(flag in command.words for command in commands) for flag in NOT_PLANNED)
    assert set(FOREIGN) - programs == set()
    variables = {name for command in commands for name, _ in command.assignments}
    assert set(ENVIRONMENT) - variables == set()
    assert len(commands) > 100
