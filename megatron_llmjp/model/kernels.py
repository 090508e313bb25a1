"""Choice of the layer implementations for a device: Transformer Engine, fusions, torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available

from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError
from megatron_llmjp.model.fusions import compiler_error
from megatron_llmjp.parallel.device import Device


@dataclass(frozen=True)
class KernelChoice:
    """Implementations of the layers on a device; printed at start."""

    transformer_engine: bool
    """Transformer Engine's layers instead of torch's."""
    fusions: bool
    """Compiled fusions of element-wise operations; faster on a GPU only."""
    apex: bool
    """Apex's kernel that accumulates weight gradients, for layers outside Transformer Engine."""
    compiler_error: str = ""
    """Why a GPU has no fusions."""

    @property
    def fused_wgrad(self) -> bool:
        """Whether matrix multiplications add weight gradients to the fp32 sums of a step."""
        return self.transformer_engine or self.apex

    def __str__(self) -> str:
        layers = "Transformer Engine" if self.transformer_engine else "SDPA attention, torch norms"
        extras = [name for name in ("fusions", "fused_wgrad") if getattr(self, name)]
        if self.compiler_error:
            extras.append(f"no fusions ({self.compiler_error})")
        return ", ".join([layers, *extras])


def choose_kernels(device: Device, config: Config) -> KernelChoice:
    """Return the fastest implementations that are installed for this device.

    Args:
        device: device of the layers.
        config: its ``transformer_impl`` overrides the choice.

    Raises:
        UserError: Transformer Engine is requested and cannot be used.
    """
    requested = config.training.transformer_impl
    obstacle = _transformer_engine_obstacle(device)
    if requested == "transformer_engine" and obstacle:
        raise UserError(
            f"transformer_impl transformer_engine: {obstacle}; omit the option to use the layers "
            "that are available, or pass local for torch's"
        )
    error = compiler_error() if device.is_cuda else ""
    return KernelChoice(
        transformer_engine=requested != "local" and not obstacle,
        fusions=device.is_cuda and not error,
        apex=device.is_cuda and _grad_accum_fusion_available,
        compiler_error=error,
    )


def _transformer_engine_obstacle(device: Device) -> str:
    """Return why Transformer Engine cannot be used, or nothing."""
    if not gpt_layer_specs.HAVE_TE:
        return "Transformer Engine is not installed (see docs/installation.md)"
    return "" if device.is_cuda else f"Transformer Engine needs a GPU, and this is {device.name}"
