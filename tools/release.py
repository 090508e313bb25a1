"""Build and check of a release: wheel and sdist, each installed and used in a clean environment.

    python -m tools.release                            # HEAD, with this Python
    python -m tools.release --python python3.10 --python python3.13
    python -m tools.release --programs-only            # without the quickstart

The packages are built from the files of a commit, so that nothing else of the checkout is in them:
the sdist first, and the wheel from it. Each is installed by ``tools/install.sh`` into a new
environment, and used from a folder outside of the checkout: ``pip check``, all programs, plans of
runs, job scripts and the quickstart. Complete packages are moved to ``dist/``; nothing is uploaded
or tagged. Only the standard library is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools import build_meta; build_meta.build_{}({!r})"
BUILD_PACKAGES = ("setuptools>=77.0.3", "wheel", "twine>=6")
TOKENIZER = "--tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer/tokenizer.model"
COMMANDS = f"""\
pretrain_gpt --config llm-jp-3-13b --estimate --world-size 128
copy_examples llm
train_tokenizer --input llm/examples/quickstart/corpus/en.jsonl --vocab-size 512 --output-dir tokenizer
preprocess_data --input llm/examples/quickstart/corpus/en.jsonl --output-prefix data/en --append-eod {TOKENIZER}
plan_folds --new folds.yaml --datasets data --seq-length 128 --global-batch-size 16
pretrain_gpt --config laptop-llama --fold-file folds.yaml {TOKENIZER} --dry-run
"""  # noqa: E501
"""Run in a folder outside of the checkout; they read presets and import torch."""


class ReleaseError(Exception):
    """A step failed; the message says which."""


def run(*command: str | Path, cwd: Path, log: Path) -> str:
    """Run a command outside of the checkout and return its standard output.

    Args:
        command: program and arguments.
        cwd: working folder.
        log: file that both streams are appended to.

    Raises:
        ReleaseError: its exit code is not 0.
    """
    words = [str(word) for word in command]
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MEGATRON_LLMJP")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {' '.join(words)}\n{done.stdout}{done.stderr}\n")
    if done.returncode:
        output = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise ReleaseError(f"{' '.join(words)}: exit code {done.returncode}\n{output}\nlog: {log}")
    return done.stdout


def check_source(version: str) -> list[str]:
    """Return what is missing for a release: uncommitted changes, versions that differ, an entry."""
    problems = []
    status = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    if status.stdout:
        problems.append(f"the checkout has changes that are not committed:\n{status.stdout}")
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.M)
    if citation is None or citation[1] != version:
        problems.append(f"CITATION.cff has another version than {version}")
    if f"\n## [{version}]" not in (ROOT / "CHANGELOG.md").read_text("utf-8"):
        problems.append(f"CHANGELOG.md has no section [{version}]: rename [Unreleased]")
    return problems


def read_version() -> str:
    """Return ``__version__`` of the package, the only place of the version."""
    text = (ROOT / "megatron_llmjp/__init__.py").read_text("utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.M)
    if found is None:
        raise ReleaseError("megatron_llmjp/__init__.py: __version__ was not found")
    return found[1]


def build_packages(work: Path, log: Path) -> list[Path]:
    """Build the sdist from the files of HEAD, and the wheel from the sdist; return both."""
    environment, dist, source = work / "build_environment", work / "dist", work / "source"
    archive = work / "source.tar"
    commit = run("git", "-C", ROOT, "rev-parse", "HEAD", cwd=work, log=log).strip()
    step(f"build sdist and wheel of {commit[:10]}")
    run(sys.executable, "-m", "venv", environment, cwd=work, log=log)
    python = environment / "bin/python"
    run(python, "-m", "pip", "install", "-q", *BUILD_PACKAGES, cwd=work, log=log)
    run("git", "-C", ROOT, "archive", "--output", archive, commit, cwd=work, log=log)
    _extract(archive, source)
    dist.mkdir()
    run(python, "-c", BUILD.format("sdist", str(dist)), cwd=source, log=log)
    (sdist,) = dist.iterdir()
    _extract(sdist, work / "unpacked")
    (unpacked,) = (work / "unpacked").iterdir()
    run(python, "-c", BUILD.format("wheel", str(dist)), cwd=unpacked, log=log)
    (wheel,) = dist.glob("*.whl")
    run(python, "-m", "twine", "check", "--strict", sdist, wheel, cwd=work, log=log)
    return [wheel, sdist]


def _extract(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(folder)  # our own archive


def check_package(package: Path, python: str, work: Path, log: Path, quickstart: bool) -> None:
    """Install a package into a new environment, and use it from an empty folder."""
    shutil.rmtree(work, ignore_errors=True)
    (work / "away").mkdir(parents=True)
    away, bin_folder = work / "away", work / "environment/bin"
    step(f"{package.name} on {python}: install")
    os.environ["PYTHON"] = python
    run("bash", ROOT / "tools/install.sh", work / "environment", package, cwd=away, log=log)
    run(bin_folder / "python", "-m", "pip", "check", cwd=away, log=log)
    step(f"{package.name} on {python}: programs, plans and job scripts")
    programs = installed_programs(bin_folder / "python", away, log)
    for name in programs:
        for flag in ("--help", "--version"):
            run(bin_folder / name, flag, cwd=away, log=log)
    for command in COMMANDS.splitlines():
        name, *words = command.split()
        run(bin_folder / name, *words, cwd=away, log=log)
    for script in sorted((away / "llm/slurm").glob("pretrain_*.sh")):
        run("bash", script, "--estimate", cwd=away, log=log)
    if quickstart:
        step(f"{package.name} on {python}: quickstart")
        example = away / "llm/examples/quickstart/run.py"
        run(bin_folder / "python", example, "--scale", "0.1", cwd=away, log=log)
    shutil.rmtree(work)  # gigabytes


def installed_programs(python: Path, cwd: Path, log: Path) -> list[str]:
    """Return the names of the programs that the installed package declares."""
    code = (
        "from importlib.metadata import distribution as d\n"
        "for p in d('megatron_llmjp').entry_points: print(p.name)"
    )
    return run(python, "-c", code, cwd=cwd, log=log).split()


def step(text: str) -> None:
    """Print the heading of a step with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Build and check; returns 0, 1 if a step failed, or 2 if the source is not ready."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.release",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--python", action="append", metavar="PYTHON", help="interpreter; may be repeated")
    add("--programs-only", action="store_true", help="do not run the quickstart")
    add("--snapshot", action="store_true", help="accept a source that is not ready for a release")
    arguments = parser.parse_args(argv)
    pythons = arguments.python or [sys.executable]
    for python in pythons:
        if shutil.which(python) is None:
            parser.error(f"--python {python}: no such program")
    try:
        version = read_version()
        problems = check_source(version)
        for problem in problems:
            print(f"{'note' if arguments.snapshot else 'error'}: {problem}", file=sys.stderr)
        if problems and not arguments.snapshot:
            print("For a build of HEAD that is no release, give --snapshot", file=sys.stderr)
            return 2
        return _release(pythons, quickstart=not arguments.programs_only)
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _release(pythons: Sequence[str], quickstart: bool) -> int:
    log = ROOT / "dist" / "release.log"
    log.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="release-") as folder:
        work = Path(folder)
        packages = build_packages(work, log)
        for python in pythons:
            for package in packages:
                check_package(package, python, work / "check", log, quickstart)
        step("all checks passed")
        for package in packages:
            final = log.with_name(package.name)
            shutil.move(package, final)
            digest = hashlib.sha256(final.read_bytes()).hexdigest()
            print(f"{final.relative_to(ROOT)}  {final.stat().st_size:,} bytes  sha256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
