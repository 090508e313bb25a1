"""Site examples: they can be sourced, every value is explained, every variable has a reader."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.processes import ROOT

SITES = sorted((ROOT / "slurm" / "sites").glob("*.sh"))
SCRIPTS = [*(ROOT / "slurm").glob("*.sh"), ROOT / "slurm" / "pretrain.pbs"]
READERS = {
    # variables of NCCL's documentation
    "NCCL": """
        ALGO BUFFSIZE CROSS_NIC DEBUG DYNAMIC_CHUNK_SIZE IB_ADDR_RANGE IB_GID_INDEX IB_HCA
        IB_PCI_RELAXED_ORDERING IB_QPS_PER_CONNECTION IB_TC IB_TIMEOUT IGNORE_CPU_AFFINITY
        MIN_NCHANNELS NET NET_GDR_LEVEL NSOCKS_PERTHREAD P2P_NET_CHUNKSIZE P2P_NVL_CHUNKSIZE
        P2P_PCI_CHUNKSIZE P2P_PXN_LEVEL PROTO PXN_DISABLE SOCKET_IFNAME SOCKET_NTHREADS
        TOPO_FILE""",
    # Google's plugins for NCCL
    "NCCL_FASTRAK": "CTRL_DEV IFNAME LLCM_DEVICE_DIRECTORY",
    "NCCL_GPUDIRECTTCPX": """
        CTRL_DEV PROGRAM_FLOW_STEERING_WAIT_MICROS RX_BINDINGS SOCKET_IFNAME TX_BINDINGS
        UNIX_CLIENT_PREFIX""",
    "GLOO": "SOCKET_IFNAME",
    "CUDA": "DEVICE_ORDER",
    "LD": "LIBRARY_PATH",
}
KNOWN = {f"{prefix}_{name}" for prefix, names in READERS.items() for name in names.split()}
ASSIGNMENT = re.compile(r"\b([A-Z][A-Z0-9_]*)\+?=")


def variables(text: str) -> set[str]:
    """Return the variables that a site file sets, commented lines of shell included."""
    lines = [re.sub(r"^# (?=(export )?[A-Z_]+=)", "", line.strip()) for line in text.splitlines()]
    # A word of the form NAME=VALUE inside a value is no assignment of the shell.
    code = [re.sub(r"\"[^\"]*\"", '""', line) for line in lines if not line.startswith("#")]
    return set(ASSIGNMENT.findall("\n".join(code))) - {"NCCL_LIB_DIR"}  # of Google's own script


@pytest.mark.parametrize("site", SITES, ids=lambda path: path.stem)
def test_a_site_can_be_sourced(site: Path, tmp_path: Path):
    """In the job script's mode, on a login node and in a job, without the cluster's programs."""
    command = f'set -euo pipefail; MEGATRON_LLMJP={ROOT}; source "{site}"; declare -p'
    for job in ({}, {"SLURM_JOB_ID": "7", "SLURM_NNODES": "4", "SLURMD_NODENAME": "a001"}):
        env = {"PATH": os.environ["PATH"], **job}
        done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("site", SITES, ids=lambda path: path.stem)
def test_every_value_is_explained_and_read(site: Path):
    text = site.read_text()
    _head, *paragraphs = text.split("\n\n")
    assert "Verified: " in text and "Not verified: " in text
    for paragraph in paragraphs:
        first = paragraph.splitlines()[0].strip()
        assert first.startswith(("#", "if ")), f"{first}: not explained"
    ours = "\n".join(script.read_text() for script in SCRIPTS)
    for name in variables(text):
        is_ours = re.search(rf"\$\{{?{name}\b", ours) is not None
        assert is_ours or name in KNOWN or name.startswith(("SBATCH_", "NVTE_")), name


def test_the_example_of_all_settings_has_no_setting_without_a_reader():
    text = (ROOT / "slurm" / "site.sh.example").read_text()
    ours = "\n".join(script.read_text() for script in SCRIPTS)
    for name in variables(text):
        is_ours = re.search(rf"\$\{{?{name}\b", ours) is not None
        assert is_ours or name in KNOWN or name.startswith(("SBATCH_", "MEGATRON_LLMJP_")), name


@pytest.mark.long
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_no_warnings():
    shared = [ROOT / "slurm" / name for name in ("common.sh", "pbs.sh", "pretrain.pbs")]
    done = subprocess.run(
        ["shellcheck", "--severity=warning", *map(str, [*SITES, *shared])],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
