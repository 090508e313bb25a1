"""Readers that share no code with the package: they confirm what it has written.

A test that writes and reads with the package alone passes also if both have the same error.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from pathlib import Path
from typing import Any


def read_tensors(folder: Path) -> dict[str, Any]:
    """Return all tensors of a torch_dist folder, read by torch itself.

    Elements that no file contains are NaN.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {
        name: torch.full(entry.size, torch.nan, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.load(found, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return found


def read_state(folder: Path, kind: str) -> dict[str, Any]:
    """Return the weights, or ``optimizer.state.exp_avg``, by parameter and with layer numbers."""
    found, prefix = {}, f"optimizer.state.{kind}." if kind != "weight" else ""
    for key, tensor in read_tensors(folder).items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name.startswith("optimizer."):
            continue
        if name.startswith("decoder.layers."):
            for number, layer in enumerate(tensor):
                found[name.replace("layers.", f"layers.{number}.", 1)] = layer
        else:
            found[name] = tensor
    return found


def read_weights(folder: Path) -> dict[str, Any]:
    """Return the weights in a torch_dist folder, with one entry per layer."""
    return read_state(folder, "weight")


def assert_files_match_manifest(folder: Path) -> dict[str, Any]:
    """Compare a checkpoint's files and checksums with its ``manifest.json``; return its content."""
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    paths = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    del paths["manifest.json"]
    files = {
        name: {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
        for name, data in ((name, path.read_bytes()) for name, path in paths.items())
    }
    assert content["files"] == files
    rest = {name: value for name, value in content.items() if name != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    assert content["checksum"] == hashlib.sha256(text.encode()).hexdigest()
    return content
