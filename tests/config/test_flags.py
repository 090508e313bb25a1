"""Command line: every flag in every spelling, modes that do not train, error messages."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from megatron_llmjp import cli as pretrain_cli
from megatron_llmjp.config.flags import MODE_ALIASES, MODE_HELP, Mode, flag_names, parse
from megatron_llmjp.config.megatron_flags import (
    CHOICES,
    DEPENDENT_FLAGS,
    RENAMED_FLAGS,
    SWITCH_ALIASES,
)
from megatron_llmjp.config.schema import SECTION_OF, SECTIONS
from megatron_llmjp.errors import UserError
from tests.support.datasets import write_folds
from tests.support.processes import ROOT
from tests.support.training import arguments

VALUES: dict[str, list[str]] = {
    # where a valid value does not follow from the type
    "--config": ["laptop-gpt2"], "--data-path": ["a"], "--override-resume": ["folds"],
    "--rampup-batch-size": ["16", "16", "1000"], "--gpu-memory": ["40GB"],
    "--hidden-dropout": ["0.5"], "--attention-dropout": ["0.5"], "--mfu": ["0.5"],
    "--spike-threshold": ["8"], "--yarn-rotary-scaling-factor": ["2"],
    "--vocab-file": ["x.model"], "--num-layers-per-virtual-pipeline-stage": ["2"],
    "--group-query-attention": [], "--json": [], "--scaling": ["8,16"],
    "--no-bias-gelu-fusion": [], "--no-load-optim": [],
}  # fmt: skip
IN_MODE = {
    "--estimate", "--rehearse", "--suggest-layout", "--world-size", "--gpus", "--gpu",
    "--gpu-memory", "--gpus-per-node", "--mfu", "--mtbf-hours", "--restart-minutes",
    "--queue-minutes", "--write-bandwidth", "--memory-bandwidth", "--link-bandwidth",
    "--network-bandwidth", "--json", "--scaling", "--scaling-plot", "--gpu-hour-price",
    "--gpu-power", "--measured-runs",
}  # fmt: skip
"""Flags of the planned machine, and the modes that need one."""
MODES = {
    *(mode.value for mode in Mode),
    *(alias for names in MODE_ALIASES.values() for alias in names),
}


def value(flag: str) -> list[str]:
    """Return a valid value of a flag."""
    if flag in VALUES:
        return VALUES[flag]
    if flag in CHOICES:
        return [next(iter(CHOICES[flag].values))]
    name = RENAMED_FLAGS.get(flag, flag.removeprefix("--").replace("-", "_"))
    if name not in SECTION_OF:
        is_switch = flag in SWITCH_ALIASES or flag.startswith("--no-") or flag in MODES
        return [] if is_switch else ["7"]
    info = SECTIONS[SECTION_OF[name]].model_fields[name]
    annotation, kind = info.annotation, str(info.annotation)
    if annotation is bool:
        return []
    for choices in (annotation, *get_args(annotation)):
        if get_origin(choices) is Literal:
            return [str(get_args(choices)[-1])]
    return ["8"] if "int" in kind else ["0.5"] if "float" in kind else ["some_path"]


PRINTING = {"-h", "--help", "--version", "--print-completion"}
FLAGS = sorted({*flag_names(), *DEPENDENT_FLAGS, *CHOICES} - PRINTING)


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_in_every_spelling(flag: str) -> None:
    values = value(flag)
    base = ["--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4"]
    base += ["--load", "other", "--finetune"] if flag == "--no-load-optim" else []
    if flag in IN_MODE:
        mode = "--suggest-layout" if flag.startswith("--scaling") else "--estimate"
        base += ["--scaling", "8"] if flag == "--scaling-plot" else []
        base += ["--world-size", "7", *([mode] if flag != "--suggest-layout" else [])]
    expected = parse([*base, flag, *values])
    assert parse([*base, flag.replace("-", "_").replace("__", "--", 1), *values]) == expected
    if len(values) == 1:
        underscored = flag.replace("-", "_").replace("__", "--", 1)
        assert parse([*base, f"{flag}={values[0]}"]) == expected
        assert parse([*base, f"{underscored}={values[0]}"]) == expected
    assert expected.mode is Mode(
        flag if flag in {m.value for m in MODE_HELP} else mode if flag in IN_MODE else ""
    )
    if not values and flag in flag_names():
        with pytest.raises(UserError, match="explicit argument"):
            parse([*base, f"{flag}=true"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modes")
    write_folds(folder, (2, 3, 1))
    return folder


@pytest.fixture
def no_run(monkeypatch):
    """Fail if a run is started."""

    def not_reached(*_: Any) -> int:
        raise AssertionError("a run was started")

    for name in ("_run_rank", "launch"):
        monkeypatch.setattr(pretrain_cli, name, not_reached)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("mode", MODE_HELP)
@pytest.mark.parametrize("spelling", ["dashes", "underscores"])
def test_planning_modes_do_not_train_or_write(mode, spelling, folder, no_run, capsys, monkeypatch):
    # These replace torch.cuda in this process.
    monkeypatch.setattr("megatron_llmjp.planning._build_on_meta", lambda _: "")
    monkeypatch.setattr(pretrain_cli, "check_model", lambda _: [])
    flag = mode.value if spelling == "dashes" else "--" + mode.value[2:].replace("-", "_")
    words = arguments("laptop-llama", folder / "folds.yaml", "--save", folder / "run")
    before = sorted(folder.rglob("*"))
    assert pretrain_cli.main([*words, "--nproc_per_node=2", flag]) == 0
    out = capsys.readouterr().out
    sign = {
        Mode.DRY_RUN: "# 2 processes: TP 1 x PP 1",
        Mode.PLAN_DATA: "fold01",
        Mode.ESTIMATE: "2 H100: TP 1 x PP 1 x DP 2",
        Mode.SUGGEST_LAYOUT: "2 H100, global batch 4",
    }
    assert sign[mode] in out
    assert sorted(folder.rglob("*")) == before
    # Under a launcher one process prints, and none trains.
    for rank in (0, 1):
        for name, number in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(number))
        assert pretrain_cli.main([*words, "--world-size", "2", flag]) == 0
        assert bool(capsys.readouterr().out) == (rank == 0)


def test_none_unsets_a_value_of_a_preset() -> None:
    """Of numbers, choices and layouts; text may be the word."""
    words = ["--config", "llm-jp-4-291b-a27b", "--recompute-granularity", "none"]
    words += ["--recompute-modules", "core_attn", "--virtual-pipeline-model-parallel-size=none"]
    command = parse([*words, "--wandb-project", "none"])
    parallel = command.config.parallel
    assert parallel.recompute_granularity is None
    assert parallel.virtual_pipeline_model_parallel_size is None
    assert command.config.logging.wandb_project == "none"
    with pytest.raises(UserError, match="micro_batch_size"):
        parse(["--config", "laptop-llama", "--micro-batch-size", "none"])


def test_modes_are_mutually_exclusive() -> None:
    flags = [mode.value for mode in MODE_HELP]
    for first in flags:
        for second in flags:
            words = ["--config", "laptop-llama", "--world-size", "2", first, second]
            if first == second:
                assert parse(words).mode is Mode(first)
                continue
            with pytest.raises(UserError, match="are mutually exclusive: pass one of them"):
                parse(words)


TOGETHER = {
    # arguments after a preset: beginning of each line of the message
    "--lr --hiden-size 5 --num-layers x --dry-run --plan_data --yaml-cfg x": [
        "argument --lr: expected one argument",
        "unknown flag --hiden-size",
        "--yaml-cfg is not supported",
        "--dry-run and --plan-data are mutually exclusive",
        "flag --num-layers: num_layers = 'x'",
    ],
    "--world-size 4 --seq-length none": [
        "--world-size requires --dry-run or --estimate",
        "flag --seq-length: seq_length = 'none'",
    ],
    "--estimate --scaling 8 --world-size 8": ["--scaling requires --suggest-layout"],
    "--suggest-layout --scaling 8,x --gpu-power 0": [
        "--scaling 8,x: expected numbers of GPUs such as 64,128,256",
        "--gpu-power 0.0: expected a positive number",
    ],
    "--json --dry-run": ["--json requires --estimate or --suggest-layout"],
    "--gpus 4 --world-size 8 --estimate": ["--world-size 8 and --gpus 4 are synonyms"],
    "--gpu A100 --mfu 0.4": ["--gpu, --mfu describe the machine of a planned run"],
    "--estimate --mfu 2 --gpu-memory big": [
        "--estimate needs --world-size N",
        "--mfu 2.0: expected",
        "--gpu-memory big: expected",
    ],
    "--estimate --world-size 8 --mfu 0 --gpus-per-node 0 --gpu-memory 0": [
        "--mfu 0.0: expected",
        "--gpus-per-node 0: at least 1 GPU",
        "--gpu-memory 0: expected",
    ],
    "--estimate --world-size 8 --mtbf-hours 0 --restart-minutes -1 --queue-minutes nan "
    "--write-bandwidth fast": [
        "--mtbf-hours 0.0: expected a positive number",
        "--restart-minutes -1.0: expected a positive number",
        "--queue-minutes nan: expected a positive number",
        "--write-bandwidth fast: expected a size such as 50GB, the bytes per second",
    ],
    "--nproc-per-node two --min-lr low": [
        "argument --nproc-per-node: invalid int value: 'two'",
        "flag --min-lr: min_lr = 'low'",
    ],
}


@pytest.mark.parametrize("words", TOGETHER)
def test_all_errors_of_a_command_line_are_reported(words: str) -> None:
    with pytest.raises(UserError) as error:
        parse(["--config", "laptop-llama", *words.split()])
    lines = str(error.value).splitlines()
    assert len(lines) == len(TOGETHER[words]), lines
    for line, start in zip(lines, TOGETHER[words], strict=True):
        assert line.startswith(start), line


def words_of(script: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a job script on a machine without Slurm, where only planning modes are possible."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    env |= {"PYTHON": "echo", "MEGATRON_LLMJP": str(ROOT)}
    return subprocess.run(["bash", str(script), *flags], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("mode", MODE_HELP)
def test_job_scripts_accept_the_modes_in_every_spelling(mode: Mode) -> None:
    script = ROOT / "slurm" / "pretrain_llm-jp-3-13b.sh"
    for flag in (mode.value, "--" + mode.value[2:].replace("-", "_")):
        done = words_of(script, "--fold-file", "f", flag)
        assert done.returncode == 0, done.stderr
        command = parse(done.stdout.split()[1:])
        assert (command.mode, command.processes) == (mode, 128)
    done = words_of(script, "--save", "x")
    assert done.returncode == 2 and "submit this" in done.stderr
