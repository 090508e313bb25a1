"""Damaged files: every error is a UserError of few lines."""

from __future__ import annotations

import json
import random
import re
import shutil
import zlib
from pathlib import Path

import pytest
import torch

from megatron_llmjp.convert.conversion import plan_conversion
from megatron_llmjp.convert.files.safetensors import read_header
from megatron_llmjp.convert.formats.base import ConversionOptions
from megatron_llmjp.errors import UserError
from tests.convert.hf_models import gpt2, llama, state

FIXTURE = Path(__file__).parent / "fixtures" / "mds_llama_tp2pp2_fp32" / "ckpt"
ZERO = FIXTURE.parent.parent / "mds_gpt_tp2pp2dp2_bf16z1" / "ckpt"
ODD = [None, True, -1, 0, 10**30, 1.5, float("nan"), "x", [], {}, [[]], {"a": 1}, "\ud800", 1 << 40]


def header(folder: Path, change) -> None:
    """Rewrite the header of a safetensors file."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    value = change(json.loads(content[8 : 8 + length]))
    text = json.dumps(value).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: [h], "not a JSON object"),
        (lambda h: {**h, "model.norm.weight": 3}, "lacks dtype, shape or data_offsets"),
        (lambda h: {**h, "model.norm.weight":
                    {**h["model.norm.weight"], "data_offsets": [-256, 0]}}, "at -256 to 0"),
        (lambda h: {**h, "model.norm.weight":
                    {**h["model.norm.weight"], "data_offsets": [0, 256]}}, "overlap"),
        (lambda h: {**h, "model.norm.weight":
                    {**h["model.norm.weight"], "shape": [-8, -8]}}, "shape [-8, -8]"),
    ],
)  # fmt: skip
def test_invalid_headers_are_refused(tmp_path, change, message):
    llama().save_pretrained(tmp_path)
    header(tmp_path, change)
    with pytest.raises(UserError, match=r"model\.safetensors") as error:
        read_header(tmp_path / "model.safetensors")
    assert message in str(error.value)


def mutated_json(value: object, generator: random.Random) -> object:
    """Replace one value in a JSON tree."""
    if isinstance(value, (dict, list)) and value and generator.random() < 0.8:
        key = generator.choice(list(value) if isinstance(value, dict) else range(len(value)))
        changed = value.copy()
        changed[key] = mutated_json(value[key], generator)
        return changed
    return generator.choice(ODD)


def mutated_bytes(content: bytes, generator: random.Random) -> bytes:
    """Change a few bytes, remove some, or truncate the content."""
    data = bytearray(content)
    kind = generator.randrange(3)
    if kind == 0:
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
    elif kind == 1:
        start = generator.randrange(len(data))
        del data[start : start + generator.randint(1, 64)]
    else:
        del data[generator.randrange(len(data)) :]
    return bytes(data)


def plan_or_user_error(folder: Path, format_name: str, options: ConversionOptions) -> None:
    """Plan a conversion; an error must be a UserError of few lines, or one per mistake."""
    try:
        plan_conversion(format_name, "native", folder, options)
    except UserError as error:
        lines = str(error).splitlines()
        assert 0 < len(lines) <= 4 or all(line.startswith(f"{folder}/") for line in lines)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    from megatron_llmjp.convert.cli import main

    root = tmp_path_factory.mktemp("damage")
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    llama(rope_theta=10000.0, **sizes).save_pretrained(root / "hf")
    targets = {
        "dist": ["megatron-lm"],
        "legacy": ["megatron-lm", "--ckpt-format", "torch"],
        "native": ["native"],
        "mds": ["megatron-deepspeed"],
    }
    for name, target in targets.items():
        words = ["--to", *target, "--input", str(root / "hf"), "--output", str(root / name)]
        assert main(words) == 0
    shutil.copytree(ZERO, root / "zero")
    return root


def update_manifest(folder: Path, file: str) -> None:
    """List the damaged file in the manifest as it is, so that its content is read."""
    path = folder / "iter_0000000" / "manifest.json"
    if path.is_file() and path.name != Path(file).name:
        manifest, content = json.loads(path.read_text()), (folder / file).read_bytes()
        entry = {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
        manifest["files"][Path(file).name] = entry
        manifest.pop("checksum", None)  # as in manifests of earlier versions
        path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "format_name", "file"),
    [
        ("hf", "hf", "config.json"),
        ("hf", "hf", "model.safetensors"),
        ("dist", "megatron-lm", "release/.metadata"),
        ("dist", "megatron-lm", "release/common.pt"),
        ("legacy", "megatron-lm", "release/mp_rank_00/model_optim_rng.pt"),
        ("native", "native", "iter_0000000/manifest.json"),
        ("native", "native", "iter_0000000/config.yaml"),
        ("native", "native", "iter_0000000/.metadata"),
        ("mds", "megatron-deepspeed", "global_step0/mp_rank_00_model_states.pt"),
        ("mds", "megatron-deepspeed", "global_step0/layer_02-model_00-model_states.pt"),
        (
            "zero",
            "megatron-deepspeed",
            "global_step2/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        ),
    ],
)
def test_damage_never_causes_a_traceback(tmp_path, sources, name, format_name, file):
    folder = tmp_path / name
    shutil.copytree(sources / name, folder)
    victim = folder / file
    good = victim.read_bytes()
    generator = random.Random(file)
    options = ConversionOptions(with_optimizer=name == "zero")
    for _ in range({"zero": 100, "native": 150}.get(name, 500)):  # these open many files
        if victim.suffix == ".json":
            value = mutated_json(json.loads(good), generator)
            victim.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
        elif victim.suffix == ".safetensors" and generator.random() < 0.5:
            victim.write_bytes(good)
            header(folder, lambda value: mutated_json(value, generator))
        else:
            victim.write_bytes(mutated_bytes(good, generator))
        update_manifest(folder, file)
        plan_or_user_error(folder, format_name, options)
    victim.write_bytes(good)
    update_manifest(folder, file)
    plan_conversion(format_name, "native", folder, options)


@pytest.mark.parametrize("content", [[1, 2], {}, 3, torch.ones(3), {"args": 5, "model": None},
                                     {"args": None, "module": {}, "model": []}])  # fmt: skip
def test_torch_files_with_other_content(tmp_path, sources, content):
    for name, file in (("legacy", "release/mp_rank_00/model_optim_rng.pt"),
                       ("dist", "release/common.pt")):  # fmt: skip
        shutil.copytree(sources / name, tmp_path / name)
        torch.save(content, tmp_path / name / file)
        with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
            plan_conversion("megatron-lm", "native", tmp_path / name, ConversionOptions())
    shutil.copytree(FIXTURE, tmp_path / "mds")
    torch.save(content, next((tmp_path / "mds").glob("*/mp_rank_00_model_states.pt")))
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "mds"))):
        plan_conversion("megatron-deepspeed", "native", tmp_path / "mds", ConversionOptions())


def test_outputs_inside_the_source_are_refused(tmp_path, convert, monkeypatch):
    llama().save_pretrained(tmp_path / "hf")
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    for output in (tmp_path / "hf" / "o", tmp_path / "hf", tmp_path / "link",
                   tmp_path / "link" / "o", tmp_path / "a" / ".." / "hf" / "o"):  # fmt: skip
        words = ("--to", "native", "--input", tmp_path / "hf", "--output", output)
        assert "--output" in convert(*words, code=2)
    monkeypatch.chdir(tmp_path / "hf")
    assert "--output" in convert("--to", "native", "--input", ".", "--output", ".", code=2)
    (tmp_path / "link").unlink()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", ["native", "hf", "megatron-lm", "megatron-deepspeed"])
def test_invalid_parallel_sizes_are_refused_for_every_target(tmp_path, convert, target):
    gpt2().save_pretrained(tmp_path / "hf")
    words = ("--to", target, "--input", tmp_path / "hf", "--output", tmp_path / "o")
    text = convert(*words, "--target-tensor-parallel-size", "3", code=2)
    assert "num_attention_heads 4 is not divisible by tensor parallel size 3" in text
    text = convert(*words, "--target-pipeline-parallel-size", "8", code=2)
    assert "num_layers 3 is not divisible by pipeline parallel size 8" in text


def test_gpt2_without_the_prefix_of_keys(tmp_path, convert):
    from safetensors.torch import save_file

    gpt2().save_pretrained(tmp_path / "hf")
    tensors = {k.removeprefix("transformer."): v for k, v in state(tmp_path / "hf").items()}
    save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    convert("--to", "hf", "--verify", "--input", tmp_path / "hf", "--output", tmp_path / "back")
    assert "transformer.wte.weight" in state(tmp_path / "back")
