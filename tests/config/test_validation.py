"""Rules and warnings across fields, and --dry-run."""

from __future__ import annotations

import pytest
import yaml

from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.learning_rate_rules import decay_warnings
from megatron_llmjp.config.loading import ConfigLayers, build_config, preset_names, read_config
from megatron_llmjp.config.validation import check_config, check_save_rules
from megatron_llmjp.config.warnings import RunSize, config_warnings
from megatron_llmjp.errors import UserError
from tests.support.datasets import write_folds
from tests.support.processes import pretrain
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
    "--rampup-batch-size 544 32 100": [
        "its start 544 is above global_batch_size 512: the batch size can only increase",
    ],
    "--rampup-batch-size 64 320 100": ["do not reach global_batch_size 512", "divides 448"],
    # Each rank computes the first and the last of 2 x CP parts, to balance causal attention.
    "--context-parallel-size 2 --seq-length 4098": ["not divisible by 4", "a multiple of 4"],
    "--context-parallel-size 2 --tensor-model-parallel-size 2 --seq-length 4100": ["by 8, which"],
    "--context-parallel-size 2 --position-embedding-type yarn "
    "--yarn-original-max-position-embeddings 4098": ["4098 is not a multiple of 4, twice context"],
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


def refusal(flags: str) -> str:
    """Return the message that refuses a preset with some flags on 8 processes."""
    config = parse(f"--config llm-jp-3-1.8b {flags}".split()).config
    with pytest.raises(UserError) as error:
        check_config(config, 8)
    return str(error.value)


@pytest.mark.parametrize("flags", INVALID)
def test_violated_rules(flags):
    message = refusal(flags)
    for part in INVALID[flags]:
        assert part in message


MESSAGES = {
    # the same flags: all messages
    f"{CHUNKS} 2": [
        "virtual_pipeline_model_parallel_size requires pipeline_model_parallel_size 2 or more",
    ],
    "--overlap-param-gather --overlap-grad-reduce --no-use-distributed-optimizer": [
        "overlap_param_gather requires use_distributed_optimizer",
    ],
    "--no-overlap-grad-reduce": [
        "overlap_param_gather requires overlap_grad_reduce",
    ],
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 25": [
        "recompute_num_layers 25 exceeds the 24 layers of a pipeline stage",
    ],
    f"{STAGES} 2 --recompute-granularity full --recompute-method block --recompute-num-layers 13": [
        "recompute_num_layers 13 exceeds the 12 layers of a pipeline stage",
    ],
    "--recompute-granularity selective --recompute-modules moe moe_act shared_experts": [
        "recompute_modules moe requires num_moe_experts",
        "recompute_modules moe_act requires moe_grouped_gemm",
        "recompute_modules shared_experts requires moe_shared_expert_intermediate_size",
    ],
    "--recompute-modules mlp": ["recompute_modules requires recompute_granularity selective"],
    "--recompute-method block": [
        "recompute_method requires recompute_granularity full",
    ],
    f"{TENSOR} 3": [
        "8 processes are not divisible by tensor 3 x pipeline 1 x context 1 = 3 processes per "
        "model replica: use a multiple of 3 processes, or sizes whose product is one of 1, 2, "
        "4, 8",
        "num_attention_heads 16 is not divisible by tensor_model_parallel_size 3: possible are "
        "1, 2, 4, 8, 16",
        "num_query_groups 16 is not divisible by tensor_model_parallel_size 3: possible are 1, "
        "2, 4, 8, 16",
        "ffn_hidden_size 7168 is not divisible by tensor_model_parallel_size 3: possible are 1,"
        " 2, 4, 7, 8, 14, 16, 28, 32, 56, 64",
        "seq_length 4096 is not divisible by tensor_model_parallel_size 3, as sequence_parallel"
        " requires",
    ],
    f"{TENSOR} 2 --sequence-parallel --seq-length 4095": [
        "seq_length 4095 is not divisible by tensor_model_parallel_size 2, as sequence_parallel"
        " requires",
    ],
    "--global-batch-size 513": [
        "global_batch_size 513 is not a multiple of micro_batch_size 4 x data-parallel size 8 ="
        " 32: try 512",
    ],
    "--global-batch-size 3": [
        "global_batch_size 3 is not a multiple of micro_batch_size 4 x data-parallel size 8 = "
        "32: try 32",
    ],
    f"{STAGES} 2 {CHUNKS} 2 --global-batch-size 80": [
        "the interleaved schedule requires a number of micro-batches (5) that is a multiple of "
        "pipeline_model_parallel_size 2: change global_batch_size or micro_batch_size",
    ],
    "--fp16": [
        "bf16 and fp16 are mutually exclusive",
    ],
    "--min-lr 1": [
        "min_lr 1.0 is above lr 0.0003: lower min_lr",
    ],
    "--lr-warmup-init 1": [
        "lr_warmup_init 1.0 is above lr 0.0003: lower lr_warmup_init",
    ],
    "--lr-warmup-iters 986240": [
        "lr_warmup_iters 986240 must be smaller than lr_decay_iters 986240: shorten the warm-up",
    ],
    "--weight-decay-incr-style linear --start-weight-decay 0.2 --end-weight-decay 0.1": [
        "start_weight_decay 0.2 is above end_weight_decay 0.1: weight decay can only increase",
    ],
    "--weight-decay-incr-style linear --start-weight-decay 0.1": [
        "weight_decay_incr_style linear requires start_weight_decay and end_weight_decay",
    ],
    "--end-weight-decay 0.2": [
        "end_weight_decay 0.2 differs from weight_decay 0.1: set weight_decay_incr_style to "
        "linear or cosine, or remove end_weight_decay",
    ],
    "--exit-interval 5": [
        "exit_interval saves before exiting: set save, the folder of the checkpoints",
    ],
    "--keep-every 5": [
        "keep_every has no effect without keep_last, since all checkpoints are kept: set "
        "keep_last",
    ],
    "--finetune": [
        "finetune requires load, the folder of the weights",
    ],
    "--hidden-size 2049": [
        "hidden_size 2049 is not divisible by num_attention_heads 16: change one of them, or "
        "set kv_channels",
    ],
    "--num-query-groups 3": [
        "num_attention_heads 16 is not divisible by num_query_groups 3: possible numbers of "
        "groups are 1, 2, 4, 8, 16",
    ],
    "--add-bias-linear": [
        "swiglu with add_bias_linear is not supported: set add_bias_linear to false",
    ],
    "--seq-length 4097": [
        "seq_length 4097 exceeds max_position_embeddings 4096: reduce seq_length or increase "
        "max_position_embeddings",
    ],
    "--rope-scaling-low-freq-factor 4 --use-rope-scaling": [
        "rope_scaling_low_freq_factor 4.0 must be below rope_scaling_high_freq_factor 4.0",
    ],
    "--position-embedding-type yarn --rotary-percent 0.5": [
        "rotary_percent has no effect with position_embedding_type yarn: remove one of them",
    ],
    "--position-embedding-type yarn --use-rope-scaling": [
        "use_rope_scaling has no effect with position_embedding_type yarn: remove one of them",
    ],
    "--position-embedding-type yarn --rotary-seq-len-interpolation-factor 2": [
        "rotary_seq_len_interpolation_factor has no effect with position_embedding_type yarn: "
        "remove one of them",
    ],
    "--position-embedding-type yarn --yarn-mscale 1": [
        "yarn_mscale and yarn_mscale_all_dim must be set together",
    ],
    "--position-embedding-type yarn --yarn-mscale-all-dim 1": [
        "yarn_mscale and yarn_mscale_all_dim must be set together",
    ],
    "--position-embedding-type learned_absolute --rotary-percent 0.5": [
        "rotary_percent requires rotary embeddings: set position_embedding_type to rope, or "
        "remove rotary_percent",
    ],
    "--position-embedding-type learned_absolute --rotary-seq-len-interpolation-factor 2": [
        "rotary_seq_len_interpolation_factor requires rotary embeddings: set "
        "position_embedding_type to rope, or remove rotary_seq_len_interpolation_factor",
    ],
    "--rotary-percent 0.001": [
        "rotary_percent 0.001 of head size 128 is 0: the number of rotated dimensions must be "
        "even and positive",
    ],
    f"--padded-vocab-size 99585 {TENSOR} 2": [
        "padded_vocab_size 99585 is not divisible by tensor_model_parallel_size 2: choose a "
        "divisor, or compute the padding again with --override-resume padded_vocab_size",
    ],
    "--padded-vocab-size 99573 --vocab-size 99574": [
        "padded_vocab_size 99573 is below vocab_size 99574: remove it to have it computed",
    ],
    "--lr-decay-style WSD --lr-wsd-decay-iters 986241": [
        "lr_wsd_decay_iters 986241 is longer than lr_decay_iters 986240, which includes it: "
        "shorten lr_wsd_decay_iters",
    ],
    f"{STAGES} 2 {FIRST} 24": [
        "24 layers at the ends leave 0 layers for 1 stages in between: change "
        "decoder_first_pipeline_num_layers, decoder_last_pipeline_num_layers or "
        "pipeline_model_parallel_size",
    ],
    f"{STAGES} 2 {FIRST} 12 {LAST} 11": [
        "12 and 11 layers at the ends leave 1 layers for 0 stages in between: change "
        "decoder_first_pipeline_num_layers, decoder_last_pipeline_num_layers or "
        "pipeline_model_parallel_size",
    ],
    f"{STAGES} 1 {FIRST} 12 {LAST} 12": [
        "12 and 12 layers at the ends leave 0 layers for -1 stages in between: change "
        "decoder_first_pipeline_num_layers, decoder_last_pipeline_num_layers or "
        "pipeline_model_parallel_size",
    ],
    f"{STAGES} 4 {FIRST} 12 {LAST} 12": [
        "12 and 12 layers at the ends leave 0 layers for 2 stages in between: change "
        "decoder_first_pipeline_num_layers, decoder_last_pipeline_num_layers or "
        "pipeline_model_parallel_size",
    ],
    f"{STAGES} 2 {LAYOUT} EtE*12|t*12L": [
        "pipeline_model_parallel_layout 'EtE*12|t*12L': it must begin with E, end with L, and "
        "contain each once",
        "pipeline_model_parallel_layout 'EtE*12|t*12L': it has 13 layers (t), the model 24",
    ],
    f"{STAGES} 2 {LAYOUT} Et*12|t*12LL": [
        "pipeline_model_parallel_layout 'Et*12|t*12LL': it must begin with E, end with L, and "
        "contain each once",
    ],
    f"{STAGES} 2 {LAYOUT} t*12|Et*12L": [
        "pipeline_model_parallel_layout 't*12|Et*12L': it must begin with E, end with L, and "
        "contain each once",
    ],
    f"{STAGES} 2 {LAYOUT} Et*12|Lt*12": [
        "pipeline_model_parallel_layout 'Et*12|Lt*12': it must begin with E, end with L, and "
        "contain each once",
    ],
    f"{STAGES} 4 {LAYOUT} Et*12|t*12L": [
        "pipeline_model_parallel_layout 'Et*12|t*12L': it has 2 stages for 4 processes: make it"
        " a multiple of 4",
    ],
    f"{STAGES} 2 {CHUNKS} 2 {LAYOUT} Et*12|t*12L": [
        "pipeline_model_parallel_layout 'Et*12|t*12L': it has 2 stages for 2 processes: remove "
        "virtual_pipeline_model_parallel_size",
    ],
    f"{STAGES} 2 {LAYOUT} Et*12|t*12L --account-for-loss-in-pipeline-split": [
        "pipeline stages can be set in one way only: decoder_first/last_pipeline_num_layers, "
        "account_for_embedding/loss_in_pipeline_split, or pipeline_model_parallel_layout",
    ],
}  # fmt: skip


@pytest.mark.parametrize("flags", MESSAGES)
def test_all_messages(flags):
    assert refusal(flags).splitlines() == MESSAGES[flags]


@pytest.mark.parametrize(
    "flag",
    ["--save-interval 5", "--save-interval-tokens 5", "--save-interval-minutes 5",
     "--save-policy llm-jp", "--non-persistent-save-interval 5",
     "--non-persistent-save-minutes 5"],
)  # fmt: skip
def test_save_rules_require_a_folder(flag):
    command = parse(["--config", "llm-jp-3-1.8b", *flag.split()])
    name = flag.split()[0].removeprefix("--").replace("-", "_")
    with pytest.raises(UserError) as error:
        check_save_rules(command.config, command.origin)
    assert str(error.value) == f"{name} requires save, the folder of the checkpoints"
    saved = parse(["--config", "llm-jp-3-1.8b", *flag.split(), "--save", "x"])
    check_save_rules(saved.config, saved.origin)


def test_a_preset_may_be_used_without_saving():
    command = parse(["--config", "llm-jp-13b-v2.0"])
    assert command.config.checkpoint.save_interval == 1000
    assert command.config.checkpoint.non_persistent_save_interval == 100
    check_save_rules(command.config, command.origin)
    for minutes in (60, 0):  # the default, and no saves at all
        command = parse(
            ["--config", "llm-jp-3-1.8b", "--non-persistent-save-minutes", str(minutes)]
        )
        check_save_rules(command.config, command.origin)


VALID = [
    # next to the limits of the rules above
    f"{STAGES} 2 --recompute-granularity full --recompute-method block --recompute-num-layers 12",
    "--lr-warmup-iters 986239",
    "--weight-decay-incr-style linear --start-weight-decay 0.1 --end-weight-decay 0.1",
    "--start-weight-decay 0.1",
    "--end-weight-decay 0.1",
    "--keep-every 5 --keep-last 1",
    "--finetune --load x",
    "--finetune --save x",
    "--eval-only --save x",
    "--eval-only --load x",
    "--spike-action rollback --save x",
    "--loss-scale 128 --fp16 --no-bf16",
    "--seq-length 4096",
    "--rope-scaling-low-freq-factor 3.9 --use-rope-scaling",
    "--rope-scaling-low-freq-factor 4",
    "--position-embedding-type yarn --yarn-mscale 1 --yarn-mscale-all-dim 1",
    "--position-embedding-type learned_absolute",
    "--rotary-percent 0.5",
    "--padded-vocab-size 99574 --vocab-size 99574",
    "--lr-decay-style WSD --lr-wsd-decay-iters 986240",
    "--lr-decay-style constant",
    f"{STAGES} 2 {FIRST} 12 {LAST} 12",
    f"{STAGES} 1 {FIRST} 24",
    "--rampup-batch-size 512 32 100",
    "--rampup-batch-size 480 32 100",
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
    "--recompute-granularity selective": "do not store scores",
    "--recompute-granularity selective --recompute-modules mlp layernorm": "",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1": "",
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
    "--adam-eps 1e-7": "",
    "--adam-eps 1.01e-7": "adam_eps 1.01e-07",
    "--min-lr 5.9e-5": "",
    "--min-lr 6.1e-5": "min_lr 6.1e-05 is more than a fifth of lr 0.0003",
    "--attention-dropout 0.1": "dropout in a LLaMA model",
    "--position-embedding-type learned_absolute": "",
    "--position-embedding-type learned_absolute --seq-length 4095":
        "seq_length 4095 is below max_position_embeddings 4096",
    "--make-vocab-size-divisible-by 104814": "",
    "--make-vocab-size-divisible-by 104815": "5,241 of the padded vocabulary size 104,815",
    "--wandb-entity x": "requires wandb_project",
    "--wandb-exp-name x --wandb-entity x --wandb-project y": "",
    "--lr-warmup-iters 0 --lr-warmup-fraction 0.01": "",
    "--lr-warmup-iters 0 --finetune --load x": "",
    "--lr-decay-style constant --min-lr 1e-4": "",
    "--lr-decay-style constant --min-lr 0": "",
    "--lr-decay-style WSD --lr-wsd-decay-iters 5 --min-lr 1e-4": "",
    "--lr-decay-style WSD --lr-wsd-decay-iters 5 --min-lr 0": "",
    "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.1 "
    "--weight-decay 0": "",
    "--seq-length 8193 --max-position-embeddings 8193 --rotary-base 10001": "",
    "--seq-length 8193 --max-position-embeddings 8193 --use-rope-scaling": "",
    "--seq-length 8193 --max-position-embeddings 8193 --position-embedding-type yarn": (
        "seq_length 8193 exceeds 4096, the length that yarn_rotary_scaling_factor 1 x "
    ),
    "--seq-length 16384 --max-position-embeddings 16384 --position-embedding-type yarn "
    "--yarn-rotary-scaling-factor 4": "",
    "--seq-length 8193 --max-position-embeddings 8193 "
    "--rotary-seq-len-interpolation-factor 2": "",
    # SGD with a large beta2, eps and no warm-up, which it does not have.
    f"--optimizer sgd --no-use-distributed-optimizer {TENSOR} 32 --sequence-parallel "
    "--adam-beta2 0.999 --adam-eps 1 --lr-warmup-iters 0": "exceeds the 8 GPUs of a node",
    "--save-policy llm-jp --save-interval 999999": "save_interval 999,999 is longer",
    # 8 micro-batches for 4 stages: 3 / (8 + 3) = 27 %; 9 for 4: 3 / 12 = 25 %.
    f"{STAGES} 4 --micro-batch-size 1 --global-batch-size 64": "bubble is 27% of each step, with 4",
    f"{STAGES} 4 --micro-batch-size 1 --global-batch-size 72": "",
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
    assert "save" not in published
    assert (
        "ends at iteration 986,240, the run at 988,240: 2,000 iterations are trained at min"
        in published
    )
    assert "lr_decay_iters 988240" in published
    assert "there are no validation sets" in published
    assert "986,240, after the run's last iteration 5,000" in warned(config, 5000, 986240)
    assert "write no checkpoint" in warned(config, 5000, 5000)
    assert warned(config, 20, 20) == ""  # a trial
    # From 1,000 iterations on it is none.
    assert warned(config, 999, 999, sets=0) == ""
    assert config_warnings(config, RunSize(32, 1000, 1000, 0)) == [
        "save is not set: without it, 1,000 iterations write no checkpoint",
        "there are no validation sets: the validation loss is not measured, as in the llm-jp-3 and "
        "v4 runs; define `validation` in the fold file and set eval_iters 10",
        "the warm-up of 2,000 iterations is more than a fifth of the run's 1,000",
    ]


@pytest.mark.parametrize(
    ("layers", "words"),
    [(7, ""), (8, "requires twice the memory")],
)
def test_warnings_on_large_models(layers, words):
    """From 500 million parameters on; a layer has 4 x 2,048^2 + 3 x 2,048 x 8,192 = 67 million."""
    config = preset(
        "llm-jp-3-1.8b",
        f"--save x --save-interval 9 --no-bf16 --num-layers {layers} --ffn-hidden-size 8192",
    )
    found = config_warnings(config, RunSize(1, 20, 20, 1))
    assert len(found) == bool(words) and words in "".join(found)


@pytest.mark.parametrize(
    ("words", "warned"),
    [("--hidden-size 1000 --num-attention-heads 10", False),
     ("--hidden-size 1008 --num-attention-heads 8", True)],
)  # fmt: skip
def test_little_padding_is_no_warning(words, warned):
    """More than a million parameters: 1,000 rows of padding."""
    size = "--vocab-size 9000 --make-vocab-size-divisible-by 10000"
    found = config_warnings(preset("laptop-llama", f"{size} {words}"), RunSize(1, 20, 20, 1))
    assert ["1,000 of the padded vocabulary size 10,000 are padding" in w for w in found] == (
        [True] if warned else []
    )


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_their_warnings_known(name):
    layers = ConfigLayers()
    read_config(name, layers)
    config = build_config(layers)
    world = config.parallel.model_parallel_size * config.parallel.expert_model_parallel_size * 2
    check_config(config, world)
    for warning in config_warnings(config, RunSize(world, 100, 100, 1)):
        # As published: v1.0 in fp16, v4 with a timeout of two hours to build its sample indices.
        assert warning.startswith(("fp16", "distributed_timeout_minutes 120")), warning


def test_dry_run(tmp_path):
    write_folds(tmp_path, (2, 3, 1))
    words = arguments("laptop-llama", tmp_path / "folds.yaml", "--use-flash-attn")
    layout = ["--tensor-model-parallel-size", "2", "--dry-run", "--world-size", "4"]
    printed = pretrain(*words, *layout)
    assert printed.returncode == 0
    assert printed.stdout.startswith(
        "# 4 processes: TP 2 x PP 1 x CP 1 x DP 2\n# 6 iterations, 768 tok"
    )
    assert "note: --use-flash-attn is not needed here" in printed.stderr
    origins = {
        line.split(":")[0].strip(): line.partition("  # ")[2]
        for line in printed.stdout.splitlines()
    }
    assert origins["tensor_model_parallel_size"] == "flag --tensor-model-parallel-size"
    assert origins["normalization"].startswith("preset laptop-llama, line ")
    assert origins["padded_vocab_size"] == origins["lr_decay_iters"] == "resolved"
    assert origins["rotary_base"] == ""
    # The output can be read back as a configuration.
    (tmp_path / "again.yaml").write_text(printed.stdout)
    again = pretrain("--config", tmp_path / "again.yaml", *layout[2:])
    assert yaml.safe_load(again.stdout) == yaml.safe_load(printed.stdout)
    refused = pretrain(*words, "--world-size", "4")
    assert refused.returncode == 2
    assert "--world-size requires --dry-run" in refused.stderr


@pytest.mark.parametrize(
    ("folds", "rest"),
    [
        ((), 30),
        ((range(1, 71),), 30),  # before the end of the decay
        ((range(1, 72),), 29),
        ((range(71, 101),), 0),
        ((range(71, 111),), 0),  # beyond the run
        ((range(72, 101),), 1),
        ((range(75, 80), range(90, 95)), 20),
    ],
)
def test_iterations_of_folds_with_a_schedule_of_their_own(folds, rest):
    """The decay ends at iteration 70 of 100: iterations with another schedule do not count."""
    found = list(decay_warnings(preset("llm-jp-3-1.8b").optimizer, 70, 100, folds))
    assert len(found) == (rest > 0)
    assert not rest or f": {rest} iterations are trained at min_lr" in found[0]


@pytest.mark.parametrize(
    ("style", "end", "folds", "warned"),
    [
        ("cosine", 100, (), False),
        ("cosine", 101, (), True),
        ("cosine", 101, (range(90, 101),), False),
        ("cosine", 101, (range(90, 100),), True),
        ("WSD", 101, (), False),
        ("constant", 101, (), False),
        ("constant", 70, (), False),
        ("WSD", 70, (), True),
        ("cosine", None, (), False),
    ],
)
def test_decays_after_the_run(style, end, folds, warned):
    optimizer = preset("llm-jp-3-1.8b").optimizer.model_copy(update={"lr_decay_style": style})
    assert len(list(decay_warnings(optimizer, end, 100, folds))) == warned
