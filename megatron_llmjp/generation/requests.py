"""Requests of Azure Machine Learning's text generation endpoints, and their responses. No torch.

A request is ``{"input_data": {"input_string": [TEXT, ...], "parameters": {...}}}``, or in the newer
form ``{"input_data": [TEXT, ...], "params": {...}}``. The response is ``[{"0": TEXT}, ...]``, one
object per text. Parameters have the meaning and, for ``return_full_text``, the default of
transformers' text generation pipeline; those that are not known are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_llmjp.errors import UserError, did_you_mean
from megatron_llmjp.generation.settings import GenerationSettings

RETURN_FULL_TEXT = "return_full_text"
PARAMETERS = (*GenerationSettings.__dataclass_fields__, RETURN_FULL_TEXT)


@dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
        prompts: its texts.
        settings: its parameters, completed by the defaults.
        return_full_text: whether a response contains the prompt too.
        where: position in the input, for messages.
    """

    prompts: tuple[str, ...]
    settings: GenerationSettings
    return_full_text: bool
    where: str

    def response(self, texts: Sequence[str]) -> list[dict[str, str]]:
        """Return the response with the continuation of each prompt."""
        full = zip(self.prompts, texts, strict=True)
        return [{"0": prompt * self.return_full_text + text} for prompt, text in full]


def parse_request(value: Any, defaults: GenerationSettings, where: str) -> Request:
    """Check a request.

    Args:
        value: the decoded JSON.
        defaults: settings of parameters that it does not have.
        where: position in the input, for messages.

    Raises:
        UserError: a key or parameter is unknown or has an unexpected value.
    """
    content = _only_keys(value, ("input_data", "params"), where)
    data, parameters = content.get("input_data"), content.get("params")
    if isinstance(data, dict):
        data = _only_keys(data, ("input_string", "parameters"), f"{where}: input_data")
        if parameters and data.get("parameters"):
            raise UserError(f"{where}: has both params and input_data.parameters; remove one")
        parameters = data.get("parameters") or parameters
        data = data.get("input_string")
    if not isinstance(data, list) or not data or not all(isinstance(x, str) for x in data):
        raise UserError(
            f"{where}: input_data.input_string: expected a list of texts, found "
            f"{json.dumps(data, ensure_ascii=False)[:100]}"
        )
    parameters = _only_keys(
        {} if parameters is None else parameters, PARAMETERS, f"{where}: parameters"
    )
    full = parameters.pop(RETURN_FULL_TEXT, True)
    if not isinstance(full, bool):
        raise UserError(f"{where}: {RETURN_FULL_TEXT}: expected true or false, found {full!r}")
    try:
        settings = GenerationSettings.from_mapping({**asdict(defaults), **parameters})
    except UserError as error:
        raise UserError(f"{where}: parameters: {error}") from None
    return Request(tuple(data), settings, full, where)


def _only_keys(value: Any, known: Sequence[str], where: str) -> dict[str, Any]:
    """Return a copy of an object whose keys are all known.

    Raises:
        UserError: it is no object, or has another key.
    """
    if not isinstance(value, Mapping):
        found = json.dumps(value, ensure_ascii=False)[:100]
        raise UserError(
            f'{where}: expected an object such as {{"input_data": {{"input_string": ["text"], '
            f'"parameters": {{"max_new_tokens": 50}}}}}}, found {found}'
        )
    for key in value:
        if key not in known:
            raise UserError(
                f"{where}: {key!r} is not supported{did_you_mean(key, known)} "
                f"(possible: {', '.join(known)})"
            )
    return dict(value)


def read_json_values(lines: Iterable[str], name: str) -> Iterator[tuple[str, Any]]:
    """Yield the JSON values of a file, and their positions for messages.

    The file contains one value per line, or one value over several lines. A line is yielded before
    the next one is read.

    Raises:
        UserError: a line is no JSON.
    """
    rest = iter(lines)
    for number, line in enumerate(rest, 1):
        if not line.strip():
            continue
        try:
            yield f"{name}, line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            if number > 1:
                raise UserError(f"{name}, line {number}: invalid JSON ({error})") from None
            yield name, _parse_whole(line + "".join(rest), name)
            return


def _parse_whole(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: invalid JSON ({error})") from None
