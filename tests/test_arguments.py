"""Parsing of sizes, counts, integers and misspelt flags."""

from __future__ import annotations

import argparse

import pytest

from megatron_llmjp.arguments import CommandLineParser, parse_count, parse_size, positive_int
from megatron_llmjp.errors import UserError


@pytest.mark.parametrize(
    ("text", "unit", "size"),
    [
        ("500MB", "", 500e6),
        ("5g", "", 5e9),
        ("80GiB", "", 80 * 2**30),
        ("1.5 T", "", 1.5e12),
        ("40", "G", 40e9),
        ("40", "", 40),
        ("40B", "G", 40),
    ],
)
def test_sizes(text, unit, size):
    assert parse_size(text, unit) == size


@pytest.mark.parametrize("text", ["", "GB", "5 bytes", "-5GB", "5iB", "1e9"])
def test_invalid_sizes(text):
    with pytest.raises(ValueError, match="expected a size such as"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [("27.6B", 27_600_000_000), ("1_000", 1000), (" 0.15 M", 150_000), ("1T", 10**12), (5, 5)],
)
def test_counts(text, number):
    assert parse_count(text) == number


def test_positive_integers():
    assert positive_int("12") == 12
    for text in ("0", "-1", "1.5", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a positive integer"):
            positive_int(text)


def test_misspelt_flags():
    parser = CommandLineParser(prog="program")
    parser.add_argument("--output-prefix")
    assert parser.parse(["--output_prefix=a_b"]).output_prefix == "a_b"
    with pytest.raises(UserError, match="unknown flag --output-prefx; did you mean"):
        parser.parse(["--output-prefx", "a"])
