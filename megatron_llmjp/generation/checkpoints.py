"""Native checkpoint of a path, its tokenizer, and the ids that end a text. Without torch."""

from __future__ import annotations

from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint.save_folder import find_foreign_checkpoint, list_checkpoints
from megatron_llmjp.config.loading import load_config, replace_fields
from megatron_llmjp.config.schema import Config
from megatron_llmjp.config.tokenizer_types import find_tokenizer_type
from megatron_llmjp.convert.formats.hugging_face.generation import (
    EOS,
    as_list,
    read_stored_generation,
)
from megatron_llmjp.errors import UserError, download_hint
from megatron_llmjp.run_data import load_run_tokenizer
from megatron_llmjp.tokenizers import Tokenizer
from megatron_llmjp.tokenizers.registry import stored_tokenizer_fields

TYPES_WITHOUT_FILES = ("NullTokenizer", "ByteLevelTokenizer")


def find_native_checkpoint(path: Path) -> Path:
    """Return the checkpoint of one iteration: the path itself, or the newest one in it.

    Raises:
        UserError: there is none; for a checkpoint of another program, with the command that
            converts it.
    """
    if not path.is_dir():
        what = "is a file; expected the folder of a checkpoint" if path.exists() else ""
        raise UserError(f"{path}: {what or 'does not exist' + download_hint(path)}")
    if (path / manifests.MANIFEST).is_file() or manifests.complete_iterations(path):
        return manifests.newest_checkpoint(path)
    try:
        foreign = find_foreign_checkpoint(path)
        lost = list_checkpoints(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if foreign is not None:
        output = f"{str(path).rstrip('/')}-native"
        raise UserError(
            f"{foreign.folder} is {foreign.title}, expected a native checkpoint. Convert it, and "
            f"load {output}:\n  convert_checkpoint --from {foreign.format} --to native "
            f"--input {foreign.folder} --output {output}"
        )
    if lost:
        raise UserError(f"{lost[-1].folder} is {lost[-1].title}, so it may be incomplete")
    return manifests.newest_checkpoint(path)


def checkpoint_tokenizer(folder: Path, config: Config | None = None) -> Tokenizer | None:
    """Load the tokenizer that a checkpoint stores; None if it has none.

    Args:
        folder: the checkpoint of one iteration.
        config: its configuration, if it has been read.

    Raises:
        UserError: its files are damaged.
    """
    config = config or load_config(folder / manifests.CONFIG)
    stored = config.data.tokenizer_type
    kind = None if stored is None else find_tokenizer_type(stored)
    files = folder / manifests.TOKENIZER
    fields: dict[str, str] = {}
    if kind not in TYPES_WITHOUT_FILES and files.is_dir():
        fields = stored_tokenizer_fields(files, kind) or stored_tokenizer_fields(files)
    if not fields:
        return load_run_tokenizer(config) if kind in TYPES_WITHOUT_FILES else None
    return load_run_tokenizer(replace_fields(config, **fields))


def end_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that end a text: the end of document, and those of a converted model.

    Raises:
        UserError: the stored generation settings are damaged.
    """
    ids = {tokenizer.eod_id}
    stored = read_stored_generation(folder / manifests.GENERATION)
    if stored is not None:
        ids.update(as_list(stored.token_ids.get(EOS)))
        ids.update(as_list((stored.config or {}).get(EOS)))
    return frozenset(ids)


def ids_without_token(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids in gaps of a Hugging Face tokenizer's vocabulary."""
    fast = getattr(tokenizer, "tokenizer", None)
    if fast is None:
        return frozenset()
    known = set(fast.get_vocab(with_added_tokens=True).values())
    return frozenset(i for i in range(tokenizer.vocab_size) if i not in known)
