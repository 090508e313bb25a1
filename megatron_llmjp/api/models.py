"""Models of native checkpoints: logits and text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from megatron_llmjp.api.errors import OutOfRangeError, only_user_errors, raises_user_errors
from megatron_llmjp.errors import UserError
from megatron_llmjp.generation.checkpoints import checkpoint_tokenizer, find_native_checkpoint
from megatron_llmjp.generation.prompts import PromptEncoder, open_prompt_encoder
from megatron_llmjp.generation.settings import GenerationSettings
from megatron_llmjp.tokenizers import Tokenizer

if TYPE_CHECKING:
    import torch

    from megatron_llmjp.generation.text_generator import Completion, TextGenerator
    from megatron_llmjp.inference.native_model import DtypeName, NativeModel


class Model:
    """A model in this process, with its tokenizer.

    Attributes:
        checkpoint: the checkpoint of one iteration.
        tokenizer: its tokenizer; None if it has none, and none was given.
        config: configuration of the run that saved it.
        module: megatron-core's ``GPTModel``, in evaluation mode.

    Example:
        >>> model = ml.load_model("checkpoints")
        >>> model
        Model('checkpoints/iter_0000010', layers=2, hidden_size=32, dtype=fp32, device=cpu)
        >>> model.vocab_size, model.max_positions
        (258, 32)
    """

    def __init__(self, native: NativeModel, prompts: PromptEncoder | None) -> None:
        self.checkpoint, self.config, self.module = native.folder, native.stored, native.module
        self.tokenizer: Tokenizer | None = None if prompts is None else prompts.tokenizer
        self._native, self._prompts = native, prompts

    def __repr__(self) -> str:
        model, training = self.config.model, self._native.config.training
        dtype = "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"
        return (
            f"Model('{self.checkpoint}', layers={model.num_layers}, "
            f"hidden_size={model.hidden_size}, dtype={dtype}, device={self._native.device.kind})"
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, without padding."""
        return self.config.model.vocab_size or self.config.padded_vocab_size

    @property
    def max_positions(self) -> int:
        """Largest number of tokens of a sequence."""
        return self._native.max_positions

    @raises_user_errors
    def logits(self, tokens: Any) -> torch.Tensor:
        """Compute the logits of tokens.

        Args:
            tokens: ids ``[b, s]`` or ``[s]``: a tensor, an array or lists.

        Returns:
            ``[b, s, v]`` or ``[s, v]``, without the padding of the vocabulary, in the dtype and on
            the device of the model.

        Raises:
            OutOfRangeError: there are too many tokens, or one is outside the vocabulary.
            UserError: the tokens have another shape.

        Example:
            >>> model = ml.load_model("checkpoints")
            >>> model.logits([[97, 98, 99]]).shape
            torch.Size([1, 3, 258])
        """
        import torch

        ids = torch.as_tensor(tokens)
        if ids.dim() not in (1, 2) or ids.numel() == 0 or ids.is_floating_point():
            raise UserError(
                f"tokens: expected integers of the shape [b, s] or [s], found {ids.dtype} "
                f"{list(ids.shape)}"
            )
        if ids.shape[-1] > self.max_positions:
            raise OutOfRangeError(
                f"tokens: {ids.shape[-1]} per sequence, but the model has {self.max_positions} "
                "positions"
            )
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise OutOfRangeError(f"tokens: expected ids of 0 to {self.vocab_size - 1}")
        found = self._native.logits(ids.long().reshape(-1, ids.shape[-1]))[..., : self.vocab_size]
        return found if ids.dim() == 2 else found[0]

    @overload
    def generate(self, prompt: str, *, batch_size: int = 8, **settings: Any) -> str: ...

    @overload
    def generate(
        self, prompt: Sequence[str], *, batch_size: int = 8, **settings: Any
    ) -> list[str]: ...

    @raises_user_errors
    def generate(
        self, prompt: str | Sequence[str], *, batch_size: int = 8, **settings: Any
    ) -> str | list[str]:
        """Return the continuation of a prompt, or of each of several.

        Args:
            prompt: a text or a list of texts.
            batch_size: number of prompts that are computed together.
            settings: ``max_new_tokens``, ``temperature``, ``top_k``, ``top_p``, ``do_sample``,
                ``repetition_penalty``, ``seed`` (docs/generate.md); greedy without any.

        Raises:
            UserError: a setting is unknown or invalid, a prompt is empty or too long, or there is
                no tokenizer.

        Example:
            >>> model = ml.load_model("checkpoints")
            >>> text = model.generate("吾輩は", max_new_tokens=6)
            >>> text == model.generate(["猫", "吾輩は"], max_new_tokens=6)[1]
            True
            >>> len(model.generate("吾輩は", max_new_tokens=6, temperature=0.7)) <= 6
            True
        """
        if isinstance(prompt, str):
            return self.complete([prompt], **settings)[0].text
        found = self.complete(prompt, batch_size=batch_size, **settings)
        return [completion.text for completion in found]

    @raises_user_errors
    def complete(
        self, prompts: Sequence[str], *, batch_size: int = 8, **settings: Any
    ) -> list[Completion]:
        """Return the continuations of prompts with their ids and why they end.

        Args and errors are those of :meth:`generate`.

        Example:
            >>> model = ml.load_model("checkpoints")
            >>> found = model.complete(["吾輩は"], max_new_tokens=4)[0]
            >>> found.prompt_tokens, len(found.token_ids), found.finish_reason
            (9, 4, 'length')
        """
        chosen = GenerationSettings.of_given(settings)
        generator = self._generator()
        ids = [
            generator.prompts.encode(prompt, f"prompt {number}")
            for number, prompt in enumerate(prompts)
        ]
        return list(generator.complete(ids, chosen, batch_size))

    def stream(self, prompt: str, **settings: Any) -> Iterator[str]:
        """Yield the continuation of a prompt as it grows, in whole characters.

        Args and errors are those of :meth:`generate`.

        Example:
            >>> model = ml.load_model("checkpoints")
            >>> parts = list(model.stream("吾輩は", max_new_tokens=6))
            >>> "".join(parts) == model.generate("吾輩は", max_new_tokens=6)
            True
        """
        with only_user_errors():
            chosen = GenerationSettings.of_given(settings)
            generator = self._generator()
            ids = generator.prompts.encode(prompt)
        yield from generator.stream(ids, chosen)

    def _generator(self) -> TextGenerator:
        from megatron_llmjp.generation.text_generator import TextGenerator

        if self._prompts is None:
            raise UserError(
                f"{self.checkpoint}: contains no tokenizer: load_model(path, "
                "tokenizer=load_tokenizer(TYPE, MODEL))"
            )
        return TextGenerator(self._native, self._prompts)


@raises_user_errors
def load_model(
    path: str | PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    dtype: DtypeName | None = None,
    device: Literal["auto", "cpu"] = "auto",
    add_bos: bool = False,
) -> Model:
    """Load a native checkpoint of any parallel layout into a model in this process.

    megatron-core requires a process group of one process, which is created. On a machine without a
    GPU, and with ``device="cpu"``, ``torch.cuda`` is replaced by the CPU in this process.

    Args:
        path: a checkpoint, or the folder of a run, whose newest checkpoint is used.
        tokenizer: replaces the checkpoint's.
        dtype: ``fp32``, ``bf16`` or ``fp16``; by default fp32 on a CPU, the checkpoint's on a GPU.
        device: ``auto`` for the GPU if there is one, else the CPU; ``cpu``.
        add_bos: whether BOS is written before each prompt.

    Raises:
        UserError: there is no native checkpoint, it is damaged, or this process is a rank of a run.

    Example:
        >>> model = ml.load_model("checkpoints/iter_0000005")
        >>> model.config.data.seq_length
        32
    """
    folder = find_native_checkpoint(Path(path))
    prompts = None
    if tokenizer is not None or checkpoint_tokenizer(folder) is not None:
        prompts = open_prompt_encoder(folder, tokenizer, add_bos)
    from megatron_llmjp.inference.native_model import DTYPES, load_native_model

    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if device not in ("auto", "cpu"):
        raise UserError(f"device {device!r}: expected auto or cpu")
    return Model(load_native_model(folder, dtype, device), prompts)
