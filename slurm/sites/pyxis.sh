# shellcheck shell=bash disable=SC2034
# Ranks in a container of enroot, started by Slurm's plugin pyxis. Append it to slurm/site.sh.
#
# The job script itself runs outside of the container, with PYTHON; ranks and checks run inside.
# Verified: options of srun, in the README of NVIDIA/pyxis. Not verified: this file with pyxis itself.

# The interpreter of the job script, outside: `TORCH_BUILD=cpu make install` is sufficient.
PYTHON="$MEGATRON_LLMJP/.venv/bin/python"

# The interpreter of ranks and checks, inside.
RANK_PYTHON=python3

# Image: a squashfs file on a shared file system, made by `enroot import docker://IMAGE`. An address of a
# registry instead would be fetched by every node at every start.
SRUN_FLAGS="--container-image=/shared/images/megatron_llmjp.sqsh"

# Folders that are visible inside, under the same names: the checkout, data, checkpoints. No spaces: the words
# of SRUN_FLAGS are separated by them.
SRUN_FLAGS+=" --container-mounts=$MEGATRON_LLMJP,/shared/data,/shared/checkpoints"

# The folder from which the job was submitted, to which relative paths refer.
SRUN_FLAGS+=" --container-workdir=${SLURM_SUBMIT_DIR:-$PWD}"

# The home folder can hide packages of the image behind those of ~/.local.
SRUN_FLAGS+=" --no-container-mount-home"

# Variables of which an image may have its own values; those of the job have priority.
SRUN_FLAGS+=" --container-env=PYTHONPATH,NCCL_DEBUG,OMP_NUM_THREADS"

# Ranks do not use MPI: Slurm's PMI hooks for containers are not needed.
SRUN_FLAGS+=" --mpi=none"
