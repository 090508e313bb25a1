"""Export of a tokenizer as files of a Hugging Face model, for AutoTokenizer.

Files of transformers are copied byte for byte, except an ``eos_token`` that is not the run's
end-of-document token. From SentencePiece models, GPT-2's vocabulary and merges, and TikTokenizer's
vocabulary a fast tokenizer is built, and its ids are compared with the original's.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from megatron_llmjp.convert.formats.hugging_face.config import json_bytes
from megatron_llmjp.convert.model_tokenizer import ModelTokenizer
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers import Tokenizer, load_tokenizer
from megatron_llmjp.tokenizers.comparison import (
    COMMON_TEXTS,
    RARE_TEXTS,
    TokenizerComparison,
    compare_tokenizers,
)
from megatron_llmjp.tokenizers.hugging_face import FastTokenizer, HuggingFaceTokenizer
from megatron_llmjp.tokenizers.sentencepiece import SentencePieceModel
from megatron_llmjp.tokenizers.sentencepiece_fast import export_hugging_face, model_specific_texts
from megatron_llmjp.tokenizers.tiktoken import TikTokenizer
from megatron_llmjp.tokenizers.tiktoken_fast import build_fast_tiktoken

FAST, SETTINGS, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
BUILT = (FAST, SETTINGS, SPECIAL)
KEPT_SETTINGS = ("chat_template", "model_max_length", "padding_side", "truncation_side")
"""Settings of tokenizer_config.json that are kept if the fast tokenizer is rebuilt."""
_RENAMED = {"tokenizer.model": "sentencepiece.model", "spiece.model": "sentencepiece.model"}
"""New names of models that AutoTokenizer would load, with other ids for Unigram models."""

ALL = (*COMMON_TEXTS, *RARE_TEXTS)


@dataclass
class ExportedTokenizer:
    """Files by name, with notes and warnings for the user."""

    files: dict[str, bytes]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def export_tokenizer(chosen: ModelTokenizer, keep: bool, rows: int) -> ExportedTokenizer:
    """Return the files of an export.

    Args:
        chosen: the tokenizer.
        keep: copy all files unchanged, as for the tokenizer of a Hugging Face model.
        rows: size of the vocabulary.

    Raises:
        UserError: a JSON file is damaged.
    """
    files = {name: path.read_bytes() for name, path in chosen.files.items()}
    tokenizer = chosen.tokenizer
    if keep:
        return ExportedTokenizer(files)
    if isinstance(tokenizer, SentencePieceModel):
        return _of_sentencepiece(tokenizer, files, rows)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _of_hugging_face(tokenizer, chosen.eod_id, files)
    if isinstance(tokenizer, FastTokenizer):
        return _of_fast(tokenizer, tokenizer.tokenizer, files)
    if isinstance(tokenizer, TikTokenizer):
        return _of_fast(tokenizer, build_fast_tiktoken(tokenizer), files)
    problem = "no tokenizer, and the end-of-text token is unknown; specify --tokenizer"
    if tokenizer is not None:
        problem = f"no tokenizer for AutoTokenizer: none can be built from {tokenizer.kind}"
    return ExportedTokenizer(files, warnings=[f"the export has {problem}"])


def _of_sentencepiece(
    model: SentencePieceModel, files: dict[str, bytes], rows: int
) -> ExportedTokenizer:
    notes = []
    if FAST in files:
        other, found = _difference(model, model.model_file.parent, rows)
        if other is None:
            note = f"{FAST} and {model.model_file.name} agree. {found.report()}"
            return ExportedTokenizer(files, [note])
        notes.append(f"the {FAST} next to {model.model_file.name} {other}; it was rebuilt")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            export_hugging_face(model, folder, rows)
        except UserError as error:
            return _model_only(files, str(error))
        built = load_tokenizer("HuggingFaceTokenizer", folder)
        own = model_specific_texts(model, rows)
        ordinary = compare_tokenizers(model, built, [*COMMON_TEXTS, *own])
        if ordinary.differences:
            return _model_only(files, ordinary.report())
        found = compare_tokenizers(model, built, [*ALL, *own])
        made = {name: (folder / name).read_bytes() for name in BUILT}
    made[SETTINGS] = _merged_settings(files.get(SETTINGS), made[SETTINGS])
    notes.append(
        f"{FAST} was built from {model.model_file.name} as {model.kind}: a document ends with "
        f"{model.piece(model.eod_id)} ({model.eod_id}). {found.report()}"
    )
    warnings = [f"rare texts differ in {FAST}, see above"] if found.differences else []
    return ExportedTokenizer(files | made, notes, warnings)


def _difference(
    model: SentencePieceModel, folder: Path, rows: int
) -> tuple[str | None, TokenizerComparison]:
    """Return the difference between a folder's fast tokenizer and the model, and the comparison."""
    fast = load_tokenizer("HuggingFaceTokenizer", folder)
    assert isinstance(fast, HuggingFaceTokenizer)
    found = compare_tokenizers(model, fast, [*ALL, *model_specific_texts(model, rows)])
    if fast.eos_id != model.eod_id:
        ours, theirs = model.piece(model.eod_id), fast.eos_id
        shown = "nothing" if theirs is None else fast.piece(theirs)
        return f"ends text with {shown}, {model.kind} with {ours}", found
    if fast.tokenizer.encode(COMMON_TEXTS[0]).ids != model.encode(COMMON_TEXTS[0]).tolist():
        return "adds other special tokens to a text, or encodes it to other ids", found
    return "encodes to other ids" if found.differences else None, found


def _model_only(files: dict[str, bytes], why: str) -> ExportedTokenizer:
    """Keep a model that has no equal fast tokenizer, under a name that AutoTokenizer ignores."""
    kept = {_RENAMED.get(n, n): data for n, data in files.items() if n.endswith(".model")}
    return ExportedTokenizer(
        kept,
        warnings=[
            f"AutoTokenizer cannot load the export, which has only {', '.join(kept)}: no fast "
            f"tokenizer with the same ids can be built. {why}"
        ],
    )


def _of_hugging_face(
    tokenizer: HuggingFaceTokenizer, eod_id: int | None, files: dict[str, bytes]
) -> ExportedTokenizer:
    """Copy the files; the run's end-of-document token becomes ``eos_token``."""
    if eod_id is None or eod_id == tokenizer.eos_id:
        return ExportedTokenizer(files)
    eod = tokenizer.piece(eod_id)
    before = "none" if tokenizer.eos_id is None else tokenizer.piece(tokenizer.eos_id)
    settings = _json(files, SETTINGS) or {"tokenizer_class": "PreTrainedTokenizerFast"}
    changed = {SETTINGS: {**settings, "eos_token": eod}}
    if SPECIAL in files:
        changed[SPECIAL] = {**_json(files, SPECIAL), "eos_token": eod}
    return ExportedTokenizer(
        files | {name: json_bytes(content) for name, content in changed.items()},
        [f"eos_token of the tokenizer is {eod} ({eod_id}) in the export, {before} before"],
    )


def _of_fast(
    tokenizer: Tokenizer, fast: tokenizers.Tokenizer, files: dict[str, bytes]
) -> ExportedTokenizer:
    """Write the fast tokenizer of a byte-level vocabulary, if it encodes to the same ids."""
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eod_id,
        "pad_token": tokenizer.pad_id,
    }
    settings = {
        **{role: tokenizer.piece(i) for role, i in ids.items() if i is not None},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    made = {FAST: fast.to_str().encode(), SETTINGS: json_bytes(settings)}
    with tempfile.TemporaryDirectory() as temporary:
        for name, data in made.items():
            (Path(temporary) / name).write_bytes(data)
        built = load_tokenizer("HuggingFaceTokenizer", temporary)
        found = compare_tokenizers(tokenizer, built, ALL, (tokenizer.kind, "Hugging Face"))
    if found.differences:
        why = f"AutoTokenizer cannot load the export: no equal {FAST} can be built"
        return ExportedTokenizer(files, warnings=[f"{why}. {found.report()}"])
    eod = f"{tokenizer.piece(tokenizer.eod_id)} ({tokenizer.eod_id})"
    note = f"{FAST} was built as {tokenizer.kind}: a document ends with {eod}. {found.report()}"
    return ExportedTokenizer(files | made, [note])


def _merged_settings(old: bytes | None, new: bytes) -> bytes:
    """Return the settings of a built tokenizer, merged with the kept ones of the original."""
    before = {} if old is None else _json({SETTINGS: old}, SETTINGS)
    return json_bytes(json.loads(new) | {k: before[k] for k in KEPT_SETTINGS if k in before})


def _json(files: dict[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} of the tokenizer: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{name} of the tokenizer: expected a JSON object")
    return content
