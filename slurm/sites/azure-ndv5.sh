# shellcheck shell=bash disable=SC2034
# Slurm on Azure's ND H100 v5 (and H200 v5): 8 GPUs and eight 400 Gb/s InfiniBand ports per node, images of
# Azure HPC. Copy it to slurm/site.sh.
#
# Verified: names and values, in Microsoft's Azure/ai-infrastructure-on-azure (examples/megatron-lm,
# dgx_benchmarking). Not verified: this file on Azure itself. Fewer settings may be as fast: compare the
# bandwidths of preflight with and without the last ones.

# Virtual machines hide which GPU, port and core share a PCIe switch. Without this file, which is part of the
# images, NCCL assumes the wrong paths. In a container, mount it.
export NCCL_TOPO_FILE=/opt/microsoft/ndv5-topo.xml

# Number GPUs as the file does.
export CUDA_DEVICE_ORDER=PCI_BUS_ID

# TCP connections use Ethernet; GPU data uses all ports that NCCL finds.
export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

# Let the GPUs' PCIe writes pass each other, which virtual machines need for full bandwidth.
export NCCL_IB_PCI_RELAXED_ORDERING=1

# NCCL's threads run on the cores of the topology file, not on those of the rank.
export NCCL_IGNORE_CPU_AFFINITY=1

# Several queue pairs per connection use more paths of the fabric.
export NCCL_IB_QPS_PER_CONNECTION=4

# Each GPU sends by the port next to it; data does not pass through another GPU first.
export NCCL_PXN_DISABLE=1

# Larger pieces and more channels than NCCL's defaults, for 400 Gb/s ports.
export NCCL_P2P_NET_CHUNKSIZE=524288 NCCL_MIN_NCHANNELS=32

# Nodes of a cloud come and go: requeue without those that fail the preflight.
EXCLUDE_BAD_NODES=1
