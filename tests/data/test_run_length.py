"""Run length by train_iters, train_samples and train_tokens, compared with a loop over batches."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import yaml

from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.loading import dump_config, load_config, preset_names, replace_fields
from megatron_llmjp.config.schema import SECTION_OF
from megatron_llmjp.config.validation import check_config
from megatron_llmjp.data.batch_size import BatchSizeSchedule, last_iteration, run_limits
from megatron_llmjp.errors import UserError
from megatron_llmjp.run import resolve_run
from tests.config.launch_scripts import SCRIPTS
from tests.support.datasets import write_folds
from tests.support.training import arguments

LENGTH = 32
NOT_STORED = {"alert_command", "alert_webhook", "log_format"}
"""Fields that may be secret."""


def batches(full, ramp):
    """Yield the sizes of all global batches, as in Megatron-LM's training loop."""
    consumed = 0
    while True:
        size = full
        if ramp is not None and consumed <= ramp[2] and ramp[0] < full:
            start, step, samples = ramp
            parts = (full - start) // step
            size = min(full, start + int(consumed / (samples / parts)) * step)
        yield size
        consumed += size


def loop(full, ramp, samples, tokens, iters):
    """Loop until the samples do not fill a batch, or the tokens or iterations are reached."""
    done = consumed = 0
    for size in batches(full, ramp):
        if samples is not None and consumed + size > samples:
            return done
        if tokens is not None and consumed * LENGTH >= tokens:
            return done
        if done == iters:
            return done
        done, consumed = done + 1, consumed + size
    return done


MODEL = ["--num-layers", "1", "--hidden-size", "8", "--num-attention-heads", "1"]


def test_limits_equal_a_loop_over_batches():
    generator = random.Random(5)
    for full, ramp in itertools.product((4, 24), (None, (2, 2, 37), (4, 10, 90))):
        flags = [*MODEL, "--seq-length", LENGTH, "--global-batch-size", full]
        flags += ["--rampup-batch-size", *ramp] if ramp else []
        config = parse([str(flag) for flag in flags])[0]
        for _ in range(60):
            samples = generator.choice([None, generator.randint(1, 400)])
            iters = None if samples else generator.randint(1, 60)
            tokens = generator.choice([None, generator.randint(1, 400 * LENGTH)])
            asked = {"train_samples": samples, "train_iters": iters, "train_tokens": tokens}
            found = last_iteration(replace_fields(config, **asked), BatchSizeSchedule(config))
            assert found == loop(full, ramp, samples, tokens, iters), (full, ramp, asked)


@pytest.mark.parametrize(
    ("limit", "iteration", "samples"),
    [
        ({"train_tokens": 24 * LENGTH}, 3, 24),
        ({"train_tokens": 24 * LENGTH + 1}, 4, 25),  # begun samples and batches are completed
        ({"train_tokens": 25 * LENGTH}, 4, 25),
        ({"train_tokens": 26 * LENGTH}, 4, 26),
        ({"train_samples": 24}, 3, 24),
        ({"train_samples": 25}, 3, 24),
        ({"train_samples": 31}, 3, 24),
        ({"train_iters": 3}, 3, 24),
    ],
)
def test_samples_of_a_limit(limit, iteration, samples):
    flags = [*MODEL, "--seq-length", LENGTH, "--global-batch-size", 8]
    config = replace_fields(parse([str(flag) for flag in flags])[0], **limit)
    (found,) = run_limits(config, BatchSizeSchedule(config))
    ((name, value),) = limit.items()
    assert (found.name, found.value, found.iteration, found.samples) == (
        name, value, iteration, samples,
    )  # fmt: skip
    assert str(found) == f"{name} {value:,}"


def test_llm_jp_13b_ends_with_its_tokens():
    """300e9 tokens are 95,367.4 batches of 1536 x 2048; train_samples is twice as many."""
    config = parse(SCRIPTS[1].argv)[0]
    check_config(config, 96)
    first, second = run_limits(config, BatchSizeSchedule(config))
    assert (first.name, first.iteration) == ("train_tokens", 95_368)
    assert (second.name, second.iteration) == ("train_samples", 292_968_750 // 1536)


RUNS = {
    # flags: iterations, the end of the decay, part of a note
    "--train-samples 41": (10, {"lr_decay_samples": 41}, "train_samples 41 ends the run at itera"),
    "--train-samples 41 --lr-warmup-samples 9 --lr-decay-samples 30": (
        10, {"lr_decay_samples": 30}, "before the folds (iteration 15)"),
    "--train-samples 41 --train-tokens 600": (
        5, {"lr_decay_samples": 41}, "train_tokens 600 ends the run at iteration 5, before train_s"
        "amples 41 (iteration 10) and the folds (iteration 15)"),
    "--train-iters 7 --train-tokens 1920": (7, {"lr_decay_iters": 7}, "train_iters 7 ends the run"),
    "--train-tokens 1920": (15, {"lr_decay_iters": 15}, ""),
    "--train-samples 60 --rampup-batch-size 2 1 12": (
        loop(4, (2, 1, 12), 60, None, None), {"lr_decay_samples": 60}, ""),
}  # fmt: skip


@pytest.mark.parametrize("flags", RUNS)
def test_runs_end_at_the_limit_and_read_back(tmp_path, flags):
    iterations, decay, note = RUNS[flags]
    path = write_folds(tmp_path, repeat=True)
    path.write_text(re.sub("iterations: .*", "samples: 20", path.read_text()))
    own = {"lr_warmup_iters": ""} if "warmup" in flags else {}
    run = resolve_run(parse(arguments("laptop-llama", path, *flags.split(), **own))[0], 1)
    values = run.config.optimizer.model_dump()
    assert {name: values[name] for name in decay} == decay
    assert note in "\n".join(run.notes)
    assert run.train_iters == iterations
    stored = tmp_path / "config.yaml"
    stored.write_text(dump_config(run.config))
    assert load_config(stored) == run.config
    assert resolve_run(load_config(stored), 1).config == run.config


@pytest.mark.parametrize("order", ["--train-samples 41", "--train-samples 41 --train-tokens 600"])
def test_megatron_order_covers_all_train_samples(tmp_path, order):
    write_folds(tmp_path)
    words = arguments("laptop-llama", tmp_path, *order.split(), "--data-path", tmp_path / "ja")
    words[words.index("--fold-file") : words.index("--fold-file") + 2] = []
    run = resolve_run(parse(words)[0], 1)
    assert [fold.samples for fold in run.schedule.folds] == [41]
    assert run.train_iters == (5 if "tokens" in order else 10)


@pytest.mark.parametrize("name", preset_names())
def test_resolved_presets_read_back(tmp_path, name):
    """A checkpoint's config.yaml passes the same checks as its run."""
    path = write_folds(tmp_path, repeat=True)
    flags = ["--config", name, "--fold-file", str(path), "--tokenizer-type", "NullTokenizer"]
    flags += ["--seq-length", "32", "--global-batch-size", "48", "--micro-batch-size", "1"]
    flags += ["--lr-warmup-iters", "1", "--vocab-size", "100"]
    config = parse(flags)[0]
    if config.optimizer.lr_decay_style == "WSD":
        config = replace_fields(config, lr_wsd_decay_iters=1)
    config = replace_fields(
        config, lr_decay_iters=None, lr_decay_tokens=None, lr_decay_samples=None
    )
    size = config.parallel.model_parallel_size * config.parallel.expert_model_parallel_size
    run = resolve_run(config, size)
    stored = tmp_path / "config.yaml"
    stored.write_text(dump_config(run.config))
    # All fields are stored, so that a resume does not depend on later defaults.
    plain = yaml.safe_load(stored.read_text())
    fields = {key: name for key, name in SECTION_OF.items() if key not in NOT_STORED}
    assert {key for section in plain.values() for key in section} == fields.keys()
    for key, section in fields.items():
        value = getattr(getattr(run.config, section), key)
        assert plain[section][key] == (list(value) if isinstance(value, tuple) else value), key
    assert load_config(stored) == run.config
    check_config(load_config(stored), size)
    assert resolve_run(load_config(stored), size).config == run.config


def test_less_than_a_batch_raises(tmp_path):
    words = arguments("laptop-llama", write_folds(tmp_path), "--train-samples", 3)
    with pytest.raises(UserError, match="train_samples 3 is less than one global batch of 4"):
        resolve_run(parse(words)[0], 1)
