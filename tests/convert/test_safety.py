"""Malicious, damaged and inconsistent files; incomplete output is removed."""

from __future__ import annotations

import argparse
import builtins
import errno
import itertools
import os
import pickle
import resource
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_llmjp.convert.cli import main
from megatron_llmjp.convert.files.dtypes import DType
from megatron_llmjp.convert.files.torch_archive import InertObject, load_archive, resolve_global
from megatron_llmjp.errors import UserError
from tests.convert.dtypes import dtype_of
from tests.convert.hf_models import llama, state
from tests.support.forks import Fork


class Malicious:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.fixture
def hf(tmp_path) -> Path:
    llama(rope_theta=10000.0).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("call", [(os.system, "touch {}"), (eval, "open('{}', 'w')"),
                                  (subprocess.call, ["touch", "{}"])])  # fmt: skip
def test_malicious_pickle_is_refused(tmp_path, call):
    mark = tmp_path / "executed"
    arguments = [
        a.format(mark) if isinstance(a, str) else [x.format(mark) for x in a] for a in call[1:]
    ]
    torch.save({"module": Malicious(call[0], *arguments)}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="refused: its pickle calls"):
        load_archive(tmp_path / "bad.pt")
    assert not mark.exists()


def test_members_of_enumerations_are_allowed(tmp_path):
    """Python 3.11.0 to 3.11.3 pickle members of enumerations as a call of getattr."""
    torch.save({"args": Malicious(getattr, WriteItemType, "TENSOR")}, tmp_path / "good.pt")
    assert load_archive(tmp_path / "good.pt")["args"].kind.endswith(".WriteItemType")
    torch.save({"args": Malicious(getattr, torch.Size, "count")}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"refused: its pickle calls builtins\.getattr"):
        load_archive(tmp_path / "bad.pt")


def test_plain_values_are_read(tmp_path):
    """Protocol 2, which Megatron-LM's files have, calls ``_codecs.encode`` for bytes."""
    values = {"bytes": bytes(range(256)), "complex": 1 - 2j, "set": {1, 2}, "slice": slice(1, 2)}
    torch.save(values, tmp_path / "plain.pt", pickle_protocol=2)
    assert load_archive(tmp_path / "plain.pt") == values


def test_tensors_of_every_type_are_read(tmp_path):
    types = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32,
             torch.int16, torch.int8, torch.uint8, torch.bool)  # fmt: skip
    values = {str(dtype): torch.tensor([[0, 1, 1], [1, 0, 1]], dtype=dtype) for dtype in types}
    values["part"] = torch.arange(20.0).view(4, 5)[1:3, 2:4]
    values["scalar"] = torch.tensor(7)
    values["parameter"] = torch.nn.Parameter(torch.ones(2))
    torch.save(values, tmp_path / "all.pt")
    found = load_archive(tmp_path / "all.pt")
    assert found.keys() == values.keys()
    for name, tensor in values.items():
        assert found[name].dtype == dtype_of(tensor) and torch.equal(found[name].read(), tensor), (
            name
        )


INERT = (
    ("megatron.core.enums", "ModelType"), ("deepspeed.utils", "X"), ("megatron_llmjp.x", "X"),
    ("torch.nn", "X"), ("numpy.core.multiarray", "scalar"), ("pathlib", "PosixPath"),
    ("transformer_engine.x", "X"), ("signal", "Signals"), ("collections", "defaultdict"),
    ("builtins", "range"), ("__builtin__", "xrange"),
)  # fmt: skip
PLAIN = [
    "set", "frozenset", "slice", "complex", "dict", "list", "tuple", "int", "float", "bool", "str",
    "object",
]  # fmt: skip
REFUSED = (
    ("megatronx", "X"), ("os", "system"), ("builtins", "eval"), ("__builtin__", "print"),
    ("builtins", "xrange"), ("collections", "deque"), ("_codecs", "decode"),
    ("signal", "raise_signal"), ("argparse", "ArgumentParser"),
)  # fmt: skip


def test_the_allow_list(tmp_path):
    for module, name in INERT:
        found = resolve_global(module, name, tmp_path)
        assert issubclass(found, InertObject) and found.kind == f"{module}.{name}"
    for name in PLAIN:
        for module in ("builtins", "__builtin__"):
            assert resolve_global(module, name, tmp_path) is getattr(builtins, name)
    for module, name in REFUSED:
        with pytest.raises(UserError, match=rf"refused: its pickle calls {module}\.{name}, which"):
            resolve_global(module, name, tmp_path)
    assert resolve_global("torch", "Size", tmp_path) is tuple
    assert resolve_global("torch", "bfloat16", tmp_path) is DType.bfloat16
    assert resolve_global("torch.storage", "UntypedStorage", tmp_path) is DType.uint8
    assert resolve_global("collections", "OrderedDict", tmp_path) is OrderedDict
    assert resolve_global("argparse", "Namespace", tmp_path) is argparse.Namespace
    for kind in (bytes, bytearray):
        make = resolve_global("builtins", kind.__name__, tmp_path)
        assert make(b"ab") == kind(b"ab") and make("é", "utf-8") == kind("é".encode())
        with pytest.raises(pickle.UnpicklingError, match="is not the content of bytes"):
            make(10**9)  # as many zeros
    encode = resolve_global("_codecs", "encode", tmp_path)
    assert (encode("é"), encode("é", "latin1"), encode("é", "utf8"), encode("é", "utf-8")) == (
        b"\xe9", b"\xe9", "é".encode(), "é".encode(),
    )  # fmt: skip


def test_malicious_metadata_is_refused(tmp_path, hf, convert):
    convert("--to", "megatron-lm", "--input", hf, "--output", tmp_path / "there")
    mark = tmp_path / "executed"
    metadata = tmp_path / "there" / "release" / ".metadata"
    metadata.write_bytes(pickle.dumps(Malicious(os.system, f"touch {mark}")))
    text = convert("--to", "hf", "--input", tmp_path / "there", "--output", tmp_path / "o", code=2)
    assert "refused: its pickle calls posix.system" in text
    assert not mark.exists()


@pytest.mark.parametrize("target", ["native", "hf", "megatron-deepspeed", "megatron-lm"])
def test_truncated_files_are_named_and_no_output_is_left(tmp_path, hf, convert, target):
    convert("--to", target, "--input", hf, "--output", tmp_path / "there")
    victim = max(
        (p for p in (tmp_path / "there").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size * 2 // 3])
    text = convert("--to", "hf", "--input", tmp_path / "there", "--output", tmp_path / "o", code=2)
    assert victim.name in text
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".o", "o"))]


def test_missing_and_unexpected_tensors_are_errors(tmp_path, hf, convert):
    from safetensors.torch import save_file

    tensors = state(hf)
    norm = tensors.pop("model.layers.1.input_layernorm.weight")
    tensors["model.layers.1.input_layernorm.bias"] = norm
    save_file(tensors, hf / "model.safetensors")
    text = convert("--to", "native", "--input", hf, "--output", tmp_path / "o", code=2)
    assert "missing: model.layers.1.input_layernorm.weight" in text
    assert "unexpected: model.layers.1.input_layernorm.bias" in text


def test_wrong_shapes_are_errors(tmp_path, hf, convert):
    from safetensors.torch import save_file

    tensors = state(hf)
    tensors["model.norm.weight"] = torch.ones(65)
    save_file(tensors, hf / "model.safetensors")
    text = convert("--to", "native", "--input", hf, "--output", tmp_path / "o", code=2)
    assert "decoder.final_layernorm.weight has shape (65,)" in text


def test_different_replicas_are_errors(tmp_path, hf, convert):
    """Old versions of GPT-NeoX stored partial sums of biases on each rank."""
    there = tmp_path / "there"
    convert(
        "--to",
        "megatron-deepspeed",
        "--input",
        hf,
        "--output",
        there,
        "--target-tensor-parallel-size",
        2,
    )
    path = next(there.glob("*/layer_02-model_01*"))
    layer = torch.load(path)
    layer["input_layernorm.weight"] += 1
    torch.save(layer, path)
    text = convert("--to", "hf", "--input", there, "--output", tmp_path / "o", code=2)
    assert "differs from its replica in" in text
    assert not (tmp_path / "o").exists()


def test_source_is_never_modified(tmp_path, hf, convert):
    convert("--to", "native", "--input", hf, "--output", tmp_path / "native")
    files = [p for p in (tmp_path / "native").rglob("*") if p.is_file()]
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files}
    convert("--to", "hf", "--input", tmp_path / "native", "--output", tmp_path / "o")
    files = [p for p in (tmp_path / "native").rglob("*") if p.is_file()]
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def test_existing_output_is_kept(tmp_path, hf, convert):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine").write_text("precious")
    text = convert("--to", "native", "--input", hf, "--output", tmp_path / "o", code=2)
    assert "already exists" in text
    assert (tmp_path / "o" / "mine").read_text() == "precious"


def test_full_disk_is_reported_and_no_output_is_left(tmp_path, hf, convert, monkeypatch):
    """Writes start to fail during the copies, as on a full disk."""
    real, count = os.pwrite, itertools.count()

    def full(fd, data, offset):
        if next(count) >= 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    text = convert("--to", "native", "--input", hf, "--output", tmp_path / "o", code=2)
    assert "disk is full" in text
    assert "Traceback" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def convert_with_small_files(words):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code = main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))  # coverage writes at the exit
    sys.exit(code)


def test_a_file_size_limit_is_reported(tmp_path, hf):
    """The kernel limits the file size to 100 kB, like a quota."""
    words = ["--to", "native", "--input", str(hf), "--output", str(tmp_path / "o")]
    done = Fork(convert_with_small_files, words)
    assert done.wait() == 2, done.stderr
    assert f"{tmp_path / 'o'}: cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_mixed_types_in_one_projection_are_errors(tmp_path, hf, convert):
    from safetensors.torch import save_file

    tensors = state(hf)
    key = "model.layers.0.self_attn.k_proj.weight"
    save_file({**tensors, key: tensors[key].bfloat16()}, hf / "model.safetensors")
    text = convert("--to", "native", "--input", hf, "--output", tmp_path / "o", code=2)
    assert "has type bf16, its other parts have fp32" in text


def test_values_out_of_range_of_fp16_are_errors(tmp_path, hf, convert):
    from safetensors.torch import save_file

    tensors = state(hf)
    tensors["model.norm.weight"][3] = 70000.0
    save_file(tensors, hf / "model.safetensors")
    text = convert("--to", "native", "--input", hf, "--output", tmp_path / "o",
                   "--dtype", "fp16", code=2)  # fmt: skip
    assert "out of range of fp16" in text
    assert not (tmp_path / "o").exists()
