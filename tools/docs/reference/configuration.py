"""Page of a run's configuration: all fields by section, and how other programs' flags are read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import FLAG_ONLY, FROZEN_AT_RESUME
from megatron_llmjp.config.schema import SECTIONS, Section
from tools.docs.reference.markdown import code, join_page, prose, table
from tools.docs.reference.megatron_flags import megatron_blocks
from tools.docs.reference.parsers import help_parser
from tools.docs.reference.types import default_text, type_text

INTRODUCTION = (
    "[Configuration](../configuration.md) explains presets, files and flags. The keys of a "
    "section are written below its name in a YAML file. A field without a default that is not "
    "required is unset; its description states what applies then. Choices are not case-sensitive."
)
HEADER = ("key", "flag", "type", "default", "meaning")


def page(sections: Mapping[str, type[Section]] = SECTIONS) -> str:
    """Return the page.

    Raises:
        ValueError: a field has no description, or no flag.
    """
    return join_page(
        "Fields and flags of a run",
        "the schema of the configuration and the tables of Megatron-LM's flags",
        INTRODUCTION,
        *_section_blocks(sections),
        *_restriction_blocks(),
        *megatron_blocks(),
    )


def _section_blocks(sections: Mapping[str, type[Section]]) -> Iterator[str]:
    flags = _flags()
    for name, section in sections.items():
        yield f"## {name}"
        yield prose(section.__doc__ or "")
        yield table(HEADER, _rows(section, flags))


def _flags() -> dict[str, list[str]]:
    """Return all flags of each field."""
    parser: argparse.ArgumentParser = help_parser(lambda: parse(["--help"]))
    return {action.dest: list(action.option_strings) for action in parser._actions}


def _rows(section: type[Section], flags: Mapping[str, list[str]]) -> Iterator[tuple[str, ...]]:
    schema = section.model_json_schema()
    for name, field in schema["properties"].items():
        if "description" not in field or name not in flags:
            raise ValueError(f"{section.__name__}: {name} has no description or no flag")
        default = "required" if name in schema.get("required", ()) else default_text(field)
        spellings = ", ".join(map(code, flags[name]))
        yield code(name), spellings, type_text(field), default, prose(field["description"])


def _restriction_blocks() -> Iterator[str]:
    """Yield which fields do not change on resume, are flags only, and are not stored."""
    not_stored = [
        name
        for section in SECTIONS.values()
        for name, field in section.model_fields.items()
        if field.exclude
    ]
    yield "## Restrictions"
    for text, names in (
        (
            "Fields that must not change on resume, unless `override_resume` names them",
            FROZEN_AT_RESUME,
        ),
        ("Fields that are flags only, and refused in files", FLAG_ONLY),
        ("Fields that are not stored with the run", not_stored),
    ):
        yield f"{text}: {', '.join(map(code, names))}."
