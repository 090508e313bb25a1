"""Validation of mixture-of-experts models and of expert parallelism."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_llmjp.config.expert_config import ModelConfig
from megatron_llmjp.config.model_config import DenseModelConfig
from megatron_llmjp.config.schema import Config

_MODEL_FIELDS = [
    name for name in ModelConfig.model_fields if name not in DenseModelConfig.model_fields
]
_PARALLEL_FIELDS = (
    "expert_model_parallel_size",
    "moe_token_dispatcher_type",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "moe_router_fusion",
)


def expert_problems(config: Config) -> Iterator[str]:
    """Yield one line for each violated rule of the model and its router."""
    model = config.model
    if not model.has_experts:
        yield from _dense(config)
        return
    yield from _layers(model)
    yield from _router(model)
    yield from _dropping(model)
    if model.use_parallel_residual:
        yield "use_parallel_residual with num_moe_experts is not implemented: remove one of them"
    if model.add_bias_linear:
        yield (
            "add_bias_linear with num_moe_experts is not implemented: set add_bias_linear to false "
            "(--disable-bias-linear)"
        )


def _dense(config: Config) -> Iterator[str]:
    """Refuse fields of experts that have no effect, so that a forgotten number is noticed."""
    for section, names in ((config.model, _MODEL_FIELDS), (config.parallel, _PARALLEL_FIELDS)):
        for name in names:
            if getattr(section, name) != type(section).model_fields[name].default:
                yield f"{name} requires experts: set num_moe_experts, or remove {name}"


def _layers(model: ModelConfig) -> Iterator[str]:
    found = len(model.expert_layers)
    if found != model.num_layers:
        yield (
            f"moe_layer_freq has {found} entries, but num_layers is {model.num_layers}: give one "
            "entry for each layer"
        )
    elif not any(model.expert_layers):
        yield "moe_layer_freq has no layer with experts: give some, or remove num_moe_experts"
    if model.moe_shared_expert_gate and model.moe_shared_expert_intermediate_size is None:
        yield "moe_shared_expert_gate requires moe_shared_expert_intermediate_size"


def _router(model: ModelConfig) -> Iterator[str]:
    experts, topk = model.num_moe_experts or 1, model.moe_router_topk
    kind, score = model.moe_router_load_balancing_type, model.moe_router_score_function
    if topk > experts:
        yield f"moe_router_topk {topk} exceeds num_moe_experts {experts}: choose a smaller one"
    if kind == "sinkhorn":
        yield from _sinkhorn(model)
    elif score == "softmax" and topk == 1 and not model.moe_router_pre_softmax:
        yield (
            "moe_router_topk 1 requires moe_router_pre_softmax: the softmax over one chosen "
            "expert is always 1, and the router would not learn"
        )
    if model.moe_router_pre_softmax and score != "softmax":
        yield "moe_router_pre_softmax requires moe_router_score_function softmax"
    if model.moe_router_enable_expert_bias and score != "sigmoid":
        yield "moe_router_enable_expert_bias requires moe_router_score_function sigmoid"
    if model.moe_aux_loss_coeff and kind not in ("aux_loss", "seq_aux_loss"):
        yield (
            f"moe_aux_loss_coeff has no effect with moe_router_load_balancing_type {kind}: set it "
            "to 0, or choose aux_loss or seq_aux_loss"
        )
    yield from _groups(model, experts)


def _sinkhorn(model: ModelConfig) -> Iterator[str]:
    """Refuse settings that megatron-core's Sinkhorn assignment ignores."""
    fields = ModelConfig.model_fields
    for name in (
        "moe_router_score_function",
        "moe_router_pre_softmax",
        "moe_router_topk_scaling_factor",
        "moe_router_num_groups",
        "moe_router_enable_expert_bias",
    ):
        if getattr(model, name) != fields[name].default:
            yield f"{name} has no effect with moe_router_load_balancing_type sinkhorn: remove it"


def _groups(model: ModelConfig, experts: int) -> Iterator[str]:
    groups, chosen = model.moe_router_num_groups, model.moe_router_group_topk
    if (groups is None) != (chosen is None):
        yield "moe_router_num_groups and moe_router_group_topk must be set together"
    elif groups is not None and chosen is not None:
        if experts % groups:
            yield f"num_moe_experts {experts} is not divisible by moe_router_num_groups {groups}"
        elif chosen > groups or model.moe_router_topk % chosen:
            yield (
                f"moe_router_group_topk {chosen} must divide moe_router_topk "
                f"{model.moe_router_topk} and be at most moe_router_num_groups {groups}"
            )
        elif model.moe_router_topk > chosen * (experts // groups):
            yield (
                f"moe_router_topk {model.moe_router_topk} exceeds the experts of "
                f"{chosen} groups of {experts // groups}: increase moe_router_group_topk"
            )


def _dropping(model: ModelConfig) -> Iterator[str]:
    if model.moe_expert_capacity_factor is None:
        if model.moe_pad_expert_input_to_capacity:
            yield "moe_pad_expert_input_to_capacity requires moe_expert_capacity_factor"
    elif model.moe_router_load_balancing_type == "sinkhorn":
        yield (
            "moe_expert_capacity_factor is not supported with moe_router_load_balancing_type "
            "sinkhorn: choose aux_loss, seq_aux_loss or none"
        )


def expert_layout_problems(config: Config, world_size: int) -> Iterator[str]:
    """Yield one line for each violated rule of the parallel layout of experts."""
    model, parallel = config.model, config.parallel
    if not model.has_experts:
        return
    experts, ep = model.num_moe_experts or 1, parallel.expert_model_parallel_size
    etp, pp = parallel.expert_tensor_size, parallel.pipeline_model_parallel_size
    if experts % ep:
        yield f"num_moe_experts {experts} is not divisible by expert_model_parallel_size {ep}"
    if model.expert_ffn_size % etp:
        yield (
            f"moe_ffn_hidden_size {model.expert_ffn_size} is not divisible by "
            f"expert_tensor_parallel_size {etp}"
        )
    shared, tp = model.moe_shared_expert_intermediate_size, parallel.tensor_model_parallel_size
    if shared is not None and shared % tp:
        yield (
            f"moe_shared_expert_intermediate_size {shared} is not divisible by "
            f"tensor_model_parallel_size {tp}"
        )
    if world_size % (ep * etp * pp):
        yield (
            f"{world_size} processes are not divisible by expert_model_parallel_size {ep} x "
            f"expert_tensor_parallel_size {etp} x pipeline_model_parallel_size {pp} = "
            f"{ep * etp * pp}: the ranks of a pipeline stage are divided among the experts"
        )
    if etp != tp and ep == 1:
        yield (
            f"expert_tensor_parallel_size {etp} differs from tensor_model_parallel_size {tp}: "
            "without expert parallelism megatron-core does not sum the experts' gradients over "
            "the tensor parallel ranks; set expert_model_parallel_size, or equal sizes"
        )
    if tp > 1 and not parallel.sequence_parallel:
        yield (
            "experts with tensor_model_parallel_size above 1 require sequence_parallel in "
            "megatron-core: add it"
        )
    if model.moe_pad_expert_input_to_capacity and parallel.moe_token_dispatcher_type != "alltoall":
        yield "moe_pad_expert_input_to_capacity requires moe_token_dispatcher_type alltoall"
