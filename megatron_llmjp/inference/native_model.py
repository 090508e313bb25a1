"""Native checkpoints as models in one process, on a CPU or one GPU.

The layers are torch's on every device (``transformer_impl local``), without fusions: they read the
same weights as Transformer Engine's, and attention accepts the masks that batches of prompts with
different lengths need.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from torch import Tensor

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.checkpoint import safe_unpickling, sharded_state
from megatron_llmjp.config.loading import load_config
from megatron_llmjp.config.schema import Config
from megatron_llmjp.errors import UserError
from megatron_llmjp.inference.single_process import join_single_process, unchanged_random_states
from megatron_llmjp.model.gpt import build_model_chunk, transformer_config
from megatron_llmjp.model.kernels import KernelChoice
from megatron_llmjp.parallel import device as devices
from megatron_llmjp.parallel.device import Device

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

DtypeName = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[DtypeName, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
KERNELS = KernelChoice(transformer_engine=False, fusions=False, apex=False)
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class NativeModel:
    """A model in one process.

    Attributes:
        module: megatron-core's model, in evaluation mode.
        config: configuration of the model in this process; layout and data are not the run's.
        stored: configuration of the run, as in the checkpoint.
        device: device of the weights.
        folder: the checkpoint.
    """

    module: GPTModel
    config: Config
    stored: Config
    device: Device
    folder: Path

    @property
    def max_positions(self) -> int:
        """Largest number of tokens of a sequence."""
        return self.config.max_positions

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Compute the logits of tokens.

        Args:
            tokens: ids ``[b, s]``; on any device.

        Returns:
            ``[b, s, padded vocabulary]``, in the dtype and on the device of the model.
        """
        tokens = tokens.to(self.device.torch)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        result: Tensor = self.module(tokens, positions, None)
        return result


def load_native_model(
    folder: Path, dtype: DtypeName | None = None, device: Literal["auto", "cpu"] = "auto"
) -> NativeModel:
    """Load the weights of a native checkpoint, saved in any parallel layout.

    Args:
        folder: the checkpoint of one iteration.
        dtype: of weights and activations; by default fp32 on a CPU, and the checkpoint's on a GPU.
        device: ``auto`` for the GPU if there is one; ``cpu`` replaces ``torch.cuda`` in this
            process by the CPU (``patches/torch_cuda_on_cpu.py``).

    Raises:
        UserError: the checkpoint is incomplete or damaged, or this process is a rank of a run.
    """
    problems = manifests.file_problems(folder, manifests.read_manifest(folder))
    if problems:
        raise UserError("\n".join(problems))
    stored = load_config(folder / manifests.CONFIG)
    safe_unpickling.check_pickles(folder)
    chosen = devices.setup_rank("cpu", 0) if device == "cpu" else devices.setup()
    name = dtype or (_stored_dtype(folder) if chosen.is_cuda else "fp32")
    config = one_process_config(stored, name)
    with unchanged_random_states(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about megatron-core's calls
        join_single_process(config, chosen)
        core = transformer_config(config, chosen, KERNELS)
        core.perform_initialization = False
        module = build_model_chunk(config, chosen, core, kernels=KERNELS, initial_weights=False)
        load_weights(module, folder)
    module.eval().requires_grad_(False)
    return NativeModel(module, config, stored, chosen, folder)


def _stored_dtype(folder: Path) -> DtypeName:
    """Return the dtype of a checkpoint's weights."""
    found = load_sharded_metadata(str(folder)).get(_EMBEDDING)
    dtype = getattr(found, "dtype", torch.float32)
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    return "fp32"


def one_process_config(stored: Config, dtype: DtypeName = "fp32") -> Config:
    """Return the configuration of a stored model for one process, without dropout."""
    model = stored.model.model_copy(update={"hidden_dropout": 0.0, "attention_dropout": 0.0})
    data = {"seq_length": stored.data.seq_length}
    training = {"bf16": dtype == "bf16", "fp16": dtype == "fp16"}
    return Config.model_validate({"model": model.model_dump(), "data": data, "training": training})


def load_weights(model: GPTModel, folder: Path) -> None:
    """Load the weights with the trainer's loader; weights that are not loaded become NaN."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    sharded_state.load_checkpoint(folder, sharded_state.RunState([model]))
