#!/usr/bin/env bash
# with_log.sh FILE COMMAND...: run a command of mpirun with its output in a file of its own. %N in the
# name of the file is the node, %4t the rank, as in srun's --output.
set -euo pipefail
rank=${OMPI_COMM_WORLD_RANK:-${PMI_RANK:?mpirun sets it}}
# The name by which preflight and the logs call this node, as under Slurm.
node=$(hostname -s)
export SLURMD_NODENAME=$node
file=${1//%N/$node}
exec "${@:2}" &> "${file//%4t/$(printf %04d "$rank")}"
