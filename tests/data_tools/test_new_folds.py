"""New fold files: their samples, compared with the request; lists of datasets, with bash."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data_tools import plan_folds
from data_tools.new_folds.shell_lists import parse_lists
from megatron_llmjp.config.flags import parse
from megatron_llmjp.data.dataset import FoldDataset
from megatron_llmjp.data.folds.parts import equal_shares
from megatron_llmjp.data.indexed_dataset_writer import write_idx
from megatron_llmjp.errors import UserError
from megatron_llmjp.run_data import resolve_data
from tests.data.test_dataset import LENGTH, epochs_of, lengths_of, schedule_of, write_numbered

BATCH = 8
FLAGS = ["--seq-length", str(LENGTH), "--global-batch-size", str(BATCH)]
DOCUMENTS = {"ja/wiki": 40, "ja/cc": 80, "en/wiki": 60}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Write datasets with unique tokens, and one for validation."""
    folder = tmp_path_factory.mktemp("new")
    for i, (name, documents) in enumerate([*DOCUMENTS.items(), ("valid/ja", 10)]):
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        prefix = folder / "data" / f"{name}_text_document"
        write_numbered(prefix, lengths_of(i, documents), 10_000 * i)
    return folder


def tokens_of(name: str) -> int:
    number = list(DOCUMENTS).index(name)
    return sum(lengths_of(number, DOCUMENTS[name]))


def samples_of(name: str) -> int:
    return (tokens_of(name) - 1) // LENGTH


def path_of(folder: Path, name: str) -> str:
    return str(folder / "data" / f"{name}_text_document")


def new(folder: Path, *words: object) -> tuple[int, Path]:
    """Run plan_folds --new; return its exit code and the fold file."""
    target = folder / "folds.yaml"
    target.unlink(missing_ok=True)
    return plan_folds.main(["--new", str(target), *map(str, words), *FLAGS]), target


def planned(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


def counts(plan: dict) -> list[dict[str, int]]:
    return [{row["name"]: row["samples"] for row in fold["datasets"]} for fold in plan["folds"]]


def test_folders_become_entries_with_sizes(data, capsys):
    words = ["--datasets", data / "data", "--validation", data / "data/valid", "--json"]
    code, target = new(data, *words)
    assert code == 0
    plan = planned(capsys)
    assert counts(plan) == [{name: samples_of(name) for name in sorted(DOCUMENTS)}]
    content = yaml.safe_load(target.read_text())
    assert content["folds"] == [{"name": "train", "epochs": 1, "blend": "corpus"}]
    assert content["root"] == "data" and content["seed"] == 1234
    assert content["validation"] == {"ja": {"path": "valid/ja_text_document"}}
    for name, documents in DOCUMENTS.items():
        assert content["blends"]["corpus"][name] == {"path": f"{name}_text_document"}
        (line,) = [line for line in target.read_text().splitlines() if f" {name}:" in line]
        assert f"{documents} documents, 1.000 epochs" in line
        assert f"# {tokens_of(name) / 1000:.2f}K tokens" in line
    before = target.read_bytes()
    assert plan_folds.main(["--new", str(target), *map(str, words), *FLAGS]) == 2
    assert "already exists" in capsys.readouterr().err and target.read_bytes() == before
    # The file means the same without --new, and from another folder.
    assert plan_folds.main(["--fold-file", str(target), *FLAGS, "--json"]) == 0
    assert counts(planned(capsys)) == counts(plan)


def test_paths_that_yaml_and_fold_files_could_misread(tmp_path, capsys):
    names = ("~/on", "a: b#c/1", "日本 語/no", "-/[x]")
    for i, name in enumerate(names):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        write_numbered(tmp_path / "data" / name, [100 + 16 * i], 0)
    assert new(tmp_path, "--datasets", tmp_path / "data", "--json")[0] == 0
    plan = planned(capsys)
    found = {row["path"]: row["samples"] for row in plan["folds"][0]["datasets"]}
    assert {Path(path).resolve(): n for path, n in found.items()} == {
        tmp_path / "data" / name: 6 + i for i, name in enumerate(names)
    }
    assert not plan["warnings"][1:]
    write_numbered(tmp_path / "data" / "$HOME", [300], 0)
    assert new(tmp_path, "--datasets", tmp_path / "data")[0] == 2
    assert "fold files replace $VARIABLES in paths" in capsys.readouterr().err
    write_numbered(tmp_path / "data" / "$HOME", [100], 0)
    assert new(tmp_path, "--datasets", tmp_path / "data")[0] == 2
    assert "have the same contents: keep one of them" in capsys.readouterr().err


def test_113_datasets(tmp_path, capsys):
    """The names of llm-jp-3's datasets: a long list with equal names in several folders."""
    names = [f"{language}/cc-{i}_0000.jsonl" for language in ("ja", "en") for i in range(56)]
    for i, name in enumerate([*names, "code/cc-0_0000.jsonl"]):
        prefix = tmp_path / "data" / f"{name}_text_document"
        prefix.parent.mkdir(parents=True, exist_ok=True)
        np.arange(20 + i, dtype=np.int32).tofile(f"{prefix}.bin")
        lengths, offsets = np.array([20 + i], np.int32), np.zeros(1, np.int64)
        write_idx(Path(f"{prefix}.idx"), np.dtype(np.int32), lengths, np.ones(1, np.int32), offsets)
    code, target = new(tmp_path, "--datasets", tmp_path / "data", "--json")
    assert code == 0
    (found,) = counts(planned(capsys))
    expected = {name.removesuffix(".jsonl"): (19 + i) // LENGTH for i, name in enumerate(names)}
    assert found == expected | {"code/cc-0_0000": (19 + 112) // LENGTH} and len(found) == 113
    assert len(yaml.safe_load(target.read_text())["blends"]["corpus"]) == 113


TABLES = {
    "weights": (".csv", "path,weight\n{ja},0.3\n{en},0.7\n", ["--train-samples", "80"], (24, 56)),
    "tokens": (".tsv", "path\ttokens\n{ja}\t0.16K\n{en}\t{twice}\n", [], (10, "2")),
    "epochs": (".json", '[{{"prefix": "{ja}", "epochs": 0.5}}, {{"prefix": "{en}", "epochs": 2}}]',
               [], ("0.5", "2")),
    "all tokens": (".csv", "dataset,target_tokens\n{ja},{all}\n{en},16\n", [], ("1", 1)),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_tables(case, data, tmp_path, capsys):
    suffix, text, flags, expected = TABLES[case]
    values = {"ja": path_of(data, "ja/wiki"), "en": path_of(data, "en/wiki")}
    values |= {"twice": 2 * samples_of("en/wiki") * LENGTH, "all": tokens_of("ja/wiki")}
    table = tmp_path / f"table{suffix}"
    table.write_text(text.format(**values))
    code, _ = new(tmp_path, "--table", table, *flags, "--json")
    assert code == 0
    # Numbers are samples, texts are epochs.
    (found,) = counts(planned(capsys))
    sizes = [samples_of(name) for name in ("ja/wiki", "en/wiki")]
    assert found == {
        name: n if isinstance(n, int) else round(float(n) * size)
        for name, n, size in zip(("ja/wiki", "en/wiki"), expected, sizes, strict=True)
    }


def script(folder: Path, repeats: dict[str, float]) -> str:
    """Return a script like those of llm-jp-3: weights are tokens x repeat."""
    lines = ["set -eu", "GPUS=$((${NODES} * 8))", f"DATASET_DIR={folder}/data", "# don't"]
    lines += ['TRAIN_DATA_PATH=""', "", "# ja"]
    for name, repeat in repeats.items():
        weight = round(repeat * tokens_of(name))
        path = f"${{DATASET_DIR}}/{name}_text_document"
        lines.append(f'TRAIN_DATA_PATH="${{TRAIN_DATA_PATH}} {weight} {path}"')
    lines += ['VALID_DATA_PATH="" # Skip validation', "python pretrain_gpt.py \\"]
    lines += ["  --lr ${LR} \\", "  --data-path ${TRAIN_DATA_PATH} \\", "  --split 1000,0,0 \\"]
    return "\n".join([*lines, "  --data-cache-path ${CACHE_DIR}"]) + "\n"


def test_weights_of_a_list_are_tokens_times_repeat(data, capsys):
    (data / "train.sh").write_text(script(data, {"ja/wiki": 2, "en/wiki": 1, "ja/cc": 5}))
    code, target = new(data, "--data-list", data / "train.sh", "--json")
    assert code == 0
    plan = planned(capsys)
    sizes = {"ja/wiki": 2 * samples_of("ja/wiki"), "en/wiki": samples_of("en/wiki")}
    assert counts(plan) == [sizes | {"ja/cc": 5 * samples_of("ja/cc")}]
    corpus = yaml.safe_load(target.read_text())["blends"]["corpus"]
    assert [entry["epochs"] for entry in corpus.values()] == [2, 1, 5]
    (warning,) = [text for text in plan["warnings"] if "arXiv:2305.16264" in text]
    # Not 5 epochs: the samples of the last batch do not fill it and are dropped.
    assert "ja/cc_text_document (4.97 epochs): repeated data" in warning
    # With a budget, the same weights are proportions.
    code, _ = new(data, "--data-list", data / "train.sh", "--train-iters", 5, "--json")
    assert code == 0
    (found,) = counts(planned(capsys))
    weights = {name: n * tokens_of(name) for name, n in zip(sizes | {"ja/cc": 0}, (2, 1, 5))}  # noqa: B905
    total = sum(weights.values())
    assert all(abs(found[n] - 5 * BATCH * w / total) < 1 for n, w in weights.items())
    assert sum(found.values()) == 5 * BATCH
    lost = script(data, {"ja/wiki": 1, "en/wiki": 1, "ja/cc": 0.001})
    (data / "train.sh").write_text(lost)
    assert new(data, "--data-list", data / "train.sh", "--json")[0] == 0
    assert "are digits missing or added?" in planned(capsys)["warnings"][0]


def test_order_of_megatron_lm(data, tmp_path, capsys):
    """Sample by sample that of --data-path, which is compared with Megatron-LM elsewhere."""
    (data / "train.sh").write_text(script(data, {"ja/wiki": 2, "en/wiki": 1}))
    words = ["--order", "megatron", "--train-iters", 12, "--json"]
    assert new(data, "--data-list", data / "train.sh", *words)[0] == 0
    ours = FoldDataset(schedule_of(data), epochs_of(tmp_path))
    capsys.readouterr()
    weights = {n: str(r * tokens_of(n)) for n, r in {"ja/wiki": 2, "en/wiki": 1}.items()}
    listed = [word for name, w in weights.items() for word in (w, path_of(data, name))]
    flags = ["--data-path", *listed, "--split", "1000,0,0"]
    by_flags = data / "flags"
    by_flags.mkdir()
    assert new(by_flags, *flags, *words)[0] == 0
    assert plan_folds.main([*flags, "--train-iters", "12", *FLAGS, "--json"]) == 0
    theirs = FoldDataset(schedule_of(by_flags), epochs_of(tmp_path / "other"))
    assert len(ours) == len(theirs) == 12 * BATCH
    for number in range(len(ours)):
        assert ours[number]["tokens"].tolist() == theirs[number]["tokens"].tolist()
    fold = yaml.safe_load((data / "folds.yaml").read_text())["folds"][0]
    assert fold["name"] == "data-path" and fold["split"] == "1000,0,0"
    # A run that started with the flags can be resumed with the file: the digests are equal.
    command = ["--config", "laptop-llama", *flags, "--train-iters", "12", *FLAGS]
    (digest,) = [fold.digest for fold in resolve_data(parse(command).config).schedule.folds]
    assert [f.digest for f in ours.schedule.folds] == [digest]


@pytest.mark.parametrize("budget", [[], ["--train-iters", "20"]])
def test_ten_disjoint_folds_of_equal_mixture(budget, data, tmp_path, capsys):
    words = ["--datasets", data / "data/ja", data / "data/en", "--split", 10, *budget, "--json"]
    code, _ = new(data, *words)
    assert code == 0
    plan = planned(capsys)
    folds = counts(plan)
    assert len(folds) == 10 and all(fold == folds[0] for fold in folds)
    run = FoldDataset(schedule_of(data), epochs_of(tmp_path))
    seen: Counter[int] = Counter()
    for number in range(len(run)):
        seen.update(run[number]["tokens"].tolist())
    assert set(seen.values()) == {1}  # tokens are unique: no fold has those of another
    if budget:
        assert {fold["iterations"] for fold in plan["folds"]} == {2}
        assert len(run) == 20 * BATCH
    else:
        assert folds[0] == {name: samples_of(name) // 10 for name in sorted(DOCUMENTS)}
        rest = samples_of("ja/wiki") % 10
        text = f"{rest} of its {samples_of('ja/wiki')} samples are not used, because 10 folds"
        assert rest and any(text in warning for warning in plan["warnings"])


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(1, 12))
def test_equal_shares(totals, parts):
    floors = [total // parts for total in totals]
    assert equal_shares(totals, totals, parts, exact=False) == floors
    shares = equal_shares(totals, [0] * len(totals), parts, exact=True)
    assert sum(shares) == sum(totals) // parts
    assert all(0 <= share - floor <= 1 for share, floor in zip(shares, floors, strict=True))
    # A dataset without room for one more sample per fold gets none if another one has room.
    limits = [total if i else 0 for i, total in enumerate(totals)]
    shares = equal_shares(totals, limits, parts, exact=True)
    beyond = [s * parts > t for s, t in zip(shares[1:], totals[1:], strict=True)]
    assert not any(beyond) or shares[0] == floors[0] + 1


LISTS = {
    "bare": "0.3 /d/a 0.7 /d/b",
    "bare over lines": "1 /d/a \\\n2 /d/b # two\n# 3 /d/c\n",
    "assignments": 'D=/d\nTRAIN_DATA_PATH=""\nTRAIN_DATA_PATH="${TRAIN_DATA_PATH} 1 ${D}/a"\n'
    "# x\nTRAIN_DATA_PATH=\"${TRAIN_DATA_PATH} 2 $D/it's\" # y\necho don't; X='a b'",
    "a part": 'TRAIN_DATA_PATH="${TRAIN_DATA_PATH} 1 /d/a"\n',
    "appended": "export TRAIN_DATA_PATH='1 /d/a'\nTRAIN_DATA_PATH+=' 2 /d/b'\n",
    "array": 'D=/d\nTRAIN_DATA_PATH=(\n  # one\n  1 ${D}/a\n  2 "$D/b"\n)\n'
    "TRAIN_DATA_PATH+=(3 /d/c)",
    "over lines": 'TRAIN_DATA_PATH="1 /d/a \\\n 2 /d/b\n 3 /d/c"\nN=$((2 * (3 + 4)))',
}


@pytest.mark.parametrize("case", LISTS)
def test_lists_equal_what_bash_passes(case):
    text = LISTS[case]
    found = parse_lists(text, "text").train
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    body = text.replace("echo don't; ", "")
    if case.startswith("bare"):
        body = f"TRAIN_DATA_PATH=( {text}\n)"
    code = f'{body}\nprintf "%s\\n" ${{TRAIN_DATA_PATH[@]}}'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert list(found) == done.stdout.split()


def test_parts_and_flags_of_a_list():
    text = "A='1 /d/a'\npython x.py --data-path ${A} \\\n --valid-data-path /d/v --split 1,0,0 # c"
    found = parse_lists(text, "text")
    assert (found.train, found.valid, found.split) == (("1", "/d/a"), ("/d/v",), "1,0,0")
    found = parse_lists("DATA_PATH='/d/a'\nVALID_DATA_PATH='/d/v'\nTEST_DATA_PATH=''", "text")
    assert (found.train, found.valid, found.test) == (("/d/a",), ("/d/v",), ())
    for text, message in (
        ("TRAIN_DATA_PATH=($(calc 8 10 /d/a))", "only a shell can expand it"),
        ("TRAIN_DATA_PATH='1 /d/a 2'\" ${NOWHERE}/b\"", "the variable ${NOWHERE} is not assigned"),
        ("LR=1\nGPUS=8", "no list of datasets"),
        ("", "no list of datasets"),
    ):
        with pytest.raises(UserError, match=message.replace("$", r"\$")):
            parse_lists(text, "text")


ERRORS = {
    "no source": ([], "requires one source of datasets"),
    "two sources": (["--datasets", "{data}", "--table", "t.csv"], "found --datasets and --table"),
    "no dataset": (["--datasets", "{data}/none"], "missing files of datasets"),
    "shares": (["--table", "{w}"], "weights require a budget"),
    "no column": (["--table", "{bad}"], "expected one column with the amounts"),
    "not a number": (["--table", "{text}"], "row 2 (b): weight: expected a positive number"),
    "a fold file": (["--datasets", "{data}", "--fold-file", "x"], "remove --fold-file"),
    "a split": (["--datasets", "{data}", "--split", "9,1"], "only in Megatron-LM's order"),
    "parts in megatron order": (["--datasets", "{data}", "--split", "3", "--order", "megatron"],
                                "cannot be divided into folds"),
    "not divisible": (["--datasets", "{data}", "--split", "3", "--train-iters", "10"],
                      "give 9 or 12"),
    "too many folds": (["--datasets", "{data}", "--split", "5000"], "cannot be divided into 5000"),
    "two budgets": (["--datasets", "{data}", "--train-iters", "5", "--train-samples", "40"],
                    "both give the budget"),
    "too many samples": (["--datasets", "{data}", "--order", "megatron", "--train-iters", "9999"],
                         "without weights Megatron-LM uses one epoch"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_write_nothing(case, data, tmp_path, capsys):
    words, message = ERRORS[case]
    (tmp_path / "w.csv").write_text(f"path,weight\n{path_of(data, 'ja/wiki')},0.5\n")
    (tmp_path / "bad.csv").write_text("path,size\na,1\n")
    (tmp_path / "text.csv").write_text("path,weight\na,1\nb,much\n")
    values = {"data": data / "data", "w": tmp_path / "w.csv"}
    values |= {"bad": tmp_path / "bad.csv", "text": tmp_path / "text.csv"}
    before = sorted(tmp_path.iterdir())
    assert new(tmp_path, *(word.format(**values) for word in words))[0] == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_other_flags(data, tmp_path, capsys):
    assert plan_folds.main(["--order", "megatron", *FLAGS]) == 2
    assert "--order requires --new FILE" in capsys.readouterr().err
    code, target = new(tmp_path, "--datasets", data / "data/ja", "--dry-run")
    assert code == 0 and not target.exists() and not list(tmp_path.iterdir())
    shown = capsys.readouterr()
    assert "blends:" in shown.err and "iterations of 8 samples" in shown.out
    twice = f"1 {path_of(data, 'ja/wiki')} 2 {path_of(data, 'ja/wiki')}"
    (tmp_path / "list.txt").write_text(twice)
    words = ["--data-list", tmp_path / "list.txt", "--train-iters", 1, "--json"]
    assert new(tmp_path, *words)[0] == 0
    shown = capsys.readouterr()
    assert counts(json.loads(shown.out)) == [{"ja/wiki": BATCH}] or "wiki" in shown.out
    assert "listed more than once: its amounts are added" in shown.err
