"""Stand-ins for what a planned run has and this machine lacks: packages, tokenizer, data, folders.

The modes that train nothing report each as a note, and check the rest. Without torch.
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
from megatron_llmjp.data.folds.loading import read_fold_file
from megatron_llmjp.data.indexed_dataset import bin_path, idx_path
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import why_not_writable
from megatron_llmjp.run_data import load_run_tokenizer

_WITHOUT_FILE = (None, "ByteLevelTokenizer", "NullTokenizer")
_FILES = ("fold_file", "data_args_path", "per_split_data_args_path")


@dataclass(frozen=True)
class PlaceholderConfig:
    """A configuration that can be planned on this machine."""

    config: Config
    notes: tuple[str, ...]
    """What is not here, and therefore not checked."""
    replaced: dict[str, Any]
    """By field, the value that a stand-in replaces."""

    @property
    def tokenizer_is_placeholder(self) -> bool:
        """Whether a stand-in has replaced the tokenizer, which says nothing about the datasets."""
        return "tokenizer_type" in self.replaced

    def restored(self, config: Config) -> Config:
        """A configuration that was resolved from this one, with the given values again."""
        return replace_fields(config, **self.replaced)


def substitute_missing(config: Config, data: bool = False) -> PlaceholderConfig:
    """Replace what this machine lacks.

    Args:
        config: the run's.
        data: whether datasets and folders may be missing, too, and the size of the vocabulary may
            be taken from a preset of the same model: for a run on paper.

    Raises:
        UserError: the vocabulary is not known.
    """
    changes: dict[str, Any] = {}
    notes: list[str] = []
    if _needs_wandb(config):
        notes.append("the package wandb is not installed here; the run needs it")
    if data:
        notes += _without_folders(config, changes)
        notes += _without_data(config, changes)
    notes += _without_tokenizer(config, changes, data)
    given = {
        name: getattr(getattr(config, SECTION_OF[name]), name)
        for name in changes
        if name != "vocab_size"
    }
    return PlaceholderConfig(replace_fields(config, **changes), tuple(notes), given)


def check_packages(config: Config) -> None:
    """Refuse to start a run that needs a package which is not installed.

    Raises:
        UserError: naming it.
    """
    if _needs_wandb(config):
        raise UserError("wandb_project needs the package wandb: `pip install wandb`, or remove it")


def _needs_wandb(config: Config) -> bool:
    return bool(config.logging.wandb_project) and find_spec("wandb") is None


def _without_tokenizer(config: Config, changes: dict[str, Any], data: bool) -> Iterator[str]:
    """Find the size of the vocabulary where the tokenizer is not here."""
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
        why = f"--tokenizer-model {model} is not here" if is_absent else "no tokenizer is given"
        raise UserError(
            f"the vocabulary's size is not known, and {why}: give --vocab-size or "
            "--padded-vocab-size, a preset that has it, or a tokenizer"
        )
    if size is not None and config.model.vocab_size is None and (is_absent or data):
        changes["vocab_size"] = size
        if source:
            yield f"vocabulary size {size:,} taken from {source}; --vocab-size sets another"
    if is_absent:
        changes |= {"tokenizer_type": "NullTokenizer", "tokenizer_model": None}
        changes["tiktoken_special_tokens"] = ()
        changes["allow_tokenizer_mismatch"] = True
        # A checkpoint to resume from is not compared with a stand-in.
        assumed = ("vocab_size",) if config.model.vocab_size is None else ()
        others = ("tokenizer_type", "tokenizer", "tiktoken_special_tokens")
        changes["override_resume"] = (*config.checkpoint.override_resume, *others, *assumed)
        yield f"tokenizer {model} is not here, and is not checked; the run needs it"


def _vocabulary_of_data(config: Config) -> tuple[int, str] | None:
    """The vocabulary of the tokenizer that preprocess_data recorded with a dataset."""
    for path in _datasets(config):
        size = (recorded_tokenizer(path) or {}).get("vocab_size")
        if isinstance(size, int):
            return size, f"{path}.json"
    return None


def _vocabulary_of_presets(config: Config) -> tuple[int, str] | None:
    """The largest vocabulary of the presets whose model is otherwise the same."""
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


def _without_folders(config: Config, changes: dict[str, Any]) -> Iterator[str]:
    """A checkpoint to start from that is not here; folders to write to are not made."""
    load = config.checkpoint.load
    if load is not None and not Path(load).exists():
        changes |= {"load": None, "finetune": False}
        yield f"--load {load} is not here, and is not checked"
    save = config.checkpoint.save
    if save is not None and why_not_writable(Path(save)) is not None:
        yield f"--save {save} cannot be written here; the run needs it"


def _without_data(config: Config, changes: dict[str, Any]) -> Iterator[str]:
    """Leave the data out if a part of it is not here."""
    files = [str(value) for name in _FILES if (value := getattr(config.data, name))]
    missing = [file for file in files if not Path(file).exists()]
    for prefix in _datasets(config):
        missing += [str(p) for p in (idx_path(prefix), bin_path(prefix)) if not p.exists()]
    if missing:
        more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
        given = [
            flag.removeprefix("--").replace("-", "_") for flag in given_data_flags(config.data)
        ]
        empty = type(config.data)()
        changes |= {name: getattr(empty, name) for name in [*given, "fold_file"]}
        yield f"the data is not here, and is not checked: {missing[0]}{more}"


def _datasets(config: Config) -> list[str]:
    """The datasets of the run; none where the file that lists them is not here."""
    data = config.data
    if any(value and not Path(value).exists() for value in (getattr(data, n) for n in _FILES)):
        return []
    if given_data_flags(data):
        samples = planned_samples(config, BatchSizeSchedule(config)) or 1
        return list(fold_file_from_flags(data, samples, config.training.seed).dataset_paths())
    return list(read_fold_file(Path(data.fold_file)).dataset_paths()) if data.fold_file else []
