"""The difference of two checkpoints as a LoRA adapter of PEFT (``extract-adapter``).

The difference of each linear layer is approximated by the singular vectors of its largest singular
values, the best approximation of a rank (Eckart and Young, 1936): ``B = U sqrt(S)``,
``A = sqrt(S) V^T``. Other tensors that differ (embeddings, output layer, norms) are stored whole
(``modules_to_save``). Memory: both copies of one tensor, and its difference in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_llmjp.convert.conversion import check_output_path
from megatron_llmjp.convert.copying.output_folder import atomic_output_folder
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.safetensors import plan_safetensors
from megatron_llmjp.convert.formats.base import SourceCheckpoint
from megatron_llmjp.convert.formats.hugging_face.architectures.architecture import (
    HuggingFaceArchitecture,
    TensorRule,
)
from megatron_llmjp.convert.formats.hugging_face.architectures.registry import architecture_for
from megatron_llmjp.convert.formats.hugging_face.config import write_json
from megatron_llmjp.convert.plan import OutputFile, write_slot
from megatron_llmjp.convert.tensors import (
    VOCABULARY,
    WORD_EMBEDDINGS,
    Shape,
    is_linear,
    part_shapes,
)
from megatron_llmjp.convert.tuning.adapter_config import CONFIG, adapter_config
from megatron_llmjp.convert.tuning.adapter_keys import FILE, PREFIX, module_key
from megatron_llmjp.convert.verification.model_differences import model_differences
from megatron_llmjp.errors import UserError

EXACT_SIZE = 512
"""Matrices with a dimension up to this size are decomposed completely."""
OVERSAMPLING = 16
"""Additional vectors of the randomized decomposition (Halko, Martinsson and Tropp, 2011)."""
POWER_ITERATIONS = 4
NORM_BLOCK = 1 << 20
"""Elements that are converted to fp64 at once."""


@dataclass
class ExtractionError:
    """Squared Frobenius norms of the difference and of what the adapter does not contain."""

    total: float = 0.0
    missing: float = 0.0
    worst: tuple[float, str] = (0.0, "")
    """Largest relative error of a matrix, and its key."""
    lost: list[str] = field(default_factory=list)
    """Keys of differing tensors that the adapter does not contain."""

    def add(self, key: str, total: float, missing: float) -> None:
        """Add the squared norms of a tensor."""
        self.total += total
        self.missing += missing
        if total > 0.0:
            self.worst = max(self.worst, (math.sqrt(missing / total), key))

    @property
    def relative(self) -> float:
        """Norm of the missing difference, relative to that of the whole difference."""
        return math.sqrt(self.missing / self.total) if self.total else 0.0


@dataclass(frozen=True)
class AdapterPlan:
    """Which tensors of a model become matrices, and which are stored whole."""

    base: SourceCheckpoint
    tuned: SourceCheckpoint
    architecture: HuggingFaceArchitecture
    rank: int
    dtype: DType
    rows: int
    """Vocabulary size without padding."""
    whole: frozenset[str]
    """Canonical names of the tensors that are stored whole."""

    def rules(self) -> list[TensorRule]:
        """Return the stored form of all tensors."""
        return self.architecture.expanded_rules(self.base.model)

    def shapes(self, rule: TensorRule) -> list[Shape]:
        """Return the shapes of a rule's parts, without padding of the vocabulary."""
        shape = self.base.reads[rule.name].shape
        if rule.name in VOCABULARY:
            shape = (self.rows, *shape[1:])
        return part_shapes(rule.layout, shape)

    def config(self) -> dict[str, Any]:
        """Return the content of ``adapter_config.json``."""
        linear = {_module(k) for r in self.rules() for k in r.keys if is_linear(r.name)}
        saved = {_module(k) for r in self.rules() for k in r.keys if r.name in self.whole}
        return adapter_config(
            self.rank,
            sorted(linear),
            sorted(saved),
            self.architecture.transposed_linears,
            str(self.base.path),
        )

    def layout(self) -> OutputFile:
        """Lay out the adapter's file."""
        found: dict[str, tuple[Shape, DType]] = {}
        for rule in self.rules():
            for key, shape in zip(rule.keys, self.shapes(rule), strict=True):
                if is_linear(rule.name):
                    outputs, inputs = shape[::-1] if self.architecture.transposed_linears else shape
                    a, b = matrix_keys(key)
                    found[a] = (self.rank, inputs), self.dtype
                    found[b] = (outputs, self.rank), self.dtype
                elif rule.name in self.whole:
                    found[PREFIX + module_key(key)] = shape, self.dtype
        return plan_safetensors(FILE, found)


def matrix_keys(key: str) -> tuple[str, str]:
    """Return the keys of the matrices A and B of a weight."""
    module = PREFIX + key.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def extract_adapter(
    base: SourceCheckpoint,
    tuned: SourceCheckpoint,
    output: Path,
    rank: int,
    dtype: DType,
    linear_only: bool,
    progress: Callable[[int], None] = lambda _: None,
) -> ExtractionError:
    """Write the difference of two checkpoints as an adapter.

    Args:
        base: the base model.
        tuned: the model after tuning.
        output: the folder to create.
        rank: rank of the matrices.
        dtype: type of the stored matrices.
        linear_only: omit differences of tensors that are no linear layers.
        progress: receives the bytes of the base model that were processed.

    Raises:
        UserError: the models differ in architecture or vocabulary, the rank is too large, a value
            is not finite, or the output cannot be written.
    """
    plan = plan_adapter(base, tuned, rank, dtype, linear_only)
    for source in (base, tuned):
        check_output_path(output, source.path)
    file = plan.layout()
    error = ExtractionError()
    with atomic_output_folder(output.absolute(), file.size) as folder:
        file.create(folder)
        for rule in plan.rules():
            _write_difference(plan, rule, file, folder, error)
            read = base.reads[rule.name]
            progress(math.prod(read.shape) * read.dtype.itemsize)
        write_json(folder / CONFIG, plan.config())
    return error


def _module(key: str) -> str:
    """Return the name of a tensor's module without its parents."""
    return module_key(key).split(".")[-2]


def plan_adapter(
    base: SourceCheckpoint,
    tuned: SourceCheckpoint,
    rank: int,
    dtype: DType,
    linear_only: bool,
) -> AdapterPlan:
    """Compare two models and choose how each tensor is stored.

    Raises:
        UserError: they differ in architecture or vocabulary, or the rank is too large.
    """
    differences = model_differences(base.model, tuned.model)
    sizes = [source.model.vocab_size or source.padded_vocab_size for source in (base, tuned)]
    if sizes[0] != sizes[1]:
        differences["vocab_size"] = sizes[0], sizes[1]
    if differences:
        shown = ", ".join(f"{name} {a} / {b}" for name, (a, b) in differences.items())
        raise UserError(f"{base.path} and {tuned.path} are different models: {shown}")
    architecture = architecture_for(base.model)
    plan = AdapterPlan(base, tuned, architecture, rank, dtype, sizes[0], frozenset())
    linear = [rule for rule in plan.rules() if is_linear(rule.name)]
    smallest = min(min(shape) for rule in linear for shape in plan.shapes(rule))
    if rank > smallest:
        raise UserError(f"--rank {rank}: must not exceed {smallest}, the smallest matrix dimension")
    return plan if linear_only else replace(plan, whole=_whole_tensors(plan))


def _whole_tensors(plan: AdapterPlan) -> frozenset[str]:
    """Return the tensors to store whole: all of a module that differs in any layer.

    peft stores neither biases next to matrices, nor an embedding so that a tied output layer
    changes with it.
    """
    tied = not plan.base.model.untie_embeddings_and_output_weights
    excluded = {WORD_EMBEDDINGS} if tied else set()
    others = [
        rule for rule in plan.rules() if ".linear_" not in rule.name and rule.name not in excluded
    ]
    differing = {
        _module(rule.keys[0])
        for rule in others
        if not torch.equal(*(_trimmed(plan, source, rule) for source in (plan.base, plan.tuned)))
    }
    return frozenset(rule.name for rule in others if _module(rule.keys[0]) in differing)


def _trimmed(plan: AdapterPlan, source: SourceCheckpoint, rule: TensorRule) -> torch.Tensor:
    """Read a tensor without padding of the vocabulary."""
    tensor = source.reads[rule.name].read(rule.name)
    return tensor[: plan.rows] if rule.name in VOCABULARY else tensor


def _write_difference(
    plan: AdapterPlan, rule: TensorRule, file: OutputFile, folder: Path, error: ExtractionError
) -> None:
    """Write the difference of one canonical tensor, and add its error."""
    before, after = (_trimmed(plan, source, rule) for source in (plan.base, plan.tuned))
    pairs = zip(rule.keys, rule.layout(before), rule.layout(after), strict=True)
    for key, old, new in pairs:
        if rule.name in plan.whole:
            write_slot(folder, file.slots[PREFIX + module_key(key)], new.view.reshape(new.shape))
        delta = torch.empty(new.shape).copy_(new.view.reshape(new.shape))
        delta.sub_(old.view.reshape(old.shape))
        total = _squared_norm(delta)
        if not math.isfinite(total):
            raise UserError(f"{plan.tuned.path}: the difference of {key} is not finite")
        missing = 0.0
        if is_linear(rule.name):
            if plan.architecture.transposed_linears:
                delta = delta.t()
            a, b = low_rank(delta, plan.rank)
            a, b = a.to(plan.dtype.torch), b.to(plan.dtype.torch)
            for stored, matrix in zip(matrix_keys(key), (a, b), strict=True):
                write_slot(folder, file.slots[stored], matrix)
            missing = _squared_norm(delta - b.float() @ a.float())
        elif rule.name not in plan.whole and total > 0.0:
            missing = total
            error.lost.append(key)
        error.add(key, total, missing)


def _squared_norm(tensor: torch.Tensor) -> float:
    blocks = tensor.reshape(-1).split(NORM_BLOCK)
    return sum(float(block.double().square_().sum()) for block in blocks)


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``A [rank, in]`` and ``B [out, rank]`` such that ``B A`` approximates a matrix.

    The decomposition of large matrices is randomized, with a fixed seed.
    """
    if min(matrix.shape) <= max(EXACT_SIZE, 2 * rank):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, rank + OVERSAMPLING, POWER_ITERATIONS)
        vh = v.t()
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()
