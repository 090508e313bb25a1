"""pretrain_gpt.py with a save folder that is in use, or was left by a killed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint.run_lock import LOCK
from tests.checkpoint.test_run_lock import HOLD
from tests.support.datasets import write_folds
from tests.support.processes import ROOT, pretrain
from tests.support.training import arguments, history
from tests.support.witness import assert_files_match_manifest


def test_second_run_and_run_after_a_kill(tmp_path):
    folds = write_folds(tmp_path, (2, 2, 1))
    save = tmp_path / "save"
    words = arguments("laptop-llama", folds, "--save", save, "--keep-last", 1)
    first = pretrain(*words, "--save-interval", 2)
    assert first.returncode == 0, first.stderr
    # Checkpoints at fold ends and the newest one are kept.
    assert manifests.complete_iterations(save) == [2, 4, 5]
    assert not list(save.glob(".*json*"))
    curve = history(save)

    command = [sys.executable, "-c", HOLD, str(save)]
    holder = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        second = pretrain(*words)
        assert second.returncode == 2, second.stderr
        assert f"in use by another run (process {holder.pid} on " in second.stderr
        assert "Traceback" not in second.stderr
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()

    newest = save / "iter_0000005"
    damaged = newest / sorted(manifests.read_manifest(newest).files)[1]
    contents = bytearray(damaged.read_bytes())
    contents[len(contents) // 2] ^= 1
    damaged.write_bytes(contents)
    third = pretrain(*words)
    assert third.returncode == 0, third.stderr
    assert f"taking over from process {holder.pid}" in third.stderr
    assert f"{damaged} does not have the checksum of its manifest" in third.stderr
    assert f"checksums of {save / 'iter_0000004'} are correct" in third.stdout
    assert f"resuming from {save / 'iter_0000004'}" in third.stdout
    assert history(save) == curve
    assert_files_match_manifest(newest)
    assert (save / LOCK).exists()
