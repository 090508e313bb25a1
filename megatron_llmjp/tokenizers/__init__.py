"""Tokenizers with a common interface: base.Tokenizer, created by registry.load_tokenizer."""

from megatron_llmjp.tokenizers.base import Tokenizer
from megatron_llmjp.tokenizers.registry import load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
