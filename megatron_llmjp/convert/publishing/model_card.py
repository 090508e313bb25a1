"""Addition of a model card to a planned conversion to Hugging Face."""

from __future__ import annotations

from pathlib import Path

from megatron_llmjp.checkpoint.save_folder import HUGGING_FACE, NATIVE
from megatron_llmjp.config.parameter_counts import count_parameters
from megatron_llmjp.config.schema import Config
from megatron_llmjp.convert.conversion import Conversion
from megatron_llmjp.convert.files.storage import DTYPES
from megatron_llmjp.convert.formats.base import SourceCheckpoint
from megatron_llmjp.convert.formats.hugging_face.architectures.registry import find_architecture
from megatron_llmjp.convert.formats.hugging_face.config import read_json
from megatron_llmjp.convert.formats.hugging_face.reference_model import CONFIG, TORCH_NAMES
from megatron_llmjp.convert.formats.hugging_face.tokenizer import FAST
from megatron_llmjp.convert.plan import Checksums
from megatron_llmjp.convert.publishing.card import CARD, CURVE, CardFacts, render_card
from megatron_llmjp.convert.publishing.run_record import RunRecord, read_run_record
from megatron_llmjp.convert.tensors import WORD_EMBEDDINGS
from megatron_llmjp.errors import UserError
from megatron_llmjp.tokenizers import load_tokenizer


def add_model_card(conversion: Conversion, name: str) -> None:
    """Write ``README.md`` and the loss curve together with the other files of the output.

    The card describes the written files, and the run if the source is a checkpoint of one.

    Args:
        conversion: a conversion to Hugging Face; its plan is extended.
        name: name of the model.

    Raises:
        UserError: the conversion has another target, or the record of the run is damaged.
    """
    if conversion.target != HUGGING_FACE:
        raise UserError(f"--model-card: expected --to {HUGGING_FACE}, found {conversion.target}")
    source, written = conversion.source, conversion.output.finish
    run = read_run_record(source.path) if source.format == NATIVE else None
    dtype = conversion.output.writes[WORD_EMBEDDINGS].slots[0][0].dtype
    short = next(key for key, known in DTYPES.items() if known == dtype)

    def finish(folder: Path, sums: Checksums) -> None:
        written(folder, sums)
        facts = _card_facts(folder, name, TORCH_NAMES[short], source, run)
        (folder / CARD).write_text(render_card(facts), encoding="utf-8")
        if run is not None and run.curve is not None:
            (folder / CURVE).write_bytes(run.curve)

    conversion.output.finish = finish


def _card_facts(
    folder: Path, name: str, dtype: str, source: SourceCheckpoint, run: RunRecord | None
) -> CardFacts:
    """Return what the card states, from the written config.json and tokenizer."""
    config = read_json(folder / CONFIG)
    architecture = find_architecture(config, folder / CONFIG)
    model = architecture.from_config(config, str(folder / CONFIG))
    counted = Config(model=model.model_copy(update={"padded_vocab_size": model.vocab_size}))
    return CardFacts(
        name,
        architecture.class_name,
        model,
        count_parameters(counted),
        dtype,
        tuple(_tokenizer_lines(folder, source)),
        run,
    )


def _tokenizer_lines(folder: Path, source: SourceCheckpoint) -> list[tuple[str, str]]:
    """Return what the card states about the tokenizer; nothing if AutoTokenizer cannot load it."""
    if not (folder / FAST).is_file():
        return []
    tokenizer = load_tokenizer("HuggingFaceTokenizer", folder)
    lines = [
        ("Model", f"Hugging Face fast tokenizer (`{FAST}`)"),
        ("Vocabulary size", f"{tokenizer.vocab_size:,}"),
    ]
    if source.tokenizer_type is not None:
        lines.append(("Tokenizer type in training", f"`{source.tokenizer_type}`"))
    ids = {"BOS": tokenizer.bos_id, "EOS": tokenizer.eos_id, "PAD": tokenizer.pad_id}
    known = {role: token_id for role, token_id in ids.items() if token_id is not None}
    named = [f"{role} `{tokenizer.piece(i)}` ({i})" for role, i in known.items()]
    return [*lines, ("Special tokens", ", ".join(named))] if named else lines
