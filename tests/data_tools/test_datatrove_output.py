"""JSON lines that datatrove writes after near-duplicates are removed, as our input."""

from __future__ import annotations

import ast
import gzip
import json
import re
from pathlib import Path

from data_tools import preprocess_data
from data_tools.preprocess_data import _parser
from tests.data_tools.test_arranged_documents import BYTES, read_texts

EXAMPLE = Path(__file__).parents[2] / "examples" / "near_duplicates" / "deduplicate.py"

OUTPUT = """\
{"text":"the quick brown fox jumps over a lazy dog","id":"b.jsonl/0",\
"metadata":{"lang":"en","file_path":"/data/in/b.jsonl"}}
{"text":"列車の車内に自転車が大量に積まれています。","id":"b.jsonl/2",\
"metadata":{"lang":"ja","stars":2,"file_path":"/data/in/b.jsonl"}}
"""
"""Lines as datatrove 0.10.1 wrote them to 00000.jsonl.gz when the example was run."""

HOOKS = """
def keep(document):
    return document["metadata"].get("stars", 0) < 3
"""


def test_output_of_datatrove_is_read(tmp_path):
    """Its files have no text keys but ours; languages and other keys are in the metadata."""
    folder = tmp_path / "output"
    folder.mkdir()
    (folder / "00000.jsonl.gz").write_bytes(gzip.compress(OUTPUT.encode()))
    more = OUTPUT.replace('"stars":2', '"stars":5').replace("fox", "cat").encode()
    # Two gzip members, as a file that is written in parts.
    (folder / "00001.jsonl.gz").write_bytes(gzip.compress(more[:30]) + gzip.compress(more[30:]))
    (tmp_path / "hooks.py").write_text(HOOKS)
    arguments = ["--input", str(folder), "--output-prefix", str(tmp_path / "o"), *BYTES]
    arguments += ["--language-key", "metadata.lang", "--hooks", str(tmp_path / "hooks.py")]
    assert preprocess_data.main([*arguments, "--workers", "1"]) == 0
    found = read_texts(str(tmp_path / "o_text_document"))
    expected = [json.loads(line)["text"] for line in OUTPUT.splitlines()]
    assert found == [*expected, expected[0].replace("fox", "cat")]
    statistics = json.loads((tmp_path / "o_text_document.json").read_text())["statistics"]
    by_language = statistics["sources"][str(folder / "00000.jsonl.gz")]
    assert {name: counts["documents"] for name, counts in by_language.items()} == {"en": 1, "ja": 1}
    assert statistics["removed"][str(folder / "00001.jsonl.gz")] == {"filtered": 1}


def test_commands_of_the_example_are_valid():
    """The command in the example's docstring parses, and reads what the example writes."""
    text = ast.get_docstring(ast.parse(EXAMPLE.read_text(encoding="utf-8"))) or ""
    command = re.search(r"preprocess_data (--input .*?)\n\n", text.replace("\\\n", " "), re.DOTALL)
    assert command is not None
    args = _parser().parse_args(command[1].split())
    assert args.input == ["dedup/output"] and args.language_key == "metadata.lang"
