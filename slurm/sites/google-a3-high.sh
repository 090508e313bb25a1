# shellcheck shell=bash disable=SC2034
# Slurm of Google's Cluster Toolkit with A3 High (a3-highgpu-8g): 8 H100 and four 200 Gb/s network
# cards per node, used through GPUDirect-TCPX. Part of llm-jp-3-172b was trained on these. Copy it to
# slurm/site.sh.
#
# Verified: names and values, in the toolkit's nccl-tests for this machine, and in LLM-jp's scripts for
# Google Cloud (llm-jp/Megatron-LM, branch nii-geniac). Not verified: this file on the cluster; who starts the
# receive daemon: the toolkit's blueprint does, in the prolog of each job of several nodes. Newer
# blueprints offer TCPXO on these machines, with the plugin in /var/lib/tcpxo: see google-a3-mega.sh.

# Partition of the blueprint; sbatch reads it from the submitting shell: for your profile.
# export SBATCH_PARTITION=a3

# Only jobs of several nodes have the daemon; without it NCCL hangs at the first collective.
if ((${SLURM_NNODES:-1} > 1)); then
    # The plugin, and where it is.
    export NCCL_NET=GPUDirectTCPX_v7
    export LD_LIBRARY_PATH=/var/lib/tcpx/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

    # Folder of the sockets of the receive daemon of this job.
    export NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX=/run/tcpx-${SLURM_JOB_ID:-0}

    # The card of control connections, and of NCCL's and gloo's own TCP connections.
    export NCCL_GPUDIRECTTCPX_CTRL_DEV=enp0s12 NCCL_SOCKET_IFNAME=enp0s12 GLOO_SOCKET_IFNAME=enp0s12

    # The four cards of GPU data, each shared by two GPUs.
    export NCCL_GPUDIRECTTCPX_SOCKET_IFNAME=enp6s0,enp12s0,enp134s0,enp140s0

    # Cores of the threads that send and receive, next to each card.
    export NCCL_GPUDIRECTTCPX_TX_BINDINGS="enp6s0:8-21,112-125;enp12s0:8-21,112-125;enp134s0:60-73,164-177;enp140s0:60-73,164-177"
    export NCCL_GPUDIRECTTCPX_RX_BINDINGS="enp6s0:22-35,126-139;enp12s0:22-35,126-139;enp134s0:74-87,178-191;enp140s0:74-87,178-191"

    # Microseconds to wait until the cards steer a new connection to its queue.
    export NCCL_GPUDIRECTTCPX_PROGRAM_FLOW_STEERING_WAIT_MICROS=500000

    # The plugin supports this algorithm and protocol only.
    export NCCL_ALGO=Ring NCCL_PROTO=Simple

    # A GPU uses the card next to it: no connections between different cards, none through other
    # GPUs, and direct copies only where card and GPU share a PCIe switch.
    export NCCL_CROSS_NIC=0 NCCL_P2P_PXN_LEVEL=0 NCCL_NET_GDR_LEVEL=PIX

    # TCP connections per thread, threads per connection.
    export NCCL_NSOCKS_PERTHREAD=4 NCCL_SOCKET_NTHREADS=1

    # Bytes in flight; the defaults are for InfiniBand, whose latency is lower.
    export NCCL_DYNAMIC_CHUNK_SIZE=524288 NCCL_P2P_NET_CHUNKSIZE=524288
    export NCCL_P2P_PCI_CHUNKSIZE=524288 NCCL_P2P_NVL_CHUNKSIZE=1048576 NCCL_BUFFSIZE=4194304
fi

# Nodes of a cloud come and go: requeue without those that fail the preflight.
EXCLUDE_BAD_NODES=1
