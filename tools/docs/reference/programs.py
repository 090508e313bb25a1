"""Page of the programs: arguments, examples and exit codes of each."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_llmjp.config.schema import SECTIONS
from tools.docs.reference.markdown import join_page, prose, table
from tools.docs.reference.parsers import console_programs, groups, program_parser, row

FURTHER_HELP: dict[str, tuple[str, ...]] = {
    "convert_checkpoint": ("inspect", "extract-adapter"),
    "preprocess_data": ("--status",),
}
"""Words after which a program prints another help."""

INTRODUCTION = (
    "Every program has `--help`, `--version` and completion in the shell "
    "([installation](../installation.md)), and accepts `--some_flag` and `--some-flag=value`."
)
CONFIGURATION = (
    "All fields of the [configuration](configuration.md) are flags, too; "
    "its page also lists the flags of Megatron-LM."
)


def page() -> str:
    """Return the page."""
    return join_page(
        "Programs", "the parsers of the programs in `pyproject.toml`", INTRODUCTION, *_blocks()
    )


def _blocks() -> Iterator[str]:
    for program, target in console_programs().items():
        yield from _program(program, program_parser(program, target))
        for word in FURTHER_HELP.get(program, ()):
            yield from _program(f"{program} {word}", program_parser(program, target, word))


def _program(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield heading, description, arguments by group, and examples."""
    yield f"## {name}"
    yield prose(parser.description or "")
    if parser.usage:
        usage = parser.usage.replace("%(prog)s", parser.prog)
        yield _text_block(usage)
    configuration = False
    for title, actions in groups(parser):
        if title in SECTIONS:
            configuration = True
            continue
        if title not in ("options", "positional arguments"):
            yield f"{prose(title[:1].upper() + title[1:])}:"
        header = ("argument" if title == "positional arguments" else "flag", "effect")
        yield table(header, (row(parser, action) for action in actions))
    if configuration:
        yield CONFIGURATION
    if parser.epilog:
        yield _text_block(parser.epilog)


def _text_block(text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
    return f"```text\n{lines}\n```"
