"""Each patch is still needed: the original code of torch and megatron-core is still wrong.

A failure here after an upgrade means that a patch can be removed.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import pickle
import subprocess
import sys
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import ROOT, run_ranks

without_fused_optimizers = pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in ("transformer_engine", "apex")),
    reason="Transformer Engine or Apex has its own fused optimizer",
)


def needless(module: str) -> str:
    """The message of a test that finds a patch without effect."""
    return f"megatron-core no longer needs it: remove megatron_llmjp/patches/{module}.py"


def run_unpatched_cuda() -> dict[str, str]:
    """The errors of megatron-core on a CPU without the replacement of ``torch.cuda``, by step."""
    import torch
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_llmjp.config.flags import parse
    from megatron_llmjp.model.gpt import build_model
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import Device, setup
    from megatron_llmjp.parallel.ranks import single_process

    assert not torch.cuda.is_available()
    errors = {}

    def attempt(name, function, *arguments):
        try:
            function(*arguments)
        except (RuntimeError, AssertionError, AttributeError) as error:
            errors[name] = str(error)

    device = Device("cpu", "gloo", "CPU")
    config = parse(["--config", "laptop-gpt2", "--vocab-size", "100"]).config
    attempt("groups", process_groups.initialize, config, single_process(), device)
    attempt("seed", model_parallel_cuda_manual_seed, 1)
    attempt("model", build_model, config, device)
    process_groups.destroy()
    setup()
    process_groups.initialize(config, single_process(), device)
    build_model(config, device)
    process_groups.destroy()
    return errors


def test_cuda_on_cpu():
    errors = run_ranks(run_unpatched_cuda, 1)[0]
    assert {"seed", "model"} <= errors.keys(), needless("torch_cuda_on_cpu")


def test_megatron_core_compiles_at_import():
    code = """\
import torch
compiled = []
torch.compile = lambda function=None, **_: compiled.append(function) or function
import megatron.core
print(len(compiled))
"""
    count = subprocess.check_output([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT)
    assert int(count) > 0, needless("torch_cuda_on_cpu (without_compiler)")


def step_optimizers() -> dict[str, Any]:
    """What a distributed optimizer does with and without patches."""
    import torch
    from megatron.core import optimizer as core_optimizer
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_llmjp.config.flags import parse
    from megatron_llmjp.model.gpt import build_model
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import single_process
    from megatron_llmjp.patches.fused_adamw import register_fused_adamw
    from megatron_llmjp.patches.optimizer_shards import shard_by_rank

    device = setup()
    words = ["--config", "laptop-gpt2", "--vocab-size", "100", "--hidden-size", "24"]
    config = parse([*words, "--num-attention-heads", "4", "--ffn-hidden-size", "50"]).config
    process_groups.initialize(config, single_process(), device)

    def make() -> tuple[Any, Any]:
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=1000
        )
        (model,) = build_model(config, device)
        chunk = DistributedDataParallel(model.config, settings, model)
        optimizer = core_optimizer.get_megatron_optimizer(
            core_optimizer.OptimizerConfig(
                optimizer="adam", lr=0.1, use_distributed_optimizer=True, params_dtype=torch.float32
            ),
            [chunk],
            use_gloo_process_groups=False,
        )
        (part,) = optimizer.chained_optimizers
        return chunk, part

    def step(chunk: Any, part: Any) -> None:
        chunk.zero_grad_buffer()
        part.step()

    def steps_after_load(chunk: Any, part: Any) -> list[float]:
        step(chunk, part)
        part.load_state_dict(part.state_dict())
        step(chunk, part)
        adam = part.optimizer
        counts = {float(group["step"]) for group in adam.param_groups if "step" in group}
        return sorted(counts | {float(s["step"]) for s in adam.state.values() if "step" in s})

    def gathers(chunk: Any, part: Any) -> int:
        """Number of all-gathers of a save."""
        calls, gather = [0], torch.distributed.all_gather

        def counted(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            return gather(*arguments, **options)

        torch.distributed.all_gather = counted
        group = part.data_parallel_group
        metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": group}
        model = chunk.module.sharded_state_dict(metadata=metadata)
        state = part.sharded_state_dict(model, metadata=metadata)["param_state"]
        torch.distributed.all_gather = gather
        assert len(state) > 10
        return calls[0]

    chunk, part = make()
    step(chunk, part)
    found: dict[str, Any] = {"gathers before": gathers(chunk, part)}
    shard_by_rank(part)
    found["gathers after"] = gathers(chunk, part)
    found["steps before"] = steps_after_load(*make())
    register_fused_adamw()
    found["steps after"] = steps_after_load(*make())
    process_groups.destroy()
    return found


@pytest.fixture(scope="module")
def found():
    return run_ranks(step_optimizers, 1)[0]


@without_fused_optimizers
def test_fused_adamw(found):
    assert found["steps after"] == [2.0]
    assert found["steps before"] != [2.0], needless("fused_adamw")


def test_optimizer_shards(found):
    assert found["gathers after"] == 0
    assert found["gathers before"] > 0, needless("optimizer_shards")


def norm_of_meta_tensors() -> list[str]:
    """Return the kernels that read values of tensors: megatron-core's, and the replacement."""
    import torch
    from megatron.core.optimizer import clip_grads

    from megatron_llmjp.patches.foreach_norm import use_foreach_kernels

    found = []
    for name in ("before", "after"):
        try:
            clip_grads.l2_norm_impl(0, None, [[torch.empty(3, device="meta")]], False)
        except (RuntimeError, NotImplementedError):
            found.append(name)
        use_foreach_kernels()
    return found


@without_fused_optimizers
def test_foreach_norm():
    assert run_ranks(norm_of_meta_tensors, 1)[0] == ["before"], needless("foreach_norm")


def rope_parameters() -> list[str]:
    """Parameters of megatron-core's classes that set constants of LLaMA 3's rotary scaling."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt import GPTModel

    names = {name for cls in (GPTModel, RotaryEmbedding) for name in signature(cls).parameters}
    return sorted(name for name in names if "rope_scaling" in name or "freq_factor" in name)


def test_llama3_rope_scaling():
    found = run_ranks(rope_parameters, 1)[0]
    assert found == ["rope_scaling", "rope_scaling_factor"], needless("llama3_rope_scaling")


def split_sources() -> dict[str, list[bool]]:
    """Whether new groups look for a communicator to split, and are bound to the GPU."""
    import torch
    import torch.distributed as dist

    from megatron_llmjp.parallel.process_groups import new_group_without_timeout
    from megatron_llmjp.patches.lazy_subgroups import without_communicator_splits

    looked: list[bool] = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.distributed_c10d._get_split_source = lambda group: looked.append(True)
    world: Any = dist.group.WORLD
    world.bound_device_id = torch.device("cuda", 0)

    def found(create: Any) -> list[bool]:
        looked.clear()
        group: Any = create()
        return [bool(looked), group.bound_device_id is not None]

    unpatched = found(lambda: dist.new_group(backend="gloo"))
    with without_communicator_splits():
        patched = found(lambda: dist.new_group(backend="gloo"))
    kept = [world.bound_device_id is not None]
    sync = new_group_without_timeout()
    dist.barrier(sync)
    dist.broadcast_object_list([None], src=0, group=sync)
    return {"unpatched": unpatched, "patched": patched, "kept": kept}


def test_lazy_subgroups():
    found = run_ranks(split_sources, 1)[0]
    assert found["patched"] == [False, False] and found["kept"] == [True]
    assert found["unpatched"] == [True, True], needless("lazy_subgroups")


def gloo_threads() -> dict[str, int]:
    """Worker threads of gloo groups, and the sum of two gathers that are under way together."""
    import torch
    import torch.distributed as dist

    from megatron_llmjp.patches.gloo_threads import use_one_gloo_thread

    def threads(group: Any) -> int:
        return group._get_backend(torch.device("cpu")).options._threads

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    found = {"unpatched": threads(dist.group.WORLD)}
    use_one_gloo_thread()
    found["patched"] = threads(dist.new_group(backend="gloo", timeout=timedelta(seconds=50)))
    found["default"] = dist.ProcessGroupGloo(store, 0, 1).options._timeout.total_seconds()
    group = dist.new_group(backend="gloo")
    gathered = [torch.zeros(2), torch.zeros(2)]
    works = []
    for value, output in enumerate(gathered, 1):
        with dist._coalescing_manager(group, async_ops=True) as work:
            dist.all_gather_into_tensor(output, torch.full((2,), float(value)), group=group)
        works.append(work)
    for work in works:
        work.wait()
    found["sum"] = int(sum(gathered).sum())
    return found


def test_gloo_threads():
    found = run_ranks(gloo_threads, 1)[0]
    assert found["patched"] == 1 and found["sum"] == 6 and found["default"] == 1800
    assert found["unpatched"] > 1, needless("gloo_threads")


def precision_of_norm_recomputation() -> list[bool]:
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    from megatron_llmjp.patches.norm_recomputation import recompute_norms_without_fp8

    found = [CheckpointWithoutOutput().fp8]
    recompute_norms_without_fp8()
    return [*found, CheckpointWithoutOutput().fp8, CheckpointWithoutOutput(fp8="e4m3").fp8]


def test_norm_recomputation():
    unpatched, patched, requested = run_ranks(precision_of_norm_recomputation, 1)[0]
    assert not patched and requested
    assert unpatched, needless("norm_recomputation")


def rope_source() -> str:
    from megatron.core.models.common.embeddings import rope_utils

    return inspect.getsource(rope_utils)


def test_compiled_rotary():
    source = run_ranks(rope_source, 1)[0]
    assert "_apply_rotary_pos_emb_bshd" in source
    assert "jit_fuser" not in source and "compile" not in source, needless("compiled_rotary")


class Code:
    """An object whose unpickling creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def open_index(folder: str) -> None:
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategy

    torch_strategy._get_filesystem_reader(folder, cache_metadata=True).read_metadata()


def test_checkpoint_reader(tmp_path):
    file = tmp_path / "executed"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Code(file)))
    with pytest.raises(AssertionError, match="open_index"):  # a path is no index
        run_ranks(open_index, 1, str(tmp_path))
    assert file.exists(), needless("checkpoint_reader")


@without_fused_optimizers
def test_import_warnings():
    """megatron-core still warns without the filters of ``megatron_llmjp/__init__.py``."""
    command = [sys.executable, "-c", "import megatron.core.models.gpt"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    lines = [line.partition("UserWarning: ")[2] for line in result.stderr.splitlines()]
    gone = "megatron-core no longer warns: remove the filter from megatron_llmjp/__init__.py"
    for message in ("Transformer Engine and Apex are not installed", "Apex is not installed"):
        assert any(line.startswith(message) for line in lines), gone


def test_imports_print_nothing():
    """No module of the package prints a warning as it is imported."""
    code = """\
import importlib, json, pkgutil, sys
for package in ("megatron_llmjp", "data_tools"):
    path = importlib.import_module(package).__path__
    for module in pkgutil.walk_packages(path, package + "."):
        importlib.import_module(module.name)
print(json.dumps(sorted(name for name in sys.modules if name.startswith("megatron_llmjp."))))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "megatron_llmjp.training.trainer" in json.loads(result.stdout)
    assert result.stderr == ""
