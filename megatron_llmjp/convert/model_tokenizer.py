"""The tokenizer of a converted model: its files, its type and its end of text.

The files of a tokenizer in a folder; they travel with a model byte for byte.

The tokenizer of a converted model: which files, of which type, with which end of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_llmjp.config.megatron_flags import RENAMED_VALUES
from megatron_llmjp.convert.formats.base import ConversionOptions, SourceCheckpoint
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers import TOKENIZER_TYPES, Tokenizer, load_tokenizer
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
"""SentencePiece models, and both files of GPT2BPETokenizer, under names of their own."""


def tokenizer_files(folder: Path | None) -> dict[str, Path]:
    """Return the tokenizer files of a folder by name, in order of their names.

    Args:
        folder: of the tokenizer, or a single file.

    Raises:
        UserError: nothing of this name is there.
    """
    if folder is None:
        return {}
    if folder.is_file():
        return {folder.name: folder}
    if not folder.is_dir():
        raise UserError(f"{folder}: no tokenizer is there; give a folder or a file")
    paths = [path for pattern in TOKENIZER_FILE_PATTERNS for path in folder.glob(pattern)]
    paths += [folder / name for name in TOKENIZER_FILES]
    return {path.name: path for path in sorted(set(paths)) if path.is_file()}


WITHOUT_FILES = ("NullTokenizer", "ByteLevelTokenizer")
_SENTENCE_ENDS = ("</s>", "</s|LLM-jp>")
END_OF_DOCUMENT_TOKENS = {
    "SentencePieceTokenizer": ("<EOD>", "<EOD|LLM-jp>", *_SENTENCE_ENDS),
    "GPTSentencePieceTokenizer": _SENTENCE_ENDS,
    "Llama2Tokenizer": _SENTENCE_ENDS,
    "GPT2BPETokenizer": ("<|endoftext|>",),
    "TikTokenizer": ("</s>",),
}
"""What ends a document by type, as a tokenizer.json of the same vocabulary spells it."""
_NAMES = {
    **{name.lower(): name for name in TOKENIZER_TYPES},
    **RENAMED_VALUES["tokenizer_type"],
    "hftokenizer": "HuggingFaceTokenizer",
    "pretrainedfromhf": "HuggingFaceTokenizer",
}
"""Types by their names in lower case, Megatron-DeepSpeed's among them."""


@dataclass(frozen=True)
class ModelTokenizer:
    """A tokenizer with what is known of it.

    Attributes:
        kind: the type that a run or the user names; None where neither does.
        files: what is copied, by name.
        tokenizer: the files as they are read; None where there is none.
        eod_id: the id that ends a document.
        decides: whether the type is known, or the user gave the files, so that the end of text
            follows from them whatever else the source says.
        notes, warnings: for the user.
    """

    kind: str | None
    files: Mapping[str, Path]
    tokenizer: Tokenizer | None
    eod_id: int | None
    decides: bool
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def token_ids(self, rows: int) -> dict[str, int]:
        """Return ``bos_token_id``, ``eos_token_id``, ``pad_token_id`` as far as there are any."""
        if self.tokenizer is None:
            return {}
        found = {"bos": self.tokenizer.bos_id, "eos": self.eod_id, "pad": self.tokenizer.pad_id}
        return {f"{k}_token_id": i for k, i in found.items() if i is not None and i < rows}


def open_tokenizer(
    source: SourceCheckpoint, options: ConversionOptions, rows: int
) -> ModelTokenizer:
    """Return the tokenizer of a conversion: the one the user gave, or the source's own.

    Args:
        source: the checkpoint, with its tokenizer's type where that is known.
        options: ``--tokenizer`` and ``--tokenizer-type``.
        rows: of the vocabulary in the output.

    Raises:
        UserError: there is none where one was given; it does not fit its type or the model; or it
            gives other ids than the run's own.
    """
    given = options.tokenizer is not None
    own_kind = run_tokenizer_type(source)
    kind, notes = _kind(source, options, own_kind)
    path = options.tokenizer or source.tokenizer
    files = tokenizer_files(path)
    tokenizer = _load(path, kind, source)
    if given and tokenizer is None:
        raise UserError(
            f"--tokenizer {path}: holds no tokenizer; expected tokenizer.json, a SentencePiece "
            "*.model, vocab.json with merges.txt, or tiktoken.json"
        )
    if tokenizer is not None:
        files = _renamed(files, tokenizer.files())
    read_as = None if own_kind == "NullTokenizer" else own_kind  # its ids may mean anything
    own = _load(source.tokenizer, read_as, source) if given else None
    eod, problems = _end_of_document(kind, tokenizer, own)
    warnings = _check_vocabulary(source, options, tokenizer, rows) + problems
    if own is not None and tokenizer is not None:
        warnings += _check_same(own, tokenizer, options)
    if kind is None and tokenizer is not None and (given or source.generation is None):
        notes.append(
            f"the type of the run's tokenizer is not known: {tokenizer.kind} was assumed, which "
            f"ends text with {_spelled(tokenizer, eod)}; --tokenizer-type names another"
        )
    return ModelTokenizer(
        kind, files, tokenizer, eod, given or kind is not None, tuple(notes), tuple(warnings)
    )


def run_tokenizer_type(source: SourceCheckpoint) -> str | None:
    """The type that the run names, if it is known here."""
    return _NAMES.get((source.tokenizer_type or "").lower())


def _kind(
    source: SourceCheckpoint, options: ConversionOptions, own: str | None
) -> tuple[str | None, list[str]]:
    """The type that the user or the run names, and notes.

    Raises:
        UserError: the user names a type that has no files, and files.
    """
    named, asked = source.tokenizer_type, options.tokenizer_type
    path = options.tokenizer or source.tokenizer
    if asked in WITHOUT_FILES and options.tokenizer is not None:
        raise UserError(f"--tokenizer-type {asked} reads no files: leave --tokenizer out")
    if asked is not None:
        other = named is not None and own not in (asked, "NullTokenizer")
        note = f"--tokenizer-type {asked} was taken in place of the run's {named}"
        return asked, [note] if other else []
    if named is not None and own is None:
        return None, [f"the run's tokenizer type {named} is not known here"]
    if own in WITHOUT_FILES and path is not None:
        return None, [f"the run's type is {own}, which has no files"]
    return own, []


def _load(path: Path | None, kind: str | None, source: SourceCheckpoint) -> Tokenizer | None:
    """Read the tokenizer of a folder or file as a type, or as the first that fits.

    Raises:
        UserError: the files are damaged, or are not of the type.
    """
    size = source.model.vocab_size
    if kind == "NullTokenizer":  # its end of document is the last id
        return None if size is None else load_tokenizer(kind, None, vocab_size=size - 1)
    if kind == "ByteLevelTokenizer":
        return load_tokenizer(kind, None)
    fields = None if path is None else _fields(path, kind)
    if fields is None:
        return None
    return load_tokenizer(
        fields["tokenizer_type"],
        fields["tokenizer_model"],
        merge_file=fields.get("merge_file"),
        vocab_size=size,
        tiktoken=source.tiktoken,
    )


def _fields(path: Path, kind: str | None) -> Mapping[str, str] | None:
    """The settings that read a folder or file; None where it holds no tokenizer.

    Raises:
        UserError: it holds a tokenizer of another type.
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


def _renamed(files: Mapping[str, Path], read: Mapping[str, Path]) -> dict[str, Path]:
    """Return files by name; those that a tokenizer reads under the names it gives them."""
    others = {name: path for name, path in files.items() if path not in read.values()}
    return {**others, **read}


def _end_of_document(
    kind: str | None, tokenizer: Tokenizer | None, own: Tokenizer | None
) -> tuple[int | None, list[str]]:
    """The id that ended the run's documents, and warnings."""
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
        f"{kind} ends a document with {' or '.join(END_OF_DOCUMENT_TOKENS[kind][:1])}, which "
        f"{tokenizer.json_file} does not have: {_spelled(tokenizer, tokenizer.eod_id)} was taken"
    ]


def _check_vocabulary(
    source: SourceCheckpoint, options: ConversionOptions, tokenizer: Tokenizer | None, rows: int
) -> list[str]:
    """Compare the tokenizer's ids with the model's vocabulary; returns warnings.

    Raises:
        UserError: it has more than the model.
    """
    if tokenizer is None:
        return []
    given, true = options.tokenizer is not None, source.model.vocab_size
    limit = true if given and true is not None else rows
    processor = getattr(tokenizer, "processor", None)  # without what SentencePieceTokenizer adds
    size = processor.get_piece_size() if processor is not None else tokenizer.vocab_size
    if size > limit:
        raise UserError(
            f"{options.tokenizer or source.tokenizer}: a tokenizer of {size} tokens, the model has "
            f"{limit}: it belongs to another model"
        )
    padded = source.generation is not None  # Hugging Face's vocab_size counts padding
    if (given or not padded) and true is not None and tokenizer.vocab_size < true:
        return [
            f"{options.tokenizer or source.tokenizer or tokenizer.kind} has "
            f"{tokenizer.vocab_size} ids, the model's vocabulary {true}: the model may generate "
            "ids that have no text"
        ]
    return []


def _check_same(own: Tokenizer, given: Tokenizer, options: ConversionOptions) -> list[str]:
    """Compare the ids of the given tokenizer with those of the run's own; returns warnings.

    Raises:
        UserError: ordinary texts have other ids.
    """
    from megatron_llmjp.tokenizers.comparison import COMMON_TEXTS, RARE_TEXTS, compare_tokenizers

    names = ("the run's own", "--tokenizer")
    found = compare_tokenizers(own, given, COMMON_TEXTS, names)
    if found.differences:
        raise UserError(
            f"--tokenizer {options.tokenizer}: gives other ids than the tokenizer that the model "
            f"was trained with. {found.report()}\n  Leave --tokenizer out to export the run's own"
        )
    warnings = []
    rare = compare_tokenizers(own, given, RARE_TEXTS, names)
    if rare.differences:
        warnings.append(f"--tokenizer {options.tokenizer}: rare texts differ. {rare.report()}")
    if own.kind == given.kind and own.eod_id != given.eod_id:
        warnings.append(
            f"--tokenizer {options.tokenizer} ends text with {_spelled(given, given.eod_id)}, the "
            f"run's documents ended with {_spelled(own, own.eod_id)}"
        )
    return warnings


def _spelled(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "nothing" if token_id is None else f"{tokenizer.piece(token_id)} ({token_id})"
