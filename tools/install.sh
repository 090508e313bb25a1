#!/usr/bin/env bash
# Make a virtual environment and install the project into it: tools/install.sh VENV [EXTRA]
#
# PyTorch is chosen first, or pip would take the newest build with gigabytes of CUDA libraries:
# with an NVIDIA GPU the CUDA build, else the CPU build.
set -euo pipefail

venv=$1
extra=${2:-}
python=${PYTHON:-python3}
torch=2.13.0

cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*"; }

if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
    say "error: $("$python" --version 2>&1) found, Python 3.10 to 3.13 is needed." \
        "Name another with: make PYTHON=python3.11 install" >&2
    exit 2
fi
if [ ! -x "$venv/bin/python" ]; then
    say "making $venv with $("$python" --version)"
    if ! "$python" -m venv "$venv"; then
        rm -rf "$venv"
        say "error: python3 cannot make a virtual environment; on Debian and Ubuntu install" \
            "the package python3-venv" >&2
        exit 2
    fi
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        say "installing PyTorch $torch for CUDA"
        pip install "torch===$torch"
    elif say "installing PyTorch $torch for CPU" && pip install "torch==$torch+cpu" 2>/dev/null; then
        :
    else
        # The package index has one build only for this Python: it runs on a CPU too.
        say "your package index has no CPU build: taking the one it has. Several GB; to avoid that," \
            "set PIP_EXTRA_INDEX_URL to the CPU address on PyTorch's installation page"
        pip install "torch==$torch"
    fi
fi
say "installing megatron_llmjp${extra:+ with what $extra needs}"
# setuptools below makes the editable install work without fetching a build environment anew.
pip install "setuptools>=77.0.3" wheel
pip install --no-build-isolation -e ".${extra:+[$extra]}"
