"""Configuration sections of the dense architecture and the parallel layout.

The fields of experts are added to the former in ``expert_config.py``.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator

from megatron_llmjp.config.section import Section

DeviceChoice = Literal["auto", "cuda", "cpu"]
RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts"]


class DenseModelConfig(Section):
    """Architecture without experts. The defaults are those of LLaMA, without sizes."""

    num_layers: PositiveInt = Field(description="number of transformer layers")
    hidden_size: PositiveInt = Field(description="hidden size of the transformer")
    num_attention_heads: PositiveInt = Field(description="number of query heads")
    num_query_groups: PositiveInt | None = Field(
        None,
        description="number of key/value heads (grouped-query attention); default: "
        "num_attention_heads",
    )
    kv_channels: PositiveInt | None = Field(
        None, description="size of one attention head; default: hidden_size / num_attention_heads"
    )
    ffn_hidden_size: PositiveInt | None = Field(
        None, description="hidden size of the feed-forward layer; default: 4 x hidden_size"
    )
    max_position_embeddings: PositiveInt | None = Field(
        None, description="maximum sequence length of the model; default: seq_length"
    )
    position_embedding_type: Literal["rope", "yarn", "learned_absolute"] = Field(
        "rope",
        description="rotary position embeddings, YaRN, or learned ones as in GPT-2",
    )
    rotary_base: PositiveInt = Field(10000, description="base of the rotary frequencies (theta)")
    rotary_percent: float = Field(
        1.0, gt=0.0, le=1.0, description="fraction of each head that is rotated (GPT-NeoX)"
    )
    rotary_seq_len_interpolation_factor: PositiveInt | None = Field(
        None, description="divide positions by this factor: linear scaling for longer sequences"
    )
    use_rope_scaling: bool = Field(
        False, description="rescale the low rotary frequencies as in LLaMA 3.1"
    )
    rope_scaling_factor: float = Field(
        8.0, gt=0.0, description="scaling factor of use_rope_scaling"
    )
    rope_scaling_low_freq_factor: float = Field(
        1.0,
        gt=0.0,
        description="use_rope_scaling: rotations within the original length below which a "
        "frequency is low",
    )
    rope_scaling_high_freq_factor: float = Field(
        4.0,
        gt=0.0,
        description="use_rope_scaling: rotations within the original length above which a "
        "frequency is unchanged",
    )
    rope_scaling_original_max_position_embeddings: PositiveInt = Field(
        8192, description="use_rope_scaling: original maximum sequence length"
    )
    yarn_rotary_scaling_factor: float = Field(
        1.0, ge=1.0, description="yarn: scaling factor of the context length"
    )
    yarn_original_max_position_embeddings: PositiveInt = Field(
        4096, description="yarn: original maximum sequence length"
    )
    yarn_beta_fast: float = Field(
        32.0,
        gt=0.0,
        description="yarn: rotations within the original length above which a frequency is "
        "unchanged",
    )
    yarn_beta_slow: float = Field(
        1.0,
        gt=0.0,
        description="yarn: rotations within the original length below which a frequency is "
        "fully interpolated",
    )
    yarn_mscale: float | None = Field(
        None,
        gt=0.0,
        description="yarn: scale of queries and keys per logarithm of the scaling factor, "
        "relative to yarn_mscale_all_dim (default: 1)",
    )
    yarn_mscale_all_dim: float | None = Field(None, gt=0.0, description="yarn: see yarn_mscale")
    yarn_correction_range_round_to_int: bool = Field(
        True,
        description="yarn: round the dimensions between unchanged and interpolated frequencies",
    )
    normalization: Literal["RMSNorm", "LayerNorm"] = Field(
        "RMSNorm", description="type of normalization"
    )
    norm_epsilon: float = Field(1e-5, gt=0.0, description="epsilon of the normalization layers")
    activation_function: Literal["swiglu", "gelu", "gelu_tanh"] = Field(
        "swiglu",
        description="feed-forward activation; gelu is the exact (erf) function, gelu_tanh the "
        "approximation that Megatron's fused kernel computes",
    )
    add_bias_linear: bool = Field(False, description="add biases to the linear layers")
    add_qkv_bias: bool = Field(False, description="add a bias to the QKV projection only")
    qk_layernorm: bool = Field(
        False, description="normalize the queries and keys of each head (Qwen3)"
    )
    untie_embeddings_and_output_weights: bool = Field(
        True, description="use separate weights for the embedding and the output layer"
    )
    use_parallel_residual: bool = Field(
        False,
        description="compute attention and feed-forward both from the layer's input (GPT-NeoX, "
        "GPT-J)",
    )
    hidden_dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="dropout probability after each sublayer"
    )
    attention_dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="dropout probability of attention weights"
    )
    init_method_std: float = Field(
        0.02, gt=0.0, description="standard deviation of the initial weights"
    )
    vocab_size: PositiveInt | None = Field(
        None, description="vocabulary size without padding; default: the tokenizer's"
    )
    make_vocab_size_divisible_by: PositiveInt = Field(
        128, description="pad the vocabulary size to a multiple of this x tensor parallel size"
    )
    padded_vocab_size: PositiveInt | None = Field(
        None, description="padded vocabulary size; overrides the computed one"
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
        """Hidden size of the feed-forward layer (of each half with SwiGLU)."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    def resolved_sizes(self) -> dict[str, int]:
        """Return the fields whose defaults are computed from other sizes, with their values."""
        return {
            "num_query_groups": self.query_groups,
            "kv_channels": self.head_dim,
            "ffn_hidden_size": self.ffn_size,
        }

    def compute_padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Return the vocabulary size padded as in Megatron-LM: the rows of the embedding.

        The padding depends on the tensor parallel size. ``padded_vocab_size`` overrides it, so that
        a checkpoint keeps its size when it is resumed in another layout.
        """
        if self.padded_vocab_size is not None:
            return self.padded_vocab_size
        if self.vocab_size is None:
            raise ValueError("vocab_size is not known yet")
        multiple = self.make_vocab_size_divisible_by * tensor_model_parallel_size
        return math.ceil(self.vocab_size / multiple) * multiple


class ParallelConfig(Section):
    """Parallel layout; the data-parallel size is the world size divided by TP x CP x PP."""

    tensor_model_parallel_size: PositiveInt = Field(
        1, description="degree of tensor model parallelism (TP)"
    )
    pipeline_model_parallel_size: PositiveInt = Field(
        1, description="degree of pipeline model parallelism (PP)"
    )
    virtual_pipeline_model_parallel_size: PositiveInt | None = Field(
        None, description="number of model chunks per pipeline stage (interleaved schedule)"
    )
    decoder_first_pipeline_num_layers: PositiveInt | None = Field(
        None, description="number of layers of the first pipeline stage, for uneven stages"
    )
    decoder_last_pipeline_num_layers: PositiveInt | None = Field(
        None, description="number of layers of the last pipeline stage, for uneven stages"
    )
    account_for_embedding_in_pipeline_split: bool = Field(
        False, description="count the embedding as one layer of the first stage"
    )
    account_for_loss_in_pipeline_split: bool = Field(
        False, description="count the output layer and loss as one layer of the last stage"
    )
    pipeline_model_parallel_layout: str | None = Field(
        None,
        description="contents of each stage in megatron-core's notation: 'Et*3|t*4|t*4|t*3L' (E"
        " embedding, t layer, L loss, | separates stages)",
    )
    context_parallel_size: PositiveInt = Field(
        1, description="degree of context parallelism (CP): ranks that share each sequence"
    )
    expert_model_parallel_size: PositiveInt = Field(
        1, description="degree of expert model parallelism (EP): ranks that share the experts"
    )
    expert_tensor_parallel_size: PositiveInt | None = Field(
        None,
        description="degree of tensor parallelism of each expert; default: "
        "tensor_model_parallel_size",
    )
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = Field(
        "allgather",
        description="collective that exchanges tokens between the ranks of the experts",
    )
    moe_grouped_gemm: bool = Field(
        False,
        description="compute the experts of a rank in one grouped matrix multiplication; where "
        "Transformer Engine's layers are used, otherwise one expert after the other",
    )
    moe_permute_fusion: bool = Field(
        False,
        description="permute tokens by fused kernels, where Transformer Engine's layers are used "
        "(2.1 or newer)",
    )
    moe_router_fusion: bool = Field(
        False,
        description="compute the router's scores and loss by fused kernels, where Transformer "
        "Engine's layers are used (2.7 or newer)",
    )
    sequence_parallel: bool = Field(
        False, description="split normalization and dropout along the sequence over the TP group"
    )
    use_distributed_optimizer: bool = Field(
        False, description="shard the optimizer state over the data-parallel group (ZeRO-1)"
    )
    overlap_grad_reduce: bool = Field(
        False, description="overlap gradient reduction with the backward pass"
    )
    overlap_param_gather: bool = Field(
        False, description="overlap the all-gather of parameters with the forward pass"
    )
    recompute_granularity: Literal["selective", "full"] | None = Field(
        None,
        description="recompute activations in the backward pass: of attention only, or of whole"
        " layers",
    )
    recompute_modules: tuple[RecomputeModule, ...] = Field(
        ("core_attn",),
        description="parts of a layer that recompute_granularity selective recomputes: attention"
        " (core_attn), norms, the feed-forward network (mlp), all experts (moe), their activation"
        " functions (moe_act) or the shared ones",
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        None, description="which layers a full recomputation covers"
    )
    recompute_num_layers: PositiveInt | None = Field(
        None, description="number of layers per recomputed unit (uniform) or per stage (block)"
    )
    device: DeviceChoice = Field(
        "auto",
        description="device of the ranks: auto for a GPU wherever one is expected (a CUDA build of"
        " torch, an NVIDIA driver, GPUs granted by the launcher), else the CPU; cuda; or cpu",
    )
    distributed_timeout_minutes: PositiveInt = Field(
        10, description="timeout of collective operations"
    )

    @property
    def recomputes_attention(self) -> bool:
        """Whether attention is recomputed alone, without its layer."""
        return self.recompute_granularity == "selective" and "core_attn" in self.recompute_modules

    @property
    def model_parallel_size(self) -> int:
        """Number of processes per model replica: TP x CP x PP."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def expert_tensor_size(self) -> int:
        """Number of ranks that share each expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @field_validator("moe_token_dispatcher_type", mode="before")
    @classmethod
    def _refuse_flex(cls, value: Any) -> Any:
        if value == "flex":
            raise ValueError(
                "the flex dispatcher requires DeepEP or HybridEP, which are not supported: use "
                "alltoall, which computes the same"
            )
        return value
