"""Logits of a Hugging Face folder, computed by transformers."""

from __future__ import annotations

import torch

from megatron_llmjp.convert.formats import Source
from megatron_llmjp.errors import UserError


def logits(source: Source, tokens: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """fp32 logits ``[batch, length, rows]`` of tokens ``[batch, length]``.

    Args:
        source: the folder.
        tokens: the input.
        dtype: round the weights to this type first.

    Raises:
        UserError: transformers is not installed, or did not find every tensor.
    """
    try:
        import transformers
    except ImportError:
        raise UserError("--verify needs transformers: pip install transformers") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        source.path, dtype=torch.float32, output_loading_info=True
    )
    wrong = {kind: keys for kind, keys in report.items() if keys and "keys" in kind}
    if wrong:
        raise UserError(f"{source.path}: transformers reports {wrong}")
    if dtype is not None:
        for parameter in model.parameters():  # not .to(): it would round the rotary table as well
            parameter.data = parameter.data.to(dtype).float()
    with torch.no_grad():
        result: torch.Tensor = model.eval()(tokens).logits
    return result
