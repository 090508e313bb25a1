"""Default, type and limits of every field, written out."""

from __future__ import annotations

import ast

import pytest

from megatron_llmjp.config.schema import SECTION_OF, SECTIONS

FIELDS = """\
num_layers int required >0
hidden_size int required >0
num_attention_heads int required >0
num_query_groups int None >0
kv_channels int None >0
ffn_hidden_size int None >0
max_position_embeddings int None >0
position_embedding_type rope|yarn|learned_absolute 'rope'
rotary_base int 10000 >0
rotary_percent float 1.0 >0 <=1
rotary_seq_len_interpolation_factor int None >0
use_rope_scaling bool False
rope_scaling_factor float 8.0 >0
rope_scaling_low_freq_factor float 1.0 >0
rope_scaling_high_freq_factor float 4.0 >0
rope_scaling_original_max_position_embeddings int 8192 >0
yarn_rotary_scaling_factor float 1.0 >=1
yarn_original_max_position_embeddings int 4096 >0
yarn_beta_fast float 32.0 >0
yarn_beta_slow float 1.0 >0
yarn_mscale float None >0
yarn_mscale_all_dim float None >0
yarn_correction_range_round_to_int bool True
normalization RMSNorm|LayerNorm 'RMSNorm'
norm_epsilon float 1e-05 >0
activation_function swiglu|gelu|gelu_tanh 'swiglu'
add_bias_linear bool False
add_qkv_bias bool False
qk_layernorm bool False
untie_embeddings_and_output_weights bool True
use_parallel_residual bool False
hidden_dropout float 0.0 >=0 <1
attention_dropout float 0.0 >=0 <1
init_method_std float 0.02 >0
vocab_size int None >0
make_vocab_size_divisible_by int 128 >0
padded_vocab_size int None >0
num_moe_experts int None >1
moe_layer_freq list 1
moe_ffn_hidden_size int None >0
moe_shared_expert_intermediate_size int None >0
moe_shared_expert_gate bool False
moe_router_topk int 2 >0
moe_router_score_function softmax|sigmoid 'softmax'
moe_router_pre_softmax bool False
moe_router_topk_scaling_factor float None >0
moe_router_num_groups int None >0
moe_router_group_topk int None >0
moe_router_dtype fp32|fp64 None
moe_router_load_balancing_type aux_loss|seq_aux_loss|sinkhorn|none 'aux_loss'
moe_aux_loss_coeff float 0.0 >=0
moe_z_loss_coeff float None >0
moe_router_enable_expert_bias bool False
moe_router_bias_update_rate float 0.001 >0
moe_expert_capacity_factor float None >0
moe_pad_expert_input_to_capacity bool False
moe_token_drop_policy probs|position 'probs'
tensor_model_parallel_size int 1 >0
pipeline_model_parallel_size int 1 >0
virtual_pipeline_model_parallel_size int None >0
decoder_first_pipeline_num_layers int None >0
decoder_last_pipeline_num_layers int None >0
account_for_embedding_in_pipeline_split bool False
account_for_loss_in_pipeline_split bool False
pipeline_model_parallel_layout str None
context_parallel_size int 1 >0
expert_model_parallel_size int 1 >0
expert_tensor_parallel_size int None >0
moe_token_dispatcher_type allgather|alltoall 'allgather'
moe_grouped_gemm bool False
moe_permute_fusion bool False
moe_router_fusion bool False
sequence_parallel bool False
use_distributed_optimizer bool False
overlap_grad_reduce bool False
overlap_param_gather bool False
recompute_granularity selective|full None
recompute_modules list ('core_attn',)
recompute_method uniform|block None
recompute_num_layers int None >0
distributed_timeout_minutes int 10 >0
device auto|cuda|cpu 'auto'
fold_file str None
data_path list ()
data_args_path str None
train_data_path list ()
valid_data_path list ()
test_data_path list ()
per_split_data_args_path str None
split str None
skip_iterations str None
data_cache_path str None
seq_length int 2048 >0
tokenizer_model str None
merge_file str None
tiktoken_pattern v1|v2 'v2'
tiktoken_num_special_tokens int 1000 >0
tiktoken_special_tokens list ()
allow_tokenizer_mismatch bool False
num_workers int 2 >=0
reset_position_ids bool False
reset_attention_mask bool False
eod_mask_loss bool False
micro_batch_size int 1 >0
global_batch_size int 1 >0
rampup_batch_size list None
train_iters int None >0
train_samples int None >0
train_tokens int None >0
eval_interval int None >0
eval_iters int 10 >=0
eval_only bool False
seed int 1234 >=0
bf16 bool False
fp16 bool False
z_loss_strength float 0.0 >=0
deterministic_mode bool False
transformer_impl transformer_engine|local None
manual_gc bool True
manual_gc_interval int 100 >=0
manual_gc_eval bool True
optimizer adam|sgd 'adam'
lr float 0.0003 >=0
min_lr float 0.0 >=0
lr_decay_style constant|linear|cosine|inverse-square-root|WSD 'cosine'
lr_decay_iters int None >0
lr_decay_samples int None >0
lr_decay_tokens int None >0
lr_decay_fraction float None >0
lr_warmup_iters int 0 >=0
lr_warmup_samples int None >0
lr_warmup_tokens int None >0
lr_warmup_fraction float None >=0 <1
lr_warmup_shorten bool False
lr_warmup_init float 0.0 >=0
lr_wsd_decay_style linear|cosine|exponential|minus_sqrt 'exponential'
lr_wsd_decay_iters int None >0
lr_wsd_decay_samples int None >0
lr_wsd_decay_tokens int None >0
lr_wsd_decay_fraction float None >0 <=1
weight_decay float 0.1 >=0
start_weight_decay float None >=0
end_weight_decay float None >=0
weight_decay_incr_style constant|linear|cosine 'constant'
adam_beta1 float 0.9 >=0 <1
adam_beta2 float 0.95 >=0 <1
adam_eps float 1e-08 >0
sgd_momentum float 0.9 >=0 <1
clip_grad float 1.0 >=0
loss_scale float None >0
initial_loss_scale float 4294967296.0 >0
min_loss_scale float 1.0 >0
loss_scale_window int 1000 >0
hysteresis int 2 >0
override_opt_param_scheduler bool False
save str None
load str None
save_interval int None >0
save_interval_tokens int None >0
save_interval_minutes float None >0
non_persistent_save_interval int None >0
non_persistent_save_minutes float 60.0 >=0
save_policy llm-jp None
save_fold_ends bool True
keep_last int None >0
keep_every int None >0
async_save bool False
verify_checkpoint bool False
finetune bool False
override_resume list ()
exit_interval int None >0
exit_duration_in_mins float None >0
max_bad_steps int 5 >0
max_overflow_steps int 25 >0
spike_action off|warn|skip|rollback 'warn'
spike_threshold float 10.0 >1
spike_skip_iterations int 20 >0
max_spikes int 8 >0
max_rollbacks int 3 >0
hang_timeout_minutes float None >=0
log_format short|megatron|json None
log_interval int 10 >0
tensorboard_dir str None
report bool True
log_params_norm bool True
log_straggler bool True
straggler_share float 0.1 >0 <1
wandb_project str None
wandb_entity str None
wandb_exp_name str None
alert_webhook str None
alert_command str None
gpu_peak_tflops float None >0
profile bool False
profile_step_start int 10 >=0
profile_step_end int 12 >0
profile_ranks list (0,)
use_pytorch_profiler bool False
record_shapes bool False
nvtx_ranges bool False
record_memory_history bool False
memory_snapshot_path str None
"""
"""Name, type or choices, default, and limits; a default of None makes a field optional."""

TOKENIZER_TYPES = (
    "SentencePieceTokenizer|GPTSentencePieceTokenizer|Llama2Tokenizer|HuggingFaceTokenizer|"
    "GPT2BPETokenizer|TikTokenizer|ByteLevelTokenizer|NullTokenizer"
)
TABLE = {line.split()[0]: line.split()[1:] for line in FIELDS.splitlines()}
TABLE["tokenizer_type"] = [TOKENIZER_TYPES, "None"]
REQUIRED = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}


def test_all_fields_are_in_the_table():
    assert sorted(TABLE) == sorted(SECTION_OF)


def value(name: str, given: object) -> object:
    """Validate one field; returns its value."""
    section = SECTIONS[SECTION_OF[name]]
    required = REQUIRED if SECTION_OF[name] == "model" else {}
    return getattr(section.model_validate({**required, name: given}), name)


@pytest.mark.parametrize("name", TABLE)
def test_default(name):
    default = TABLE[name][1]
    section = SECTIONS[SECTION_OF[name]]
    if default == "required":
        with pytest.raises(ValueError, match=f"{name}\n *Field required"):
            section.model_validate({k: v for k, v in REQUIRED.items() if k != name})
        return
    made = section.model_validate(REQUIRED if SECTION_OF[name] == "model" else {})
    found, expected = getattr(made, name), ast.literal_eval(default)
    assert (type(found), found) == (type(expected), expected)
    if default != "None":
        with pytest.raises(ValueError, match=name):
            value(name, None)


ZERO_IS_NOT_GIVEN = ("lr_warmup_samples", "lr_warmup_tokens")
"""Megatron-LM's default of these is 0."""
NUMBERS = [name for name, (kind, *_) in TABLE.items() if kind in ("int", "float")]


@pytest.mark.parametrize("name", NUMBERS)
def test_limits(name):
    """Each limit, and the numbers next to it."""
    kind, _, *limits = TABLE[name]
    step = 1 if kind == "int" else 1e-6
    for limit in limits:
        sign = limit.rstrip("0123456789.")
        bound = (int if kind == "int" else float)(limit.removeprefix(sign))
        inside, outside = (
            (bound + step, bound - step) if ">" in sign else (bound - step, bound + step)
        )
        assert value(name, inside) == inside
        if name in ZERO_IS_NOT_GIVEN:
            assert value(name, 0) is None
            bound, outside = -1, -2
        if name == "num_moe_experts":  # one expert: a dense model
            assert value(name, 1) is None
            bound, outside = 0, -1
        for wrong in [outside] if "=" in sign else [outside, bound]:
            with pytest.raises(ValueError, match=rf"{name}\n *Input should be (greater|less) than"):
                value(name, wrong)
        if "=" in sign:
            assert value(name, bound) == bound
    if kind == "int":
        with pytest.raises(ValueError, match="valid integer"):
            value(name, 1.5)
    if not any("<" in limit for limit in limits):
        assert value(name, 10**9) == 10**9


CHOICES = [name for name, (kind, *_) in TABLE.items() if kind not in
           ("int", "float", "bool", "str", "list")]  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    choices = TABLE[name][0].split("|")
    assert [value(name, choice) for choice in choices] == choices
    for wrong in (f"{choices[0]}X", choices[-1][:-1], 1):
        with pytest.raises(ValueError, match=name):
            value(name, wrong)
