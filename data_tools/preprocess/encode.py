"""What a worker does: a block of lines in, packed token arrays out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import orjson
except ImportError:  # 4 % slower without
    orjson = None  # type: ignore[assignment]

from data_tools.preprocess.blocks import FileRange, TableRows
from megatron_llmjp.data.indexed_dataset import best_dtype
from megatron_llmjp.tokenizers import Tokenizer
from megatron_llmjp.tokenizers.base import Ids

Documents = list[list[str]]  # each document a list of one text, or of its sentences


@dataclass(frozen=True)
class EncodingOptions:
    """How documents become tokens; decides the output together with the tokenizer.

    Attributes:
        keys: JSON keys, one dataset each.
        append_eod: whether the end-of-document id follows each document.
        append_bos: whether the beginning-of-sequence id stands before each document.
        keep_empty: whether a document without tokens is kept, as Megatron-LM does.
        limit: longest line in bytes.
        keep_raw: whether rejected lines are wanted back, for quarantine.
    """

    keys: list[str]
    append_eod: bool
    keep_empty: bool
    limit: int
    keep_raw: bool
    append_bos: bool = False


@dataclass
class PackedDocuments:
    """Documents end to end: ids of all sequences, lengths of sequences, sequences of documents."""

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    sequences: npt.NDArray[np.int32]


@dataclass(frozen=True)
class RejectedLine:
    """A line that gave no document: its number in the block, the reason, and the line."""

    line: int
    reason: str
    detail: str
    raw: bytes


@dataclass
class EncodedBlock:
    """What came of one block.

    Attributes:
        packed: documents per key.
        lines: lines of the block, blank and rejected ones included.
        empty: lines whose documents are kept though they hold no text.
        impossible: the first line with a token id outside the vocabulary, and that id.
    """

    packed: dict[str, PackedDocuments] = field(default_factory=dict)
    lines: int = 0
    blank: int = 0
    rejected: list[RejectedLine] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    impossible: tuple[int, int] | None = None


class BadLine(ValueError):
    """A line from which no document can be made: a reason to count by, and what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class BlockEncoder:
    """Encodes blocks with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, encoding: EncodingOptions) -> None:
        self.tokenizer = tokenizer
        self.encoding = encoding
        self.dtype = best_dtype(tokenizer.vocab_size)
        self._eod = np.array([tokenizer.eod_id], np.int32)
        self._bos = np.array([tokenizer.bos_id] if encoding.append_bos else [], np.int32)

    def encode(self, payload: FileRange | bytes | TableRows) -> EncodedBlock:
        """Return the packed documents of a block, and what was wrong with the rest."""
        try:
            return self._encode(payload, careful=False)
        except ValueError:  # the tokenizer refuses some text: find out which
            return self._encode(payload, careful=True)

    def _encode(self, payload: FileRange | bytes | TableRows, careful: bool) -> EncodedBlock:
        result = EncodedBlock()
        documents: dict[str, Documents] = {key: [] for key in self.encoding.keys}
        lines: list[int] = []  # of each document
        for number, record, raw in self._records(payload, result):
            try:
                fields = self._fields(record, raw, careful)
            except BadLine as bad:
                kept = self._raw(record, raw)
                result.rejected.append(RejectedLine(number, bad.reason, bad.detail, kept))
                continue
            if not any(map(any, fields.values())):
                result.empty.append(number)
            lines.append(number)
            for key, texts in fields.items():
                documents[key].append(texts)
        for key, of_key in documents.items():
            result.packed[key], wrong = self._pack(of_key)
            if wrong is not None and result.impossible is None:
                result.impossible = (lines[wrong[0]], wrong[1])
        return result

    def _raw(self, record: Any, raw: bytes) -> bytes:
        """Return a rejected line, where it is wanted; for a table's row the same as JSON."""
        if not self.encoding.keep_raw:
            return b""
        return raw if record is None else json.dumps(record, default=str).encode()

    def _records(
        self, payload: FileRange | bytes | TableRows, result: EncodedBlock
    ) -> Iterator[tuple[int, Any, bytes]]:
        """Yield number, record (a dict for rows, None for lines) and raw line; count lines."""
        if isinstance(payload, TableRows):
            result.lines = payload.count
            for at in range(payload.count):
                yield at, {key: column[at] for key, column in payload.columns.items()}, b""
            return
        lines = (read_range(payload) if isinstance(payload, FileRange) else payload).split(b"\n")
        if not lines[-1]:
            lines.pop()
        result.lines = len(lines)
        for at, line in enumerate(lines):
            if line and not line.isspace():
                yield at, None, line
            else:
                result.blank += 1

    def _fields(self, record: Any, raw: bytes, careful: bool) -> dict[str, list[str]]:
        """Return the texts of each key.

        Raises:
            BadLine: anything that keeps the line from being a document.
        """
        if len(raw) > self.encoding.limit:
            raise BadLine("line too long", f"{len(raw):,} bytes")
        record = parse_line(raw) if record is None else record
        fields = {key: texts_of(record, key) for key in self.encoding.keys}
        if not self.encoding.keep_empty and not any(map(any, fields.values())):
            raise BadLine("empty document")
        for text in (text for texts in fields.values() for text in texts if careful):
            try:
                self.tokenizer.encode(text)
            except UnicodeEncodeError as error:
                found = f"\\u{ord(text[error.start]):04x}"
                raise BadLine(
                    "lone surrogate", f"{found} at character {error.start + 1}"
                ) from error
            except ValueError as error:
                raise BadLine("not encodable", str(error)) from error
        return fields

    def _pack(self, documents: Documents) -> tuple[PackedDocuments, tuple[int, int] | None]:
        """Return the documents end to end, and the first id outside the vocabulary if any.

        That is a pair: the number of its document, and the id.
        """
        parts: list[npt.NDArray[np.int32]] = []
        lengths: list[int] = []
        sequences = np.zeros(len(documents), np.int32)
        flat = iter(self.tokenizer.encode_batch([text for texts in documents for text in texts]))
        for at, texts in enumerate(documents):
            before = len(lengths)
            for _ in texts:
                ids = next(flat)
                if len(ids):  # Megatron-LM writes no empty sequence
                    bos = self._bos if len(lengths) == before else self._bos[:0]
                    parts += [bos, ids]
                    lengths.append(len(bos) + len(ids))
            if self.encoding.append_eod and len(lengths) > before:
                parts.append(self._eod)
                lengths[-1] += 1
            sequences[at] = len(lengths) - before
        ids = np.concatenate(parts) if parts else np.empty(0, np.int32)
        packed = PackedDocuments(ids.astype(self.dtype), np.array(lengths, np.int32), sequences)
        return packed, self._outside(ids, packed)

    def _outside(self, ids: Ids, packed: PackedDocuments) -> tuple[int, int] | None:
        """Return document and id of the first token outside the vocabulary, or None."""
        size = self.tokenizer.vocab_size
        if not len(ids) or (ids.min() >= 0 and ids.max() < size):
            return None
        at = int(np.flatnonzero((ids < 0) | (ids >= size))[0])
        sequence = np.searchsorted(np.cumsum(packed.lengths, dtype=np.int64), at, side="right")
        document = np.searchsorted(np.cumsum(packed.sequences), sequence, side="right")
        return int(document), int(ids[at])


def parse_line(raw: bytes) -> dict[str, Any]:
    """Return the JSON object of a line.

    Raises:
        BadLine: the line is no UTF-8, no JSON or no object.
    """
    with contextlib.suppress(ValueError):
        if orjson is not None and isinstance(record := orjson.loads(raw), dict):
            return record
    # The standard library is slower, takes a little more, and says what is wrong.
    try:
        line = raw.decode()
    except UnicodeDecodeError as error:
        found = raw[error.start : error.start + 4].hex(" ")
        raise BadLine("invalid UTF-8", f"bytes {found} at byte {error.start + 1}") from error
    try:
        record = json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise BadLine("not valid JSON", f"{error}: {line[:60]!r}") from error
    if not isinstance(record, dict):
        raise BadLine("not a JSON object", f"found {type(record).__name__}: {line[:60]!r}")
    return record


def texts_of(record: dict[str, Any], key: str) -> list[str]:
    """Return the value of a key as a list of texts.

    Raises:
        BadLine: the key is missing, or holds something else than text.
    """
    if key not in record:
        raise BadLine("missing key", f"'{key}' among {', '.join(map(repr, list(record)[:8]))}")
    value = record[key]
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise BadLine("not a string", f"'{key}' is {type(text).__name__} {str(text)[:40]}")
    return texts


def read_range(block: FileRange) -> bytes:
    """Return the bytes of a range of a plain file."""
    with Path(block.path).open("rb") as file:
        file.seek(block.offset)
        data = file.read(block.length)
    if len(data) != block.length:
        raise OSError(f"{block.path}: the file has become shorter while it was read")
    return data
