"""Reader and writer of native checkpoints: torch_dist, config.yaml, tokenizer/, manifest.json."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint.save_folder import NATIVE
from megatron_llmjp.config.loading import dump_config, load_config
from megatron_llmjp.config.schema import Config, ModelConfig
from megatron_llmjp.convert.files import torch_dist
from megatron_llmjp.convert.files.checksums import ChecksumRange
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.torch_dist_writer import TorchDistWriter
from megatron_llmjp.convert.formats import mcore_names
from megatron_llmjp.convert.formats.base import (
    TRAINING_FIELDS,
    ConversionOptions,
    SourceCheckpoint,
)
from megatron_llmjp.convert.formats.hugging_face import generation
from megatron_llmjp.convert.formats.hugging_face.config import write_json
from megatron_llmjp.convert.model_tokenizer import (
    open_tokenizer,
    run_tokenizer_type,
    tokenizer_files,
)
from megatron_llmjp.convert.optimizer import optimizer_state
from megatron_llmjp.convert.optimizer.optimizer_state import OptimizerState
from megatron_llmjp.convert.optimizer.random_states import read_native_states
from megatron_llmjp.convert.plan import Checksums, OutputPlan
from megatron_llmjp.convert.tensors import WORD_EMBEDDINGS
from megatron_llmjp.convert.tuning.chat_template import install_chat_template, requested_template
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import write_atomically
from megatron_llmjp.tokenizers.base import TikTokenSettings

_MAX_FILE_SIZE = 1_000_000_000
"""In bytes; limited so that several threads can read the files when a run starts."""


def read_native(path: Path, checksums: bool = True) -> SourceCheckpoint:
    """Open a checkpoint, or the latest complete checkpoint of a run's folder.

    Args:
        path: the folder.
        checksums: verify the checksums of the manifest while tensors are read.

    Raises:
        UserError: it is incomplete, damaged, or does not match its configuration.
    """
    folder = manifests.newest_checkpoint(path)
    manifest = manifests.read_manifest(folder)
    problems = manifests.file_problems(folder, manifest)
    if problems:
        raise UserError("\n".join(problems))
    config = load_config(folder / manifests.CONFIG)
    files = {
        folder / name: ChecksumRange(
            folder / name, 0, entry.bytes, int(entry.crc32, 16), "its manifest"
        )
        for name, entry in manifest.files.items()
        if checksums and name.endswith(manifests.TENSOR_SUFFIX)
    }
    stored = torch_dist.read_metadata(folder, files)
    entries = mcore_names.model_entries(stored)
    if WORD_EMBEDDINGS not in entries:
        raise UserError(f"{folder}: {WORD_EMBEDDINGS} is missing")
    model = model_with_sizes(config)
    tokenizer = folder / manifests.TOKENIZER
    parallel = config.parallel
    trained = (
        f"trained with TP {parallel.tensor_model_parallel_size} x "
        f"PP {parallel.pipeline_model_parallel_size}"
    )
    optimizer: Callable[[], OptimizerState] | None = partial(_optimizer, model, stored, folder)
    if manifest.contents == "weights":
        trained, optimizer = "weights only", None
    return SourceCheckpoint(
        NATIVE,
        folder,
        model,
        mcore_names.tensor_reads(model, entries[WORD_EMBEDDINGS].shape[0], entries),
        f"torch_dist, {trained}",
        iteration=manifest.iteration,
        consumed_samples=manifest.consumed_samples,
        tokenizer=tokenizer if tokenizer.is_dir() and tokenizer_files(tokenizer) else None,
        tokenizer_type=config.data.tokenizer_type,
        tiktoken=TikTokenSettings(
            config.data.tiktoken_pattern,
            config.data.tiktoken_num_special_tokens,
            config.data.tiktoken_special_tokens,
        ),
        generation=generation.read_stored_generation(folder / manifests.GENERATION),
        seq_length=config.data.seq_length,
        settings={
            "training": config.training.model_dump(include=set(TRAINING_FIELDS)),
            "optimizer": config.optimizer.model_dump(),
        },
        optimizer=optimizer,
        random_states=partial(read_native_states, folder),
    )


def _optimizer(
    model: ModelConfig, stored: dict[str, torch_dist.TensorEntry], folder: Path
) -> OptimizerState:
    common = torch_dist.read_common_state(folder)
    return optimizer_state.read_torch_dist_state(model, stored, common, folder)


def model_with_sizes(config: Config) -> ModelConfig:
    """Return the model of a resolved configuration, with all sizes explicit."""
    model = config.model
    return model.model_copy(
        update={
            "num_query_groups": model.query_groups,
            "kv_channels": model.head_dim,
            "ffn_hidden_size": model.ffn_size,
            "max_position_embeddings": config.max_positions,
        }
    )


def plan_native(source: SourceCheckpoint, options: ConversionOptions) -> OutputPlan:
    """Lay out ``OUT/iter_*``, which ``--load OUT --finetune`` loads in any parallel layout.

    With the optimizer state it can be resumed with ``--load OUT``. The vocabulary is padded for the
    target tensor parallel size.
    """
    config = _config(source, options)
    rows = config.model.padded_vocab_size
    assert rows is not None
    tokenizer = open_tokenizer(source, options, rows)
    template = requested_template(options)
    ids = tokenizer.token_ids(rows)
    text, changes = generation.resolve_generation(
        source.generation, ids, tokenizer.overrides_eod, rows
    )
    iteration = source.iteration or 0
    folder = manifests.folder_name(iteration)
    writer = TorchDistWriter(min(options.max_shard_size, _MAX_FILE_SIZE), folder)
    names = mcore_names.LayerNames(stacked=not config.model.has_experts)
    writes = mcore_names.add_model_tensors(writer, source, options, rows, names)
    common: dict[str, Any] = {"iteration": iteration}
    if options.with_optimizer:
        state = optimizer_state.read_optimizer_state(source)
        writes |= optimizer_state.add_optimizer_state(writer, source, state, options, rows)
        common |= optimizer_state.optimizer_common_state(state)

    def finish(out: Path, sums: Checksums) -> None:
        inner = out / folder
        writer.finish(inner, common)
        (inner / manifests.CONFIG).write_text(dump_config(config), encoding="utf-8")
        (inner / manifests.TOKENIZER).mkdir()
        for name, path in tokenizer.files.items():
            shutil.copyfile(path, inner / manifests.TOKENIZER / name)
        if template is not None:
            install_chat_template(inner / manifests.TOKENIZER, template)
        if source.generation is not None:
            write_json(inner / manifests.GENERATION, generation.stored_content(text))
        filled = writer.checksums(sums)
        files = manifests.file_entries(inner, set(manifests.all_files(inner)) - filled.keys())
        for name, crc in filled.items():
            size = (inner / name).stat().st_size
            files[name] = manifests.FileEntry(bytes=size, crc32=f"{crc:08x}")
        manifest = manifests.Manifest(
            iteration=iteration,
            consumed_samples=source.consumed_samples or 0,
            contents="full" if options.with_optimizer else "weights",
            versions={"python": platform.python_version(), "torch": version("torch")},
            files=dict(sorted(files.items())),
        )
        manifests.write_manifest(inner, manifest)
        write_atomically(out / manifests.TRACKER, str(iteration))

    warnings = [*tokenizer.warnings, *changes]
    notes = list(tokenizer.notes)
    return OutputPlan(writer.files, writes, finish, notes, warnings)


def _config(source: SourceCheckpoint, options: ConversionOptions) -> Config:
    """Return the configuration that is stored with converted weights."""
    tensor = options.tensor_parallel
    model = source.model
    vocabulary = model.vocab_size or source.padded_vocab_size
    if model.padded_vocab_size is not None and model.padded_vocab_size < vocabulary:
        raise UserError(
            f"vocabulary {vocabulary} exceeds padded_vocab_size {model.padded_vocab_size}"
        )
    unpadded = model.model_copy(update={"vocab_size": vocabulary, "padded_vocab_size": None})
    model = unpadded.model_copy(
        update={"padded_vocab_size": unpadded.compute_padded_vocab_size(tensor)}
    )
    dtype = options.dtype or source.dtype
    positions = model.max_position_embeddings
    types = {"bf16": dtype == DType.bfloat16, "fp16": dtype == DType.float16}
    stored = source.settings
    kind = options.tokenizer_type or run_tokenizer_type(source)
    data = {**stored.get("data", {}), "tokenizer_type": kind}
    if kind == "TikTokenizer":
        data |= {f"tiktoken_{name}": value for name, value in asdict(source.tiktoken).items()}
    adam = optimizer_state.read_optimizer_state(source).settings if options.with_optimizer else {}
    return Config.model_validate(
        {
            "model": model.model_dump(),
            "data": {**data, "seq_length": source.seq_length or positions},
            "training": {**stored.get("training", {}), **types},
            "optimizer": {**stored.get("optimizer", {}), **adam},
        }
    )
