"""Small models of transformers with noise on every parameter."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

COMMON = {"vocab_size": 101, "attention_dropout": 0.0}
"""An odd vocabulary: padding has to come and go."""


def llama(**changes) -> transformers.PreTrainedModel:
    fields = {
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 12,
        "max_position_embeddings": 64, "rms_norm_eps": 3e-5, "rope_theta": 5000.0,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = transformers.LlamaConfig(**{**COMMON, **fields, **changes})
    return noisy(transformers.LlamaForCausalLM(config))


def qwen3(**changes) -> transformers.PreTrainedModel:
    fields = {
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 12,
        "max_position_embeddings": 64, "rms_norm_eps": 3e-5, "rope_theta": 5000.0,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = transformers.Qwen3Config(**{**COMMON, **fields, **changes})
    return noisy(transformers.Qwen3ForCausalLM(config))


def gpt2(**changes) -> transformers.PreTrainedModel:
    fields = {
        "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 144,
        "activation_function": "gelu_new", "vocab_size": 101,
    }  # fmt: skip
    return noisy(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**fields, **changes})))


def gpt_neox(**changes) -> transformers.PreTrainedModel:
    fields = {
        "hidden_size": 64, "intermediate_size": 144, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 64, "use_parallel_residual": False,
        "rotary_pct": 0.5, "hidden_act": "gelu", "tie_word_embeddings": False,
        "rotary_emb_base": 5000,
    }  # fmt: skip
    config = transformers.GPTNeoXConfig(**{**COMMON, **fields, **changes})
    return noisy(transformers.GPTNeoXForCausalLM(config))


MODELS = {"llama": llama, "gpt2": gpt2, "gpt_neox": gpt_neox, "qwen3": qwen3}
"""All have 3 layers, 101 tokens and 64 positions."""


def noisy(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Noise on every parameter: a lost bias or a permuted norm must show."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, read by the safetensors library."""
    from safetensors.torch import load_file

    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
