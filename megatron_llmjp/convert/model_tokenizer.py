"""Tokenizer of a converted model: its files, its type and its end-of-document token.

The tokenizer's files are copied unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_llmjp.config.tokenizer_types import find_tokenizer_type
from megatron_llmjp.convert.formats.base import ConversionOptions, SourceCheckpoint
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers import Tokenizer, load_tokenizer
from megatron_llmjp.tokenizers.hugging_face import HuggingFaceTokenizer
from megatron_llmjp.tokenizers.registry import SENTENCEPIECE_TYPES, stored_tokenizer_fields

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tiktoken.json",
    "chat_template.jinja",
    "chat_template.json",
)
TOKENIZER_FILE_PATTERNS = ("*.model", "*vocab*.json", "*merges*.txt")
"""SentencePiece models and the files of GPT2BPETokenizer with other names."""

TYPES_WITHOUT_FILES = ("NullTokenizer", "ByteLevelTokenizer")
_SENTENCEPIECE_EOS = ("</s>", "</s|LLM-jp>")
END_OF_DOCUMENT_TOKENS = {
    "SentencePieceTokenizer": ("<EOD>", "<EOD|LLM-jp>", *_SENTENCEPIECE_EOS),
    "GPTSentencePieceTokenizer": _SENTENCEPIECE_EOS,
    "Llama2Tokenizer": _SENTENCEPIECE_EOS,
    "GPT2BPETokenizer": ("<|endoftext|>",),
    "TikTokenizer": ("</s>",),
}
"""End-of-document tokens by tokenizer type, as in a tokenizer.json of the same vocabulary."""
_HUGGING_FACE_NAMES = ("hftokenizer", "pretrainedfromhf")
"""Names of HuggingFaceTokenizer in the arguments of Megatron-DeepSpeed, in lower case."""


def tokenizer_files(folder: Path | None) -> dict[str, Path]:
    """Return the tokenizer files of a folder by name, sorted by name.

    Args:
        folder: folder of the tokenizer, or a single file.

    Raises:
        UserError: the folder does not exist.
    """
    if folder is None:
        return {}
    if folder.is_file():
        return {folder.name: folder}
    if not folder.is_dir():
        raise UserError(f"{folder}: does not exist; give the folder or the file of a tokenizer")
    paths = [path for pattern in TOKENIZER_FILE_PATTERNS for path in folder.glob(pattern)]
    paths += [folder / name for name in TOKENIZER_FILES]
    return {path.name: path for path in sorted(set(paths)) if path.is_file()}


@dataclass(frozen=True)
class ModelTokenizer:
    """The tokenizer of a converted model.

    Attributes:
        kind: tokenizer type of the run or given by the user; None if unknown.
        files: files to copy, by name.
        tokenizer: the tokenizer loaded from the files; None if there is none.
        eod_id: end-of-document id.
        overrides_eod: whether ``eod_id`` overrides the source's settings, because the type is known
            or the user gave the files.
        notes, warnings: messages for the user.
    """

    kind: str | None
    files: Mapping[str, Path]
    tokenizer: Tokenizer | None
    eod_id: int | None
    overrides_eod: bool
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def token_ids(self, padded_vocab_size: int) -> dict[str, int]:
        """Return ``bos_token_id``, ``eos_token_id``, ``pad_token_id``, those that are defined."""
        if self.tokenizer is None:
            return {}
        found = {"bos": self.tokenizer.bos_id, "eos": self.eod_id, "pad": self.tokenizer.pad_id}
        return {
            f"{k}_token_id": i for k, i in found.items() if i is not None and i < padded_vocab_size
        }


def open_tokenizer(
    source: SourceCheckpoint, options: ConversionOptions, padded_vocab_size: int
) -> ModelTokenizer:
    """Return the tokenizer of a conversion: given by the user, or the source's own.

    Args:
        source: the checkpoint.
        options: ``--tokenizer`` and ``--tokenizer-type``.
        padded_vocab_size: padded vocabulary size of the output.

    Raises:
        UserError: the given folder contains no tokenizer; the tokenizer does not match its type or
            the model; or its ids differ from those of the run's own tokenizer.
    """
    given = options.tokenizer is not None
    own_kind = run_tokenizer_type(source)
    kind, notes = _select_type(source, options, own_kind)
    path = options.tokenizer or source.tokenizer
    files = tokenizer_files(path)
    tokenizer = _load_files(path, kind, source)
    if given and tokenizer is None:
        raise UserError(
            f"{options.tokenizer_flag}: contains no tokenizer; expected tokenizer.json, a "
            "SentencePiece *.model, vocab.json with merges.txt, or tiktoken.json"
        )
    if tokenizer is not None:
        files = _rename_files(files, tokenizer.files())
    read_as = None if own_kind == "NullTokenizer" else own_kind  # its ids have no text
    own = _load_files(source.tokenizer, read_as, source) if given else None
    eod, problems = _end_of_document(kind, tokenizer, own)
    warnings = _check_vocabulary(source, options, tokenizer, padded_vocab_size) + problems
    if own is not None and tokenizer is not None:
        warnings += _compare_with_own(own, tokenizer, options)
    if kind is None and tokenizer is not None and (given or source.generation is None):
        notes.append(
            f"the run's tokenizer type is unknown: assumed {tokenizer.kind}, with the "
            f"end-of-document token {_token_and_id(tokenizer, eod)}; override it with "
            "--tokenizer-type"
        )
    return ModelTokenizer(
        kind, files, tokenizer, eod, given or kind is not None, tuple(notes), tuple(warnings)
    )


def run_tokenizer_type(source: SourceCheckpoint) -> str | None:
    """Return the tokenizer type of the run, or None if it is unknown."""
    name = source.tokenizer_type or ""
    if name.lower() in _HUGGING_FACE_NAMES:
        return "HuggingFaceTokenizer"
    return find_tokenizer_type(name)


def _select_type(
    source: SourceCheckpoint, options: ConversionOptions, own: str | None
) -> tuple[str | None, list[str]]:
    """Return the tokenizer type given by the user or stored by the run, and notes.

    Raises:
        UserError: the user gave both files and a type without files.
    """
    stored, requested = source.tokenizer_type, options.tokenizer_type
    path = options.tokenizer or source.tokenizer
    if requested in TYPES_WITHOUT_FILES and options.tokenizer is not None:
        raise UserError(f"--tokenizer-type {requested} has no files: omit --tokenizer")
    if requested is not None:
        other = stored is not None and own not in (requested, "NullTokenizer")
        note = f"--tokenizer-type {requested} replaces the run's {stored}"
        return requested, [note] if other else []
    if stored is not None and own is None:
        return None, [f"the run's tokenizer type {stored} is not supported"]
    if own in TYPES_WITHOUT_FILES and path is not None:
        return None, [f"the run's tokenizer type is {own}, which has no files"]
    return own, []


def _load_files(path: Path | None, kind: str | None, source: SourceCheckpoint) -> Tokenizer | None:
    """Load the tokenizer of a folder or file; without a type, it follows from the files.

    Raises:
        UserError: the files are damaged or belong to another type.
    """
    size = source.model.vocab_size
    if kind == "NullTokenizer":  # its end of document is the last id
        return None if size is None else load_tokenizer(kind, None, vocab_size=size - 1)
    if kind == "ByteLevelTokenizer":
        return load_tokenizer(kind, None)
    fields = None if path is None else _loading_settings(path, kind)
    if fields is None:
        return None
    kind, model = fields["tokenizer_type"], fields["tokenizer_model"]
    return load_tokenizer(kind, model, vocab_size=size, tiktoken=source.tiktoken)


def _loading_settings(path: Path, kind: str | None) -> Mapping[str, str] | None:
    """Return the settings that load a folder or file; None if it contains no tokenizer.

    Raises:
        UserError: the folder contains a tokenizer of another type.
    """
    if path.is_file():
        if path.suffix == ".json" and kind in (None, *SENTENCEPIECE_TYPES):
            kind = "HuggingFaceTokenizer"
        return {"tokenizer_type": kind or SENTENCEPIECE_TYPES[0], "tokenizer_model": str(path)}
    if found := stored_tokenizer_fields(path, kind):
        return found
    other = stored_tokenizer_fields(path)
    if not other:
        return None
    if other["tokenizer_type"] == "HuggingFaceTokenizer":
        return other  # the same vocabulary for transformers
    raise UserError(
        f"{path}: the run's tokenizer is of type {kind}, found {other['tokenizer_model']}; give "
        f"its files, or --tokenizer-type {other['tokenizer_type']} if the run was trained with it"
    )


def _rename_files(files: Mapping[str, Path], read: Mapping[str, Path]) -> dict[str, Path]:
    """Return files by name; files that a tokenizer reads get the names that it defines."""
    others = {name: path for name, path in files.items() if path not in read.values()}
    return {**others, **read}


def _end_of_document(
    kind: str | None, tokenizer: Tokenizer | None, own: Tokenizer | None
) -> tuple[int | None, list[str]]:
    """Return the end-of-document id of the run, and warnings."""
    if tokenizer is None:
        return None, []
    if kind is None or tokenizer.kind == kind:
        return tokenizer.eod_id, []
    if own is not None and own.kind == kind:
        return own.eod_id, []
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    ids = [tokenizer.tokenizer.token_to_id(name) for name in END_OF_DOCUMENT_TOKENS.get(kind, ())]
    found = next((i for i in ids if i is not None), None)
    if found is not None:
        return found, []
    return tokenizer.eod_id, [
        f"{kind} ends a document with {END_OF_DOCUMENT_TOKENS[kind][0]}, which "
        f"{tokenizer.json_file} does not contain: using "
        f"{_token_and_id(tokenizer, tokenizer.eod_id)}"
    ]


def _check_vocabulary(
    source: SourceCheckpoint,
    options: ConversionOptions,
    tokenizer: Tokenizer | None,
    padded_vocab_size: int,
) -> list[str]:
    """Compare the tokenizer's size with the model's vocabulary; return warnings.

    Raises:
        UserError: the tokenizer has more tokens than the model.
    """
    if tokenizer is None:
        return []
    given, true = options.tokenizer is not None, source.model.vocab_size
    limit = true if given and true is not None else padded_vocab_size
    processor = getattr(
        tokenizer, "processor", None
    )  # without the tokens that SentencePieceTokenizer adds
    size = processor.get_piece_size() if processor is not None else tokenizer.vocab_size
    if size > limit:
        raise UserError(
            f"{options.tokenizer or source.tokenizer}: the tokenizer has {size} tokens, the model "
            f"has {limit}; give the tokenizer of this model"
        )
    padded = source.generation is not None  # Hugging Face's vocab_size counts padding
    if (given or not padded) and true is not None and tokenizer.vocab_size < true:
        return [
            f"{options.tokenizer or source.tokenizer or tokenizer.kind} has "
            f"{tokenizer.vocab_size} ids, the model's vocabulary {true}: the model may generate "
            "ids without text"
        ]
    return []


def _compare_with_own(own: Tokenizer, given: Tokenizer, options: ConversionOptions) -> list[str]:
    """Compare the ids of the given tokenizer with those of the run's own; return warnings.

    Raises:
        UserError: the ids of an ordinary text differ.
    """
    from megatron_llmjp.tokenizers.comparison import COMMON_TEXTS, RARE_TEXTS, compare_tokenizers

    flag = options.tokenizer_flag
    names = ("the run's own", flag.split()[0])
    found = compare_tokenizers(own, given, COMMON_TEXTS, names)
    if found.differences:
        raise UserError(
            f"{flag}: its ids differ from those of the tokenizer that the model was trained with. "
            f"{found.report()}\n  Omit {names[1]} to export the run's own"
        )
    warnings = []
    rare = compare_tokenizers(own, given, RARE_TEXTS, names)
    if rare.differences:
        warnings.append(f"{flag}: the ids of rare texts differ. {rare.report()}")
    if own.kind == given.kind and own.eod_id != given.eod_id:
        warnings.append(
            f"{flag}: its end-of-document token is "
            f"{_token_and_id(given, given.eod_id)}, the run's is {_token_and_id(own, own.eod_id)}"
        )
    return warnings


def _token_and_id(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "nothing" if token_id is None else f"{tokenizer.piece(token_id)} ({token_id})"
