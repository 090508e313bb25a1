"""Data plan of a run: compared with the published llm-jp-13b-v1.0, and each warning."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_tools import plan_folds
from megatron_llmjp import cli as pretrain_cli
from megatron_llmjp.config.schema import Config
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.data.folds.loading import read_fold_file
from megatron_llmjp.data.folds.resolve import resolve_folds
from megatron_llmjp.data.folds.schedule import DatasetInfo
from megatron_llmjp.data.folds.schema import FoldFile
from megatron_llmjp.estimate.data_plan import format_data_plan, make_data_plan
from megatron_llmjp.estimate.data_warnings import data_plan_warnings
from tests.support.datasets import write_dataset

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "reproduce_llm-jp-13b-v1.0" / "folds.yaml"
MODEL = {"num_layers": 1, "hidden_size": 1, "num_attention_heads": 1}


def config_of(length, batch, training=None, **optimizer):
    return Config.model_validate(
        {
            "model": MODEL,
            "data": {"seq_length": length},
            "training": {"global_batch_size": batch, **(training or {})},
            "optimizer": optimizer,
        }
    )


def planned(file, tokens, config, train_iters=None, rate=None):
    """Return plan and warnings for datasets of given sizes."""
    infos = {path: DatasetInfo(path, n) for path, n in tokens.items()}
    sizes = BatchSizeSchedule(config)
    schedule = resolve_folds(file, infos, config.data.seq_length, sizes)
    plan = make_data_plan(schedule, sizes, train_iters, rate)
    return plan, data_plan_warnings(plan, schedule, config, file, infos)


def test_the_example_is_the_published_run():
    """llm-jp-13b-v1.0: 87,870 iterations after ten folds, 96,657 and 304.06 B tokens at the end."""
    file = read_fold_file(EXAMPLE)
    tokens = dict.fromkeys(file.dataset_paths(), 10**9)
    for fold in file.folds:
        tokens |= {s.path: int(s.weight * 10**9) for s in fold.blend.values()}
    config = config_of(
        2048, 1536, lr=1e-4, min_lr=1e-6, lr_warmup_tokens=3 * 10**9, lr_decay_tokens=3 * 10**11
    )
    plan, warnings = planned(file, tokens, config, rate=lambda iteration: iteration * 1e-9)

    assert [fold.iterations for fold in plan.folds] == [8787] * 11
    assert plan.folds[9].last_iteration == 87_870
    assert plan.folds[10].first_iteration == 87_871
    assert plan.train_iters == plan.folds[10].last_iteration == 96_657
    assert plan.samples == 96_657 * 1536
    assert plan.tokens == 304_056_631_296
    assert plan.unused_samples == 0
    for fold in plan.folds:
        assert fold.tokens == 8787 * 1536 * 2048
        assert sum(row.samples for row in fold.datasets) == fold.samples
        assert sum(row.share for row in fold.datasets) == pytest.approx(1)
        for row in fold.datasets:
            assert row.epochs == pytest.approx(row.tokens / tokens[row.path], rel=1e-3)
    ja = plan.folds[3].datasets[1]
    assert ja.name == "ja_mc4" and ja.epochs == pytest.approx(0.961, abs=5e-4)

    text = format_data_plan(plan, warnings)
    lines = [line.split() for line in text.splitlines()]
    fold09 = ["fold09", "27.64B", "13,496,832", "8,787", "79,084", "87,870"]
    assert [*fold09, "7.908e-05", "8.787e-05"] in lines
    assert ["total", "304.06B", "148,465,152", "96,657"] in lines
    assert not warnings
    # 300 B tokens of decay are 95,367 iterations: shorter than the run without the last fold's own
    # schedule.
    last = file.folds[-1].model_copy(update={"learning_rate": None})
    one_curve = file.model_copy(update={"folds": (*file.folds[:-1], last)})
    _, warnings = planned(one_curve, tokens, config)
    assert len(warnings) == 1
    assert "decay ends at iteration 95,367, the run at 96,657: 1,290 iterations" in warnings[0]


FOLDS = [
    {"name": "one", "samples": 30, "blend": {"a": {"path": "a", "weight": 1}}},
    {"name": "tiny", "samples": 3, "blend": {
        "a": {"path": "a", "weight": 1, "repeat": True},
        "b": {"path": "b", "weight": 1e-6},
    }},
    {"name": "rest", "samples": 24, "blend": {
        "c": {"path": "c", "weight": 1}, "d": {"path": "c", "weight": 1},
    }, "learning_rate": {"lr": 1e-4, "lr_warmup_iters": 9, "lr_decay_iters": 1}},
]  # fmt: skip


def test_warnings():
    validation = {"held out": {"path": "c"}}
    file = FoldFile.model_validate({"folds": FOLDS, "validation": validation})
    tokens = {"a": 16 * 32 + 1, "b": 1700, "c": 1700}
    config = config_of(16, 8, lr_warmup_iters=5, lr_decay_iters=4)
    plan, warnings = planned(file, tokens, config)
    assert warnings == [
        "fold 'tiny' has 3 samples, less than one global batch of 8: it shares its iteration with "
        "adjacent folds",
        "fold 'tiny': the share of b is less than one sample: no sample of it is trained on",
        "the last 1 samples do not fill a batch of 8 and are dropped",
        "used in more than one fold: a (2 folds, 1.03 epochs in total); a fold continues where the "
        "last one stopped, unless it has `restart: true`",
        "fold 'rest': 'c' and 'd' are the same dataset (c)",
        "samples are repeated: a (1.03 epochs)",
        "validation set 'held out' (c) is also trained on, from fold 'rest' on: its loss does not "
        "measure generalization",
        "the learning-rate decay ends at iteration 4, the run at 7: 1 iterations are trained at "
        "min_lr 0. The scripts of llm-jp-3 did so (they added the warm-up to the decay, which "
        "already includes it); lr_decay_iters 7 decays until the end of the run",
        "the warm-up of 5 iterations is longer than the first fold ('one', 4 iterations)",
        "fold 'rest': its warm-up of 9 iterations is longer than the fold (2)",
        "fold 'rest': its learning rate's decay ends after 1 iterations, 1 before the fold does "
        "(2)",
    ]
    assert [(f.first_iteration, f.last_iteration) for f in plan.folds] == [(1, 4), (4, 5), (5, 7)]
    assert format_data_plan(plan, ["w"]).splitlines() == [
        "         share  tokens  samples  epochs  total  iterations  first  last",
        "one                480       30                          4      1     4",
        "  a    100.00%     480       30   0.938  0.938",
        "tiny                48        3                          2      4     5",
        "  a    100.00%      48        3   0.094  1.031",
        "  b      0.00%       0        0   0.000  0.000",
        "rest               384       24                          3      5     7",
        "  c     50.00%     192       12   0.113  0.113",
        "  d     50.00%     192       12   0.113  0.226",
        "total              912       57                          7",
        "7 iterations of 8 samples of 16 tokens: 896 tokens (896) of 3 datasets in 3 folds",
        "use in the run  tokens  trained on  epochs  up-sampling  tokens seen",
        "  a                512         528   1.031        4.49x  1x 96.9%, 2x 3.1%",
        "  c              1.70K         368   0.217        0.95x  0x 78.3%, 1x 21.7%",
        "  b              1.70K           0   0.000        0.00x  0x",
        "warning: w",
    ]

    one_curve = [{k: v for k, v in fold.items() if k != "learning_rate"} for fold in FOLDS]
    file = FoldFile.model_validate({"folds": one_curve})
    _, late = planned(file, tokens, config_of(16, 8, lr_decay_iters=9))
    assert any("ends at iteration 9, after the run's last iteration 7: min_lr" in w for w in late)
    plan, early = planned(file, tokens, config_of(16, 8), train_iters=2)
    assert (
        "the run ends at iteration 2, the folds at 7: 41 samples are not trained on, including all "
        "of fold tiny, rest"
    ) in early
    assert plan.unused_samples == 41
    lines = [line.split() for line in format_data_plan(plan).splitlines()]
    assert ["one", "480", "30", "2", "1", "2"] in lines
    assert ["rest", "384", "24", "0", "not", "reached"] in lines
    # llm-jp-3: the decay is shorter than the run by the warm-up.
    _, llmjp = planned(file, tokens, config_of(16, 8, lr_warmup_iters=2, lr_decay_iters=5))
    assert any("added the warm-up to the decay" in w and "lr_decay_iters 7" in w for w in llmjp)


RATE = {"lr": 1e-4, "lr_warmup_iters": 2}


@pytest.mark.parametrize(
    ("rate", "warnings"),
    [
        ({"lr_decay_iters": 3}, []),
        ({"lr_decay_iters": 5}, ["its learning rate's decay ends after 5 iterations, 2 after the "
                                 "fold does (3)"]),
        ({"lr_warmup_iters": 3}, []),
        ({"lr_warmup_iters": 4}, ["its warm-up of 4 iterations is longer than the fold (3)"]),
    ],
)  # fmt: skip
def test_lengths_of_a_folds_schedule(rate, warnings):
    """Two folds of three iterations."""
    folds = [{"name": n, "samples": 24, "blend": {n: {"path": n, "weight": 1}}} for n in "ab"]
    folds[1]["learning_rate"] = RATE | rate
    file = FoldFile.model_validate({"folds": folds})
    tokens = {"a": 16 * 24 + 1, "b": 16 * 24 + 1}
    _, found = planned(file, tokens, config_of(16, 8))
    assert found == [f"fold 'b': {text}" for text in warnings]


@pytest.mark.parametrize(
    ("warmup", "iterations"),
    [
        ({"lr_warmup_iters": 3}, None),
        ({"lr_warmup_iters": 4}, 4),
        ({"lr_warmup_fraction": 0.5}, None),  # of the 6 iterations of the run
        ({"lr_warmup_fraction": 0.7}, 4),
        ({"lr_warmup_fraction": 0.5, "lr_decay_iters": 8}, 4),
    ],
)
def test_a_warm_up_longer_than_the_first_fold(warmup, iterations):
    folds = [{"name": n, "samples": 24, "blend": {n: {"path": n, "weight": 1}}} for n in "ab"]
    file = FoldFile.model_validate({"folds": folds})
    tokens = {"a": 16 * 24 + 1, "b": 16 * 24 + 1}
    _, found = planned(file, tokens, config_of(16, 8, lr_decay_style="cosine", **warmup))
    expected = f"the warm-up of {iterations} iterations is longer than the first fold ('a', "
    warnings = [f"{expected}3 iterations)"] if iterations else []
    assert [w for w in found if "warm-up" in w] == warnings


def test_skipped_samples_move_later_folds():
    file = FoldFile.model_validate({"folds": FOLDS[:1], "skip": [{"samples": [4, 14]}]})
    plan, warnings = planned(file, {"a": 16 * 32 + 1}, config_of(16, 8))
    fold, skip = plan.folds[0], plan.skips[0]
    assert (fold.samples, fold.skipped, fold.iterations) == (30, 10, 2)
    assert (plan.train_iters, plan.samples, plan.unused_samples) == (2, 16, 4)
    assert (skip.first, skip.end, skip.fold, skip.before_iteration) == (4, 14, "one", 1)
    assert (
        "skipped: samples 4 to 13 (10 samples, starting in fold 'one'), before iteration 1\n"
    ) in format_data_plan(plan, warnings)
    file = FoldFile.model_validate({"folds": FOLDS[:1], "skip": [{"samples": [0, 30]}]})
    _, warnings = planned(file, {"a": 16 * 32 + 1}, config_of(16, 8))
    assert "fold 'one': all of its 30 samples are skipped" in warnings


def test_warning_on_megatron_order_after_another_fold():
    theirs = {**FOLDS[0], "name": "theirs", "order": "megatron"}
    ours = {**FOLDS[0], "blend": {"a": {"path": "a", "weight": 1, "repeat": True}}}
    file = FoldFile.model_validate({"folds": [theirs, ours]})
    plan, warnings = planned(file, {"a": 1700}, config_of(16, 6))
    assert "theirs (megatron order)" in format_data_plan(plan) and len(warnings) == 2
    assert "used in Megatron-LM's order and in other folds: a (2 folds" in warnings[0]


@pytest.fixture
def folder(tmp_path):
    write_dataset(tmp_path / "ja", 200, seed=1)
    write_dataset(tmp_path / "en", 200, seed=2)
    blend = {"ja": {"path": "ja", "weight": 2}, "en": {"path": "en", "weight": 1}}
    folds = [{"name": f"f{i}", "iterations": 10, "blend": blend} for i in range(2)]
    (tmp_path / "folds.yaml").write_text(yaml.safe_dump({"folds": folds}, sort_keys=False))
    return tmp_path


def test_plan_folds_needs_neither_model_nor_tokenizer_nor_torch(folder, capsys):
    flags = ["--fold-file", folder / "folds.yaml", "--seq-length", 32, "--global-batch-size", 8]
    words = [str(flag) for flag in flags]
    code = "import sys; from data_tools.plan_folds import main; e = main(sys.argv[1:])\n"
    code += "assert not {'torch', 'megatron.core'} & set(sys.modules); sys.exit(e)"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--json"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["train_iters"] == 20 and plan["tokens"] == 20 * 8 * 32
    assert [row["samples"] for row in plan["folds"][1]["datasets"]] == [53, 27]
    assert plan["folds"][0]["last_iteration"] == 10

    assert plan_folds.main([*words, "--csv"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["fold"] for row in rows] == ["f0", "f0", "f1", "f1"]
    assert sum(int(row["tokens"]) for row in rows) == plan["tokens"]

    assert plan_folds.main([*words, "--train-iters", "21"]) == 2
    assert "train_iters 21 needs 168 samples" in capsys.readouterr().err


def test_learning_rates_and_tokenizers(folder, capsys, monkeypatch):
    """``--plan-data`` prints megatron-core's learning rates and the datasets' tokenizers."""
    makers = {name: {"type": "X", "vocab_size": n, "eod_id": 0, "files": {}} for name, n in
              (("ja", 100), ("en", 200))}  # fmt: skip
    for name, maker in makers.items():
        (folder / f"{name}.json").write_text(json.dumps({"recipe": {"tokenizer": maker}}))
    words = [
        "--config", "laptop-llama", "--fold-file", folder / "folds.yaml", "--seq-length", 32,
        "--global-batch-size", 8, "--lr", 1e-3, "--min-lr", 1e-4, "--lr-warmup-iters", 4,
        "--lr-decay-style", "linear", "--tokenizer-type", "NullTokenizer", "--vocab-size", 100,
    ]  # fmt: skip
    assert pretrain_cli.main([*map(str, words), "--plan-data"]) == 2
    text = capsys.readouterr().err
    assert (
        f"{folder / 'en'} was tokenized with another tokenizer than the run's: X (200 ids" in text
    )
    words.append("--allow-tokenizer-mismatch")
    assert pretrain_cli.main([*map(str, words), "--plan-data"]) == 0
    shown = capsys.readouterr().out
    assert plan_folds.main([*map(str, words), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert all(f"warning: {warning}\n" in shown for warning in plan["warnings"])
    assert f"{plan['folds'][1]['last_learning_rate']:.4g}" in shown
    # Under torchrun, only rank 0 prints.
    place = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert pretrain_cli.main([*map(str, words), "--plan-data"]) == 0
    assert capsys.readouterr().out == ""
    first, second = plan["folds"]
    # Linear from 0 to lr over 4 iterations, then to min_lr at 20.
    expected = np.interp([0, 9, 10, 19], [0, 4, 20], [0, 1e-3, 1e-4])
    rates = [f[f"{which}_learning_rate"] for f in (first, second) for which in ("first", "last")]
    assert rates == pytest.approx(expected)
    text = "\n".join(plan["warnings"])
    for name in ("en", "ja"):
        assert f"{folder / name} was tokenized with another tokenizer than the run's" in text
    assert "accepted by --allow-tokenizer-mismatch" in text
    without = [word for word in map(str, words) if "tokenizer" not in word.lower()]
    assert plan_folds.main([*without, "--json"]) == 0
    text = "\n".join(json.loads(capsys.readouterr().out)["warnings"])
    assert "tokenized with different tokenizers" in text and "X (200 ids, EOD 0)" in text
