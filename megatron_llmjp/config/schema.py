"""What a run is: one frozen, typed model per section.

Field names are Megatron-LM's flags in snake_case wherever Megatron-LM has one, so that
``--tensor-model-parallel-size 2`` and ``tensor_model_parallel_size: 2`` say the same thing. A name
is used once across all sections. The description of a field is its line in ``--help``.

The sections themselves are in ``sections_model.py`` (model, parallel), ``sections_run.py`` (data,
training, checkpoint, logging) and ``sections_optimizer.py``; everything is imported from here.
"""

from __future__ import annotations

from megatron_llmjp.config.model_config import ModelConfig, ParallelConfig, Section
from megatron_llmjp.config.run_config import (
    CheckpointConfig,
    DataConfig,
    FaultsConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainingConfig,
)

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
    "Section",
    "TrainingConfig",
]


class Config(Section):
    """A whole run."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in this layout."""
        return self.model.compute_padded_vocab_size(self.parallel.tensor_model_parallel_size)

    @property
    def max_positions(self) -> int:
        """Longest sequence the model is made for."""
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
}
"""Every section by its name, in the order they are read and shown."""

SECTION_OF: dict[str, str] = {
    field: name for name, section in SECTIONS.items() for field in section.model_fields
}
"""The section that holds a field; a field's name occurs in one section only."""
