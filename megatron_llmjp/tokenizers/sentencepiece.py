"""SentencePiece models: the three tokenizer types in which Megatron-LM uses them.

Source of the behaviour: Megatron-LM megatron/training/tokenizer/tokenizer.py (core 0.12), classes
_SentencePieceTokenizer, _GPTSentencePieceTokenizer and _Llama2Tokenizer. In newer versions of
Megatron-LM (core 0.16), Llama2Tokenizer no longer writes BOS.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers.base import Ids, Tokenizer, optional_id

BATCH_SIZE = 128  # texts per call
HUGGING_FACE_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class SentencePieceModel(Tokenizer):
    """Base of the SentencePiece types: no BOS, end of document is ``</s>``.

    This class itself implements ``GPTSentencePieceTokenizer``.
    """

    kind = "GPTSentencePieceTokenizer"
    writes_bos = False

    def __init__(self, model_file: Path) -> None:
        self.model_file = model_file
        self.processor = _load(model_file)
        self.vocab_size = self.processor.get_piece_size()
        self.bos_id = optional_id(self.processor.bos_id())
        self.eos_id = optional_id(self.processor.eos_id())
        self.pad_id = optional_id(self.processor.pad_id())
        if self.pad_id is None:
            self.pad_id = self.id_of("<PAD>", "<pad>", "[PAD]")
        self.eod_id = self._find_eod()

    def _find_eod(self) -> int:
        if self.eos_id is None:
            raise UserError(
                f"{self.model_file}: the model has no end-of-sentence piece, which "
                f"{self.kind} requires to end a document. Train it with an eos_id, or use "
                "--tokenizer-type SentencePieceTokenizer with a model that has <EOD>."
            )
        return self.eos_id

    def id_of(self, *pieces: str) -> int | None:
        """Return the id of the first of these pieces in the vocabulary, or None."""
        for piece in pieces:
            token_id = self.processor.piece_to_id(piece)
            if self.processor.id_to_piece(token_id) == piece:
                return int(token_id)
        return None

    def encode(self, text: str) -> Ids:
        """Return the ids of one text, with BOS if this type writes it."""
        return _to_ids(self.processor, [text], self.writes_bos)[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text; 25 % faster for short texts."""
        batches = (texts[at : at + BATCH_SIZE] for at in range(0, len(texts), BATCH_SIZE))
        return [ids for batch in batches for ids in _to_ids(self.processor, batch, self.writes_bos)]

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return the text; control tokens (BOS, EOD) are omitted."""
        pieces = self.processor.get_piece_size()
        return str(self.processor.decode([int(i) for i in ids if 0 <= i < pieces]))

    def piece(self, token_id: int) -> str:
        """Return the piece of one id as in the vocabulary."""
        return str(self.processor.id_to_piece(int(token_id)))

    def files(self) -> dict[str, Path]:
        """Return the model, and its Hugging Face export if that is in the same folder."""
        companions = [self.model_file.parent / name for name in HUGGING_FACE_FILES]
        has_export = companions[0].exists()
        named = {path.name: path for path in companions if has_export and path.exists()}
        return {self.model_file.name.removesuffix(".model") + ".model": self.model_file} | named

    def identifying_files(self) -> list[Path]:
        """Return the file that determines the ids."""
        return [self.model_file]


class Llama2Tokenizer(SentencePieceModel):
    """Writes BOS before every document; end of document is ``</s>``."""

    kind = "Llama2Tokenizer"
    writes_bos = True

    def __init__(self, model_file: Path) -> None:
        super().__init__(model_file)
        if self.bos_id is None:
            raise UserError(
                f"{model_file}: the model has no BOS piece, which Llama2Tokenizer writes before "
                "each document. Use --tokenizer-type GPTSentencePieceTokenizer."
            )


class SentencePieceTokenizer(SentencePieceModel):
    """No BOS; end of document is ``<EOD>``; special tokens in the text are recognized.

    Megatron-LM splits a text at literal special tokens (``<CLS> <SEP> <EOD> <MASK> <pad> <s>
    </s>``) and writes their ids. Those that the model lacks get new ids after its last piece, so
    ``vocab_size`` can exceed the model's: 50,571 for LLM-jp's ver2.1 model of 50,570 pieces, which
    has ``<mask>`` but no ``<MASK>``. The only difference: if the model has no ``<EOD>``,
    Megatron-LM adds one, but here the end of document is ``</s>``.
    """

    kind = "SentencePieceTokenizer"

    def __init__(self, model_file: Path) -> None:
        super().__init__(model_file)
        self.special_ids = self._special_tokens()
        self.vocab_size = max(self.vocab_size, max(self.special_ids.values()) + 1)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, self.special_ids)) + ")")

    def _find_eod(self) -> int:
        eod = self.id_of("<EOD>")
        return eod if eod is not None else super()._find_eod()

    def _special_tokens(self) -> dict[str, int]:
        """Return the special tokens in the order in which Megatron-LM searches for them."""
        special: dict[str, int] = {}
        next_id = self.processor.get_piece_size()
        for name in self._special_names():
            token_id = self.id_of(name)
            if token_id is None and name not in special:
                token_id, next_id = next_id, next_id + 1
            if token_id is not None:
                special[name] = token_id
        return special

    def _special_names(self) -> list[str]:
        names = ["<CLS>", "<SEP>", "<MASK>"]
        if self.id_of("<EOD>") is not None:
            names.insert(2, "<EOD>")
        processor = self.processor
        for token_id, otherwise in (
            (processor.pad_id(), "<PAD>"),
            (processor.bos_id(), "<BOS>"),
            (processor.eos_id(), "<EOS>"),
        ):
            names.append(processor.id_to_piece(token_id) if token_id >= 0 else otherwise)
        return names

    def encode(self, text: str) -> Ids:
        """Return the ids of one text; literal special tokens are converted to their ids."""
        parts = self._special_pattern.split(text)  # alternating texts and special tokens
        if len(parts) == 1:
            return super().encode(text)
        ids = _to_ids(self.processor, parts)
        for at in range(1, len(parts), 2):
            ids[at] = np.array([self.special_ids[parts[at]]], np.int32)
        return np.concatenate(ids)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text."""
        if any(map(self._special_pattern.search, texts)):
            return [self.encode(text) for text in texts]
        return super().encode_batch(texts)

    def piece(self, token_id: int) -> str:
        """Return the piece of one id; ids after the model's last piece are added special tokens."""
        for name, added in self.special_ids.items():
            if added == token_id:
                return name
        return super().piece(token_id)


SENTENCEPIECE_CLASSES: dict[str, type[SentencePieceModel]] = {
    "SentencePieceTokenizer": SentencePieceTokenizer,
    "GPTSentencePieceTokenizer": SentencePieceModel,
    "Llama2Tokenizer": Llama2Tokenizer,
}
"""The classes by ``--tokenizer-type``."""


def load_sentencepiece(tokenizer_type: str, model_file: Path) -> SentencePieceModel:
    """Load a SentencePiece model as one of SENTENCEPIECE_CLASSES.

    Raises:
        UserError: the file is missing or damaged, or the model does not suit the type.
    """
    return SENTENCEPIECE_CLASSES[tokenizer_type](model_file)


def _to_ids(processor: Any, texts: Sequence[str], add_bos: bool = False) -> list[Ids]:
    """Encode texts, without Python lists of ids if this version of SentencePiece supports it."""
    utf8 = [text.encode() for text in texts]  # raises for a lone surrogate, with its position
    if hasattr(processor, "encode_as_numpy"):
        ids: list[Ids] = processor.encode_as_numpy(utf8, add_bos=add_bos, num_threads=1)
        return ids
    return [np.array(processor.encode(text, add_bos=add_bos), np.int32) for text in utf8]


def _load(model_file: Path) -> Any:
    if not model_file.is_file():
        what = "is a directory" if model_file.is_dir() else "does not exist"
        raise UserError(
            f"--tokenizer-model {model_file}: {what}. Expected a SentencePiece model file "
            "(*.model), as written by train_tokenizer."
        )
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--tokenizer-model {model_file}: not a readable SentencePiece model "
            f"({model_file.stat().st_size:,} bytes; {str(error)[:300]}). Copy it again, or check "
            "that it is the *.model file and not a vocabulary or a Git LFS pointer."
        ) from error
