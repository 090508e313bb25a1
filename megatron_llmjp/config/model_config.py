"""Sections of a configuration for the architecture and the parallel layout.

Base of all sections of a configuration.

The network and how it is laid over processes.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error.

    A choice among words is accepted in upper and lower case: ``rmsnorm`` is ``RMSNorm``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _spell_choices(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: cls._spelled(name, value) for name, value in values.items()}

    @classmethod
    def _spelled(cls, name: str, value: Any) -> Any:
        info = cls.model_fields.get(name)
        if info is None or not isinstance(value, str):
            return value
        kinds = (info.annotation, *get_args(info.annotation))
        words = {w for kind in kinds if get_origin(kind) is Literal for w in get_args(kind)}
        same = [word for word in words if str(word).lower() == value.lower()]
        return same[0] if same else value


class ModelConfig(Section):
    """The network. The defaults are a LLaMA-style block without sizes."""

    num_layers: PositiveInt = Field(description="transformer layers")
    hidden_size: PositiveInt = Field(description="width of the residual stream, h")
    num_attention_heads: PositiveInt = Field(description="query heads")
    num_query_groups: PositiveInt | None = Field(
        None, description="key/value heads (grouped-query attention); all heads when not given"
    )
    kv_channels: PositiveInt | None = Field(
        None, description="size of one head; hidden_size / num_attention_heads when not given"
    )
    ffn_hidden_size: PositiveInt | None = Field(
        None, description="width of the feed-forward layer; 4 x hidden_size when not given"
    )
    max_position_embeddings: PositiveInt | None = Field(
        None, description="longest sequence the model is made for; seq_length when not given"
    )
    position_embedding_type: Literal["rope", "yarn", "learned_absolute"] = Field(
        "rope",
        description="rotary positions, rotary ones stretched by YaRN, or a learned table as in "
        "GPT-2",
    )
    rotary_base: PositiveInt = Field(10000, description="base of the rotary frequencies")
    rotary_percent: float = Field(
        1.0, gt=0.0, le=1.0, description="part of each head that is rotated (GPT-NeoX)"
    )
    rotary_seq_len_interpolation_factor: PositiveInt | None = Field(
        None, description="positions are divided by this: linear scaling for longer sequences"
    )
    use_rope_scaling: bool = Field(
        False, description="rescale the low rotary frequencies as LLaMA 3.1 does"
    )
    rope_scaling_factor: float = Field(
        8.0, gt=0.0, description="how far use_rope_scaling stretches the low frequencies"
    )
    rope_scaling_low_freq_factor: float = Field(
        1.0,
        gt=0.0,
        description="use_rope_scaling: turns within the original length below which a "
        "frequency is low",
    )
    rope_scaling_high_freq_factor: float = Field(
        4.0,
        gt=0.0,
        description="use_rope_scaling: turns within the original length above which a "
        "frequency is kept",
    )
    rope_scaling_original_max_position_embeddings: PositiveInt = Field(
        8192, description="use_rope_scaling: the length that the model was made for at first"
    )
    yarn_rotary_scaling_factor: float = Field(
        1.0, ge=1.0, description="yarn: how far positions are stretched"
    )
    yarn_original_max_position_embeddings: PositiveInt = Field(
        4096, description="yarn: the length that the model was made for at first"
    )
    yarn_beta_fast: float = Field(
        32.0,
        gt=0.0,
        description="yarn: turns within the original length above which a frequency is kept",
    )
    yarn_beta_slow: float = Field(
        1.0,
        gt=0.0,
        description="yarn: turns within the original length below which a frequency "
        "is stretched in full",
    )
    yarn_mscale: float | None = Field(
        None,
        gt=0.0,
        description="yarn: growth of queries and keys with the factor's logarithm, "
        "relative to yarn_mscale_all_dim; 1 when not given",
    )
    yarn_mscale_all_dim: float | None = Field(None, gt=0.0, description="yarn: see yarn_mscale")
    yarn_correction_range_round_to_int: bool = Field(
        True, description="yarn: round the dimensions between kept and stretched frequencies"
    )
    normalization: Literal["RMSNorm", "LayerNorm"] = Field("RMSNorm", description="kind of norm")
    norm_epsilon: float = Field(1e-5, gt=0.0, description="epsilon inside the norms")
    activation_function: Literal["swiglu", "gelu", "gelu_tanh"] = Field(
        "swiglu",
        description="feed-forward activation; gelu is the exact (erf) one, gelu_tanh the "
        "approximation that Megatron's fused kernel computes",
    )
    add_bias_linear: bool = Field(False, description="biases in the linear layers")
    add_qkv_bias: bool = Field(False, description="a bias in the QKV projection alone")
    untie_embeddings_and_output_weights: bool = Field(
        True, description="output layer with weights of its own"
    )
    use_parallel_residual: bool = Field(
        False,
        description="attention and feed-forward both read the layer's input (GPT-NeoX, GPT-J)",
    )
    hidden_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout after each sublayer")
    attention_dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="dropout on attention weights"
    )
    init_method_std: float = Field(
        0.02, gt=0.0, description="standard deviation of initial weights"
    )
    vocab_size: PositiveInt | None = Field(
        None, description="true vocabulary size; the tokenizer's when not given"
    )
    make_vocab_size_divisible_by: PositiveInt = Field(
        128, description="the vocabulary is padded to a multiple of this x tensor parallel size"
    )
    padded_vocab_size: PositiveInt | None = Field(
        None, description="rows of the embedding, when they are not to be computed"
    )

    @property
    def is_rotary(self) -> bool:
        """Whether positions are rotations, of whatever frequencies."""
        return self.position_embedding_type != "learned_absolute"

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Width of the feed-forward layer (of one of the two halves with SwiGLU)."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    def compute_padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Rows of the embedding: the vocabulary padded as Megatron-LM pads it.

        The padding depends on the tensor parallel size; ``padded_vocab_size`` overrides it, which
        is how a checkpoint keeps its rows when it is resumed in another layout.
        """
        if self.padded_vocab_size is not None:
            return self.padded_vocab_size
        if self.vocab_size is None:
            raise ValueError("vocab_size is not known yet")
        multiple = self.make_vocab_size_divisible_by * tensor_model_parallel_size
        return math.ceil(self.vocab_size / multiple) * multiple


class ParallelConfig(Section):
    """How the model is laid over processes; what is left of the world is data parallel."""

    tensor_model_parallel_size: PositiveInt = Field(1, description="TP: processes sharing a layer")
    pipeline_model_parallel_size: PositiveInt = Field(1, description="PP: stages of layers")
    virtual_pipeline_model_parallel_size: PositiveInt | None = Field(
        None, description="model chunks per stage: the interleaved schedule"
    )
    decoder_first_pipeline_num_layers: PositiveInt | None = Field(
        None, description="layers of the first stage, when stages are to be uneven"
    )
    decoder_last_pipeline_num_layers: PositiveInt | None = Field(
        None, description="layers of the last stage, when stages are to be uneven"
    )
    account_for_embedding_in_pipeline_split: bool = Field(
        False, description="count the embedding as one layer of the first stage"
    )
    account_for_loss_in_pipeline_split: bool = Field(
        False, description="count the output layer and loss as one layer of the last stage"
    )
    pipeline_model_parallel_layout: str | None = Field(
        None,
        description="what each stage holds, as megatron-core writes it: 'Et*3|t*4|t*4|t*3L' (E "
        "embedding, t layer, L loss, | next stage)",
    )
    context_parallel_size: PositiveInt = Field(
        1, description="CP: processes sharing a sequence (needs Transformer Engine)"
    )
    sequence_parallel: bool = Field(
        False, description="split norms and dropout along the sequence over the TP group"
    )
    use_distributed_optimizer: bool = Field(
        False, description="shard optimizer state over the data-parallel group (ZeRO-1)"
    )
    overlap_grad_reduce: bool = Field(
        False, description="reduce gradients while the backward pass still runs"
    )
    overlap_param_gather: bool = Field(
        False, description="gather updated parameters while the forward pass already runs"
    )
    recompute_granularity: Literal["selective", "full"] | None = Field(
        None, description="recompute activations in the backward pass: attention only, or layers"
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        None, description="which layers a full recompute covers"
    )
    recompute_num_layers: PositiveInt | None = Field(
        None, description="layers per recomputed unit (uniform) or per stage (block)"
    )
    distributed_timeout_minutes: PositiveInt = Field(
        10, description="a collective that waits longer than this fails"
    )

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model: TP x CP x PP."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )
