"""Abstract interface of tokenizers."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # run_status starts without numpy
    import numpy as np
    import numpy.typing as npt

Ids: TypeAlias = "npt.NDArray[np.int32]"
"""Token ids of a text."""


@dataclass(frozen=True)
class TikTokenSettings:
    """Settings of TikTokenizer that its vocabulary file does not contain (``--tiktoken-*``).

    Attributes:
        pattern: ``v1`` or ``v2``, the regular expression that splits a text before merging.
        num_special_tokens: number of ids before the vocabulary; unnamed ones are ``<SPECIAL_n>``.
        special_tokens: names of the first ids; by default ``<unk> <s> </s>``.
    """

    pattern: str = "v2"
    num_special_tokens: int = 1000
    special_tokens: tuple[str, ...] = ()


class Tokenizer(ABC):
    """Converts text to token ids and back.

    Attributes:
        kind: the value of ``--tokenizer-type``.
        vocab_size: largest token id plus one, unpadded. Exceeds the number of tokens if the ids
            have gaps; every id that encode returns is below it.
        eod_id: id that ``--append-eod`` appends to each document.
        bos_id, eos_id, pad_id: None if the vocabulary has no such token.
        library: name and version of a library that gives the same ids as the type's own, and
            encodes instead of it; None for the type's own.

    ``encode`` returns the same ids as ``tokenize`` of Megatron-LM's tokenizer with this name:
    including BOS if that type writes it, and never including the end of document.
    """

    kind: str
    vocab_size: int
    eod_id: int
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    library: str | None = None

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """Return the token ids of one text.

        Raises:
            ValueError: the text cannot be encoded (a lone surrogate, or text that is not an integer
                for NullTokenizer).
        """

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return the token ids of each text; the same ids as encode, often faster."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Sequence[int] | Ids) -> str:
        """Return the text of token ids."""

    def piece(self, token_id: int) -> str:
        """Return one token as readable text, for reports and inspection."""
        return self.decode([token_id])

    def files(self) -> dict[str, Path]:
        """Return the files that a checkpoint stores, by their names in the checkpoint."""
        return {}

    def identity(self) -> dict[str, Any]:
        """Return the identity of this tokenizer: type, vocabulary size, file names and sha256."""
        return {
            "type": self.kind,
            "vocab_size": self.vocab_size,
            "eod_id": self.eod_id,
            "files": {path.name: file_sha256(path) for path in self.identifying_files()},
        }

    def identifying_files(self) -> list[Path]:
        """Return the files that determine the ids."""
        return list(self.files().values())


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Convert a panic of a library in Rust, which is no Exception, to a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def optional_id(token_id: int) -> int | None:
    """Return a token id, or None for -1, SentencePiece's value for a missing token."""
    return token_id if token_id >= 0 else None
