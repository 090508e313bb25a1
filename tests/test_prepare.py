"""What a run resolves to before torch is imported."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_llmjp.checkpoint.manifest import Manifest
from megatron_llmjp.checkpoint.resume import Resume, adopt
from megatron_llmjp.config.command_line import parse
from megatron_llmjp.prepare import prepare
from tests.support.datasets import write_folds
from tests.support.training import arguments


def test_folds_added_later_do_not_move_the_learning_rate(tmp_path):
    path = write_folds(tmp_path, iterations=(6, 5))
    config = parse(arguments("laptop-llama", path))[0]
    run = prepare(config, 1)
    assert (run.train_iters, run.config.optimizer.lr_decay_iters) == (11, 11)

    folds = yaml.safe_load(path.read_text())
    folds["folds"].append({**folds["folds"][0], "name": "added"})
    path.write_text(yaml.safe_dump(folds))
    longer = prepare(config, 1)
    assert longer.train_iters == 17
    touched = longer.schedule.touched(run.schedule.total_samples)
    manifest = Manifest(iteration=11, consumed_samples=44, contents="full", folds=touched, files={})
    adopted, _, notes = adopt(config, Resume(Path(), manifest, run.config), longer.schedule, {})
    assert adopted.optimizer.lr_decay_iters == 11
    assert not [note for note in notes if "lr_decay_iters" in note]
