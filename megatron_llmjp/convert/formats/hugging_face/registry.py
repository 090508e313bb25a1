"""Registry of the Hugging Face architectures.

An architecture is added as a file like ``llama.py`` and an entry of :data:`ARCHITECTURES`.
"""

from __future__ import annotations

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.formats.hugging_face import gpt2, gpt_neox, llama
from megatron_llmjp.convert.formats.hugging_face.architecture import HuggingFaceArchitecture
from megatron_llmjp.errors import UserError

ARCHITECTURES: dict[str, HuggingFaceArchitecture] = {
    entry.model_type: entry
    for entry in (llama.ARCHITECTURE, gpt2.ARCHITECTURE, gpt_neox.ARCHITECTURE)
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
