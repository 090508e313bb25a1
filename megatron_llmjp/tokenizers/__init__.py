"""Tokenizers with a common interface: base.Tokenizer, created by registry.load_tokenizer."""

from megatron_llmjp.tokenizers.base import Tokenizer
from megatron_llmjp.tokenizers.registry import TOKENIZER_TYPES, load_tokenizer

__all__ = ["TOKENIZER_TYPES", "Tokenizer", "load_tokenizer"]
