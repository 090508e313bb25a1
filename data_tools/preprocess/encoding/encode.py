"""Encoding of blocks of lines or rows to packed token arrays."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.document_sources.columns import DocumentSources, line_starts, own_id
from data_tools.preprocess.encoding.packed_documents import PackedDocuments
from data_tools.preprocess.encoding.packing import DocumentPacker
from data_tools.preprocess.encoding.text_counts import count_texts, language_of
from data_tools.preprocess.input.blocks import FileRange, TableRows
from data_tools.preprocess.input.json_lines import BadLine, parse_line, texts_of
from data_tools.preprocess.selection.document_hooks import DocumentHooks
from data_tools.preprocess.selection.document_records import Records, describe_documents
from data_tools.preprocess.selection.removal import LengthLimits, RemovedDocument, add_removed
from data_tools.statistics.counts import CountsByLanguage
from megatron_llmjp.data.indexed_dataset import best_dtype
from megatron_llmjp.tokenizers import Tokenizer

Documents = list[list[str]]  # per document its texts: one, or one per sentence


@dataclass(frozen=True)
class EncodingOptions:
    """Options of the encoding; with the tokenizer they determine the output.

    Attributes:
        keys: JSON keys, one dataset each.
        append_eod: append the end-of-document id to each document.
        append_bos: prepend the beginning-of-sequence id to each document.
        keep_empty: keep documents without tokens, as Megatron-LM does.
        limit: maximum length of a line in bytes.
        keep_raw: return rejected lines, for the quarantine.
        language_key: JSON key of a document's language, for statistics.
        hooks: functions that select and change documents.
        lengths: limits on the length of documents.
        record_dtype: dtype of the records of documents; None records none.
        record_sources: return the line and byte offset of each document.
        id_key: JSON key of a document's own id, returned with them.
    """

    keys: list[str]
    append_eod: bool
    keep_empty: bool
    limit: int
    keep_raw: bool
    append_bos: bool = False
    language_key: str = "lang"
    hooks: DocumentHooks | None = None
    lengths: LengthLimits = field(default_factory=LengthLimits)
    record_dtype: np.dtype[Any] | None = None
    record_sources: bool = False
    id_key: str | None = None

    @property
    def columns(self) -> list[str] | None:
        """Columns of a table to read; None for all, which hooks may use."""
        return self.keys if self.hooks is None else None

    @property
    def optional_columns(self) -> list[str]:
        """Columns of a table to read as well, if it has them."""
        return [self.language_key, *([self.id_key] if self.id_key is not None else [])]


@dataclass(frozen=True)
class RejectedLine:
    """A line that yields no document: its number in the block, the reason, and the line."""

    line: int
    reason: str
    detail: str
    raw: bytes


@dataclass
class EncodedBlock:
    """Result of encoding one block.

    Attributes:
        packed: documents per key.
        texts: counts of the documents by key and language.
        lines: number of lines in the block, including blank and rejected ones.
        empty: lines whose documents are kept although they have no text.
        invalid_id: first line with a token id outside the vocabulary, and that id.
        removed: documents that were removed on request, by reason.
        records: records of the documents by key, if they are recorded.
        starts: byte offset of each line in the block, while it is encoded.
        sources: sources of the documents, relative to the block, if they are recorded.
    """

    packed: dict[str, PackedDocuments] = field(default_factory=dict)
    texts: dict[str, CountsByLanguage] = field(default_factory=dict)
    lines: int = 0
    blank: int = 0
    rejected: list[RejectedLine] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    invalid_id: tuple[int, int] | None = None
    removed: dict[str, int] = field(default_factory=dict)
    records: dict[str, Records] = field(default_factory=dict)
    starts: npt.NDArray[np.int64] | None = None
    sources: DocumentSources | None = None


class BlockEncoder:
    """Encodes blocks of lines or rows with a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, encoding: EncodingOptions) -> None:
        self.tokenizer = tokenizer
        self.encoding = encoding
        self.dtype = best_dtype(tokenizer.vocab_size)
        self._packer = DocumentPacker(
            tokenizer, self.dtype, encoding.append_eod, encoding.append_bos
        )

    def encode(self, payload: FileRange | bytes | TableRows) -> EncodedBlock:
        """Return the packed documents of a block, and its rejected lines."""
        try:
            return self._encode(payload, check_each_text=False)
        except ValueError:  # the tokenizer rejects a text: find out which one
            return self._encode(payload, check_each_text=True)

    def _encode(
        self, payload: FileRange | bytes | TableRows, check_each_text: bool
    ) -> EncodedBlock:
        result = EncodedBlock()
        documents: dict[str, Documents] = {key: [] for key in self.encoding.keys}
        lines: list[int] = []  # line number of each document
        languages: list[str] = []
        ids: dict[int, str] = {}  # own id of each document, by line number
        for number, record, raw in self._records(payload, result):
            try:
                fields, language, ids[number] = self._texts_by_key(record, raw, check_each_text)
            except RemovedDocument as removed:
                add_removed(result.removed, {removed.reason: 1})
                continue
            except BadLine as bad:
                kept = self._raw_line(record, raw)
                result.rejected.append(RejectedLine(number, bad.reason, bad.detail, kept))
                continue
            if not any(map(any, fields.values())):
                result.empty.append(number)
            lines.append(number)
            languages.append(language)
            for key, texts in fields.items():
                documents[key].append(texts)
        for key, of_key in documents.items():
            result.packed[key], wrong = self._pack_documents(of_key)
            if wrong is not None and result.invalid_id is None:
                result.invalid_id = (lines[wrong[0]], wrong[1])
        if self.encoding.lengths.on_tokens:
            lines, languages = self._limit_tokens(result, documents, lines, languages)
        for key, of_key in documents.items():
            lengths = result.packed[key].document_lengths()
            result.texts[key] = count_texts(of_key, languages, lengths)
        if (dtype := self.encoding.record_dtype) is not None:
            result.records = describe_documents(
                payload, read_range, lines, documents, languages, dtype
            )
        if self.encoding.record_sources:
            own_ids = [ids[line] for line in lines] if self.encoding.id_key is not None else []
            result.sources = DocumentSources.of_lines(lines, result.starts, own_ids)
            result.starts = None
        return result

    def _limit_tokens(
        self,
        result: EncodedBlock,
        documents: dict[str, Documents],
        lines: list[int],
        languages: list[str],
    ) -> tuple[list[int], list[str]]:
        """Remove too short and too long documents; return the lines and languages of the others."""
        lengths = sum(packed.document_lengths() for packed in result.packed.values())
        kept, removed = self.encoding.lengths.check_tokens(np.asarray(lengths))
        if not removed:
            return lines, languages
        add_removed(result.removed, removed)
        chosen = np.flatnonzero(kept)
        for key, of_key in documents.items():
            result.packed[key] = result.packed[key].take(chosen)
            documents[key] = [of_key[at] for at in chosen]
        left = {lines[at]: languages[at] for at in chosen}
        result.empty = [line for line in result.empty if line in left]
        return list(left), list(left.values())

    def _raw_line(self, record: Any, raw: bytes) -> bytes:
        """Return a rejected line if it is to be kept; a table row is converted to JSON."""
        if not self.encoding.keep_raw:
            return b""
        return raw if record is None else json.dumps(record, default=str).encode()

    def _records(
        self, payload: FileRange | bytes | TableRows, result: EncodedBlock
    ) -> Iterator[tuple[int, Any, bytes]]:
        """Yield line number, record (a dict for rows, None for lines) and raw line; count lines."""
        if isinstance(payload, TableRows):
            result.lines = payload.count
            for at in range(payload.count):
                yield at, {key: column[at] for key, column in payload.columns.items()}, b""
            return
        lines = (read_range(payload) if isinstance(payload, FileRange) else payload).split(b"\n")
        if not lines[-1]:
            lines.pop()
        result.lines = len(lines)
        if self.encoding.record_sources:
            result.starts = line_starts(lines)
        for at, line in enumerate(lines):
            if line and not line.isspace():
                yield at, None, line
            else:
                result.blank += 1

    def _texts_by_key(
        self, record: Any, raw: bytes, check_each_text: bool
    ) -> tuple[dict[str, list[str]], str, str]:
        """Return the texts of each key, the language of the document, and its own id.

        Raises:
            BadLine: the line yields no document.
        """
        if len(raw) > self.encoding.limit:
            raise BadLine("line too long", f"{len(raw):,} bytes")
        is_row = record is not None
        record = record if is_row else parse_line(raw)
        key = self.encoding.id_key
        document_id = "" if key is None else own_id(record, key)
        if self.encoding.hooks is not None:
            record = self.encoding.hooks.apply(record)
        fields = {key: texts_of(record, key) for key in self.encoding.keys}
        if (
            is_row
            and (size := sum(map(len, itertools.chain(*fields.values())))) > self.encoding.limit
        ):
            raise BadLine("line too long", f"{size:,} characters")
        if not self.encoding.keep_empty and not any(map(any, fields.values())):
            raise BadLine("empty document")
        if self.encoding.lengths.on_characters:
            self.encoding.lengths.check_characters(itertools.chain(*fields.values()))
        for text in (text for texts in fields.values() for text in texts if check_each_text):
            try:
                self.tokenizer.encode(text)
            except UnicodeEncodeError as error:
                found = f"\\u{ord(text[error.start]):04x}"
                raise BadLine(
                    "lone surrogate", f"{found} at character {error.start + 1}"
                ) from error
            except ValueError as error:
                raise BadLine("not encodable", str(error)) from error
        return fields, language_of(record, self.encoding.language_key), document_id

    def _pack_documents(
        self, documents: Documents
    ) -> tuple[PackedDocuments, tuple[int, int] | None]:
        """Encode and pack documents, as :meth:`DocumentPacker.pack`."""
        ids = self.tokenizer.encode_batch(list(itertools.chain.from_iterable(documents)))
        return self._packer.pack(ids, np.fromiter(map(len, documents), np.int64, len(documents)))


def read_range(block: FileRange) -> bytes:
    """Return the bytes of a range of a plain file."""
    with Path(block.path).open("rb") as file:
        file.seek(block.offset)
        data = file.read(block.length)
    if len(data) != block.length:
        raise OSError(f"{block.path}: the file was truncated while it was being read")
    return data
