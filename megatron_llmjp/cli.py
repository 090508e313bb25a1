"""Entry point of ``pretrain_gpt.py``: parse, check, then plan or start ranks; exit codes.

``--dry-run`` runs all checks and prints the resolved configuration with the origin of each value,
as YAML that ``--config`` reads back. Nothing is written. torch is imported only in a rank, after
the arguments were found valid.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_llmjp.alerts.run_end import alert_end, hang_report_version, ranks_are_supervised
from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint import run_lock as locks
from megatron_llmjp.checkpoint.resume import add_stored_config
from megatron_llmjp.config.flags import Command, Mode, parse, print_notes
from megatron_llmjp.config.layout_validation import data_parallel_size
from megatron_llmjp.config.loading import dump_config, replace_fields
from megatron_llmjp.config.schema import SECTIONS, Config
from megatron_llmjp.config.validation import check_save_rules
from megatron_llmjp.data.batch_size import BatchSizeSchedule
from megatron_llmjp.errors import (
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    DataError,
    RunError,
    UserError,
)
from megatron_llmjp.large_imports import large_imports
from megatron_llmjp.parallel.cuda_environment import set_driver_variables
from megatron_llmjp.parallel.launcher import launch
from megatron_llmjp.parallel.ranks import (
    LAUNCHER_PROCESS_VARIABLE,
    LOCAL_LAUNCHER,
    Ranks,
    find_ranks,
    node_name,
    run_start_time,
    single_process,
)
from megatron_llmjp.parallel.signals import StopRequests
from megatron_llmjp.placeholders import check_packages, substitute_missing
from megatron_llmjp.planning import print_data_plan, print_estimate
from megatron_llmjp.report.page import write_report_at_end
from megatron_llmjp.retrying_file import protect_standard_streams
from megatron_llmjp.run import Run, resolve_run
from megatron_llmjp.start_checks import check_start, overlap_warnings

KNOWN_ERRORS = (DataError, RunError, UserError)
"""Errors whose message says everything."""
PEER_FAILURE_DELAY_SECONDS = 8.0
"""Delay of a rank that fails because a peer exited, so that the cause is printed first."""


def with_intact_checkpoint(run: Run, world_size: int) -> Run:
    """Apply a run's own checks of the save folder and the checkpoint, as ``--dry-run`` needs them.

    Returns:
        The run, resumed from the newest checkpoint that passes.

    Raises:
        UserError: another run uses the save folder, or no checkpoint is complete.
    """
    save = run.config.checkpoint.save
    if save and not run.config.training.eval_only:
        locks.refuse_if_in_use(Path(save))
    damaged: dict[str, str] = {}
    while run.resume is not None and run.config.checkpoint.verify_checkpoint:
        folder = run.resume.folder
        problems = manifests.file_problems(folder, run.resume.manifest, checksums=True)
        if not problems:
            break
        damaged[str(folder)] = problems[0]
        run = resolve_run(run.requested, world_size, damaged)
    return run


def check_model(run: Run) -> list[str]:
    """Check the model with megatron-core, and the pickles of the checkpoint.

    Imports torch, which takes seconds.

    Returns:
        A note if the run could not train on this machine for lack of a GPU: login nodes have none.

    Raises:
        UserError: megatron-core refuses the model, or a pickle is not plain data.
    """
    with large_imports():
        from megatron_llmjp.parallel import device as devices

        device = devices.setup_rank(run.config.parallel.device, 0)
        from megatron_llmjp.checkpoint import safe_unpickling
        from megatron_llmjp.model.gpt import transformer_config

    # The machine that plans a run may have no GPU.
    config = replace_fields(run.config, transformer_impl=None)
    transformer_config(config, device)
    if run.resume is not None:
        safe_unpickling.check_pickles(run.resume.folder)
    return [f"a run on this machine would be refused: {device.problem}"] if device.problem else []


def format_resolved_config(
    run: Run, parsed: Config, origin: Mapping[str, str], world_size: int
) -> str:
    """Format the resolved configuration as commented YAML.

    Args:
        run: the resolved run.
        parsed: the configuration before resolution.
        origin: origin of each given value, by field.
        world_size: number of processes.
    """
    parallel = run.config.parallel
    replicas = data_parallel_size(run.config, world_size)
    samples = BatchSizeSchedule(run.config).consumed_after(run.train_iters)
    tokens = samples * run.config.data.seq_length
    lines = [
        f"# {world_size} processes: TP {parallel.tensor_model_parallel_size} x PP "
        f"{parallel.pipeline_model_parallel_size} x CP {parallel.context_parallel_size} x DP "
        f"{replicas}",
        f"# {run.train_iters:,} iterations, {tokens:,} tokens, {len(run.schedule.folds)} fold(s)",
        f"# resumes from {run.resume.folder}" if run.resume else "# starts from iteration 0",
        *(f"# note: {note}" for note in run.notes),
    ]
    return "\n".join([*lines, *_fields(run.config, parsed, origin)])


def _fields(config: Config, parsed: Config, origin: Mapping[str, str]) -> list[str]:
    """Return the lines of the configuration, each with the origin of its value unless a default."""
    section, lines = "", []
    for line in dump_config(config).splitlines():
        name = line.strip().partition(":")[0]
        if not line.startswith((" ", "-")) and name in SECTIONS:
            section = name
        elif name in SECTIONS[section].model_fields:
            values = (getattr(getattr(c, section), name) for c in (config, parsed))
            resolved, given = values
            where = "resolved" if resolved != given else origin.get(name, "")
            line = f"{line:48}  # {where}" if where else line
        lines.append(line)
    return lines


def main(argv: Sequence[str]) -> int:
    """Run ``pretrain_gpt.py``.

    Returns:
        The exit code: 0 finished, 2 user error, 3 stopped with a checkpoint saved, 130
        interrupted before the start, 1 any other failure.
    """
    protect_standard_streams()
    set_driver_variables()
    ranks = None
    try:
        ranks = find_ranks()
        command = parse(argv, add_stored_config=add_stored_config)
        if ranks is None or (ranks.is_first and ranks.launcher != LOCAL_LAUNCHER):
            print_notes(command.notes)
        check_save_rules(command.config, command.origin)
        if command.mode is not Mode.TRAIN:
            return _run_planning_mode(command, ranks)
        check_packages(command.config)
        if ranks is None and command.processes not in (None, 1):
            return _start_ranks(command, argv)
        ranks = ranks or single_process()
        run = resolve_run(command.config, ranks.world_size)
        start_warnings = check_start(run)
    except UserError as error:
        _print_error(error, ranks)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted before the start", file=sys.stderr)
        return EXIT_INTERRUPTED
    return _run_rank(run, ranks, start_warnings)


def console() -> int:
    """Run the console script ``pretrain_gpt``."""
    return main(sys.argv[1:])


def _run_planning_mode(command: Command, ranks: Ranks | None) -> int:
    """Run a mode that does not train; under a launcher, on the first process only."""
    if ranks is not None and not ranks.is_first:
        return EXIT_DONE
    if command.mode is Mode.PLAN_DATA:
        planned = substitute_missing(command.config)
        print_notes(planned.notes)
        print_data_plan(planned.config)
        return EXIT_DONE
    if command.mode is Mode.DRY_RUN:
        return _dry_run(command, command.processes or (ranks.world_size if ranks else 1))
    return print_estimate(command)


def _dry_run(command: Command, world_size: int) -> int:
    """Run all checks of the run; what is missing on this machine is replaced and reported."""
    planned = substitute_missing(command.config)
    print_notes(planned.notes)
    run = with_intact_checkpoint(resolve_run(planned.config, world_size), world_size)
    if planned.tokenizer_is_placeholder:
        notes = tuple(note for note in run.notes if not note.startswith("tokenizer_"))
        run = replace(run, tokenizer_mismatches=(), notes=notes)
    _print_warnings([*check_start(run), *overlap_warnings(run)])
    print_notes(check_model(run))
    run = replace(run, config=planned.restored(run.config))
    print(format_resolved_config(run, command.config, command.origin, world_size))
    return EXIT_DONE


def _start_ranks(command: Command, argv: Sequence[str]) -> int:
    """Start this program with the same arguments once per rank."""
    processes = command.processes or 1
    check_start(resolve_run(command.config, processes))
    save = command.config.checkpoint.save
    before = hang_report_version(save)
    code = launch([sys.executable, str(Path(sys.argv[0]).resolve()), *argv], processes)
    alert_end(command.config, code, has_hung=lambda: hang_report_version(save) != before)
    return code


def _run_rank(run: Run, ranks: Ranks, start_warnings: Sequence[str]) -> int:
    """Train as one rank; the first rank prints the warnings."""
    requests = _listen_for_stop_requests(run, ranks)
    protect_standard_streams(warns=ranks.is_first)
    if ranks.is_first:
        _print_warnings(start_warnings)
    warnings.simplefilter("ignore")  # deprecations inside libraries
    try:
        if ranks.is_first:
            _print_warnings(overlap_warnings(run))
        with large_imports():
            from megatron_llmjp.parallel import device as devices

            device = devices.setup_rank(run.config.parallel.device, ranks.local_rank)
            from megatron_llmjp.training.train import train

        code = train(run, ranks, device, requests)
        if code == EXIT_DONE and ranks.is_first:
            write_report_at_end(run.config)
        _alert_end(run, ranks, code)
        return code
    except UserError as error:
        _print_error(error, ranks)
        _alert_end(run, ranks, EXIT_USER_ERROR, error)
        return _exit_now(EXIT_USER_ERROR)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        _alert_end(run, ranks, EXIT_USER_ERROR, error)
        return _exit_now(EXIT_USER_ERROR)
    except RunError as error:
        _print_error(error, ranks)
        _alert_end(run, ranks, EXIT_FAILURE, error)
        return _exit_now(EXIT_FAILURE)
    except Exception as error:
        if _is_consequence(error):
            time.sleep(PEER_FAILURE_DELAY_SECONDS)
        where = f"rank {ranks.rank} of {ranks.world_size}"
        print(f"error: {where}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        _alert_end(run, ranks, EXIT_FAILURE, error)
        return _exit_now(EXIT_FAILURE)


def _print_error(error: Exception, ranks: Ranks | None) -> None:
    """Print an error that all ranks should have, once: the first rank prints it.

    srun, mpirun and torchrun end all ranks when one exits: the others wait, to give the first rank
    time to print. A rank that is not ended meanwhile has an error of its own, such as a file that
    is missing on its machine only, and prints it. The local launcher waits for the first rank.
    """
    where = ""
    if ranks is not None and not ranks.is_first:
        if ranks.launcher == LOCAL_LAUNCHER:
            return
        time.sleep(PEER_FAILURE_DELAY_SECONDS)
        where = f"rank {ranks.rank} on {node_name()}: "
    print(f"error: {where}{error}", file=sys.stderr, flush=True)


def _alert_end(run: Run, ranks: Ranks, code: int, error: Exception | None = None) -> None:
    """Send the alert at the end of the run from this rank, unless its supervisor sends it."""
    knows_more = isinstance(error, DataError)  # known to the rank that read the data
    if (ranks.is_first or knows_more) and not ranks_are_supervised(ranks.launcher):
        kind = "" if error is None or isinstance(error, KNOWN_ERRORS) else type(error).__name__
        message = ": ".join(part for part in (kind, str(error or "")) if part)
        alert_end(run.config, code, message)


def _print_warnings(texts: Iterable[str]) -> None:
    for warning in texts:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _exit_now(code: int) -> int:
    """Exit immediately: destroying process groups would wait for ranks that do not respond."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_consequence(error: Exception) -> bool:
    """Return whether an error is only the consequence of another rank's exit."""
    text = str(error)
    return any(
        pattern in text for pattern in ("closed by peer", "Connection reset", "Broken pipe", "NCCL")
    )


def _listen_for_stop_requests(run: Run, ranks: Ranks) -> StopRequests:
    """Exit on a stop request wherever the rank waits, and when its launcher is killed.

    This applies until training starts (``training/stop_signals.py``), when nothing can be saved.
    """
    if sys.platform == "linux" and ranks.launcher != "hand":  # a shell may exit, with nohup
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG in <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    launcher = os.environ.get(LAUNCHER_PROCESS_VARIABLE)
    if launcher is not None and os.getppid() != int(launcher):  # killed already
        os._exit(EXIT_FAILURE)
    minutes = run.config.faults.exit_duration_in_mins
    end = run_start_time() + 60 * minutes if minutes is not None else None
    requests = StopRequests(ranks.is_first, end)
    requests.listen()
    return requests
