"""Reader of Megatron-DeepSpeed checkpoints: pipeline layer files, or one module per rank.

Source: deepspeed/runtime/pipe/module.py and engine.py, megatron/model/gpt_model.py of LLM-jp's
fork. ``global_step<N>/layer_LL-model_TT-model_states.pt`` contains a flat dictionary per layer and
tensor-parallel rank, ``mp_rank_*`` the arguments; without pipeline parallelism, ``module`` of
``mp_rank_TT`` contains everything. Layer files are identified by their keys, because their numbers
differ between versions.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from megatron_llmjp.checkpoint.save_folder import MEGATRON_DEEPSPEED
from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files.torch_archive import load_archive
from megatron_llmjp.convert.formats.base import SourceCheckpoint
from megatron_llmjp.convert.formats.megatron_deepspeed import zero as zero_files
from megatron_llmjp.convert.formats.megatron_deepspeed.names import (
    canonical_name,
    join_separate_keys,
)
from megatron_llmjp.convert.formats.megatron_lm.arguments import (
    model_from_args,
    settings_from_args,
    tiktoken_of,
    tokenizer_type_of,
    vocabulary_notes,
)
from megatron_llmjp.convert.formats.rank_files import RankTensors, canonical_name_in_layer
from megatron_llmjp.convert.optimizer.optimizer_state import MAIN_WEIGHTS
from megatron_llmjp.convert.tensors import (
    LAYER,
    OUTPUT_LAYER,
    POSITION_EMBEDDINGS,
    WORD_EMBEDDINGS,
)
from megatron_llmjp.errors import UserError

LATEST = "latest"
_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt$")
_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt$")


def read_megatron_deepspeed(
    path: Path, main_weights: bool = False, ignored: Collection[str] = ()
) -> SourceCheckpoint:
    """Open a ``global_step*`` folder, or the one named in the file ``latest``.

    Args:
        path: the folder.
        main_weights: read the fp32 weights of the ZeRO optimizer instead of the model's.
        ignored: names of arguments to ignore.

    Raises:
        UserError: it is incomplete, damaged, or not supported.
    """
    folder = newest_step_folder(path)
    first, ranks = _rank_files(folder)
    content = load_archive(first)
    if "args" not in content:
        raise UserError(f"{first}: no args found; is it a Megatron-DeepSpeed checkpoint?")
    args = content["args"]
    if content.get("checkpoint_version", 0) < 2.0:
        raise UserError(
            f"{first}: checkpoint_version {content.get('checkpoint_version', 0)} has a different "
            "order of QKV rows; load and save it with a newer Megatron-DeepSpeed"
        )
    model = model_from_args(args, str(first), ignored)
    universal = content.get("universal_checkpoint_info") or {}
    if isinstance(universal.get("original_vocab_size"), int):
        model = model.model_copy(update={"vocab_size": universal["original_vocab_size"]})
    gathered = RankTensors()
    if content.get("module") is None:
        tensor = _gather_layers(folder, model, gathered)
        layout = f"pipeline layers, TP {tensor} x PP {max(1, len(ranks) // tensor)}"
    else:
        tensor = len(ranks)
        _gather_modules(ranks, gathered)
        layout = f"no pipeline, TP {tensor}"
    if getattr(args, "sequence_parallel", False) and POSITION_EMBEDDINGS in gathered.parts:
        raise UserError(f"{folder}: position embeddings split by sequence parallelism")
    zero = partial(zero_files.open_zero_folder, folder, model, ranks, tensor)
    if main_weights:
        reads = zero().tensors(MAIN_WEIGHTS)
        layout += ", fp32 weights of the optimizer"
    else:
        reads = join_separate_keys(folder, gathered, model, tensor)
        reads |= gathered.reads(folder, model, tensor)
    return SourceCheckpoint(
        MEGATRON_DEEPSPEED,
        folder,
        model,
        reads,
        layout,
        iteration=content.get("iteration"),
        consumed_samples=_consumed_samples(args, content),
        seq_length=getattr(args, "seq_length", None),
        notes=vocabulary_notes(model),
        settings=settings_from_args(args),
        tokenizer_type=tokenizer_type_of(args),
        tiktoken=tiktoken_of(args),
        optimizer=lambda: zero().state(content),
    )


def _consumed_samples(args: Any, content: dict[str, Any]) -> int | None:
    """Return Megatron's count, or DeepSpeed's if the run used DeepSpeed without Megatron."""
    counts = (getattr(args, "consumed_train_samples", None), content.get("global_samples"))
    return next((count for count in counts if count), None)


def newest_step_folder(path: Path) -> Path:
    """Return the ``global_step*`` folder in ``path``: itself, the latest or the last one."""
    if next(path.glob("mp_rank_*_model_states.pt"), None):
        return path
    latest = path / LATEST
    if latest.is_file():
        with latest.open("rb") as stream:
            tag = stream.read(250).decode(errors="replace").strip()
        if not tag or "/" in tag or "\0" in tag or not (path / tag).is_dir():
            raise UserError(f"{latest}: '{tag}' is not a checkpoint in {path}")
        return path / tag
    steps = [
        (int(m[1]), p)
        for p in path.glob("global_step*")
        if (m := re.fullmatch(r"global_step(\d+)", p.name))
    ]
    if not steps:
        raise UserError(f"{path}: no {LATEST}, global_step* or mp_rank_* files found")
    return max(steps)[1]


def _rank_files(folder: Path) -> tuple[Path, dict[int, Path]]:
    found = {int(m[1]): p for p in folder.iterdir() if (m := _RANK_FILE.match(p.name))}
    if 0 not in found:
        raise UserError(f"{folder}: mp_rank_00_model_states.pt is missing")
    if sorted(found) != list(range(len(found))):
        raise UserError(f"{folder}: mp_rank_* files are missing, found only {sorted(found)}")
    return found[0], found


def _gather_layers(folder: Path, model: ModelConfig, gathered: RankTensors) -> int:
    """Add the tensors of the layer files; return the tensor parallel size."""
    files: dict[int, dict[int, Path]] = {}
    for path in folder.iterdir():
        if match := _LAYER_FILE.match(path.name):
            files.setdefault(int(match[1]), {})[int(match[2])] = path
    if not files:
        raise UserError(f"{folder}: no layer_*-model_* files found")
    tensor = 1 + max(rank for ranks in files.values() for rank in ranks)
    layer = 0
    for _, ranks in sorted(files.items()):
        prefix = ""
        for rank, path in sorted(ranks.items()):
            for key, stored in load_archive(path).items():
                name, prefix = canonical_name(key, stored, layer)
                if (
                    name == WORD_EMBEDDINGS
                    and name in gathered.parts
                    and (
                        rank in gathered.parts[name]
                        and not model.untie_embeddings_and_output_weights
                    )
                ):
                    continue  # the tied copy of the last stage
                gathered.add(name, rank, stored)
        layer += prefix != ""
    return tensor


def _gather_modules(ranks: dict[int, Path], gathered: RankTensors) -> None:
    """Add the tensors of a checkpoint without pipeline parallelism."""
    for rank, path in ranks.items():
        language = load_archive(path)["module"].get("language_model", {})
        embedding, encoder = language.get("embedding", {}), language.get("encoder", {})
        for name in ("word_embeddings", "position_embeddings"):
            if name in embedding:
                gathered.add(f"embedding.{name}.weight", rank, embedding[name]["weight"])
        for key, stored in encoder.items():
            match = re.match(r"layers\.(\d+)\.(.*)", key)
            name = (
                LAYER.format(i=match[1]) + canonical_name_in_layer(match[2])
                if match
                else f"decoder.{key}"
            )
            gathered.add(name, rank, stored)
        if "output_layer" in language:
            gathered.add(OUTPUT_LAYER, rank, language["output_layer"]["weight"])
