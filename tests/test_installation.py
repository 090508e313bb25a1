"""tools/install.sh and containers/install.sh with a simulated driver and pip."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT

TOOLS = ("bash", "cat", "diff", "dirname", "env", "grep", "head", "mktemp", "rm", "sh")
"""Programs that the scripts find; nvidia-smi of this machine is not among them."""

VENV_PYTHON = """\
#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
    *"print(torch.__version__)"*) [ -n "$TORCH" ] && echo "$TORCH" ;;
    *"print(torch.version.cuda"*) echo "$CUDA" ;;
    *"install torch==2.13.0+"*) [ -z "$NO_OTHER_INDEX" ] ;;
    *"pip"*"list"*) cat "$PACKAGES" ;;
    *"install"*"--constraint"*) [ -z "$PIP_REPLACES" ] || echo "torch==2.13.0" > "$PACKAGES" ;;
esac
"""

SMI = """\
#!/bin/sh
case "$*" in
    *driver_version*) echo "$DRIVER" ;;
    *compute_cap*) echo "$CAPABILITY" ;;
esac
exit ${SMI_CODE:-0}
"""


class Machine:
    """A machine with the given programs, on which a script is run."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.venv, self.calls = folder / "bin", folder / "venv", folder / "calls"
        (self.venv / "bin").mkdir(parents=True)
        self.bin.mkdir()
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name) or name)
        self.add(self.venv / "bin" / "python", VENV_PYTHON)

    def add(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def run(self, *command: object, **env: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        return subprocess.run(
            ["bash", *map(str, command)],
            env={
                "PATH": str(self.bin),
                "CALLS": str(self.calls),
                "PYTHON": sys.executable,
                "TMPDIR": str(self.bin.parent),
                "CUDA_HOME": "/nowhere",
                **env,
            },
            capture_output=True,
            text=True,
        )

    def install(self, *extra: str, **env: str) -> subprocess.CompletedProcess[str]:
        if "DRIVER" in env:
            self.add(self.bin / "nvidia-smi", SMI)
        return self.run(ROOT / "tools/install.sh", self.venv, *extra, **env)

    def installed(self) -> list[str]:
        """Return the arguments of each pip install."""
        lines = self.calls.read_text().splitlines()
        return [line.partition(" install ")[2] for line in lines if " install " in line]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


H100 = {"CAPABILITY": "9.0"}
BROKEN = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


@pytest.mark.parametrize(
    ("env", "torch"),
    [
        ({}, "torch==2.13.0+cpu"),
        ({"DRIVER": "580.65.06", **H100}, "torch===2.13.0"),
        ({"DRIVER": "590.10", "CAPABILITY": "10.0"}, "torch===2.13.0"),
        ({"DRIVER": "535.183.01\n535.183.01", **H100}, "torch==2.13.0+cu126"),
        ({"DRIVER": "525.60.13", "CAPABILITY": "Field is not valid"}, "torch==2.13.0+cu126"),
        ({"DRIVER": BROKEN, "SMI_CODE": "9", "TORCH_BUILD": "cpu"}, "torch==2.13.0+cpu"),
        ({"TORCH_BUILD": "cu130"}, "torch==2.13.0+cu130"),  # a login node
    ],
    ids=str,
)
def test_the_build_is_chosen_by_the_driver(machine, env, torch):
    done = machine.install(**env)
    assert done.returncode == 0, done.stderr
    assert machine.installed()[0] == torch
    assert machine.installed()[-1] == "--no-build-isolation -e ."


@pytest.mark.parametrize(
    ("env", "parts"),
    [
        ({"DRIVER": "470.199.02", **H100}, ["470.199.02 is too old", "525", "TORCH_BUILD=cpu"]),
        ({"DRIVER": "570.10", "CAPABILITY": "10.0"}, ["too old", "capability 10.0", "580"]),
        ({"DRIVER": BROKEN, "SMI_CODE": "9"}, [BROKEN, "Repair the driver", "TORCH_BUILD=cpu"]),
        ({"DRIVER": "", "SMI_CODE": "6"}, ["no output"]),
        (
            {"DRIVER": "535.183.01", **H100, "NO_OTHER_INDEX": "1"},
            ["no configured index has PyTorch 2.13.0+cu126", "PIP_EXTRA_INDEX_URL", "580"],
        ),
    ],
    ids=str,
)
def test_a_driver_without_a_build_is_refused(machine, env, parts):
    done = machine.install(**env)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("error: ") == 1
    for part in parts:
        assert part in done.stderr
    assert not any("-e ." in arguments for arguments in machine.installed())


def test_an_installed_pytorch_is_kept(machine):
    done = machine.install("dev", DRIVER="535.1", TORCH="2.11.0+cu128")
    assert done.returncode == 0 and "note:" not in done.stdout
    assert machine.installed()[-1] == "--no-build-isolation -e .[dev]"
    assert not any(arguments.startswith("torch") for arguments in machine.installed())
    done = machine.install(DRIVER="580.1", TORCH="2.13.0+cpu")
    assert done.returncode == 0 and "2.13.0+cpu, which cannot use a GPU" in done.stdout


@pytest.mark.parametrize("file", ["/dist/a-0.1.0-py3-none-any.whl", "/dist/a-0.1.0.tar.gz"])
def test_a_package_is_installed_instead_of_the_checkout(machine, file):
    done = machine.install(file)
    assert done.returncode == 0, done.stderr
    assert machine.installed()[0] == "torch==2.13.0+cpu"
    assert machine.installed()[-1] == f"--no-build-isolation {file}"


def test_transformer_engine_is_built_for_the_installed_pytorch(machine):
    done = machine.install("te", TORCH="2.13.0+cu126", CUDA="12.6")
    assert done.returncode == 2 and "nvcc was not found: load the CUDA toolkit 12.6" in done.stderr
    machine.add(machine.bin / "nvcc", "#!/bin/sh\n")
    done = machine.install("te", TORCH="2.13.0+cu126", CUDA="12.6")
    assert done.returncode == 0, done.stderr
    assert machine.installed()[-1] == (
        "--no-build-isolation transformer-engine[pytorch,core-cu12]>=2.0,<2.21 torch===2.13.0+cu126"
    )
    done = machine.install("te", TORCH="2.13.0+cpu", CUDA="")
    assert done.returncode == 2 and "is a CPU build" in done.stderr
    assert machine.installed() == []


IMAGE_PACKAGES = """\
apex==0.1
numpy==1.26.4
psutil==7.0.0
torch==2.12.0a0+5228986c39.nv26.05
transformer_engine==2.15.0+abc
"""


@pytest.mark.parametrize(
    ("before", "replaces", "code", "part"),
    [
        (IMAGE_PACKAGES, "", 0, ""),
        (IMAGE_PACKAGES, "1", 1, "< torch==2.12.0a0+5228986c39.nv26.05"),
        ("numpy==2.0\n", "", 2, "this image has no PyTorch"),
    ],
)
def test_an_image_keeps_its_packages(machine, tmp_path, before, replaces, code, part):
    packages = tmp_path / "packages"
    packages.write_text(before)
    python = str(machine.venv / "bin" / "python")
    env = {"PYTHON": python, "PACKAGES": str(packages), "PIP_REPLACES": replaces}
    done = machine.run(ROOT / "containers/install.sh", "/opt/checkout", **env)
    assert done.returncode == code, done.stderr
    assert part in done.stderr
    if code != 2:
        (arguments,) = machine.installed()
        assert re.fullmatch(
            r"--no-cache-dir --no-build-isolation --constraint \S+ -e /opt/checkout", arguments
        )


def read(path: str) -> str:
    return (ROOT / path).read_text()


def test_versions_agree():
    """Those of the scripts, of pyproject.toml, of both container files and of the documentation."""
    script, docs = read("tools/install.sh"), read("docs/installation.md")
    values = dict(re.findall(r"^(\w+)=\"?([\w.,<>=]+)\"?(?: #.*)?$", script, re.M))
    assert f'gpu = ["transformer-engine[pytorch]{values["transformer_engine"]}"]' in read(
        "pyproject.toml"
    )
    assert f"[pytorch,core-cu13]{values['transformer_engine']}" in docs
    assert f"| {values['cuda13_driver']} or newer | `{values['torch']}`" in docs
    older = f"{values['cuda12_driver']} to {int(values['cuda13_driver']) - 1}"
    assert f"| {older} | `{values['torch']}+{values['cuda12_build']}`" in docs
    (image,) = re.findall(r"^ARG IMAGE=(\S+)$", read("containers/Dockerfile"), re.M)
    assert re.findall(r"^    image=(\S+)$", read("containers/apptainer.def"), re.M) == [image]
    assert f"| `{image}` (default)" in docs


def test_container_files_are_complete():
    """Both copy the checkout and run the same script in it."""
    lines = read("containers/Dockerfile").splitlines()
    instructions = [line.split()[0] for line in lines if line and line[0] != "#"]
    assert instructions == ["ARG", "FROM", "COPY", "RUN", "WORKDIR"]
    definition = read("containers/apptainer.def")
    sections = re.findall(r"^(%\w+|Bootstrap: .*|From: .*)$", definition, re.M)
    assert sections == [
        *("Bootstrap: docker", "From: {{ image }}"),
        *("%arguments", "%files", "%post", "%test"),
    ]
    for text in ("\n".join(lines), definition):
        assert "/opt/megatron_llmjp/containers/install.sh /opt/megatron_llmjp" in text
    assert os.access(ROOT / "containers/install.sh", os.X_OK)
