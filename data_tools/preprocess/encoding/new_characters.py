"""Characters that Unicode 17 and 18 added, whose category depends on a library's version.

Tokenizers split a text by the categories of its characters: letters, numbers, spaces. The regular
expressions of ``tokenizers`` (up to 0.23) have the categories of Unicode 16, those of gigatoken
0.10 the ones of Unicode 17, so that both split a new letter differently.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

ADDED = """
558 58b-58c 5c8-5c9 88f b53-b54 c5c cdc 1acf-1af0 208f 209d-209f 20c1-20c4 2b96 2e60-2e63 a7ce-a7cf
a7d2 a7d4 a7dd a7e2 a7f1 ab6c-ab6d fbc3-fbd2 fd90-fd91 fdc8-fdce 107bb-107bf 10940-10959
10ec5-10ec7 10ec9-10eee 10ef0-10efb 11b0a 11b60-11b67 11db0-11ddb 11de0-11de9 11df0-11df1 1246f
12475-1247f 12550-12686 16ea0-16eb8 16ebb-16ed3 16ff2-16ff6 187f8-187ff 18cd6-18cda 18d09-18d20
18d80-18df2 18e00-19191 191a0-191d2 1b123-1b128 1b168 1ccfa-1ccfc 1ceba-1ced0 1ced2-1ced4
1cedd-1cefd 1d127-1d128 1d1eb-1d1ff 1d250-1d281 1d6a6 1db00-1db1c 1df1f-1df24 1df2b-1df81
1df90-1df96 1dfcd-1dfff 1e6c0-1e6de 1e6e0-1e6f5 1e6fe-1e6ff 1f1ae 1f6d8-1f6d9 1f777-1f77a
1f7da-1f7db 1f7f1-1f7ff 1f8d0-1f8d8 1fa54-1fa57 1fa8a-1fa8e 1fac8 1facc-1facd 1fadd 1faea-1faeb
1faef 1faf9-1fafa 1fbfa 2b73a-2b73f 2b81e 2cea2-2cead 323b0-33479 3d000-3fc3f
"""
"""Ranges of code points that are not assigned in Unicode 16, but in 17 or in the draft of 18."""


def has_new_characters(utf8: bytes) -> bool:
    """Return whether a text, as UTF-8, contains a character that Unicode 16 does not have.

    Cheap for text that is mostly ASCII, Japanese or Chinese: only occurrences of a few lead bytes
    are examined.
    """
    return any(lead in utf8 and _pattern(lead).search(utf8) for lead in _LEAD_BYTES)


def _code_points() -> Iterator[int]:
    for part in ADDED.split():
        first, _, last = part.partition("-")
        yield from range(int(first, 16), int(last or first, 16) + 1)


@functools.cache
def _pattern(lead: bytes) -> re.Pattern[bytes]:
    """Return a pattern of the characters whose UTF-8 begins with a byte."""
    last_bytes: dict[bytes, list[int]] = {}  # by all bytes before the last one
    for utf8 in (chr(code_point).encode() for code_point in _code_points()):
        if utf8[:1] == lead:
            last_bytes.setdefault(utf8[1:-1], []).append(utf8[-1])
    starts: dict[bytes, list[bytes]] = {}  # with these last bytes
    for start, last in last_bytes.items():
        starts.setdefault(bytes(last), []).append(re.escape(start))
    endings = (
        b"(?:" + b"|".join(before) + b")[" + re.escape(last) + b"]"
        for last, before in starts.items()
    )
    return re.compile(re.escape(lead) + b"(?:" + b"|".join(endings) + b")")


_LEAD_BYTES = sorted(
    {chr(int(code_point, 16)).encode()[:1] for code_point in re.findall(r"[0-9a-f]+", ADDED)}
)
