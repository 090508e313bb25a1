"""Writer of ZeRO-1 optimizer files for one data-parallel rank: fp32 weights, Adam's moments.

DeepSpeed requires them to resume without ``--finetune``, as do its tools. Source:
deepspeed/runtime/bf16_optimizer.py and zero/stage_1_and_2.py (``state_dict``).
"""

from __future__ import annotations

import argparse
import math
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files.checksums import combine_crc32
from megatron_llmjp.convert.files.direct_io import FileWriter
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.torch_archive_writer import TensorPlaceholder, plan_archive
from megatron_llmjp.convert.files.torch_pickle import Size
from megatron_llmjp.convert.optimizer.optimizer_state import MAIN_WEIGHTS, MOMENTS, OptimizerState
from megatron_llmjp.convert.plan import Checksums, OutputFile, Slot
from megatron_llmjp.convert.tensors import Shape

_BLOCK = 1 << 22
_ALIGNMENT = 2  # elements per data-parallel rank


@dataclass
class OptimizerFile:
    """Layout of an optimizer file: slots of every parameter, and their shapes."""

    file: OutputFile
    slots: dict[str, dict[str, Slot]]
    """By kind, ``param`` or a moment, and by canonical name."""
    param_shapes: list[OrderedDict[str, Size]]
    scheduler: dict[str, Any] | None
    """State of Megatron's learning-rate schedule."""


def parameter_names(stage: dict[int, dict[str, str]], model: ModelConfig) -> dict[str, str]:
    """Return DeepSpeed's parameter names of a stage by canonical name, in the order of modules.

    Args:
        stage: number, names and keys of its layer files.
        model: determines the names of tied embeddings.
    """
    tied = not model.untie_embeddings_and_output_weights
    return {
        name: f"{'tied_modules.embed' if tied and number == 1 else number}.{key}"
        for number, names in stage.items()
        for name, key in names.items()
    }


def plan_optimizer_file(
    path: str,
    names: dict[str, str],
    shapes: dict[str, Shape],
    dtype: DType,
    found: OptimizerState | None,
) -> OptimizerFile:
    """Lay out the file of one model-parallel rank.

    Args:
        path: of the file, relative to the output folder.
        names: DeepSpeed's parameter names by canonical name.
        shapes: of the parameters on this rank.
        dtype: of the weights; bf16 has an optimizer class of its own.
        found: state of Adam; None for zero moments.
    """
    flat_groups = _groups(names, shapes)
    param_shapes, mappings, flats, state, starts = [], [], [], {}, {}
    for g, group in enumerate(flat_groups):
        position = 0
        mapping = OrderedDict()
        for name in group:
            count = math.prod(shapes[name])
            mapping[names[name]] = argparse.Namespace(numel=count, start=position)
            starts[name] = (g, position)
            position += count
        length = (position + -position % _ALIGNMENT,)
        flats.append(TensorPlaceholder(f"{MAIN_WEIGHTS} {g}", length, DType.float32))
        state[g] = {
            "step": found.step if found else 0,
            **{kind: TensorPlaceholder(f"{kind} {g}", length, DType.float32) for kind in MOMENTS},
        }
        mappings.append(mapping)
        param_shapes.append(OrderedDict((names[n], Size(shapes[n])) for n in group))
    paddings = [
        flat.shape[0] - sum(m.numel for m in mapping.values())
        for flat, mapping in zip(flats, mappings, strict=True)
    ]
    content = _content(flats, state, mappings, paddings, dtype, found)
    file = plan_archive(path, content)
    slots: dict[str, dict[str, Slot]] = {kind: {} for kind in (MAIN_WEIGHTS, *MOMENTS)}
    for kind, own in slots.items():
        for name, (g, start) in starts.items():
            offset = file.slots[f"{kind} {g}"].offset + 4 * start
            own[name] = Slot(path, names[name], offset, shapes[name], DType.float32, is_part=True)
    # Megatron-DeepSpeed can also schedule by tokens, which this schedule does not.
    by_tokens = {"lr_warmup_tokens": None, "lr_decay_tokens": None, "num_tokens": 0}
    scheduler = {**by_tokens, **found.scheduler} if found else None
    return OptimizerFile(file, slots, param_shapes, scheduler)


def _groups(names: dict[str, str], shapes: dict[str, Shape]) -> list[list[str]]:
    """Return the parameters with weight decay, and those without: vectors."""
    found = [[n for n in names if len(shapes[n]) > 1], [n for n in names if len(shapes[n]) == 1]]
    return [group for group in found if group]


def _content(
    flats: list[TensorPlaceholder],
    state: dict[int, Any],
    mappings: list[Any],
    paddings: list[int],
    dtype: DType,
    found: OptimizerState | None,
) -> dict[str, Any]:
    # torch.optim.Adam, which Megatron uses without apex, reads from here that the decay is AdamW's;
    # apex ignores it. Without it the decay would be added to the gradients and so to
    # the moments.
    fresh = {"lr": 0.0, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    fresh |= {"decoupled_weight_decay": True}
    settings = _by_decay(found.groups) if found else [{}, {}]
    groups = [{**fresh, **settings[g], "params": [g]} for g in range(len(flats))]
    optimizer = {
        "clip_grad": 1.0,
        "base_optimizer_state": {"state": state, "param_groups": groups},
        "single_partition_of_fp32_groups": flats,
        "group_paddings": paddings,
        "partition_count": [1] * len(flats),
        "ds_version": "0.10.0",
        "param_slice_mappings": mappings,
    }
    if dtype != DType.bfloat16:
        optimizer |= {
            "loss_scaler": None,
            "dynamic_loss_scale": False,
            "overflow": False,
            "zero_stage": 1,
        }
    return {"optimizer_state_dict": optimizer, "ds_config": {}, "ds_version": "0.10.0"}


def _by_decay(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return settings of the parameters with weight decay, and of those without."""
    decayed = next((group for group in groups if group.get("wd_mult", 1.0)), groups[0])
    return [decayed, next((group for group in groups if not group.get("wd_mult", 1.0)), decayed)]


def write_checksums(
    folder: Path, optimizer: OptimizerFile, kinds: Iterable[str], sums: Checksums
) -> None:
    """Write the checksums of the flat arrays, combined from those of their parts.

    Args:
        folder: output folder.
        optimizer: layout of a written file.
        kinds: the written kinds; other arrays are zeros.
        sums: CRC-32 of the parts.
    """
    file = optimizer.file
    parts = sorted(
        (slot.offset, slot.nbytes, sums[file.name, slot.offset])
        for kind in kinds
        for slot in optimizer.slots[kind].values()
    )
    with closing(FileWriter(folder / file.name)) as writer:
        for array in file.slots.values():
            end = array.offset + array.nbytes
            own = [part for part in parts if array.offset <= part[0] < end]
            crc = _combined_crc32(array.offset, end, own).to_bytes(4, "little")
            for offset in array.checksums:
                writer.write(offset, crc)


def _combined_crc32(position: int, end: int, parts: list[tuple[int, int, int]]) -> int:
    """Return the CRC-32 of a range from those of its parts; the rest of it is zeros."""
    total = 0
    for offset, length, crc in [*parts, (end, 0, 0)]:
        total = combine_crc32(total, _crc32_of_zeros(offset - position), offset - position)
        total = combine_crc32(total, crc, length)
        position = offset + length
    return total


def _crc32_of_zeros(count: int) -> int:
    whole, rest = divmod(count, _BLOCK)
    total, block = zlib.crc32(bytes(rest)), zlib.crc32(bytes(_BLOCK)) if whole else 0
    for _ in range(whole):
        total = combine_crc32(total, block, _BLOCK)
    return total
