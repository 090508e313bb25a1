"""doctor, and shell completion of all programs."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from data_tools import doctor, shell_completion
from megatron_llmjp import __version__
from megatron_llmjp.config.flags import parse
from megatron_llmjp.doctor import machine, packages
from megatron_llmjp.doctor.findings import Finding, format_findings, summarize
from megatron_llmjp.doctor.versions import driver_version
from tests.support.processes import ROOT
from tests.test_packages import declared_programs

PROGRAMS = declared_programs()


def run_program(name: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function = PROGRAMS[name].split(":")
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as ended:
        getattr(importlib.import_module(module), function)()
    assert ended.value.code in (0, None)


def test_the_version_of_the_driver(tmp_path):
    file = tmp_path / "version"
    for text, version in (
        ("x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("Open Kernel Module for x86_64  580.65.06  Release Build  (builder)", "580.65.06"),
    ):
        file.write_text(f"NVRM version: NVIDIA UNIX {text}\nGCC version:  gcc version 12.3.0\n")
        assert driver_version(file) == version
    assert driver_version(tmp_path / "none") is None


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_all_programs(shell, tmp_path, capsys, monkeypatch):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    for name in PROGRAMS:
        run_program(name, "--print-completion", shell, monkeypatch=monkeypatch)
        script = tmp_path / name
        script.write_text(capsys.readouterr().out)
        assert subprocess.run([shell, "-n", str(script)]).returncode == 0, name
        assert name in script.read_text()


def complete(script: Path, *words: str) -> list[str]:
    """Return what bash completes the last word to."""
    line = " ".join(f"'{word}'" for word in words)
    function = f"_shtab_{words[0]}"
    code = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; {function}; "
    code += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_flags_and_values(capsys, monkeypatch, tmp_path):
    script = tmp_path / "script"
    run_program("pretrain_gpt", "--print-completion", "bash", monkeypatch=monkeypatch)
    script.write_text(capsys.readouterr().out)
    assert complete(script, "pretrain_gpt", "--log-f") == ["--log-format"]
    assert complete(script, "pretrain_gpt", "--log-format", "") == ["short", "megatron", "json"]
    assert "--print-completion" not in complete(script, "pretrain_gpt", "--p")
    # The program's parser is kept for the next command line, and takes other programs' values.
    flags = ["--config", "laptop-gpt2", "--tokenizer-type", "JapaneseSentencePiece"]
    flags += ["--data-path", "a", "--tokenizer-model", "a.model"]
    assert parse(flags).config.data.tokenizer_type == "GPTSentencePieceTokenizer"


def test_a_file_per_program(tmp_path, monkeypatch, capsys):
    class Point:
        name = "report_run"

        def load(self):
            return importlib.import_module("data_tools.report_run").main

    class Points(list):
        def select(self, group):
            assert group == "console_scripts"
            return self

    installed = type("Distribution", (), {"entry_points": Points([Point()])})
    monkeypatch.setattr(metadata, "distribution", lambda name: installed)
    words = list(sys.argv)
    for shell, file in (
        ("bash", "report_run"),
        ("zsh", "_report_run"),
        ("fish", "report_run.fish"),
    ):
        assert shell_completion.main([shell, "--output-dir", str(tmp_path / shell)]) == 0
        assert "report_run" in (tmp_path / shell / file).read_text()
    assert sys.argv == words and "wrote the completion of 1 programs" in capsys.readouterr().out
    assert shell_completion.main(["bash"]) == 0
    assert capsys.readouterr().out == (tmp_path / "bash/report_run").read_text() + "\n"


def diagnose(capsys, *words: str) -> tuple[int, dict]:
    code = doctor.main(["--json", "--no-import", *words])
    found = json.loads(capsys.readouterr().out)
    return code, {**found, "findings": {one["name"]: one for one in found["findings"]}}


def test_a_usable_installation(capsys):
    code, found = diagnose(capsys)
    assert code == 0 and found["summary"].startswith("ready to train on")
    assert found["findings"]["torch"]["found"].startswith(str(torch.__version__))
    assert found["versions"][0] == f"doctor (megatron_llmjp) {__version__}"
    assert all(one["needed_for"] and one["remedy"] for one in found["findings"].values())
    assert doctor.main(["--no-import"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in found["findings"]) and found["summary"] in text


def test_a_required_package_is_missing(capsys, monkeypatch):
    known = packages.package_version
    versions = {"pydantic": None, "megatron-core": "0.15.0"}
    monkeypatch.setattr(
        packages, "package_version", lambda n: versions[n] if n in versions else known(n)
    )
    code, found = diagnose(capsys)
    one = found["findings"]["packages"]
    assert code == 1 and one["state"] == "broken" and found["summary"] == "not usable: packages"
    assert "pydantic is not installed" in one["found"]
    assert re.search(r"megatron-core 0\.15\.0 instead of <0\.17,>=0\.16\.1", one["found"])


def test_torch_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(packages, "_IMPORT_TORCH", "raise OSError('libcudart.so.13: not found')")
    state = packages.import_torch()
    assert state.error == "OSError: libcudart.so.13: not found"
    found = {one.name: one for one in packages.package_findings(state)}["torch"]
    assert found.state == "broken" and found.is_error and "libcudart" in found.found
    monkeypatch.setattr(packages, "_IMPORT_TORCH", packages._IMPORT_TORCH.replace("raise", "#"))
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess(
        (), 0, '{"gpus": ["NVIDIA H200"], "nccl": "2.27.3"}', ""
    ))  # fmt: skip
    gpus = {one.name: one for one in machine.machine_findings(packages.import_torch(), ROOT)}
    assert gpus["GPU"].found == "1 x NVIDIA H200" and gpus["NCCL"].found == "2.27.3"


def test_limits_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_free", lambda folder: 64 * 10**6)
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (1024, 4096))
    found = {one.name: one for one in machine.machine_findings(None, tmp_path)}
    assert found["/dev/shm"].state == "broken" and "--shm-size" in found["/dev/shm"].remedy
    assert found["open files"].remedy == "ulimit -n 4096"
    assert found["disk"].state == "broken" and "64.0 MB free" in found["disk"].found
    assert summarize(list(found.values())).endswith("; to repair: /dev/shm, open files, disk")


def test_lines_of_findings():
    findings = [
        Finding("a", "ok", "1.0", "all"),
        Finding("longer", "missing", "none", "some", "install it", required=True),
    ]
    assert format_findings(findings).splitlines() == [
        "ok       a       1.0",
        "ERROR    longer  none",
        "                 needed for some",
        "                 install it",
    ]
