#!/usr/bin/env bash
# Create a virtual environment and install the project into it: tools/install.sh VENV [EXTRA | FILE]
#
# PyTorch is installed first, because pip would install the newest build with gigabytes of CUDA
# libraries. The build is chosen by the version of the NVIDIA driver; without one it is the CPU build.
# TORCH_BUILD overrides the choice: cpu, cuda (the package index's CUDA build), or a version suffix
# such as cu126 for a build that a configured index has.
#
# FILE is a wheel or an sdist, which is installed instead of this checkout.
#
# tools/install.sh VENV te builds Transformer Engine for the PyTorch in VENV. docs/installation.md
# lists builds, drivers and sources.
set -euo pipefail

venv=$1
extra=${2:-}
python=${PYTHON:-python3}
torch=2.13.0
cuda12_driver=525 # minor version compatibility of CUDA 12.x
cuda12_build=cu126
cuda13_driver=580 # the same of CUDA 13.x, for which the package index's PyTorch is built
transformer_engine=">=2.0,<2.21"

cd "$(dirname "$0")/.."

log() { printf '%s\n' "$*"; }
fail() {
    log "error: $*" >&2
    exit 2
}
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -qq "$@"; }

create_environment() {
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null ||
        fail "found $("$python" --version 2>&1); Python 3.10 to 3.13 is required." \
            "Select another one: make PYTHON=python3.11 install"
    [ ! -x "$venv/bin/python" ] || return 0
    log "creating $venv with $("$python" --version)"
    if ! "$python" -m venv "$venv"; then
        rm -rf "$venv"
        fail "$python cannot create a virtual environment; on Debian and Ubuntu install" \
            "the package python3-venv"
    fi
}

# Print the build of PyTorch for this machine: cpu, cuda, or a version suffix.
choose_build() {
    local driver capability
    if ! command -v nvidia-smi >/dev/null; then
        printf cpu
        return
    fi
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>&1 | head -n 1) || true
    if ! [[ "$driver" =~ ^[0-9]+\.[0-9.]+$ ]]; then
        fail "nvidia-smi does not report the version of the NVIDIA driver: ${driver:-no output}." \
            "Repair the driver, or choose a build of PyTorch: TORCH_BUILD=cpu, cuda (for driver" \
            "$cuda13_driver or newer) or $cuda12_build (for $cuda12_driver or newer)"
    fi
    # Not known to old versions of nvidia-smi, whose GPUs are old too.
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) || true
    [[ "$capability" =~ ^[0-9]+\.[0-9]+$ ]] || capability=0.0
    if ((${driver%%.*} >= cuda13_driver)); then
        printf cuda
    elif ((${driver%%.*} < cuda12_driver)); then
        fail "NVIDIA driver $driver is too old for PyTorch $torch: it needs driver $cuda12_driver or newer" \
            "(CUDA 12.x), or $cuda13_driver or newer (CUDA 13.x). Update it, or install the CPU build:" \
            "TORCH_BUILD=cpu"
    elif ((${capability%%.*} >= 10)); then
        fail "NVIDIA driver $driver is too old: PyTorch $torch supports this GPU (compute capability" \
            "$capability) in its builds for CUDA 13.x only, which need driver $cuda13_driver or newer"
    else
        printf '%s' "$cuda12_build"
    fi
}

install_torch() {
    local build
    build=${TORCH_BUILD:-$(choose_build)}
    log "installing PyTorch $torch, build: $build"
    case $build in
        cuda) pip install "torch===$torch" ;; # === excludes builds with a suffix
        cpu)
            pip install "torch==$torch+cpu" 2>/dev/null && return
            # The package index has only the CUDA build, which also runs on a CPU.
            log "the package index has no CPU build: installing the CUDA build (several GB). To avoid it," \
                "set PIP_EXTRA_INDEX_URL to the CPU index given on PyTorch's installation page"
            pip install "torch==$torch"
            ;;
        *)
            pip install "torch==$torch+$build" ||
                fail "no configured index has PyTorch $torch+$build. The package index has the build for" \
                    "CUDA 13.x only, which needs NVIDIA driver $cuda13_driver or newer. Set" \
                    "PIP_EXTRA_INDEX_URL to the index that PyTorch's installation page (Get Started)" \
                    "gives for this CUDA version (cu126 is CUDA 12.6), or update the driver"
            ;;
    esac
}

# Build Transformer Engine against the installed PyTorch: it has no binary package.
install_transformer_engine() {
    local cuda
    cuda=$("$venv/bin/python" -c 'import torch; print(torch.version.cuda or "")') ||
        fail "PyTorch is not installed in $venv: run make install first"
    [[ -n "$cuda" ]] || fail "PyTorch in $venv is a CPU build; Transformer Engine needs a CUDA build." \
        "Remove $venv and run make install on a machine with a GPU, or with TORCH_BUILD=cuda"
    command -v nvcc >/dev/null || [[ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]] ||
        fail "nvcc was not found: load the CUDA toolkit $cuda (module load cuda, or CUDA_HOME)"
    log "building Transformer Engine for CUDA $cuda (takes minutes)"
    pip install "setuptools>=77.0.3" wheel ninja pybind11
    pip install --no-build-isolation \
        "transformer-engine[pytorch,core-cu${cuda%%.*}]$transformer_engine" "torch===$(torch_version)"
    "$venv/bin/python" -c 'import transformer_engine.pytorch' ||
        fail "Transformer Engine was installed, but cannot be imported; see docs/installation.md"
}

torch_version() { "$venv/bin/python" -c 'import torch; print(torch.__version__)'; }

if [[ "$extra" == te ]]; then
    install_transformer_engine
    exit
fi
create_environment
if ! installed=$(torch_version 2>/dev/null); then
    install_torch
elif [[ "$installed" == *+cpu ]] && command -v nvidia-smi >/dev/null; then
    log "note: $venv has PyTorch $installed, which cannot use a GPU; to replace it, remove $venv first"
fi
# With setuptools installed, builds need no isolated environment.
pip install "setuptools>=77.0.3" wheel
if [[ "$extra" == *.whl || "$extra" == *.tar.gz ]]; then
    log "installing $extra"
    pip install --no-build-isolation "$extra"
else
    log "installing megatron_llmjp${extra:+ with the extra $extra}"
    pip install --no-build-isolation -e ".${extra:+[$extra]}"
fi
