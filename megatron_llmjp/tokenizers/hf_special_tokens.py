"""The special tokens that transformers adds around a text.

They follow from the tokenizer.json's template, from ``add_bos_token`` and ``add_eos_token`` of its
configuration and from the tokenizer's class, differently from release to release. So transformers
itself encodes a few texts, which takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from megatron_llmjp.errors import UserError

PROBES = ("a", "Hello world.\n 1,234", "吾輩は猫である。")


class Added(NamedTuple):
    """Ids before and after each text."""

    before: list[int]
    after: list[int]


def find_added(path: Path, plain: list[list[int]]) -> Added:
    """Return what ``AutoTokenizer`` adds to a text.

    Args:
        path: a tokenizer.json, or a folder that transformers reads.
        plain: this program's ids of PROBES, without added tokens.

    Raises:
        UserError: transformers cannot read the tokenizer, or gives other ids of the text itself.
    """
    theirs = _load(path)
    found = {_split(theirs, text, ids, path) for text, ids in zip(PROBES, plain, strict=True)}
    if len(found) != 1:
        raise UserError(f"{path}: transformers adds different special tokens to different texts")
    before, after = found.pop()
    return Added(list(before), list(after))


def _split(
    theirs: Any, text: str, plain: list[int], path: Path
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids before and after those of the text."""
    encoded = theirs(text, return_special_tokens_mask=True)
    ids, mask = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    start = mask.index(0) if 0 in mask else len(ids)
    end = start + len(plain)
    if ids[start:end] != plain or not all(mask[:start] + mask[end:]):
        raise UserError(
            f"{path}: transformers' {type(theirs).__name__} gives other ids of {text!r} "
            f"({ids}) than the tokenizer.json ({plain}): special tokens cannot be included. Leave "
            "--tokenizer-hf-include-special-tokens out, and give --append-bos where texts begin "
            "with it"
        )
    return tuple(ids[:start]), tuple(ids[end:])


def _load(path: Path) -> Any:
    try:
        import transformers

        if path.is_dir():
            return transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # many kinds, from many places
        raise UserError(
            f"{path}: transformers cannot read it ({str(error).splitlines()[0]}), which "
            "--tokenizer-hf-include-special-tokens needs"
        ) from error
