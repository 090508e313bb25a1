"""The compiled part of the machine: a shared library that is loaded before torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
_HEADER = "c10/core/impl/FakeGuardImpl.h"


@cache
def why_missing() -> str | None:
    """Return why the library cannot be compiled here, or None."""
    if _compiler() is None:
        return "no C++ compiler (g++, clang++)"
    if not (_torch() / "include" / _HEADER).is_file():
        return f"torch is installed without its headers ({_HEADER})"
    if (_torch() / "lib" / "libtorch_cuda.so").exists():
        return "a CUDA build of torch has its own CUDA devices"
    return None


def compile_library(folder: Path) -> Path:
    """Return the library, compiled into ``folder`` unless it is there already (3 s)."""
    compiler, torch = _compiler(), _torch()
    assert compiler is not None
    version = f"{importlib.metadata.version('torch')} {torch}".encode()
    digest = hashlib.sha256(SOURCE.read_bytes() + version).hexdigest()[:16]
    library = folder / f"fake_cuda_{digest}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    number, unfinished = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.close(number)
    command = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch}/include"]
    command += [str(SOURCE), "-o", unfinished]
    command += [f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib", "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    Path(unfinished).replace(library)
    return library


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent
