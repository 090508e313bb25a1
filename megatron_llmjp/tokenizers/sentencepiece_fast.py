"""Conversion of SentencePiece models to Hugging Face fast tokenizers.

Unigram follows llm-jp-tokenizer's conversion: text is not split at spaces, so that the model
receives runs of spaces and Japanese text unsplit, as in SentencePiece. BPE follows transformers'
conversion of Llama-2 (convert_slow_tokenizer.py, ``generate_merges``). Equal ids are not
guaranteed: :mod:`megatron_llmjp.tokenizers.comparison` compares them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers.sentencepiece import SentencePieceModel, SentencePieceTokenizer

SPACE = "▁"
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""Types of models and of pieces, as defined in sentencepiece_model.proto."""


def export_hugging_face(
    tokenizer: SentencePieceModel, folder: Path, model_vocab_size: int | None = None
) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    ``eos_token`` is the end of document of the tokenizer's type: ``<EOD>`` for
    SentencePieceTokenizer, ``</s>`` for the others. BOS is prepended to a text if the type writes
    it (Llama2Tokenizer).

    Args:
        tokenizer: the model and its type.
        folder: output folder.
        model_vocab_size: number of ids of the model; added special tokens beyond it are omitted.

    Raises:
        UserError: the model is neither Unigram nor BPE.
    """
    fast = build_fast_tokenizer(tokenizer, model_vocab_size)
    fast.save(str(folder / "tokenizer.json"))
    _write_settings(folder, tokenizer)


def build_fast_tokenizer(
    tokenizer: SentencePieceModel, model_vocab_size: int | None = None
) -> tokenizers.Tokenizer:
    """Return the fast tokenizer of a SentencePiece model; see :func:`export_hugging_face`."""
    proto = _model_proto(tokenizer)
    lowest = 2 * min(piece.score for piece in proto.pieces) - 100
    pieces = [(p.piece, lowest if p.type == UNUSED else p.score) for p in proto.pieces]
    spec = proto.trainer_spec
    if spec.model_type == UNIGRAM:
        unknown = tokenizer.processor.unk_id()
        model: models.Model = models.Unigram(pieces, unknown, byte_fallback=spec.byte_fallback)
    elif spec.model_type == BPE:
        model = _build_bpe(proto)
    else:
        raise UserError(
            f"{tokenizer.model_file}: unsupported SentencePiece model type {spec.model_type}; "
            "expected Unigram (1) or BPE (2)"
        )
    fast = tokenizers.Tokenizer(model)
    _add_special_tokens(fast, tokenizer, proto, model_vocab_size)
    fast.normalizer = _normalizer(proto.normalizer_spec)
    if spec.byte_fallback and spec.model_type == UNIGRAM:
        fast.pre_tokenizer = _split_literal_bytes([piece for piece, _ in pieces])
    steps: list[decoders.Decoder] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    fast.decoder = decoders.Sequence(steps)
    if tokenizer.writes_bos and tokenizer.bos_id is not None:
        bos = tokenizer.piece(tokenizer.bos_id)
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.bos_id)],
        )
    return fast


def model_specific_texts(
    tokenizer: SentencePieceModel, model_vocab_size: int | None = None
) -> list[str]:
    """Return texts with tokens that only this model or type recognizes, for the comparison.

    These are user-defined pieces and, for SentencePieceTokenizer, its special tokens.
    """
    pieces = _model_proto(tokenizer).pieces
    found = [piece.piece for piece in pieces if piece.type == USER_DEFINED]
    if isinstance(tokenizer, SentencePieceTokenizer):
        special = tokenizer.special_ids.items()
        found += [name for name, i in special if model_vocab_size is None or i < model_vocab_size]
    return [f"a{name}b {name}\n{name}" for name in found]


def _model_proto(tokenizer: SentencePieceModel) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.processor.serialized_model_proto())
    return proto


def _build_bpe(proto: Any) -> models.BPE:
    """Return a BPE model with the merges that produce each piece, best pieces first.

    Bytes and special tokens are not produced from characters, so that a literal ``<0x0A>`` in a
    text remains text.
    """
    ids = {piece.piece: at for at, piece in enumerate(proto.pieces)}
    parts = {piece.piece for piece in proto.pieces if piece.type in (NORMAL, USER_DEFINED)}
    merges = []
    for piece in proto.pieces:
        text = piece.piece
        if piece.type != NORMAL:
            continue
        pairs = ((text[:at], text[at:]) for at in range(1, len(text)))
        built = [(left, right) for left, right in pairs if left in parts and right in parts]
        built.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(piece.score, left, right) for left, right in built]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    unknown = next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN)
    return models.BPE(
        ids,
        [(left, right) for _, left, right in merges],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _add_special_tokens(
    fast: tokenizers.Tokenizer,
    tokenizer: SentencePieceModel,
    proto: Any,
    model_vocab_size: int | None,
) -> None:
    """Add control pieces, and the special tokens that SentencePieceTokenizer adds, in order.

    A Unigram model recognizes user-defined pieces by itself, since no other pieces score better.
    """
    kinds = {piece.piece: piece.type for piece in proto.pieces}
    special = [name for name, kind in kinds.items() if kind in (UNKNOWN, CONTROL)]
    if isinstance(tokenizer, SentencePieceTokenizer):
        added = {i: name for name, i in tokenizer.special_ids.items() if i >= len(proto.pieces)}
        special += [
            added[i] for i in sorted(added) if model_vocab_size is None or i < model_vocab_size
        ]
    fast.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in special]
    )
    if proto.trainer_spec.model_type == BPE:
        own = [name for name, kind in kinds.items() if kind == USER_DEFINED]
        fast.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in own])


def _normalizer(spec: Any) -> normalizers.Normalizer:
    """Return SentencePiece's normalization: character map, spaces and prefix."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        spaces = tokenizers.Regex(" {2,}")
        steps += [normalizers.Strip(), normalizers.Replace(spaces, " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _split_literal_bytes(pieces: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    """Return a pre-tokenizer that splits a text inside each literal ``<0x0A>``.

    The fast Unigram model would match the six characters with the piece of that name, and convert
    them to a newline; SentencePiece does not. If possible, the split is at a position that no other
    piece spans, so that the best segmentation does not change.
    """
    parts = ("<", "0", "x", "[0-9A-F]", "[0-9A-F]", ">")
    texts = [piece for piece in pieces if not re.fullmatch("".join(parts), piece)]
    joints = range(1, len(parts))
    free = (at for at in joints if not any(re.search(parts[at - 1] + parts[at], t) for t in texts))
    cut = next(free, 1)
    pattern = f"{''.join(parts[:cut])}(?={''.join(parts[cut:])})"
    return pre_tokenizers.Split(tokenizers.Regex(pattern), "merged_with_previous")


def _write_settings(folder: Path, tokenizer: SentencePieceModel) -> None:
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eod_id,
        "unk_token": tokenizer.processor.unk_id(),
        "pad_token": tokenizer.pad_id,
        "cls_token": tokenizer.id_of("<CLS>"),
        "sep_token": tokenizer.id_of("<SEP>"),
        "mask_token": tokenizer.id_of("<MASK>", "<mask>"),
    }
    tokens = {role: tokenizer.piece(i) for role, i in ids.items() if i is not None}
    settings: Mapping[str, Any] = {
        **tokens,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # transformers' value for "no limit"
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, content in (
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", tokens),
    ):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
