"""YAML files of users: every error is one message with file and line."""

from __future__ import annotations

import pytest

from megatron_llmjp.config.flags import parse
from megatron_llmjp.data.folds.loading import read_fold_file
from megatron_llmjp.errors import UserError
from megatron_llmjp.yaml_text import parse_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
FOLD = "folds: [{name: a, tokens: 5, blend: {d: {path: x}}}]\n"
BAD = {
    # text: part of the message, for configurations and fold files
    "? [a, b]\n: 1\n": "line 1: a key is a list, expected text",
    "{a: 1}: 2\n": "line 1: a key is a mapping, expected text",
    "model:\n  ? {a: b}\n  : 1\n": "line 2: a key is a mapping",
    "folds:\n  - ? [a]\n    : 1\n": "line 2: a key is a list",
    "a: 1\n1: 2\n": 'line 2: the key 1 is of type int, expected text: write it in quotes, "1"',
    "null: 1\n": "line 1: the key null is of type null",
    "~: 1\n": "line 1: the key ~ is of type null",
    "yes: 2\n": "line 1: the key yes is of type bool",
    "2024-01-01: 2\n": "line 1: the key 2024-01-01 is of type timestamp",
    "model: {1.5: 2}\n": "line 1: the key 1.5 is of type float",
    "model: {a: 1,\n  a: 2}\n": "line 2: 'a' is given twice, first in line 1",
    "model: &m {a: *m}\n": "line 1: an anchor (&name) that contains itself",
    "folds: &a [*a]\n": "line 1: an anchor (&name) that contains itself",
    "a: &a\n  <<: *a\n": "line 1: an anchor (&name) that contains itself",
    BOMB: "more than 300,000 values",
    "model: !!python/object:os.system {}\n": "the tag !!python/object:os.system is not supported",
    "model: !!set {a}\n": "line 1: the tag !!set is not supported",
    "model: !own 1\n": "line 1: the tag !own is not supported",
    "folds: !!binary aGVsbG8=\n": "line 1: the tag !!binary is not supported",
    "folds: 2024-13-45\n": "not valid YAML: month must be in 1..12; put the value in quotes",
    "folds: " + "9" * 5000: "put the value in quotes",
    "folds: " + "[" * 3000 + "]" * 3000: "nested too deeply",
    "folds: \x00": "not valid YAML",
    "a: 1\n---\nb: 2\n": "not valid YAML: expected a single document",
    "folds: *x\n": "not valid YAML: found undefined alias",
    "<<: 5\n": "not valid YAML",
    "hello": "expected keys and values, found a str",
    "- 1": "expected keys and values, found a list",
}
BAD_CONFIGURATION = {
    "preset: [a]\n": "line 1: preset: expected a name, found ['a']",
    "preset:\n": "line 1: preset: expected a name, found None",
    "preset: laptop-llama\nmodel:\n": "line 2: section 'model' must contain fields",
    "preset: laptop-llama\nmodel: {num_layers: [1], seed: 1}\noptimiser: {}\n": (
        "line 2: unknown key 'seed' in section 'model'; it belongs to section 'training'\n"
        "FILE, line 3: unknown section 'optimiser'; did you mean 'optimizer'?"
    ),
    "preset: laptop-llama\nmodel: {num_layers: {a: 1}}\n": "line 2: num_layers = {'a': 1}",
}
BAD_FOLDS = {
    f"include: 5\n{FOLD}": "line 1: include: expected a file or a list of files, found 5",
    f"include: [null]\n{FOLD}": "line 1: include: expected a file or a list of files, found None",
    f"root: [a]\n{FOLD}": "line 1: root: expected a folder, found ['a']",
    "folds: [{name: a, tokens: 5, blend: [[x], {y: 1}]}]\n": "line 1: expected a list of datasets",
    "folds: 5\n": "line 1: folds: must be a list",
    "folds: [a, null]\n": "line 1: fold '1': must be a mapping",
    "": "folds",
}


def message(read, path, text):
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read(path)
    return str(error.value)


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:30])
def test_bad_yaml(tmp_path, text):
    path = tmp_path / "file.yaml"
    for read in (lambda path: parse(["--config", str(path)]), read_fold_file):
        found = message(read, path, text)
        assert found.startswith(str(path)) and BAD[text] in found, found
        assert "\n" not in found


@pytest.mark.parametrize("text", BAD_CONFIGURATION)
def test_bad_configuration(tmp_path, text):
    path = tmp_path / "file.yaml"
    found = message(lambda path: parse(["--config", str(path)]), path, text)
    assert BAD_CONFIGURATION[text].replace("FILE", str(path)) in found, found


@pytest.mark.parametrize("text", BAD_FOLDS)
def test_bad_fold_file(tmp_path, text):
    found = message(read_fold_file, tmp_path / "file.yaml", text)
    assert found.startswith(str(tmp_path)) and BAD_FOLDS[text] in found, found


def test_plain_data_and_its_lines():
    text = "\ufeffa: &x {b: [1, 2.5, 'c']}\nd:\n  <<: *x\n  e: 2024-01-01\n'1': yes\n"
    written = parse_yaml(text, "file")
    assert written.data["d"]["b"] == [1, 2.5, "c"] and written.data["1"] is True
    assert written.where(("d", "e")) == "file, line 4"
    assert written.where(("d", "b", 0)) == "file, line 1"
    assert written.where(("none",)) == "file"
    assert parse_yaml("", "file").data == {}
