"""Rules and warnings across fields, and --dry-run."""

from __future__ import annotations

import pytest
import yaml

from megatron_llmjp import cli as pretrain_cli
from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import ConfigLayers, build_config, preset_names, read_config
from megatron_llmjp.config.validation import check_config
from megatron_llmjp.config.warnings import RunSize, config_warnings
from megatron_llmjp.errors import UserError
from tests.support.datasets import write_folds
from tests.support.training import arguments

STAGES, TENSOR = "--pipeline-model-parallel-size", "--tensor-model-parallel-size"
LAYOUT = "--pipeline-model-parallel-layout"
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
CHUNKS = "--virtual-pipeline-model-parallel-size"

INVALID = {
    # flags over llm-jp-3-1.8b (24 layers, 16 heads) on 8 processes: parts of the message
    f"{STAGES} 5": ["processes are not divisible", "24 is not divisible into 5", "2, 3, 4, 6, 8"],
    f"{STAGES} 4 {FIRST} 5": ["the 19 layers between", "3 pipeline chunks"],
    f"{STAGES} 2 {FIRST} 20 {LAST} 5": ["20 and 5 layers at the ends leave -1 layers"],
    f"{STAGES} 4 {CHUNKS} 2 {FIRST} 3 {LAST} 5 --global-batch-size 64": ["multiples of virtual"],
    f"{STAGES} 2 {FIRST} 10 --account-for-loss-in-pipeline-split": ["in one way only"],
    f"{STAGES} 2 --account-for-loss-in-pipeline-split": ["24, and 1 for embedding and loss,"],
    f"{STAGES} 2 {LAYOUT} Et*12|t*12": ["must begin with E, end with L"],
    f"{STAGES} 2 {LAYOUT} Et*12|t*11L": ["it has 23 layers (t), the model 24"],
    f"{STAGES} 2 {LAYOUT} Et*12|mt*12L": ["'m' is unknown"],
    f"{STAGES} 2 {LAYOUT} Et*6|(t*6|)*2t*6L": [f"set {CHUNKS[2:].replace('-', '_')} 2"],
    f"{STAGES} 2 {LAYOUT} Et*6|t*6|t*12L": ["3 stages for 2 processes", "a multiple of 2"],
    "--rampup-batch-size 30 8 100": ["its start 30 is not a multiple of 32", "try 32"],
    # The interleaved schedule processes one micro-batch of every stage at once: 2 x 16 samples.
    f"{STAGES} 2 {CHUNKS} 2 --rampup-batch-size 48 16 100": [
        "its start 48 is not a multiple of 32", "try 64", "its increment 16 is not a multiple",
    ],
    "--rampup-batch-size 64 320 100": ["do not reach global_batch_size 512", "divides 448"],
    # Each rank computes the first and the last of 2 x CP parts, to balance causal attention.
    "--context-parallel-size 2 --seq-length 4098": ["not divisible by 4", "a multiple of 4"],
    "--context-parallel-size 2 --tensor-model-parallel-size 2 --seq-length 4100": ["by 8, which"],
    "--recompute-granularity full": ["recompute_method uniform or block", "recompute_num_layers"],
    "--recompute-num-layers 1": ["recompute_num_layers requires recompute_granularity full"],
    "--rotary-percent 0.01": ["is 1: the number of rotated dimensions must be even"],
    "--position-embedding-type learned_absolute --use-rope-scaling": ["requires rotary embeddings"],
    "--loss-scale 128": ["loss_scale requires fp16"],
    "--tokenizer-special-tokens <x>": ["requires tokenizer_type TikTokenizer"],
    "--optimizer sgd": ["supports Adam only"],
    "--lr-warmup-iters 5 --lr-warmup-fraction 0.1": ["and lr_warmup_fraction are the same"],
    "--train-iters 5 --train-samples 99": ["train_iters and train_samples are the same length"],
    "--lr-decay-style WSD": ["WSD needs lr_wsd_decay_iters"],
    "--lr-decay-style WSD --lr-wsd-decay-iters 999999": ["is longer than lr_decay_iters 986240"],
    "--start-weight-decay 0.0": ["weight_decay_incr_style to linear or cosine"],
    "--weight-decay-incr-style linear": ["requires start_weight_decay and end_weight_decay"],
    "--eval-only": ["eval_only requires load"],
    "--exit-duration-in-mins 5": ["exit_duration_in_mins saves before exiting"],
    "--spike-action rollback": ["requires checkpoints: set save"],
}  # fmt: skip


@pytest.mark.parametrize("flags", INVALID)
def test_violated_rules(flags):
    config = parse(f"--config llm-jp-3-1.8b {flags}".split()).config
    with pytest.raises(UserError) as error:
        check_config(config, 8)
    for part in INVALID[flags]:
        assert part in str(error.value)


VALID = [
    f"{STAGES} 4 {FIRST} 5 {LAST} 7",
    f"{STAGES} 2 {FIRST} 10",
    f"{STAGES} 2 --account-for-loss-in-pipeline-split --account-for-embedding-in-pipeline-split",
    f"{STAGES} 2 {LAYOUT} Et*11|t*13L",
    f"{STAGES} 2 {CHUNKS} 2 {LAYOUT} Et*6,|(t*6|)*2t*6L",
    "--rampup-batch-size 64 64 10000",
    f"{STAGES} 2 --rampup-batch-size 48 16 10000",
    f"{STAGES} 2 {CHUNKS} 2 --rampup-batch-size 64 32 10000",
    "--lr-decay-style WSD --lr-wsd-decay-fraction 0.1",
    "--weight-decay-incr-style cosine --start-weight-decay 0 --end-weight-decay 0.1",
    # Another unit replaces that of a preset's length.
    "--lr-warmup-fraction 0.01 --lr-decay-tokens 1000000000",
]


@pytest.mark.parametrize("flags", VALID)
def test_valid_configurations(flags):
    check_config(parse(f"--config llm-jp-3-1.8b {flags}".split())[0], 8)


def preset(name, flags=""):
    return parse(["--config", name, *flags.split()])[0]


WARNINGS = {
    # flags over llm-jp-3-1.8b for 986,240 iterations: the only warning
    "": "",
    "--adam-eps 1e-5": "alpha1 and alpha2",
    "--adam-beta2 0.999": "Megatron-LM's default",
    "--weight-decay 0": "LLM-jp's models used 0.1",
    "--clip-grad 0": "clip_grad is 0",
    "--save-interval 999999": "save_interval 999,999 is longer than the run",
    "--eval-iters 0": "eval_iters is 0",
    "--eval-interval 999999": "eval_interval 999,999 is longer",
    "--no-bf16 --fp16": "loss scale can collapse",
    "--no-bf16": "twice the memory",
    "--lr-warmup-iters 0": "no warm-up",
    "--lr-warmup-iters 300000": "more than a fifth of the run",
    "--min-lr 1e-4": "the decay has little effect",
    "--min-lr 0": "have no effect",
    "--hidden-dropout 0.1": "dropout in a LLaMA model",
    "--make-vocab-size-divisible-by 32768": "are padding",
    "--no-use-distributed-optimizer": "each of the 32 replicas",
    "--pipeline-model-parallel-size 8 --global-batch-size 64": "bubble is 64% of each step",
    f"{STAGES} 8 --global-batch-size 64 {CHUNKS} 3": "bubble is 37% of each step",
    f"{STAGES} 8 --global-batch-size 512 {CHUNKS} 3": "",
    "--tensor-model-parallel-size 2 --no-sequence-parallel": "sequence_parallel is disabled",
    "--distributed-timeout-minutes 90": "detected only after that time",
    "--wandb-exp-name x": "requires wandb_project",
    "--seq-length 8192 --max-position-embeddings 8192": "",
    "--seq-length 8193 --max-position-embeddings 8193": "v4 used 500000",
    # The limits themselves, and the next value.
    "--adam-beta2 0.99": "",
    "--lr-warmup-iters 197248": "",
    "--lr-warmup-iters 197249": "of 197,249 iterations is more than a fifth of the run's 986,240",
    "--eval-interval 986240 --save-interval 986240": "",
    "--distributed-timeout-minutes 60": "",
    "--distributed-timeout-minutes 61": "distributed_timeout_minutes 61",
    f"{TENSOR} 8 --sequence-parallel": "",
    f"{TENSOR} 16 --sequence-parallel": "16 exceeds the 8 GPUs of a node",
    f"--no-use-distributed-optimizer {STAGES} 8 {TENSOR} 2 --sequence-parallel": "the 2 replicas",
    f"--no-use-distributed-optimizer {STAGES} 8 {TENSOR} 4 --sequence-parallel": "",
}  # fmt: skip


@pytest.mark.parametrize("flags", WARNINGS)
def test_warnings(flags):
    config = preset("llm-jp-3-1.8b", f"--save x --save-interval 1000 {flags}")
    found = config_warnings(config, RunSize(32, 986240, decay_end=986240, validation_sets=1))
    expected = WARNINGS[flags]
    assert len(found) == bool(expected), found
    assert expected in "".join(found)


def test_warnings_on_lengths():
    config = preset("llm-jp-3-1.8b")

    def warned(config, train_iters, end, sets=1):
        return " ".join(config_warnings(config, RunSize(32, train_iters, end, sets)))

    published = warned(preset("llm-jp-3-1.8b", "--save x"), 988240, 986240, sets=0)
    assert (
        "ends at iteration 986,240, the run at 988,240: 2,000 iterations are trained at min"
        in published
    )
    assert "lr_decay_iters 988240" in published
    assert "nothing is saved" in published and "there are no validation sets" in published
    assert "986,240, after the run's last iteration 5,000" in warned(config, 5000, 986240)
    assert "without any checkpoint" in warned(config, 5000, 5000)
    assert warned(config, 20, 20) == ""  # a trial


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_their_warnings_known(name):
    layers = ConfigLayers()
    read_config(name, layers)
    config = build_config(layers)
    world = config.parallel.model_parallel_size * 2
    check_config(config, world)
    for warning in config_warnings(config, RunSize(world, 100, 100, 1)):
        # As published: v1.0 in fp16, v4 with a timeout of two hours to build its sample indices.
        assert warning.startswith(("fp16", "distributed_timeout_minutes 120")), warning


def test_dry_run(tmp_path, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    write_folds(tmp_path, (2, 3, 1))
    words = arguments("laptop-llama", tmp_path / "folds.yaml", "--use-flash-attn")
    layout = ["--tensor-model-parallel-size", "2", "--dry-run", "--world-size", "4"]
    assert pretrain_cli.main([*words, *layout]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(
        "# 4 processes: TP 2 x PP 1 x CP 1 x DP 2\n# 6 iterations, 768 tok"
    )
    assert "note: --use-flash-attn is not needed here" in printed.err
    origins = {
        line.split(":")[0].strip(): line.partition("  # ")[2] for line in printed.out.splitlines()
    }
    assert origins["tensor_model_parallel_size"] == "flag --tensor-model-parallel-size"
    assert origins["normalization"].startswith("preset laptop-llama, line ")
    assert origins["padded_vocab_size"] == origins["lr_decay_iters"] == "resolved"
    assert origins["rotary_base"] == ""
    # The output can be read back as a configuration.
    (tmp_path / "again.yaml").write_text(printed.out)
    assert pretrain_cli.main(["--config", str(tmp_path / "again.yaml"), *layout[2:]]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(printed.out)
    assert pretrain_cli.main([*words, "--world-size", "4"]) == 2
    assert "--world-size requires --dry-run" in capsys.readouterr().err
