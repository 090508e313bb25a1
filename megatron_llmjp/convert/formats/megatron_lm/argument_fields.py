"""Allow-list of the arguments in Megatron checkpoints.

A field of ``args`` is one of four kinds:

- understood: read by ``arguments.py``;
- training: does not change the function that the trained model computes, or belongs to a disabled
  feature (experts, latent attention, ...);
- network: an option that the canonical model does not have; refused unless it is disabled;
- unknown: refused unless it is unset or off (None, False, empty).

Names were collected from megatron/training/arguments.py, the configuration classes it exposes, and
megatron/core/transformer/transformer_config.py of Megatron-LM (core 0.4 to 0.19 and main of August
2026), LLM-jp's branches of it, and megatron/arguments.py of LLM-jp's Megatron-DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatron_llmjp.convert.formats.megatron_lm.expert_arguments import is_unknown_expert_field
from megatron_llmjp.errors import UserError

_PREFIXES = """
adaptive_muon_ adlr_ align_ app_tag_ async_ batch_p2p_ bert_ biencoder_ check_ ckpt_
cpu_offloading consumed_ cuda_graph_ curriculum_ data_ dataloader_ ddp_ decoupled_ deepspeed
dino_ disable_ dist_ckpt_ distrib_ distributed_ ds_ eval_ exit_ exp_avg_ expert_ fim_
finetune flight_recorder_ fp4 fp8 fsdp_ ft_ grad_ grpo_ gtp_ ict_ img_ inference init_method
inprocess_ keep_fp8_ kitchen_ langrl_ load_ log_ logits_ lr_ main_ manual_gc mask_
megatron_fsdp_ microbatch_ mmap_ muon_ nccl_ no_load_ no_save_ non_persistent_
null_tokenizer_ object_storage_ offload_ one_logger_ optimizer_ otel_ overlap_ override_
per_split_ pipeline_ profile_ pytorch_profiler_ quant_ recompute_ record_ rerun_ retriever_
rl_ s3_ save_ sft_ skip_ soap_ straggler_ tensorboard_ tensor_ te_ tiktoken_ timing_
tokenizer_ torch_fsdp2_ tp_comm_ train_ use_checkpoint_ use_flash_attn use_kitchen valid_
validation_ varlen_ vision_ wandb_ weight_decay zero_
"""

PREFIXES = tuple(_PREFIXES.split())
"""Prefixes of training arguments: data, optimizer, parallel layout, kernels, logging, inference."""

_NAMES = """
DDP_impl _cpu_offloading_context _is_global_batch_size_explicitly_specified
account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
accumulate_allreduce_grads_in_fp32 activation_func_fp8_input_store
activation_offload_fraction actual_seq_length actual_vocab_size adam_beta1 adam_beta2
adam_eps allow_ambiguous_pad_tokens allow_transformer_engine aml_data_download_path
apply_query_key_layer_scaling apply_rope_fusion apply_wd_to_qk_layernorm attention_backend
attention_softmax_in_fp32 attn_mask auto_detect_ckpt_format autocast_dtype
average_in_collective barrier_with_L1_time batch_invariant_backend batch_invariant_mode
batch_size bf16 bias_activation_fusion bias_dropout_fusion bias_swiglu_fusion
block_data_path bucket_size calc_ft_timeouts calculate_per_token_loss chat_template
checkpoint_activations checkpoint_in_cpu checkpoint_num_layers
chunked_optimizer_state_offload classes_fraction clip_grad clone_scatter_output_in_embedding
compression_training config_logger_dir context_parallel_size contigious_checkpointing
cp_comm_type cp_partition_mode cpu_optimizer cpu_torch_adam create_all_gather_group
create_attention_mask_in_dataloader cross_entropy_fusion_impl cross_entropy_loss_fusion
curr_iteration custom_token_counting deallocate_pipeline_outputs decode_only_cuda_graphs
decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers decoder_seq_length
decrease_batch_size_if_needed deepscale deepscale_config defer_embedding_wgrad_compute
delay_grad_reduce delay_offload_until_cuda_graph delay_param_gather delay_wgrad_compute
delta_offload_bytes_across_pp_ranks dense_grouped_gemm deprecated_use_mcore_models
deterministic_mode distribute_checkpointed_activations distribute_saved_activations do_test
do_train do_valid dump dump_param_to_param_group_map dynamic_checkpointing_min
dynamic_context_parallel embedding_init_method embedding_init_method_std embedding_path
embedding_weights_in_fp32 empty_unused_memory_level enable_autocast enable_chunked_prefill
enable_cuda_graph enable_experimental enable_expert_tensor_parallelism enable_ft_package
enable_full_sharding_in_hsdp enable_gloo_process_groups enable_msc enable_one_logger
encoder_pipeline_model_parallel_size encoder_seq_length encoder_tensor_model_parallel_size
end_weight_decay eod_mask_loss ep_overlap_early_attn_memory_release error_injection_rate
error_injection_type evidence_data_path external_cuda_graph fake_process_group
fallback_to_eager_attn filter_warnings finalize_model_grads_func
fine_grained_activation_offloading fine_grained_offloading_max_inflight_offloads
first_last_layers_bf16 first_pipeline_num_layers flash_attention_version flash_decode
force_ds_sequence_parallel force_stop_iter fp16 fp16_lm_cross_entropy
fp32_residual_connection freeze_all_layers full_validation fully_parallel_load
fully_parallel_save fused_residual_rmsnorm fused_single_qkv_rope global_batch_size
gpu_sniff_test_interval gradient_accumulation_fusion gradient_reduce_div_fusion head_lr_mult
hetereogenous_dist_checkpoint hidden_size_teacher hierarchical_context_parallel_sizes
high_priority_a2a_comm_stream high_priority_stream_groups hybrid_context_parallel hysteresis
indexer_batch_size indexer_log_interval init_model_with_meta_device initial_loss_scale
iter_per_epoch iteration iterations_to_skip kd kd_alpha_ce kd_beta_ce kd_temp
last_pipeline_num_layers lazy_mpu_init legacy_tokenizer lion_beta1 lion_beta2 load
local_rank logging_level logit_dtype loss_scale loss_scale_window lr masked_softmax_fusion
max_seqlen_per_dp_cp_rank max_tokens_to_oom mem_efficient_ln memory_centric_tiled_linear
memory_efficient_layer_norm memory_keys memory_snapshot_path merge_file metadata_path
micro_batch_size mid_level_dataset_surplus min_dynamic_context_parallel_size min_loss_scale
min_lr min_offloaded_tensor_size mlp_chunks_for_prefill mlp_chunks_for_training mock_data
mode model_parallel_size model_type modelopt_enabled modules_to_filter most_recent_k
multiple_validation_sets no_persist_layer_norm no_pipeline_parallel no_sync_func
no_weight_decay_cond_type num_attention_heads_teacher num_buckets num_channels num_classes
num_dataset_builder_threads num_distributed_optimizer_instances num_experts_teacher
num_floating_point_operations_so_far num_layers_at_end_in_bf16 num_layers_at_start_in_bf16
num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
num_layers_per_virtual_pipeline_stage num_layers_teacher
num_microbatches_with_partial_activation_checkpoints num_speculative_tokens
num_virtual_stages_per_pipeline_rank num_workers nvtx_ranges offset_sampling_seed_by_dp_rank
optimizer outer_dp_sharding_strategy output_bert_embeddings output_layer_init_method
pad_buckets_for_high_nccl_busbw pad_packed_seq_alignment pad_vocab_size
param_name_patterns_for_fp32_local_accumulation param_sync_func params_dtype
partition_activations patch_dim per_dataset_sequences_path perform_initialization
perform_rl_step persist_layer_norm perturb phase_transition_iterations pin_cpu_grads
pin_cpu_params pp_partition_method preserve_fp32_weights pretrained_checkpoint profile
qad_train_target query_in_block_prob rampup_batch_size random_ltd random_ltd_layer_num
random_ltd_reserved_length rank reduce_scatter_with_fp32_accumulation refit_method
remote_device renormalize_blend_weights replication replication_factor replication_jump
reset_attention_mask reset_iteration reset_position_ids result_rejected_tracker_filename
return_data_index reuse_grad_buf_for_mxfp8_param_ag rotary_pos_emb
run_workload_inspector_server runtime_time_unit sample_rate save
scatter_gather_tensors_in_pipeline scattered_embeddings seed sequence_packing_scheduler
sequence_parallel set_level_for_all_loggers sft sgd_momentum sharp_enabled_group
short_seq_prob skipped_train_samples split split_transformers standalone_embedding_stage
start_eval_at_iter start_weight_decay step_batch_size_schedule steps store_param_remainders
stream_ckpt_dequant strict_fsdp_dtensor_load suggested_communication_unit_size
swin_backbone_type symmetric_ar_type synchronize_each_layer teacher_forward teacher_model
teacher_model_config test_data_path test_mode thd_max_packed_sequences
thd_tail_padding_policy throughput_window_size tile_factor timers titles_data_path to_test
tp_only_amax_red transformer_impl transformer_pipeline_model_parallel_size trust_remote_code
universal_checkpoint use_contiguous_buffers_in_ddp use_contiguous_buffers_in_local_ddp
use_cpu_initialization use_custom_fsdp use_dataset_only use_dist_ckpt
use_dist_ckpt_deprecated use_distributed_optimizer use_fused_weighted_squared_relu
use_gcp_dynamic_checkpointing use_gigatoken use_gloo_process_groups
use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert
use_inference_optimized_layers use_layer_wise_distributed_optimizer
use_layer_wise_param_layout use_legacy_static_engine use_megatron_fsdp
use_mp_args_from_checkpoint_args use_mpi use_nsys_profiler use_one_sent_docs
use_persistent_ckpt_worker use_pin_memory use_precision_aware_optimizer use_pytorch_profiler
use_ring_exchange_p2p use_sharp use_te_rng_tracker use_tokenizer_model_from_checkpoint_args
use_torch_fsdp2 use_torch_optimizer_for_cpu_offload use_tp_pp_dp_mapping use_tutel
use_varlen_dataset use_z_loss used_data_out_path variable_seq_lengths verify_integrity
virtual_pipeline_model_parallel_size vocab_extra_ids vocab_file warmup wd_incr_steps
wgrad_deferral_limit world_size wsd_decay_steps z_loss_strength
"""

NAMES = frozenset(_NAMES.split())
"""Other training arguments."""


def is_training_only(name: str) -> bool:
    """Return whether a field is known not to change the function of the trained model."""
    return name in NAMES or name.startswith(PREFIXES)


Fields = Mapping[str, Any]

_UNDERSTOOD = """
num_layers encoder_num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels
group_query_attention num_query_groups num_key_value_heads max_position_embeddings seq_length
position_embedding_type use_rotary_position_embeddings add_position_embedding rotary_base
rope_theta rotary_percent rotary_seq_len_interpolation_factor use_rope_scaling rope_scaling_factor
normalization norm_epsilon layernorm_epsilon swiglu gated_linear_unit bias_gelu_fusion openai_gelu
onnx_safe add_bias_linear add_qkv_bias qk_layernorm untie_embeddings_and_output_weights
hidden_dropout attention_dropout init_method_std make_vocab_size_divisible_by vocab_size
true_vocab_size padded_vocab_size tokenizer_type use_legacy_models use_mcore_models num_experts
num_moe_experts
"""

UNDERSTOOD = frozenset(_UNDERSTOOD.split())
"""Fields that ``arguments.py`` reads."""

_OFF = (None, False)

DISABLED_VALUES: dict[str, tuple[Any, ...]] = {
    "activation_func": (None,),
    "activation_func_clamp_value": (None,),
    "apply_layernorm_1p": _OFF,
    "apply_residual_connection_post_layernorm": _OFF,
    "attention_output_gate": _OFF,
    "decoder_num_layers": (None,),
    "enable_gpt_oss": _OFF,
    "enable_hyper_connections": _OFF,
    "enable_mhc_connections": _OFF,
    "experimental_attention_variant": (None,),
    "export_num_eagle_layers": (None, 0),
    "export_num_medusa_heads": (None, 0),
    "export_num_mtp": (None, 0),
    "export_qk_l2_norm": _OFF,
    "glu_linear_offset": (None, 0.0),
    "head_wise_attn_gate": _OFF,
    "heterogeneous_block_specs": _OFF,
    "heterogeneous_layers_config_encoded_json": (None, ""),
    "heterogeneous_layers_config_path": (None, ""),
    "hybrid_attention_ratio": (None, 0.0),
    "hybrid_layer_pattern": (None, ""),
    "hybrid_mlp_ratio": (None, 0.0),
    "hybrid_override_pattern": (None, ""),
    "is_hybrid_model": _OFF,
    "layernorm_zero_centered_gamma": _OFF,
    "linear_attention_freq": (None,),
    "linear_attention_type": (None,),
    "mlp_type": (None, "standard"),
    "model_spec": (None,),
    "mrope_interleaved": _OFF,
    "mrope_section": (None,),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": _OFF,
    "no_op": _OFF,
    "no_rope_freq": (None,),
    "num_experts_switch": (None,),
    "per_block_parameters": (None,),
    "qk_l2_norm": _OFF,
    "quick_geglu": _OFF,
    "quick_gelu": _OFF,
    "replace_with_linear": _OFF,
    "retro_add_retriever": _OFF,
    "rope_type": (None, "rope"),
    "rotary_base_per_layer": (None,),
    "rotary_interleaved": _OFF,
    "softmax_scale": (None,),
    "softmax_type": (None, "vanilla"),
    "spec": (None,),
    "squared_relu": _OFF,
    "use_embedding_scaling": _OFF,
    "use_mup": _OFF,
    "window_size": (None, (-1, -1), (-1, 0), [-1, -1], [-1, 0]),
    "yaml_cfg": (None,),
}
"""Network options, with the values that disable them."""

_OWNERS: dict[str, tuple[str, ...]] = {
    "num_experts": ("moe_", "topk", "create_moe_param_group"),  # see expert_arguments.py
    "multi_latent_attention": (
        *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
        *("rotary_scaling_factor", "mscale", "beta_fast", "beta_slow", "cache_mla_latents"),
        *("original_max_position_embeddings", "mla_down_proj_fusion", "o_groups", "o_lora_rank"),
    ),
    "mtp_num_layers": ("mtp_", "freeze_base_for_mtp"),
    "experimental_attention_variant": (
        *("dsa_", "csa_", "linear_", "gdn_", "gdp_", "apply_dsa_kernel_fusion"),
        "experimental_attention_variant_",
    ),
    "is_hybrid_model": ("mamba_", "use_mamba_"),
    "use_mup": ("mup_",),
    "enable_hyper_connections": ("mhc_", "use_fused_mhc", "num_residual_streams"),
    "retro_add_retriever": ("retro_",),
    "window_size": ("window_attn_skip_freq",),
    "qk_clip": ("qk_clip",),
    "modelopt_enabled": ("export_",),
    "position_embedding_type": ("yarn_", "relative_attention_"),
}
"""Prefixes of options without effect while the option that is their key is disabled.

An enabled key is refused (``position_embedding_type`` by ``arguments.py``), except clipping of
attention logits and quantization, which act on weights during training and do not change the
function."""

_APPROXIMATE_GELU = ("use_te_activation_func", "use_transformer_engine_op_fuser")
"""Transformer Engine's own GELU is the tanh approximation; its SwiGLU is exact."""


def check_fields(given: Fields, where: str, ignored: Collection[str] = ()) -> None:
    """Refuse arguments that the converter does not support.

    Args:
        given: the arguments by name.
        where: the file, for messages.
        ignored: names to skip.

    Raises:
        UserError: fields are refused; the message has their names and values.
    """
    network = []
    unknown = []
    for name, value in sorted(given.items()):
        if name in ignored or name in UNDERSTOOD:
            continue
        kind = field_kind(name)
        if is_unknown_expert_field(name, value, given) or (
            kind == "network" and not _is_disabled(name, value, given)
        ):
            network.append(f"{name} = {_shown(value)}")
        elif kind == "unknown" and not _is_off(value):
            unknown.append(f"{name} = {_shown(value)}")
    lines = []
    if network:
        lines.append(f"not supported: {', '.join(network)}")
    if unknown:
        lines.append(
            f"unknown arguments: {', '.join(unknown)}; if they do not change the network, add "
            f"--ignore-args {','.join(item.partition(' ')[0] for item in unknown)}"
        )
    if lines:
        raise UserError(f"{where}: {'; '.join(lines)}")


def field_kind(name: str) -> str:
    """Return the kind of a field: understood, network, training or unknown."""
    if name in UNDERSTOOD:
        return "understood"
    if name in DISABLED_VALUES or name in _APPROXIMATE_GELU:
        return "network"
    owned = any(name.startswith(prefixes) for prefixes in _OWNERS.values())
    return "training" if owned or is_training_only(name) else "unknown"


def _is_disabled(name: str, value: Any, given: Fields) -> bool:
    if name in _APPROXIMATE_GELU:
        return not value or bool(given.get("swiglu"))
    return any(_same(value, disabled) for disabled in DISABLED_VALUES[name])


def _same(value: Any, disabled: Any) -> bool:
    return type(value) in (type(disabled), int, float) and bool(value == disabled)


def _is_off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
