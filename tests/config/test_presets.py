"""A preset is one file: it appears in --help, the documentation, and estimates."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_llmjp import cli
from megatron_llmjp.config import flags, loading
from megatron_llmjp.config.parameter_counts import count_parameters
from tools.preset_table import PAGE, preset_table, with_table

NAME = "added-model-7b"
TEXT = """\
model:
  num_layers: 32
  hidden_size: 4096
  num_attention_heads: 32
  num_query_groups: 8
  vocab_size: 32000
training:
  global_batch_size: 512
  bf16: true
optimizer:
  lr: 2.5e-4
"""


@pytest.fixture
def added(tmp_path, monkeypatch):
    """A folder of presets with one more file."""
    for name in loading.preset_names():
        (tmp_path / f"{name}.yaml").write_text((loading.PRESETS / f"{name}.yaml").read_text())
    (tmp_path / f"{NAME}.yaml").write_text(TEXT)
    monkeypatch.setattr(loading, "PRESETS", tmp_path)
    flags._make_parser.cache_clear()
    yield
    flags._make_parser.cache_clear()


def test_all_presets_are_in_the_documentation():
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page), "run python tools/preset_table.py"
    assert all(f"\n| {name} |" in page for name in loading.preset_names())


def test_a_distributed_optimizer_overlaps_its_communication():
    for name in loading.preset_names():
        layers = loading.ConfigLayers()
        loading.read_preset(layers, name, name)
        parallel = loading.build_config(layers, may_be_missing=True).parallel
        overlaps = (parallel.overlap_grad_reduce, parallel.overlap_param_gather)
        assert overlaps == (parallel.use_distributed_optimizer,) * 2, name


def test_presets_of_published_models_save_as_llm_jp_did():
    """Every 1,000 iterations, which are kept; some scripts saved every 100."""
    for name in loading.preset_names():
        layers = loading.ConfigLayers()
        loading.read_preset(layers, name, name)
        found = loading.build_config(layers, may_be_missing=True).checkpoint
        rules = (found.save_interval, found.non_persistent_save_interval, found.keep_last)
        every_100 = 100 if any(part in name for part in ("v1.0", "v2.0", "291b")) else None
        assert rules == ((None,) * 3 if "laptop" in name else (1000, every_100, None)), name
        assert found.non_persistent_save_minutes == 60


def test_an_added_preset_appears_everywhere(added, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    assert NAME in capsys.readouterr().out
    row = f"| {NAME} | 32 / 4096 / 32 (8) | 1 x 1 | 1 / 512 | 2.5e-4 |\n"
    assert row in preset_table()
    assert row in with_table(Path(PAGE).read_text(encoding="utf-8"))
    monkeypatch.setattr("megatron_llmjp.planning._build_on_meta", lambda _: "")  # imports torch
    words = ["--config", NAME, "--use-distributed-optimizer", "--sequence-parallel"]
    assert cli.main([*words, "--estimate", "--world-size", "64", "--train-iters", "100"]) == 0
    printed = capsys.readouterr().out
    assert "64 H100" in printed
    assert cli.main(["--config", "added-model", "--dry-run"]) == 2
    assert NAME in capsys.readouterr().err


def test_the_experts_of_llm_jp_4_have_the_published_sizes():
    """Of all parameters and those that a token uses, as the published scripts are named."""
    counts = count_parameters(flags.parse(["--config", "llm-jp-4-32b-a3b"]).config)
    assert (round(counts.total / 1e9), round(counts.active / 1e9, 1)) == (32, 3.8)
    counts = count_parameters(flags.parse(["--config", "llm-jp-4-291b-a27b"]).config)
    assert (counts.total // 10**9, counts.active // 10**9) == (291, 27)
