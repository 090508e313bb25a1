"""Runs on the fake machine: the architecture of every preset, with each feature of the GPU path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import preset_names, replace_fields
from megatron_llmjp.config.schema import Config

STEPS = 2
VOCABULARY, LENGTH, MICRO_BATCH, MICRO_BATCHES = 1000, 32, 2, 2

_SHRUNK: dict[str, Any] = {
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "vocab_size": VOCABULARY,
    "seq_length": LENGTH,
    "num_workers": 0,
    "micro_batch_size": MICRO_BATCH,
    "eval_iters": 1,
    "log_interval": 1,
    "save": "not written",
    "lr_warmup_iters": 0,
    "lr_warmup_tokens": None,
    "lr_decay_iters": None,
    "lr_decay_tokens": None,
    "lr_decay_style": "constant",
    "lr_wsd_decay_iters": None,
}
_IGNORED = ("init_method_std", "rotary_base", "norm_epsilon")
"""Numbers that select no code."""

_PLAIN: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "sequence_parallel": False,
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "recompute_granularity": None,
    "bf16": True,
    "fp16": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
_PP2 = {"pipeline_model_parallel_size": 2}
_VP2 = {**_PP2, "virtual_pipeline_model_parallel_size": 2}
_TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
_CP2 = {"context_parallel_size": 2}
_DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
_NO_OVERLAPS = {"overlap_grad_reduce": False, "overlap_param_gather": False}
_SELECTIVE = {"recompute_granularity": "selective"}
_FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
_PLAIN_OPTIMIZER = {"use_distributed_optimizer": False, "overlap_param_gather": False}
_DOCUMENTS = {"reset_attention_mask": True, "reset_position_ids": True}

FEATURES: dict[str, tuple[dict[str, Any], int]] = {
    "tp2-sp-dropout": ({**_TP2, **_DROPOUT}, 10),
    "pp2-first-selective-recompute": ({**_PP2, **_SELECTIVE}, 3),
    "pp2-last-no-overlaps": ({**_PP2, **_NO_OVERLAPS}, 12),
    "vp2-first": (_VP2, 3),
    "vp2-last": (_VP2, 12),
    "plain-optimizer-full-recompute": ({**_PLAIN_OPTIMIZER, **_FULL}, 11),
    "documents-deterministic": ({**_DOCUMENTS, "deterministic_mode": True}, 11),
    "documents-fp32": ({**_DOCUMENTS, "bf16": False}, 11),
    "fp16": ({"fp16": True, "bf16": False}, 11),
    "cp2-documents": ({**_CP2, **_DOCUMENTS}, 11),
    "cp2-fp32-selective-recompute": ({**_CP2, **_SELECTIVE, "bf16": False}, 11),
}
"""Fields that differ from a run in bf16 with an overlapped distributed optimizer, and the rank.

Features that do not touch each other share a run.
"""

WORLD_SIZE = 16
BASE_RANK = 11
STYLES = {
    "gpt2": "llm-jp-1.3b-v1.0",
    "llama": "llm-jp-4-8b",
    "neox": "rinna-japanese-gpt-neox-3.6b",
}
"""One preset for each architecture, which runs with each feature."""


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    config: Config
    rank: int = BASE_RANK
    world_size: int = WORLD_SIZE

    @property
    def is_first_stage(self) -> bool:
        """Whether the rank has the embedding."""
        stages = self.config.parallel.pipeline_model_parallel_size
        return self.rank < self.world_size // stages

    @property
    def attention(self) -> str:
        """The kernel that torch's attention should use."""
        training, documents = self.config.training, self.config.data.reset_attention_mask
        half = training.bf16 or training.fp16
        if documents:
            return "documents" if half and not self.config.model.attention_dropout else "efficient"
        return "flash" if half else "efficient"


def cases() -> list[Case]:
    """Return all runs: each preset's architecture once, each of the styles with each feature."""
    found = [Case(f"{preset}-base", config) for preset, config in _architectures().items()]
    for style, preset in STYLES.items():
        for feature, (fields, rank) in FEATURES.items():
            found.append(Case(f"{style}-{feature}", _shrunk(preset, **fields), rank))
    parallel_residual = _shrunk(STYLES["neox"], use_parallel_residual=True)
    return [*found, Case("neox-parallel-residual", parallel_residual)]


def _architectures() -> dict[str, Config]:
    """Return a preset for each architecture, shrunk."""
    known: dict[str, str] = {}
    for preset in preset_names():
        config = _shrunk(preset)
        if config.model.has_experts:  # the machine has no streams, on which their counts are copied
            continue
        model = {k: v for k, v in config.model.model_dump().items() if k not in _IGNORED}
        has_z_loss = config.training.z_loss_strength > 0.0
        known.setdefault(repr((sorted(model.items()), has_z_loss)), preset)
    return {preset: _shrunk(preset) for preset in known.values()}


def _shrunk(preset: str, **fields: Any) -> Config:
    """Return a small run of a preset in bf16 with an overlapped distributed optimizer."""
    config = parse(["--config", preset]).config
    groups = {} if config.model.num_query_groups is None else {"num_query_groups": 2}
    fields = {**_SHRUNK, **groups, **_PLAIN, **fields}
    stages = fields["pipeline_model_parallel_size"]
    chunks = stages * fields.get("virtual_pipeline_model_parallel_size", 1)
    parts = fields["tensor_model_parallel_size"] * fields.get("context_parallel_size", 1)
    replicas = WORLD_SIZE // (stages * parts)
    return replace_fields(
        config,
        num_layers=chunks,
        global_batch_size=MICRO_BATCH * MICRO_BATCHES * replicas,
        **fields,
    )
