"""Command lines of all programs: --help, imports and misspelled flags."""

from __future__ import annotations

import subprocess
import sys

import pytest

from data_tools import (
    inspect_dataset,
    merge_datasets,
    preprocess_data,
    split_folds,
    train_tokenizer,
)

PROGRAMS = (preprocess_data, train_tokenizer, inspect_dataset, merge_datasets, split_folds)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_help_has_examples_and_imports_no_torch(program):
    code = f"""
import atexit, runpy, sys
atexit.register(lambda: print("torch" in sys.modules))
sys.argv = ["program", "--help"]
runpy.run_module({program.__name__!r}, run_name="__main__")
"""
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.endswith("False\n")
    assert "examples:" in shown
    assert f"    {program.__name__.rpartition('.')[2]} " in shown


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_errors_take_one_line(program, capsys):
    with pytest.raises(SystemExit) as caught:
        program.main(["--overwrit", "x"] if program is not inspect_dataset else ["--verfy"])
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert "did you mean '--" in message and message.count("\n") == 1


def test_missing_and_unknown_values(capsys):
    for arguments, expected in (
        ([], "required: --input"),
        (["--input", "x", "--output-prefix", "o", "--workers", "0"], "0 is not a positive integer"),
        (["--on-error", "ignore"], "invalid choice: 'ignore'"),
    ):
        with pytest.raises(SystemExit) as caught:
            preprocess_data.main(arguments)
        assert caught.value.code == 2
        assert expected in capsys.readouterr().err


def test_unused_megatron_flags_are_accepted(tmp_path, capsys):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a"}')
    arguments = ["--input", str(path), "--output-prefix", str(tmp_path / "o")]
    arguments += ["--tokenizer-type", "ByteLevelTokenizer"]
    assert preprocess_data.main([*arguments, "--dataset-impl", "mmap", "--partitions", "2"]) == 0
    assert preprocess_data.main([*arguments, "--output-prefix", f"{tmp_path}/"]) == 2
    assert "file name prefix" in capsys.readouterr().err
