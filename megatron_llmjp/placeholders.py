"""Placeholders for what a planned run needs and this machine lacks: packages, tokenizer, data.

The modes that do not train report each placeholder as a note, and check the rest. Without torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_llmjp.config.loading import (
    ConfigLayers,
    build_config,
    config_differences,
    preset_names,
    read_preset,
    replace_fields,
)
from megatron_llmjp.config.schema import SECTION_OF, Config, ModelConfig
from megatron_llmjp.data.batch_size import BatchSizeSchedule, planned_samples
from megatron_llmjp.data.dataset_tokenizers import recorded_tokenizer
from megatron_llmjp.data.folds.data_path import fold_file_from_flags, given_data_flags
from megatron_llmjp.data.folds.declared_sizes import is_missing
from megatron_llmjp.data.folds.loading import read_fold_file
from megatron_llmjp.data.indexed_dataset import bin_path, idx_path
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import why_not_writable
from megatron_llmjp.run_data import load_run_tokenizer

_WITHOUT_FILE = (None, "ByteLevelTokenizer", "NullTokenizer")
_FILES = ("fold_file", "data_args_path", "per_split_data_args_path")


@dataclass(frozen=True)
class PlaceholderConfig:
    """A configuration that can be resolved on this machine."""

    config: Config
    notes: tuple[str, ...]
    """What is missing here, and therefore not checked."""
    replaced: dict[str, Any]
    """The values that placeholders replace, by field."""

    @property
    def tokenizer_is_placeholder(self) -> bool:
        """Whether the tokenizer was replaced: the datasets cannot be compared with it."""
        return "tokenizer_type" in self.replaced

    def restored(self, config: Config) -> Config:
        """Return a configuration that was resolved from this one with the given values restored."""
        return replace_fields(config, **self.replaced)


def substitute_missing(config: Config, data: bool = False) -> PlaceholderConfig:
    """Replace what this machine lacks by placeholders.

    Args:
        config: configuration of the run.
        data: whether datasets and folders may be missing too, and the vocabulary size may be taken
            from a preset of the same model: for estimates.

    Raises:
        UserError: the vocabulary size is not known.
    """
    changes: dict[str, Any] = {}
    notes: list[str] = []
    if _needs_wandb(config):
        notes.append("the package wandb is not installed here; the run needs it")
    if _needs_transformer_engine(config):
        changes["transformer_impl"] = None
        notes.append("Transformer Engine is not installed here; the run needs it")
    if data:
        notes += _replace_folders(config, changes)
        notes += _replace_data(config, changes)
    notes += _replace_tokenizer(config, changes, data)
    given = {
        name: getattr(getattr(config, SECTION_OF[name]), name)
        for name in changes
        if name != "vocab_size"
    }
    return PlaceholderConfig(replace_fields(config, **changes), tuple(notes), given)


def check_packages(config: Config) -> None:
    """Check that the packages a run needs are installed.

    Raises:
        UserError: with the missing package.
    """
    if _needs_wandb(config):
        raise UserError("wandb_project needs the package wandb: `pip install wandb`, or remove it")
    if _needs_transformer_engine(config):
        raise UserError(
            "transformer_impl transformer_engine needs Transformer Engine, which is not installed: "
            "install it (docs/installation.md), or omit the option to use torch's layers"
        )


def _needs_wandb(config: Config) -> bool:
    return bool(config.logging.wandb_project) and find_spec("wandb") is None


def _needs_transformer_engine(config: Config) -> bool:
    requested = config.training.transformer_impl == "transformer_engine"
    return requested and find_spec("transformer_engine") is None


def _replace_tokenizer(config: Config, changes: dict[str, Any], data: bool) -> Iterator[str]:
    """Find the vocabulary size where the tokenizer is missing."""
    kind, model = config.data.tokenizer_type, config.data.tokenizer_model
    is_absent = kind not in _WITHOUT_FILE and model is not None and not os.path.lexists(model)
    size, source = config.model.vocab_size, ""
    if size is None and config.model.padded_vocab_size is not None:
        size, source = config.model.padded_vocab_size, "--padded-vocab-size"
    if size is None and kind is not None and not is_absent:
        if not data:
            return
        tokenizer = load_run_tokenizer(config)
        size = tokenizer.vocab_size if tokenizer else None
    if size is None:
        size, source = _vocabulary_of_data(config) or (None, "")
    if size is None and data:
        size, source = _vocabulary_of_presets(config) or (None, "")
    if size is None and (is_absent or data):
        why = f"--tokenizer-model {model} is missing" if is_absent else "no tokenizer is given"
        raise UserError(
            f"the vocabulary size is not known, and {why}: pass --vocab-size, "
            "--padded-vocab-size, a preset that has it, or a tokenizer"
        )
    if size is not None and config.model.vocab_size is None and (is_absent or data):
        changes["vocab_size"] = size
        if source:
            yield f"vocabulary size {size:,} taken from {source}; --vocab-size overrides it"
    if is_absent:
        changes |= {"tokenizer_type": "NullTokenizer", "tokenizer_model": None}
        changes["tiktoken_special_tokens"] = ()
        changes["allow_tokenizer_mismatch"] = True
        # A checkpoint to resume from is not compared with a placeholder.
        assumed = ("vocab_size",) if config.model.vocab_size is None else ()
        others = ("tokenizer_type", "tokenizer", "tiktoken_special_tokens")
        changes["override_resume"] = (*config.checkpoint.override_resume, *others, *assumed)
        yield f"tokenizer {model} is missing here and is not checked; the run needs it"


def _vocabulary_of_data(config: Config) -> tuple[int, str] | None:
    """Return the vocabulary size that preprocess_data recorded with a dataset, and its source."""
    for path in _datasets(config):
        size = (recorded_tokenizer(path) or {}).get("vocab_size")
        if isinstance(size, int):
            return size, f"{path}.json"
    return None


def _vocabulary_of_presets(config: Config) -> tuple[int, str] | None:
    """Return the largest vocabulary size of the presets with otherwise the same model."""
    others = set(ModelConfig.model_fields) - {"vocab_size", "padded_vocab_size"}
    found = []
    for name in preset_names():
        layers = ConfigLayers()
        read_preset(layers, name, name)
        preset = build_config(layers)
        size = preset.model.vocab_size
        if size is not None and not others & config_differences(preset, config).keys():
            found.append((size, f"preset {name}, whose model is the same"))
    return max(found, default=None)


def _replace_folders(config: Config, changes: dict[str, Any]) -> Iterator[str]:
    """Replace a missing checkpoint to load, and note an unwritable save folder."""
    load = config.checkpoint.load
    if load is not None and not Path(load).exists():
        changes |= {"load": None, "finetune": False}
        yield f"--load {load} is missing here and is not checked"
    save = config.checkpoint.save
    if save is not None and why_not_writable(Path(save)) is not None:
        yield f"--save {save} cannot be written here; the run needs it"


def _replace_data(config: Config, changes: dict[str, Any]) -> Iterator[str]:
    """Remove the data from the configuration if a part is missing, and has no declared size."""
    files = [str(value) for name in _FILES if (value := getattr(config.data, name))]
    missing = [file for file in files if not Path(file).exists()]
    declared = []
    for prefix, is_declared in _datasets(config).items():
        if is_declared and is_missing(prefix):
            declared.append(prefix)
        else:
            missing += [str(p) for p in (idx_path(prefix), bin_path(prefix)) if not p.exists()]
    if missing:
        more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
        given = [
            flag.removeprefix("--").replace("-", "_") for flag in given_data_flags(config.data)
        ]
        empty = type(config.data)()
        changes |= {name: getattr(empty, name) for name in [*given, "fold_file"]}
        yield f"the data is missing here and is not checked: {missing[0]}{more}"
    elif declared:
        more = f" and {len(declared) - 1} more" if len(declared) > 1 else ""
        yield f"datasets are missing here, their declared sizes are used: {declared[0]}{more}"


def _datasets(config: Config) -> dict[str, bool]:
    """Return the datasets of the run, and whether the fold file declares their sizes.

    None if the file that lists them is missing.
    """
    data = config.data
    if any(value and not Path(value).exists() for value in (getattr(data, n) for n in _FILES)):
        return {}
    if given_data_flags(data):
        samples = planned_samples(config, BatchSizeSchedule(config)) or 1
        file = fold_file_from_flags(data, samples, config.training.seed)
    elif data.fold_file:
        file = read_fold_file(Path(data.fold_file))
    else:
        return {}
    return {path: file.declared_tokens(path) is not None for path in file.dataset_paths()}
