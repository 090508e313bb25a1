"""User errors: one message that names the cause, and exit code 2, without importing torch.

``main`` is called in this process, as the process that starts the ranks calls it; every mistake
here is found before a rank exists.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import yaml

from data_tools.preprocess.input.sources import SUFFIXES
from megatron_llmjp import cli as pretrain_cli
from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint.resume import add_stored_config
from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import dump_config
from megatron_llmjp.config.schema import SECTION_OF
from megatron_llmjp.parallel.ranks import LAUNCHER_VARIABLE, LOCAL_LAUNCHER
from megatron_llmjp.run import resolve_run
from tests.support.datasets import write_folds
from tests.support.training import arguments

BATCH = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    write_folds(folder, (2, 3, 1))
    return folder


@pytest.fixture
def fails(capsys, monkeypatch):
    """Run the command line and return its message."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name in ("_run_rank", "launch"):
        monkeypatch.setattr(pretrain_cli, name, not_reached)

    def run(*words):
        code = pretrain_cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        assert code == 2, captured
        assert captured.out == ""
        assert captured.err.startswith("error: ") and captured.err.count("error: ") == 1
        assert "Traceback" not in captured.err
        return captured.err.removeprefix("error: ")

    return run


def not_reached(*_):
    raise AssertionError("the error was not found")


FLAGS = {
    # flags added to a valid run: parts of the message
    "--lerning-rate 1": ["unknown flag --lerning-rate; did you mean '--lr'?"],
    "--global-batch 8": ["unknown flag --global-batch; did you mean '--global-batch-size'?"],
    "--data-path x": ["both --fold-file and --data-path declare the data", "remove one of them"],
    "--lr fast": ["flag --lr: lr = 'fast': expected a valid number"],
    "--num-layers 0": ["flag --num-layers: num_layers = '0': expected greater than 0"],
    "--optimizer lion": ["flag --optimizer: optimizer = 'lion': expected 'adam' or 'sgd'"],
    "word": ["unexpected argument 'word'"],
    "--lr": ["--lr", "expected one argument"],
    "--nproc-per-node 0": ["--nproc-per-node 0: at least 1"],
    "--config laptop-lama": ["no preset or file 'laptop-lama'", "laptop-llama"],
    "--fold-file none.yaml": ["fold file none.yaml cannot be read", "No such file"],
    "--tensor-model-parallel-size 3 --num-attention-heads 16 --nproc-per-node 3": [
        "num_attention_heads 16 is not divisible by tensor_model_parallel_size 3",
        "possible are 1, 2, 4, 8, 16",
    ],
    "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 --nproc-per-node 6": [
        "6 processes are not divisible by tensor 2 x pipeline 2", "a multiple of 4", "1, 2, 3, 6",
    ],
    "--nproc-per-node 3": [
        "global_batch_size 4 is not a multiple of micro_batch_size 1 x data-parallel size 3 = 3",
        "try 3",
    ],
    "--pipeline-model-parallel-size 3 --nproc-per-node 3 --global-batch-size 3": [
        "num_layers 4 is not divisible into 3 pipeline chunks", "1, 2, 4",
    ],
    "--seq-length 64 --max-position-embeddings 32": ["seq_length 64 exceeds", "32"],
    "--train-iters 7": ["train_iters 7 needs 28 samples", "hold 24", "enough for 6"],
    "--global-batch-size 1000": ["fold 'fold00'", "epochs", "repeat: true"],
    "--min-lr 1": ["min_lr 1.0 is above lr 0.002: lower min_lr"],
    "--lr-warmup-iters 9 --train-iters 6": ["lr_warmup_iters 9 must be smaller than train_iters 6"],
    "--lr-warmup-iters 9": ["lr_warmup_iters 9 must be smaller than lr_decay_iters 6"],
    "--transformer-impl transformer_engine": [
        "needs Transformer Engine, which is not installed", "omit the option",
    ],
    "--transformer-impl inference_optimized": [
        "transformer_impl", "'transformer_engine' or 'local'", "inference_optimized",
    ],
    "--tokenizer-type SentencePieceTokenizer": ["SentencePieceTokenizer", "--tokenizer-model"],
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model no.model": ["no.model"],
    "--load nothing": ["--load nothing: no complete checkpoint"],
    "--load llm-jp/llm-jp-3-1.8b": [
        "no complete checkpoint", "`hf download llm-jp/llm-jp-3-1.8b --local-dir llm-jp-3-1.8b`",
    ],
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model llm-jp/llm-jp-3-1.8b": [
        "does not exist", "`hf download llm-jp/llm-jp-3-1.8b",
    ],
    "--save-interval 5": ["save_interval requires save"],
    "--bf16 --fp16": ["bf16 and fp16 are mutually exclusive"],
    "--virtual-pipeline-model-parallel-size 2": ["requires pipeline_model_parallel_size 2"],
}  # fmt: skip


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(folder, fails, flags):
    message = fails(*arguments("laptop-llama", folder / "folds.yaml"), *flags.split())
    for part in FLAGS[flags]:
        assert part in message, message


def test_several_errors_are_reported_together(folder, fails):
    words = "--min-lr 1 --pipeline-model-parallel-size 3 --nproc-per-node 3"
    message = fails(*arguments("laptop-llama", folder / "folds.yaml"), *words.split())
    assert [line.split()[0] for line in message.splitlines()] == ["num_layers", "min_lr"]


def test_a_default_warm_up_hides_no_error(folder, fails):
    """A default warm-up is shortened; errors of rules, tokenizer and data are reported together."""
    words = arguments("laptop-llama", folder / "folds.yaml", lr_warmup_iters="")
    run = resolve_run(parse([*words, "--train-iters", "2"]).config, 1)
    assert run.config.optimizer.lr_warmup_iters == 0
    assert any("instead of the default 20 (--lr-warmup-iters" in note for note in run.notes)
    longer = resolve_run(parse([*words, "--lr-decay-iters", "100"]).config, 1)
    assert longer.config.optimizer.lr_warmup_iters == 20
    message = fails(*words, "--train-iters", 2, "--lr-warmup-iters", 2)
    assert "lr_warmup_iters 2 must be smaller than train_iters 2" in message
    message = fails(
        *words, "--train-iters", 2, "--min-lr", 1, "--fold-file", "none.yaml",
        "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "no.model",
    )  # fmt: skip
    for part in ("min_lr 1.0 is above lr", "no.model", "none.yaml"):
        assert part in message, message


YAML = {
    "preset: laptop-llama\ntraining:\n  train_iter: 5\n": (
        "line 3: unknown key 'train_iter' in section 'training'; did you mean 'train_iters'?"
    ),
    "preset: laptop-llama\ntraining:\n  lr: 5\n": (
        "line 3: unknown key 'lr' in section 'training'; it belongs to section 'optimizer'"
    ),
    "preset: laptop-llama\noptimiser:\n  lr: 5\n": (
        "line 2: unknown section 'optimiser'; did you mean 'optimizer'?"
    ),
    "preset: laptop-llama\n\noptimizer:\n  lr: fast\n": "line 4: lr = 'fast': expected a valid",
    "preset: lapto-llama\n": "line 1: no preset or file 'lapto-llama'; possible: laptop-llama",
    "preset: laptop-llama\ntraining: 5\n": "line 2: section 'training' must contain fields",
    "- 1\n": "expected keys and values, found a list",
    "model: [\n": "not valid YAML",
    "model:\n  num_layers: 2\n  hidden_size: 8\n": "num_attention_heads is missing",
}  # fmt: skip


@pytest.mark.parametrize("text", YAML)
def test_configuration_file(tmp_path, fails, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    message = fails("--config", path)
    assert YAML[text] in message, message
    if "missing" not in message:
        assert str(path) in message


def test_data(folder, tmp_path, fails):
    content = yaml.safe_load((folder / "folds.yaml").read_text())

    def refused(**source):
        changed = yaml.safe_load((folder / "folds.yaml").read_text())
        changed["folds"][1]["blend"]["ja"] |= source
        (folder / "changed.yaml").write_text(yaml.safe_dump(changed))
        return fails(*arguments("laptop-llama", folder / "changed.yaml"))

    message = refused(path="missing/ja")
    assert "fold 'fold01', dataset 'ja'" in message and str(folder / "missing/ja.idx") in message
    assert "unknown key; did you mean 'path'?" in refused(pat="x")
    (folder / "cut.idx").write_bytes((folder / "ja.idx").read_bytes())
    (folder / "cut.bin").write_bytes((folder / "ja.bin").read_bytes()[:-2])
    assert "cut.bin" in refused(path="cut")
    for suffix in SUFFIXES:
        text = f"corpus/ja{suffix}"
        message = refused(path=text)
        assert f"{text} is a text file, not a tokenized dataset" in message
        made = folder / "corpus/ja"
        assert f"preprocess_data --input {folder / text} --output-prefix {made} " in message
        assert f"writes {made}_text_document" in message
    message = fails(*arguments("laptop-llama", folder / "none.yaml"))
    assert str(folder / "none.yaml") in message
    (folder / "length.yaml").write_text(yaml.safe_dump({**content, "sequence_length": 64}))
    message = fails(*arguments("laptop-llama", folder / "length.yaml"))
    assert "sequence_length 64 differs from the run's seq_length 32" in message


@pytest.fixture
def saved(folder, tmp_path):
    """A checkpoint after 3 iterations of 4, in the second fold; without tensors."""
    return write_checkpoint(folder, tmp_path / "run", 3)


def write_checkpoint(folder, save, iteration, name="laptop-llama"):
    config = parse(arguments(name, folder / "folds.yaml")).config
    run = resolve_run(config, 1)
    inner = save / manifests.folder_name(iteration)
    inner.mkdir(parents=True)
    (inner / manifests.CONFIG).write_text(dump_config(run.config))
    (inner / "tensors").write_text("numbers" * 100)
    manifests.write_manifest(
        inner,
        manifests.Manifest(
            iteration=iteration,
            consumed_samples=iteration * BATCH,
            contents="full",
            folds=run.schedule.consumed_folds(iteration * BATCH),
            files=manifests.file_entries(inner, manifests.all_files(inner)),
        ),
    )
    return save


def with_fold(folder, number, weight):
    content = yaml.safe_load((folder / "folds.yaml").read_text())
    content["folds"][number]["blend"]["ja"]["weight"] = weight
    path = folder / f"changed{number}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_resume_with_other_folds(folder, saved, fails):
    message = fails(*arguments("laptop-llama", with_fold(folder, 1, 9), "--load", saved))
    assert "fold 'fold01' has changed" in message and "fold00" not in message
    content = yaml.safe_load((folder / "folds.yaml").read_text())
    del content["folds"][0]
    (folder / "gone.yaml").write_text(yaml.safe_dump(content))
    message = fails(*arguments("laptop-llama", folder / "gone.yaml", "--load", saved))
    assert "fold 'fold00' is missing" in message and "fold 'fold01' has changed" in message

    # A fold that was not consumed may change, and any with --override-resume.
    later = arguments("laptop-llama", with_fold(folder, 2, 9), "--load", saved)
    assert resolve_run(parse(later)[0], 1).resume.manifest.iteration == 3
    allowed = arguments("laptop-llama", with_fold(folder, 1, 9), "--load", saved)
    allowed += ["--override-resume", "folds"]
    assert resolve_run(parse(allowed)[0], 1).resume is not None


@pytest.mark.parametrize(
    ("flag", "value", "field", "old"),
    [
        ("--num-layers", 8, "num_layers", 4),
        ("--global-batch-size", 8, "global_batch_size", 4),
        ("--seq-length", 16, "seq_length", 32),
        ("--activation-function", "gelu_tanh", "activation_function", "'swiglu'"),
        ("--rotary-base", 500000, "rotary_base", 10000),
    ],
)
def test_resume_with_another_run(folder, saved, fails, flag, value, field, old):
    words = arguments("laptop-llama", folder / "folds.yaml", flag, value, "--load", saved)
    message = fails(*words)
    assert f"{field} is {value!r}" in message and f"trained with {old}" in message
    assert f"--override-resume {field}" in message
    words += ["--override-resume", field, "folds"]
    config = resolve_run(parse(words)[0], 1).config
    assert getattr(getattr(config, SECTION_OF[field]), field) == value


def test_the_run_ends_before_the_checkpoint(folder, saved):
    run = resolve_run(
        parse(arguments("laptop-llama", folder / "folds.yaml", "--load", saved))[0], 1
    )
    assert run.train_iters == 6 and run.resume.manifest.iteration == 3


def test_damaged_checkpoints_are_skipped(folder, saved, fails):
    write_checkpoint(folder, saved, 4)
    newest = write_checkpoint(folder, saved, 5) / manifests.folder_name(5)
    words = arguments("laptop-llama", folder / "folds.yaml", "--save", saved)

    def found():
        run = resolve_run(parse(words)[0], 1)
        return run.resume.manifest.iteration, run.warnings

    assert found() == (5, [])
    (newest / "tensors").write_text("cut")
    iteration, (warning,) = found()
    assert iteration == 4
    assert "tensors has 3 bytes instead of 700" in warning and "resuming from" in warning
    (saved / "iter_0000004" / manifests.MANIFEST).write_text("{")
    assert found()[0] == 3 and len(found()[1]) == 2
    (saved / "iter_0000003" / manifests.CONFIG).unlink()
    message = fails(*words)
    assert message.count("damaged checkpoint") == 3

    # Incomplete copies and checkpoints without a manifest are not overwritten.
    for iteration in (3, 4, 5):
        (saved / manifests.folder_name(iteration) / manifests.MANIFEST).unlink()
    assert "iter_0000005 is a checkpoint of this program without manifest.json" in fails(*words)
    shutil.rmtree(saved)
    assert resolve_run(parse(words)[0], 1).resume is None


def test_converted_weights_need_finetune(folder, saved, fails):
    path = saved / "iter_0000003" / manifests.MANIFEST
    manifest = manifests.read_manifest(path.parent)
    manifests.write_manifest(path.parent, manifest.model_copy(update={"contents": "weights"}))
    words = arguments("laptop-llama", folder / "folds.yaml", "--load", saved)
    assert "add --finetune" in fails(*words)
    assert resolve_run(parse([*words, "--finetune"])[0], 1).resume.manifest.contents == "weights"


LONGER = ["--seq-length", "64", "--max-position-embeddings", "64"]
YARN = ["--position-embedding-type", "yarn", "--yarn-rotary-scaling-factor", "2"]


def test_weights_start_on_longer_sequences_with_finetune(folder, saved, fails):
    words = arguments("laptop-llama", folder / "folds.yaml", "--load", saved, *LONGER, *YARN)
    message = fails(*words)
    for field in ("seq_length", "max_position_embeddings", "yarn_rotary_scaling_factor"):
        (line,) = (line for line in message.splitlines() if f"{field} is " in line)
        assert "or start a new run from its weights with --finetune" in line
    run = resolve_run(parse([*words, "--finetune"])[0], 1)
    assert run.config.max_positions == 64
    notes = "\n".join(run.notes)
    assert "max_position_embeddings: the weights were trained with 32, now 64" in notes
    assert "position_embedding_type: the weights were trained with 'rope', now 'yarn'" in notes
    assert "--yarn-original-max-position-embeddings 32 scales from that length" in notes
    original = ["--yarn-original-max-position-embeddings", "32"]
    run = resolve_run(parse([*words, "--finetune", *original])[0], 1)
    assert "scales from that length" not in "".join(run.notes)


def test_learned_positions_have_a_length(folder, tmp_path, fails):
    saved = write_checkpoint(folder, tmp_path / "run", 3, "laptop-gpt2")
    for words in (LONGER, LONGER[:2]):
        message = fails(*arguments(
            "laptop-gpt2", folder / "folds.yaml", "--load", saved, "--finetune", *words,
        ))  # fmt: skip
        assert "max_position_embeddings is 64, but the weights of" in message
        assert "have learned embeddings of 32 positions: set it back" in message


def test_a_checkpoint_provides_its_configuration(folder, saved):
    """``--load`` of a native checkpoint needs no model flags; of weights only, no tokenizer."""
    stored = resolve_run(parse(arguments("laptop-llama", folder / "folds.yaml")).config, 1).config
    words = ["--load", str(saved), "--fold-file", str(folder / "folds.yaml")]

    def read(*flags):
        return parse([*words, *flags], add_stored_config=add_stored_config).config

    run = resolve_run(read(), 1)
    assert run.resume.manifest.iteration == 3 and run.config.model == stored.model
    assert read("--lr", "1e-4").optimizer.lr == 1e-4
    inner = saved / "iter_0000003"
    (inner / "tokenizer").mkdir()
    (inner / "tokenizer" / "tokenizer.json").write_text("{}")
    manifest = manifests.read_manifest(inner)
    manifests.write_manifest(inner, manifest.model_copy(update={"contents": "weights"}))
    config = read("--finetune", "--global-batch-size", "8")
    assert (config.data.tokenizer_type, config.data.seq_length) == ("HuggingFaceTokenizer", 32)
    assert config.data.tokenizer_model == str(inner / "tokenizer")
    assert config.training.global_batch_size == 8
    # The given type decides which of several files are used.
    model = inner / "tokenizer" / "tokenizer.model"
    model.touch()
    for kind, file in (("Llama2Tokenizer", model), ("HuggingFaceTokenizer", model.parent)):
        data = read("--finetune", "--tokenizer-type", kind).data
        assert (data.tokenizer_type, data.tokenizer_model) == (kind, str(file))
    model.unlink()
    # A model given by flags or a preset overrides the stored one.
    assert read("--config", "laptop-gpt2").model.normalization == "LayerNorm"


def test_only_the_first_rank_of_the_local_launcher_prints(folder, capsys, monkeypatch):
    words = arguments("laptop-llama", folder / "none.yaml")
    monkeypatch.setenv(LAUNCHER_VARIABLE, LOCAL_LAUNCHER)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert pretrain_cli.main(words) == 2
        assert bool(capsys.readouterr().err) == (rank == 0)


def test_errors_are_found_without_torch():
    """The entry point does not import torch."""
    code = "import sys, megatron_llmjp.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
