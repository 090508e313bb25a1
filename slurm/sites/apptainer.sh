# shellcheck shell=bash disable=SC2034
# Ranks in a container of Apptainer (or Singularity, as on ABCI: the same options). Append it to
# slurm/site.sh. containers/ has a definition file.
#
# The job script itself runs outside of the container, with PYTHON; ranks and checks run inside.
# Verified: options, in Apptainer's user guide. Not verified: this file with a GPU.

# The interpreter of the job script, outside: `TORCH_BUILD=cpu make install` is sufficient.
PYTHON="$MEGATRON_LLMJP/.venv/bin/python"

# The interpreter of ranks and checks, inside.
RANK_PYTHON=python3

# --nv: the driver's libraries and the GPUs. Environment variables are passed on by default.
RUN_IN="apptainer exec --nv"

# Folders that are visible inside, under the same names, besides the home and working folder.
RUN_IN+=" --bind $MEGATRON_LLMJP,/shared/data,/shared/checkpoints"

# Image: one file on a shared file system. No spaces: the words of RUN_IN are separated by them.
RUN_IN+=" /shared/images/megatron_llmjp.sif"
