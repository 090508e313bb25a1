"""Reader of DeepSpeed's ZeRO-1 and ZeRO-2 optimizer files: fp32 weights and Adam's moments.

Each ``*zero_pp_rank_D_mp_rank_MM_optim_states.pt`` contains one data-parallel slice of flat arrays,
one array per parameter group; ``param_shapes`` of ``mp_rank_MM`` lists their parameters in order.
Source: deepspeed/utils/zero_to_fp32.py, ``_zero2_merge_trainable_params``. The model-parallel ranks
are joined into canonical tensors, as the weights are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.files.checksums import ChecksumRange
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.storage import (
    Extents,
    FileTensor,
    StoredTensor,
    read_elements,
)
from megatron_llmjp.convert.files.torch_archive import load_archive
from megatron_llmjp.convert.formats.megatron_deepspeed.names import (
    canonical_parameter_name,
    join_separate_keys,
)
from megatron_llmjp.convert.formats.rank_files import RankTensors
from megatron_llmjp.convert.optimizer.optimizer_state import (
    MAIN_WEIGHTS,
    MOMENTS,
    OptimizerState,
    make_optimizer_state,
)
from megatron_llmjp.convert.plan import TensorRead
from megatron_llmjp.convert.tensors import Shape
from megatron_llmjp.errors import UserError

if TYPE_CHECKING:
    import torch

_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")

_LAYER_FILE = re.compile(r"layer_(\d+)-model_\d+-model_states\.pt$")


@dataclass(frozen=True)
class FlatSlice:
    """A range of a flat array in a file."""

    flat: FileTensor
    start: int
    count: int


@dataclass(frozen=True)
class FlatSliceTensor:
    """A tensor whose elements are stored in consecutive ranges of several files."""

    spans: tuple[FlatSlice, ...]
    shape: Shape
    dtype: DType

    @property
    def checksum_ranges(self) -> tuple[ChecksumRange, ...]:
        """Regions with checksums that are read."""
        return tuple(
            checksum_range for span in self.spans for checksum_range in span.flat.checksum_ranges
        )

    @property
    def source(self) -> str:
        """The first of the files."""
        return str(self.spans[0].flat.path)

    def read(self, into: torch.Tensor | None = None) -> torch.Tensor:
        """Read it, into fresh memory or a contiguous tensor of as many elements.

        Raises:
            UserError: a file is truncated.
        """
        import torch

        tensor = torch.empty(self.shape, dtype=self.dtype.torch) if into is None else into
        flat, done = tensor.view(-1), 0
        for span in self.spans:
            offset = span.flat.offset + span.start * self.dtype.itemsize
            place = flat[done : done + span.count]
            read_elements(
                span.flat.path, offset, self.dtype, (span.count,), place, span.flat.checksum_range
            )
            done += span.count
        return tensor

    def extents(self) -> Extents | None:
        """Return the locations of all ranges."""
        found: Extents = []
        done = 0
        for span in self.spans:
            offset = span.flat.offset + span.start * self.dtype.itemsize
            found.append(
                (done, replace(span.flat, offset=offset, shape=(span.count,), dtype=self.dtype))
            )
            done += span.count
        return found


@dataclass(frozen=True)
class ZeroRank:
    """Optimizer state of one model-parallel rank, partitioned over its data-parallel ranks."""

    param_shapes: list[dict[str, Shape]]
    """Parameters by DeepSpeed's names, in the order of the flat arrays, per parameter group."""
    shards: list[tuple[Path, dict[str, Any]]]
    """Each data-parallel rank's file and its ``optimizer_state_dict``, in order."""

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Settings of the parameter groups."""
        groups: list[dict[str, Any]] = _base(*self.shards[0])["param_groups"]
        return groups

    @property
    def step(self) -> Any:
        """Number of updates; None if it is not stored.

        It is stored with the moments, or in the group by some optimizers of DeepSpeed.
        """
        return _moments(*self.shards[0], 0).get("step", self.groups[0].get("step"))

    @property
    def grad_scaler(self) -> dict[str, Any] | None:
        """State of fp16's loss scaler in megatron-core's form; None if there is none.

        The growth tracker is reset: megatron-core requires exactly ``loss_scale_window`` good
        steps.
        """
        scaler: Any = self.shards[0][1].get("loss_scaler")
        if not str(getattr(scaler, "kind", "")).endswith(".DynamicLossScaler"):
            return None
        left = getattr(scaler, "cur_hysteresis", 1)
        return {"scale": scaler.cur_scale, "growth_tracker": 0, "hysteresis_tracker": left}

    def tensors(self, kind: str) -> Iterator[tuple[str, StoredTensor]]:
        """Yield the fp32 weight (``param``) or moment of every parameter, by DeepSpeed's name.

        Raises:
            UserError: they are missing, or the arrays are shorter than the parameters.
        """
        for group, shapes in enumerate(self.param_shapes):
            flats = [_flat(path, state, kind, group) for path, state in self.shards]
            aligned = self.shards[0][1].get("param_alignment_paddings")
            paddings = aligned[group] if aligned else [0] * len(shapes)
            start = 0
            for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
                count = math.prod(shape)
                spans = tuple(_spans(flats, start, count))
                if sum(span.count for span in spans) != count:
                    raise UserError(f"{flats[-1].path}: ends before parameter {name}")
                yield name, FlatSliceTensor(spans, tuple(shape), flats[0].dtype)
                start += count + padding


def open_zero_rank(folder: Path, rank: int, param_shapes: Any) -> ZeroRank:
    """Open the optimizer files of one model-parallel rank.

    Args:
        folder: ``global_step*``.
        rank: ``MM`` of ``mp_rank_MM``.
        param_shapes: stored in the file of that rank; one dictionary of shapes per parameter group.

    Raises:
        UserError: a file is missing, or the run was trained without ZeRO.
    """
    if not param_shapes:
        raise UserError(
            f"{folder}: rank {rank} has no param_shapes; was the run trained without ZeRO?"
        )
    return ZeroRank(param_shapes, _shards(folder, rank))


def _shards(folder: Path, rank: int) -> list[tuple[Path, dict[str, Any]]]:
    files = {
        int(m[1]): p for p in folder.iterdir() if (m := _FILE.match(p.name)) and int(m[2]) == rank
    }
    if not files:
        raise UserError(
            f"{folder}: mp_rank_{rank:02d} has no optimizer files (*zero_pp_rank_*_optim_states.pt)"
        )
    if sorted(files) != list(range(len(files))):
        raise UserError(
            f"{folder}: optimizer files of mp_rank_{rank:02d} are missing; found only "
            f"data-parallel ranks {sorted(files)}"
        )
    found = []
    for _, path in sorted(files.items()):
        state = load_archive(path).get("optimizer_state_dict") or {}
        if "single_partition_of_fp32_groups" not in state:
            raise UserError(f"{path}: no fp32 weights found (ZeRO stage 1 or 2 is required)")
        partitions = state.get("partition_count", len(files))
        count = max(partitions) if isinstance(partitions, list) else partitions
        if count != len(files):
            raise UserError(f"{folder}: found {len(files)} of {count} data-parallel ranks")
        found.append((path, state))
    return found


def _flat(path: Path, state: dict[str, Any], kind: str, group: int) -> FileTensor:
    """Return a data-parallel rank's slice of one parameter group."""
    if kind == MAIN_WEIGHTS:
        flat: FileTensor = state["single_partition_of_fp32_groups"][group]
        return flat
    found = _moments(path, state, group)
    if kind not in found:
        raise UserError(
            f"{path}: parameter group {group} has no {kind}; was the run trained with Adam?"
        )
    moment: FileTensor = found[kind]
    return moment


def _moments(path: Path, state: dict[str, Any], group: int) -> dict[str, Any]:
    """Return the state of a group's flat parameter, the only one of its optimizer."""
    base = _base(path, state)
    found: dict[str, Any] = base["state"].get(base["param_groups"][group]["params"][0], {})
    return found


def _base(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    base = state.get("base_optimizer_state")
    if not isinstance(base, dict) or "param_groups" not in base:
        raise UserError(f"{path}: no state of Adam found, or it was saved with elastic_checkpoint")
    return base


def _spans(flats: list[FileTensor], start: int, count: int) -> Iterator[FlatSlice]:
    """Yield the ranges that contain elements ``start`` to ``start + count`` of joined arrays."""
    base = 0
    for flat in flats:
        length = flat.shape[0]
        first, last = max(start, base), min(start + count, base + length)
        if first < last:
            yield FlatSlice(flat, first - base, last - first)
        base += length


@dataclass(frozen=True)
class ZeroFolder:
    """All optimizer files of a ``global_step*`` folder."""

    folder: Path
    model: ModelConfig
    ranks: dict[int, ZeroRank]
    """By model-parallel rank, stage by stage."""
    tensor_parallel: int

    def tensors(self, kind: str) -> dict[str, TensorRead]:
        """Return the fp32 reads of one kind, ``param`` or a moment, of every parameter.

        Tied embeddings are read from the first stage: the last stage's copy of the position
        embeddings is not synchronized with it.

        Raises:
            UserError: a rank does not have them.
        """
        found = (_LAYER_FILE.match(path.name) for path in self.folder.iterdir())
        numbers = sorted({int(match[1]) for match in found if match})
        gathered = RankTensors()
        for rank, state in self.ranks.items():
            for name, stored in state.tensors(kind):
                if name.startswith("tied_modules.embed.") and rank >= self.tensor_parallel:
                    continue
                canonical = canonical_parameter_name(name, stored, numbers)
                gathered.add(canonical, rank % self.tensor_parallel, stored)
        where, size = self.folder, self.tensor_parallel
        joined = join_separate_keys(where, gathered, self.model, size)
        return joined | gathered.reads(where, self.model, size)

    def state(self, content: dict[str, Any]) -> OptimizerState:
        """Return the state from which a run resumes.

        Args:
            content: of the first rank's ``mp_rank_*`` file, with the state of the schedule.

        Raises:
            UserError: there are no moments, or no schedule.
        """
        first = self.ranks[0]
        tensors = {kind: self.tensors(kind) for kind in (*MOMENTS, MAIN_WEIGHTS)}
        stored = {
            "opt_param_scheduler": content.get("lr_scheduler"),
            "optimizer": {"grad_scaler": first.grad_scaler},
        }
        return make_optimizer_state(tensors, first.step, first.groups, stored, self.folder)


def open_zero_folder(
    folder: Path, model: ModelConfig, ranks: dict[int, Path], tensor_parallel: int
) -> ZeroFolder:
    """Open the optimizer files of every ``mp_rank_*`` file.

    Raises:
        UserError: one is missing or damaged, or the run was trained without ZeRO.
    """
    opened = {
        rank: open_zero_rank(folder, rank, load_archive(path).get("param_shapes"))
        for rank, path in sorted(ranks.items())
    }
    return ZeroFolder(folder, model, opened, tensor_parallel)
