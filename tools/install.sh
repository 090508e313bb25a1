#!/usr/bin/env bash
# Create a virtual environment and install the project into it: tools/install.sh VENV [EXTRA]
#
# PyTorch is installed first, because pip would install the newest build with gigabytes of CUDA
# libraries: the CUDA build with an NVIDIA GPU, else the CPU build.
set -euo pipefail

venv=$1
extra=${2:-}
python=${PYTHON:-python3}
torch=2.13.0

cd "$(dirname "$0")/.."

log() { printf '%s\n' "$*"; }

if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
    log "error: found $("$python" --version 2>&1); Python 3.10 to 3.13 is required." \
        "Select another one: make PYTHON=python3.11 install" >&2
    exit 2
fi
if [ ! -x "$venv/bin/python" ]; then
    log "creating $venv with $("$python" --version)"
    if ! "$python" -m venv "$venv"; then
        rm -rf "$venv"
        log "error: $python cannot create a virtual environment; on Debian and Ubuntu install" \
            "the package python3-venv" >&2
        exit 2
    fi
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        log "installing PyTorch $torch for CUDA"
        pip install "torch===$torch"
    elif log "installing PyTorch $torch for CPU" && pip install "torch==$torch+cpu" 2>/dev/null; then
        :
    else
        # The package index has only the CUDA build, which also runs on a CPU.
        log "the package index has no CPU build: installing the CUDA build (several GB). To avoid it," \
            "set PIP_EXTRA_INDEX_URL to the CPU index given on PyTorch's installation page"
        pip install "torch==$torch"
    fi
fi
log "installing megatron_llmjp${extra:+ with the extra $extra}"
# With setuptools installed, the editable install needs no isolated build environment.
pip install "setuptools>=77.0.3" wheel
pip install --no-build-isolation -e ".${extra:+[$extra]}"
