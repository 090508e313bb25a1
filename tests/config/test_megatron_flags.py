"""Flags of Megatron-LM and Megatron-DeepSpeed: presets of launch scripts, defaults, refusals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_llmjp.arguments import normalize_dashes
from megatron_llmjp.config.expert_flags import EXPERT_FLAGS
from megatron_llmjp.config.flags import Mode, flag_names, parse
from megatron_llmjp.config.loading import (
    ConfigLayers,
    build_config,
    config_differences,
    read_config,
    replace_fields,
)
from megatron_llmjp.config.megatron_flags import CHOICES, DEPENDENT_FLAGS
from megatron_llmjp.config.refused_flags import FOREIGN, NEWER, REFUSED, REFUSED_FAMILIES
from megatron_llmjp.config.unused_flags import (
    NOT_NEEDED,
    NOT_NEEDED_FAMILIES,
    NOT_OFFERED,
    NOT_OFFERED_FAMILIES,
)
from megatron_llmjp.config.validation import check_config
from megatron_llmjp.errors import UserError
from tests.config.launch_scripts import GPT2_BPE, SCRIPTS

NAMES = (Path(__file__).parent / "megatron_flags.txt").read_text().split()

OF_THE_DATA_AND_PLACE = {
    "vocab_size", "tokenizer_type", "tokenizer_model", "data_path", "split", "train_data_path",
    "valid_data_path", "test_data_path", "data_cache_path", "train_iters", "train_samples",
    "train_tokens", "load", "save", "save_interval", "non_persistent_save_interval", "log_interval",
    "eval_interval", "eval_iters", "tensorboard_dir", "wandb_exp_name", "wandb_project",
    "wandb_entity", "exit_duration_in_mins",
    "override_opt_param_scheduler", "async_save",
}  # fmt: skip
"""Fields of data, checkpoints and logs, which scripts set and presets do not."""
FASTER_HERE = {
    "recompute_granularity", "overlap_grad_reduce", "overlap_param_gather", "transformer_impl",
}  # fmt: skip
"""Fields of speed and memory that presets set to other values than the scripts, or leave open."""


def preset(name):
    layers = ConfigLayers()
    read_config(name, layers)
    return build_config(layers)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.preset)
def test_published_scripts_equal_their_presets(script):
    command = parse(script.argv)
    config, notes = command.config, command.notes
    assert (command.mode, command.processes) == (Mode.TRAIN, None)
    parallel = config.parallel
    check_config(config, 2 * parallel.model_parallel_size * parallel.expert_model_parallel_size)
    if config.optimizer.lr_decay_iters is None and config.optimizer.lr_decay_tokens is None:
        config = replace_fields(config, lr_decay_iters=config.training.train_iters)
    found = config_differences(preset(script.preset), config)
    assert set(found) <= OF_THE_DATA_AND_PLACE | FASTER_HERE, found
    # Each flag sets a field or is reported once.
    explained = [note.split()[0] for note in notes]
    assert len(explained) == len(set(explained))
    for word in set(explained):
        assert word in normalize_dashes(script.argv)
    assert all(re.search(" is not (needed here|offered): ", note) for note in notes)


def kinds(flag, fields):
    """Return all tables that contain a flag."""
    families = (*NOT_NEEDED_FAMILIES, *NOT_OFFERED_FAMILIES, *REFUSED_FAMILIES)
    tables = (fields, DEPENDENT_FLAGS, CHOICES, EXPERT_FLAGS, REFUSED, NOT_NEEDED, NOT_OFFERED)
    exact = [number for number, table in enumerate(tables) if flag in table]
    return exact or [start for start in families if flag.startswith(start)]


def test_every_flag_of_megatron_is_classified_once():
    fields = flag_names()
    found = {flag: kinds(flag, fields) for flag in NAMES}
    assert {flag: kind for flag, kind in found.items() if len(kind) != 1} == {}
    assert len(NAMES) > 700
    ours = {*DEPENDENT_FLAGS, *CHOICES, *EXPERT_FLAGS, *REFUSED, *NOT_NEEDED, *NOT_OFFERED}
    assert {flag: kinds(flag, fields) for flag in ours if len(kinds(flag, fields)) != 1} == {}


def test_flags_that_a_user_misses_are_not_called_needless():
    """Flags for speed have their own notes, with what the run does instead."""
    given = "--tp-comm-overlap --cuda-graph-impl local --straggler-minmax-count 4 --use-flash-attn"
    notes = parse([*BASE.split(), *given.split()]).notes
    found = {note.split()[0]: note.partition(" is ")[2].partition(":")[0] for note in notes}
    assert found == {
        "--tp-comm-overlap": "not offered",
        "--cuda-graph-impl": "not offered",
        "--straggler-minmax-count": "not offered",
        "--use-flash-attn": "not needed here",
    }


REAL_DEFAULTS = {
    # of the argument parsers of core 0.6 to 0.16 and of Megatron-DeepSpeed
    "normalization": "LayerNorm", "norm_epsilon": 1e-5, "position_embedding_type":
    "learned_absolute", "rotary_base": 10000, "rotary_percent": 1.0, "rope_scaling_factor": 8.0,
    "use_rope_scaling": False, "rotary_seq_len_interpolation_factor": None, "hidden_dropout": 0.1,
    "attention_dropout": 0.1, "init_method_std": 0.02, "make_vocab_size_divisible_by": 128,
    "add_qkv_bias": False, "untie_embeddings_and_output_weights": False, "kv_channels": None,
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
    "sequence_parallel": False, "use_distributed_optimizer": False, "overlap_grad_reduce": False,
    "overlap_param_gather": False, "recompute_granularity": None, "recompute_method": None,
    "distributed_timeout_minutes": 10, "num_workers": 2, "reset_position_ids": False,
    "reset_attention_mask": False, "eod_mask_loss": False, "rampup_batch_size": None,
    "eval_interval": 1000, "eval_iters": 100, "seed": 1234, "bf16": False, "fp16": False,
    "z_loss_strength": 0.0, "optimizer": "adam", "min_lr": 0.0, "lr_decay_style": "linear",
    "lr_decay_iters": None, "lr_warmup_iters": 0, "lr_warmup_fraction": None, "lr_warmup_init": 0.0,
    "lr_wsd_decay_style": "exponential", "lr_wsd_decay_iters": None, "weight_decay": 0.01,
    "start_weight_decay": None, "end_weight_decay": None, "weight_decay_incr_style": "constant",
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8, "sgd_momentum": 0.9, "clip_grad": 1.0,
    "loss_scale": None, "initial_loss_scale": 2.0**32, "min_loss_scale": 1.0,
    "loss_scale_window": 1000, "hysteresis": 2, "override_opt_param_scheduler": False,
    "finetune": False, "save_interval": None, "exit_interval": None, "log_interval": 100,
}  # fmt: skip


def test_megatrons_defaults_without_config():
    config = parse(BASE.split()).config
    values = {k: v for section in config.model_dump().values() for k, v in section.items()}
    assert {name: values[name] for name in REAL_DEFAULTS} == REAL_DEFAULTS


BASE = "--num-layers 4 --hidden-size 128 --num-attention-heads 8"
MEANINGS = {
    # flags: resulting values of fields
    "--manual-gc --manual-gc-interval 10 --disable-manual-gc-eval": {
        "manual_gc": True, "manual_gc_interval": 10, "manual_gc_eval": False,
    },
    "--no-manual-gc --no-manual-gc-eval": {"manual_gc": False, "manual_gc_eval": False},
    "": {
        "activation_function": "gelu_tanh", "normalization": "LayerNorm", "hidden_dropout": 0.1,
        "position_embedding_type": "learned_absolute", "add_bias_linear": True, "adam_beta2": 0.999,
        "untie_embeddings_and_output_weights": False, "weight_decay": 0.01, "ffn_hidden_size": None,
        "lr_decay_style": "linear",
    },
    "--config laptop-llama": {
        "activation_function": "swiglu", "normalization": "RMSNorm", "hidden_dropout": 0.0,
        "weight_decay": 0.1, "adam_beta2": 0.95,
    },
    "--config laptop-gpt2 --no-bias-gelu-fusion": {"activation_function": "gelu"},
    "--config laptop-llama --no-bias-gelu-fusion": {"activation_function": "swiglu"},
    "--no-bias-gelu-fusion": {"activation_function": "gelu"},
    "--disable-bias-linear": {"activation_function": "gelu", "add_bias_linear": False},
    "--openai-gelu --disable-bias-linear": {"activation_function": "gelu_tanh"},
    # int(4 h * 2/3 / 64) * 64, as Megatron-LM's validate_args has it
    "--swiglu": {"activation_function": "swiglu", "ffn_hidden_size": 320},
    "--swiglu --ffn-hidden-size 352": {"ffn_hidden_size": 352},
    "--group-query-attention": {"num_query_groups": 1},
    "--group-query-attention --num-query-groups 2": {"num_query_groups": 2},
    "--use-z-loss": {"z_loss_strength": 1e-4},
    "--use-z-loss --z-loss-strength 1e-5": {"z_loss_strength": 1e-5},
    "--checkpoint-activations --checkpoint-num-layers 2": {
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2,
    },
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1": {
        "virtual_pipeline_model_parallel_size": 2,
    },
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2": {
        "virtual_pipeline_model_parallel_size": None,
    },
    "--zero-stage 1": {"use_distributed_optimizer": True},
    "--zero-stage 0.0": {"use_distributed_optimizer": False},
    GPT2_BPE: {
        "tokenizer_model": "gpt2-vocab.json", "merge_file": "gpt2-merges.txt",
        "tokenizer_type": "GPT2BPETokenizer", "lr_decay_tokens": 300_000_000_000,
    },
    "--vocab-file v.json --merge-file m.txt --tokenizer-type GPT2BPETokenizer": {
        "tokenizer_model": "v.json", "merge_file": "m.txt", "tokenizer_type": "GPT2BPETokenizer",
    },
    "--tokenizer-type TikTokenizer --tokenizer-model v --tokenizer-special-tokens <unk> <s> </s>": {
        "tokenizer_type": "TikTokenizer", "tiktoken_special_tokens": ("<unk>", "<s>", "</s>"),
        "tiktoken_pattern": "v2", "tiktoken_num_special_tokens": 1000,
    },
    "--vocab-file x.model --tokenizer-type JapaneseSentencePiece": {
        "tokenizer_model": "x.model", "tokenizer_type": "GPTSentencePieceTokenizer",
    },
    "--lr_decay_iters=7 --override-opt_param-scheduler": {
        "lr_decay_iters": 7, "override_opt_param_scheduler": True,
    },
    "--load a --save a": {"load": None, "save": "a"},
    "--load b --save a": {"load": "b", "save": "a"},
    # 0 is Megatron-LM's default of an unused unit
    "--lr-warmup-samples 0 --lr-warmup-iters 4": {"lr_warmup_samples": None, "lr_warmup_iters": 4},
    "--rampup-batch-size 16 16 1000": {"rampup_batch_size": (16, 16, 1000)},
    "--skip-train": {"eval_only": True},
    "--finetune --no-load-optim --no-load-rng --load a": {"finetune": True, "load": "a"},
    # without EOD, as in Megatron-LM's NullTokenizer; with a preset, the whole vocabulary
    "--tokenizer-type NullTokenizer --vocab-size 500": {"vocab_size": 501},
    "--config laptop-llama --tokenizer-type NullTokenizer --vocab-size 500": {"vocab_size": 500},
    "--save-retain-interval 1000": {"keep_last": 1, "keep_every": 1000},
    "--pretrained-checkpoint a --save b": {"load": "a", "finetune": True, "save": "b"},
    # choices are case-insensitive
    "--normalization rmsnorm --optimizer Adam --lr-decay-style wsd --lr-wsd-decay-style LINEAR": {
        "normalization": "RMSNorm", "optimizer": "adam", "lr_decay_style": "WSD",
        "lr_wsd_decay_style": "linear",
    },
    "--position-embedding-type ROPE --activation-function SwiGLU --distributed-backend NCCL": {
        "position_embedding_type": "rope", "activation_function": "swiglu",
    },
    "--tokenizer-type llama2tokenizer --recompute-granularity Selective --optimizer AdamW": {
        "tokenizer_type": "Llama2Tokenizer", "recompute_granularity": "selective",
        "optimizer": "adam",
    },
    "--recompute-granularity selective --recompute-modules moe_act layernorm": {
        "recompute_modules": ("moe_act", "layernorm"),
    },
}  # fmt: skip


@pytest.mark.parametrize("flags", MEANINGS)
def test_meaning(flags):
    config = parse(f"{BASE} {flags}".split()).config
    values = {k: v for section in config.model_dump().values() for k, v in section.items()}
    assert {name: values[name] for name in MEANINGS[flags]} == MEANINGS[flags]


def test_flags_of_other_programs_are_in_no_other_table():
    """Flags of other programs and newer releases must not be accepted, refused or ignored ones."""
    fields = set(flag_names())
    for table in (FOREIGN, NEWER):
        assert [flag for flag in table if kinds(flag, fields)] == []
        assert [flag for flag in table if flag in NAMES] == []
    assert not set(FOREIGN) & set(NEWER)
    meant = {words.split("'")[1] for words in FOREIGN.values() if words.startswith("did you mean")}
    assert meant <= fields


REFUSALS = {
    "--zero-stage 3": "--zero-stage 3 is not supported: ZeRO 2 and 3 are not available; use",
    "--num-experts 8 --topk 2": "--topk is not supported: use --moe-router-topk",
    "--moe-layer-freq [0]*x": "expected a number, or a list of 0 and 1 such as [0]*1+[1]*31",
    "--moe-router-load-balancing-type global_aux_loss": "global_aux_loss and several losses at",
    "--fp8-format hybrid": "--fp8-format is not supported: train in --bf16",
    "--no-load-optim": "--no-load-optim is not supported: load weights only with --finetune",
    "--vocab-file gpt2-vocab.json --tokenizer-type HuggingFaceTokenizer": "requires --tokenizer-"
    "type GPT2BPETokenizer",
    "--hidden-size big --swiglu": "hidden_size = 'big': expected a valid integer",
    "--num-layers-per-virtual-pipeline-stage 3": "4 layers are not divisible into chunks of 3",
    "--tensor-parallel-size 2": "did you mean '--tensor-model-parallel-size'?",
    "--data-impl lazy": "rebuild the dataset with preprocess_data",
    # flags of other programs and of newer releases of Megatron-LM
    "--learning-rate 1e-3": "unknown flag --learning-rate; did you mean '--lr'?",
    "--batch-size 8": "--batch-size is not supported: use --micro-batch-size and",
    "--max-seq-len 8": "did you mean '--seq-length'?",
    "--moe-grouped-gem": "unknown flag --moe-grouped-gem; did you mean '--moe-grouped-gemm'?",
    "--num_heads 8": "unknown flag --num-heads; did you mean '--num-attention-heads'?",
    "--lr-scheduler cosine": "did you mean '--lr-decay-style'?",
    "--gradient-accumulation-steps 8": "set --global-batch-size: it is --micro-batch-size x",
    "--per_device_train_batch_size 8": "did you mean '--micro-batch-size'?",
    "--max-steps 8": "did you mean '--train-iters'?",
    "--warmup-steps 8": "did you mean '--lr-warmup-iters'?",
    "--use-mup": "added to Megatron-LM with megatron-core 0.17, but this program uses",
    "--step-batch-size-schedule x": "added to Megatron-LM with megatron-core 0.18",
    "--enable-mhc-connections": "added to Megatron-LM with megatron-core 0.20",
    "--bananas 8": "unknown flag --bananas (--help lists all flags)",
    "--lerning-rte 8": "unknown flag --lerning-rte; did you mean '--lr'? (--help lists all flags)",
    "--unheard-of 8": "unknown flag --unheard-of (--help lists all flags)",
    "--normalization BatchNorm": "expected 'RMSNorm' or 'LayerNorm'",
}


@pytest.mark.parametrize("flags", REFUSALS)
def test_refused_with_a_remedy(flags):
    with pytest.raises(UserError) as error:
        parse(f"{BASE} {flags}".split())
    assert REFUSALS[flags] in str(error.value)


def test_all_refused_and_unknown_flags_are_reported_together():
    with pytest.raises(UserError) as error:
        parse(f"{BASE} --use-flash-attn --yaml-cfg x --hiden-size 5 --fp8-margin 0".split())
    lines = str(error.value).splitlines()
    assert [line.split(" ")[0 if line[0] == "-" else 2] for line in lines] == [
        "--yaml-cfg", "--hiden-size;", "--fp8-margin",
    ]  # fmt: skip
