"""Base types of the checkpoint formats: the opened source checkpoint and the conversion options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.formats.hugging_face.generation import GenerationSettings
from megatron_llmjp.convert.plan import TensorRead
from megatron_llmjp.convert.tensors import WORD_EMBEDDINGS, tensor_shapes
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers.registry import TikTokenSettings


@dataclass
class SourceCheckpoint:
    """An opened checkpoint: its architecture, and how to read each canonical tensor."""

    format: str
    path: Path
    model: ModelConfig
    """With every size filled in; ``vocab_size`` is None where the format does not tell it."""
    reads: dict[str, TensorRead]
    layout: str
    """How the checkpoint is cut into files, in words."""
    iteration: int | None = None
    consumed_samples: int | None = None
    tokenizer: Path | None = None
    """Folder with tokenizer files, where the checkpoint carries them."""
    seq_length: int | None = None
    tokenizer_type: str | None = None
    """Type of the run's tokenizer as the checkpoint names it, which decides what ends a text."""
    tiktoken: TikTokenSettings = field(default_factory=TikTokenSettings)
    """Settings of a TikTokenizer."""
    generation: GenerationSettings | None = None
    """Token ids and generation settings of a Hugging Face model, also on its way back."""
    notes: list[str] = field(default_factory=list)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Sections of the run's configuration that the checkpoint tells."""
    optimizer: Callable[[], Any] | None = None
    """Opens the optimizer's state, an ``optimizer_state.OptimizerState``."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding as stored."""
        return self.reads[WORD_EMBEDDINGS].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the embedding, which stands for the model's."""
        return self.reads[WORD_EMBEDDINGS].dtype

    @property
    def parameters(self) -> int:
        """Number of parameters, padding included."""
        return sum(torch.Size(read.shape).numel() for read in self.reads.values())

    def check(self) -> SourceCheckpoint:
        """Account for every tensor: names and shapes are those of the architecture.

        Raises:
            UserError: a tensor is missing, unexpected, wrongly shaped, or not of a float type.
        """
        expected = tensor_shapes(self.model, self.padded_vocab_size)
        check_tensor_names(self.path, expected, self.reads)
        for name, shape in expected.items():
            read = self.reads[name]
            if read.shape != shape:
                raise UserError(
                    f"{self.path}: {name} has shape {read.shape}, its configuration says {shape}"
                )
            if not read.dtype.is_floating_point:
                raise UserError(f"{self.path}: {name} has type {read.dtype}: quantized?")
            read.check(name)
        self.reads = {name: self.reads[name] for name in expected}
        return self


@dataclass(frozen=True)
class ConversionOptions:
    """What the user may ask of a writer."""

    dtype: torch.dtype | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    max_shard_size: int = 5_000_000_000
    keep_vocabulary_padding: bool = False
    tokenizer: Path | None = None
    tokenizer_type: str | None = None
    vocab_size: int | None = None
    megatron_format: str = "torch_dist"
    transformer_impl: str = "transformer_engine"
    main_weights: bool = False
    with_optimizer: bool = False
    no_pipeline: bool = False
    checksums: bool = True
    """Read the rest of files that a manifest has checksums of, to compare them."""
    ignored_args: frozenset[str] = frozenset()
    """Arguments of a Megatron run that the user declares to be irrelevant."""

    def dtype_of(self, read: TensorRead) -> torch.dtype:
        """The type a tensor is written in: its own unless another was asked for."""
        return self.dtype or read.dtype


def check_tensor_names(
    where: Path, expected: Iterable[str], found: Iterable[str] | Mapping[str, object]
) -> None:
    """Compare names, exactly.

    Raises:
        UserError: naming the first missing and unexpected ones.
    """
    wanted, given = set(expected), set(found)
    lines = []
    for title, names in (("missing", wanted - given), ("unexpected", given - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:4])
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            lines.append(f"{title}: {shown}{more}")
    if lines:
        raise UserError(
            f"{where}: its tensors are not those of its configuration\n  " + "\n  ".join(lines)
        )
