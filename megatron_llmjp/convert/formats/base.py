"""Base types of the checkpoint formats: the opened source checkpoint and the conversion options."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_llmjp.config.schema import ModelConfig, ParallelConfig
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.formats.hugging_face.generation import GenerationSettings
from megatron_llmjp.convert.layout_flags import STAGE_FLAGS
from megatron_llmjp.convert.plan import TensorRead
from megatron_llmjp.convert.tensors import WORD_EMBEDDINGS, tensor_shapes
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers.base import TikTokenSettings

TRAINING_FIELDS = ("global_batch_size", "micro_batch_size", "seed")
"""Settings of ``TrainingConfig`` that are converted, with Megatron-LM's names."""


@dataclass
class SourceCheckpoint:
    """An opened checkpoint: its architecture, and the reads of the canonical tensors."""

    format: str
    path: Path
    model: ModelConfig
    """With all sizes resolved; ``vocab_size`` is None if the checkpoint does not contain it."""
    reads: dict[str, TensorRead]
    layout: str
    """Description of the files and the parallel layout."""
    iteration: int | None = None
    consumed_samples: int | None = None
    tokenizer: Path | None = None
    """Folder with tokenizer files; None if the checkpoint has none."""
    seq_length: int | None = None
    tokenizer_type: str | None = None
    """The run's ``--tokenizer-type``, which determines the end-of-document token."""
    tiktoken: TikTokenSettings = field(default_factory=TikTokenSettings)
    """Settings of a TikTokenizer."""
    generation: GenerationSettings | None = None
    """Token ids and generation settings, if the model comes from Hugging Face."""
    notes: list[str] = field(default_factory=list)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Sections of the run's configuration that the checkpoint contains."""
    optimizer: Callable[[], Any] | None = None
    """Opens the optimizer state and returns an ``optimizer_state.OptimizerState``."""
    random_states: Callable[[], Any] | None = None
    """Reads the states of the random generators and returns a ``random_states.RandomStates``."""

    @property
    def padded_vocab_size(self) -> int:
        """Padded vocabulary size as stored."""
        return self.reads[WORD_EMBEDDINGS].shape[0]

    @property
    def dtype(self) -> DType:
        """Data type of the embedding, taken as that of the model."""
        return self.reads[WORD_EMBEDDINGS].dtype

    @property
    def parameters(self) -> int:
        """Number of parameters, padding included."""
        return sum(math.prod(read.shape) for read in self.reads.values())

    def check(self) -> SourceCheckpoint:
        """Check that the tensors have the names, shapes and types of the architecture.

        Raises:
            UserError: a tensor is missing, unexpected, of another shape, or not floating point.
        """
        expected = tensor_shapes(self.model, self.padded_vocab_size)
        check_tensor_names(self.path, expected, self.reads)
        for name, shape in expected.items():
            read = self.reads[name]
            if read.shape != shape:
                raise UserError(
                    f"{self.path}: {name} has shape {read.shape}, "
                    f"expected {shape} from its configuration"
                )
            if not read.dtype.is_floating_point:
                raise UserError(
                    f"{self.path}: {name} has type {read.dtype}, expected floating point; "
                    "is the model quantized?"
                )
            read.check(name)
        self.reads = {name: self.reads[name] for name in expected}
        return self


@dataclass(frozen=True)
class ConversionOptions:
    """Options of a conversion, from the command line."""

    dtype: DType | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Tensor and pipeline parallelism of the output."""
    max_shard_size: int = 5_000_000_000
    shard_size_given: bool = False
    """Whether the user gave ``--max-shard-size``, which takes precedence over ``like``."""
    like: Path | None = None
    """Hugging Face model, or its config.json, to compare with and to export in the form of."""
    keep_vocabulary_padding: bool = False
    tokenizer: Path | None = None
    tokenizer_type: str | None = None
    vocab_size: int | None = None
    megatron_format: str = "torch_dist"
    optimizer_sharding: str = "fully_sharded_model_space"
    transformer_impl: str = "transformer_engine"
    main_weights: bool = False
    with_optimizer: bool = False
    no_pipeline: bool = False
    checksums: bool = True
    """Read files with a checksum in the manifest to the end, to verify it."""
    ignored_args: frozenset[str] = frozenset()
    """Arguments of a Megatron run to ignore."""
    average: tuple[Path, ...] = ()
    """Checkpoints to average; empty to convert a single one."""
    ema_decay: float | None = None
    """Decay of an exponential moving average; None for the mean."""
    adapter: Path | None = None
    """Folder of a LoRA adapter to merge into the weights."""
    chat_template: Path | None = None
    """Chat template to store with the tokenizer."""

    @property
    def tokenizer_flag(self) -> str:
        """The flag that gave the tokenizer, with its value, for messages."""
        return f"--{'like' if self.tokenizer == self.like else 'tokenizer'} {self.tokenizer}"

    @property
    def tensor_parallel(self) -> int:
        """Tensor parallel size of the output."""
        return self.parallel.tensor_model_parallel_size

    @property
    def pipeline_parallel(self) -> int:
        """Pipeline parallel size of the output."""
        return self.parallel.pipeline_model_parallel_size

    @property
    def stage_flags(self) -> list[str]:
        """The given flags that divide the layers over the pipeline stages, without their sizes."""
        given = self.parallel.model_dump(exclude_defaults=True)
        return [flag for name, flag in STAGE_FLAGS.items() if name in given]

    def dtype_of(self, read: TensorRead) -> DType:
        """Return the data type of a written tensor: ``--dtype``, or its own."""
        return self.dtype or read.dtype


def check_tensor_names(
    where: Path, expected: Iterable[str], found: Iterable[str] | Mapping[str, object]
) -> None:
    """Check that the tensor names are exactly the expected ones.

    Raises:
        UserError: names are missing or unexpected; the message has the first four of each.
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
            f"{where}: its tensors do not match its configuration\n  " + "\n  ".join(lines)
        )
