#!/usr/bin/env bash
# Install the project into an image that has PyTorch: containers/install.sh CHECKOUT
#
# PyTorch, Transformer Engine and what was compiled against them are NVIDIA's own builds, which pip
# would replace by those of the package index. Their versions are constraints here, and compared at
# the end.
set -euo pipefail

checkout=$1
python=${PYTHON:-python3}
kept='^(apex|cuda[-_].*|flash[-_]attn|numpy|nvidia[-_].*|nvfuser|pytorch[-_]triton|torch.*|transformer[-_]engine.*|triton)=='

installed() { "$python" -m pip --disable-pip-version-check list --format=freeze | grep -iE "$kept" || true; }

constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
installed > "$constraints"
if ! grep -qi '^torch==' "$constraints"; then
    echo "error: this image has no PyTorch: use NVIDIA's PyTorch image (docs/installation.md)" >&2
    exit 2
fi
# The image may have constraints of its own (PIP_CONSTRAINT), which apply as well.
"$python" -m pip install --no-cache-dir --no-build-isolation --constraint "$constraints" -e "$checkout"
if ! difference=$(diff "$constraints" <(installed)); then
    printf 'error: pip has changed packages of the image:\n%s\n' "$difference" >&2
    exit 1
fi
"$python" -m pip --disable-pip-version-check check || echo "note: see the conflicts above" >&2
