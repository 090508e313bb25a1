#!/usr/bin/env bash
#SBATCH --job-name=preprocess_data
#SBATCH --array=0-15
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --output=%x_%A_%a.log
#SBATCH --requeue
# Tokenize files with a job array of any number of nodes. Each task processes an equal part of the text;
# large files are cut. A task that has finished its part processes those that were lost or have not
# started, and the last task merges all parts into data/ja_text_document:
#
#   sbatch --array=0-63 slurm/preprocess_data.sh --input corpus/ --output-prefix data/ja \
#       --tokenizer-type Llama2Tokenizer --tokenizer-model tok.model --append-eod
#   preprocess_data --status data/ja     # progress, speed and remaining time of all parts
#
# A killed task resumes when it is requeued or resubmitted. To resubmit some tasks of an array, give
# the number of tasks of the whole array: sbatch --array=3,17 ... --shard slurm/64
# With --no-finish-array a task processes only its own part; merge_datasets --parts data/ja merges.
set -euo pipefail
# sbatch runs a copy of this script; Slurm's record of the job has the path of the original.
script=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n '/^ *Command=/{s///p;q}') || true
for folder in "$(dirname "$0")/.." "$(dirname "${script%%.sh *}")/.." "${SLURM_SUBMIT_DIR:-.}"; do
    [[ -n "${MEGATRON_LLMJP:-}" || ! -f "$folder/slurm/common.sh" ]] || MEGATRON_LLMJP=$folder
done
source "${MEGATRON_LLMJP:?is not set: export it with the path of the checkout}/slurm/common.sh"

if [[ -z "${SLURM_ARRAY_TASK_ID:-}" ]]; then
    fail "submit this as an array: sbatch --array=0-15 slurm/preprocess_data.sh ..."
fi
set_shard "$@"
exec "$PYTHON" -m data_tools.preprocess_data --workers "${SLURM_CPUS_PER_TASK:-1}" \
    --finish-array "${SHARD[@]}" "$@"
