"""Recipe of a dataset: everything that decides its bytes, recorded in the journal and manifest."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from data_tools.preprocess.encoding.encode import EncodingOptions
from data_tools.preprocess.encoding.text_counts import DEFAULT_LANGUAGE_KEY
from data_tools.preprocess.input.sources import InputSource
from data_tools.preprocess.selection.selection import Selection
from megatron_llmjp.tokenizers import Tokenizer


def max_line_bytes(args: argparse.Namespace) -> int:
    """Return the maximum length of a line in bytes."""
    return int(args.max_line_mb * 1_000_000)


def encoding_options(args: argparse.Namespace, selection: Selection) -> EncodingOptions:
    """Return the options of the encoding that the command line sets."""
    return EncodingOptions(
        keys=args.json_keys,
        append_eod=args.append_eod,
        keep_empty=args.on_error == "stop",
        limit=max_line_bytes(args),
        keep_raw=args.on_error == "quarantine",
        append_bos=args.append_bos,
        language_key=args.language_key,
        hooks=selection.hooks,
        lengths=selection.lengths,
        record_dtype=selection.arrangement.record_dtype,
        record_sources=args.record_sources,
        id_key=args.id_key,
    )


def make_recipe(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    sources: Sequence[InputSource],
    selection: Selection,
    shard: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the recipe of a job.

    Options that earlier versions did not have are recorded only if they are set. ``encoders``, the
    libraries that encoded instead of the tokenizer's own, is not compared: their ids are equal.

    Args:
        args: the command line.
        tokenizer: the tokenizer.
        sources: the input of the job.
        selection: selection and order of the documents.
        shard: the part of an array that the job processes; None for all input.
    """
    options: dict[str, Any] = {
        "keys": args.json_keys,
        "append_eod": args.append_eod,
        "on_error": args.on_error,
        "max_line_bytes": max_line_bytes(args),
    }
    for name in ("append_bos", "tokenizer_hf_include_special_tokens"):
        if getattr(args, name):
            options[name] = True
    if args.language_key != DEFAULT_LANGUAGE_KEY:
        options["language_key"] = args.language_key
    if args.record_sources:
        options["record_sources"] = True
    if args.id_key is not None:
        options["id_key"] = args.id_key
    recipe: dict[str, Any] = {
        "tokenizer": tokenizer.identity(),
        "options": options | selection.identity(),
        "sources": [source.identity() for source in sources],
    }
    if tokenizer.library is not None:
        recipe["encoders"] = [tokenizer.library]
    return recipe if shard is None else recipe | {"shard": shard}
