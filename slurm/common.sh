# What every job script of this folder does first; sourced, never submitted.
#
# The scripts are submitted from the checkout: `sbatch slurm/NAME.sh ...`. From elsewhere, set
# MEGATRON_LLMJP to the checkout. slurm/site.sh, when it exists, holds what only this cluster needs
# (see slurm/site.sh.example); it is sourced in every job.

if [[ -f "$MEGATRON_LLMJP/slurm/site.sh" ]]; then
    # shellcheck source=/dev/null
    source "$MEGATRON_LLMJP/slurm/site.sh"
fi

# The interpreter: the site's choice, else the checkout's own environment, else the one on the PATH.
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="$MEGATRON_LLMJP/.venv/bin/python"
    [[ -x "$PYTHON" ]] || PYTHON=python3
fi
export PYTHONPATH="$MEGATRON_LLMJP${PYTHONPATH:+:$PYTHONPATH}"

say() { printf '%s %s: %s\n' "$(date '+%F %T')" "${SLURMD_NODENAME:-$(hostname)}" "$*"; }
