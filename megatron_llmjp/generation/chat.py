"""Chat templates of checkpoints: messages to the text of a prompt.

A template is a Jinja program that comes with the checkpoint. It is executed in jinja2's sandbox for
immutable data, as in transformers, and gets the same variables and functions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_llmjp.convert.tuning.chat_template import FILE, SETTINGS, read_chat_template
from megatron_llmjp.errors import UserError

Message = Mapping[str, Any]
"""``role`` (``system``, ``user``, ``assistant``) and ``content``."""
_TOKEN_FILES = ("special_tokens_map.json", SETTINGS)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template.

    Attributes:
        text: the Jinja program.
        special_tokens: its variables, such as ``bos_token``.
        origin: its file, for messages.
    """

    text: str
    special_tokens: Mapping[str, str]
    origin: Path

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt that asks for the assistant's next message.

        Raises:
            UserError: the template refuses the messages, or fails.
        """
        import jinja2
        from jinja2 import ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            template = environment.from_string(self.text)
            return template.render(
                messages=messages, add_generation_prompt=True, **self.special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{self.origin}: the chat template fails: {error}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def find_chat_template(folder: Path) -> ChatTemplate | None:
    """Return the chat template in a checkpoint's folder of tokenizer files, or None.

    Raises:
        UserError: it is damaged.
    """
    settings: dict[str, Any] = {}
    for name in _TOKEN_FILES:
        settings |= _read_object(folder / name)
    tokens = {name: _token(value) for name, value in settings.items() if name.endswith("_token")}
    special = {name: token for name, token in tokens.items() if token is not None}
    file = folder / FILE
    if file.is_file():
        return ChatTemplate(read_chat_template(file), special, file)
    text = settings.get("chat_template")
    if isinstance(text, list):  # several by name
        named = {t.get("name"): t.get("template") for t in text if isinstance(t, dict)}
        text = named.get("default")
    return ChatTemplate(text, special, folder / SETTINGS) if isinstance(text, str) else None


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: invalid JSON ({error}); copy the file again") from error
    return found if isinstance(found, dict) else {}


def _token(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def check_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Check that a value is a list of messages.

    Raises:
        UserError: it is not; the message begins with ``where``.
    """
    ok = isinstance(value, list) and all(map(_is_message, value)) and bool(value)
    if not ok:
        raise UserError(
            f'{where}: expected messages, such as [{{"role": "user", "content": "Hello"}}], found '
            f"{json.dumps(value, ensure_ascii=False)[:100]}"
        )
    return list(value)


def _is_message(value: Any) -> bool:
    keys = ("role", "content")
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in keys)
