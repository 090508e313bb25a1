"""Copies in blocks, compared with copies of whole tensors by torch."""

from __future__ import annotations

import filecmp
import random
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_llmjp.convert.conversion import plan_conversion
from megatron_llmjp.convert.copying import (
    block_copy,
    block_io,
    contiguous_runs,
    output_folder,
)
from megatron_llmjp.convert.copying import copy_threads as copying
from megatron_llmjp.convert.copying.contiguous_runs import find_runs
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.storage import FileTensor
from megatron_llmjp.convert.formats.base import ConversionOptions
from megatron_llmjp.convert.plan import (
    Checksums,
    OutputFile,
    Slot,
    TensorCopy,
    TensorRead,
    TensorWrite,
)
from megatron_llmjp.convert.tensors import (
    gate_up,
    gate_up_rows,
    query_key_value,
    rectangular_parts,
    split_columns,
    split_rows,
    transposed,
    whole,
)
from megatron_llmjp.errors import UserError
from tests.convert.dtypes import view_of
from tests.convert.hf_models import gpt2, llama

FIXTURE = Path(__file__).parent / "fixtures" / "mds_gpt_tp2pp2dp2_bf16z1" / "ckpt"
ROWS, COLUMNS = 48, 10
LAYOUTS = {
    "whole": whole,
    "rows": partial(split_rows, size=3),
    "columns": partial(split_columns, size=5),
    "gate_up": gate_up,
    "gate_up_rows": partial(gate_up_rows, size=4),
    "qkv": partial(query_key_value, groups=4, head_dim=3),
    "boxes": partial(
        rectangular_parts, places=(((0, 0), (48, 4)), ((0, 4), (20, 6)), ((20, 4), (28, 6)))
    ),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 300 bytes, which end inside of rows, and runs of any length."""
    for module in (block_io, block_copy):
        monkeypatch.setattr(module, "BLOCK_BYTES", 300)
    monkeypatch.setattr(block_copy, "UNIT_BLOCKS", 3)
    monkeypatch.setattr(contiguous_runs, "MIN_RUN_BYTES", 1)


@pytest.mark.parametrize("few", [8, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_runs_of_a_layout(name, few, monkeypatch):
    monkeypatch.setattr(contiguous_runs, "MIN_RUN_BYTES", 1)
    monkeypatch.setattr(contiguous_runs, "_FEW_RUNS", few)
    tensor = torch.arange(ROWS * COLUMNS, dtype=torch.int16).view(ROWS, COLUMNS)
    generator = random.Random(1)
    for part in LAYOUTS[name](tensor):
        runs, order = find_runs(view_of(part.view), 2), part.view.flatten()
        assert runs is not None
        for _ in range(20):
            begin, end = sorted(generator.sample(range(ROWS * COLUMNS + 1), 2))
            first, last = runs.range_of(begin, end)
            expected = order[(order >= begin) & (order < end)]
            assert torch.equal(order[first:last], expected)
            block = tensor.flatten()[begin:end].contiguous()
            packed = np.empty(2 * (last - first), np.uint8)
            runs.gather(block.view(torch.uint8).numpy(), begin, first, 2, packed)
            assert packed.tobytes() == expected.numpy().tobytes()
            copy = torch.zeros_like(block)
            runs.scatter(copy.view(torch.uint8).numpy(), begin, first, 2, packed)
            assert torch.equal(copy[copy > 0], expected[expected > 0])


def test_changed_order_has_no_runs():
    tensor = torch.empty(4096, 4096)
    assert find_runs(view_of(transposed(tensor)[0].view), 4) is None
    assert find_runs(view_of(torch.empty(0, 3)), 4) is None
    assert find_runs(view_of(tensor[:, :8]), 4) is None  # runs of 32 bytes
    assert find_runs(view_of(tensor[:, :128]), 4) is not None


DIRECTIONS = {
    "native": [],
    "hf": ["--dtype", "fp16"],
    "megatron-lm": ["--ckpt-format", "torch", "--target-tensor-parallel-size", 2],
    "megatron-deepspeed": ["--target-tensor-parallel-size", 4, "--dtype", "bf16"],
}


def same_files(one: Path, other: Path) -> None:
    names = [{str(p.relative_to(r)) for p in r.rglob("*") if p.is_file()} for r in (one, other)]
    assert names[0] == names[1] != set()
    for name in names[0]:
        assert filecmp.cmp(one / name, other / name, shallow=False), name


@pytest.mark.parametrize("target", DIRECTIONS)
def test_blocks_and_whole_tensors_give_the_same_files(
    tmp_path, convert, small_blocks, monkeypatch, target
):
    """The vocabulary of 101 is padded on the way there, and trimmed on the way back."""
    llama(rope_theta=10000.0, num_key_value_heads=8).save_pretrained(tmp_path / "hf")
    there = ["--to", target, *DIRECTIONS[target], "--input", tmp_path / "hf"]
    back = ["--to", "hf", "--input", tmp_path / "blocks"]
    convert(*there, "--output", tmp_path / "blocks")
    convert(*back, "--output", tmp_path / "back-blocks")
    monkeypatch.setattr(copying, "plan_block_copy", lambda _: None)
    convert(*there, "--output", tmp_path / "tensors")
    convert(*back, "--output", tmp_path / "back-tensors")
    same_files(tmp_path / "blocks", tmp_path / "tensors")
    same_files(tmp_path / "back-blocks", tmp_path / "back-tensors")


def test_optimizer_state_in_blocks(tmp_path, convert, small_blocks, monkeypatch):
    """Moments are slices of ZeRO's flat arrays."""
    there = ["--to", "native", "--with-optimizer", "--input", FIXTURE]
    back = ["--to", "megatron-deepspeed", "--with-optimizer", "--input", tmp_path / "blocks"]
    convert(*there, "--output", tmp_path / "blocks")
    convert(*back, "--output", tmp_path / "back-blocks")
    monkeypatch.setattr(copying, "plan_block_copy", lambda _: None)
    convert(*there, "--output", tmp_path / "tensors")
    convert(*back, "--output", tmp_path / "back-tensors")
    same_files(tmp_path / "blocks", tmp_path / "tensors")
    same_files(tmp_path / "back-blocks", tmp_path / "back-tensors")
    for file in (tmp_path / "back-blocks").rglob("*.pt"):
        assert zipfile.ZipFile(file).testzip() is None, file


def test_transposed_tensors_are_copied_as_a_whole(tmp_path, convert, small_blocks):
    gpt2().save_pretrained(tmp_path / "hf")
    convert("--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "native")
    convert("--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "back")
    one, other = (tmp_path / name / "model.safetensors" for name in ("hf", "back"))
    from safetensors.torch import load_file

    before, after = load_file(one), load_file(other)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def copy_with_replica(folder: Path, replica: torch.Tensor) -> tuple[TensorCopy, OutputFile]:
    values = torch.arange(600.0)
    values[1] = -0.0
    for name, tensor in (("a", values), ("b", replica)):
        (folder / name).write_bytes(tensor.numpy().tobytes())
    a, b = (FileTensor(folder / name, 0, (600,), DType.float32) for name in ("a", "b"))
    slot = Slot("out", "out", 0, (600,), DType.float32)
    read = TensorRead((600,), DType.float32, [a], whole, [b])
    return TensorCopy("norm", read, TensorWrite(whole, [[slot]])), OutputFile(
        "out", 2400, [], {"out": slot}
    )


def test_replicas_are_compared(tmp_path, small_blocks):
    values = torch.arange(600.0)
    values[1] = 0.0  # the other has -0.0
    copy, file = copy_with_replica(tmp_path, values)
    copying.copy_tensors([copy], [file], tmp_path, 1, True)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "a").read_bytes()
    values[555] = 3.0
    copy, file = copy_with_replica(tmp_path, values)
    with pytest.raises(UserError, match="b: norm differs from its replica in "):
        copying.copy_tensors([copy], [file], tmp_path, 1, True)


def test_values_out_of_range_of_fp16_are_an_error(tmp_path, convert, small_blocks):
    model = llama()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[-1, -1] = 1e5
    model.save_pretrained(tmp_path / "hf")
    text = convert("--to", "native", "--dtype", "fp16", "--input", tmp_path / "hf",
                   "--output", tmp_path / "o", code=2)  # fmt: skip
    assert "values out of range of fp16" in text


def test_every_file_is_synced_before_the_folder_is_renamed(tmp_path, convert, monkeypatch):
    llama(rope_theta=10000.0, num_key_value_heads=8).save_pretrained(tmp_path / "hf")
    synced = set()

    def sync(path: Path) -> None:
        assert not (tmp_path / "o").exists() or path == tmp_path
        synced.add(path.name)

    for module in (copying, output_folder):
        monkeypatch.setattr(module, "fsync_path", sync)
    convert("--to", "megatron-deepspeed", "--input", tmp_path / "hf", "--output", tmp_path / "o")
    assert {path.name for path in (tmp_path / "o").rglob("*")} < synced


def test_a_file_is_complete_after_its_last_unit_in_any_order(tmp_path, monkeypatch, small_blocks):
    """With the first unit of a tensor last, a file was reported before its last bytes."""
    llama().save_pretrained(tmp_path / "hf")
    plan = plan_conversion(None, "native", tmp_path / "hf", ConversionOptions())
    (file,) = plan.output.files
    slots = list(file.slots.values())
    reports = []

    def last_first(futures: Iterable[Future]) -> Iterable[Future]:
        futures = list(futures)
        wait(futures)
        return reversed(futures)

    def report(name: str, sums: Checksums) -> None:
        assert name == file.name
        reports.append(sums)

    monkeypatch.setattr(copying, "as_completed", last_first)
    copying.copy_tensors(
        plan.copies, plan.output.files, tmp_path / "out", 1, True, completed=report
    )
    data = (tmp_path / "out" / file.name).read_bytes()
    stored = {
        (slot.file, slot.offset): zlib.crc32(data[slot.offset :][: slot.nbytes]) for slot in slots
    }
    assert reports == [stored]
