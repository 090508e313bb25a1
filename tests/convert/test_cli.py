"""Command line of convert_checkpoint: help, errors, --dry-run and inspect."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.convert.hf_models import gpt2, llama


def test_help_does_not_import_torch(tmp_path):
    program = (
        "import sys; from megatron_llmjp.convert.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "convert_checkpoint --from native --to hf" in done.stdout
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "hf", "--ouput", "x"], "unknown flag --ouput; did you mean '--output'?"),
        (["--to", "huggingface", "--input", "a", "--output", "b"], "invalid choice"),
        (["--to", "hf", "--input", "nowhere", "--output", "b"], "nowhere: does not exist"),
        (
            ["--to", "native", "--from", "hf", "--input", "llm-jp/llm-jp-3-150m", "--output", "b"],
            "`hf download llm-jp/llm-jp-3-150m --local-dir llm-jp-3-150m`, and pass llm-jp-3-150m",
        ),
        (["--to", "hf", "--input", ".", "--output", "b", "--workers", "0"], "positive integer"),
        (["--to", "hf", "--input", ".", "--output", "b", "--max-shard-size", "5 tons"], "5GB"),
        (["--to", "hf", "--output", "b"], "--input"),
        (["inspect"], "required: DIR"),
        (["inspect", ".", "--ignore-arg", "x"], "did you mean '--ignore-args'?"),
    ],
)
def test_errors_are_one_line(convert, arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = convert(*arguments, code=2)
    assert message in text
    assert text.count("\n") == 1


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, convert):
    llama().save_pretrained(tmp_path / "hf")
    text = convert(
        "--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "o", "--dry-run"
    )
    line = next(x for x in text.splitlines() if x.startswith("decoder.layers.2.mlp.linear_fc1"))
    assert "[352x64] fp32" in line
    assert "model.safetensors -> iter_0000000/__0_0.distcp" in line
    assert "21 tensors" in text
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("target", ["native", "hf", "megatron-lm", "megatron-deepspeed"])
def test_inspect_describes_a_folder(tmp_path, convert, target):
    gpt2().save_pretrained(tmp_path / "hf")
    folder = tmp_path / "hf"
    if target != "hf":
        folder = tmp_path / "there"
        convert(
            "--to",
            target,
            "--input",
            tmp_path / "hf",
            "--output",
            folder,
            "--target-tensor-parallel-size",
            2,
        )
    text = convert("inspect", folder)
    assert f": {target}, " in text
    assert "gelu_tanh" in text
    assert "GPT2LMHeadModel" in text
    rows = "" if target == "hf" else " in 256 rows"
    assert f"vocabulary 101{rows}\n" in text


def test_unsupported_properties_are_named(tmp_path, convert):
    llama(num_key_value_heads=2, attention_bias=True).save_pretrained(tmp_path / "bias")
    text = convert(
        "--to", "native", "--input", tmp_path / "bias", "--output", tmp_path / "o", code=2
    )
    assert "attention_bias" in text
    llama(rope_theta=5000.0).save_pretrained(tmp_path / "base")
    text = convert(
        "--to",
        "megatron-deepspeed",
        "--input",
        tmp_path / "base",
        "--output",
        tmp_path / "o",
        code=2,
    )
    assert "rotary_base 5000" in text


def test_tokenizer_of_another_model_is_refused(tmp_path, convert):
    import tokenizers

    vocabulary = {"</s>": 0, **{f"t{i}": i for i in range(1, 200)}}
    (tmp_path / "tokenizer").mkdir()
    model = tokenizers.models.WordLevel(vocabulary, unk_token="t1")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    llama().save_pretrained(tmp_path / "hf")
    text = convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "o",
                   "--tokenizer", tmp_path / "tokenizer", code=2)  # fmt: skip
    assert "the tokenizer has 200 tokens, the model has 101" in text
