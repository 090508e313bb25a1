# shellcheck shell=bash
# Functions shared by all job scripts of this folder; sourced, never submitted.
#
# A script finds this checkout by its own path, wherever it is submitted from; a copy of a script
# elsewhere needs MEGATRON_LLMJP. slurm/site.sh, if it exists, contains the settings of this cluster
# (see slurm/site.sh.example); every job sources it. docs/slurm.md explains the design.

MEGATRON_LLMJP=$(cd "$MEGATRON_LLMJP" && pwd)
# After sbatch --export=NONE or a list of variables, srun would hide those set here from the ranks.
unset SLURM_EXPORT_ENV

if [[ -f "$MEGATRON_LLMJP/slurm/site.sh" ]]; then
    # shellcheck source=/dev/null
    source "$MEGATRON_LLMJP/slurm/site.sh"
fi

# The interpreter: PYTHON of site.sh, else .venv of the checkout, else python3 of the PATH. Ranks and
# checks in a container have another one, RANK_PYTHON.
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

# set_shard ARGUMENTS...: set SHARD to the flag --shard of this task of a job array, unless it is given.
set_shard() {
    SHARD=()
    if has_flag --shard "$@"; then return; fi
    if ((SLURM_ARRAY_TASK_MIN != 0 || SLURM_ARRAY_TASK_COUNT != SLURM_ARRAY_TASK_MAX + 1)); then
        fail "only some tasks of an array were submitted: add --shard slurm/COUNT, where COUNT is" \
            "the number of tasks of the whole array"
    fi
    # shellcheck disable=SC2034 # used by the scripts
    SHARD=(--shard "slurm/$SLURM_ARRAY_TASK_COUNT")
}

# planning_mode ARGUMENTS...: print the flag of the mode that trains nothing, or nothing.
planning_mode() {
    local mode
    for mode in --estimate --rehearse --suggest-layout --dry-run --plan-data; do
        if has_flag "$mode" "$@"; then
            printf '%s' "$mode"
            return
        fi
    done
}

# pretrain ARGUMENTS...: train on all tasks of this job, and requeue the job if training is not finished.
pretrain() {
    local mode
    mode=$(planning_mode "$@")
    [[ -z "$mode" ]] || run_planning_mode "$mode" "$@"
    [[ -n "${SLURM_JOB_ID:-}" ]] || fail "submit this script with sbatch $0 ..., or add --estimate"
    SAVE=$(value_of --save "$@") DEVICE=$(value_of --device "$@")
    [[ -n "$SAVE" ]] || fail "--save DIR is required: a requeued job resumes from it"
    ARGUMENTS=("$@")
    "$PYTHON" "$MEGATRON_LLMJP/slurm/check_save.py" "$SAVE" || exit
    open_logs
    mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    RANK_NODES=("${NODES[@]}") GUARDS=() STARTED=$(date +%s)
    ((${SLURM_RESTART_COUNT:-0} == 0)) || alert --previous-start &
    trap on_termination TERM
    set_environment
    leave_excluded_nodes
    watch_first_node
    choose_nodes "$@"
    preflight "$@"
    while true; do
        run_ranks "$@" # returns if the job continues without some of its nodes
        choose_nodes "$@"
    done
}

# open_logs: create the folder for the logs of this start, or of this restart within the job.
open_logs() {
    LOGS="$SAVE/logs/job${SLURM_JOB_ID}_${SLURM_RESTART_COUNT:-0}${RESTARTS:+.$RESTARTS}"
    mkdir -p "$LOGS"
}

# leave_excluded_nodes: requeue the job if Slurm allocated a node to it that it excludes.
leave_excluded_nodes() {
    local code=0
    [[ -s "$SAVE/exclusions.jsonl" ]] || return 0
    "$PYTHON" "$MEGATRON_LLMJP/slurm/allocated_nodes.py" --save "$SAVE" --logs "$LOGS" \
        --nodes "$(join "${NODES[@]}")" --exclude-hours "${EXCLUDE_HOURS:-24}" || code=$?
    ((code != 3)) || requeue 1
}

# watch_first_node: let some other nodes requeue the job if the node of this script is lost. They are far
# apart: nodes of the same rack may be lost together.
watch_first_node() {
    local i last=$((${#NODES[@]} - 1))
    ((${#GUARDS[@]} == 0)) || kill "${GUARDS[@]}" 2>/dev/null || true
    GUARDS=()
    ((last > 0)) || return 0
    for i in $(printf '%s\n' 1 $(((last + 1) / 2)) "$last" | sort -nu); do
        srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="${NODES[i]}" \
            --cpus-per-task=1 --output=/dev/null bash "$MEGATRON_LLMJP/slurm/guard.sh" "$LOGS" 2>/dev/null &
        GUARDS+=($!)
    done
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

# join ITEMS...: print the items, separated by commas.
join() { local IFS=,; printf '%s' "$*"; }

set_environment() {
    [[ "${TRAIN_NODES:-1}" =~ ^[1-9][0-9]*$ ]] || fail "TRAIN_NODES=$TRAIN_NODES: expected a number of nodes"
    TASKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_NNODES))}
    set_master "${NODES[0]}"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    set_common_environment
}

# Set what the ranks need under every scheduler.
set_common_environment() {
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN} PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1
    export MEGATRON_LLMJP_ALERTS_BY_JOB=1 # this script sends the alert at the end of the ranks
    ulimit -Sn "$(ulimit -Hn)"
}

# set_master NODE: let ranks meet at this node, by the address by which Slurm reaches it. The port is
# free on the node that runs this script, usually the same.
set_master() {
    MASTER_ADDR=$(scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    MASTER_PORT=$("$PYTHON" -c 'from megatron_llmjp.parallel.launcher import free_port as p; print(p())')
    export MASTER_ADDR MASTER_PORT
}

# Start of a command that the signal before the time limit does not end. Slurm sends it to all steps, in a
# job that is shorter than that time at its start.
WITHOUT_USR1=(sh -c 'trap "" USR1; exec "$@"' sh)

# choose_nodes ARGUMENTS...: check the run once, where its error is seen, before any rank starts. Sets
# RANK_NODES to those of NODES that the layout can use, at most TRAIN_NODES, and CPUS_PER_TASK. The other
# nodes are spare: they take the place of sick ones.
choose_nodes() {
    local code=0 file="$LOGS/rank_nodes" usable=("${NODES[@]:0:${TRAIN_NODES:-${#NODES[@]}}}")
    RANK_NODES=("${usable[@]}") CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    rm -f "$file"
    # As a step, so that a container of SRUN_FLAGS is the one of the ranks.
    # shellcheck disable=SC2086  # word splitting of settings in site.sh
    timeout "${CHECK_SECONDS:-600}" srun ${OVERLAP:-} --nodes=1 --ntasks=1 --ntasks-per-node=1 \
        --nodelist="${NODES[0]}" --cpus-per-task="$CPUS_PER_TASK" ${SRUN_FLAGS:-} "${WITHOUT_USR1[@]}" ${RUN_IN:-} \
        "${RANK_PYTHON:-$PYTHON}" "$MEGATRON_LLMJP/slurm/choose_nodes.py" --output "$file" \
        --nodes "$(join "${usable[@]}")" --tasks-per-node "$TASKS_PER_NODE" \
        --cpus-per-task "$CPUS_PER_TASK" --cpus-per-node "${SLURM_JOB_CPUS_PER_NODE:-}" -- "$@" \
        2> "$LOGS/start.log" || code=$?
    cat "$LOGS/start.log" >&2
    if grep -q '^error:' "$LOGS/start.log"; then
        end_job "$code"
        choose_nodes "$@"
        return
    fi
    if [[ -s "$file" ]]; then
        { read -r CPUS_PER_TASK; mapfile -t RANK_NODES; } < "$file"
    else
        log "warning: the run was not checked before its start (exit code $code)" >&2
    fi
}

# set_check SECONDS GPUS: set CHECK to the command that checks a node in preflight.
set_check() {
    # shellcheck disable=SC2206  # word splitting of settings in site.sh
    CHECK=("${RANK_PYTHON:-$PYTHON}" "$MEGATRON_LLMJP/slurm/preflight.py" check --folder "$LOGS/preflight"
        --save "$SAVE" --gpus "$2" --device "${DEVICE:-auto}" --free-disk-gb "${PREFLIGHT_FREE_GB:-50}"
        --total-seconds $(($1 * 3 / 4)) ${PREFLIGHT_FLAGS:-})
}

# report_preflight NODES: print the result of preflight; fails if the job cannot start on all NODES.
report_preflight() {
    "$PYTHON" "$MEGATRON_LLMJP/slurm/preflight.py" report --folder "$LOGS/preflight" --nodes "$1"
}

# preflight ARGUMENTS...: check all nodes before any rank waits for another in training: one task per node, with
# all of its cores, since it starts a process per GPU.
preflight() {
    [[ "${PREFLIGHT:-1}" == 1 ]] || return 0
    log "preflight of $SLURM_NNODES nodes"
    mkdir -p "$LOGS/preflight"
    local seconds=${PREFLIGHT_SECONDS:-600}
    set_check "$seconds" "${SLURM_GPUS_ON_NODE:-0}"
    # shellcheck disable=SC2086  # word splitting of settings in site.sh
    timeout --kill-after=30 "$seconds" srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
        --cpus-per-task=$((TASKS_PER_NODE * CPUS_PER_TASK)) --cpu-bind=none --kill-on-bad-exit=0 \
        --output="$LOGS/preflight/%N.log" ${SRUN_FLAGS:-} "${WITHOUT_USR1[@]}" ${RUN_IN:-} \
        "${CHECK[@]}" || true
    report_preflight "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)" && return 0
    log "preflight failed; see $LOGS/preflight (PREFLIGHT=0 skips it)" >&2
    end_job 1 --preflight
    choose_nodes "$@"
}

# follow FILES...: print what is written to files, until stop_following.
follow() {
    touch "$@"
    # With --pid, tail reads the files once more after that process has ended, so no line is lost.
    sleep infinity &
    RUNNING=$!
    tail -q -n +1 -F --pid="$RUNNING" "$@" 2>/dev/null &
    FOLLOWER=$!
}

stop_following() {
    kill "$RUNNING" 2>/dev/null || true
    wait "$FOLLOWER" || true
}

# One task per GPU and no torchrun between Slurm and the ranks: signals and exit codes pass through,
# and Slurm ends all tasks when one fails. Every task sees all GPUs of its node, which NCCL needs for
# peer-to-peer copies, and uses the one of its local rank. srun does not inherit --cpus-per-task.
# Cores are distributed in blocks; ranks choose those next to their GPU among all of the node's ranks
# (megatron_llmjp/parallel/cpu_affinity.py).
run_ranks() {
    local code=0 tasks=$((${#RANK_NODES[@]} * TASKS_PER_NODE))
    set_master "${RANK_NODES[0]}"
    log "$tasks tasks on $(scontrol show hostlist "$(join "${RANK_NODES[@]}")")," \
        "$CPUS_PER_TASK CPUs each, master $MASTER_ADDR:$MASTER_PORT, logs in $LOGS"
    STARTED=$(date +%s)
    follow "$LOGS/rank_0000.log" "$LOGS/srun.log"
    # shellcheck disable=SC2086  # word splitting of settings in site.sh
    srun ${OVERLAP:-} --nodes="${#RANK_NODES[@]}" --nodelist="$(join "${RANK_NODES[@]}")" --ntasks="$tasks" \
        --ntasks-per-node="$TASKS_PER_NODE" --cpus-per-task="$CPUS_PER_TASK" \
        --kill-on-bad-exit=1 --wait=60 --distribution=block:block --output="$LOGS/rank_%4t.log" \
        ${SRUN_BIND---cpu-bind=cores --mem-bind=local} ${SRUN_FLAGS:-} ${RUN_IN:-} \
        "${RANK_PYTHON:-$PYTHON}" "$MEGATRON_LLMJP/pretrain_gpt.py" "$@" 2> "$LOGS/srun.log" &
    wait $! || code=$? # bash handles signals while it waits, not while a command runs
    stop_following
    # srun exits with the highest code of all tasks, and tasks that it stops have high ones: the exit
    # code of the run is that of the task that ended first.
    ((code == 0)) || code=$(first_code "$code")
    end_job "$code"
}

# end_job CODE [--preflight]: record this end of the job with its first cause, and the nodes that it
# excludes. Exits or requeues the job; returns if the job continues without them, on NODES.
end_job() {
    local next=0
    decide_end "$@" || next=$?
    # The ranks do not wait for the alerts of a job that continues, nor does Slurm at the time limit.
    if ((next == 4)) || [[ -n "${TERMINATED:-}" ]]; then alert --code "$@" & else alert --code "$@"; fi
    case $next in
        0) requeue "$1" ;;
        4) ;;
        *) exit "$1" ;;
    esac
    mapfile -t NODES < "$LOGS/healthy_nodes"
    RESTARTS=$((${RESTARTS:-0} + 1)) SECONDS=0
    # Slurm 22.05 never frees the CPUs of a step that was running when its job lost a node.
    OVERLAP=--overlap
    open_logs
    watch_first_node
}

# on_termination: handle SIGTERM, which Slurm sends to this script at scancel, at preemption, and at the time
# limit. Slurm does not requeue a job at its limit, which ranks reach if they hang or save for too long.
on_termination() {
    trap '' TERM
    [[ "$(scontrol show job "$SLURM_JOB_ID")" == *" Reason=TimeLimit "* ]] || exit 143
    log "error: the job reached its time limit before its ranks had saved and ended" >&2
    TERMINATED=yes
    end_job 3 # Slurm kills this script after KillWait (30) seconds
}

# record_end CODE [OPTIONS]: record this end of the job, and return how it continues.
record_end() {
    "$PYTHON" "$MEGATRON_LLMJP/slurm/requeue.py" --save "$SAVE" --logs "$LOGS" --seconds "$SECONDS" --code "$@"
}

# decide_end CODE [OPTIONS]: record this end of the job with its nodes, and return how it continues.
decide_end() {
    record_end "$@" \
        --nodes "$(join "${NODES[@]}")" --rank-nodes "$(join "${RANK_NODES[@]}")" \
        --ranks-per-node "$TASKS_PER_NODE" --started "$STARTED" \
        --exclude-bad-nodes "${EXCLUDE_BAD_NODES:-1}" --exclude-hours "${EXCLUDE_HOURS:-24}" \
        --max-excluded-share "${MAX_EXCLUDED_SHARE:-0.1}"
}

# requeue CODE: requeue this job without the nodes that it leaves behind.
requeue() {
    # Slurm changes the nodes of pending jobs only; requeueing sends SIGTERM to this script.
    trap '' TERM
    # Its controller may be restarting.
    if ! retry 40 15 scontrol requeue "$SLURM_JOB_ID"; then
        decide_end "$1" --end "scontrol requeue failed" || true
        alert --code "$1"
        exit "$1"
    fi
    # It may refuse the change while it ends a job that lost a node: see leave_excluded_nodes.
    [[ ! -e "$LOGS/exclude" ]] ||
        retry 5 1 scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$(<"$LOGS/exclude")" || true
    sleep infinity # until Slurm ends the job: an alert may still be on its way
}

# retry TIMES SECONDS COMMAND...: run a command until it succeeds, with pauses.
retry() {
    local times=$1 pause=$2
    shift 2
    until "$@"; do
        ((--times > 0)) || return 1
        sleep "$pause"
    done
}

# alert --code CODE [--preflight]: send the alerts of this end of the job, if the run has any configured.
# alert --previous-start: send that of the previous start, if it was ended with its script.
alert() {
    timeout 90 "$PYTHON" "$MEGATRON_LLMJP/slurm/alert.py" --save "$SAVE" --started "${STARTED:-0}" "$@" \
        -- "${ARGUMENTS[@]}" || true
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
