"""Token ids of ``config.json`` and the content of ``generation_config.json``.

A Hugging Face source's are kept on its way to native and back, in one file next to the
tokenizer's, which runs that start from such a checkpoint store in their own checkpoints.
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
    """How a model is meant to generate text.

    Attributes:
        token_ids: those of config.json: ids, or lists of ids; without those that are null.
        config: generation_config.json; None where the source has none.
    """

    token_ids: Mapping[str, Any]
    config: Mapping[str, Any] | None


def read_generation(folder: Path, config: Mapping[str, Any]) -> GenerationSettings:
    """Return what a Hugging Face folder says.

    Args:
        folder: the model's.
        config: the content of its config.json.

    Raises:
        UserError: an id is no whole number, or generation_config.json is damaged.
    """
    path = folder / FILE
    stated = read_json(path) if path.is_file() else None
    return GenerationSettings(
        _token_ids(config, folder / "config.json"),
        None if stated is None else {**stated, **_token_ids(stated, path)},
    )


def read_stored_generation(path: Path) -> GenerationSettings | None:
    """Return what a native checkpoint stores; None where it is not of Hugging Face's origin.

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
    """Return what an export says, and warnings.

    Args:
        generation: the source's.
        ids: the tokenizer's; its ``eos_token_id`` is what ends a document.
        decides: whether the tokenizer's type is known, or the user gave the tokenizer. Then text
            ends with its id, whatever the source says.
        rows: of the vocabulary; ids beyond them name no token (GPT-2's defaults stay in
            configurations of smaller vocabularies).
    """
    if generation is None:
        return _derived(ids), []
    token_ids = _within(generation.token_ids, rows)
    config = None if generation.config is None else _within(generation.config, rows)
    ends = _as_list((token_ids if config is None else config).get(EOS))
    if decides and EOS in ids and ids[EOS] not in ends:
        kept = {k: v for k, v in (config or {}).items() if k not in TOKEN_IDS}
        warnings = [
            f"the source's {EOS} {ends} were replaced by {ids[EOS]}, with which the tokenizer "
            "ends a document"
        ]
        return GenerationSettings(ids, {**kept, **ids}), warnings if ends else []
    token_ids = {**ids, **token_ids}
    if config is None:
        return _derived(token_ids), []
    return GenerationSettings(token_ids, {**ids, **config} if decides else config), []


def _derived(ids: Mapping[str, Any]) -> GenerationSettings:
    return GenerationSettings(ids, {"_from_model_config": True, **ids})


def _token_ids(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The ids among some values.

    Raises:
        UserError: one is neither a whole number nor a list of them.
    """
    found = {name: values[name] for name in TOKEN_IDS if values.get(name) is not None}
    for name, value in found.items():
        if any(isinstance(i, bool) or not isinstance(i, int) for i in _as_list(value)):
            raise UserError(f"{path}: {name} must be a token id or a list of them, found {value!r}")
    return found


def _within(values: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return the values without ids of bos, eos and pad that the vocabulary does not have."""
    found = dict(values)
    for name in TOKEN_IDS:
        given = values.get(name)
        kept = [i for i in _as_list(given) if i < rows]
        if kept == _as_list(given):
            continue
        if kept:
            found[name] = kept
        else:
            del found[name]
    return found


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
