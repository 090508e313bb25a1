#!/usr/bin/env bash
# guard.sh FOLDER: requeue this job when its first node is lost, which runs the job script. With sbatch
# --no-kill, Slurm keeps a job that loses a node, also that one: nothing would end the job before its time
# limit. Also notes in the folder of the logs that Slurm has signaled the time limit: it does so once, and
# ranks that restart later would not stop in time. Runs on other nodes of the job.
trap 'touch "$1/time_limit"' USR1
while true; do
    sleep "${GUARD_SECONDS:-30}"
    job=$(scontrol --oneliner show job "$SLURM_JOB_ID") || continue
    [[ "$job" == *" JobState=RUNNING "* ]] || continue
    first=$(sed -n 's/.* BatchHost=\([^ ]*\).*/\1/p' <<< "$job")
    nodes=$(scontrol show hostnames "$(sed -n 's/.* NodeList=\([^ ]*\).*/\1/p' <<< "$job")") || continue
    [[ -n "$first" && -n "$nodes" ]] || continue
    if ! grep -qxF "$first" <<< "$nodes"; then
        echo "$(date '+%F %T') ${SLURMD_NODENAME:-}: $first is lost; requeueing job $SLURM_JOB_ID" >> "$1/guard.log"
        scontrol requeue "$SLURM_JOB_ID"
    fi
done
