# shellcheck shell=bash disable=SC2034
# Slurm on Sakura Internet's H100 cluster, where llm-jp-3 was trained: 8 H100 and four 200 Gb/s RoCE
# ports per node. Copy it to slurm/site.sh.
#
# Verified: values, in LLM-jp's installer for this cluster (llm-jp/scripts, v4-megatron-sakura,
# mpi_variables.sh). Not verified: this file on the cluster itself.

# Partition of large jobs; LLM-jp's small ones ran in gpu-small. sbatch reads it from the submitting
# shell, so this line belongs into your profile.
# export SBATCH_PARTITION=gpu

# The four ports that connect GPUs. mlx5_2 and mlx5_3 belong to storage and the login network.
export NCCL_IB_HCA=mlx5_0:1,mlx5_1:1,mlx5_4:1,mlx5_5:1

# RoCE: index 3 of a port's addresses is RoCE v2 with IPv4. NCCL 2.21 and newer find it themselves.
export NCCL_IB_GID_INDEX=3

# RoCE: traffic class of the lossless queue, as the switches are configured.
export NCCL_IB_TC=106

# Let the GPUs' PCIe writes pass each other: about twice the bandwidth in virtual machines.
export NCCL_IB_PCI_RELAXED_ORDERING=1

# The subnets of the four ports: those of nodes a000 to a999, or of b000 to b999.
case ${SLURMD_NODENAME:-} in
    a*) export NCCL_IB_ADDR_RANGE=10.1.0.0/16,10.2.0.0/16,10.3.0.0/16,10.4.0.0/16 ;;
    b*) export NCCL_IB_ADDR_RANGE=10.5.0.0/16,10.6.0.0/16,10.7.0.0/16,10.8.0.0/16 ;;
esac
