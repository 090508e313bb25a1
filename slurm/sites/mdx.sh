# shellcheck shell=bash disable=SC2034
# Slurm on virtual machines of mdx, where llm-jp v1 and v2 were trained: 8 A100 40 GB and RoCE per
# node. mdx has no scheduler of its own: Slurm is one that the project installed. Copy it to
# slurm/site.sh.
#
# Verified: the NCCL values, in LLM-jp's scripts for mdx (llm-jp/Megatron-LM, branch llmjp0-mdx; they
# ran mpirun by hand), and hardware and file systems, on mdx's page of the system. Not verified: this
# file on mdx itself, and the name of the interface.

# The GPU of --estimate.
GPU=A100-40GB

# RoCE: index 3 of a port's addresses is RoCE v2 with IPv4. NCCL 2.21 and newer find it themselves.
export NCCL_IB_GID_INDEX=3

# RoCE: traffic class of the lossless queue, as the switches are configured.
export NCCL_IB_TC=106

# The interface of TCP connections, at the start of NCCL and gloo, where a node has several: see
# `ip -brief address`. Without it both guess, and may take one that other nodes cannot reach.
# export NCCL_SOCKET_IFNAME=ens2 GLOO_SOCKET_IFNAME=ens2

# Virtual machines share the physical ones: nodes without a response are common. Requeue without them.
EXCLUDE_BAD_NODES=1
