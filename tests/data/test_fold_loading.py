"""Loader of fold files: includes, named blends, roots, and the locations of errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_llmjp.data.folds.fingerprint import dump_fold_file
from megatron_llmjp.data.folds.loading import read_fold_file
from megatron_llmjp.errors import UserError

CORPUS = """\
root: ../tokens
blends:
  ja:
    wiki: &wiki {path: ja/wiki, weight: 3}
    cc: {path: /elsewhere/cc, weight: 1}
  en:
    pile: {<<: *wiki, path: en/pile}
"""
FOLDS = """\
include: lists/corpus.yaml
root: mine
blends:
  code:
    stack: {path: stack, weight: 0.5}
folds:
  - {name: a, tokens: 9, blend: ja}
  - name: b
    tokens: 9
    blend: [ja, en, code]
  - name: c
    tokens: 9
    blend: {other: {path: other, weight: 1}}
validation:
  held: {path: held}
  both: {blend: ja, split: "9,1"}
"""


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder / "folds.yaml"


def test_named_blends(tmp_path):
    file = read_fold_file(write(tmp_path, {"lists/corpus.yaml": CORPUS, "folds.yaml": FOLDS}))
    tokens, mine = tmp_path / "lists" / ".." / "tokens", tmp_path / "mine"
    ja = {"wiki": (tokens / "ja/wiki", 3), "cc": (Path("/elsewhere/cc"), 1)}
    rest = {"pile": (tokens / "en/pile", 3), "stack": (mine / "stack", 0.5)}
    found = [
        {name: (Path(source.path), source.weight) for name, source in fold.blend.items()}
        for fold in file.folds
    ]
    assert found == [ja, ja | rest, {"other": (mine / "other", 1)}]
    assert Path(file.validation["held"].path) == mine / "held"
    assert list(file.validation["both"].blend) == ["wiki", "cc"]

    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_fold_file(file))
    plain = yaml.safe_load(copy.read_text())  # includes and named blends are resolved
    assert [(fold["name"], fold["tokens"]) for fold in plain["folds"]] == [
        ("a", 9), ("b", 9), ("c", 9),
    ]  # fmt: skip
    assert [
        {name: (Path(source["path"]), source["weight"]) for name, source in fold["blend"].items()}
        for fold in plain["folds"]
    ] == found
    assert plain["validation"]["both"]["split"] == "9,1"
    again = read_fold_file(copy)
    for fold, other in zip(file.folds, again.folds, strict=True):
        for name, source in fold.blend.items():
            assert Path(source.path).resolve() == Path(other.blend[name].path).resolve()
            assert source.weight == other.blend[name].weight


def test_anchors_share_a_blend_without_moving_its_paths_twice(tmp_path):
    text = """\
folds:
  - {name: a, tokens: 9, blend: &all {x: {path: x, weight: 1}}}
  - {name: b, tokens: 9, blend: *all}
  - {name: c, tokens: 9, blend: {<<: *all, y: {path: y, weight: 2}}}
"""
    file = read_fold_file(write(tmp_path, {"folds.yaml": text}))
    paths = [[source.path for source in fold.blend.values()] for fold in file.folds]
    x, y = str(tmp_path / "x"), str(tmp_path / "y")
    assert [sorted(p) for p in paths] == [[x], [x], [x, y]]


MISTAKES = {
    "missing": ("""\
include: [none.yaml]
folds: []
""", (
        "folds.yaml, line 1: include FOLDER/none.yaml cannot be read"
    )),
    "circle": ("""\
include: a.yaml
@ a.yaml
include: b.yaml
@ b.yaml


include: a.yaml
""", (
        "b.yaml, line 3: circular include: FOLDER/folds.yaml -> "
        "FOLDER/a.yaml -> FOLDER/b.yaml -> FOLDER/a.yaml"
    )),
    "blend twice": ("""\
include: a.yaml
blends:
  x: {d: {path: d}}
@ a.yaml
blends:
  x: {d: {path: d}}
""", (
        "folds.yaml, line 3: a blend named 'x' is already defined in FOLDER/a.yaml, line 2"
    )),
    "unknown blend": ("""\
blends:
  ja: {d: {path: d}}
folds:
- {name: f, epochs: 1,
   blend: jp}
""", (
        "folds.yaml, line 5: no blend named 'jp' (known: ja;"
    )),
    "dataset in two blends": ("""\
blends:
  ja: {d: {path: d}}
  en:
    d: {path: e}
folds:
- {name: f, epochs: 1, blend: [ja, en]}
""", (
        "folds.yaml, line 6: dataset 'd' is in two of the blends ja, en: see "
        "FOLDER/folds.yaml, line 4"
    )),
    "folds in an included file": ("""\
include: a.yaml
@ a.yaml
blends: {}
folds: []
""", (
        "a.yaml, line 2: 'folds' belongs in the fold file itself"
    )),
    "a key twice": ("""\
folds:
- name: f
  epochs: 1
  blend:
    d: {path: d}
    d: {path: e}
""", (
        "folds.yaml, line 6: 'd' is given twice, first in line 5"
    )),
    "in an included blend": ("""\
include: a.yaml
folds:
- {name: f, epochs: 1, blend: x}
@ a.yaml
blends:
  x:
    d: {path: d,
        wieght: 2}
""", (
        "a.yaml, line 4: fold 'f', blend, d, wieght: unknown key; did you mean 'weight'?"
    )),
    "split without megatron": ("""\
folds:
- name: f
  epochs: 1
  split: 9,1
  blend: {d: {path: d}}
""", (
        "folds.yaml, line 2: fold 'f': split requires `order: megatron`"
    )),
    "megatron without a budget": ("""\
folds:
- {name: f, order: megatron, blend: {d: {path: d}}}
""", (
        "folds.yaml, line 2: fold 'f': order: megatron needs a budget"
    )),
    "no sample skipped": ("""\
folds:
- {name: f, epochs: 1, blend: {d: {path: d}}}
skip:
- samples: [9, 9]
""", (
        "folds.yaml, line 4: skip, 0: [9, 9] is empty"
    )),
    "unknown key of a learning rate": ("""\
folds:
- name: f
  epochs: 1
  blend: {d: {path: d}}
  learning_rate: {lr_warmup: 2}
""", (
        "folds.yaml, line 5: fold 'f', learning_rate, lr_warmup: unknown key; did you "
        "mean"
    )),
}  # fmt: skip
"""Files, the fold file first, and the expected error."""


@pytest.mark.parametrize("case", MISTAKES)
def test_errors_name_file_and_line(tmp_path, case):
    text, expected = MISTAKES[case]
    main, *others = text.split("@ ")
    files = {"folds.yaml": main} | dict(other.split("\n", 1) for other in others)
    with pytest.raises(UserError) as caught:
        read_fold_file(write(tmp_path, files))
    assert f"{tmp_path}/{expected}".replace("FOLDER", str(tmp_path)) in str(caught.value)


def test_a_blend_may_be_a_list(tmp_path, monkeypatch):
    """Entries are named after the ends of their paths, and errors name their line."""
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("HOME", "/home/me")
    text = """\
folds:
  - name: a
    tokens: 1e9
    blend:
      - {path: ja/wiki, weight: 1}
      - {path: en/wiki, weight: 2}
      - {path: $DATA/code, weight: 3}
      - {path: ~/mine, name: own, weight: 4}
  - {name: b, tokens: 27.6b, blend: [{path: x, weight: 1}]}
"""
    file = read_fold_file(write(tmp_path, {"folds.yaml": text}))
    assert [fold.tokens for fold in file.folds] == [10**9, 27_600_000_000]
    found = {name: (source.path, source.weight) for name, source in file.folds[0].blend.items()}
    assert found == {
        "ja/wiki": (str(tmp_path / "ja/wiki"), 1),
        "en/wiki": (str(tmp_path / "en/wiki"), 2),
        "code": ("/data/code", 3),
        "own": ("/home/me/mine", 4),
    }


def test_names_of_datasets_without_one(tmp_path):
    """The end of the path; the path if several end alike; numbered if paths are equal too."""
    text = """\
folds:
  - name: a
    epochs: 1
    blend: [{path: a/x}, {path: b/x}, {path: b/x}, {path: c/y}, {path: c/z, name: x}]
"""
    (fold,) = read_fold_file(write(tmp_path, {"folds.yaml": text})).folds
    found = {n: str(Path(source.path).relative_to(tmp_path)) for n, source in fold.blend.items()}
    assert found == {"a/x": "a/x", "b/x 1": "b/x", "b/x 2": "b/x", "y": "c/y", "c/z": "c/z"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("folds:\n - name: a\n   tokens: 9\n   blend:\n    - {path: x, weight: .inf}\n",
         "line 5: fold 'a', blend, x, weight: must be a finite number"),
        ("folds:\n - name: a\n   tokens: 9\n   blend:\n    - {path: x, wieght: 1}\n",
         "line 5: fold 'a', blend, x, wieght: unknown key; did you mean 'weight'"),
        ("folds:\n - name: a\n   tokens: 9\n   blend:\n    - {path: x, weight: 1}\n    - ja\n",
         "line 4: expected a list of datasets"),
        ("folds: {a: 1}\n", "line 1: folds: must be a list"),
        ("folds:\n - {name: a, epochs: 1, blend: ja}\nblends:\n  ja:\n   - {path: y}\n"
         "   - {path: x, wieght: 1}\n",
         "line 6: fold 'a', blend, x, wieght: unknown key; did you mean 'weight'"),
        ("folds: []\nblends:\n  ja:\n   - {path: x}\n   - en\n",
         "line 3: expected a list of datasets"),
        ("folds: []\nvalidation:\n  v:\n    blend:\n     - {path: x}\n     - en\n",
         "line 4: expected a list of datasets"),
        ("folds:\n - name: a\n   tokens: 9\n   blend: {x: {path: $NOWHERE/x, weight: 1}}\n",
         "line 2: $NOWHERE/x: the environment variable NOWHERE is not set"),
        ("folds: []\nblends:\n  ja: {x: {path: x}}\n  en: {x: {path: $NOWHERE/x}}\n",
         "line 4: $NOWHERE/x: the environment variable NOWHERE is not set"),
        ("folds: []\nvalidation:\n  v: {path: x}\n  w: {path: $NOWHERE/x}\n",
         "line 4: $NOWHERE/x: the environment variable NOWHERE is not set"),
        ("folds: []\nroot: $NOWHERE\n",
         "line 2: $NOWHERE: the environment variable NOWHERE is not set"),
        ("root: [a]\nfolds: []\n", "line 1: root: expected a folder, found ['a']"),
        ("folds: []\ninclude: [3]\n",
         "line 2: include: expected a file or a list of files, found 3"),
        ("blends: [a]\nfolds: []\n",
         "line 1: blends: expected a mapping of names to datasets"),
        ("blends: {a: {}}\nfolds: []\n",
         "line 1: blend 'a': expected datasets, as `NAME: {path: ...}`"),
        # Folds without a name are numbered from 1.
        ("folds:\n - {name: a, tokens: 9, blend: {x: {path: x}}}\n - {tokens: 9}\n",
         "line 3: fold '2', name: Field required"),
        ("folds:\n - {name: a, tokens: 9, blend: {x: {path: x}}}\n - 7\n",
         "line 3: fold '2': must"),
        ("fold: []\n",
         "line 1: fold: unknown key; did you mean 'folds'? (possible: seed, sequence_length, "
         "shuffle, folds, validation, skip, datasets, include, root, blends)"),
        ("folds:\n - {name: a, blnd: 1}\n",
         "line 2: fold 'a', blnd: unknown key; did you mean 'blend'?"),
        ("folds: []\nvalidation: {v: {pth: 1}}\n",
         "line 2: validation, v, pth: unknown key; did you mean 'path'?"),
        ("folds: []\nskip: [{sample: [1, 2]}]\n",
         "line 2: skip, 0, sample: unknown key; did you mean 'samples'?"),
        ("folds:\n - name: a\n   tokens: 9x\n   blend: {x: {path: x, weight: 1}}\n",
         "line 3: fold 'a', tokens: expected a number such as"),
    ],
)  # fmt: skip
def test_errors_in_lists_and_numbers(text, message, tmp_path, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(UserError) as caught:
        read_fold_file(write(tmp_path, {"folds.yaml": text}))
    assert message in str(caught.value)


def test_a_list_with_an_invalid_entry_is_not_too_short(tmp_path):
    """pydantic reports both errors; only the invalid entry is printed, also with another error."""
    with pytest.raises(UserError) as caught:
        read_fold_file(write(tmp_path, {"folds.yaml": "sed: 1\nfolds:\n - 7\n"}))
    entry, key = str(caught.value).splitlines()
    assert "line 3: fold '1': must" in entry
    assert "line 1: sed: unknown key; did you mean 'seed'?" in key
