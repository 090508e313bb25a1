"""The configuration that a checkpoint stores next to its weights, for a run that gives no model."""

from __future__ import annotations

from pathlib import Path

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.config.loading import ConfigLayers, load_config
from megatron_llmjp.config.schema import SECTION_OF, DataConfig, ModelConfig, OptimizerConfig
from megatron_llmjp.tokenizers.registry import stored_tokenizer

_TIKTOKEN = [name for name in DataConfig.model_fields if name.startswith("tiktoken_")]
_BATCHES = (
    "micro_batch_size",
    "global_batch_size",
    "rampup_batch_size",
    "seed",
    "bf16",
    "fp16",
    "z_loss_strength",
)


def add_stored_config(root: Path, layers: ConfigLayers) -> bool:
    """Add the model, sequence length and tokenizer of a checkpoint; of a run, its settings, too.

    A checkpoint of weights alone (``convert_checkpoint``) says nothing of optimizer and batches.

    Args:
        root: the folder of ``--load`` or ``--save``.
        layers: where the values are added, below all flags.

    Returns:
        Whether a checkpoint of this program was found there.

    Raises:
        UserError: its configuration or manifest cannot be read.
    """
    if not (root / manifests.MANIFEST).is_file() and not manifests.complete_iterations(root):
        return False
    folder = manifests.newest_checkpoint(root)
    config, source = load_config(folder / manifests.CONFIG), str(folder / manifests.CONFIG)
    names = [*ModelConfig.model_fields, "seq_length", *_TIKTOKEN]
    if manifests.read_manifest(folder).contents == "full":
        names += [*OptimizerConfig.model_fields, *_BATCHES, "tokenizer_type"]
    for name in names:
        value = getattr(getattr(config, SECTION_OF[name]), name)
        if value is not None and name != "padded_vocab_size":
            layers.set(name, value, source)
    _add_tokenizer(folder / manifests.TOKENIZER, config.data.tokenizer_type, layers)
    return True


def _add_tokenizer(folder: Path, stored_type: str | None, layers: ConfigLayers) -> None:
    """The files in the checkpoint; their type where neither flags nor the checkpoint name it."""
    given = layers.values.get("data", {}).get("tokenizer_type")
    found = stored_tokenizer(folder, given or stored_type)
    if not found and given is None:
        found = stored_tokenizer(folder)
    for name, value in found.items():
        layers.set(name, value, str(folder))
