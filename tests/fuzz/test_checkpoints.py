"""Fuzz tests of checkpoints: pickles, torch archives, safetensors and the files next to them."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import random
import shutil
import struct
import zipfile
from functools import partial
from pathlib import Path

import pytest
import tokenizers
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_llmjp.checkpoint import safe_unpickling
from megatron_llmjp.checkpoint.manifest import file_entry
from megatron_llmjp.convert.cli import main
from megatron_llmjp.convert.conversion import plan_conversion
from megatron_llmjp.convert.formats.base import ConversionOptions
from megatron_llmjp.convert.inspection import describe_checkpoint
from tests.support.forks import ROOT
from tests.support.fuzzing import Target, fuzz, run_main
from tests.support.fuzzing_mutators import (
    DEPTH,
    HOSTILE,
    NUMBERS,
    RAW_JSON,
    mutated_bytes,
    mutated_json,
    mutated_value,
    mutated_yaml,
)

FIXTURES = ROOT / "tests" / "convert" / "fixtures"
MDS = FIXTURES / "mds_llama_tp2pp2_fp32" / "ckpt"
ZERO = FIXTURES / "mds_gpt_tp2pp2dp2_bf16z1" / "ckpt"
STEP = "global_step2"

LARGE = struct.pack("<Q", 2**33)
"""A length of 8 GiB."""


def call(function: bytes, *arguments: bytes) -> bytes:
    """Return a pickle that calls a function, given as MODULE newline NAME."""
    return b"\x80\x02c" + function + b"\n(" + b"".join(arguments) + b"tR."


RANGE = b"cbuiltins\nrange\n(I1000000000\ntR"
PICKLES = (
    b"",
    b".",
    b"\x80\x04.",
    b"\x80\xff.",
    b"\x80\x02Nr\xff\xff\xff\x3f.",  # the memo of the C implementation has 8 bytes per entry
    b"\x80\x02N" + b"q\xff" + b"r\x00\x00\x00\x10.",
    *(b"\x80\x05" + opcode + LARGE + b"x." for opcode in (b"\x8e", b"\x8d", b"\x96", b"\x95")),
    b"\x80\x05" + b"B\xff\xff\xff\x7fx.",
    b"\x80\x05" + b"\x8b\xff\xff\xff\x7fx.",
    b"\x80\x05" + b"X\xff\xff\xff\xffx.",
    call(b"builtins\nlist", RANGE),
    call(b"builtins\ntuple", RANGE),
    call(b"builtins\nset", RANGE),
    call(b"torch\nSize", RANGE),
    call(b"builtins\nbytes", b"I8000000000\n"),
    call(b"builtins\nbytearray", b"I8000000000\n"),
    call(b"builtins\nint", b"S'" + b"9" * 5000 + b"'\n"),
    call(b"collections\nOrderedDict", RANGE),
    b"\x80\x02" + b"]" * DEPTH + b"a" * (DEPTH - 1) + b".",
    b"\x80\x02)" + b"\x85" * (3 * DEPTH) + b".",
    b"\x80\x02})" + b"\x85" * (3 * DEPTH) + b"Ns.",  # a nested tuple as a key is hashed
    b"\x80\x02]q\x00h\x00a.",
    b"\x80\x02}q\x00(U\x01ah\x00u.",
    b"\x80\x02I" + b"9" * 100_000 + b"\n.",
    b"\x80\x02L" + b"9" * 4000 + b"L\n.",
    b"\x80\x02U\x02\xff\xff.",
    b"\x80\x02N.N.",
    b"\x80\x02" + b"(" * DEPTH + b".",
    b"\x80\x02" + b"N2" + b"2" * DEPTH + b".",
    b"P1\n.",
    b"\x80\x02U\x01aQ.",
)
"""Pickles that allocate memory, nest deeply or are damaged."""


def archive(content: bytes, compression: int = zipfile.ZIP_STORED, name: str = "data.pkl") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as packed:
        packed.writestr(f"archive/{name}", content)
        packed.writestr("archive/version", b"3\n")
    return stream.getvalue()


def hostile_archives(valid: bytes) -> list[bytes]:
    bomb = b"\x80\x02X" + struct.pack("<I", 150_000_000) + b"a" * 150_000_000 + b"."
    other = io.BytesIO()
    torch.save({"a": torch.ones(3)}, other, _use_new_zipfile_serialization=False)
    contents = (torch.ones(3), [1, 2], {}, {"args": 5, "model": None}, {"args": None, "module": {}})
    saved = []
    for content in contents:
        stream = io.BytesIO()
        torch.save(content, stream)
        saved.append(stream.getvalue())
    return [
        *map(archive, PICKLES),
        *PICKLES[:8],
        archive(bomb, zipfile.ZIP_DEFLATED),
        archive(b"x", name="other.pkl"),
        valid + b"x",
        b"x" + valid,
        valid * 2,
        other.getvalue(),
        *saved,
    ]


OPCODES = (
    *(b"N", b")", b"]", b"}", b"\x88", b"0", b"t", b"R"),
    *(b"U\x01a", b"X\x02\0\0\0\xff\xff", b"G\x7f\xf8\0\0\0\0\0\0"),  # text, not UTF-8, NaN
)


def mutated_pickle(content: bytes, generator: random.Random) -> bytes:
    """Change opcodes of a pickle: remove, repeat or move some, or replace an argument."""
    places = [place for _, _, place in pickletools.genops(content)]
    ops = [content[a:b] for a, b in zip(places, [*places[1:], len(content)], strict=True)]
    for _ in range(generator.choice((1, 1, 2, 4))):
        change, at = generator.randrange(5), generator.randrange(1, len(ops))
        if change == 0:
            del ops[at]
        elif change == 1:
            ops.insert(at, generator.choice(ops))
        elif change == 2:
            ops[at] = generator.choice(ops)
        elif change == 3:
            number = generator.choice(NUMBERS)
            size = generator.choice((b"\x8a\x09", b"J", b"K", b"r", b"j"))
            width = {b"\x8a\x09": 9, b"J": 4, b"K": 1, b"r": 4, b"j": 4}[size]
            ops[at] = size + (number % 256**width).to_bytes(width, "little")
        else:
            ops[at] = generator.choice(OPCODES)
    return b"".join(ops)


def mutated_archive(content: bytes, generator: random.Random) -> bytes:
    """Change the pickle of an archive, and keep its other entries; CRCs are correct."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = mutated_pickle(data, generator)
            elif generator.random() < 0.05:
                continue
            new.writestr(entry.filename, data)
    return stream.getvalue()


def write_folder(name: str, folder: Path) -> Path:
    """Write a small torch_dist folder as torch does."""
    saved = io.BytesIO()
    torch.save({"rng": [1, 2], "state": torch.zeros(5)}, saved)
    (folder / "__0_0.distcp").write_bytes(saved.getvalue())
    torch.save({"iteration": 1, "w": torch.ones(2)}, folder / "common.pt")
    size = torch.Size([2])
    chunk = ChunkStorageMetadata(torch.Size([0]), size)
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), size, [chunk])
    place = _StorageInfo("__0_0.distcp", 0, len(saved.getvalue()))
    index = Metadata(
        {"weight": tensor, "rng_state/shard_0_1": BytesStorageMetadata()},
        storage_data={MetadataIndex("rng_state/shard_0_1"): place},
    )
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder / name


def check_folder(path: Path) -> None:
    safe_unpickling.check_pickles(path.parent)


def copy_checkpoint(source: Path, name: str, folder: Path) -> Path:
    shutil.copytree(source, folder, dirs_exist_ok=True)
    return folder / name


def convert(name: str, words: tuple[str, ...], folder: Path) -> Path:
    """Write a checkpoint of another format from a fixture."""
    tokenizer = folder.parent / "tokenizer"
    tokenizer.mkdir()
    words_and_ids = {word: i for i, word in enumerate(("<unk>", "<s>", "</s>", "a", "b"))}
    model = tokenizers.models.WordLevel(words_and_ids, "<unk>")
    tokenizers.Tokenizer(model).save(str(tokenizer / "tokenizer.json"))
    (tokenizer / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    if words[1] in ("hf", "native"):
        words = (*words, "--tokenizer", str(tokenizer))
    output = folder.parent / "output"
    run_main(main, *words, "--input", MDS, "--output", output)
    for path in output.iterdir():
        shutil.move(path, folder / path.name)
    return next(folder.glob(name))


def plan(source: str, target: str, depth: int, path: Path) -> None:
    """Plan the conversion of a checkpoint, ``depth`` folders above the changed file."""
    folder = path.parents[depth]
    manifest = next(folder.glob("iter_*/manifest.json"), folder)
    if manifest.is_file() and path.is_file() and path != manifest:
        content = json.loads(manifest.read_text())
        name = path.relative_to(manifest.parent).as_posix()
        content["files"][name] = file_entry(path).model_dump()  # so that the content is read
        content.pop("checksum", None)
        manifest.write_text(json.dumps(content))
    describe = ConversionOptions(with_optimizer=source == "zero")
    plan_conversion("megatron-deepspeed" if source == "zero" else source, target, folder, describe)
    if source != "zero":
        describe_checkpoint(folder)


def run_conversion(source: str, path: Path) -> None:
    """Convert a whole checkpoint, which reads all tensors."""
    output = path.parents[1] / "converted"
    shutil.rmtree(output, ignore_errors=True)
    plan_conversion(source, "native", path.parent, ConversionOptions()).run(output, 1, True, None)


def mutated_header(content: bytes, generator: random.Random) -> bytes:
    """Change the JSON header of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(mutated_value(json.loads(content[8 : 8 + length]), generator))
    header = header.replace('"Fuzzed Value"', generator.choice(RAW_JSON))
    text = header.encode(errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def hostile_headers(content: bytes) -> list[bytes]:
    lengths = [number.to_bytes(8, "little") for number in NUMBERS if number >= 0]
    texts = [len(text).to_bytes(8, "little") + text for text in HOSTILE]
    return [*(length + content[8:] for length in lengths), *lengths, *texts]


JSON = (mutated_json, mutated_json, mutated_bytes)
ARCHIVE = (mutated_archive, mutated_archive, mutated_bytes)
PICKLE = (mutated_pickle, mutated_pickle, mutated_bytes)
HF = ("--to", "hf")
DIST = ("--to", "megatron-lm")
LEGACY = (*DIST, "--ckpt-format", "torch")
NATIVE = ("--to", "native")
ANY = "input"
"""The folder of every input."""


def pickles(valid: bytes) -> tuple[bytes, ...]:
    return PICKLES


def hf(
    name: str, mutators=JSON, hostile=lambda _: (), examples: int = 150, run: bool = False
) -> Target:
    parse = partial(run_conversion, "hf") if run else partial(plan, "hf", "native", 0)
    return Target(partial(convert, name, HF), parse, mutators, hostile, examples, ANY)


def native(name: str, mutators, hostile=lambda _: (), examples: int = 40) -> Target:
    make = partial(convert, f"iter_*/{name}", NATIVE)
    depth = 1 + name.count("/")
    return Target(make, partial(plan, "native", "hf", depth), mutators, hostile, examples, ANY)


TARGETS = {
    "common.pt": Target(
        partial(write_folder, "common.pt"), check_folder, ARCHIVE, hostile_archives, 150
    ),
    ".metadata": Target(
        partial(write_folder, ".metadata"), check_folder, PICKLE, pickles, 300, ANY
    ),
    "distcp": Target(
        partial(write_folder, "__0_0.distcp"), check_folder, ARCHIVE, hostile_archives, 150
    ),
    "safetensors": hf(
        "model.safetensors", (mutated_header, mutated_header, mutated_bytes), hostile_headers, 300
    ),
    "safetensors, converted": hf(
        "model.safetensors", (mutated_header, mutated_bytes), examples=20, run=True
    ),
    "config.json": hf("config.json", examples=250),
    "generation_config.json": hf("generation_config.json"),
    "tokenizer_config.json": hf("tokenizer_config.json", examples=60),
    "tokenizer.json": hf("tokenizer.json", examples=30),
    "torch_dist .metadata": Target(
        partial(convert, "*/.metadata", DIST),
        partial(plan, "megatron-lm", "native", 1),
        PICKLE,
        pickles,
        60,
        ANY,
    ),
    "torch_dist common.pt": Target(
        partial(convert, "*/common.pt", DIST),
        partial(plan, "megatron-lm", "native", 1),
        ARCHIVE,
        hostile_archives,
        100,
        ANY,
    ),
    "tracker": Target(
        partial(convert, "latest_checkpointed_iteration.txt", DIST),
        partial(plan, "megatron-lm", "native", 0),
        examples=40,
        names=ANY,
    ),
    "torch": Target(
        partial(convert, "*/mp_rank_00/model_optim_rng.pt", LEGACY),
        partial(plan, "megatron-lm", "native", 2),
        ARCHIVE,
        hostile_archives,
        100,
        ANY,
    ),
    "native .metadata": native(".metadata", PICKLE, pickles),
    "native manifest": native("manifest.json", JSON),
    "native configuration": native("config.yaml", (mutated_yaml, mutated_bytes), examples=20),
    "native tokenizer": native("tokenizer/tokenizer.json", JSON),
    "deepspeed model states": Target(
        partial(copy_checkpoint, MDS, f"{STEP}/mp_rank_00_model_states.pt"),
        partial(plan, "megatron-deepspeed", "native", 1),
        ARCHIVE,
        hostile_archives,
        40,
        ANY,
    ),
    "deepspeed layer": Target(
        partial(copy_checkpoint, MDS, f"{STEP}/layer_02-model_00-model_states.pt"),
        partial(plan, "megatron-deepspeed", "native", 1),
        ARCHIVE,
        lambda _: (),
        40,
        ANY,
    ),
    "deepspeed latest": Target(
        partial(copy_checkpoint, MDS, "latest"),
        partial(plan, "megatron-deepspeed", "native", 0),
        examples=15,
        names=ANY,
    ),
    "deepspeed optimizer": Target(
        partial(copy_checkpoint, ZERO, f"{STEP}/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        partial(plan, "zero", "native", 1),
        ARCHIVE,
        lambda _: (),
        15,
        ANY,
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_any_content_is_read_or_refused(name, tmp_path):
    fuzz(TARGETS, name, tmp_path)
