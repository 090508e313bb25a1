"""Prompts and generated texts as JSON lines (``--input``, ``--output``). Without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import replaced_file
from megatron_llmjp.generation.chat import ChatTemplate, check_messages
from megatron_llmjp.generation.requests import read_json_values

OUTPUT_KEYS = ("generated_text", "finish_reason", "prompt_tokens", "generated_tokens")


@dataclass(frozen=True)
class Record:
    """A line of the input.

    Attributes:
        prompt: the text to continue.
        content: the keys of the line, which the output repeats.
        where: its position, for messages.
    """

    prompt: str
    content: dict[str, Any]
    where: str


def read_records(lines: Iterable[str], name: str, template: ChatTemplate | None) -> list[Record]:
    """Read prompts, one JSON value per line: a text, or an object with the key ``prompt``.

    Args:
        lines: of the file.
        name: of the file, for messages.
        template: for ``--chat``: the value of ``prompt`` is a user's message, and an object may
            have ``messages`` instead.

    Raises:
        UserError: a line is invalid, or there is none.
    """
    records = [_record(value, where, template) for where, value in read_json_values(lines, name)]
    if not records:
        raise UserError(f"{name}: is empty; expected a JSON value per line")
    return records


def _record(value: Any, where: str, template: ChatTemplate | None) -> Record:
    content = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(content, dict):
        raise UserError(f'{where}: expected a text or an object with the key "prompt"')
    for key in OUTPUT_KEYS:
        if key in content:
            raise UserError(f'{where}: has the key "{key}", which the output uses; rename it')
    if template is not None and "messages" in content:
        messages = check_messages(content["messages"], f"{where}: messages")
        return Record(template.render(messages), content, where)
    prompt = content.get("prompt")
    if not isinstance(prompt, str):
        hint = "; messages require --chat" if "messages" in content else ""
        raise UserError(f'{where}: expected the key "prompt" with a text{hint}')
    if template is not None:
        prompt = template.render([{"role": "user", "content": prompt}])
    return Record(prompt, content, where)


@contextmanager
def text_input(path: str) -> Iterator[IO[str]]:
    """Open a text file in UTF-8 for reading; ``-`` is standard input.

    Raises:
        UserError: it does not exist, cannot be read, or is not UTF-8.
    """
    try:
        if path == "-":
            yield sys.stdin
            return
        with Path(path).open(encoding="utf-8") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error})") from None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"{path}: {error.strerror}; expected a file with JSON lines") from None


@contextmanager
def text_output(path: str | None) -> Iterator[IO[str]]:
    """Open a text file for writing, which exists under its name only when it is complete.

    Args:
        path: the file; None or ``-`` for standard output.
    """
    if path in (None, "-"):
        yield sys.stdout
        return
    target = Path(str(path))
    if not target.parent.is_dir():
        raise UserError(f"--output {target}: the folder {target.parent} does not exist; create it")
    with replaced_file(target) as stream:
        yield stream


def write_json_line(stream: IO[str], value: Any) -> None:
    """Write a value as one line, visible to other processes at once."""
    stream.write(json.dumps(value, ensure_ascii=False) + "\n")
    stream.flush()
