"""Text output of ``inspect`` and ``--dry-run``: descriptions of checkpoints and conversions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llmjp.convert.files.storage import byte_count, dtype_name
from megatron_llmjp.convert.formats.base import SourceCheckpoint
from megatron_llmjp.convert.formats.registry import FORMATS
from megatron_llmjp.convert.opening import open_any
from megatron_llmjp.errors import UserError

if TYPE_CHECKING:
    from megatron_llmjp.convert.conversion import Conversion


def summarize(source: SourceCheckpoint) -> str:
    """Return two lines: the checkpoint, and its architecture."""
    model = source.model
    vocabulary = f"vocabulary {model.vocab_size or 'of unknown size'}"
    if model.vocab_size != source.padded_vocab_size:
        vocabulary += f" in {source.padded_vocab_size} rows"
    head = "untied" if model.untie_embeddings_and_output_weights else "tied"
    step = "" if source.iteration is None else f", iteration {source.iteration}"
    heads = f"{model.num_attention_heads} heads"
    if model.query_groups != model.num_attention_heads:
        heads += f" in {model.query_groups} groups"
    feed_forward = [] if all(model.expert_layers) else [f"ffn {model.ffn_size}"]
    if model.has_experts:
        chosen = f"{model.num_moe_experts} experts of {model.expert_ffn_size}"
        feed_forward.append(f"{chosen} ({model.moe_router_topk} per token)")
    return (
        f"{source.path}: {source.format}, {source.layout}{step}, {dtype_name(source.dtype)}, "
        f"{source.parameters:,} parameters\n"
        f"  {model.num_layers} layers, hidden {model.hidden_size}, {heads} of {model.head_dim}, "
        f"{', '.join(feed_forward)}, {model.activation_function}, {model.normalization}, "
        f"{model.position_embedding_type}, {head}, {vocabulary}"
    )


def describe_checkpoint(path: Path, ignored_args: frozenset[str] = frozenset()) -> str:
    """Describe the checkpoint in a folder, and list the formats to convert it to.

    Args:
        path: the folder.
        ignored_args: arguments of a Megatron run to ignore.

    Raises:
        UserError: the folder contains no complete checkpoint of a known format.
    """
    from megatron_llmjp.convert.formats.hugging_face.architectures.registry import architecture_for

    source = open_any(path, ignored_args)
    possible = [name for name in FORMATS if name != source.format]
    lines = [summarize(source)]
    try:
        lines.append(f"  Hugging Face: {architecture_for(source.model).class_name}")
    except UserError as error:
        possible = [name for name in possible if name != "hf"]
        lines.append(f"  {error}")
    stored = "" if source.tokenizer is None else f", in {source.tokenizer}"
    lines.append(f"  tokenizer: {source.tokenizer_type or 'of unknown type'}{stored}")
    lines.append(f"  can be converted to: {', '.join(possible)}")
    return "\n".join([*lines, *(f"  note: {note}" for note in source.notes)])


def format_plan(conversion: Conversion, shard: tuple[int, int] | None = None) -> str:
    """List all tensors with shape, type and files, then all files with their sizes.

    Args:
        conversion: the conversion.
        shard: list only the files of this task (number, number of tasks).
    """
    from megatron_llmjp.convert.copying.sharding import files_of_shard, restrict_copies

    files, copies = conversion.output.files, conversion.copies
    if shard is not None:
        files = files_of_shard(files, copies, *shard)
        copies = restrict_copies(copies, files)
    lines = []
    for copy in copies:
        sources = sorted({Path(part.source).name for part in copy.read.parts})
        targets = sorted({slot.file for slots in copy.write.slots for slot in slots})
        shape = "x".join(map(str, copy.read.shape))
        lines.append(
            f"{copy.name} [{shape}] {dtype_name(copy.read.dtype)}: "
            f"{', '.join(sources)} -> {', '.join(targets)}"
        )
    lines += [f"{file.name}: {file.size:,} bytes" for file in files]
    read = sum(byte_count(copy.read.shape, copy.read.dtype) for copy in copies)
    written = sum(file.size for file in files)
    lines.append(
        f"{len(copies)} tensors, {read / 1e9:.3f} GB to read, {written / 1e9:.3f} GB to write in "
        f"{len(files)} files"
    )
    if shard is not None:
        lines.append(
            f"task {shard[0]} of {shard[1]}: {len(files)} of {len(conversion.output.files)} files, "
            f"{written / max(conversion.output.nbytes, 1):.1%} of all bytes"
        )
    return "\n".join(lines)
