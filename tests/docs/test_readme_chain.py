"""The README's steps 1 to 6, run in its order on a tiny corpus.

The commands and the fold file are those of README.md, with the substitutions of
:data:`SUBSTITUTIONS`.
"""

from __future__ import annotations

import json
import re

import pytest
import yaml

from tests.docs.shell_commands import Command, commands_of, readme_fold_file
from tests.docs.test_commands import PLANNED, PRETRAIN, PROGRAMS, program_of
from tests.support.forks import ROOT, run_program

SUBSTITUTIONS = {
    "--vocab-size 32000": "--vocab-size 1000",
    "--config llm-jp-3-1.8b": "--config laptop-llama --num-layers 1 --hidden-size 32"
    " --ffn-hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --seq-length 32"
    " --global-batch-size 4 --micro-batch-size 2 --lr-warmup-iters 1 --eval-iters 1"
    " --log-interval 1 --num-workers 0 --device cpu",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--save-interval 1000": "--save-interval 2",
    "tokens: 27.6B": "iterations: 3",
}
"""Parts of the README's commands and fold file, and what replaces them: sizes only."""

DATASETS = ("ja", "en", "curated", "valid_ja")
"""The README shows the command for the first; the fold file names all."""

CORPUS = ROOT / "examples/quickstart/corpus/en.jsonl"
DOCUMENTS = 10
"""Documents of each dataset."""


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
