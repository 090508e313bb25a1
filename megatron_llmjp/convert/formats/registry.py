"""Registry of checkpoint formats: detection, readers and writers.

What every format offers: a reader that opens a checkpoint, a writer that plans one.

Which format a path holds, and who reads and writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_llmjp.checkpoint.manifest import complete_iterations
from megatron_llmjp.checkpoint.save_folder import (
    HUGGING_FACE,
    MEGATRON_LM,
    NATIVE,
    list_checkpoints,
    recognize,
)
from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.formats.hugging_face.generation import Generation
from megatron_llmjp.convert.plan import Output, Read
from megatron_llmjp.convert.tensors import WORD_EMBEDDINGS, shapes
from megatron_llmjp.errors import UserError, download_hint
from megatron_llmjp.tokenizers.registry import TikTokenSettings

FORMATS = ("native", "hf", "megatron-lm", "megatron-deepspeed")


@dataclass
class Source:
    """An opened checkpoint: its architecture, and how to read each canonical tensor."""

    format: str
    path: Path
    model: ModelConfig
    """With every size filled in; ``vocab_size`` is None where the format does not tell it."""
    reads: dict[str, Read]
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
    generation: Generation | None = None
    """Token ids and generation settings of a Hugging Face model, also on its way back."""
    notes: list[str] = field(default_factory=list)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Sections of the run's configuration that the checkpoint tells."""
    optimizer: Callable[[], Any] | None = None
    """Opens the optimizer's state, an ``optimizer_state.OptimizerState``."""

    @property
    def rows(self) -> int:
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

    def check(self) -> Source:
        """Account for every tensor: names and shapes are those of the architecture.

        Raises:
            UserError: a tensor is missing, unexpected, wrongly shaped, or not of a float type.
        """
        expected = shapes(self.model, self.rows)
        account(self.path, expected, self.reads)
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
class Options:
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

    def dtype_of(self, read: Read) -> torch.dtype:
        """The type a tensor is written in: its own unless another was asked for."""
        return self.dtype or read.dtype


def account(
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


def detect(path: Path) -> str:
    """The format of a checkpoint, told from the names of its files.

    Raises:
        UserError: it is none that is known.
    """
    check_is_folder(path)
    if complete_iterations(path):
        return NATIVE
    found = recognize(path) or next(reversed(list_checkpoints(path)), None)
    if found is not None and found.format is not None:
        return found.format
    if (path / "config.json").is_file():
        return HUGGING_FACE
    megatron = (".metadata", "*/.metadata", "*/mp_rank_*/model_optim_rng.pt")
    if any(next(path.glob(pattern), None) for pattern in megatron):
        return MEGATRON_LM
    raise UserError(
        f"{path}: holds no checkpoint of a known format; say --from "
        f"{'|'.join(FORMATS)} to learn what is missing"
    )


def check_is_folder(path: Path) -> None:
    """Refuse an ``--input`` that is no folder.

    Raises:
        UserError: it is a file, or does not exist.
    """
    if path.is_file():
        raise UserError(f"--input {path}: is not a folder")
    if not path.is_dir():
        raise UserError(f"--input {path}: does not exist{download_hint(path)}")


def reader(name: str) -> Callable[[Path, Options], Source]:
    """The function that opens a checkpoint of a format."""
    from megatron_llmjp.convert.formats import native
    from megatron_llmjp.convert.formats.hugging_face import folder as hugging_face
    from megatron_llmjp.convert.formats.megatron_deepspeed import reader as megatron_deepspeed
    from megatron_llmjp.convert.formats.megatron_lm import reader as megatron_lm

    readers: dict[str, Callable[[Path, Options], Source]] = {
        "native": lambda path, _: native.read(path),
        "hf": lambda path, _: hugging_face.read(path),
        "megatron-lm": lambda path, given: megatron_lm.read(path, given.ignored_args),
        "megatron-deepspeed": lambda path, given: megatron_deepspeed.read(
            path, given.main_weights, given.ignored_args
        ),
    }
    return readers[name]


def planner(name: str) -> Callable[[Source, Options], Output]:
    """The function that lays out a checkpoint of a format."""
    from megatron_llmjp.convert.formats import native
    from megatron_llmjp.convert.formats.hugging_face import folder as hugging_face
    from megatron_llmjp.convert.formats.megatron_deepspeed import (
        writer as megatron_deepspeed_writer,
    )
    from megatron_llmjp.convert.formats.megatron_lm import writer as megatron_lm_writer

    planners = {
        "native": native.plan,
        "hf": hugging_face.plan,
        "megatron-lm": megatron_lm_writer.plan,
        "megatron-deepspeed": megatron_deepspeed_writer.plan,
    }
    return planners[name]
