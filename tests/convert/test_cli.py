"""Command line of convert_checkpoint: help, errors, --dry-run and inspect."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_llmjp.config.model_config import ParallelConfig
from megatron_llmjp.convert import conversion
from megatron_llmjp.convert.cli import main
from megatron_llmjp.convert.copying import progress_bar
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.formats.base import ConversionOptions
from megatron_llmjp.errors import UserError
from tests.convert.hf_models import gpt2, llama
from tests.support.forks import run_program


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


OPTIONS = {
    # flags: the options that differ from the defaults
    "": {},
    "--dtype fp16": {"dtype": DType.float16},
    "--dtype bf16": {"dtype": DType.bfloat16},
    "--dtype fp32": {"dtype": DType.float32},
    "--target-tensor-parallel-size 2": {"parallel": ParallelConfig(tensor_model_parallel_size=2)},
    "--target-pipeline-parallel-size 3": {
        "parallel": ParallelConfig(pipeline_model_parallel_size=3)
    },
    "--num-virtual-stages-per-pipeline-rank 1": {},
    "--target-pipeline-parallel-size 2 --pipeline-model-parallel-layout Et|t|t|tL": {
        "parallel": ParallelConfig(
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
            pipeline_model_parallel_layout="Et|t|t|tL",
        )
    },
    "--distrib-optim-sharding-type fully_reshardable": {"optimizer_sharding": "fully_reshardable"},
    "--max-shard-size 500MB": {"max_shard_size": 500_000_000, "shard_size_given": True},
    "--like a/b": {"like": Path("a/b")},
    "--keep-vocab-padding": {"keep_vocabulary_padding": True},
    "--tokenizer a/b": {"tokenizer": Path("a/b")},
    "--tokenizer-type llama2tokenizer": {"tokenizer_type": "Llama2Tokenizer"},
    "--vocab-size 7": {"vocab_size": 7},
    "--ckpt-format torch": {"megatron_format": "torch"},
    "--transformer-impl local": {"transformer_impl": "local"},
    "--main-weights": {"main_weights": True},
    "--with-optimizer": {"with_optimizer": True},
    "--no-pipeline": {"no_pipeline": True},
    "--no-checksums": {"checksums": False},
    "--ignore-args a,b_c": {"ignored_args": frozenset({"a", "b_c"})},
    "--adapter a": {"adapter": Path("a")},
    "--chat-template a": {"chat_template": Path("a")},
}
DEFAULTS = {
    "dtype": None, "parallel": ParallelConfig(), "max_shard_size": 5_000_000_000,
    "shard_size_given": False, "like": None,
    "keep_vocabulary_padding": False, "tokenizer": None, "tokenizer_type": None,
    "vocab_size": None, "megatron_format": "torch_dist",
    "optimizer_sharding": "fully_sharded_model_space",
    "transformer_impl": "transformer_engine", "main_weights": False, "with_optimizer": False,
    "no_pipeline": False, "checksums": True, "ignored_args": frozenset(),
    "average": (), "ema_decay": None, "adapter": None, "chat_template": None,
}  # fmt: skip


@pytest.mark.parametrize("flags", OPTIONS)
def test_options(convert, monkeypatch, flags):
    """Those of the command line, whose defaults are those of the functions."""
    given = []

    def planned(source, target, path, options):
        given.append((source, target, path))
        assert asdict(options) == {**DEFAULTS, **OPTIONS[flags]}
        raise UserError("planned")

    monkeypatch.setattr(conversion, "plan_conversion", planned)
    words = ["--from", "native", "--to", "hf", "--input", "x", "--output", "y", *flags.split()]
    assert convert(*words, code=2) == "convert_checkpoint: planned\n"
    assert given == [("native", "hf", Path("x"))]
    assert asdict(ConversionOptions()) == DEFAULTS


def test_as_a_module():
    """As the job script starts it."""
    done = run_program("-m", "megatron_llmjp.convert.cli", "inspect")
    assert done.returncode == 2 and "required: DIR" in done.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_bar(monkeypatch, quiet):
    """At most five times a second, and at the end."""
    now, shown = [100.0], Terminal()
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", shown)
    bar = progress_bar.ProgressBar(8_000_000_000, quiet)
    for seconds, nbytes in ((2.0, 2 * 10**9), (0.15, 10**9), (0.1, 10**9), (0.0, 4 * 10**9)):
        now[0] += seconds
        bar.add(nbytes)
    bar.close()
    assert shown.getvalue().split("\r") == (
        [""]
        if quiet
        else [
            "",
            "[#######                       ] 2.00 of 8.00 GB, 1.00 GB/s, 6 s left ",
            "[###############               ] 4.00 of 8.00 GB, 1.78 GB/s, 2 s left ",
            "[##############################] 8.00 of 8.00 GB, 3.56 GB/s, 0 s left \n",
        ]
    )
    shown.isatty = lambda: False  # type: ignore[method-assign]
    progress_bar.ProgressBar(5, False).add(5)
    assert quiet == (shown.getvalue() == "")


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


def test_the_handler_of_sigterm_is_restored(capsys):
    """A program that calls main() has its own, and may call it in another thread."""

    def own(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, own)
    codes: list[int] = []
    try:
        assert main(["inspect", "missing"]) == 2
        thread = threading.Thread(target=lambda: codes.append(main(["inspect", "missing"])))
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    assert codes == [2]


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
