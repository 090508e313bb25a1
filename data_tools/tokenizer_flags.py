"""Tokenizer flags of the data tools."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from megatron_llmjp.arguments import positive_int
from megatron_llmjp.config.tokenizer_types import TOKENIZER_TYPES, find_tokenizer_type
from megatron_llmjp.tokenizers import Tokenizer, load_tokenizer
from megatron_llmjp.tokenizers.base import TikTokenSettings

_DEFAULTS = TikTokenSettings()


def add_tokenizer_flags(add: Callable[..., Any], required: bool = True, use: str = "") -> None:
    """Add the tokenizer flags.

    Args:
        add: ``add_argument`` of a parser or group.
        required: whether ``--tokenizer-type`` must be given.
        use: purpose of the tokenizer, prepended to the help text.
    """
    types = ", ".join(TOKENIZER_TYPES)
    add(
        "--tokenizer-type",
        required=required,
        type=_parse_tokenizer_type,
        metavar="TYPE",
        help=f"{use}{types}",
    )
    add("--tokenizer-model", metavar="PATH", help="model file or folder of the tokenizer")
    add("--vocab-file", metavar="FILE", help="vocabulary of GPT2BPETokenizer, or a *.model")
    add("--merge-file", metavar="FILE", help="merges of GPT2BPETokenizer")
    add(
        "--vocab-size",
        type=positive_int,
        metavar="N",
        help="vocabulary size of NullTokenizer; of TikTokenizer, including special tokens "
        "(default: 131072, or all)",
    )
    add(
        "--tiktoken-pattern",
        choices=("v1", "v2"),
        default=_DEFAULTS.pattern,
        help="pattern by which TikTokenizer splits texts (default: v2)",
    )
    add(
        "--tiktoken-num-special-tokens",
        type=positive_int,
        default=_DEFAULTS.num_special_tokens,
        metavar="N",
        help="number of TikTokenizer's special tokens, before its file's tokens (default: 1000)",
    )
    add(
        "--tiktoken-special-tokens",
        "--tokenizer-special-tokens",
        nargs="+",
        default=(),
        metavar="TOKEN",
        help="names of TikTokenizer's first special tokens (default: <unk> <s> </s>)",
    )


def _parse_tokenizer_type(word: str) -> str:
    """Parse a tokenizer type as pretrain_gpt does: in any case, or Megatron-DeepSpeed's name."""
    return find_tokenizer_type(word) or word


def tokenizer_from_args(args: argparse.Namespace) -> Tokenizer:
    """Load the tokenizer given by the flags.

    Raises:
        UserError: a value or a file is invalid.
    """
    return load_tokenizer(
        args.tokenizer_type,
        args.tokenizer_model or args.vocab_file,
        vocab_size=args.vocab_size,
        merge_file=args.merge_file,
        tiktoken=TikTokenSettings(
            args.tiktoken_pattern,
            args.tiktoken_num_special_tokens,
            tuple(args.tiktoken_special_tokens),
        ),
    )
