"""Refusal of remote files that changed since an earlier run read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_tools.preprocess.input.remote.files import describe_version
from data_tools.preprocess.input.sources import InputSource
from megatron_llmjp.errors import UserError


def refuse_changed_remote(
    sources: Sequence[InputSource],
    identities: Sequence[Mapping[str, Any]],
    earlier: object,
    output: str,
) -> None:
    """Refuse a remote file that has the same name as in an earlier run, but other contents.

    A local file that changed is read again; a remote one belongs to somebody else, and its change
    is reported.

    Args:
        sources: the files of this run.
        identities: the identity of each.
        earlier: the identities of the files that the earlier run had read, in the same order.
        output: what the earlier run wrote.

    Raises:
        UserError: a file has changed.
    """
    if not isinstance(earlier, list):
        return
    for source, now, then in zip(sources, identities, earlier, strict=False):
        if source.remote is None or not isinstance(then, dict) or then.get("name") != source.name:
            continue
        if any(then.get(key) != now[key] for key in ("size", "content")):
            before, after = (describe_version(i.get("size"), i.get("content")) for i in (then, now))
            raise UserError(
                f"{source.name}: the remote file has changed since {output} was written from it "
                f"(then {before}; now {after}). Restore it, choose another --output-prefix, or "
                "give --overwrite to start from the beginning."
            )
