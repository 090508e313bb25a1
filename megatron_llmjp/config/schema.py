"""Configuration of a run: one frozen, typed model per section.

Field names are Megatron-LM's flags in snake_case where Megatron-LM has one, so that
``--tensor-model-parallel-size 2`` and ``tensor_model_parallel_size: 2`` are equivalent. A name is
unique across sections. The description of a field is its line in ``--help``.

The sections are defined in ``model_config.py`` and ``expert_config.py`` (model, parallel),
``logging_config.py``, ``profiling_config.py`` and ``run_config.py`` (all others), and imported from
here.
"""

from __future__ import annotations

from megatron_llmjp.config.expert_config import ModelConfig
from megatron_llmjp.config.logging_config import LoggingConfig
from megatron_llmjp.config.model_config import ParallelConfig
from megatron_llmjp.config.profiling_config import ProfilingConfig
from megatron_llmjp.config.run_config import (
    CheckpointConfig,
    DataConfig,
    FaultsConfig,
    OptimizerConfig,
    TrainingConfig,
)
from megatron_llmjp.config.section import Section

__all__ = [
    "SECTIONS",
    "SECTION_OF",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "FaultsConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProfilingConfig",
    "Section",
    "TrainingConfig",
]


class Config(Section):
    """Configuration of a run."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    logging: LoggingConfig = LoggingConfig()
    profiling: ProfilingConfig = ProfilingConfig()

    @property
    def padded_vocab_size(self) -> int:
        """Vocabulary size with padding in this layout: the rows of the embedding."""
        return self.model.compute_padded_vocab_size(self.parallel.tensor_model_parallel_size)

    @property
    def max_positions(self) -> int:
        """Maximum sequence length of the model."""
        return self.model.max_position_embeddings or self.data.seq_length


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "optimizer": OptimizerConfig,
    "checkpoint": CheckpointConfig,
    "faults": FaultsConfig,
    "logging": LoggingConfig,
    "profiling": ProfilingConfig,
}
"""Sections by name, in the order in which they are printed."""

SECTION_OF: dict[str, str] = {
    field: name for name, section in SECTIONS.items() for field in section.model_fields
}
"""Section of each field."""
