"""Changes of valid inputs: of bytes, and of the structure of JSON and YAML documents."""

from __future__ import annotations

import codecs
import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import yaml

DEPTH = 100_000
"""Levels of hostile nesting."""

HOSTILE = (
    b"",
    b"\0",
    b"\0" * 4096,
    b"\n",
    b"\r\n\r\n",
    b" ",
    codecs.BOM_UTF8,
    codecs.BOM_UTF16_LE + "{}".encode("utf-16-le"),
    b"\xff" * 64,
    b"\xed\xa0\x80",  # a surrogate in UTF-8
    b"null",
    b"0",
    b"-1",
    b'"text"',
    b"[]",
    b"{}",
    b"[{}]",
    b"[[]]",
    b"{} {}",
    b"true",
    b"NaN",
    b"1" * 5000,
    b"1e999",
    b'{"a": 1, "a": 2}',
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    b"<html><body>404 Not Found</body></html>",
    b"PK\x03\x04",
    b"\x80\x04.",
)
"""Contents that every parser must survive."""

DEEP = (
    b"[" * DEPTH,
    b'{"a":' * DEPTH,
    b"[" * DEPTH + b"]" * DEPTH,
    b'{"a":' * DEPTH + b"1" + b"}" * DEPTH,
    b"- " * 5000,
)
"""The same, nested deeply."""

NUMBERS = (0, 1, 2, -1, 127, 128, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1,
           2**64 - 1)  # fmt: skip

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 1.5, -0.0, 1e300, float("nan"), float("inf")),
    *(10**30, -(10**30), 2**31, 2**63, 2**64, 1 << 40),
    *("", "x", "0", "-1", "1e9", "nan", "a\0b", "\ud800", "../x", "/", "～", "%s{}", "a" * 3000),
    *([], {}, [[]], [None], [{}], {"a": 1}, {"": ""}, [1, 2, 3], {"a": {"b": []}}),
)
"""Values of all JSON types."""

RAW_JSON = (
    "[" * DEPTH + "]" * DEPTH,
    '{"a":' * DEPTH + "1" + "}" * DEPTH,
    "9" * 5000,
    "-" + "9" * 5000,
    "1e400",
    "NaN",
    "-Infinity",
    '"\\ud800"',
    '{"a": 1, "a": 2}',
)
"""Values that cannot be written by ``json.dumps``."""

DEEP_YAML = ("[" * 5000 + "]" * 5000, "{a: " * 5000 + "1" + "}" * 5000, "\n - " * 5000)
RAW_YAML = (
    "&a [*a]",
    "&a {b: *a}",
    "9" * 5000,
    "0x" + "f" * 5000,
    "0o" + "7" * 8000,
    "0b" + "1" * 20000,
    "1" + ":59" * 3000,
    "1_000",
    ".inf",
    "-.inf",
    ".nan",
    "1e999",
    "2001-13-45",
    "2001-02-03",
    "2001-02-03T25:61:61+99:99",
    "9999-12-31T23:59:59-23:59",
    "!!int abc",
    "!!int ''",
    "!!float x",
    "!!bool 3",
    "!!timestamp x",
    "!!null x",
    "!!binary '%'",
    "!!set {a}",
    "!!omap [a: 1]",
    "!!python/object/apply:os.system [true]",
    "!own x",
    "{? [a] : b}",
    "{1: 2}",
    "{true: 1, null: 2}",
    "{a: 1, a: 2}",
    "{<<: {a: 1}}",
    "{<<: [1]}",
    "{<<: 3}",
    "{<<: {<<: {<<: {a: 1}}}}",
    "=",
    "<<",
    "'\\0'",
    '"\\0"',
    '"\\ud800"',
    "&a\n  [&b [&c [x, x, x, x, x, x, x, x, x], *c, *c, *c, *c, *c, *c, *c, *c], *b, *b, *b, *b]",
    "*unknown",
    "|9\n  a",
    "@",
    "`",
    "\t",
    "%",
)
"""Values that cannot be written by ``yaml.safe_dump``."""

_PLACE = "Fuzzed Value"


def yaml_bomb(key: str) -> bytes:
    """Return a document of a kilobyte with 9^9 values under a key."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    return "\n".join([*lines, f"{key}: *a8"]).encode()


def mutated_bytes(content: bytes, generator: random.Random) -> bytes:
    """Flip, overwrite, remove, repeat, insert or cut bytes."""
    data = bytearray(content)
    for _ in range(generator.choice((1, 1, 1, 2, 3, 8))):
        generator.choice(_BYTE_CHANGES)(data, generator, generator.randrange(len(data) + 1))
    return bytes(data)


def _flip(data: bytearray, generator: random.Random, at: int) -> None:
    if at < len(data):
        data[at] ^= 1 << generator.randrange(8)


def _overwrite(data: bytearray, generator: random.Random, at: int) -> None:
    data[at : at + 1] = bytes([generator.choice((0, 0x0A, 0x22, 0x7F, 0x80, 0xC0, 0xFF))])


def _number(data: bytearray, generator: random.Random, at: int) -> None:
    """Overwrite 1 to 8 bytes by an integer, as a length field would be damaged."""
    size = generator.choice((1, 2, 4, 8))
    number = generator.choice((*NUMBERS, len(data), len(data) + 1)) % 256**size
    data[at : at + size] = number.to_bytes(size, generator.choice(("little", "big")))


def _remove(data: bytearray, generator: random.Random, at: int) -> None:
    del data[at : at + generator.randint(1, 64)]


def _repeat(data: bytearray, generator: random.Random, at: int) -> None:
    piece = data[at : at + generator.randint(1, 64)]
    place = generator.randrange(len(data) + 1)
    data[place:place] = piece * generator.choice((1, 1, 2, 1000))


def _insert(data: bytearray, generator: random.Random, at: int) -> None:
    data[at:at] = generator.choice(
        (generator.randbytes(generator.randint(1, 16)), b"\0", b"\r\n", b"\xef\xbb\xbf", b"[[[[")
    )


def _cut(data: bytearray, generator: random.Random, at: int) -> None:
    del data[at:]


_BYTE_CHANGES: tuple[Callable[[bytearray, random.Random, int], None], ...] = (
    _flip,
    _flip,
    _overwrite,
    _number,
    _number,
    _remove,
    _repeat,
    _insert,
    _cut,
)


def mutated_value(value: Any, generator: random.Random) -> Any:
    """Return a copy of a tree of plain data with one to three changes."""
    holder = [copy.deepcopy(value)]
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        places = list(_places(holder))
        parent, key = generator.choice(places)
        generator.choice(_TREE_CHANGES)(parent, key, generator)
        if not holder:
            holder.append(generator.choice(ODD))
    return holder[0]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the container and the key of every value in a tree."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def _replace(parent: Any, key: Any, generator: random.Random) -> None:
    parent[key] = copy.deepcopy(generator.choice(ODD))


def _delete(parent: Any, key: Any, _: random.Random) -> None:
    del parent[key]


def _wrap(parent: Any, key: Any, generator: random.Random) -> None:
    value = parent[key]
    parent[key] = generator.choice(
        ([value], {"a": value}, [value, value], str(value), {str(value)[:50]: value})
    )


def _nudge(parent: Any, key: Any, generator: random.Random) -> None:
    value = parent[key]
    if isinstance(value, (int, float)):
        parent[key] = generator.choice((value + 1, value - 1, -value, value * 2, float(value)))
    elif isinstance(value, str):
        parent[key] = generator.choice((value[1:], value + "x", value * 2, value.upper()))
    elif isinstance(value, list):
        parent[key] = generator.choice((value[1:], value[::-1], value + value[:1]))


def _copy(parent: Any, key: Any, generator: random.Random) -> None:
    """Overwrite a value by its neighbour, or store it under another key."""
    if isinstance(parent, dict):
        parent[generator.choice((*parent, "unknown", ""))] = copy.deepcopy(parent[key])
    else:
        parent.insert(0, copy.deepcopy(generator.choice(parent)))


def _mark(parent: Any, key: Any, _: random.Random) -> None:
    parent[key] = _PLACE


_TREE_CHANGES = (_replace, _replace, _delete, _wrap, _nudge, _copy, _mark)


def mutated_json(content: bytes, generator: random.Random) -> bytes:
    """Change the structure of a JSON document."""
    return _json_bytes(mutated_value(json.loads(content), generator), generator)


def mutated_json_lines(content: bytes, generator: random.Random) -> bytes:
    """Change, remove, repeat or reorder lines of a JSON Lines file."""
    lines = content.splitlines()
    at = generator.randrange(len(lines))
    change = generator.randrange(6)
    if change < 3:
        lines[at] = mutated_json(lines[at], generator)
    elif change == 3:
        lines[at] = generator.choice(HOSTILE)
    elif change == 4:
        lines.insert(generator.randrange(len(lines)), lines[at])
    else:
        del lines[at]
    return generator.choice((b"\n", b"\n", b"\n", b"\r\n")).join([*lines, b""])


def _json_bytes(value: Any, generator: random.Random) -> bytes:
    text = json.dumps(
        value, ensure_ascii=generator.random() < 0.8, indent=generator.choice((None, None, 1))
    )
    text = text.replace(f'"{_PLACE}"', generator.choice(RAW_JSON))
    return text.encode(errors="surrogatepass")


def mutated_yaml(content: bytes, generator: random.Random) -> bytes:
    """Change the structure of a YAML document."""
    value = mutated_value(yaml.safe_load(content), generator)
    text = yaml.safe_dump(
        value,
        default_flow_style=generator.choice((True, False, None)),
        allow_unicode=generator.random() < 0.5,
        sort_keys=False,
    )
    return text.replace(_PLACE, generator.choice(RAW_YAML)).encode(errors="surrogatepass")
