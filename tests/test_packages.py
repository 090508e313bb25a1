"""Wheel and sdist, built once: their files against git's list, metadata, the wheel in use."""

from __future__ import annotations

import configparser
import email
import importlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import megatron_llmjp
from megatron_llmjp import project_files
from tests.docs.program_arguments import declared_programs
from tests.support.processes import ROOT

BUILD = "from setuptools import build_meta; print(build_meta.build_{}({!r}))"
COPIED = ("README.md", "README.ja.md", "docs/", "examples/", "pretrain_gpt.py", "slurm/")


def tracked_files():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return {path for path in listed.stdout.split("\0") if path and (ROOT / path).is_file()}


def build(kind, source, output):
    command = [sys.executable, "-c", BUILD.format(kind, str(output))]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The sdist of the tracked files, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("packages")
    for path in tracked_files():
        target = folder / "checkout" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, target)
    (folder / "checkout/slurm/site.sh").write_text("export MEGATRON_LLMJP_ALERT_WEBHOOK=secret\n")
    sdist = build("sdist", folder / "checkout", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return sdist, build("wheel", source, folder)


@pytest.fixture(scope="module")
def installed(packages, tmp_path_factory):
    """A folder with the contents of the wheel, as `pip install --target` writes it."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(packages[1]) as archive:
        for entry in archive.infolist():
            path = Path(archive.extract(entry, folder))
            path.chmod(0o755 if (entry.external_attr >> 16) & stat.S_IXUSR else 0o644)
    return folder


def run(installed, folder, *command):
    env = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True
    )


def copy_examples(installed, folder, *options):
    return run(installed, folder, sys.executable, "-m", "data_tools.copy_examples", *options)


def test_the_sdist_contains_what_git_tracks(packages):
    with tarfile.open(packages[0]) as archive:
        paths = [m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()]
    generated = {p for p in paths if p in ("PKG-INFO", "setup.cfg") or ".egg-info/" in p}
    assert set(paths) - generated == tracked_files()


def test_the_wheel_contains_packages_and_the_files_to_copy(packages):
    tracked = tracked_files()
    expected = {p for p in tracked if p.startswith(("megatron_llmjp/", "data_tools/"))}
    copied = {p for p in tracked if p.startswith(COPIED)}
    expected |= {"pretrain_gpt.py"} | {f"megatron_llmjp/project_files/{p}" for p in copied}
    with zipfile.ZipFile(packages[1]) as archive:
        modes = {e.filename: e.external_attr >> 16 for e in archive.infolist()}
    files = {path for path in modes if ".dist-info/" not in path}
    assert files == expected
    assert {"megatron_llmjp/py.typed", "data_tools/py.typed"} <= files
    for path in copied:
        is_executable = bool(modes[f"megatron_llmjp/project_files/{path}"] & stat.S_IXUSR)
        assert is_executable == os.access(ROOT / path, os.X_OK), path


def test_the_metadata_agree_with_the_source(packages):
    with zipfile.ZipFile(packages[1]) as archive:
        (path,) = (p for p in archive.namelist() if p.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
        top_level = archive.read(path.replace("METADATA", "top_level.txt")).decode().split()
        assert path.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    version = megatron_llmjp.__version__
    assert metadata["Version"] == version
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    assert citation["license"] == metadata["License-Expression"] == "Apache-2.0"
    assert citation["abstract"].strip() and metadata["Summary"] in citation["title"]
    assert top_level == ["data_tools", "megatron_llmjp", "pretrain_gpt"]
    classifiers = " ".join(metadata.get_all("Classifier") or [])
    first, end = sorted(map(int, re.findall(r"3\.(\d+)", metadata["Requires-Python"])))
    classified = [int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", classifiers)]
    assert classified == [*range(first, end)]


def test_every_program_exists(packages):
    with zipfile.ZipFile(packages[1]) as archive:
        (path,) = (p for p in archive.namelist() if p.endswith("/entry_points.txt"))
        points = configparser.ConfigParser()
        points.read_string(archive.read(path).decode())
    programs = dict(points["console_scripts"])
    assert len(programs) >= 12 and programs == declared_programs()
    for name, target in programs.items():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), name
    # A file with `main(argv)` that no program calls was forgotten.
    tools = {p.stem for p in (ROOT / "data_tools").glob("*.py") if "\ndef main(" in p.read_text()}
    assert tools <= set(programs)


def test_a_job_folder_of_the_installed_package_works(installed, tmp_path):
    done = copy_examples(installed, tmp_path, "jobs")
    assert done.returncode == 0, done.stderr
    for path in tracked_files():
        if path.startswith(COPIED):
            copy = tmp_path / "jobs" / path
            assert copy.read_bytes() == (ROOT / path).read_bytes(), path
            assert os.access(copy, os.X_OK) == os.access(ROOT / path, os.X_OK), path
    settings = (tmp_path / "jobs/slurm/site.sh").read_text()
    assert (
        f"\nPYTHON={os.path.normpath(sys.executable)}\n" in settings and "=secret" not in settings
    )
    script = "jobs/slurm/pretrain_llm-jp-3-13b.sh"
    done = run(installed, tmp_path, "bash", script, "--estimate")
    assert done.returncode == 0, done.stderr
    assert "128" in done.stdout and str(ROOT) not in done.stdout + done.stderr
    done = run(installed, tmp_path, sys.executable, "-m", "pretrain_gpt", "--help")
    assert done.returncode == 0 and "llm-jp-3-13b" in done.stdout


def test_copies_replace_no_changed_file_unasked(installed, tmp_path):
    jobs = tmp_path / "jobs"
    (jobs / "slurm").mkdir(parents=True)
    (jobs / "slurm/site.sh").write_text("PYTHON=mine\n")
    (jobs / "README.md").write_text("mine\n")
    done = copy_examples(installed, tmp_path, "jobs")
    assert done.returncode == 2 and "jobs: README.md would be replaced" in done.stderr
    assert not (jobs / "docs").exists()
    done = copy_examples(installed, tmp_path, "jobs", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert (jobs / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()
    assert (jobs / "slurm/site.sh").read_text() == "PYTHON=mine\n"
    assert copy_examples(installed, tmp_path, "jobs").returncode == 0  # equal files
    assert not list(jobs.rglob("*.partial"))


def test_a_checkout_has_the_same_files_to_copy():
    """``copy_examples`` of an editable install, as in the container images."""
    listed = {str(path) for path in project_files.list_files(ROOT)}
    assert {p for p in tracked_files() if p.startswith(COPIED)} <= listed
    assert project_files.source_folder() == ROOT
    assert "slurm/site.sh" not in listed


def test_the_hooks_are_the_checks_of_make_lint():
    """Each hook has a line of `make lint`; all programs are those of .venv, without a network."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repository,) = config["repos"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}
    entries = [hook["entry"].replace(" --force-exclude", "") for hook in repository["hooks"]]
    lines = re.findall(
        r"^\t@\$\(VENV\)/(bin/(?:ruff|mypy).*)$", (ROOT / "Makefile").read_text(), re.M
    )
    assert entries == [f".venv/{line}".removesuffix(" .") for line in lines]
