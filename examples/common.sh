# shellcheck shell=bash
# Functions of the examples' run.sh, which sources this file: printed commands, one output folder.
set -euo pipefail

EXAMPLES=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPOSITORY=$(dirname "$EXAMPLES")
STEP=0
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} # torch's own default slows small models down
export TRANSFORMERS_VERBOSITY=${TRANSFORMERS_VERBOSITY:-error} TOKENIZERS_PARALLELISM=false

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Create the output folder: begin DEFAULT "$@", with the arguments of run.sh. Sets OUTPUT.
begin() {
    local default=$1
    shift
    if [[ "${1:-}" == -h || "${1:-}" == --help || $# -gt 1 ]]; then
        printf 'usage: %s [OUTPUT]\n\nOUTPUT is the folder to create (default: %s). %s\n' \
            "$0" "$default" "The settings at the top of $0 are environment variables."
        [[ $# -eq 1 ]] && exit 0 || exit 2
    fi
    OUTPUT=${1:-$default}
    [[ ! -e "$OUTPUT" ]] || fail "$OUTPUT exists: remove it, or give another output folder: $0 OUTPUT"
    mkdir -p "$OUTPUT"
}

# Check that Python packages are installed: require trl peft
require() {
    local package missing=()
    for package in "$@"; do
        python -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('$package'))" ||
            missing+=("$package")
    done
    [[ ${#missing[@]} -eq 0 ]] || fail "not installed: ${missing[*]}. Install the extra with" \
        "\`pip install -e '${REPOSITORY}[examples]'\`"
}

# Print the heading of the next step.
step() {
    STEP=$((STEP + 1))
    printf '\n\033[1m[%s/%s] %s\033[0m\n' "$STEP" "${STEPS:-$(grep -c '^ *step ' "$0")}" "$*"
}

quoted() {
    local word
    for word in "$@"; do
        case $word in
            '' | *[!A-Za-z0-9_./:=,@%+-]*) printf " '%s'" "${word//\'/\'\\\'\'}" ;;
            *) printf ' %s' "$word" ;;
        esac
    done
}

# Print and run a command; an unexpected exit code ends the example.
run() {
    local code=0
    printf '  $%s\n' "$(quoted "$@")"
    "$@" || code=$?
    if [[ $code -ne 0 ]]; then
        printf '\n%s: stopped, the command exited with code %s\n' "$0" "$code" >&2
        exit "$code"
    fi
}

# The environment of `make install` is used unless another one is active.
if [[ -z "${VIRTUAL_ENV:-}" && -x "$REPOSITORY/.venv/bin/python" ]]; then
    PATH="$REPOSITORY/.venv/bin:$PATH"
fi
command -v pretrain_gpt >/dev/null ||
    fail "pretrain_gpt was not found: run make install in $REPOSITORY, or activate its environment"
