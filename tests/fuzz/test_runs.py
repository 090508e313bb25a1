"""Fuzz tests of the files in a save folder that are read to report on a run."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from data_tools import report_run, run_status
from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint.manifest import Manifest
from megatron_llmjp.checkpoint.resume import find_checkpoint
from megatron_llmjp.checkpoint.run_lock import RECORD, Owner, read_owner, refuse_if_in_use
from megatron_llmjp.checkpoint.save_folder import check_save_folder
from megatron_llmjp.config.loading import (
    ConfigLayers,
    build_config,
    dump_config,
    load_config,
    read_config,
    replace_fields,
)
from megatron_llmjp.report.run_state import EXIT_CODES
from megatron_llmjp.report.status import read_status
from megatron_llmjp.report.status_table import format_status
from slurm import requeue
from tests.support.fuzzing import Target, fuzz, run_main
from tests.support.fuzzing_mutators import (
    HOSTILE,
    mutated_bytes,
    mutated_json,
    mutated_json_lines,
    mutated_yaml,
    yaml_bomb,
)


def interval(iteration: int) -> dict[str, object]:
    return {
        "iteration": iteration,
        "consumed samples": 16 * iteration,
        "consumed tokens": 512 * iteration,
        "lm loss": 4.0 - iteration / 100,
        "grad norm": 1.0,
        "learning rate": 1e-4,
        "seconds per iteration": 0.5,
        "tokens per second": 4096.0,
        "TFLOP/s per GPU": 0.1,
        "seconds remaining": 25.0,
        "MFU": 0.4,
        "global batch size": 16,
        "skipped iterations": 0,
        "nan iterations": 0,
        "total skipped": 1,
        "rollbacks": 0,
        "fold": "fold00" if iteration < 10 else "fold01",
        "fold number": 1,
        "fold progress": 0.5,
        "consumed tokens/ja": 100.0 * iteration,
    }


RECORDS = [
    {"event": "start", "iteration": 0, "consumed samples": 0},
    {"event": "fold", "iteration": 1, "fold": "fold00"},
    *(interval(i) for i in range(1, 12)),
    {"iteration": 10, "validation loss/valid": 3.5, "validation loss/b": 3.0},
    {"event": "bad step", "iteration": 10, "why": "NaN"},
    {"event": "start", "iteration": 8, "consumed samples": 128},
    *(interval(i) for i in range(9, 14)),
    {"event": "end", "iteration": 13, "outcome": "stopped", "why": "time limit"},
]
ENDS = [
    {"time": "2026-01-01 00:00:00", "job": "1", "restart": 0, "exit code": 3, "iteration": i,
     "requeued": True, "why": "stopped on request"} for i in (2, 2, 4)
]  # fmt: skip


def config_text() -> str:
    layers = ConfigLayers()
    read_config("laptop-llama", layers)
    config = build_config(layers)
    model = config.model.model_copy(update={"padded_vocab_size": 128, "vocab_size": 100})
    return dump_config(config.model_copy(update={"model": model}))


CONFIG = "model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4, vocab_size: 100}\n"
LOGS = ("metrics.jsonl", "requeues.jsonl", "logs/job1/rank_0.log", "hang/report.txt", RECORD)


def make_save(name: str, folder: Path) -> Path:
    """Write the save folder of a run with one checkpoint; return one of its files."""
    save = folder / "save"
    checkpoint = save / manifests.folder_name(8)
    checkpoint.mkdir(parents=True)
    (save / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    (save / "requeues.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ENDS))
    (save / manifests.TRACKER).write_text("8")
    (checkpoint / manifests.CONFIG).write_text(CONFIG if name in LOGS else config_text())
    (checkpoint / manifests.FOLDS).write_text("folds: [{name: a}, {name: b}]\n")
    write_manifest(checkpoint)
    (save / "logs" / "job1").mkdir(parents=True)
    (save / "logs" / "job1" / "rank_0.log").write_text("error: x\nTraceback\n  y\nValueError: z\n")
    (save / "hang").mkdir()
    (save / "hang" / "report.txt").write_text("error: rank 0 hangs\nrank 1 waits\n")
    if name == RECORD:
        (save / RECORD).write_text(json.dumps(asdict(Owner("host", "boot", 1, "now", "token"))))
    return save / name if (save / name).exists() else checkpoint / name


def write_manifest(checkpoint: Path) -> None:
    names = manifests.all_files(checkpoint)
    manifest = Manifest(
        iteration=8,
        consumed_samples=128,
        contents="full",
        folds={"a": {"digest": "0" * 32}},
        skips=[(0, 4)],
        skipped_iterations={"3-4": (8, 16)},
        metrics={"lm loss": 3.0},
        versions={"torch": "2"},
        files=manifests.file_entries(checkpoint, names),
    )
    manifests.write_manifest(checkpoint, manifest)
    content = json.loads((checkpoint / manifests.MANIFEST).read_text())
    del content["checksum"]  # so that changed content is read
    (checkpoint / manifests.MANIFEST).write_text(json.dumps(content))


def mutated_last_lines(content: bytes, generator: random.Random) -> bytes:
    """Change one of the last lines, which decide most of what is reported."""
    lines = content.splitlines()
    at = -generator.randint(1, 3)
    lines[at] = mutated_json(lines[at], generator)
    return b"\n".join([*lines, b""])


def renamed_folds(content: bytes) -> list[bytes]:
    for name, other in FOLD_NAMES.items():
        content = content.replace(name, other)
    return [content]


def save_of(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.name == "save")


def status_main(words: list[str]) -> int:
    """Run run_status, whose exit code is the state of the run."""
    code = run_status.main(words)
    return 0 if code in EXIT_CODES.values() else code


def report(path: Path) -> None:
    """Read a run in every way that does not train."""
    save = save_of(path)
    run_main(status_main, save, save)
    format_status(read_status(save)).encode()
    json.loads(run_main(status_main, save, "--json"))
    check_save_folder(save)
    read_owner(save)
    if path.name != RECORD:
        refuse_if_in_use(save)
    if path.name == "metrics.jsonl" or not path.is_dir():
        run_main(report_run.main, save, "--summary")


def plot(path: Path) -> None:
    save = save_of(path)
    run_main(report_run.main, save, "--output-dir", save.parent / "report")


def resume(path: Path) -> None:
    save = save_of(path)
    if path.name == manifests.CONFIG and path.is_file():
        write_manifest(path.parent)
    config = load_config_of_run(save)
    found = find_checkpoint(replace_fields(config, save=str(save), load=str(save)), {})
    assert found is not None


def load_config_of_run(save: Path):
    path = save.parent / "config.yaml"
    path.write_text(config_text())
    return load_config(path)


def decide(path: Path) -> None:
    run_main(lambda words: requeue.main(words) // 2, "--save", path.parent, "--code", "3")


FOLD_NAMES = {
    b"fold00": rb"$\\frac a$",
    b"fold01": rb"\u0000\u001b[2J<b>",
    b"/ja": b"/%s{}\xe2\x80\xae",
}
LINES = (mutated_last_lines, mutated_last_lines, mutated_json_lines, mutated_bytes)
JSON = (mutated_json, mutated_json, mutated_bytes)
ANY = r"save"

TARGETS = {
    "metrics.jsonl": Target(
        partial(make_save, "metrics.jsonl"), report, LINES, examples=200, names=ANY
    ),
    "plots": Target(
        partial(make_save, "metrics.jsonl"),
        plot,
        LINES,
        renamed_folds,
        3,
        names=ANY,
        common=0,
    ),
    "requeues.jsonl": Target(partial(make_save, "requeues.jsonl"), report, LINES, examples=100),
    "requeue": Target(
        partial(make_save, "requeues.jsonl"), decide, LINES, examples=60, with_folder=False
    ),
    "log": Target(partial(make_save, "logs/job1/rank_0.log"), report, examples=30),
    "hang report": Target(partial(make_save, "hang/report.txt"), report, examples=30),
    "owner": Target(partial(make_save, RECORD), report, JSON, examples=60, names=ANY),
    "tracker": Target(partial(make_save, manifests.TRACKER), resume, examples=60),
    "manifest": Target(
        partial(make_save, manifests.MANIFEST), resume, JSON, examples=200, names=ANY
    ),
    "manifest of status": Target(
        partial(make_save, manifests.MANIFEST), report, JSON, examples=40, names=ANY
    ),
    "configuration": Target(
        partial(make_save, manifests.CONFIG),
        resume,
        (mutated_yaml, mutated_bytes),
        examples=20,
        names=ANY,
        common=len(HOSTILE),
    ),
    "configuration of report": Target(
        partial(make_save, manifests.CONFIG),
        report,
        (mutated_yaml, mutated_bytes),
        examples=20,
        common=len(HOSTILE),
    ),
    "folds of status": Target(
        partial(make_save, manifests.FOLDS),
        report,
        (mutated_yaml, mutated_bytes),
        lambda _: [yaml_bomb("folds")],
        20,
        common=len(HOSTILE),
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_any_content_is_read_or_refused(name, tmp_path):
    fuzz(TARGETS, name, tmp_path)
