"""Texts from a model: batches of prompts, and texts of their continuations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_llmjp.generation.decoding import generate_tokens
from megatron_llmjp.generation.prompts import PromptEncoder
from megatron_llmjp.generation.settings import GenerationSettings
from megatron_llmjp.generation.text_stream import TextStream
from megatron_llmjp.inference.native_model import NativeModel

FinishReason = Literal["eod", "length"]
DEFAULT_BATCH_SIZE = 8


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt.

    Attributes:
        text: without the prompt and the end of the document.
        token_ids: the generated ids, without the end of the document.
        prompt_tokens: number of tokens of the prompt.
        finish_reason: ``eod`` if the text has ended, ``length`` if ``max_new_tokens`` or the
            model's positions were reached.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason


@dataclass(frozen=True)
class TextGenerator:
    """A model with the encoder of its prompts."""

    model: NativeModel
    prompts: PromptEncoder

    def stream(self, prompt: Sequence[int], settings: GenerationSettings) -> Iterator[str]:
        """Yield the text of the continuation of a prompt, as soon as it is complete."""
        text = TextStream(self.prompts.tokenizer, prompt)
        for (token_id,) in generate_tokens(
            self.model, [prompt], settings, self.prompts.allowed, [settings.seed]
        ):
            if token_id is not None and token_id not in self.prompts.allowed.end:
                yield text.add(token_id)
        yield text.finish()

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        batch_size: int = DEFAULT_BATCH_SIZE,
        first: int = 0,
    ) -> Iterator[Completion]:
        """Yield the continuation of each prompt, in their order.

        Args:
            prompts: ids, from :class:`PromptEncoder`.
            settings: how tokens are chosen.
            batch_size: number of prompts that are computed together.
            first: position of the first prompt in the input; it decides the random numbers.
        """
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            seeds = [settings.seed + first + start + i for i in range(len(batch))]
            steps = generate_tokens(self.model, batch, settings, self.prompts.allowed, seeds)
            for ids, prompt in zip(zip(*steps, strict=True), batch, strict=True):
                yield self._completion(prompt, [i for i in ids if i is not None])

    def _completion(self, prompt: Sequence[int], ids: list[int]) -> Completion:
        reason: FinishReason = "length"
        if ids and ids[-1] in self.prompts.allowed.end:
            ids, reason = ids[:-1], "eod"
        stream = TextStream(self.prompts.tokenizer, prompt)
        text = "".join([*map(stream.add, ids), stream.finish()])
        return Completion(text, tuple(ids), len(prompt), reason)
