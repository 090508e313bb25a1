"""Attention kernels that the environment allows Transformer Engine, as megatron-core's setting.

Transformer Engine selects among the kernels that the ``NVTE_*_ATTN`` variables allow. megatron-core
sets all of them from its own configuration, and rejects other values in the environment, such as
``NVTE_FUSED_ATTN=0`` of LLM-jp's launch scripts.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron.core.transformer.enums import AttnBackend

from megatron_llmjp.errors import UserError

_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_BACKENDS = {
    AttnBackend.auto: "111",
    AttnBackend.flash: "100",
    AttnBackend.fused: "010",
    AttnBackend.unfused: "001",
}
"""Values of the variables that megatron-core expects, in order of preference."""


def attention_backend(env: Mapping[str, str]) -> AttnBackend:
    """Return the setting to which the variables that are set correspond; ``auto`` if none is.

    Raises:
        UserError: there is none.
    """
    for backend, expected in _BACKENDS.items():
        if all(env.get(n, value) == value for n, value in zip(_VARIABLES, expected, strict=True)):
            return backend
    found = ", ".join(f"{name}={env[name]}" for name in _VARIABLES if name in env)
    raise UserError(
        f"{found}: megatron-core supports one kernel or all of them: set NVTE_FUSED_ATTN=0 for "
        "FlashAttention, NVTE_FLASH_ATTN=0 for cuDNN's fused attention, both for unfused attention"
    )
