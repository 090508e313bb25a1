"""Benchmark: training steps per second, compared with an equal loop of transformers and torch.

    python benchmarks/train_step.py --presets laptop-llama laptop-gpt2 --rounds 10

Each side is one process on the same cores, with the same sizes, batch, precision, gradient
accumulation, clipping, AdamW (torch's fused one) and learning-rate schedule, on random tokens in
memory. The sides alternate every few steps, because the speed of a shared machine drifts; the table
shows the median ratio of adjacent measurements. Above 1 this project is faster. On a machine with
other load, use --threads 1 and the ratio of CPU times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LAPTOP = ["laptop-llama", "laptop-gpt2", "laptop-gpt-neox"]
WARM_UP = 3
SIDES = ("ours", "transformers")


def main() -> int:
    """Measure and print one table, or run one of its sides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--presets", nargs="+", default=LAPTOP)
    add("--vocab-size", type=int, default=4096)
    add("--rounds", type=int, default=10)
    add("--steps", type=int, default=4, help="steps per side and turn")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each side")
    add("--profile", action="store_true", help="profile our steps instead")
    add("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.side:
        return run_side(args.side, args.presets[0], args.vocab_size)
    if args.profile:
        return profile(args.presets[0], args.vocab_size, args.steps)
    print(f"{args.threads} thread(s); ratios of speeds, medians over {args.rounds} rounds")
    print("preset            parameters  ours steps/s  theirs  ratio (range)         by CPU time")
    for preset in args.presets:
        print(compare(preset, args), flush=True)
    return 0


def compare(preset: str, args: argparse.Namespace) -> str:
    """Measure both sides alternately and return one line of the table."""
    command = [sys.executable, __file__, "--presets", preset, "--vocab-size", str(args.vocab_size)]
    sides = {
        name: subprocess.Popen(
            [*command, "--side", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in SIDES
    }
    try:
        sizes = {name: ask(process)[0] for name, process in sides.items()}
        assert len(set(sizes.values())) == 1, f"the models differ: {sizes}"
        found: dict[str, list[float]] = {name: [] for name in SIDES}
        spent: dict[str, list[float]] = {name: [] for name in SIDES}
        for number in range(args.rounds):
            for name in SIDES if number % 2 else reversed(SIDES):
                wall, cpu = ask(sides[name], args.steps)
                found[name].append(args.steps / wall)
                spent[name].append(cpu)
    finally:
        for process in sides.values():
            process.kill()
            process.wait()
    ratios = [a / b for a, b in zip(*found.values(), strict=True)]
    by_cpu = statistics.median(b / a for a, b in zip(*spent.values(), strict=True))
    ours, theirs = (statistics.median(speeds) for speeds in found.values())
    shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    numbers = f"{sizes['ours']:10,.0f}  {ours:12.2f}  {theirs:6.2f}"
    return f"{preset:16}  {numbers}  {shown:20}  {by_cpu:.2f}"


def ask(process: subprocess.Popen[str], steps: int | None = None) -> list[float]:
    """Return a side's numbers: parameters at the start; then seconds and CPU seconds of steps."""
    assert process.stdin is not None and process.stdout is not None
    if steps is not None:
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a side of the comparison failed; see the error above")
    return [float(number) for number in json.loads(line)]


def run_side(side: str, preset: str, vocab_size: int) -> int:
    """Run one side: build, warm up, and run as many steps as requested on stdin."""
    config = small_config(preset, vocab_size)
    step, parameters = our_step(config) if side == "ours" else their_step(config)
    for _ in range(WARM_UP):
        step()
    print([parameters], flush=True)
    for line in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            step()
        print([time.perf_counter() - start, time.process_time() - cpu], flush=True)
    return 0


def profile(preset: str, vocab_size: int, steps: int) -> int:
    """Print torch's profile of some of our steps."""
    import torch

    step, _ = our_step(small_config(preset, vocab_size))
    for _ in range(WARM_UP):
        step()
    with torch.profiler.profile() as found:
        for _ in range(steps):
            step()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
    return 0


def small_config(preset: str, vocab_size: int) -> Any:
    """Return the resolved preset."""
    from megatron_llmjp.config.loading import (
        ConfigLayers,
        build_config,
        read_config,
        replace_fields,
    )

    layers = ConfigLayers()
    read_config(preset, layers)
    return replace_fields(
        build_config(layers), vocab_size=vocab_size, train_iters=10_000, lr_decay_iters=10_000
    )


def random_batches(config: Any, micro_batches: int) -> list[dict[str, Any]]:
    """Return a global batch of random tokens in the data loader's form."""
    import torch

    b, s = config.training.micro_batch_size, config.data.seq_length
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(micro_batches):
        tokens = torch.randint(config.model.vocab_size, (b, s + 1), generator=generator)
        batches.append(
            {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "loss_mask": torch.ones(b, s),
                "position_ids": torch.arange(s).expand(b, s).contiguous(),
            }
        )
    return batches


def our_step(config: Any) -> tuple[Callable[[], Any], int]:
    """Return a training step of this project in one process, and the number of parameters."""
    import itertools

    from megatron_llmjp.data.batch_size import BatchSizeSchedule
    from megatron_llmjp.data.folds.schedule import Schedule
    from megatron_llmjp.model.gpt import build_model
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import single_process
    from megatron_llmjp.training.optimizer import (
        LearningRateSchedule,
        RunScheduler,
        build_optimizer,
        wrap_for_data_parallel,
    )
    from megatron_llmjp.training.train_step import BatchIterator, configure_schedules, train_step

    device = setup()
    process_groups.initialize(config, single_process(), device)
    chunks = wrap_for_data_parallel(build_model(config, device), config)
    optimizer = build_optimizer(chunks, config)
    no_folds = Schedule(seed=0, sequence_length=config.data.seq_length, folds=())
    rates = LearningRateSchedule(
        config, no_folds, BatchSizeSchedule(config), config.training.train_iters
    )
    scheduler = RunScheduler(optimizer, rates)
    configure_schedules(chunks, optimizer, config)
    micro_batches = config.training.global_batch_size // config.training.micro_batch_size
    data: list[BatchIterator] = [itertools.cycle(random_batches(config, micro_batches))]
    parameters = sum(p.numel() for p in chunks[0].parameters())
    samples = config.training.global_batch_size
    return lambda: train_step(chunks, optimizer, scheduler, data, config, samples), parameters


def their_step(config: Any) -> tuple[Callable[[], Any], int]:
    """Return the same step with transformers' model and torch's AdamW, and its parameters."""
    import torch
    import torch.nn.functional as F
    import transformers

    model = their_model(config, transformers)
    o = config.optimizer
    optimizer = their_optimizer(model, o, o.lr)
    scheduler = transformers.get_cosine_schedule_with_warmup(
        optimizer, o.lr_warmup_iters, config.training.train_iters
    )
    micro_batches = config.training.global_batch_size // config.training.micro_batch_size
    batches = random_batches(config, micro_batches)

    def step() -> None:
        optimizer.zero_grad()
        for batch in batches:
            logits = model(batch["tokens"], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
            (loss / micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_grad)
        optimizer.step()
        scheduler.step()

    return step, sum(p.numel() for p in model.parameters())


def their_optimizer(model: Any, settings: Any, lr: float) -> Any:
    """Return torch's fused AdamW; like megatron-core's, it decays matrices only."""
    import torch

    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}]
    groups += [{"params": vectors, "weight_decay": 0.0}] if vectors else []
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=settings.adam_eps, fused=True)


def their_model(config: Any, transformers: Any) -> Any:
    """Return transformers' model of the same architecture and sizes, in training mode."""
    model = config.model
    common = {"vocab_size": config.padded_vocab_size, "attn_implementation": "sdpa"}
    sizes = {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_size,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
    }
    dropout = model.hidden_dropout
    if model.normalization == "RMSNorm":
        settings = transformers.LlamaConfig(
            **common, **sizes, num_key_value_heads=model.query_groups
        )
        return transformers.LlamaForCausalLM(settings).train()
    if model.position_embedding_type == "learned_absolute":
        settings = transformers.GPT2Config(
            **common, n_embd=model.hidden_size, n_layer=model.num_layers,
            n_head=model.num_attention_heads, n_inner=model.ffn_size,
            n_positions=config.max_positions,
            activation_function="gelu_new", resid_pdrop=dropout, embd_pdrop=dropout,
            attn_pdrop=model.attention_dropout,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(settings).train()
    settings = transformers.GPTNeoXConfig(
        **common, **sizes, rotary_pct=model.rotary_percent, hidden_act="gelu",
        use_parallel_residual=model.use_parallel_residual, hidden_dropout=dropout,
        attention_dropout=model.attention_dropout,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(settings).train()


if __name__ == "__main__":
    raise SystemExit(main())
