# shellcheck shell=bash disable=SC2034
# Slurm of Google's Cluster Toolkit with A3 Mega (a3-megagpu-8g): 8 H100 and eight 200 Gb/s network
# cards per node, used through GPUDirect-TCPXO. Copy it to slurm/site.sh.
#
# The prolog of the toolkit's blueprint installs the plugin in /var/lib/tcpxo/lib64 and starts its
# receive daemon (RxDM) in jobs of several nodes.
#
# Verified: names and values, in the toolkit's examples/machine-learning/a3-megagpu-8g/nccl-tests
# (version of 2026). Not verified: this file on the cluster; that the NCCL in PyTorch's wheels is one that
# the plugin supports. If not, use a container with Google's NCCL (pyxis.sh).

# Partition of the blueprint; sbatch reads it from the submitting shell: for your profile.
# export SBATCH_PARTITION=a3mega

if [[ -r /var/lib/tcpxo/lib64/nccl-env-profile.sh ]]; then
    # Google's tuning for this version of the plugin: NCCL_ALGO, NCCL_PROTO, chunk sizes and others.
    # shellcheck source=/dev/null
    NCCL_LIB_DIR=/var/lib/tcpxo/lib64 source /var/lib/tcpxo/lib64/nccl-env-profile.sh

    # The plugin itself, libnccl-net.so.
    export LD_LIBRARY_PATH=/var/lib/tcpxo/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

    # The card of control connections, and of NCCL's and gloo's own TCP connections.
    export NCCL_FASTRAK_CTRL_DEV=enp0s12 NCCL_SOCKET_IFNAME=enp0s12 GLOO_SOCKET_IFNAME=enp0s12

    # The eight cards of GPU data.
    export NCCL_FASTRAK_IFNAME=enp6s0,enp7s0,enp13s0,enp14s0,enp134s0,enp135s0,enp141s0,enp142s0

    # Where the plugin finds the devices of the offload engine.
    export NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY=/dev/aperture_devices
fi

# Nodes of a cloud come and go: requeue without those that fail the preflight.
EXCLUDE_BAD_NODES=1
