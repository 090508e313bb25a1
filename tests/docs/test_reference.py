"""Reference pages of the documentation: up to date, complete, and the same on every machine."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

import pytest
from markdown_it import MarkdownIt
from pydantic import Field

from data_tools import split_folds
from megatron_llmjp.config import refused_flags, unused_flags
from megatron_llmjp.config.schema import SECTION_OF, SECTIONS
from megatron_llmjp.data.folds.schema import FoldFile
from tests.support.processes import ROOT
from tools.docs.reference import configuration, fold_files, programs
from tools.docs.reference.__main__ import FOLDER
from tools.docs.reference.parsers import row


def text(name):
    return (FOLDER / name).read_text(encoding="utf-8")


def test_pages_are_up_to_date():
    """Compared in a process that has another environment than the one they were written in."""
    command = [sys.executable, "-m", "tools.docs.reference", "--check"]
    environment = {"COLUMNS": "40", "LANG": "ja_JP.UTF-8", "HOME": "/nowhere", "SLURM_PROCID": "3"}
    environment |= {"SLURM_NTASKS": "8", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_new_field_changes_the_page():
    class Training(SECTIONS["training"]):
        lr: float = Field(0.5, gt=0.0, description="a new field")

    page = configuration.page({"training": Training})
    assert "| `lr` | `--lr` | number > 0 | `0.5` | a new field |" in page
    assert "a new field" not in configuration.page()

    class Undescribed(SECTIONS["training"]):
        lr: float = 0.5

    with pytest.raises(ValueError, match="lr has no description"):
        configuration.page({"training": Undescribed})


def test_a_new_key_of_fold_files_changes_the_page():
    class NewFoldFile(FoldFile):
        """A fold file with a new key."""

        pace: float | None = None
        """A new key."""

    assert "| `pace` | number | | A new key. |" in fold_files.page(NewFoldFile)

    class Undescribed(FoldFile):
        """A fold file with a key that is not described."""

        pace: float | None = None

    with pytest.raises(ValueError, match="pace has no description"):
        fold_files.page(Undescribed)


def test_fields_have_their_flag_and_default():
    rows = re.findall(
        r"^\| `(\w+)` \| `(--[\w-]+)`[^|]*\| ([^|]+) \|([^|]*)\|", text("configuration.md"), re.M
    )
    assert [name for name, *_ in rows] == list(SECTION_OF)
    assert all(flag == f"--{name.replace('_', '-')}" for name, flag, *_ in rows)
    defaults = {name: default.strip(" `") for name, _, _, default in rows}
    assert defaults["num_layers"] == "required" and defaults["train_iters"] == ""
    assert defaults["seq_length"] == "2048" and defaults["bf16"] == "false"


def test_all_flags_of_megatron_are_listed():
    named = set(re.findall(r"`(--[\w-]+)`", text("configuration.md")))
    for flags in (unused_flags.NOT_NEEDED, unused_flags.NOT_OFFERED, refused_flags.REFUSED):
        assert flags.keys() <= named
    assert {"--rope-theta", "--swiglu", "--no-bias-gelu-fusion"} <= named


def test_programs_have_their_options(capsys):
    page = text("programs.md")
    parts = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    assert len(parts) >= 15 + sum(map(len, programs.FURTHER_HELP.values()))
    assert "| `--to FORMAT` |" in parts["convert_checkpoint"]
    assert "| `[DIR]` | checkpoint to compare it with |" in parts["convert_checkpoint inspect"]
    assert "--num-layers" not in re.findall(r"^\| `(--[\w-]+)", parts["pretrain_gpt"], re.M)
    with pytest.raises(SystemExit):
        split_folds.main(["--help"])
    printed = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.M)) - {"--version"}
    assert printed == set(re.findall(r"^\| `(--[\w-]+)", parts["split_folds"], re.M))


def test_text_of_help_is_not_markup():
    parser = argparse.ArgumentParser()
    action = parser.add_argument(
        "--form", metavar="A|B", default="x", help="<a>|*b* [c] a_b see docs/data.md, %(default)s"
    )
    names, effect = row(parser, action)
    assert (names, effect) == (
        "`--form A`\\|`B`",
        "&lt;a>\\|\\*b\\* \\[c\\] `a_b` see [docs/data.md](../data.md), x",
    )
    table = f"| a | b |\n|---|---|\n| {names} | {effect} |\n"
    html = MarkdownIt("commonmark").enable("table").render(table)
    assert "<code>--form A</code>|<code>B</code>" in html
    assert "&lt;a&gt;|*b* [c] <code>a_b</code>" in html
