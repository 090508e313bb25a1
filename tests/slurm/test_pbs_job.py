"""Jobs as OpenPBS 23.06 prints them: time limit, runs, and the qsub of a successor."""

from __future__ import annotations

import time

import pytest

from megatron_llmjp.errors import UserError
from slurm import pbs_job
from slurm.pbs_job import PbsJob, minutes_left

TEXT = """\
Job Id: 7.head
    Job_Name = run
    Resource_List.ncpus = 4
    Resource_List.select = 2:ncpus=2:mpiprocs=2
    Resource_List.walltime = 24:10:00
    stime = Sun Nov 22 04:41:24 2026
    Variable_List = PBS_O_HOME=/root,PBS_O_LANG=C.UTF-8,
\tPBS_O_PATH=/opt/pbs/bin:/usr/loc
\tal/bin,RTYPE=rt_HF,NOTE=a\\,b c,PBS_O_QUEUE=workq
    run_count = 2
    Submit_arguments = {arguments}
    project = _pbs_project_default

"""
DASHED = """-N run -P group -q rt_HF -l select=2:ncpus=2:mpiprocs=2 -
\tl walltime=24:10:00 -koed -v RTYPE=rt_HF,NOTE='a,
\tb c' -W depend=afterany:5 -W umask=22 -- /x/pretrain.pbs --save check,
\t points"""
COMMAND = ["/x/pretrain.pbs", "--save", "check, points"]
KEPT = ["-N", "run", "-P", "group", "-q", "rt_HF", "-l", "select=2:ncpus=2:mpiprocs=2"]
KEPT += ["-l", "walltime=24:10:00", "-koed"]


def job(arguments: str = DASHED) -> PbsJob:
    return PbsJob(TEXT.format(arguments=arguments))


def test_a_program_is_submitted_again_with_its_arguments_unchanged():
    expected = [*KEPT, "-W", "umask=22", "-v", "RTYPE,NOTE", "--", *COMMAND]
    assert job().successor(COMMAND) == ["qsub", *expected]


def test_a_job_script_is_submitted_again_as_the_user_did():
    """Values of -v are known by name only: PBS joins the words of a command line by spaces."""
    words = "-h -v ARGS=--save x -a 0900 -lselect=4 -j oe run.sh"
    expected = ["qsub", "-lselect=4", "-j", "oe", "-v", "RTYPE,NOTE", "run.sh"]
    assert job(words).successor(COMMAND) == expected
    assert job("-V run.sh").successor(COMMAND) == ["qsub", "-V", "run.sh"]
    assert job("run.sh").successor(COMMAND) == ["qsub", "-v", "RTYPE,NOTE", "run.sh"]


def test_a_job_without_its_command_line_is_refused():
    with pytest.raises(UserError, match="Submit_arguments"):
        job("").successor(COMMAND)


def test_time_limit():
    assert (job().runs, job().seconds) == (2, 24 * 3600 + 600)
    start = time.mktime((2026, 11, 22, 4, 41, 24, 0, 0, -1))
    assert minutes_left(job(), start + 60, 15) == "1434.00"
    with pytest.raises(
        UserError, match=r"walltime 1450 minutes: 1440\.0 are used, and 15 are kept"
    ):
        minutes_left(job(), start + 24 * 3600, 15)
    assert minutes_left(PbsJob("Job Id: 7\n"), start, 15) == "" and PbsJob("").runs == 1


def test_arguments_of_the_next_job_follow_two_dashes(tmp_path, monkeypatch):
    (tmp_path / "qstat").write_text(TEXT.format(arguments=DASHED))
    submitted: list[list[str]] = []
    monkeypatch.setattr(pbs_job, "submit", lambda words: submitted.append(words) or 0)
    words = ["submit", "--job", str(tmp_path / "qstat"), "--", *COMMAND, "--", "x"]
    assert pbs_job.main(words) == 0
    assert submitted[0][-6:] == ["--", *COMMAND, "--", "x"]


def test_a_refused_submission_is_shown_for_the_user(capsys):
    assert pbs_job.submit(["sh", "-c", "echo no such queue >&2; exit 1"]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("error: no such queue; submit the next job with:\n  sh -c 'echo no")
    assert pbs_job.submit(["/nowhere/qsub"]) == 1
    assert pbs_job.submit(["echo", "8.head"]) == 0
    assert capsys.readouterr().out.endswith("submitted 8.head: echo 8.head\n")
