"""Commands of the documentation that are run: plans, and the README's steps on a tiny corpus.

Plans run as they are, except for :data:`SHORTER`. The commands and the fold file of the steps are
those of README.md in their order, with the sizes of :data:`SUBSTITUTIONS`.
"""

from __future__ import annotations

import json
import re

import pytest
import yaml

from tests.docs.documented_commands import (
    COMMANDS,
    PLANNED,
    PROGRAMS,
    program_of,
    program_or_none,
)
from tests.docs.program_arguments import PRETRAIN
from tests.docs.shell_commands import Command, commands_of, readme_fold_file
from tests.support.forks import ROOT, run_program

PRINTING = ("data_tools.shell_completion", "data_tools.copy_examples")
"""Programs that need no files; one command of each is run (doctor: its own tests)."""

NOT_PLANNED = {"--measured-runs": "needs the metrics of a run on GPUs"}
"""Flags of plans that cannot be printed here."""

SHORTER = {"96": "16", "128": "16", "256,512,1024": "256", "256,512,1024,2048,4096": "256"}
"""Numbers of GPUs of ``--suggest-layout``: the search takes seconds for many, and for each."""

SUBSTITUTIONS = {
    "--vocab-size 32000": "--vocab-size 1000",
    "--config llm-jp-3-1.8b": "--config laptop-llama --num-layers 1 --hidden-size 32"
    " --ffn-hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --seq-length 64"
    " --global-batch-size 4 --micro-batch-size 2 --lr-warmup-iters 1 --eval-iters 1"
    " --log-interval 1 --num-workers 0 --device cpu",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "tokens: 27.6B": "iterations: 3",
}
"""Parts of the README's commands and fold file, and what replaces them: sizes only."""

DATASETS = ("ja", "en", "curated", "valid_ja")
"""The README shows the command for the first; the fold file names all."""

CORPUS = ROOT / "examples/quickstart/corpus/en.jsonl"
DOCUMENTS = 6
"""Documents of each dataset."""


def _plans() -> list[Command]:
    """Return the commands that print without a run's files, each once."""
    found: dict[tuple[str, ...], Command] = {}
    for command in (command for commands in COMMANDS.values() for command in commands):
        program, words, is_partial = program_or_none(command)
        plans = program == PRETRAIN and {*PLANNED, "--plan-data"} & {*words}
        plans = plans or (program == "data_tools.plan_folds" and "--new" not in words)
        plans = plans or program in PRINTING or {"--help", "--version"} & {*words}
        if plans and not is_partial and not any(word in NOT_PLANNED for word in words):
            key = (program,) if program in PRINTING else (program, *words)
            found.setdefault(key, command)
    return list(found.values())


PLANS = _plans()


@pytest.fixture(scope="module")
def planning(tmp_path_factory):
    """A folder with the README's fold file, whose datasets have declared sizes."""
    folder = tmp_path_factory.mktemp("planning")
    sizes = {f"data/{name}_text_document": {"tokens": "100B"} for name in DATASETS}
    (folder / "folds.yaml").write_text(readme_fold_file() + yaml.safe_dump({"datasets": sizes}))
    return folder


@pytest.mark.parametrize("command", PLANS, ids=lambda command: command.text)
def test_plans_are_printed(planning, command):
    program, arguments, _ = program_of(command)
    module = "pretrain_gpt" if program == PRETRAIN else program
    if "--suggest-layout" in arguments:
        arguments = [SHORTER.get(word, word) for word in arguments]
    run = run_program("-m", module, *arguments, cwd=planning)
    assert (run.returncode, bool(run.stdout)) == (0, True), run.stderr


def test_all_exceptions_are_used():
    words = {word for commands in COMMANDS.values() for c in commands for word in c.words}
    assert {*NOT_PLANNED, *SHORTER} - words == set()


def chain() -> list[Command]:
    """Return the commands that need the files of an earlier one, or write files for a later one."""
    found = []
    for command in commands_of("README.md", PROGRAMS):
        program, words, _ = program_of(command)
        launches = command.words[0] in ("make", "sbatch")
        if not launches and not (program == PRETRAIN and PLANNED & {*words}):
            found.append(command)
    return found


def substituted(text: str, used: set[str]) -> str:
    """Return a text with its sizes replaced; adds what was found to ``used``."""
    for part, replacement in SUBSTITUTIONS.items():
        if part in text:
            used.add(part)
            text = text.replace(part, replacement)
    return text


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The output of each command, by its program and mode, and the folder of the run."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "corpus").mkdir()
    texts = CORPUS.read_text(encoding="utf-8").splitlines()
    for number, name in enumerate(DATASETS):
        lines = texts[number * DOCUMENTS : (number + 1) * DOCUMENTS]
        (folder / f"corpus/{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    used: set[str] = set()
    (folder / "folds.yaml").write_text(substituted(readme_fold_file(), used))

    outputs, training = {}, []
    for command in chain():
        program, arguments, is_partial = program_of(command)
        words = [word.replace(" ", "\0") for word in arguments]
        words = [word.replace("\0", " ") for word in substituted(" ".join(words), used).split()]
        if program == PRETRAIN:
            words = [*training, *words] if is_partial else words
            training = training or words
        module = "pretrain_gpt" if program == PRETRAIN else program
        for name in DATASETS if program.endswith("preprocess_data") else DATASETS[:1]:
            renamed = [re.sub(r"(?<=/)ja\b", name, word) for word in words]
            run = run_program("-m", module, *renamed, cwd=folder)
            assert run.returncode == 0, f"{command}\n{run.stderr}"
        mode = words[-1] if is_partial else ""
        outputs[f"{program.rpartition('.')[2]} {mode}".strip()] = run.stdout
    assert used == set(SUBSTITUTIONS)
    return outputs, folder


def test_every_step_is_run(outputs):
    assert list(outputs[0]) == [
        "train_tokenizer",
        "preprocess_data",
        "pretrain_gpt",
        "pretrain_gpt --dry-run",
        "pretrain_gpt --plan-data",
        "run_status",
        "cli",
        "generate",
    ]


def test_the_run_finishes_and_is_converted(outputs):
    texts, folder = outputs
    metrics = [
        json.loads(x) for x in (folder / "checkpoints/metrics.jsonl").read_text().split("\n") if x
    ]
    iterations = [record["iteration"] for record in metrics if "lm loss" in record]
    assert iterations[:3] == [1, 2, 3] and iterations == sorted(iterations)
    last = iterations[-1]
    assert yaml.safe_load(texts["pretrain_gpt --dry-run"])["data"]["fold_file"] == "folds.yaml"
    assert re.search(rf"^refined .*\b{last}\b", texts["pretrain_gpt --plan-data"], re.M)
    assert f"{last}" in texts["run_status"]
    assert "largest logit difference" in texts["cli"]
    assert json.loads((folder / "hf_model/config.json").read_text())["num_hidden_layers"] == 1
    assert texts["generate"].strip()


def test_the_japanese_readme_has_the_same_commands():
    english, japanese = (commands_of(page, PROGRAMS) for page in ("README.md", "README.ja.md"))

    def flags(command: Command) -> list[str]:
        prompt = [n + 1 for n, word in enumerate(command.words) if word == "--prompt"]
        return [word for n, word in enumerate(command.words) if n not in prompt]

    assert [flags(c) for c in english] == [flags(c) for c in japanese]
