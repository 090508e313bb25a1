# shellcheck shell=bash
# Functions shared by all job scripts of this folder; sourced, never submitted.
#
# The scripts are submitted from the checkout: `sbatch slurm/NAME.sh ...`. From elsewhere, set
# MEGATRON_LLMJP to the checkout. slurm/site.sh, if it exists, contains the settings of this cluster
# (see slurm/site.sh.example); every job sources it. docs/slurm.md explains the design.

if [[ -f "$MEGATRON_LLMJP/slurm/site.sh" ]]; then
    # shellcheck source=/dev/null
    source "$MEGATRON_LLMJP/slurm/site.sh"
fi

# The interpreter: PYTHON of site.sh, else .venv of the checkout, else python3 of the PATH.
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="$MEGATRON_LLMJP/.venv/bin/python"
    [[ -x "$PYTHON" ]] || PYTHON=python3
fi
export PYTHONPATH="$MEGATRON_LLMJP${PYTHONPATH:+:$PYTHONPATH}"

log() { printf '%s %s: %s\n' "$(date '+%F %T')" "${SLURMD_NODENAME:-$(hostname)}" "$*"; }

fail() { log "error: $*" >&2; exit 2; }

# value_of --flag ARGUMENTS...: print the value of the flag, or nothing. --some_flag is the same as
# --some-flag, as in the programs themselves.
value_of() {
    local flag=$1 value="" name
    while (($# > 1)); do
        shift
        name=${1%%=*}
        [[ "${name//_/-}" == "$flag" ]] || continue
        if [[ "$1" == *=* ]]; then value=${1#*=}; else value=${2:-}; fi
    done
    printf '%s' "$value"
}

# has_flag --flag ARGUMENTS...: whether the flag is given.
has_flag() {
    local flag=$1 name
    shift
    for name; do
        name=${name%%=*}
        [[ "${name//_/-}" != "$flag" ]] || return 0
    done
    return 1
}

# pretrain ARGUMENTS...: train on all tasks of this job, and requeue the job if training is not finished.
pretrain() {
    local mode
    for mode in --estimate --rehearse --suggest-layout --dry-run --plan-data; do
        ! has_flag "$mode" "$@" || run_planning_mode "$mode" "$@"
    done
    [[ -n "${SLURM_JOB_ID:-}" ]] || fail "submit this script with sbatch $0 ..., or add --estimate"
    SAVE=$(value_of --save "$@") DEVICE=$(value_of --device "$@")
    [[ -n "$SAVE" ]] || fail "--save DIR is required: a requeued job resumes from it"
    "$PYTHON" "$MEGATRON_LLMJP/slurm/check_save.py" "$SAVE" || exit
    LOGS="$SAVE/logs/job${SLURM_JOB_ID}_${SLURM_RESTART_COUNT:-0}"
    mkdir -p "$LOGS"
    set_environment
    preflight
    run_ranks "$@"
}

# run_planning_mode MODE ARGUMENTS...: run --estimate or another mode without training on this machine.
# The world size is that of the #SBATCH lines of the script, the GPU that of site.sh or the script.
run_planning_mode() {
    local mode=$1 nodes tasks machine=()
    shift
    nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$0")
    tasks=$(sed -n 's/^#SBATCH --ntasks-per-node=//p' "$0")
    case $mode in
        --estimate | --rehearse | --suggest-layout) machine=(--gpus-per-node "$tasks" --gpu "${GPU:-H100}") ;;
    esac
    has_flag --gpus "$@" || has_flag --world-size "$@" ||
        machine+=(--world-size $((nodes * tasks)))
    exec "$PYTHON" "$MEGATRON_LLMJP/pretrain_gpt.py" "${machine[@]}" "$@"
}

set_environment() {
    # The address by which Slurm reaches the first node. The port is free on that node, which runs
    # this script.
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    MASTER_PORT=$("$PYTHON" -c 'from megatron_llmjp.parallel.launcher import free_port as p; print(p())')
    export MASTER_ADDR MASTER_PORT
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN} PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1
    ulimit -Sn "$(ulimit -Hn)"
}

# Check all nodes before any rank waits for another in training.
preflight() {
    [[ "${PREFLIGHT:-1}" == 1 ]] || return 0
    log "preflight of $SLURM_NNODES nodes"
    mkdir -p "$LOGS/preflight"
    # shellcheck disable=SC2086  # word splitting of settings in site.sh
    timeout "${PREFLIGHT_SECONDS:-300}" srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
        --kill-on-bad-exit=0 --output="$LOGS/preflight/%N.log" \
        ${RUN_IN:-} "$PYTHON" "$MEGATRON_LLMJP/slurm/preflight.py" check --folder "$LOGS/preflight" \
        --save "$SAVE" --gpus "${SLURM_GPUS_ON_NODE:-0}" --device "${DEVICE:-auto}" \
        --free-disk-gb "${PREFLIGHT_FREE_GB:-50}" || true
    local code=0
    "$PYTHON" "$MEGATRON_LLMJP/slurm/preflight.py" report --folder "$LOGS/preflight" \
        --nodes "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)" || code=$?
    ((code == 0)) && return 0
    if [[ "${EXCLUDE_BAD_NODES:-0}" == 1 && -s "$LOGS/preflight/bad_nodes" ]]; then
        exclude "$(<"$LOGS/preflight/bad_nodes")"
    fi
    log "error: preflight failed; see $LOGS/preflight (PREFLIGHT=0 skips it)" >&2
    exit 1
}

# exclude NODES: requeue this job on other nodes.
exclude() {
    local already
    # Slurm changes the nodes of pending jobs only; requeueing sends SIGTERM to this script.
    trap '' TERM
    already=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')
    [[ -z "$already" || "$already" == "(null)" ]] || set -- "$already,$1"
    log "excluding $1 and requeueing"
    scontrol requeue "$SLURM_JOB_ID" && scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$1"
    sleep infinity # until Slurm ends the job
}

# One task per GPU and no torchrun between Slurm and the ranks: signals and exit codes pass through,
# and Slurm ends all tasks when one fails. Every task sees all GPUs of its node, which NCCL needs for
# peer-to-peer copies, and uses the one of its local rank. Cores are distributed in blocks, so that
# cores and memory of a task usually belong to the NUMA node of its GPU.
run_ranks() {
    local code=0
    log "${SLURM_NTASKS} tasks on $SLURM_JOB_NODELIST, master $MASTER_ADDR:$MASTER_PORT, logs in $LOGS"
    touch "$LOGS/rank_0000.log"
    # With --pid, tail reads the file once more after that process has ended, so no line is lost.
    sleep infinity &
    local running=$!
    tail -n +1 -F --pid="$running" "$LOGS/rank_0000.log" 2>/dev/null &
    local follower=$!
    # shellcheck disable=SC2086  # word splitting of settings in site.sh
    srun --kill-on-bad-exit=1 --wait=60 --distribution=block:block --output="$LOGS/rank_%4t.log" \
        ${SRUN_BIND---cpu-bind=cores --mem-bind=local} ${SRUN_FLAGS:-} ${RUN_IN:-} \
        "$PYTHON" "$MEGATRON_LLMJP/pretrain_gpt.py" "$@" 2> >(tee "$LOGS/srun.log" >&2) || code=$?
    kill "$running"
    wait "$follower" || true
    # srun exits with the highest code of all tasks, and tasks that it stops have high ones: the exit
    # code of the run is that of the task that ended first.
    ((code == 0)) || code=$(first_code "$code")
    ((code == 0 || code == 3)) || show_cause
    "$PYTHON" "$MEGATRON_LLMJP/slurm/requeue.py" --save "$SAVE" --code "$code" || exit "$code"
    ((code == 3)) || wait_for_lost_nodes
    scontrol requeue "$SLURM_JOB_ID"
    sleep infinity # until Slurm ends the job
}

# first_code DEFAULT: print the exit code of the first failed task according to srun's messages, or
# DEFAULT if a signal killed it or there is none.
first_code() {
    local message
    message=$(sed -n 's/^srun: error: .*: tasks\{0,1\} [-0-9,]*: //p' "$LOGS/srun.log" | head -n 1)
    case $message in
        "Exited with exit code "*) printf '%s' "${message##* }" ;;
        *) printf '%s' "$1" ;;
    esac
}

# A job that is requeued before Slurm detects a dead node may start without GPUs (observed with 22.05).
# Slurm detects it within SlurmdTimeout, and then requeues the job itself.
wait_for_lost_nodes() {
    timeout 120 srun --overlap --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
        true && return 0
    local seconds
    seconds=$(scontrol show config | sed -n 's/^SlurmdTimeout *= *\([0-9]*\).*/\1/p')
    log "a node does not respond; Slurm removes it within ${seconds:=300} s and requeues the job"
    sleep $((seconds + 60))
}

# Print the first error of any rank; later ones are consequences.
show_cause() {
    local file
    for file in $(grep -l '^error:' "$LOGS"/rank_*.log | xargs -r ls -tr); do
        [[ "$file" == *rank_0000.log ]] || { log "$file:"; grep -A 20 '^error:' "$file" | head -n 40; }
        return 0
    done
}
