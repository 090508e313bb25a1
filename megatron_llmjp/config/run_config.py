"""Configuration sections of data, training, optimizer, checkpoints and fault handling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from megatron_llmjp.config.lr_decay_styles import DECAY_STYLES
from megatron_llmjp.config.section import Section
from megatron_llmjp.config.tokenizer_types import TOKENIZER_TYPES

if TYPE_CHECKING:
    LRDecayStyle = str
    TokenizerType = str
else:
    LRDecayStyle = Literal[tuple(DECAY_STYLES)]
    TokenizerType = Literal[TOKENIZER_TYPES]

WSDDecayStyle = Literal["linear", "cosine", "exponential", "minus_sqrt"]


class DataConfig(Section):
    """Training data and tokenizer."""

    fold_file: str | None = Field(
        None, description="YAML file with the folds, blends and validation sets"
    )
    data_path: tuple[str, ...] = Field(
        (),
        description="instead of a fold file: datasets, or alternating weights and datasets, in "
        "Megatron-LM's sample order (requires train_iters, train_samples or "
        "train_tokens)",
    )
    data_args_path: str | None = Field(None, description="file with the list of data_path")
    train_data_path: tuple[str, ...] = Field((), description="like data_path, for training only")
    valid_data_path: tuple[str, ...] = Field((), description="like data_path, for validation only")
    test_data_path: tuple[str, ...] = Field((), description="like data_path, for the test set only")
    per_split_data_args_path: str | None = Field(
        None, description="JSON file with the lists of train, valid and test"
    )
    split: str | None = Field(
        None, description="fractions of train, valid and test in data_path (default: 969,30,1)"
    )
    skip_iterations: str | None = Field(
        None,
        description="iterations whose samples are skipped, such as 1050-1060,2000; iteration "
        "numbers refer to the resumed run (docs/folds.md)",
    )
    data_cache_path: str | None = Field(
        None, description="folder of the sample indices; default: index_cache next to the fold file"
    )
    seq_length: PositiveInt = Field(2048, description="sequence length: tokens per sample")
    tokenizer_type: TokenizerType | None = Field(
        None, description="type of the tokenizer that the datasets were made with"
    )
    tokenizer_model: str | None = Field(
        None,
        description="SentencePiece model, tokenizer.json, Hugging Face folder, vocabulary of "
        "GPT2BPETokenizer or JSON file of TikTokenizer",
    )
    merge_file: str | None = Field(
        None, description="merges of GPT2BPETokenizer; default: merges next to its vocabulary"
    )
    tiktoken_pattern: Literal["v1", "v2"] = Field(
        "v2", description="regular expression with which TikTokenizer splits text"
    )
    tiktoken_num_special_tokens: PositiveInt = Field(
        1000, description="number of ids of TikTokenizer before those of its file"
    )
    tiktoken_special_tokens: tuple[str, ...] = Field(
        (), description="names of the first ids of TikTokenizer (default: <unk> <s> </s>)"
    )
    allow_tokenizer_mismatch: bool = Field(
        False,
        description="train on datasets whose manifests record another tokenizer than the run's",
    )
    num_workers: NonNegativeInt = Field(2, description="number of data loader processes per rank")
    reset_position_ids: bool = Field(
        False, description="reset position ids after each end-of-document token"
    )
    reset_attention_mask: bool = Field(False, description="restrict attention to the same document")
    eod_mask_loss: bool = Field(False, description="mask the loss of end-of-document tokens")


class TrainingConfig(Section):
    """Batches, length of the run, validation and precision."""

    micro_batch_size: PositiveInt = Field(
        1, description="samples per forward pass and data-parallel rank"
    )
    global_batch_size: PositiveInt = Field(1, description="samples per optimizer step")
    rampup_batch_size: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(
        None,
        description="START INCREMENT SAMPLES: increase the global batch size from START to "
        "global_batch_size by INCREMENT over the first SAMPLES samples",
    )
    train_iters: PositiveInt | None = Field(
        None, description="number of iterations; default: all samples of the fold file"
    )
    train_samples: PositiveInt | None = Field(
        None, description="number of samples to train on, instead of train_iters"
    )
    train_tokens: PositiveInt | None = Field(
        None,
        description="number of tokens to train on; with train_iters or train_samples, the limit"
        " reached first ends the run",
    )
    eval_interval: PositiveInt | None = Field(
        None, description="iterations between validations; default: only at the end"
    )
    eval_iters: NonNegativeInt = Field(
        10, description="batches per validation set; 0 disables validation"
    )
    eval_only: bool = Field(
        False, description="validate the checkpoint of --load and exit, without training"
    )
    seed: NonNegativeInt = Field(1234, description="random seed of initial weights and dropout")
    bf16: bool = Field(False, description="train in bfloat16 with fp32 main weights")
    fp16: bool = Field(False, description="train in float16 with dynamic loss scaling")
    z_loss_strength: NonNegativeFloat = Field(
        0.0,
        description="weight of the z-loss: add this x log(Z)^2 to the loss, where Z is the "
        "softmax denominator; LLM-jp used 1e-4",
    )
    transformer_impl: Literal["transformer_engine", "local"] | None = Field(
        None,
        description="layers of Transformer Engine, or of torch; default: of Transformer Engine"
        " where it is installed and the run uses GPUs",
    )
    deterministic_mode: bool = Field(
        False, description="make losses bit-identical from run to run; slower on GPUs"
    )
    manual_gc: bool = Field(
        True, description="collect Python's garbage at the same iterations on all ranks"
    )
    manual_gc_interval: NonNegativeInt = Field(
        100,
        description="manual_gc: iterations between collections; 0 collects at validations only",
    )
    manual_gc_eval: bool = Field(
        True, description="manual_gc: also collect before and after each validation"
    )


class CheckpointConfig(Section):
    """Saving, loading and retention of checkpoints."""

    save: str | None = Field(None, description="folder to save checkpoints to")
    load: str | None = Field(
        None, description="folder to load a checkpoint from; default: --save, if it holds one"
    )
    save_interval: PositiveInt | None = Field(
        None, description="save a checkpoint every N iterations"
    )
    save_interval_tokens: PositiveInt | None = Field(
        None, description="save a checkpoint every N tokens"
    )
    save_interval_minutes: PositiveFloat | None = Field(
        None,
        description="save at the latest after this many minutes of training since the last save "
        "that is kept",
    )
    non_persistent_save_interval: PositiveInt | None = Field(
        None,
        description="also save every N iterations, until a newer checkpoint is complete: only the "
        "newest of these is kept",
    )
    non_persistent_save_minutes: NonNegativeFloat = Field(
        60.0,
        description="also save at the latest after this many minutes of training since the last "
        "save; as with non_persistent_save_interval only the newest is kept. 0: never",
    )
    save_policy: Literal["llm-jp"] | None = Field(
        None,
        description="save at 1..9, 10..90 by 10, 100..900 by 100, then every 1000 iterations",
    )
    save_fold_ends: bool = Field(
        True,
        description="save at the end of each fold; --keep-last and --keep-every do not delete "
        "these",
    )
    keep_last: PositiveInt | None = Field(
        None,
        description="number of newest checkpoints to keep, without non-persistent ones "
        "(default: all)",
    )
    keep_every: PositiveInt | None = Field(
        None, description="with keep_last, also keep checkpoints at iterations divisible by this"
    )
    async_save: bool = Field(
        False, description="write checkpoints in the background, from a copy in host memory"
    )
    verify_checkpoint: bool = Field(
        False,
        description="verify all checksums before resuming; always done after a killed run",
    )
    finetune: bool = Field(False, description="load weights only: new optimizer, iteration 0")
    override_resume: tuple[str, ...] = Field(
        (),
        description="fields that may differ from the checkpoint's; `folds` or `tokenizer` for "
        "changed contents",
    )


class OptimizerConfig(Section):
    """Optimizer, learning-rate schedule and loss scaling."""

    optimizer: Literal["adam", "sgd"] = Field(
        "adam", description="optimizer; adam is AdamW, as in Megatron-LM"
    )
    lr: NonNegativeFloat = Field(3e-4, description="peak learning rate")
    min_lr: NonNegativeFloat = Field(0.0, description="learning rate at the end of the decay")
    lr_decay_style: LRDecayStyle = Field("cosine", description="learning-rate decay function")
    lr_decay_iters: PositiveInt | None = Field(
        None, description="last iteration of the decay, counting the warm-up; default: train_iters"
    )
    lr_decay_samples: PositiveInt | None = Field(None, description="lr_decay_iters in samples")
    lr_decay_tokens: PositiveInt | None = Field(None, description="lr_decay_iters in tokens")
    lr_decay_fraction: float | None = Field(
        None,
        gt=0.0,
        description="end of the decay as a fraction of the run, if not given in another unit",
    )
    lr_warmup_iters: NonNegativeInt = Field(
        0, description="iterations of linear warm-up from lr_warmup_init"
    )
    lr_warmup_samples: PositiveInt | None = Field(None, description="lr_warmup_iters in samples")
    lr_warmup_tokens: PositiveInt | None = Field(None, description="lr_warmup_iters in tokens")
    lr_warmup_fraction: float | None = Field(
        None, ge=0.0, lt=1.0, description="warm-up as a fraction of the decay's length"
    )
    lr_warmup_shorten: bool = Field(
        False,
        description="shorten a warm-up that is as long as the decay to a tenth of it; enabled "
        "where a preset or file sets the warm-up",
    )
    lr_warmup_init: NonNegativeFloat = Field(
        0.0, description="learning rate at the start of the warm-up"
    )
    lr_wsd_decay_style: WSDDecayStyle = Field(
        "exponential", description="decay function of the final decay of WSD"
    )
    lr_wsd_decay_iters: PositiveInt | None = Field(
        None, description="iterations of the final decay of WSD"
    )
    lr_wsd_decay_samples: PositiveInt | None = Field(
        None, description="lr_wsd_decay_iters in samples"
    )
    lr_wsd_decay_tokens: PositiveInt | None = Field(
        None, description="lr_wsd_decay_iters in tokens"
    )
    lr_wsd_decay_fraction: float | None = Field(
        None, gt=0.0, le=1.0, description="final decay of WSD as a fraction of the decay's length"
    )
    weight_decay: NonNegativeFloat = Field(
        0.1, description="weight decay; not applied to biases and normalization weights"
    )
    start_weight_decay: NonNegativeFloat | None = Field(
        None, description="weight decay at the start (default: weight_decay)"
    )
    end_weight_decay: NonNegativeFloat | None = Field(
        None, description="weight decay at the end (default: weight_decay)"
    )
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="function that increases the weight decay from its start to its end"
    )
    adam_beta1: float = Field(
        0.9, ge=0.0, lt=1.0, description="Adam's decay rate of the first moment"
    )
    adam_beta2: float = Field(
        0.95, ge=0.0, lt=1.0, description="Adam's decay rate of the second moment"
    )
    adam_eps: float = Field(1e-8, gt=0.0, description="Adam's epsilon")
    sgd_momentum: float = Field(0.9, ge=0.0, lt=1.0, description="momentum of SGD")
    clip_grad: NonNegativeFloat = Field(
        1.0, description="gradient clipping by global norm; 0 disables it"
    )
    loss_scale: float | None = Field(
        None, gt=0.0, description="fp16: static loss scale (default: dynamic)"
    )
    initial_loss_scale: float = Field(2.0**32, gt=0.0, description="fp16: initial loss scale")
    min_loss_scale: float = Field(1.0, gt=0.0, description="fp16: minimum loss scale")
    loss_scale_window: PositiveInt = Field(
        1000, description="fp16: steps without overflow before the loss scale is raised"
    )
    hysteresis: PositiveInt = Field(
        2, description="fp16: overflows before the loss scale is lowered"
    )
    override_opt_param_scheduler: bool = Field(
        False, description="on resume, use the learning-rate schedule of this configuration"
    )

    @field_validator("lr_warmup_samples", "lr_warmup_tokens", mode="before")
    @classmethod
    def _zero_is_none(cls, value: Any) -> Any:
        """Treat 0, Megatron-LM's default of an unused unit, as not given."""
        return None if value in (0, "0") else value


class FaultsConfig(Section):
    """Stops, loss spikes, NaN and Inf gradients, and hangs."""

    exit_interval: PositiveInt | None = Field(
        None, description="save and exit (exit code 3) at iterations divisible by this"
    )
    exit_duration_in_mins: PositiveFloat | None = Field(
        None,
        description="save and exit (exit code 3) this many minutes after the process started; "
        "leave time for the save",
    )
    max_bad_steps: PositiveInt = Field(
        5,
        description="consecutive skipped steps with NaN or Inf gradients that end the run (exit"
        " code 1)",
    )
    max_overflow_steps: PositiveInt = Field(
        25,
        description="fp16: consecutive overflows that lower the loss scale; each further one "
        "counts as a bad step, as does one at the minimum loss scale",
    )
    spike_action: Literal["off", "warn", "skip", "rollback"] = Field(
        "warn",
        description="action on a spike of the gradient norm: warn; skip the batch; or roll back"
        " to the last checkpoint and skip the batches before the spike",
    )
    spike_threshold: float = Field(
        10.0,
        gt=1.0,
        description="ratio to the median of the last 128 gradient norms that makes a spike",
    )
    spike_skip_iterations: PositiveInt = Field(
        20, description="number of batches that a rollback skips, up to and including the spike's"
    )
    max_spikes: PositiveInt = Field(
        8,
        description="with spike_action skip: number of skipped batches within 128 steps that "
        "ends the run (exit code 1)",
    )
    max_rollbacks: PositiveInt = Field(
        3,
        description="maximum rollbacks within 1,000 iterations; one more spike ends the run "
        "(exit code 1)",
    )
    hang_timeout_minutes: NonNegativeFloat | None = Field(
        None,
        description="end the run and report the rank after this many minutes without progress; "
        "0 disables it; default: 80% of distributed_timeout_minutes",
    )
