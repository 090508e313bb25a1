"""Prompts of a checkpoint's model as token ids. Without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_llmjp.checkpoint.manifest import CONFIG
from megatron_llmjp.config.loading import load_config
from megatron_llmjp.errors import UserError
from megatron_llmjp.generation.checkpoints import (
    checkpoint_tokenizer,
    end_ids,
    ids_without_token,
)
from megatron_llmjp.tokenizers import Tokenizer


@dataclass(frozen=True)
class AllowedIds:
    """Ids that may be generated, and those that end a text.

    Attributes:
        end: ids that end a text, without being part of it.
        vocab_size: ids from this one on are never generated (padding of the vocabulary).
        excluded: further ids that are never generated.
    """

    end: frozenset[int]
    vocab_size: int
    excluded: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True)
class PromptEncoder:
    """The tokenizer of a model, and the limits of its prompts.

    Attributes:
        tokenizer: the tokenizer.
        allowed: ids that may be generated, and those that end a text.
        max_positions: largest number of tokens of a prompt and its continuation.
        add_bos: whether BOS is written before each prompt, also if the tokenizer does not.
    """

    tokenizer: Tokenizer
    allowed: AllowedIds
    max_positions: int
    add_bos: bool = False

    def encode(self, prompt: str, where: str = "prompt") -> list[int]:
        """Return the ids of a prompt.

        Raises:
            UserError: it is empty, too long, or cannot be encoded; begins with ``where``.
        """
        try:
            ids = self.tokenizer.encode(prompt).tolist()
        except ValueError as error:
            raise UserError(f"{where}: cannot be encoded: {error}") from error
        return self.check_ids(self._with_bos(ids), where)

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Write BOS if requested; a chat template may have written it a second time."""
        bos = self.tokenizer.bos_id
        if bos is not None and ids[:2] == [bos, bos]:
            return ids[1:]
        if not self.add_bos or ids[:1] == [bos]:
            return ids
        if bos is None:
            raise UserError(f"--add-bos: {self.tokenizer.kind} has no BOS token; omit the flag")
        return [bos, *ids]

    def check_ids(self, ids: list[int], where: str = "prompt") -> list[int]:
        """Check the ids of a prompt, and return them.

        Raises:
            UserError: there are none, too many, or one is outside the vocabulary.
        """
        limit, size = self.max_positions, self.allowed.vocab_size
        if not ids:
            raise UserError(
                f"{where}: is empty; expected at least one token (--add-bos starts with BOS)"
            )
        if len(ids) >= limit:
            raise UserError(
                f"{where}: has {len(ids)} tokens, but the model has {limit} positions for the "
                f"prompt and the continuation: shorten it to at most {limit - 1} tokens"
            )
        if wrong := [i for i in ids if not 0 <= i < size]:
            raise UserError(f"{where}: id {wrong[0]} is outside the vocabulary of {size} ids")
        return ids


def open_prompt_encoder(
    folder: Path, tokenizer: Tokenizer | None = None, add_bos: bool = False
) -> PromptEncoder:
    """Return the encoder of a native checkpoint.

    Args:
        folder: the checkpoint of one iteration.
        tokenizer: replaces the checkpoint's.
        add_bos: whether BOS is written before each prompt.

    Raises:
        UserError: the checkpoint has no tokenizer, or is damaged.
    """
    config = load_config(folder / CONFIG)
    tokenizer = tokenizer or checkpoint_tokenizer(folder, config)
    if tokenizer is None:
        raise UserError(
            f"{folder}: contains no tokenizer: give --tokenizer-type and --tokenizer-model"
        )
    # Ids of the tokenizer that the model was not trained with exist if it is a replacement.
    sizes = (tokenizer.vocab_size, config.padded_vocab_size, config.model.vocab_size)
    size = min(each for each in sizes if each is not None)
    allowed = AllowedIds(end_ids(folder, tokenizer), size, ids_without_token(tokenizer))
    return PromptEncoder(tokenizer, allowed, config.max_positions, add_bos)
