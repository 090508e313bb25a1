"""Chat template of an instruction-tuned model (``--chat-template``).

Current versions of transformers read ``chat_template.jinja`` next to the tokenizer's files, earlier
ones the key ``chat_template`` of ``tokenizer_config.json``: both get the same text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_llmjp.convert.formats.base import ConversionOptions
from megatron_llmjp.convert.formats.hugging_face.config import json_bytes, read_json
from megatron_llmjp.errors import UserError

FILE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
_OLD_FILE = "chat_template.json"
"""File of processors, which would contain another template."""


def read_chat_template(path: Path) -> str:
    """Read a chat template and check its syntax; it is not executed.

    Raises:
        UserError: the file cannot be read, or is not a Jinja template.
    """
    import jinja2
    from jinja2 import ext, nodes
    from jinja2.parser import Parser

    class Generation(ext.Extension):
        """The tag ``{% generation %}`` of transformers, around replies of the assistant."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        raise UserError(f"--chat-template {path}: is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"--chat-template {path}: cannot be read: {error.strerror}") from None
    try:
        jinja2.Environment(extensions=[Generation, ext.loopcontrols]).parse(text)
    except RecursionError:
        raise UserError(f"--chat-template {path}: is nested too deeply") from None
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"--chat-template {path}, line {error.lineno}: not a Jinja template: {error.message}"
        ) from None
    if not text.strip():
        raise UserError(f"--chat-template {path}: is empty")
    return text


def requested_template(options: ConversionOptions) -> str | None:
    """Return the chat template that the user gave, or None.

    Raises:
        UserError: the file cannot be read, or is not a Jinja template.
    """
    return None if options.chat_template is None else read_chat_template(options.chat_template)


def exported_template(
    options: ConversionOptions, source: Mapping[str, Path], exported: Mapping[str, bytes]
) -> str | None:
    """Return the chat template to install in an export, or None.

    A template of the source is installed only if the settings next to it were built.

    Args:
        options: the user's options.
        source: the source's tokenizer files by name.
        exported: the exported tokenizer files by name.
    """
    given = requested_template(options)
    if given is None and FILE in exported and SETTINGS in exported.keys() - source.keys():
        return exported[FILE].decode(errors="replace")
    return given


def install_chat_template(folder: Path, text: str) -> None:
    """Write a chat template into the folder of a tokenizer; it replaces any other one."""
    (folder / FILE).write_bytes(text.encode())
    (folder / _OLD_FILE).unlink(missing_ok=True)
    settings = folder / SETTINGS
    if settings.is_file():
        settings.write_bytes(json_bytes({**read_json(settings), "chat_template": text}))
