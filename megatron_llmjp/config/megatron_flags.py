"""Megatron-LM's flags that are not a field of the same name.

Launch scripts of Megatron-LM and Megatron-DeepSpeed pass here as they are: a flag sets fields, is
not needed and says why, or is refused with what to use instead. Flags that equal a field's name
need no entry: the command line is made from the schema.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Alias(NamedTuple):
    """A flag without a value that sets fields."""

    sets: dict[str, Any]
    help: str


class Renamed(NamedTuple):
    """A flag with a value that goes to a field of another name."""

    field: str


class NotNeeded(NamedTuple):
    """A flag that is accepted, reported once, and has no effect."""

    values: int
    why: str


class Refused(NamedTuple):
    """A flag that cannot be honoured."""

    instead: str


ALIASES: dict[str, Alias] = {
    "--swiglu": Alias({"activation_function": "swiglu"}, "gated SiLU feed-forward"),
    "--disable-bias-linear": Alias({"add_bias_linear": False}, "no biases in linear layers"),
    "--no-bias-gelu-fusion": Alias(
        {"activation_function": "gelu"}, "exact GELU (Megatron's fused kernel is the tanh one)"
    ),
    "--use-rotary-position-embeddings": Alias(
        {"position_embedding_type": "rope"}, "rotary positions"
    ),
}

RENAMED: dict[str, Renamed] = {
    "--layernorm-epsilon": Renamed("norm_epsilon"),
    "--rope-theta": Renamed("rotary_base"),
    "--override-opt_param-scheduler": Renamed("override_opt_param_scheduler"),
    "--encoder-num-layers": Renamed("num_layers"),
}

NOT_NEEDED: dict[str, NotNeeded] = {
    "--use-mcore-models": NotNeeded(0, "megatron-core's models are the only ones"),
    "--use-flash-attn": NotNeeded(0, "the fastest attention at hand is chosen and printed"),
    "--transformer-impl": NotNeeded(1, "Transformer Engine is used where it is importable"),
    "--attention-softmax-in-fp32": NotNeeded(0, "softmax is always computed in fp32"),
    "--no-masked-softmax-fusion": NotNeeded(0, "softmax is part of the attention kernel"),
    "--group-query-attention": NotNeeded(0, "--num-query-groups says it"),
    "--distributed-backend": NotNeeded(1, "nccl on GPUs, gloo on a CPU machine"),
    "--use-mpi": NotNeeded(0, "ranks are found from torchrun, srun or mpirun"),
    "--log-throughput": NotNeeded(0, "throughput is always logged"),
    "--no-async-tensor-model-parallel-allreduce": NotNeeded(0, "megatron-core decides"),
    "--ckpt-format": NotNeeded(1, "checkpoints are torch_dist; convert_checkpoint makes others"),
    "--vocab-file": NotNeeded(1, "give --tokenizer-model"),
}

_FOLDS = "declare the data in a fold file and give --fold-file (docs/folds.md)"

REFUSED: dict[str, Refused] = {
    "--data-path": Refused(_FOLDS),
    "--train-data-path": Refused(_FOLDS),
    "--valid-data-path": Refused(_FOLDS),
    "--test-data-path": Refused(_FOLDS),
    "--data-args-path": Refused(_FOLDS),
    "--split": Refused("name validation sets in the fold file (docs/folds.md)"),
    "--train-samples": Refused("give --train-iters, or let the fold file's total decide"),
}
