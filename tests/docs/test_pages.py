"""Pages of the documentation: flags that exist, the schema's defaults, a command on top."""

from __future__ import annotations

import re

import pytest

from megatron_llmjp.config import megatron_flags, refused_flags, unused_flags
from megatron_llmjp.config.schema import SECTION_OF, SECTIONS
from tests.support.forks import ROOT

WITHOUT_COMMAND = ("architecture",)
PAGES = sorted(p for p in (ROOT / "docs").glob("*.md") if p.stem not in WITHOUT_COMMAND)
FLAGGED = ("from_megatron_lm", "from_megatron_deepspeed", "from_hugging_face", "reliability")
OF_OTHERS = {"--hostfile", "--num_nodes", "--max-steps"}
"""Flags of other programs that a page mentions."""
COMPUTED = {"--target-tensor-parallel-size", "--target-pipeline-parallel-size"}
"""Flags of convert_checkpoint whose names are computed."""
_FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*\w")


def known_flags() -> set[str]:
    fields = {name.replace("_", "-") for name in SECTION_OF}
    found = {f"--{name}" for name in fields} | {f"--no-{name}" for name in fields}
    for table in (
        megatron_flags.SWITCH_ALIASES,
        megatron_flags.RENAMED_FLAGS,
        megatron_flags.CHOICES,
        megatron_flags.DEPENDENT_FLAGS,
        refused_flags.REFUSED,
        unused_flags.NOT_NEEDED,
        unused_flags.NOT_OFFERED,
    ):
        found |= set(table)
    return found


def flags_of_programs() -> set[str]:
    """Return the flags in the sources of the other programs."""
    found: set[str] = set()
    folders = (ROOT / "megatron_llmjp/convert", ROOT / "megatron_llmjp/config", ROOT / "data_tools")
    for folder in folders:
        for path in folder.rglob("*.py"):
            found |= set(_FLAG.findall(path.read_text(encoding="utf-8")))
    return found


def test_flags_on_the_pages_exist():
    known = known_flags() | flags_of_programs() | OF_OTHERS | COMPUTED
    for page in FLAGGED:
        text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
        given = {flag for flag in _FLAG.findall(text) if flag not in OF_OTHERS}
        unknown = {flag for flag in given if flag.replace("_", "-") not in known}
        assert len(given) > 10
        assert unknown <= {"--moe"}, page


def test_defaults_of_the_reliability_flags_are_those_of_the_schema():
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `--([\w-]+)[^`]*` \| `?([\w.]+)`? \|", text, re.MULTILINE)
    fields = {name: f for section in SECTIONS.values() for name, f in section.model_fields.items()}
    compared = 0
    for flag, shown in rows:
        default = fields[flag.replace("-", "_")].default
        expected = {"None": "none", "()": "none", "False": "off"}.get(str(default), str(default))
        assert shown == expected.removesuffix(".0"), flag
        compared += 1
    assert compared >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_page_opens_with_a_command(page):
    """A fenced block is among the first lines, before the first section and any table."""
    before = page.read_text(encoding="utf-8").split("\n## ")[0]
    lines = before.splitlines()
    fence = next((n for n, line in enumerate(lines) if line.startswith("```")), None)
    assert fence is not None
    assert fence <= 8
    assert not any(line.startswith("|") for line in lines[:fence])
