"""Malicious files that would execute code or read other files: refused."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.data.indices.index_cache import CONTENTS_FILE
from megatron_llmjp.errors import EXIT_REQUEUE, EXIT_USER_ERROR
from tests.checkpoint.test_safe_unpickling import Malicious
from tests.faults.stage import Stage

OUTCOME = "refused with exit code 2; nothing is executed"
PARTS = ("common.pt", ".metadata", "rng_state", "manifest.json", "config.yaml")
CASES = [*(("alone", part) for part in PARTS), ("dp2", ".metadata")]


@pytest.fixture(scope="module")
def half(stage) -> Path:
    save = stage.folder("honest")
    code, _, errors = stage.run("alone", save, "--exit-interval", 3)
    assert code == EXIT_REQUEUE, errors
    return save


@pytest.mark.fault("malicious checkpoint", OUTCOME)
@pytest.mark.parametrize(("layout", "part"), CASES)
def test_checkpoint(stage: Stage, half: Path, tmp_path: Path, layout: str, part: str):
    save, proof = tmp_path / "save", tmp_path / "proof"
    shutil.copytree(half, save)
    poison(save / "iter_0000003", part, proof)
    code, output, errors = stage.run(layout, save)
    assert code == EXIT_USER_ERROR, output + errors
    assert not proof.exists()
    said = {"manifest.json": "names a file outside its folder", "config.yaml": "config.yaml"}
    assert said.get(part, "refused: loading it would use posix.system") in errors
    assert "Traceback" not in errors and errors.count("error: ") == 1


def poison(folder: Path, part: str, proof: Path) -> None:
    """Make a checkpoint run a command when it is opened, with sizes and checksums set right."""
    malicious = Malicious(proof)
    if part == "common.pt":
        torch.save({"optimizer": malicious}, folder / part)
    elif part == ".metadata":
        (folder / part).write_bytes(pickle.dumps(malicious))
    elif part == "config.yaml":
        command = f"!!python/object/apply:os.system ['touch {proof}']"
        (folder / part).write_text((folder / part).read_text() + f"\nnote: {command}\n")
    elif part == "rng_state":
        index = pickle.loads((folder / ".metadata").read_bytes())
        place = next(p for p in index.storage_data if p.fqn.startswith("rng_state"))
        archive = io.BytesIO()
        torch.save([malicious], archive)
        info = index.storage_data[place]
        file = folder / info.relative_path
        moved = replace(info, offset=file.stat().st_size, length=len(archive.getvalue()))
        index.storage_data[place] = moved
        file.write_bytes(file.read_bytes() + archive.getvalue())
        (folder / ".metadata").write_bytes(pickle.dumps(index))
    manifest = manifests.read_manifest(folder)
    files = manifests.file_entries(folder, manifest.files)
    if part == "manifest.json":
        secret = proof.with_name("secret")
        secret.write_text("secret")
        files["../../secret"] = manifests.file_entry(secret)
    manifests.write_manifest(folder, manifest.model_copy(update={"files": files}))


@pytest.mark.fault("malicious fold file or configuration", OUTCOME)
@pytest.mark.parametrize("flag", ["--fold-file", "--config"])
def test_yaml(stage: Stage, tmp_path: Path, flag: str):
    proof, file = tmp_path / "proof", tmp_path / "file.yaml"
    call = f"!!python/object/apply:os.system ['touch {proof}']"
    file.write_text(f"seed: {call}\nfolds: {call}\n")
    code, _, errors = stage.run("alone", tmp_path / "save", flag, file)
    assert code == EXIT_USER_ERROR, errors
    assert f"{file}" in errors and "Traceback" not in errors
    assert not proof.exists()


@pytest.mark.fault("malicious tokenizer", "its Python files are not read")
def test_tokenizer(stage: Stage, tmp_path: Path):
    """As ``trust_remote_code`` would run it; without a tokenizer.json there is nothing to read."""
    proof = tmp_path / "proof"
    (tmp_path / "tokenizer.py").write_text(f"open({str(proof)!r}, 'w')\n")
    auto = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "tokenizer.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(auto))
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tmp_path)
    code, _, errors = stage.run("alone", tmp_path / "save", *flags)
    assert code == EXIT_USER_ERROR, errors
    assert "tokenizer.json" in errors and "Traceback" not in errors
    assert not proof.exists()


@pytest.mark.fault("malicious index cache", "rebuilt; nothing is executed")
def test_index_cache(stage: Stage, tmp_path: Path):
    """numpy opens a ``.npy`` file that is a pickle, when it is asked as megatron-core asks it."""
    save, cache, proof = tmp_path / "save", tmp_path / "cache", tmp_path / "proof"
    flags = ("--data-cache-path", cache)
    assert stage.run("alone", save, "--exit-interval", 3, *flags)[0] == EXIT_REQUEUE
    for path in cache.rglob("*.npy"):
        path.write_bytes(pickle.dumps(Malicious(proof)).ljust(path.stat().st_size, b"\0"))
        listed = json.loads((path.parent / CONTENTS_FILE).read_text())
        listed["files"][path.name][1] = zlib.crc32(path.read_bytes())
        (path.parent / CONTENTS_FILE).write_text(json.dumps(listed))
    _, errors = stage.resume_and_prove("alone", save, *flags)
    assert "is not an array" in errors and not proof.exists()
