"""Sections of a configuration for data, training, optimizer, checkpoints, logging and faults.

Data, training, checkpoints and log of a run.

The optimizer, its learning rate and its loss scale.

What a run does when something goes wrong, or when it has to leave.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from megatron_llmjp.config.model_config import Section

LRDecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WSDDecayStyle = Literal["linear", "cosine", "exponential", "minus_sqrt"]


class DataConfig(Section):
    """Tokens in: the fold schedule and the tokenizer that made its datasets."""

    fold_file: str | None = Field(None, description="YAML file with folds, blends and validation")
    data_path: tuple[str, ...] = Field(
        (),
        description="instead of a fold file: datasets, or weights and datasets in turn, in "
        "Megatron-LM's order of samples (needs train_iters)",
    )
    data_args_path: str | None = Field(None, description="a file that holds the list of data_path")
    train_data_path: tuple[str, ...] = Field((), description="as data_path, for training alone")
    valid_data_path: tuple[str, ...] = Field((), description="as data_path, for validation alone")
    test_data_path: tuple[str, ...] = Field((), description="as data_path, for the test set alone")
    per_split_data_args_path: str | None = Field(
        None, description="a JSON file with the lists of train, valid and test"
    )
    split: str | None = Field(
        None, description="shares of train, valid and test in data_path: 969,30,1 if not given"
    )
    skip_iterations: str | None = Field(
        None,
        description="iterations whose samples are left out, such as 1050-1060,2000; counted as "
        "the run counted them that is gone on with (docs/folds.md)",
    )
    data_cache_path: str | None = Field(
        None, description="folder for sample indices; beside the fold file when not given"
    )
    seq_length: PositiveInt = Field(2048, description="tokens per sample, s")
    tokenizer_type: (
        Literal[
            "SentencePieceTokenizer",
            "GPTSentencePieceTokenizer",
            "Llama2Tokenizer",
            "HuggingFaceTokenizer",
            "GPT2BPETokenizer",
            "TikTokenizer",
            "ByteLevelTokenizer",
            "NullTokenizer",
        ]
        | None
    ) = Field(None, description="kind of tokenizer the datasets were made with")
    tokenizer_model: str | None = Field(
        None,
        description="SentencePiece model, tokenizer.json, Hugging Face folder or TikTokenizer's "
        "JSON list",
    )
    merge_file: str | None = Field(
        None, description="merges of GPT2BPETokenizer; found next to its vocabulary when not given"
    )
    tiktoken_pattern: Literal["v1", "v2"] = Field(
        "v2", description="how TikTokenizer cuts texts before it merges bytes"
    )
    tiktoken_num_special_tokens: PositiveInt = Field(
        1000, description="ids of TikTokenizer before those of its file"
    )
    tiktoken_special_tokens: tuple[str, ...] = Field(
        (), description="names of TikTokenizer's first ids; <unk> <s> </s> when not given"
    )
    allow_tokenizer_mismatch: bool = Field(
        False,
        description="train on datasets whose manifests record another tokenizer than the run's",
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
    train_samples: PositiveInt | None = Field(
        None, description="samples to train on, in place of train_iters"
    )
    train_tokens: PositiveInt | None = Field(
        None,
        description="tokens to train on; with train_iters or train_samples, whichever is reached "
        "first ends the run",
    )
    eval_interval: PositiveInt | None = Field(
        None, description="validate every so many iterations; only at the end when not given"
    )
    eval_iters: NonNegativeInt = Field(
        10, description="batches per validation set; 0 turns validation off"
    )
    eval_only: bool = Field(
        False, description="validate the checkpoint of --load and end, without training"
    )
    seed: NonNegativeInt = Field(1234, description="of initial weights and dropout")
    bf16: bool = Field(False, description="train in bfloat16 with fp32 main weights")
    fp16: bool = Field(False, description="train in float16 with dynamic loss scaling")
    z_loss_strength: NonNegativeFloat = Field(
        0.0,
        description="adds this x log(Z)^2 to the loss, Z the softmax's sum; LLM-jp took 1e-4",
    )
    deterministic_mode: bool = Field(
        False, description="bit-identical losses from run to run; slower on GPUs"
    )


class CheckpointConfig(Section):
    """The run at rest."""

    save: str | None = Field(None, description="folder for checkpoints")
    load: str | None = Field(
        None, description="folder to resume from; --save when that holds a checkpoint"
    )
    save_interval: PositiveInt | None = Field(None, description="save every so many iterations")
    save_interval_tokens: PositiveInt | None = Field(
        None, description="save whenever so many more tokens were trained on"
    )
    save_interval_minutes: PositiveFloat | None = Field(
        None, description="save when so many minutes have passed since the last save"
    )
    save_policy: Literal["llm-jp"] | None = Field(
        None,
        description="save at 1..9, 10..90 by 10, 100..900 by 100, then every 1000 iterations",
    )
    save_fold_ends: bool = Field(
        True, description="save when a fold ends; --keep-last and --keep-every leave these alone"
    )
    keep_last: PositiveInt | None = Field(
        None, description="checkpoints to keep, the newest ones; all when not given"
    )
    keep_every: PositiveInt | None = Field(
        None, description="with keep_last, keep iterations divisible by this for good, too"
    )
    async_save: bool = Field(
        False, description="write checkpoints while training goes on, from a copy in host memory"
    )
    verify_checkpoint: bool = Field(
        False,
        description="compare all checksums before resuming; done by itself after a killed run",
    )
    finetune: bool = Field(
        False, description="load weights only: a new optimizer, from iteration 0"
    )
    override_resume: tuple[str, ...] = Field(
        (),
        description="fields that may differ from the checkpoint's, and `folds` or "
        "`tokenizer` for other contents",
    )


class LoggingConfig(Section):
    """What a person sees of the run."""

    log_interval: PositiveInt = Field(10, description="iterations per log line")
    tensorboard_dir: str | None = Field(
        None, description="tensorboard events; SAVE/tensorboard when not given"
    )
    log_params_norm: bool = Field(True, description="log the norm of all parameters")
    wandb_project: str | None = Field(
        None, description="Weights & Biases project; not used when not given"
    )
    wandb_entity: str | None = Field(None, description="Weights & Biases user or team")
    wandb_exp_name: str | None = Field(
        None, description="Weights & Biases name of the run; the save folder's when not given"
    )
    gpu_peak_tflops: float | None = Field(
        None,
        gt=0.0,
        description="peak TFLOP/s of one device for the MFU; known for common GPUs",
    )


class OptimizerConfig(Section):
    """Optimizer and learning rate."""

    optimizer: Literal["adam", "sgd"] = Field("adam", description="adam is AdamW, as in Megatron")
    lr: NonNegativeFloat = Field(3e-4, description="peak learning rate")
    min_lr: NonNegativeFloat = Field(0.0, description="learning rate the decay ends at")
    lr_decay_style: LRDecayStyle = Field("cosine", description="shape of the decay")
    lr_decay_iters: PositiveInt | None = Field(
        None, description="iteration the decay ends at, warm-up included; train_iters if not given"
    )
    lr_decay_samples: PositiveInt | None = Field(None, description="lr_decay_iters in samples")
    lr_decay_tokens: PositiveInt | None = Field(None, description="lr_decay_iters in tokens")
    lr_decay_fraction: float | None = Field(
        None, gt=0.0, description="decay's end as a part of the run, where no other end is given"
    )
    lr_warmup_iters: NonNegativeInt = Field(
        0, description="iterations of linear warm-up from lr_warmup_init"
    )
    lr_warmup_samples: PositiveInt | None = Field(None, description="lr_warmup_iters in samples")
    lr_warmup_tokens: PositiveInt | None = Field(None, description="lr_warmup_iters in tokens")
    lr_warmup_fraction: float | None = Field(
        None, ge=0.0, lt=1.0, description="warm-up as a part of the decay's length"
    )
    lr_warmup_shorten: bool = Field(
        False,
        description="shorten a warm-up that is as long as the decay to a tenth of it; on where a "
        "preset or file gives the warm-up",
    )
    lr_warmup_init: NonNegativeFloat = Field(0.0, description="learning rate warm-up starts at")
    lr_wsd_decay_style: WSDDecayStyle = Field("exponential", description="shape of the tail of WSD")
    lr_wsd_decay_iters: PositiveInt | None = Field(None, description="length of the tail of WSD")
    lr_wsd_decay_samples: PositiveInt | None = Field(
        None, description="lr_wsd_decay_iters in samples"
    )
    lr_wsd_decay_tokens: PositiveInt | None = Field(
        None, description="lr_wsd_decay_iters in tokens"
    )
    lr_wsd_decay_fraction: float | None = Field(
        None, gt=0.0, le=1.0, description="tail of WSD as a part of the decay's length"
    )
    weight_decay: NonNegativeFloat = Field(0.1, description="not applied to biases and norms")
    start_weight_decay: NonNegativeFloat | None = Field(
        None, description="weight decay at the start; weight_decay when not given"
    )
    end_weight_decay: NonNegativeFloat | None = Field(
        None, description="weight decay at the end; weight_decay when not given"
    )
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how weight decay goes from its start to its end"
    )
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0, description="first moment's decay")
    adam_beta2: float = Field(0.95, ge=0.0, lt=1.0, description="second moment's decay")
    adam_eps: float = Field(1e-8, gt=0.0, description="Adam's epsilon")
    sgd_momentum: float = Field(0.9, ge=0.0, lt=1.0, description="momentum of SGD")
    clip_grad: NonNegativeFloat = Field(1.0, description="largest gradient norm; 0 for no clipping")
    loss_scale: float | None = Field(
        None, gt=0.0, description="fp16: a fixed loss scale; dynamic when not given"
    )
    initial_loss_scale: float = Field(2.0**32, gt=0.0, description="fp16: first loss scale")
    min_loss_scale: float = Field(1.0, gt=0.0, description="fp16: smallest loss scale")
    loss_scale_window: PositiveInt = Field(1000, description="fp16: good steps before raising it")
    hysteresis: PositiveInt = Field(2, description="fp16: bad steps before lowering it")
    override_opt_param_scheduler: bool = Field(
        False, description="at resume, take the schedule of this configuration"
    )

    @field_validator("lr_warmup_samples", "lr_warmup_tokens", mode="before")
    @classmethod
    def _zero_is_none(cls, value: Any) -> Any:
        """Megatron-LM writes 0 for a unit that is not used."""
        return None if value in (0, "0") else value


class FaultsConfig(Section):
    """Stops, bad numbers and hangs."""

    exit_interval: PositiveInt | None = Field(
        None, description="save and stop (exit code 3) at iterations divisible by this"
    )
    exit_duration_in_mins: PositiveFloat | None = Field(
        None,
        description="save and stop (exit code 3) so many minutes after the start of the process; "
        "leave time for the save itself",
    )
    max_bad_steps: PositiveInt = Field(
        5,
        description="steps in a row with a NaN or Inf, none of them applied, that end the run "
        "(exit code 1)",
    )
    max_overflow_steps: PositiveInt = Field(
        25,
        description="fp16: overflows in a row that lower the loss scale; each further one is a bad "
        "step, as is one at the lowest loss scale",
    )
    spike_action: Literal["off", "warn", "skip", "rollback"] = Field(
        "warn",
        description="on a gradient norm far above the usual: tell; leave the batch out; or go back "
        "to the last checkpoint and leave out the batches that led there",
    )
    spike_threshold: float = Field(
        10.0, gt=1.0, description="times the median of the last 128 norms that make a spike"
    )
    spike_skip_iterations: PositiveInt = Field(
        20, description="batches that a rollback leaves out, up to and with the spike's"
    )
    max_spikes: PositiveInt = Field(
        8,
        description="batches among the last 128 steps that spike_action skip may skip; so "
        "many end the run (exit code 1)",
    )
    max_rollbacks: PositiveInt = Field(
        3,
        description="rollbacks within 1,000 iterations; one more spike ends the run (exit code 1)",
    )
    hang_timeout_minutes: NonNegativeFloat | None = Field(
        None,
        description="no progress for so long ends the run and names the rank; 0 for never, 80% of "
        "distributed_timeout_minutes when not given",
    )
