"""Resolution of runs: decay with added folds, and --load after the first start."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_llmjp.checkpoint.manifest import (
    CONFIG,
    MANIFEST,
    Manifest,
    file_entry,
    folder_name,
)
from megatron_llmjp.checkpoint.resume import Resume, resume_config
from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import dump_config
from megatron_llmjp.run import resolve_run
from tests.support.datasets import write_folds
from tests.support.training import arguments


def test_folds_added_later_do_not_move_the_learning_rate(tmp_path):
    path = write_folds(tmp_path, iterations=(6, 5))
    config = parse(arguments("laptop-llama", path))[0]
    run = resolve_run(config, 1)
    assert (run.train_iters, run.config.optimizer.lr_decay_iters) == (11, 11)

    folds = yaml.safe_load(path.read_text())
    folds["folds"].append({**folds["folds"][0], "name": "added"})
    path.write_text(yaml.safe_dump(folds))
    longer = resolve_run(config, 1)
    assert longer.train_iters == 17
    touched = longer.schedule.consumed_folds(run.schedule.total_samples)
    manifest = Manifest(iteration=11, consumed_samples=44, contents="full", folds=touched, files={})
    adopted, _, notes = resume_config(
        config, Resume(Path(), manifest, run.config), longer.schedule, {}
    )
    assert adopted.optimizer.lr_decay_iters == 11
    assert not [note for note in notes if "lr_decay_iters" in note]


def test_load_and_finetune_apply_to_the_first_start_only(tmp_path):
    """A job requeued with its first command line resumes from its own checkpoints."""
    words = arguments("laptop-llama", write_folds(tmp_path))
    words += ["--load", tmp_path / "base", "--save", tmp_path / "run", "--finetune"]
    config = parse([str(word) for word in words])[0]
    finished = resolve_run(parse(words[:-5])[0], 1)
    for name, iteration in (("base", 900), ("run", 3)):
        folder = tmp_path / name / folder_name(iteration)
        folder.mkdir(parents=True)
        (folder / CONFIG).write_text(dump_config(finished.config))
        entry = file_entry(folder / CONFIG)
        consumed = 4 * iteration if name == "run" else 0
        folds = finished.schedule.consumed_folds(consumed)
        manifest = Manifest(
            iteration=iteration,
            consumed_samples=consumed,
            contents="full",
            folds=folds,
            files={CONFIG: entry},
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json())
        if name == "base":
            first = resolve_run(config, 1)
    assert first.resume and first.resume.manifest.iteration == 900
    assert first.config.checkpoint.finetune
    again = resolve_run(config, 1)
    assert again.resume and again.resume.manifest.iteration == 3
    assert not again.config.checkpoint.finetune
    assert "--finetune is ignored" in again.notes[0]
