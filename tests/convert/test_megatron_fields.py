"""Classification of a Megatron run's arguments: network options are read or refused by name."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from megatron_llmjp.convert.formats.megatron_lm.argument_fields import field_kind
from megatron_llmjp.convert.formats.megatron_lm.arguments import model_from_args
from megatron_llmjp.errors import UserError
from tests.convert.hf_models import llama

CHANGES_THE_NETWORK = {
    "num_layers": 3, "hidden_size": 128, "num_attention_heads": 16, "num_query_groups": 2,
    "ffn_hidden_size": 99, "kv_channels": 24, "layernorm_epsilon": 1e-3, "normalization": "L2Norm",
    "hidden_dropout": 0.3, "attention_dropout": 0.3, "init_method_std": 0.5,
    "add_bias_linear": True, "add_qkv_bias": True, "gated_linear_unit": True, "swiglu": False,
    "activation_func": "relu", "activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0,
    "squared_relu": True, "quick_gelu": True, "quick_geglu": True,
    "softmax_scale": 0.1, "softmax_type": "learnable", "window_size": (64, 0),
    "layernorm_zero_centered_gamma": True, "apply_layernorm_1p": True,
    "apply_residual_connection_post_layernorm": True, "qk_layernorm": True, "qk_l2_norm": True,
    "attention_output_gate": True, "head_wise_attn_gate": True, "no_rope_freq": 4,
    "rotary_interleaved": True, "rotary_base": 500000, "rope_theta": 500000.0,
    "rotary_percent": 0.5, "rotary_seq_len_interpolation_factor": 4, "use_rope_scaling": True,
    "rope_scaling_factor": 32.0, "rotary_base_per_layer": [10000, 500000], "rope_type": "yarn",
    "position_embedding_type": "yarn", "mrope_section": [16, 24, 24], "mrope_interleaved": True,
    "mtp_num_layers": 1, "multi_latent_attention": True,
    "experimental_attention_variant": "dsa", "linear_attention_freq": 4,
    "linear_attention_type": "gated_delta_net", "is_hybrid_model": True,
    "hybrid_layer_pattern": "M*-", "hybrid_override_pattern": "M*-", "hybrid_attention_ratio": 0.1,
    "hybrid_mlp_ratio": 0.1, "heterogeneous_block_specs": True,
    "heterogeneous_layers_config_path": "x.json", "heterogeneous_layers_config_encoded_json": "{}",
    "per_block_parameters": [1], "no_op": True, "replace_with_linear": True, "use_mup": True,
    "enable_hyper_connections": True, "enable_mhc_connections": True, "use_embedding_scaling": True,
    "retro_add_retriever": True, "spec": ["local"], "yaml_cfg": "a.yaml", "mlp_type": "residual",
    "num_experts_switch": 2, "decoder_num_layers": 2, "encoder_num_layers": 12,
    "untie_embeddings_and_output_weights": False, "max_position_embeddings": 128,
    "norm_epsilon": 1e-3, "export_num_eagle_layers": 1, "export_num_medusa_heads": 1,
    "export_num_mtp": 1, "export_qk_l2_norm": True, "enable_gpt_oss": True, "model_spec": ["x"],
}  # fmt: skip
"""Network options with a value that changes the function, from their documentation."""

OFF = {
    # values other than None and False that leave an option off
    "export_num_eagle_layers": [0], "export_num_medusa_heads": [0], "export_num_mtp": [0],
    "glu_linear_offset": [0.0, 0], "heterogeneous_layers_config_encoded_json": [""],
    "heterogeneous_layers_config_path": [""], "hybrid_attention_ratio": [0.0],
    "hybrid_layer_pattern": [""], "hybrid_mlp_ratio": [0.0], "hybrid_override_pattern": [""],
    "mlp_type": ["standard"], "mtp_num_layers": [0], "rope_type": ["rope"],
    "softmax_type": ["vanilla"],
    "window_size": [(-1, -1), (-1, 0), [-1, -1], [-1, 0]],
    "activation_func": [], "activation_func_clamp_value": [], "decoder_num_layers": [],
    "experimental_attention_variant": [], "linear_attention_freq": [],
    "linear_attention_type": [], "model_spec": [], "mrope_section": [], "no_rope_freq": [],
    "num_experts_switch": [], "per_block_parameters": [], "rotary_base_per_layer": [],
    "softmax_scale": [], "spec": [], "yaml_cfg": [],
}  # fmt: skip
_SWITCHES = """
    apply_layernorm_1p apply_residual_connection_post_layernorm attention_output_gate
    enable_gpt_oss enable_hyper_connections enable_mhc_connections export_qk_l2_norm
    head_wise_attn_gate heterogeneous_block_specs is_hybrid_model layernorm_zero_centered_gamma
    mrope_interleaved multi_latent_attention no_op qk_l2_norm quick_geglu quick_gelu
    replace_with_linear retro_add_retriever rotary_interleaved squared_relu use_embedding_scaling
    use_mup
"""
SWITCHES = _SWITCHES.split()
"""Options that are off if false."""

NEEDED = {
    "rope_scaling_factor": {"use_rope_scaling": True},
    "gated_linear_unit": {"swiglu": False},
}
"""Other fields required for a field to have an effect."""

_MAIN = """
    activation_offload_fraction actual_vocab_size apply_dsa_kernel_fusion batch_invariant_backend
    cp_partition_mode create_attention_mask_in_dataloader csa_compress_ratios
    csa_compress_rotary_base csa_dense_mode csa_window_size cuda_graph_dynamic_microbatches
    cuda_graph_modules delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks
    dsa_indexer_k_norm_epsilon dsa_indexer_rope_interleaved dsa_indexer_scoring_relu
    dsa_indexer_topk_freq dsa_kernel_backend enable_hyper_connections enable_mhc_connections
    experimental_attention_variant_loss_scale_func fallback_to_eager_attn
    fine_grained_offloading_max_inflight_offloads flash_attention_version fp8_output_proj
    fused_residual_rmsnorm gdn_conv_pad_alignment gdn_pre_gated_delta_rule_fusion
    gdp_num_householder gtp_remat_opt_in_modules head_wise_attn_gate high_priority_a2a_comm_stream
    inference_cuda_graph_scope inference_grouped_gemm_backend linear_attention_type linear_cp_mode
    log_moe_overload_factor mamba_training_ssm_states_dtype mhc_init_gating_factor
    mhc_num_residual_streams mhc_sinkhorn_iterations mla_down_proj_fusion
    mlp_chunks_for_training moe_combine_bwd_dtype moe_mlp_glu_interleave_size moe_n_hash_layers
    moe_paged_stash moe_router_quantile_balancing_ema mrope_interleaved mtp_detach_heads
    mtp_hybrid_override_pattern mtp_use_repeated_layer mup_attn_scale_power mup_base_hidden_size
    mup_embedding_mult mup_output_mult mup_width_mult nccl_all_reduce_for_prefill
    num_residual_streams o_groups o_lora_rank rotary_base_per_layer thd_max_packed_sequences
    use_fused_mhc use_grouped_gemm_for_dense_mlp use_mup use_transformer_engine_op_fuser
    yarn_beta_fast yarn_original_max_position_embeddings
"""

MAIN_OF_AUGUST_2026 = _MAIN.split()
"""Fields of TransformerConfig that the installed megatron-core does not have."""


def arguments(**changes: object) -> argparse.Namespace:
    """Arguments of a LLaMA run of megatron-core 0.12."""
    given = {
        "num_layers": 2, "encoder_num_layers": 2, "hidden_size": 64, "num_attention_heads": 8,
        "group_query_attention": True, "num_query_groups": 4, "ffn_hidden_size": 176,
        "max_position_embeddings": 64, "position_embedding_type": "rope", "swiglu": True,
        "add_bias_linear": False, "normalization": "RMSNorm", "norm_epsilon": 1e-5,
        "rotary_base": 10000, "rotary_percent": 1.0, "use_rope_scaling": False,
        "rope_scaling_factor": 8.0, "untie_embeddings_and_output_weights": True,
        "use_legacy_models": False, "use_mcore_models": True, "tokenizer_type": "NullTokenizer",
        "num_experts": None, "lr": 3e-4, "bf16": True,
    }  # fmt: skip
    return argparse.Namespace(**{**given, **changes})


def core_fields() -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.transformer.transformer_config import MLATransformerConfig
    return [field.name for field in dataclasses.fields(MLATransformerConfig)]


@pytest.mark.parametrize(("name", "value"), CHANGES_THE_NETWORK.items())
def test_a_network_field_is_understood_or_refused(name, value):
    needed = NEEDED.get(name, {})
    plain = model_from_args(arguments(**needed), "x.pt")
    try:
        changed = model_from_args(arguments(**{name: value}, **needed), "x.pt")
    except UserError as error:
        assert name in str(error)
        assert str(error).startswith("x.pt: ")
    else:
        assert changed != plain


@pytest.mark.parametrize("name", [*OFF, *SWITCHES])
def test_an_option_that_is_off_is_accepted(name):
    """Its values are exactly these: another one is refused."""
    plain = model_from_args(arguments(), "x.pt")
    off = [None, *OFF.get(name, [False])]
    for value in off:
        assert model_from_args(arguments(**{name: value}), "x.pt") == plain
        assert field_kind(name) == "network"
    for value in (2, 0.5, "other", True, [7]):
        if value in off or (value is True and 1 in off):
            continue
        with pytest.raises(UserError, match=rf"^x.pt: not supported: {name} = "):
            model_from_args(arguments(**{name: value}), "x.pt")


def test_missing_arguments_have_the_defaults_of_megatron_lm():
    """Those of its argument parser; the feed-forward size, heads and groups follow from others."""
    needed = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
    given = {name: vars(arguments())[name] for name in needed}
    given |= {"use_legacy_models": False, "position_embedding_type": "rope"}
    model = model_from_args(argparse.Namespace(**given), "x.pt")
    assert (model.ffn_hidden_size, model.num_query_groups, model.kv_channels) == (4 * 64, 8, 8)
    assert (model.norm_epsilon, model.init_method_std, model.rotary_base) == (1e-5, 0.02, 10000)
    assert (model.rotary_percent, model.rope_scaling_factor) == (1.0, 8.0)
    assert (model.normalization, model.activation_function) == ("LayerNorm", "gelu")
    assert (model.add_bias_linear, model.add_qkv_bias) == (True, False)
    assert not (model.untie_embeddings_and_output_weights or model.use_rope_scaling)
    assert model.make_vocab_size_divisible_by == 128 and model.vocab_size is None


def test_every_field_of_megatron_core_is_classified():
    assert [f for f in [*core_fields(), *MAIN_OF_AUGUST_2026] if field_kind(f) == "unknown"] == []


def test_fields_of_training_do_not_change_the_logits():
    """Change each ignored field of TransformerConfig in megatron-core's own model."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        same, different = pool.submit(vary, core_fields()).result()
    assert different == []
    assert len(same) > 25


def vary(fields: list[str]) -> tuple[list[str], list[str]]:
    """Return names of fields that, changed alone, keep the logits, and of those that do not.

    Fields that megatron-core refuses to change alone, or on a CPU, are in neither. Families whose
    feature is off or needs a GPU are not tried, for time.
    """
    warnings.simplefilter("ignore")
    from megatron_llmjp.config.schema import Config
    from megatron_llmjp.model import gpt
    from megatron_llmjp.parallel import device, process_groups
    from megatron_llmjp.parallel.ranks import single_process

    sizes = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 40}
    config = Config.model_validate({"model": sizes, "data": {"seq_length": 16}})
    cpu = device.setup()
    process_groups.initialize(config, single_process(), cpu)
    plain = gpt.transformer_config(config, cpu)
    expected = logits(gpt.build_model_chunk(config, cpu, plain))
    same, different = [], []
    for name in fields:
        default = getattr(plain, name, None)
        if field_kind(name) != "training" or not isinstance(default, bool | int | float):
            continue
        if name.startswith(("moe_", "mamba_", "tp_comm_", "cpu_", "fp8", "fp4", "cuda_", "infer")):
            continue
        value = (not default) if isinstance(default, bool) else default * 2 + 1
        try:
            model = gpt.build_model_chunk(config, cpu, dataclasses.replace(plain, **{name: value}))
            found = logits(model)
        except Exception:
            continue
        (same if torch.allclose(found, expected, atol=1e-5) else different).append(name)
    process_groups.destroy()
    return same, different


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        return model.eval()(tokens, tokens, None).float()


def test_unknown_arguments_are_refused_unless_they_are_off():
    plain = model_from_args(arguments(), "x.pt")
    args = arguments(logit_softcapping=30.0, new_flag=False, new_list=[], sandwich_norm=True)
    with pytest.raises(UserError, match=r"logit_softcapping = 30.0, sandwich_norm = True") as error:
        model_from_args(args, "x.pt")
    names = str(error.value).rpartition(" ")[2].split(",")
    assert names == ["logit_softcapping", "sandwich_norm"]
    assert model_from_args(args, "x.pt", names) == plain


def test_rope_theta_is_the_rotary_base():
    assert model_from_args(arguments(rope_theta=500000.0), "x").rotary_base == 500000
    legacy = arguments(rope_theta=500000.0, use_legacy_models=True)
    with pytest.raises(UserError, match="rope_theta 500000"):
        model_from_args(legacy, "x")
    with pytest.raises(UserError, match=r"rope_theta 500000.0 with rotary_base 20000"):
        model_from_args(arguments(rope_theta=500000.0, rotary_base=20000), "x")


def test_gelu_variant_follows_the_arguments():
    """megatron-core's model ignores ``openai_gelu`` and ``onnx_safe``."""
    gelu = {"swiglu": False, "add_bias_linear": True}
    for core in (True, False):
        for fused in (True, False):
            run = {**gelu, "use_legacy_models": not core, "bias_gelu_fusion": fused}
            plain = "gelu_tanh" if fused else "gelu"
            for name, older in (("openai_gelu", "gelu_tanh"), ("onnx_safe", "gelu")):
                found = model_from_args(arguments(**run, **{name: True}), "x")
                assert found.activation_function == (plain if core else older)


def test_ignore_args_accepts_the_refused_arguments(tmp_path, convert):
    llama(rope_theta=10000.0).save_pretrained(tmp_path / "hf")
    convert("--to", "megatron-lm", "--ckpt-format", "torch", "--input", tmp_path / "hf",
            "--output", tmp_path / "mlm")  # fmt: skip
    path = next(tmp_path.glob("mlm/*/*/*.pt"))
    content = torch.load(path, weights_only=False)
    content["args"].sandwich_norm = True
    torch.save(content, path)
    words = ("--to", "hf", "--input", tmp_path / "mlm", "--output", tmp_path / "back")
    assert "--ignore-args sandwich_norm" in convert(*words, code=2)
    convert(*words, "--ignore-args", "sandwich_norm")
    words = ("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "o")
    assert "--ignore-args: not supported for hf" in convert(*words, "--ignore-args", "a", code=2)
