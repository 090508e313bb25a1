"""megatron-core on two ranks loads written checkpoints, and its own checkpoints are read."""

from __future__ import annotations

import socket
import warnings
from pathlib import Path

import torch
import torch.multiprocessing as mp

from megatron_llmjp.config.loading import load_config, replace_fields
from megatron_llmjp.config.schema import Config
from tests.convert.hf_models import MODELS, state

LAYOUTS = {"llama": (2, 1), "gpt2": (1, 2)}
"""Tensor and pipeline parallel size of each architecture."""

TRANSFORMER_ENGINE_ONLY = {
    "decoder.layers.self_attention.core_attention._extra_state",
    "decoder.final_layernorm._extra_state",
}


def on_ranks(rank: int, port: int, root: Path) -> None:
    """One process for both layouts: importing megatron-core takes longer than the test."""
    for number, (architecture, sizes) in enumerate(LAYOUTS.items()):
        on_rank(rank, port + number, root / architecture, *sizes)


def on_rank(rank: int, port: int, root: Path, tensor_size: int, pipeline_size: int) -> None:
    """Load all formats, compare with the canonical tensors, and save them again."""
    warnings.simplefilter("ignore")
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_llmjp.checkpoint import save, sharded_state
    from megatron_llmjp.convert.formats import native
    from megatron_llmjp.model.gpt import build_model
    from megatron_llmjp.parallel import process_groups
    from megatron_llmjp.parallel.device import setup
    from megatron_llmjp.parallel.ranks import Ranks

    source = native.read_native(root / "native").check()
    config = replace_fields(
        load_config(source.path / "config.yaml"),
        tensor_model_parallel_size=tensor_size,
        pipeline_model_parallel_size=pipeline_size,
    )
    device = setup()
    process_groups.initialize(config, Ranks(rank, 2, rank, "127.0.0.1", str(port), "test"), device)
    (model,) = build_model(config, device)
    tensor = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()

    forget(model)
    sharded_state.load_checkpoint(source.path, sharded_state.RunState([model]))
    compare(model, source, config)

    forget(model)
    both = dist_checkpointing.validation.StrictHandling.RETURN_ALL
    dist = str(root / "dist" / "release")
    loaded, unused, absent = dist_checkpointing.load(model.sharded_state_dict(), dist, strict=both)
    assert (unused, absent) == (TRANSFORMER_ENGINE_ONLY, set())
    args = loaded.pop("args")
    assert (loaded.pop("iteration"), loaded.pop("checkpoint_version")) == (0, 3.0)
    assert args.hidden_size == config.model.hidden_size
    model.load_state_dict(loaded)
    compare(model, source, config)

    forget(model)
    suffix = f"_{stage:03d}" if pipeline_size > 1 else ""
    file = f"mp_rank_{tensor:02d}{suffix}/model_optim_rng.pt"
    content = torch.load(root / "legacy" / "release" / file, weights_only=False)
    model.load_state_dict(content["model"])
    compare(model, source, config)

    target = root / "saved" / "iter_0000003"
    if rank == 0:
        target.mkdir(parents=True)
    torch.distributed.barrier()
    state_dict = model.sharded_state_dict()
    state_dict |= {"args": content["args"], "iteration": 3}
    dist_checkpointing.save(state_dict, str(target))
    about = save.RunDescription(config)
    progress = save.SaveProgress(iteration=5)
    state = sharded_state.RunState([model])
    save.plan_save(root / "run", state, progress, about, lambda: None).execute_sync()
    path = root / "saved-legacy" / "iter_0000003" / file
    path.parent.mkdir(parents=True)
    torch.save({**content, "model": model.state_dict()}, path)
    process_groups.destroy()


def forget(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)


def compare(model: torch.nn.Module, source, config: Config) -> None:
    """Every parameter of this rank is its part of the canonical tensor."""
    from megatron.core import parallel_state

    from megatron_llmjp.convert.tensors import parallel_split, rank_layout

    tensor = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    size = config.parallel.tensor_model_parallel_size
    per_stage = config.model.num_layers // config.parallel.pipeline_model_parallel_size
    for key, parameter in model.named_parameters():
        name = key
        if key.startswith("decoder.layers."):
            layer, rest = key.removeprefix("decoder.layers.").split(".", 1)
            name = f"decoder.layers.{int(layer) + stage * per_stage}.{rest}"
        elif key == "output_layer.weight" and name not in source.reads:
            name = "embedding.word_embeddings.weight"  # the last stage's tied copy
        whole = source.reads[name].read(name)
        parts = rank_layout(name, source.model, size)(whole)
        part = parts[0 if parallel_split(name, source.model) == "replicated" else tensor]
        assert torch.equal(parameter, part.view.reshape(part.shape)), key


def test_megatron_core_reads_and_writes_the_same(tmp_path, convert):
    for architecture, (tensor, pipeline) in LAYOUTS.items():
        root = tmp_path / architecture
        depth = {"llama": "num_hidden_layers", "gpt2": "n_layer"}[architecture]
        MODELS[architecture](**{depth: 4}).save_pretrained(root / "hf")
        sizes = ["--target-tensor-parallel-size", tensor]
        sizes += ["--target-pipeline-parallel-size", pipeline]
        convert("--to", "native", "--input", root / "hf", "--output", root / "native", *sizes)
        convert("--to", "megatron-lm", "--input", root / "hf", "--output", root / "dist", *sizes)
        convert("--to", "megatron-lm", "--input", root / "hf", "--output", root / "legacy",
                "--ckpt-format", "torch", "--transformer-impl", "local", *sizes)  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(on_ranks, args=(port, tmp_path), nprocs=2)
    for architecture in LAYOUTS:
        root = tmp_path / architecture
        before = state(root / "hf")
        for name in ("saved", "saved-legacy", "run"):
            convert("--to", "hf", "--input", root / name, "--output", root / f"hf-{name}")
            after = state(root / f"hf-{name}")
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before)
