"""Flags of Megatron-LM and Megatron-DeepSpeed on experts that no field has.

Without experts they have no effect. With experts those that only concern speed or logs have none,
and all others are refused.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_llmjp.errors import UserError

_DENSE = "a dense model has no experts"

_ONLY_SPEED: dict[str, str] = {
    "the result is the same without it": """
        --moe-shared-expert-overlap --overlap-moe-expert-parallel-comm
        --ep-overlap-early-attn-memory-release
        --moe-permute-fusion-into-hybridep --moe-use-legacy-grouped-gemm
        --moe-use-grouped-tensor --moe-single-grouped-weight --moe-single-grouped-bias""",
    "it concerns the flex dispatcher; alltoall is used, which computes the same": """
        --moe-enable-deepep --moe-deepep-num-sms --moe-flex-dispatcher-backend
        --moe-flex-dispatcher-num-sms --moe-hybridep-num-blocks-permute
        --moe-hybridep-num-blocks-unpermute --moe-hybridep-num-sms
        --moe-hybridep-num-sms-preprocessing --moe-hybridep-pad-uneven-dispatch-inputs
        --moe-ncclep-static-shape --moe-ncclep-zero-copy""",
    "means over layers are logged": "--moe-per-layer-logging",
    "it concerns inference or CUDA graphs only": """
        --moe-pad-experts-for-cuda-graph-inference --moe-paged-stash
        --moe-paged-stash-buffer-size-factor-cpu --moe-paged-stash-buffer-size-factor-cuda
        --moe-paged-stash-page-size""",
}

_REFUSED: dict[str, str] = {
    "use --moe-expert-capacity-factor": """
        --moe-token-dropping --moe-train-capacity-factor --moe-eval-capacity-factor
        --moe-min-capacity --disable-moe-token-dropping --moe-expert-rank-capacity-factor""",
    "use --expert-tensor-parallel-size": "--moe-extended-tp --enable-expert-tensor-parallelism",
    "use --expert-model-parallel-size": "--moe-expert-parallel-size --expert-parallel",
    "use --recompute-granularity full": "--moe-layer-recompute",
    "use --moe-router-topk": "--topk",
    "use --moe-aux-loss-coeff": "--moe-loss-coeff",
    "use --moe-layer-freq": "--expert-interval",
    "use --moe-router-num-groups and --moe-router-group-topk": "--moe-router-topk-limited-devices",
    "experts are initialized at random; dense weights cannot be copied into them": """
        --moe-use-upcycling --moe-upcycling-granularity""",
    "this part of a mixture-of-experts model is not implemented": """
        --moe-input-jitter-eps --moe-apply-probs-on-input --moe-latent-size
        --moe-enable-routing-replay --moe-router-force-load-balancing --moe-router-force-biased
        --moe-router-padding-for-fp8 --moe-router-padding-for-quantization
        --moe-router-quantile-balancing-ema --moe-combine-bwd-dtype --moe-dispatch-fwd-dtype
        --moe-mlp-glu-interleave-size --moe-shared-expert-glu-interleave-size
        --mlp-type --use-tutel --create-moe-param-group""",
}

_SPEED = {flag: why for why, flags in _ONLY_SPEED.items() for flag in flags.split()}
_REMEDY = {flag: why for why, flags in _REFUSED.items() for flag in flags.split()}

EXPERT_FLAGS = (*_SPEED, *_REMEDY)
"""All of these flags."""


def interpret_expert_flags(flags: Iterable[str], has_experts: bool) -> list[str]:
    """Return one line for each flag without effect.

    Args:
        flags: given flags of :data:`EXPERT_FLAGS`.
        has_experts: whether the model has experts.

    Raises:
        UserError: one line for each flag that is refused.
    """
    flags = list(flags)
    if not has_experts:
        return [f"{flag} is not needed here: {_DENSE}" for flag in flags]
    refused = [f"{flag} is not supported: {_REMEDY[flag]}" for flag in flags if flag in _REMEDY]
    if refused:
        raise UserError("\n".join(refused))
    return [f"{flag} is not offered: {_SPEED[flag]}" for flag in flags]
