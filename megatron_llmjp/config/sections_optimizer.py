"""The optimizer, its learning rate and its loss scale."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator

from megatron_llmjp.config.section import Section


class OptimizerConfig(Section):
    """Optimizer and learning rate."""

    optimizer: Literal["adam", "sgd"] = Field("adam", description="adam is AdamW, as in Megatron")
    lr: NonNegativeFloat = Field(3e-4, description="peak learning rate")
    min_lr: NonNegativeFloat = Field(0.0, description="learning rate the decay ends at")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = Field(
        "cosine", description="shape of the decay"
    )
    lr_decay_iters: PositiveInt | None = Field(
        None, description="iteration the decay ends at, warm-up included; train_iters if not given"
    )
    lr_decay_samples: PositiveInt | None = Field(None, description="lr_decay_iters in samples")
    lr_decay_tokens: PositiveInt | None = Field(None, description="lr_decay_iters in tokens")
    lr_decay_fraction: float | None = Field(
        None, gt=0.0, description="decay's end as a part of the run, where no other end is given"
    )
    lr_warmup_iters: NonNegativeInt = Field(
        0, description="iterations of linear warm-up from lr_warmup_init"
    )
    lr_warmup_samples: PositiveInt | None = Field(None, description="lr_warmup_iters in samples")
    lr_warmup_tokens: PositiveInt | None = Field(None, description="lr_warmup_iters in tokens")
    lr_warmup_fraction: float | None = Field(
        None, ge=0.0, lt=1.0, description="warm-up as a part of the decay's length"
    )
    lr_warmup_shorten: bool = Field(
        False,
        description="shorten a warm-up that is as long as the decay to a tenth of it; on where a "
        "preset or file gives the warm-up",
    )
    lr_warmup_init: NonNegativeFloat = Field(0.0, description="learning rate warm-up starts at")
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = Field(
        "exponential", description="shape of the tail of WSD"
    )
    lr_wsd_decay_iters: PositiveInt | None = Field(None, description="length of the tail of WSD")
    lr_wsd_decay_samples: PositiveInt | None = Field(
        None, description="lr_wsd_decay_iters in samples"
    )
    lr_wsd_decay_tokens: PositiveInt | None = Field(
        None, description="lr_wsd_decay_iters in tokens"
    )
    lr_wsd_decay_fraction: float | None = Field(
        None, gt=0.0, le=1.0, description="tail of WSD as a part of the decay's length"
    )
    weight_decay: NonNegativeFloat = Field(0.1, description="not applied to biases and norms")
    start_weight_decay: NonNegativeFloat | None = Field(
        None, description="weight decay at the start; weight_decay when not given"
    )
    end_weight_decay: NonNegativeFloat | None = Field(
        None, description="weight decay at the end; weight_decay when not given"
    )
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how weight decay goes from its start to its end"
    )
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0, description="first moment's decay")
    adam_beta2: float = Field(0.95, ge=0.0, lt=1.0, description="second moment's decay")
    adam_eps: float = Field(1e-8, gt=0.0, description="Adam's epsilon")
    sgd_momentum: float = Field(0.9, ge=0.0, lt=1.0, description="momentum of SGD")
    clip_grad: NonNegativeFloat = Field(1.0, description="largest gradient norm; 0 for no clipping")
    loss_scale: float | None = Field(
        None, gt=0.0, description="fp16: a fixed loss scale; dynamic when not given"
    )
    initial_loss_scale: float = Field(2.0**32, gt=0.0, description="fp16: first loss scale")
    min_loss_scale: float = Field(1.0, gt=0.0, description="fp16: smallest loss scale")
    loss_scale_window: PositiveInt = Field(1000, description="fp16: good steps before raising it")
    hysteresis: PositiveInt = Field(2, description="fp16: bad steps before lowering it")
    override_opt_param_scheduler: bool = Field(
        False, description="at resume, take the schedule of this configuration"
    )

    @field_validator("lr_warmup_samples", "lr_warmup_tokens", mode="before")
    @classmethod
    def _zero_is_none(cls, value: Any) -> Any:
        """Megatron-LM writes 0 for a unit that is not used."""
        return None if value in (0, "0") else value
