"""Arguments (``args``) in the checkpoints that are written for Megatron-LM."""

from __future__ import annotations

from typing import Any

from megatron_llmjp.convert.formats.base import ConversionOptions, SourceCheckpoint
from megatron_llmjp.convert.formats.megatron_lm.arguments import make_args, run_arguments
from megatron_llmjp.convert.formats.megatron_lm.expert_arguments import expert_arguments
from megatron_llmjp.convert.formats.megatron_lm.optimizer_writer import FRAGMENTS, RESHARDABLE
from megatron_llmjp.convert.formats.megatron_lm.pipeline_arguments import stage_arguments
from megatron_llmjp.convert.optimizer.random_states import RandomStates


def checkpoint_arguments(
    source: SourceCheckpoint,
    options: ConversionOptions,
    rows: int,
    states: RandomStates | None = None,
) -> Any:
    """Return the namespace that describes the checkpoint to Megatron-LM.

    Args:
        source: provides the model and the counters.
        options: provide the parallel layout and the format.
        rows: padded vocabulary size.
        states: random states that are written.
    """
    model = source.model
    grouped = model.query_groups != model.num_attention_heads
    extra = {
        "group_query_attention": grouped,
        "num_query_groups": model.query_groups if grouped else 1,
        "position_embedding_type": model.position_embedding_type,
        "add_position_embedding": True,  # Megatron-LM's default for both kinds
        "rotary_base": model.rotary_base,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": model.rotary_seq_len_interpolation_factor,
        "use_rope_scaling": model.use_rope_scaling,
        "rope_scaling_factor": model.rope_scaling_factor,
        "normalization": model.normalization,
        "add_qkv_bias": model.add_qkv_bias,
        "qk_layernorm": model.qk_layernorm,
        **expert_arguments(model),
        "transformer_impl": options.transformer_impl,
        "use_mcore_models": True,
        "ckpt_format": options.megatron_format,
        "iteration": source.iteration or 0,
        "consumed_train_samples": source.consumed_samples or 0,
        **stage_arguments(options.parallel),
        "world_size": options.tensor_parallel * options.pipeline_parallel,
        **_saved_states(options, states),
    }
    extra |= run_arguments(source)
    return make_args(model, rows, options.dtype or source.dtype, 1, 1, extra)


def _saved_states(options: ConversionOptions, states: RandomStates | None) -> dict[str, Any]:
    """Return which states the checkpoint contains, from which the loader derives what to load."""
    found: dict[str, Any] = {
        "no_save_optim": None if options.with_optimizer else True,
        "no_save_rng": None if states is not None else True,
        "data_parallel_random_init": states is not None and states.data > 1,
    }
    if options.with_optimizer and options.megatron_format == "torch_dist":
        found |= {
            "use_distributed_optimizer": True,
            "ckpt_fully_parallel_save": options.optimizer_sharding == FRAGMENTS,
            "dist_ckpt_optim_fully_reshardable": options.optimizer_sharding == RESHARDABLE,
        }
    return found
