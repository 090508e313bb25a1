"""Linear layers split over tensor-parallel ranks, with and without a norm in front."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_engine.pytorch import _communication
from transformer_engine.pytorch.module._matmul import MatMul, split
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule


class _ParallelLinear(TransformerEngineBaseModule):
    """What both layers have in common."""

    def set_up(self, options: dict[str, Any]) -> None:
        """Create the parameters from the constructor's arguments."""
        self.parallel_mode: str | None = options["parallel_mode"]
        assert self.parallel_mode in ("column", "row", None)
        group = options["tp_group"]
        size = torch.distributed.get_world_size(group) if group is not None else options["tp_size"]
        self.tp_size = size
        self.set_tensor_parallel_group(group)
        self.in_features, self.out_features = options["in_features"], options["out_features"]
        if self.parallel_mode == "column":
            self.out_features //= size
        elif self.parallel_mode == "row":
            self.in_features //= size
        self.sequence_parallel = size > 1 and options["sequence_parallel"]
        self.fuse_wgrad_accumulation = options["fuse_wgrad_accumulation"]
        self.use_bias, self.return_bias = options["bias"], options["return_bias"]
        self.apply_bias = self.use_bias and not self.return_bias
        for name, value in options.items():
            if name.startswith("ub_overlap") or name.startswith("ub_bulk"):
                assert not value, f"{name} is not part of the stand-in"
        self._create(options)

    def _create(self, options: dict[str, Any]) -> None:
        factory = {"device": options["device"], "dtype": options["params_dtype"]}
        tracker = options["get_rng_state_tracker"]
        with tracker().fork() if tracker is not None else nullcontext():
            initialize = options["init_method"] or (lambda w: w.normal_(0.0, 0.023))
            weight = self.add_parameter(
                "weight", [self.out_features, self.in_features], initialize, **factory
            )
        split(weight, 1 if self.parallel_mode == "row" else 0)
        if not self.use_bias:
            self.bias = torch.empty(0, **factory)  # not a parameter, as in the original
            return
        bias = self.add_parameter("bias", [self.out_features], Tensor.zero_, **factory)
        if self.parallel_mode == "row":
            bias.sequence_parallel = self.sequence_parallel
        elif self.parallel_mode == "column":
            split(bias, 0)

    def multiply(self, x: Tensor, is_first_microbatch: bool | None) -> Any:
        """Compute the layer's output, and the bias if it is to be returned."""
        if self.parallel_mode == "column" and self.tp_size > 1:
            enter = _communication.gather if self.sequence_parallel else _communication.copy
            x = enter(x, self.tp_group)
        output = MatMul.apply(x, self.weight, self.fuse_wgrad_accumulation, is_first_microbatch)
        if self.parallel_mode == "row" and self.tp_size > 1:
            leave = _communication.scatter if self.sequence_parallel else _communication.reduce
            output = leave(output, self.tp_group)
        if self.apply_bias:
            output = output + self.bias
        return (output, self.bias) if self.return_bias else output


class Linear(_ParallelLinear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        options = dict(locals())
        super().__init__(name)
        self.save_original_input = save_original_input
        self.set_up(options)

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool = False,
        fp8_grad: bool = False,
    ) -> Any:
        return self.multiply(inp, is_first_microbatch)


class LayerNormLinear(_ParallelLinear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Any = None,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ) -> None:
        options = dict(locals())
        super().__init__(name)
        assert not return_layernorm_output and not zero_centered_gamma, "not in the stand-in"
        self.eps, self.normalization = eps, normalization
        factory = {"device": device, "dtype": params_dtype}
        norm = [self.add_parameter("layer_norm_weight", [in_features], nn.init.ones_, **factory)]
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            del self.layer_norm_bias
            norm.append(
                self.add_parameter("layer_norm_bias", [in_features], Tensor.zero_, **factory)
            )
        self.set_up(options)
        for parameter in norm:
            parameter.sequence_parallel = self.sequence_parallel

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool = False,
        fp8_grad: bool = False,
    ) -> Any:
        shape = (self.in_features,)
        if self.normalization == "RMSNorm":
            x = F.rms_norm(inp, shape, self.layer_norm_weight, self.eps)
        else:
            x = F.layer_norm(inp, shape, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return self.multiply(x, is_first_microbatch)


class GroupedLinear(TransformerEngineBaseModule):
    """Base class of megatron-core's layers of experts, which no dense model builds."""
