"""What a run is: one frozen, typed model per section.

Field names are Megatron-LM's flags in snake_case wherever Megatron-LM has one, so that
``--tensor-model-parallel-size 2`` and ``tensor_model_parallel_size: 2`` say the same thing. A name
is used once across all sections. The description of a field is its line in ``--help``.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


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
    position_embedding_type: Literal["rope", "learned_absolute"] = Field(
        "rope", description="rotary positions, or a learned table as in GPT-2"
    )
    rotary_base: PositiveInt = Field(10000, description="base of the rotary frequencies")
    rotary_percent: float = Field(
        1.0, gt=0.0, le=1.0, description="part of each head that is rotated (GPT-NeoX)"
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

    def rows(self, tensor_model_parallel_size: int) -> int:
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


class DataConfig(Section):
    """Tokens in: the fold schedule and the tokenizer that made its datasets."""

    fold_file: str | None = Field(None, description="YAML file with folds, blends and validation")
    data_cache_path: str | None = Field(
        None, description="folder for sample indices; beside the fold file when not given"
    )
    seq_length: PositiveInt = Field(2048, description="tokens per sample, s")
    tokenizer_type: (
        Literal[
            "SentencePieceTokenizer",
            "Llama2Tokenizer",
            "HuggingFaceTokenizer",
            "ByteLevelTokenizer",
            "NullTokenizer",
        ]
        | None
    ) = Field(None, description="kind of tokenizer the datasets were made with")
    tokenizer_model: str | None = Field(
        None, description="SentencePiece model, tokenizer.json or Hugging Face folder"
    )
    num_workers: NonNegativeInt = Field(2, description="processes that read ahead, per rank")
    reset_position_ids: bool = Field(False, description="positions restart after each EOD")
    reset_attention_mask: bool = Field(False, description="attention stops at each EOD")
    eod_mask_loss: bool = Field(False, description="no loss on EOD tokens")


class TrainingConfig(Section):
    """The run itself."""

    micro_batch_size: PositiveInt = Field(1, description="samples in one forward pass, b")
    global_batch_size: PositiveInt = Field(1, description="samples in one optimizer step")
    rampup_batch_size: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(
        None,
        description="START INCREMENT SAMPLES: the global batch grows from START to "
        "global_batch_size by INCREMENT over the first SAMPLES samples",
    )
    train_iters: PositiveInt | None = Field(
        None, description="optimizer steps; the fold file's total when not given"
    )
    exit_interval: PositiveInt | None = Field(
        None, description="save and stop (exit code 3) at iterations divisible by this"
    )
    eval_interval: PositiveInt | None = Field(
        None, description="validate every so many iterations; only at the end when not given"
    )
    eval_iters: NonNegativeInt = Field(
        10, description="batches per validation set; 0 turns validation off"
    )
    seed: NonNegativeInt = Field(1234, description="of initial weights and dropout")
    bf16: bool = Field(False, description="train in bfloat16 with fp32 main weights")
    fp16: bool = Field(False, description="train in float16 with dynamic loss scaling")


class OptimizerConfig(Section):
    """Optimizer and learning rate."""

    optimizer: Literal["adam", "sgd"] = Field("adam", description="adam is AdamW, as in Megatron")
    lr: NonNegativeFloat = Field(3e-4, description="peak learning rate")
    min_lr: NonNegativeFloat = Field(0.0, description="learning rate the decay ends at")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = Field(
        "cosine", description="shape of the decay"
    )
    lr_decay_iters: PositiveInt | None = Field(
        None, description="iteration the decay ends at, warm-up included; train_iters if not given"
    )
    lr_warmup_iters: NonNegativeInt = Field(0, description="linear warm-up from lr_warmup_init")
    lr_warmup_init: NonNegativeFloat = Field(0.0, description="learning rate warm-up starts at")
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = Field(
        "exponential", description="shape of the tail of WSD"
    )
    lr_wsd_decay_iters: PositiveInt | None = Field(None, description="length of the tail of WSD")
    weight_decay: NonNegativeFloat = Field(0.1, description="not applied to biases and norms")
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0, description="first moment's decay")
    adam_beta2: float = Field(0.95, ge=0.0, lt=1.0, description="second moment's decay")
    adam_eps: float = Field(1e-8, gt=0.0, description="Adam's epsilon")
    sgd_momentum: float = Field(0.9, ge=0.0, lt=1.0, description="momentum of SGD")
    clip_grad: NonNegativeFloat = Field(1.0, description="largest gradient norm; 0 for no clipping")
    initial_loss_scale: float = Field(2.0**32, gt=0.0, description="fp16: first loss scale")
    min_loss_scale: float = Field(1.0, gt=0.0, description="fp16: smallest loss scale")
    loss_scale_window: PositiveInt = Field(1000, description="fp16: good steps before raising it")
    hysteresis: PositiveInt = Field(2, description="fp16: bad steps before lowering it")
    override_opt_param_scheduler: bool = Field(
        False, description="at resume, take the schedule of this configuration"
    )


class CheckpointConfig(Section):
    """The run at rest."""

    save: str | None = Field(None, description="folder for checkpoints")
    load: str | None = Field(
        None, description="folder to resume from; --save when that holds a checkpoint"
    )
    save_interval: PositiveInt | None = Field(None, description="save every so many iterations")
    finetune: bool = Field(
        False, description="load weights only: a new optimizer, from iteration 0"
    )
    override_resume: tuple[str, ...] = Field(
        (), description="fields that may differ from the checkpoint's, and `folds`"
    )


class LoggingConfig(Section):
    """What a person sees of the run."""

    log_interval: PositiveInt = Field(10, description="iterations per log line")
    tensorboard_dir: str | None = Field(
        None, description="tensorboard events; SAVE/tensorboard when not given"
    )


class Config(Section):
    """A whole run."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def rows(self) -> int:
        """Rows of the embedding in this layout."""
        return self.model.rows(self.parallel.tensor_model_parallel_size)

    @property
    def positions(self) -> int:
        """Longest sequence the model is made for."""
        return self.model.max_position_embeddings or self.data.seq_length


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "optimizer": OptimizerConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
}
"""Every section by its name, in the order they are read and shown."""

SECTION_OF: dict[str, str] = {
    field: name for name, section in SECTIONS.items() for field in section.model_fields
}
"""The section that holds a field; a field's name occurs in one section only."""
