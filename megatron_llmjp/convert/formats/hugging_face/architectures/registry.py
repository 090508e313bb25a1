"""Registry of the Hugging Face architectures.

An architecture is added as a file like ``llama.py`` and an entry of :data:`ARCHITECTURES`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.formats.hugging_face.architectures import (
    gpt2,
    gpt_neox,
    llama,
    mixtral,
    qwen3,
    qwen3_moe,
)
from megatron_llmjp.convert.formats.hugging_face.architectures.architecture import (
    HuggingFaceArchitecture,
)
from megatron_llmjp.errors import UserError

ARCHITECTURES: dict[str, HuggingFaceArchitecture] = {
    entry.model_type: entry
    for entry in (
        llama.ARCHITECTURE,
        gpt2.ARCHITECTURE,
        gpt_neox.ARCHITECTURE,
        qwen3.ARCHITECTURE,
        mixtral.ARCHITECTURE,
        qwen3_moe.ARCHITECTURE,
    )
}
"""The architectures by ``model_type``; a model is written as the first one that supports it."""


def architecture_for(model: ModelConfig) -> HuggingFaceArchitecture:
    """Return the first architecture that can represent a model.

    Raises:
        UserError: no architecture can; the message has the reasons of each.
    """
    reasons = []
    for architecture in ARCHITECTURES.values():
        unsupported = architecture.refusals(model)
        if not unsupported:
            return architecture
        reasons.append(f"  {architecture.class_name}: {'; '.join(unsupported)}")
    raise UserError("no Hugging Face architecture supports this model\n" + "\n".join(reasons))


def find_architecture(config: dict[str, Any], where: Path) -> HuggingFaceArchitecture:
    """Return the architecture of a config.json.

    Args:
        config: its content.
        where: the file, for messages.

    Raises:
        UserError: the architecture is not supported, or the weights are quantized: integer codes
            and scales, specific to the quantization method.
    """
    found = ARCHITECTURES.get(config.get("model_type", ""))
    if found is None:
        raise UserError(
            f"{where}: model_type {config.get('model_type')!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    settings = config.get("quantization_config")
    if settings is None:
        return found
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    raise UserError(
        f"{where}: quantization_config (quant_method {method!r}): quantized weights cannot be "
        "converted: use the original model, or dequantize this one with transformers "
        "(model.dequantize()) and save it"
    )
