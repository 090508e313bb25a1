"""The note on half precision on a CPU."""

from __future__ import annotations

from megatron_llmjp.config.flags import parse
from tests.support.processes import run_ranks


def notes() -> list[list[str]]:
    """Return the notes for fp32, bf16 and fp16 on a CPU, and bf16 on a GPU."""
    from megatron_llmjp.parallel.device import Device
    from megatron_llmjp.training.run_setup import half_precision_notes

    cpu, gpu = Device("cpu", "gloo", "CPU"), Device("cuda", "nccl", "GPU")
    runs = [([], cpu), (["--bf16"], cpu), (["--fp16"], cpu), (["--bf16"], gpu)]
    return [
        half_precision_notes(parse(["--config", "laptop-llama", *flags]).config, device)
        for flags, device in runs
    ]


def test_half_precision_on_a_cpu_is_noted():
    fp32, bf16, fp16, on_gpu = run_ranks(notes, 1)[0]
    assert fp32 == on_gpu == []
    assert "bf16 is slower than fp32 on a CPU: use --no-bf16" in bf16[0]
    assert "--no-fp16" in fp16[0]
