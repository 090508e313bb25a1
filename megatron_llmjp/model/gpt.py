"""megatron-core GPTModel from a Config: GPT-2, LLaMA and GPT-NeoX architectures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.transformer import transformer_block
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_llmjp.config.schema import Config, ModelConfig
from megatron_llmjp.errors import UserError
from megatron_llmjp.model.attention import (
    SDPAttention,
    has_document_kernel,
    use_dense_masks,
    with_core_attention,
)
from megatron_llmjp.model.attention_backend import attention_backend
from megatron_llmjp.model.context_parallel_attention import ContextParallelAttention
from megatron_llmjp.model.experts import choose_layers, expert_settings, recomputed_modules
from megatron_llmjp.model.initialization import initialize
from megatron_llmjp.model.kernels import KernelChoice, choose_kernels
from megatron_llmjp.model.layers import ParallelResidualLayer, norm_class, with_norms
from megatron_llmjp.model.losses import GPTModelWithLoss
from megatron_llmjp.model.transformer_engine import (
    accumulate_weight_gradients,
    choose_document_attention,
    transformer_engine_layer_spec,
)
from megatron_llmjp.parallel.device import Device
from megatron_llmjp.patches.compiled_rotary import compile_rotary_embedding
from megatron_llmjp.patches.llama3_rope_scaling import scale_rotary_frequencies
from megatron_llmjp.patches.norm_recomputation import recompute_norms_without_fp8


def gelu_tanh(x: Tensor) -> Tensor:
    """Tanh approximation of GELU, as in Megatron's fused bias-GELU."""
    return F.gelu(x, approximate="tanh")


def params_dtype(config: Config) -> torch.dtype:
    """Return the dtype of weights and activations."""
    if config.training.bf16:
        return torch.bfloat16
    return torch.float16 if config.training.fp16 else torch.float32


def transformer_config(
    config: Config, device: Device, kernels: KernelChoice | None = None
) -> TransformerConfig:
    """Return megatron-core's configuration of the network and its parallel layout."""
    kernels = kernels or choose_kernels(device, config)
    if kernels.fusions:
        compile_rotary_embedding()
    recompute_norms_without_fp8()
    model, parallel = config.model, config.parallel
    activation, fused_activation = _activation(model.activation_function, kernels, config)
    with _as_user_error():
        core = TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.query_groups,
            kv_channels=model.head_dim,
            normalization=model.normalization,
            layernorm_epsilon=model.norm_epsilon,
            gated_linear_unit=model.activation_function == "swiglu",
            activation_func=activation,
            # megatron-core's fused activation of experts is SwiGLU's only.
            bias_activation_fusion=fused_activation
            and (activation is F.silu or not model.has_experts),
            bias_dropout_fusion=kernels.fusions,
            masked_softmax_fusion=False,
            attention_backend=attention_backend(os.environ),
            # Transformer Engine's kernel has no factor for YaRN.
            apply_rope_fusion=kernels.transformer_engine
            and model.position_embedding_type != "yarn",
            gradient_accumulation_fusion=kernels.apex,
            add_bias_linear=model.add_bias_linear,
            add_qkv_bias=model.add_qkv_bias,
            qk_layernorm=model.qk_layernorm,
            deterministic_mode=config.training.deterministic_mode,
            hidden_dropout=model.hidden_dropout,
            attention_dropout=model.attention_dropout,
            init_method_std=model.init_method_std,
            params_dtype=params_dtype(config),
            pipeline_dtype=params_dtype(config),
            bf16=config.training.bf16,
            fp16=config.training.fp16,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            sequence_parallel=parallel.sequence_parallel
            and parallel.tensor_model_parallel_size > 1,
            recompute_granularity=parallel.recompute_granularity,
            recompute_modules=recomputed_modules(parallel, kernels),
            recompute_method=parallel.recompute_method,
            recompute_num_layers=parallel.recompute_num_layers,
            num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
            num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
            account_for_embedding_in_pipeline_split=parallel.account_for_embedding_in_pipeline_split,
            account_for_loss_in_pipeline_split=parallel.account_for_loss_in_pipeline_split,
            pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout,
            **_pipeline_communication(config, device),
            **expert_settings(config, kernels),
        )
    if model.position_embedding_type == "yarn":
        _add_yarn(core, model)
    return core


def _add_yarn(core: Any, model: ModelConfig) -> None:
    """Set YaRN's settings, which GPTModel and the attention look for among the attributes."""
    core.yarn_rotary_scaling_factor = model.yarn_rotary_scaling_factor
    core.yarn_original_max_position_embeddings = model.yarn_original_max_position_embeddings
    core.yarn_beta_fast, core.yarn_beta_slow = model.yarn_beta_fast, model.yarn_beta_slow
    core.yarn_mscale, core.yarn_mscale_all_dim = model.yarn_mscale, model.yarn_mscale_all_dim
    core.yarn_correction_range_round_to_int = model.yarn_correction_range_round_to_int


@contextmanager
def _as_user_error() -> Iterator[None]:
    """Raise megatron-core's errors about a configuration as :class:`UserError`."""
    try:
        yield
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"megatron-core rejects the model or its parallel layout: {error}"
        ) from error


def _activation(
    name: str, kernels: KernelChoice, config: Config
) -> tuple[Callable[[Tensor], Tensor], bool]:
    """Return the activation, and whether megatron-core's fused bias + activation computes it.

    Its fused GELU is always the tanh approximation, and requires a bias.
    """
    if name == "swiglu":
        return F.silu, kernels.fusions
    if name == "gelu_tanh" and kernels.fusions and config.model.add_bias_linear:
        return F.gelu, True
    return (gelu_tanh if name == "gelu_tanh" else F.gelu), False


def _pipeline_communication(config: Config, device: Device) -> dict[str, Any]:
    parallel = config.parallel
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return {
        # As in Megatron-LM, the interleaved schedule overlaps communication with computation.
        # Batched ones of two stages would be mixed up, and gradients silently wrong.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # A wait for the device after each batch, required by PyTorch 1 only.
        "batch_p2p_sync": False,
        # gloo may read a buffer after the call has returned: it must not be freed.
        "deallocate_pipeline_outputs": device.is_cuda,
    }


def layer_spec(
    config: Config,
    core: TransformerConfig,
    device: Device,
    vp_stage: int | None,
    kernels: KernelChoice | None = None,
) -> Any:
    """Return the layer spec of one model chunk: Transformer Engine's layers, or torch's."""
    kernels = kernels or choose_kernels(device, config)
    layer = ParallelResidualLayer if config.model.use_parallel_residual else TransformerLayer
    if kernels.transformer_engine:
        te_attention = None
        if config.data.reset_attention_mask:
            te_attention, _ = choose_document_attention(core, params_dtype(config), device)

        def make_layer(experts: int | None) -> Any:
            return transformer_engine_layer_spec(
                layer, te_attention, core.qk_layernorm, experts, core.moe_grouped_gemm
            )

        norm: Any = transformer_block.LayerNormImpl
        return choose_layers(config.model, core, vp_stage, make_layer, norm)
    norm = norm_class(config.model.normalization)
    attention = ContextParallelAttention if core.context_parallel_size > 1 else SDPAttention

    def make_local_layer(experts: int | None) -> Any:
        spec = gpt_layer_specs.get_gpt_layer_local_spec(
            num_experts=experts,
            qk_layernorm=core.qk_layernorm,
            normalization=config.model.normalization,
        )
        spec = with_core_attention(replace(spec, module=layer), attention)
        return with_norms(spec, norm, experts is not None)

    return choose_layers(config.model, core, vp_stage, make_local_layer, norm)


def build_model_chunk(
    config: Config,
    device: Device,
    core: TransformerConfig | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    kernels: KernelChoice | None = None,
    initial_weights: bool = True,
) -> GPTModel:
    """Build one chunk of the model, with initial weights that do not depend on the layout.

    Args:
        config: configuration of the run, with ``vocab_size``.
        device: device of the weights.
        core: result of :func:`transformer_config`, shared by all chunks.
        pre_process: whether this chunk contains the embedding.
        post_process: whether it contains the final norm and the output layer.
        vp_stage: number of the chunk in the interleaved schedule.
        kernels: implementations of the layers, those of ``core``; by default the fastest ones.
        initial_weights: False if the weights are loaded before they are used.
    """
    kernels = kernels or choose_kernels(device, config)
    core = core or transformer_config(config, device, kernels)
    model = GPTModelWithLoss(
        config=core,
        transformer_layer_spec=layer_spec(config, core, device, vp_stage, kernels),
        vocab_size=config.padded_vocab_size,
        max_sequence_length=config.max_positions,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
        position_embedding_type=config.model.position_embedding_type,
        rotary_percent=config.model.rotary_percent,
        rotary_base=config.model.rotary_base,
        seq_len_interpolation_factor=config.model.rotary_seq_len_interpolation_factor,
        vp_stage=vp_stage,
    )
    _choose_document_masks(model, config, core, device, kernels)
    if config.model.use_rope_scaling:
        scale_rotary_frequencies(model.rotary_pos_emb, config.model)
    if any(parameter.is_meta for parameter in model.parameters()):
        return model  # on the meta device, for --estimate
    if initial_weights:
        initialize(model, config)
    model.z_loss_strength = config.training.z_loss_strength
    model.compiled_loss = kernels.fusions
    if kernels.transformer_engine:
        accumulate_weight_gradients(model)
    return model.to(device.torch)


def _choose_document_masks(
    model: GPTModel,
    config: Config,
    core: TransformerConfig,
    device: Device,
    kernels: KernelChoice,
) -> None:
    """Let attention use dense masks where it has no kernel for the boundaries of documents."""
    dtype = params_dtype(config)
    if kernels.transformer_engine:
        _, accepts_boundaries = choose_document_attention(core, dtype, device)
    else:
        accepts_boundaries = device.is_cuda and has_document_kernel(core, dtype)
    if not accepts_boundaries:
        samples, length = config.training.micro_batch_size, config.data.seq_length
        use_dense_masks(model.decoder, samples, length, dtype)


def build_model(config: Config, device: Device) -> list[GPTModel]:
    """Build the model chunks of this rank: one, or one per virtual pipeline stage."""
    core = transformer_config(config, device)
    chunks = config.parallel.virtual_pipeline_model_parallel_size
    return [
        build_model_chunk(
            config,
            device,
            core,
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            vp_stage=vp_stage,
        )
        for vp_stage in (range(chunks) if chunks else [None])
    ]
