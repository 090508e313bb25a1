"""Addresses of remote files: their schemes, and the form in which they are printed and recorded.

An address may contain credentials: a user and password, or the signature of a signed address in the
query. :func:`shown` removes them; nothing else of an address is printed, logged or recorded.
"""

from __future__ import annotations

import re
from urllib.parse import quote

from megatron_llmjp.errors import UserError

SCHEMES = ("s3", "hf", "https", "http")
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_OUTPUT = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
"""pathlib shortens ``s3://`` to ``s3:/``."""
_RESERVED = "%:/?#[]@!$&'()*+,;=~"
"""Characters with a meaning in an address, and ``%``, which begins an encoded character."""


def scheme_of(word: str) -> str | None:
    """Return the scheme of an address such as ``s3://bucket/key``, or None for a local path."""
    found = _ADDRESS.match(word)
    return found[1].lower() if found else None


def shown(address: str) -> str:
    """Return an address without user, password, query and fragment."""
    found = _ADDRESS.match(address)
    if found is None:
        return address
    scheme, rest = found[1].lower(), found[2]
    if scheme in ("http", "https"):
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, slash, path = rest.partition("/")
    user, at, place = host.rpartition("@")
    if at and (scheme != "hf" or ":" in user):  # hf://MODEL@REVISION/ has no user
        host = place
    return f"{scheme}://{host}{slash}{path}"


def scrub(text: str) -> str:
    """Return a message of a library without the credentials of the addresses in it."""
    without_user = re.sub(r"://[^/\s@'\"]*@", "://", text)
    return re.sub(r"(https?://[^\s?'\")]*)\?[^\s'\")]*", r"\1", without_user)


def check_address(address: str) -> None:
    """Check that the scheme is supported, and that there are no credentials where none may be.

    Raises:
        UserError: otherwise.
    """
    scheme = scheme_of(address)
    if scheme == "file":
        raise UserError(f"--input {shown(address)}: give the path without file://")
    if scheme not in SCHEMES:
        raise UserError(
            f"--input {shown(address)}: {scheme}:// is not supported. Remote input can be s3://, "
            "hf:// (Hugging Face Hub) or https://; copy other files to a local disk first."
        )
    host = address.partition("://")[2].partition("/")[0]
    if scheme in ("s3", "hf") and ":" in host.rpartition("@")[0]:
        raise UserError(
            f"--input {shown(address)}: {scheme}:// addresses must not contain credentials. Set "
            "AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3, HF_TOKEN for the "
            "Hugging Face Hub."
        )


def encode_url(address: str) -> str:
    """Return an http address with spaces and non-ASCII characters encoded, without fragment.

    Characters that are encoded already stay as they are: a signature may depend on them.
    """
    return quote(address.partition("#")[0], safe=_RESERVED)


def refuse_remote_output(flag: str, value: object) -> None:
    """Refuse a remote address as the place of output.

    Raises:
        UserError: the value is an address such as ``s3://bucket/prefix``.
    """
    if _OUTPUT.match(str(value)):
        raise UserError(
            f"{flag} {shown(str(value))}: output is written to a local or mounted disk only, so "
            "that it can be resumed and renamed when it is complete. Choose a local path, and "
            "copy the finished files, for example with `aws s3 cp` or `hf upload`."
        )
