# shellcheck shell=bash
# Functions of pretrain.pbs; sourced after common.sh, never submitted.

# pretrain_in_pbs ARGUMENTS...: train on all nodes of this job, and submit the next job if training is
# not finished.
pretrain_in_pbs() {
    [[ -z "$(planning_mode "$@")" ]] || exec "$PYTHON" "$MEGATRON_LLMJP/pretrain_gpt.py" "$@"
    [[ -n "${PBS_JOBID:-}" ]] ||
        fail "submit this: qsub -l select=... -l walltime=... -- $0 ARGUMENTS, or add --estimate"
    (($# > 0)) || fail "no arguments: PBS passes none to a script. Submit it as a program:" \
        "qsub -l select=... -l walltime=... -- $MEGATRON_LLMJP/slurm/pretrain.pbs --config ..."
    # PBS starts jobs in the home folder, and programs without the PATH of a login.
    cd "$PBS_O_WORKDIR" || fail "cannot change to $PBS_O_WORKDIR, from which the job was submitted"
    export PATH="$PATH${PBS_O_PATH:+:$PBS_O_PATH}"
    SAVE=$(value_of --save "$@") DEVICE=$(value_of --device "$@")
    [[ -n "$SAVE" ]] || fail "--save DIR is required: the next job resumes from it"
    # shellcheck disable=SC2034  # read by alert
    ARGUMENTS=("$@")
    "$PYTHON" "$MEGATRON_LLMJP/slurm/check_save.py" "$SAVE" || exit
    read_pbs_job
    find_hosts
    set_pbs_environment
    choose_hosts "$@"
    pbs_preflight
    train_in_pbs "$@"
}

read_pbs_job() {
    local job runs
    job=$(qstat -f "$PBS_JOBID") || fail "qstat -f $PBS_JOBID failed: is PBS in the PATH?"
    runs=$(pbs_job runs --job /dev/stdin <<< "$job")
    export PBS_RESTART_COUNT=$((runs - 1))
    LOGS="$SAVE/logs/job${PBS_JOBID%%.*}_$PBS_RESTART_COUNT"
    mkdir -p "$LOGS/preflight"
    printf '%s\n' "$job" > "$LOGS/qstat"
    minutes_left > /dev/null || exit
}

# Print the minutes until the ranks must stop for the last save; nothing without a time limit.
minutes_left() { pbs_job minutes --job "$LOGS/qstat" --margin "${SAVE_MINUTES:-15}"; }

pbs_job() { "$PYTHON" "$MEGATRON_LLMJP/slurm/pbs_job.py" "$@"; }

# Set HOSTS and RANKS_PER_NODE: mpiprocs of the job, or, where the job has one line per node,
# RANKS_PER_NODE of site.sh or the number of GPUs.
find_hosts() {
    local lines
    mapfile -t HOSTS < <(awk '!seen[$0]++' "$PBS_NODEFILE")
    lines=$(wc -l < "$PBS_NODEFILE")
    RANKS_PER_NODE=${RANKS_PER_NODE:-$((lines / ${#HOSTS[@]}))}
    if ((RANKS_PER_NODE == 1)) && command -v nvidia-smi > /dev/null; then
        RANKS_PER_NODE=$(nvidia-smi --list-gpus | wc -l)
    fi
}

# choose_hosts ARGUMENTS...: check the run once before any rank starts, reduce HOSTS to those that its
# layout can use, and write the host file of mpirun.
choose_hosts() {
    local code=0 file="$LOGS/rank_nodes"
    # shellcheck disable=SC2086  # word splitting of settings in site.sh
    ${RUN_IN:-} "${RANK_PYTHON:-$PYTHON}" "$MEGATRON_LLMJP/slurm/choose_nodes.py" --output "$file" \
        --nodes "$(join "${HOSTS[@]}")" --tasks-per-node "$RANKS_PER_NODE" \
        -- "$@" 2> "$LOGS/start.log" || code=$?
    cat "$LOGS/start.log" >&2
    ! grep -q '^error:' "$LOGS/start.log" || end_pbs_job "$code"
    # The first line has the CPUs per rank, which mpirun does not limit.
    [[ ! -s "$file" ]] || mapfile -t HOSTS < <(tail -n +2 "$file")
    printf "%s slots=$RANKS_PER_NODE\n" "${HOSTS[@]}" > "$LOGS/hosts"
    export MASTER_ADDR=${HOSTS[0]}
}

set_pbs_environment() {
    MASTER_PORT=$("$PYTHON" -c 'from megatron_llmjp.parallel.launcher import free_port as p; print(p())')
    export MASTER_PORT OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
    set_common_environment
}

# on_nodes RANKS_PER_NODE COMMAND...: run a command on all nodes. As under srun, it has the whole
# environment of this script, which mpirun passes by name only.
on_nodes() {
    local count=$1 names=() name
    shift
    for name in $(compgen -e); do
        case $name in
            OMPI_* | PMI* | PRTE_* | PBS_* | BASH_* | HOSTNAME | PWD | OLDPWD | SHLVL | TMPDIR | _) ;;
            *) names+=(-x "$name") ;;
        esac
    done
    # shellcheck disable=SC2086  # word splitting of settings in site.sh
    mpirun -np $((count * ${#HOSTS[@]})) --hostfile "$LOGS/hosts" --map-by "ppr:$count:node" \
        --oversubscribe --bind-to none ${MPIRUN_FLAGS:-} "${names[@]}" "$@"
}

pbs_preflight() {
    [[ "${PREFLIGHT:-1}" == 1 ]] || return 0
    local gpus=$RANKS_PER_NODE seconds=${PREFLIGHT_SECONDS:-600}
    [[ "$DEVICE" != cpu ]] || gpus=0
    set_check "$seconds" "$gpus"
    log "preflight of ${#HOSTS[@]} nodes"
    # shellcheck disable=SC2086
    on_nodes 1 timeout --kill-after=30 "$seconds" \
        "$MEGATRON_LLMJP/slurm/with_log.sh" "$LOGS/preflight/%N.log" ${RUN_IN:-} \
        "${CHECK[@]}" || true
    report_preflight "$(join "${HOSTS[@]%%.*}")" && return 0
    # A PBS job cannot exclude nodes by name: the next one could get the same.
    log "error: preflight failed; see $LOGS/preflight (PREFLIGHT=0 skips it)" >&2
    end_pbs_job 1 --end "the preflight check failed"
}

train_in_pbs() {
    local code=0 limit=() terminated=""
    # PBS sends no signal before the time limit: the ranks stop by themselves.
    if ! has_flag --exit-duration-in-mins "$@" && [[ -n "$(minutes_left)" ]]; then
        limit=(--exit-duration-in-mins "$(minutes_left)")
    fi
    log "$((RANKS_PER_NODE * ${#HOSTS[@]})) ranks on ${HOSTS[*]}, logs in $LOGS"
    follow "$LOGS/rank_0000.log"
    # At the time limit, and on qdel, PBS sends SIGTERM, and SIGKILL some seconds later.
    trap 'terminated=yes' TERM
    # shellcheck disable=SC2086
    on_nodes "$RANKS_PER_NODE" "$MEGATRON_LLMJP/slurm/with_log.sh" "$LOGS/rank_%4t.log" ${RUN_IN:-} \
        "${RANK_PYTHON:-$PYTHON}" "$MEGATRON_LLMJP/pretrain_gpt.py" "${limit[@]}" "$@" || code=$?
    stop_following
    if [[ -n "$terminated" ]] && pbs_job minutes --job "$LOGS/qstat" --margin 0.1 &> /dev/null; then
        log "PBS ended the job before its time limit (qdel, or to rerun it): no next job"
        exit "$code"
    fi
    end_pbs_job "$code"
}

# end_pbs_job CODE [--end WHY]: record this end of the job with its first cause, and submit the next job
# if the run is to continue.
end_pbs_job() {
    local next=0
    record_end "$@" || next=$?
    # Before the alert, which takes time: at the time limit PBS kills this script after some seconds.
    if ((next == 0)) &&
        ! retry 5 10 pbs_job submit --job "$LOGS/qstat" -- "$MEGATRON_LLMJP/slurm/pretrain.pbs" "${ARGUMENTS[@]}"; then
        record_end "$1" --end "qsub failed" || next=$?
    fi
    alert --code "$1"
    ((next != 0)) || exit 0
    exit "$1"
}
