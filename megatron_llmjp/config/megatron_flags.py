"""Flags of Megatron-LM and Megatron-DeepSpeed: names, values and defaults mapped to fields.

Flags named after a field need no entry, since the command line is generated from the schema. Flags
that set nothing are in ``unused_flags.py`` and ``refused_flags.py``. Names are written with dashes;
Megatron-LM's mixed spelling (``--override-opt_param-scheduler``) is accepted too.

:func:`interpret_flags` interprets the flags that the schema does not define. A command line that
defines its model by flags alone starts from Megatron-LM's defaults (:func:`set_megatron_defaults`),
so that a launch script of Megatron-LM or Megatron-DeepSpeed trains the same model here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from megatron_llmjp.config.expert_flags import EXPERT_FLAGS, interpret_expert_flags
from megatron_llmjp.config.loading import ConfigLayers
from megatron_llmjp.config.refused_flags import FOREIGN, NEWER, REFUSED, REFUSED_FAMILIES
from megatron_llmjp.config.schema import SECTION_OF
from megatron_llmjp.config.tokenizer_types import TOKENIZER_TYPE_ALIASES
from megatron_llmjp.config.unused_flags import (
    NOT_NEEDED,
    NOT_NEEDED_FAMILIES,
    NOT_OFFERED,
    NOT_OFFERED_FAMILIES,
)
from megatron_llmjp.errors import UserError, did_you_mean


class Alias(NamedTuple):
    """A switch that sets fields."""

    sets: dict[str, Any]
    help: str


class Choice(NamedTuple):
    """A flag whose values set fields, have no effect, or are refused.

    The entry of a value is the fields it sets, or why it has no effect.
    """

    values: dict[str, dict[str, Any] | str]
    otherwise: str
    """Remedy for any other value."""


LLMJP_Z_LOSS = 1e-4
"""Strength of ``--use-z-loss``, a constant in LLM-jp's fork of Megatron-LM (branch nii-geniac)."""

SWITCH_ALIASES: dict[str, Alias] = {
    "--swiglu": Alias(
        {"activation_function": "swiglu"},
        "use the SwiGLU activation (--activation-function swiglu)",
    ),
    "--openai-gelu": Alias(
        {"activation_function": "gelu_tanh"}, "use the tanh approximation of GELU"
    ),
    "--disable-bias-linear": Alias({"add_bias_linear": False}, "omit biases in linear layers"),
    "--use-rotary-position-embeddings": Alias(
        {"position_embedding_type": "rope"}, "use rotary position embeddings"
    ),
    "--use-z-loss": Alias({"z_loss_strength": LLMJP_Z_LOSS}, "same as --z-loss-strength 1e-4"),
    "--recompute-activations": Alias(
        {"recompute_granularity": "selective"}, "recompute attention in the backward pass"
    ),
    "--checkpoint-activations": Alias(
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
        "recompute every layer in the backward pass (Megatron-DeepSpeed)",
    ),
    "--disable-manual-gc-eval": Alias({"manual_gc_eval": False}, "same as --no-manual-gc-eval"),
    "--skip-train": Alias({"eval_only": True}, "same as --eval-only"),
}

RENAMED_FLAGS: dict[str, str] = {
    "--layernorm-epsilon": "norm_epsilon",
    "--rope-theta": "rotary_base",
    "--num-experts": "num_moe_experts",
    "--encoder-num-layers": "num_layers",
    "--encoder-seq-length": "seq_length",
    "--num-key-value-heads": "num_query_groups",
    "--num-virtual-stages-per-pipeline-rank": "virtual_pipeline_model_parallel_size",
    "--checkpoint-num-layers": "recompute_num_layers",
    "--wandb-name": "wandb_exp_name",
    "--tokenizer-special-tokens": "tiktoken_special_tokens",
}
"""Field that a flag with a value sets, by flag."""

RENAMED_VALUES: dict[str, dict[str, str]] = {
    "tokenizer_type": TOKENIZER_TYPE_ALIASES,
    # Adam here is AdamW, as in Megatron-LM.
    "optimizer": {"adamw": "adam"},
    "position_embedding_type": {"rotary": "rope", "learned": "learned_absolute"},
    "moe_token_dispatcher_type": {"flex": "alltoall"},
}
"""This program's name of a value, by field and other programs' name in lower case."""

RENAMED_VALUE_NOTES: dict[str, dict[str, str]] = {
    "moe_token_dispatcher_type": {
        "flex": "alltoall is used, which computes the same; DeepEP and HybridEP are not supported"
    },
}
"""Notes on values that are replaced by others with the same result."""

_ONE_DATASET = "datasets are always .idx/.bin pairs as preprocess_data writes them"
_ONE_GROUP = "the optimizer is sharded over the whole data-parallel group"
_FP32_STATE = "main weights, gradients and moments are kept in fp32"

CHOICES: dict[str, Choice] = {
    "--zero-stage": Choice(
        {
            "0": {"use_distributed_optimizer": False},
            "1": {"use_distributed_optimizer": True},
        },
        "ZeRO 2 and 3 are not available; use --zero-stage 1 and shard the model with "
        "--tensor-model-parallel-size and --pipeline-model-parallel-size",
    ),
    "--data-impl": Choice(
        {"mmap": _ONE_DATASET, "infer": _ONE_DATASET},
        "rebuild the dataset with preprocess_data, which writes mmap datasets",
    ),
    "--dataloader-type": Choice(
        {"single": "samples are read in the order of the fold schedule"},
        "remove it: each epoch of a dataset is shuffled separately",
    ),
    "--non-persistent-ckpt-type": Choice(
        {"global": "non-persistent checkpoints are complete, and in the folder of the others"},
        "remove it: non-persistent checkpoints are complete ones in the save folder",
    ),
    "--ds-sequence-parallel-size": Choice(
        {"1": "sequences are not split"}, "split sequences with --sequence-parallel over TP"
    ),
    "--num-distributed-optimizer-instances": Choice({"1": _ONE_GROUP}, f"remove it: {_ONE_GROUP}"),
    "--data-parallel-sharding-strategy": Choice(
        {
            "no_shard": {"use_distributed_optimizer": False},
            "optim": {"use_distributed_optimizer": True},
        },
        "shard the optimizer with --use-distributed-optimizer, the model with TP and PP",
    ),
    "--main-params-dtype": Choice({"fp32": _FP32_STATE}, f"remove it: {_FP32_STATE}"),
    "--main-grads-dtype": Choice({"fp32": _FP32_STATE}, f"remove it: {_FP32_STATE}"),
    "--exp-avg-dtype": Choice({"fp32": _FP32_STATE}, f"remove it: {_FP32_STATE}"),
    "--exp-avg-sq-dtype": Choice({"fp32": _FP32_STATE}, f"remove it: {_FP32_STATE}"),
    "--rope-type": Choice({"rope": {"position_embedding_type": "rope"}}, "use plain rope"),
    "--vocab-extra-ids": Choice(
        {"0": "no ids are added"}, "remove it: the ids are the tokenizer's"
    ),
    "--distributed-backend": Choice(
        {
            "nccl": "nccl is used on GPUs, gloo on CPUs",
            "gloo": "nccl is used on GPUs, gloo on CPUs",
        },
        "remove it: nccl is used on GPUs, gloo on CPUs",
    ),
}


MEGATRON_DEFAULTS: dict[str, Any] = {
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "add_bias_linear": True,
    "untie_embeddings_and_output_weights": False,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "weight_decay": 0.01,
    "adam_beta2": 0.999,
    "lr_decay_style": "linear",
    "eval_interval": 1000,
    "eval_iters": 100,
    "log_interval": 100,
}
"""Megatron-LM's defaults where they differ from the schema's (arguments.py, core 0.6 to 0.16)."""

STAGE_LAYERS = "--num-layers-per-virtual-pipeline-stage"
EXACT_GELU = "--no-bias-gelu-fusion"
VOCABULARY = "--vocab-file"
GROUPED = "--group-query-attention"
RETAINED = "--save-retain-interval"
WEIGHTS = "--pretrained-checkpoint"
NO_OPTIMIZER = "--no-load-optim"
DEPENDENT_FLAGS: dict[str, str] = {
    STAGE_LAYERS: "virtual_pipeline_model_parallel_size, computed from num_layers and the stages",
    EXACT_GELU: "activation_function: gelu instead of gelu_tanh",
    VOCABULARY: "tokenizer_model of GPT2BPETokenizer, or a SentencePiece model (*.model)",
    GROUPED: "num_query_groups: 1, unless it is given",
    RETAINED: "keep_every, and keep_last: 1",
    WEIGHTS: "load, and finetune: true",
    NO_OPTIMIZER: "nothing; it requires --finetune, which implies it",
}
"""What a flag sets whose effect depends on other values: see :func:`apply_dependent_flags`."""


@dataclass
class ForeignFlags:
    """Interpretation of the flags that the schema does not define."""

    sets: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """Value and origin of each field that they set."""
    dependent: dict[str, str] = field(default_factory=dict)
    """Given flags of :data:`DEPENDENT_FLAGS` with their values."""
    experts: list[str] = field(default_factory=list)
    """Given flags of :data:`EXPERT_FLAGS`."""
    notes: list[str] = field(default_factory=list)
    """One line for each flag without effect."""
    problems: list[str] = field(default_factory=list)
    """One line for each flag that is unknown or refused."""


def interpret_flags(words: Sequence[str], possible: Iterable[str]) -> ForeignFlags:
    """Interpret flags that the schema does not define.

    Args:
        words: these flags and their values, in order.
        possible: all flags of the schema, for suggestions.
    """
    found = ForeignFlags()
    problems = found.problems
    for flag, values in _flags(words, problems):
        value = " ".join(values)
        if flag in DEPENDENT_FLAGS:
            found.dependent[flag] = value
        elif flag in CHOICES:
            choice = CHOICES[flag].values.get(value.removesuffix(".0").lower())
            if isinstance(choice, dict):
                found.sets |= {name: (sets, f"flag {flag}") for name, sets in choice.items()}
            elif choice is not None:
                found.notes.append(f"{flag} {value} is not needed here: {choice}")
            else:
                problems.append(f"{flag} {value} is not supported: {CHOICES[flag].otherwise}")
        elif flag in EXPERT_FLAGS:
            found.experts.append(flag)
        elif (remedy := _lookup(flag, REFUSED, REFUSED_FAMILIES)) is not None:
            problems.append(f"{flag} is not supported: {remedy}")
        elif (why := _lookup(flag, NOT_NEEDED, NOT_NEEDED_FAMILIES)) is not None:
            found.notes.append(f"{flag} is not needed here: {why}")
        elif (instead := _lookup(flag, NOT_OFFERED, NOT_OFFERED_FAMILIES)) is not None:
            found.notes.append(f"{flag} is not offered: {instead}")
        else:
            known = (
                *possible,
                *EXPERT_FLAGS,
                *DEPENDENT_FLAGS,
                *CHOICES,
                *NOT_NEEDED,
                *NOT_OFFERED,
            )
            problems.append(_unknown(flag, known))
    found.notes = list(dict.fromkeys(found.notes))
    return found


def _unknown(flag: str, possible: Sequence[str]) -> str:
    """Return a message on an unknown flag: of another program, a newer Megatron-LM, or misspelt."""
    if flag in FOREIGN:
        return f"unknown flag {flag}; {FOREIGN[flag]} (--help lists all flags)"
    if flag in NEWER:
        return (
            f"unknown flag {flag}: added to Megatron-LM with megatron-core {NEWER[flag]}, but this "
            f"program uses {_core_version()}; remove it"
        )
    hint = did_you_mean(flag, possible)
    misspelt = difflib.get_close_matches(flag, FOREIGN, n=1, cutoff=0.9)
    if not hint and misspelt:
        hint = f"; {FOREIGN[misspelt[0]]}"
    return f"unknown flag {flag}{hint} (--help lists all flags)"


def _core_version() -> str:
    try:
        return f"megatron-core {version('megatron-core')}"
    except PackageNotFoundError:
        return "an older version"


def set_megatron_defaults(layers: ConfigLayers) -> None:
    """Add Megatron-LM's defaults with the lowest priority."""
    for name, value in MEGATRON_DEFAULTS.items():
        if name not in layers.origin:
            layers.set(name, value, "Megatron-LM's default")


def apply_dependent_flags(
    layers: ConfigLayers, foreign: ForeignFlags, by_flags_alone: bool
) -> None:
    """Set the fields that depend on several flags, as Megatron-LM's ``validate_args`` does.

    Args:
        layers: all given values; completed here.
        foreign: its flags of :data:`DEPENDENT_FLAGS`; a note is added for each redundant one.
        by_flags_alone: whether the model is defined without preset or file.

    Raises:
        UserError: a value contradicts others.
    """
    dependent = foreign.dependent
    has_experts = _value(layers, "num_moe_experts", None) not in (None, 1, "1")
    foreign.notes += interpret_expert_flags(foreign.experts, has_experts)
    if by_flags_alone:
        _complete_model(layers, EXACT_GELU in dependent)
    elif EXACT_GELU in dependent and _value(layers, "activation_function", None) == "gelu_tanh":
        layers.set("activation_function", "gelu", f"flag {EXACT_GELU}")
    if GROUPED in dependent and "num_query_groups" not in layers.origin:
        layers.set("num_query_groups", 1, f"flag {GROUPED}")
    if RETAINED in dependent:
        # Megatron-LM keeps the newest checkpoint and those at multiples of the interval.
        layers.set("keep_last", 1, f"flag {RETAINED}")
        layers.set("keep_every", dependent[RETAINED], f"flag {RETAINED}")
    if WEIGHTS in dependent:
        layers.set("load", dependent[WEIGHTS], f"flag {WEIGHTS}")
        layers.set("finetune", True, f"flag {WEIGHTS}")
    if NO_OPTIMIZER in dependent:
        if not _value(layers, "finetune", False):
            raise UserError(
                f"{NO_OPTIMIZER} is not supported: load weights only with --finetune (iteration "
                "0, new optimizer)"
            )
        foreign.notes.append(f"{NO_OPTIMIZER} is not needed here: --finetune implies it")
    if VOCABULARY in dependent:
        _set_vocabulary(layers, dependent[VOCABULARY])
    if STAGE_LAYERS in dependent:
        _set_virtual_stages(layers, dependent[STAGE_LAYERS])


def _complete_model(layers: ConfigLayers, exact_gelu: bool) -> None:
    """Set the fields that Megatron-LM derives for a model defined by flags."""
    origin = "Megatron-LM's default"
    activation = _value(layers, "activation_function", None)
    if activation is None:
        # Megatron's fused bias-GELU is the tanh approximation; it requires the bias.
        fused = not exact_gelu and _value(layers, "add_bias_linear", True)
        layers.set("activation_function", "gelu_tanh" if fused else "gelu", origin)
    hidden = _number(layers, "hidden_size", 0)
    if activation == "swiglu" and hidden and "ffn_hidden_size" not in layers.origin:
        layers.set("ffn_hidden_size", int(4 * hidden * 2 / 3 / 64) * 64, origin)
    ids = _number(layers, "vocab_size", 0)
    if ids and _value(layers, "tokenizer_type", None) == "NullTokenizer":
        # Megatron-LM's NullTokenizer adds EOD after the given number of ids.
        layers.set("vocab_size", ids + 1, "flag --vocab-size, and EOD")


def _set_vocabulary(layers: ConfigLayers, path: str) -> None:
    """Set the vocabulary of GPT2BPETokenizer, or Megatron-DeepSpeed's SentencePiece model."""
    kind = _value(layers, "tokenizer_type", None)
    if kind is None and not path.endswith(".model"):
        # What pretrain_gpt.py of Megatron-LM and Megatron-DeepSpeed reads where no type is given.
        kind = "GPT2BPETokenizer"
        layers.set("tokenizer_type", kind, "Megatron-LM's default")
    if kind != "GPT2BPETokenizer" and not path.endswith(".model"):
        raise UserError(
            f"{VOCABULARY} {path}: requires --tokenizer-type GPT2BPETokenizer, or a SentencePiece "
            f"model (*.model); {kind} is given"
        )
    layers.set("tokenizer_model", path, f"flag {VOCABULARY}")


def _set_virtual_stages(layers: ConfigLayers, text: str) -> None:
    total = _number(layers, "num_layers", 0)
    stages = _number(layers, "pipeline_model_parallel_size", 1)
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"{STAGE_LAYERS} {text}: expected a number of layers")
    if total % (stages * int(text)):
        raise UserError(
            f"{STAGE_LAYERS} {text}: {total} layers are not divisible into chunks of {text} over "
            f"{stages} stages; pass --virtual-pipeline-model-parallel-size, the number of chunks "
            "per stage"
        )
    chunks = total // stages // int(text)
    layers.set(
        "virtual_pipeline_model_parallel_size",
        chunks if chunks > 1 else None,
        f"flag {STAGE_LAYERS}",
    )


def _flags(words: Sequence[str], problems: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the flags, each with its values."""
    flag = ""
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            if flag:
                yield flag, values
            flag, equals, value = word.partition("=")
            values = [value] if equals else []
        elif flag:
            values.append(word)
        else:
            problems.append(f"unexpected argument '{word}': values follow a flag, as in --lr 3e-4")
    if flag:
        yield flag, values


def _lookup(flag: str, flags: dict[str, str], families: dict[str, str]) -> str | None:
    if flag in flags:
        return flags[flag]
    return next((text for start, text in families.items() if flag.startswith(start)), None)


def _value(layers: ConfigLayers, name: str, otherwise: Any) -> Any:
    return layers.values.get(SECTION_OF[name], {}).get(name, otherwise)


def _number(layers: ConfigLayers, name: str, otherwise: int) -> int:
    """Return a positive integer, or ``otherwise``; validation reports invalid values."""
    text = str(_value(layers, name, otherwise))
    return int(text) if text.isdigit() and int(text) > 0 else otherwise
