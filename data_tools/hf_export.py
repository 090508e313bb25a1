"""A SentencePiece Unigram model as a Hugging Face fast tokenizer, and proof that they agree.

The mapping follows llm-jp-tokenizer's conversion: text is not split at spaces, so that runs of
spaces and Japanese text reach the Unigram model whole as in SentencePiece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers import load_tokenizer

SPECIALS = ("<unk>", "<s>", "</s>", "<MASK>", "<PAD>", "<CLS>", "<SEP>", "<EOD>")
SPACE = "▁"
PROBES = ("<0x0A>", "a<0x41> <0x", "<0x<0xE3>0A>\n")
"""Texts compared in addition: bytes spelled out, which are no bytes."""
DIFFERENCES_SHOWN = 5


def export_hugging_face(model_file: Path, folder: Path, eod_token: str) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    ``eod_token`` becomes eos_token. With ``</s>`` (data made with Llama2Tokenizer) BOS is put
    before a text, as in that data; with ``<EOD>`` nothing is.

    Raises:
        UserError: the model is of another kind, or lacks a special token.
    """
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    pieces = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.get_piece_size())]
    special = [
        tokenizers.AddedToken(piece, special=True, normalized=False)
        for i, (piece, _) in enumerate(pieces)
        if sp.is_control(i) or sp.is_unknown(i)
    ]
    if eod_token not in {token.content for token in special}:
        raise UserError(f"{model_file}: has no special token {eod_token} to end a document")
    fast = tokenizers.Tokenizer(models.Unigram(pieces, sp.unk_id(), byte_fallback=True))
    fast.add_special_tokens(special)
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    fast.pre_tokenizer = _literal_bytes_cut([piece for piece, _ in pieces])
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    if eod_token == "</s>":
        fast.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", sp.bos_id())]
        )
    fast.save(str(folder / "tokenizer.json"))
    _write_settings(folder, {token.content for token in special}, eod_token)


def _literal_bytes_cut(pieces: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    """Return a pre-tokenizer that cuts a text inside each literal ``<0x0A>``.

    The fast Unigram model would take the six characters for the piece of that name, and so make
    them a newline; SentencePiece does not. The cut is where no other piece crosses it if there is
    such a place, so that the best segmentation stays the same.
    """
    parts = ("<", "0", "x", "[0-9A-F]", "[0-9A-F]", ">")
    texts = [piece for piece in pieces if not re.fullmatch("".join(parts), piece)]
    joints = range(1, len(parts))
    free = (at for at in joints if not any(re.search(parts[at - 1] + parts[at], t) for t in texts))
    cut = next(free, 1)
    pattern = f"{''.join(parts[:cut])}(?={''.join(parts[cut:])})"
    return pre_tokenizers.Split(tokenizers.Regex(pattern), "merged_with_previous")


def _write_settings(folder: Path, special: set[str], eod_token: str) -> None:
    names = {
        "bos_token": "<s>",
        "eos_token": eod_token,
        "unk_token": "<unk>",
        "pad_token": "<PAD>",
        "cls_token": "<CLS>",
        "sep_token": "<SEP>",
        "mask_token": "<MASK>",
    }
    tokens = {role: name for role, name in names.items() if name in special}
    settings: dict[str, Any] = {
        **tokens,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # transformers' way to say: no limit
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, content in (
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", tokens),
    ):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def compare(model_file: Path, hugging_face: Path, texts: Sequence[str]) -> str:
    """Encode texts with both and return a report: how many agree, and where the others differ."""
    texts = [*texts, *PROBES]
    sp = load_tokenizer("SentencePieceTokenizer", model_file)
    hf = load_tokenizer("HuggingFaceTokenizer", hugging_face)
    different, tokens, broken = [], 0, 0
    for text, theirs in zip(texts, hf.encode_batch(texts), strict=True):
        ours = sp.encode(text)
        tokens += len(ours)
        if ours.tolist() != theirs.tolist():
            different.append((text, ours.tolist(), theirs.tolist()))
        broken += hf.decode(theirs) != text
    size = sum(len(text.encode()) for text in texts)
    lines = [
        f"Compared on {len(texts):,} texts ({size:,} bytes, {tokens:,} tokens, "
        f"{size / max(tokens, 1):.2f} bytes per token): {len(texts) - len(different):,} give the "
        f"same ids in SentencePiece and Hugging Face, {len(different):,} differ; "
        f"{broken:,} do not decode to the same text."
    ]
    for text, ours, theirs in different[:DIFFERENCES_SHOWN]:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
            min(len(ours), len(theirs)),
        )
        lines.append(f"  differs at token {at} of {text[:40]!r}:")
        for name, tokenizer, ids in (("SentencePiece", sp, ours), ("Hugging Face", hf, theirs)):
            pieces = [tokenizer.piece(i) for i in ids[at : at + 8]]
            lines.append(f"    {name:13} {pieces}")
    return "\n".join(lines)
