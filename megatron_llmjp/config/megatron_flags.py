"""Megatron-LM's flags that set fields of another name.

Flags that equal a field's name need no entry: the command line is made from the schema. Flags
that set nothing are in ``megatron_unused.py`` and ``megatron_refused.py``. Names are written with
dashes; Megatron-LM's own mixture (``--override-opt_param-scheduler``) is read as well.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Alias(NamedTuple):
    """A flag without a value that sets fields."""

    sets: dict[str, Any]
    help: str


class Choice(NamedTuple):
    """A flag with one value, of which some set fields, some need nothing and the rest is refused.

    A value's entry is the fields it sets, or why it is not needed.
    """

    values: dict[str, dict[str, Any] | str]
    otherwise: str
    """What to use instead of any other value."""


LLMJP_Z_LOSS = 1e-4
"""Strength behind ``--use-z-loss``; fixed in LLM-jp's fork of Megatron-LM (branch nii-geniac)."""

ALIASES: dict[str, Alias] = {
    "--swiglu": Alias({"activation_function": "swiglu"}, "gated SiLU feed-forward"),
    "--openai-gelu": Alias({"activation_function": "gelu_tanh"}, "the tanh approximation of GELU"),
    "--disable-bias-linear": Alias({"add_bias_linear": False}, "no biases in linear layers"),
    "--use-rotary-position-embeddings": Alias(
        {"position_embedding_type": "rope"}, "rotary positions"
    ),
    "--use-z-loss": Alias({"z_loss_strength": LLMJP_Z_LOSS}, "--z-loss-strength 1e-4"),
    "--recompute-activations": Alias(
        {"recompute_granularity": "selective"}, "recompute attention in the backward pass"
    ),
    "--checkpoint-activations": Alias(
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
        "recompute every layer in the backward pass (Megatron-DeepSpeed)",
    ),
    "--skip-train": Alias({"eval_only": True}, "--eval-only"),
}

RENAMED: dict[str, str] = {
    "--layernorm-epsilon": "norm_epsilon",
    "--rope-theta": "rotary_base",
    "--encoder-num-layers": "num_layers",
    "--encoder-seq-length": "seq_length",
    "--num-key-value-heads": "num_query_groups",
    "--num-virtual-stages-per-pipeline-rank": "virtual_pipeline_model_parallel_size",
    "--checkpoint-num-layers": "recompute_num_layers",
    "--wandb-name": "wandb_exp_name",
    "--tokenizer-special-tokens": "tiktoken_special_tokens",
}
"""A flag with a value, and the field it sets."""

RENAMED_VALUES: dict[str, dict[str, str]] = {
    # Megatron-DeepSpeed's: SentencePiece as it is, end of document </s>.
    "tokenizer_type": {"japanesesentencepiece": "GPTSentencePieceTokenizer"},
    # Adam here is AdamW, as in Megatron-LM.
    "optimizer": {"adamw": "adam"},
    "position_embedding_type": {"rotary": "rope", "learned": "learned_absolute"},
}
"""By field, another program's name of a value, in lower case, and this program's."""

_ONE_DATASET = "an .idx/.bin pair as preprocess_data writes it is the only kind"
_DENSE = "the model is dense"
_NO_EXPERTS = "mixture-of-experts models are not; only dense ones are"
_ONE_GROUP = "the optimizer is sharded over the whole data-parallel group"
_FP32_STATE = "main weights, gradients and moments are kept in fp32"

CHOICES: dict[str, Choice] = {
    "--zero-stage": Choice(
        {
            "0": {"use_distributed_optimizer": False},
            "1": {"use_distributed_optimizer": True},
        },
        "ZeRO 2 and 3 are not offered; use --zero-stage 1 and shard the model with "
        "--tensor-model-parallel-size and --pipeline-model-parallel-size",
    ),
    "--data-impl": Choice(
        {"mmap": _ONE_DATASET, "infer": _ONE_DATASET},
        "make the data anew with preprocess_data, which writes mmap datasets",
    ),
    "--dataloader-type": Choice(
        {"single": "samples are read in the order of the schedule"},
        "leave it out: each epoch of a dataset is shuffled anew",
    ),
    "--num-experts": Choice({"1": _DENSE}, _NO_EXPERTS),
    "--expert-model-parallel-size": Choice({"1": _DENSE}, _NO_EXPERTS),
    "--ds-sequence-parallel-size": Choice(
        {"1": "sequences are whole"}, "split sequences with --sequence-parallel over TP"
    ),
    "--num-distributed-optimizer-instances": Choice(
        {"1": _ONE_GROUP}, f"leave it out: {_ONE_GROUP}"
    ),
    "--data-parallel-sharding-strategy": Choice(
        {
            "no_shard": {"use_distributed_optimizer": False},
            "optim": {"use_distributed_optimizer": True},
        },
        "shard the optimizer with --use-distributed-optimizer, the model with TP and PP",
    ),
    "--main-params-dtype": Choice({"fp32": _FP32_STATE}, f"leave it out: {_FP32_STATE}"),
    "--main-grads-dtype": Choice({"fp32": _FP32_STATE}, f"leave it out: {_FP32_STATE}"),
    "--exp-avg-dtype": Choice({"fp32": _FP32_STATE}, f"leave it out: {_FP32_STATE}"),
    "--exp-avg-sq-dtype": Choice({"fp32": _FP32_STATE}, f"leave it out: {_FP32_STATE}"),
    "--recompute-modules": Choice(
        {"core_attn": {"recompute_granularity": "selective"}},
        "recompute attention with --recompute-granularity selective, or layers with full",
    ),
    "--rope-type": Choice({"rope": {"position_embedding_type": "rope"}}, "use plain rope"),
    "--vocab-extra-ids": Choice({"0": "no ids are added"}, "leave it out: ids are the tokenizer's"),
    "--distributed-backend": Choice(
        {
            "nccl": "nccl is used on GPUs, gloo on a machine without",
            "gloo": "nccl is used on GPUs, gloo on a machine without",
        },
        "leave it out: nccl is used on GPUs, gloo on a machine without",
    ),
}
