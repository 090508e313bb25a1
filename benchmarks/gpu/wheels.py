"""Wheels for a machine without a network: everything that `make gpu` imports, but torch.

    python -m benchmarks.gpu.wheels wheels        # download them, and print their size
    make gpu                                      # on that machine: uses wheels/ if it exists

The versions are those of this environment. The machine must have torch with its dependencies
(numpy is brought, since torch does not require it). No package brings its own dependencies: the
list is complete, without torch, CUDA and what the measurements do not import.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TRAINING = (
    "megatron-core", "pydantic", "pydantic-core", "annotated-types", "typing-inspection",
    "typing-extensions", "PyYAML", "numpy", "packaging", "psutil", "tqdm",
    "tensorboard", "protobuf", "absl-py",
)  # fmt: skip
"""Imported by pretrain_gpt.py."""

COMPARISON = (
    "transformers", "tokenizers", "safetensors", "huggingface-hub", "regex", "httpx2",
    "httpcore2", "anyio", "h11", "idna", "truststore", "typer", "click", "shellingham", "rich",
    "annotated-doc", "pygments", "markdown-it-py", "mdurl", "filelock", "fsspec",
)  # fmt: skip
"""Imported in addition by the comparison with transformers."""

NOT_IMPORTED = {
    "grpcio": "TensorBoard's server",
    "markdown": "TensorBoard's server",
    "pillow": "images in TensorBoard",
    "tensorboard-data-server": "TensorBoard's server",
    "werkzeug": "TensorBoard's server",
    "hf-xet": "downloads",
}
"""Requirements of these packages that are left at home, and what needs them."""

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64", "manylinux1_x86_64", "any")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Download the wheels; returns pip's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.wheels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of that machine (default: 3.12)")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    code = subprocess.run(pip_command(folder, arguments.python)).returncode
    size = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    print(f"{folder}: {len(list(folder.glob('*.whl')))} wheels, {size / 2**20:.0f} MiB")
    return code


def pip_command(folder: Path, python: str) -> list[str]:
    """Return the command that downloads the wheels for Linux on x86-64."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--implementation", "cp", "--python-version", python]
    for abi in (f"cp{python.replace('.', '')}", "abi3", "none"):
        command += ["--abi", abi]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    return command + [f"{p}=={importlib.metadata.version(p)}" for p in (*TRAINING, *COMPARISON)]


if __name__ == "__main__":
    sys.exit(main())
