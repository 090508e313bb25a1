"""Compiled element-wise operations: the rotary embedding and the losses, equal to uncompiled."""

from __future__ import annotations

import os
import shutil
import tempfile
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.processes import run_ranks
from tests.support.tolerances import ELEMENTWISE, assert_within, distance

with_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)


def rotate(rotary_percent: float) -> torch.Tensor:
    """Rotate queries with megatron-core's function; return them, and their gradient."""
    from megatron.core.models.common.embeddings import rope_utils

    torch.manual_seed(2)
    sequence, batch, heads, size = 16, 2, 3, 8
    query = torch.randn(sequence, batch, heads, size, requires_grad=True)
    frequencies = torch.rand(sequence, 1, 1, int(size * rotary_percent)) * 10
    config = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False
    )
    rotated = rope_utils.apply_rotary_pos_emb(
        query, frequencies, config, mscale=1.3, cp_group=SimpleNamespace()
    )
    rotated.backward(torch.randn_like(rotated))
    return torch.stack([rotated.detach(), query.grad])


def losses(dtype: torch.dtype, group: Any, compiled: bool) -> list[torch.Tensor]:
    """Compute losses in two chunks; return them, and the gradient of the logits."""
    from megatron_llmjp.model.losses import token_losses

    torch.manual_seed(1)
    logits = (torch.randn(16, 1, 64) * 5).to(dtype).requires_grad_()
    labels = torch.randint(64, (1, 16))
    found = token_losses(labels, logits * 1.0, group, 0.1, compiled)
    (found * torch.rand(2, 1, 16)).sum().backward()
    return [found.detach(), logits.grad]


def compare_compiled(cache: str) -> dict[str, float]:
    """Compile the functions of the product for a CPU; return distances from uncompiled ones."""
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache}
    import torch.distributed as dist

    from megatron_llmjp.config import loss_chunks
    from megatron_llmjp.patches.compiled_rotary import compile_rotary_embedding

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    loss_chunks.CPU_CHUNK_BYTES = 4 * 8 * 64
    plain = rotate(0.5), losses(torch.bfloat16, dist.group.WORLD, compiled=False)
    compile_rotary_embedding()
    compile_rotary_embedding()  # the second call does nothing
    found = rotate(0.5), losses(torch.bfloat16, dist.group.WORLD, compiled=True)
    captured = torch._dynamo.utils.counters
    assert not captured["graph_break"], captured
    # The rotary embedding, and of the losses one function for all chunks of each pass.
    assert captured["stats"]["unique_graphs"] == 3, captured
    return {
        "rotary embedding": distance(found[0], plain[0]),
        "losses": distance(found[1][0], plain[1][0]),
        "gradient": distance(found[1][1], plain[1][1]),
    }


@with_compiler
def test_compiled_functions_equal_uncompiled():
    cache = f"{tempfile.gettempdir()}/torchinductor_tests_{os.getuid()}"
    found = run_ranks(compare_compiled, 1, cache)[0]
    assert_within(found["rotary embedding"], ELEMENTWISE, "rotary embedding")
    assert_within(found["losses"], ELEMENTWISE, "losses")
    assert_within(found["gradient"], 2**-8, "gradient in bf16")


def choose_with(compilers: list[str]) -> list[tuple[bool, str, str]]:
    """Choose the kernels of a GPU with a working and with a failing ``torch.compile``."""
    from megatron_llmjp.config.flags import parse
    from megatron_llmjp.model import fusions, kernels
    from megatron_llmjp.parallel.device import Device

    def compile_nothing(function: Any, **_: Any) -> Any:
        return function

    def compile_and_fail(function: Any, **_: Any) -> Any:
        error: Any = RuntimeError("backend='inductor' raised:\n")
        error.inner_exception = ValueError("Failed to find C compiler. Please\nset CC")
        raise error

    torch.cuda.current_device = lambda: torch.device("cpu")
    config = parse(["--config", "laptop-llama", "--transformer-impl", "local"]).config
    found = []
    for name in compilers:
        fusions.compiler_error.cache_clear()
        torch.compile = {"works": compile_nothing, "fails": compile_and_fail}[name]
        choice = kernels.choose_kernels(Device("cuda", "nccl", "a GPU"), config)
        found.append((choice.fusions, choice.compiler_error, str(choice)))
    return found


def test_a_gpu_without_compiler_has_no_fusions():
    works, fails = run_ranks(choose_with, 1, ["works", "fails"])[0]
    assert works[:2] == [True, ""] and works[2].endswith(", fusions")
    error = "ValueError: Failed to find C compiler. Please"
    assert fails[:2] == [False, error] and fails[2].endswith(f", no fusions ({error})")


def fused_positions() -> list[bool]:
    """Whether Transformer Engine's rotary embedding is used, by type of the embedding."""
    from megatron_llmjp.config.flags import parse
    from megatron_llmjp.model.gpt import transformer_config
    from megatron_llmjp.parallel.device import setup
    from tests.support.with_transformer_engine import use_transformer_engine

    use_transformer_engine()
    words = ["--config", "laptop-llama", "--vocab-size", "100", "--position-embedding-type"]
    configs = [parse([*words, name]).config for name in ("rope", "yarn")]
    return [transformer_config(config, setup()).apply_rope_fusion for config in configs]


def test_yarn_does_not_use_transformer_engines_kernel():
    assert run_ranks(fused_positions, 1, stand_ins=True) == [[True, False]]
