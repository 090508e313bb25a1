"""Which nodes take part in the check, and the devices that they use."""

from __future__ import annotations

import pytest

from megatron_llmjp.errors import UserError
from megatron_llmjp.preflight.cli import main
from megatron_llmjp.preflight.measurements import measure_disk, probe_device
from megatron_llmjp.preflight.place import Place, find_place

STEP = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_JOB_ID": "123456"}
STEP |= {"MASTER_ADDR": "n0"}


def test_one_process_of_each_node_takes_part():
    first = {**STEP, "SLURM_PROCID": "8", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}
    assert find_place(first) == Place(1, 2, ("n0", 23456))
    assert find_place({**first, "MASTER_PORT": "7"}) == Place(1, 2, ("n0", 7))
    assert find_place({**first, "SLURM_LOCALID": "3"}) is None
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "n0"}
    mpi |= {"MASTER_PORT": "7"}
    assert find_place({**mpi, "OMPI_COMM_WORLD_LOCAL_RANK": "0"}) == Place(1, 2, ("n0", 7))
    with pytest.raises(UserError, match="mpirun started several processes on this node"):
        find_place({**mpi, "OMPI_COMM_WORLD_LOCAL_RANK": "1"})
    assert find_place({}) == Place(0, 1, ("127.0.0.1", 20000))


def test_a_node_without_the_gpus_of_its_job_is_unfit(monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    kind, count, problem = probe_device("auto")
    assert (kind, count) == ("cpu", 0) and "SLURM_GPUS_ON_NODE=8 is set" in problem
    assert probe_device("cpu") == ("cpu", 0, "")
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    assert probe_device("auto") == ("cpu", 0, "")


def test_the_test_file_is_removed(tmp_path):
    (tmp_path / ".preflight-n1-killed").touch()
    (tmp_path / ".preflight-n2-running").touch()
    assert measure_disk(tmp_path, "n1", 1) > 0.0
    assert [path.name for path in tmp_path.iterdir()] == [".preflight-n2-running"]
    with pytest.raises(FileNotFoundError):
        measure_disk(tmp_path / "missing", "n1", 1)


def test_a_folder_that_cannot_be_created_is_an_error_of_the_user(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["--folder", str(tmp_path / "file" / "results")]) == 2
    assert "--folder" in capsys.readouterr().out
