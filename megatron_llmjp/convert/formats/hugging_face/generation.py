"""Special token ids of ``config.json`` and the content of ``generation_config.json``.

A native checkpoint converted from Hugging Face stores both in one file in its tokenizer folder, as
do the checkpoints of runs that start from it, so that they survive the conversion back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llmjp.convert.formats.hugging_face.config import read_json
from megatron_llmjp.errors import UserError

FILE = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
EOS = "eos_token_id"

Ids = Mapping[str, int]


@dataclass(frozen=True)
class GenerationSettings:
    """Special token ids and generation settings of a model.

    Attributes:
        token_ids: ids or lists of ids in config.json, without null values.
        config: content of generation_config.json; None if there is none.
    """

    token_ids: Mapping[str, Any]
    config: Mapping[str, Any] | None


def read_generation(
    config: Mapping[str, Any], where: Path, path: Path | None
) -> GenerationSettings:
    """Return the settings of a Hugging Face model.

    Args:
        config: the content of its config.json.
        where: its config.json, for messages.
        path: its generation_config.json, which may not exist.

    Raises:
        UserError: an id is not an integer, or generation_config.json is damaged.
    """
    stated = read_json(path) if path is not None and path.is_file() else None
    return GenerationSettings(
        _token_ids(config, where),
        None if path is None or stated is None else {**stated, **_token_ids(stated, path)},
    )


def read_stored_generation(path: Path) -> GenerationSettings | None:
    """Return the settings in a native checkpoint; None if it does not come from Hugging Face.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return None
    content = read_json(path)
    config = content.get("generation_config")
    if not isinstance(config, dict | None) or not isinstance(content.get("token_ids"), dict):
        raise UserError(f"{path}: expected the objects token_ids and generation_config")
    return GenerationSettings(_token_ids(content["token_ids"], path), config)


def stored_content(generation: GenerationSettings) -> dict[str, Any]:
    """Return the content of the file that :func:`read_stored_generation` reads."""
    return {"token_ids": generation.token_ids, "generation_config": generation.config}


def resolve_generation(
    generation: GenerationSettings | None, ids: Ids, decides: bool, rows: int
) -> tuple[GenerationSettings, list[str]]:
    """Return the settings of an export, and warnings.

    Args:
        generation: settings of the source.
        ids: special token ids of the tokenizer; ``eos_token_id`` is its end-of-document id.
        decides: whether the tokenizer's type is known, or the user specified the tokenizer. Then
            its end-of-document id takes precedence over the source's.
        rows: size of the vocabulary; ids beyond it are dropped (GPT-2's default ids often remain
            in configurations with smaller vocabularies).
    """
    if generation is None:
        return _derived(ids), []
    token_ids = _within(generation.token_ids, rows)
    config = None if generation.config is None else _within(generation.config, rows)
    ends = as_list((token_ids if config is None else config).get(EOS))
    if decides and EOS in ids and ids[EOS] not in ends:
        kept = {k: v for k, v in (config or {}).items() if k not in TOKEN_IDS}
        warnings = [
            f"the source's {EOS} {ends} were replaced by {ids[EOS]}, the tokenizer's "
            "end-of-document id"
        ]
        return GenerationSettings(ids, {**kept, **ids}), warnings if ends else []
    token_ids = {**ids, **token_ids}
    if config is None:
        return _derived(token_ids), []
    return GenerationSettings(token_ids, {**ids, **config} if decides else config), []


def _derived(ids: Mapping[str, Any]) -> GenerationSettings:
    return GenerationSettings(ids, {"_from_model_config": True, **ids})


def _token_ids(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the special token ids in a dictionary.

    Raises:
        UserError: one is neither an integer nor a list of integers.
    """
    found = {name: values[name] for name in TOKEN_IDS if values.get(name) is not None}
    for name, value in found.items():
        if any(isinstance(i, bool) or not isinstance(i, int) for i in as_list(value)):
            raise UserError(f"{path}: {name} must be a token id or a list of them, found {value!r}")
    return found


def _within(values: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return the values without bos, eos and pad ids outside the vocabulary."""
    found = dict(values)
    for name in TOKEN_IDS:
        given = values.get(name)
        kept = [i for i in as_list(given) if i < rows]
        if kept == as_list(given):
            continue
        if kept:
            found[name] = kept
        else:
            del found[name]
    return found


def as_list(value: Any) -> list[Any]:
    """Return the ids of a value of ``eos_token_id``: null, an id, or a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
