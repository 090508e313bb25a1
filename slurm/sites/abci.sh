# shellcheck shell=bash disable=SC2034
# PBS Professional on ABCI 3.0: nodes of 8 H200 and eight 200 Gb/s InfiniBand ports. Copy it to
# slurm/site.sh, and submit, in a folder below /groups (home has a quota of 2 TB):
#
#   qsub -P GROUP -q rt_HF -l select=16:mpiprocs=8 -l walltime=168:00:00 -N llm-jp-4-8b -j oe \
#       -- "$PWD/slurm/pretrain.pbs" --config llm-jp-4-8b --save checkpoints ...
#
# -P and -q are mandatory; rt_HF is whole nodes, at most 128, and 168 hours or 21,504 node hours. On a
# reservation: -q RESERVATION -v RTYPE=rt_HF. PBS writes the job's output after its end; that of the
# ranks is in checkpoints/logs while they run.
#
# Verified: options, limits and modules, in ABCI's user guide (docs.abci.ai/v3, January 2026), and in
# LLM-jp's job scripts for ABCI. Not verified: this file on ABCI itself; whether compute nodes may run
# qsub. If not, each job prints the qsub command of the next one.

# PBS starts programs without the login's profile, which defines `module`.
if [[ -f /etc/profile.d/modules.sh ]]; then
    # shellcheck source=/dev/null
    source /etc/profile.d/modules.sh
    # HPC-X has the mpirun that starts ranks in PBS jobs. PyTorch contains its own CUDA and NCCL.
    module load hpcx/2.20
fi

# One rank per GPU; without mpiprocs=8, $PBS_NODEFILE has one line per node.
RANKS_PER_NODE=8

# GPU of --estimate; its memory is the only difference to the H100 that matters there.
GPU=H200

# Minutes before the end of walltime at which a run stops and saves.
SAVE_MINUTES=20

# Export these for llm-jp-4 as published: 16 SMs are left to communication during layer norms, which
# overlaps with them.
# export NVTE_FWD_LAYERNORM_SM_MARGIN=16 NVTE_BWD_LAYERNORM_SM_MARGIN=16
