"""Choice of the layer implementations for a device: Transformer Engine, fusions, torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available

from megatron_llmjp.model.fusions import compiler_error
from megatron_llmjp.parallel.device import Device


@dataclass(frozen=True)
class KernelChoice:
    """Implementations of the layers on a device; printed at start."""

    transformer_engine: bool
    """Transformer Engine's layers instead of torch's."""
    fusions: bool
    """Compiled fusions of element-wise operations; faster on a GPU only."""
    fused_wgrad: bool
    """Weight gradients accumulated in the matrix multiplication (Apex)."""
    compiler_error: str = ""
    """Why a GPU has no fusions."""

    def __str__(self) -> str:
        layers = "Transformer Engine" if self.transformer_engine else "SDPA attention, torch norms"
        extras = [name for name in ("fusions", "fused_wgrad") if getattr(self, name)]
        if self.compiler_error:
            extras.append(f"no fusions ({self.compiler_error})")
        return ", ".join([layers, *extras])


def choose_kernels(device: Device) -> KernelChoice:
    """Return the fastest implementations that are installed for this device."""
    if not device.is_cuda:
        return KernelChoice(transformer_engine=False, fusions=False, fused_wgrad=False)
    error = compiler_error()
    return KernelChoice(
        transformer_engine=gpt_layer_specs.HAVE_TE,
        fusions=not error,
        fused_wgrad=_grad_accum_fusion_available,
        compiler_error=error,
    )
