"""Model card of a converted model, ``README.md``, in the form of LLM-jp's cards.

It states what the model's files and the record of its run contain. Anything else is a field to fill
(:data:`FIELD`), never a default. Form: the sections of https://huggingface.co/llm-jp/llm-jp-3-13b,
and the tables of https://github.com/llm-jp/model-cards/blob/main/template.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_llmjp.config.parameter_counts import ParameterCounts
from megatron_llmjp.config.schema import Config, ModelConfig
from megatron_llmjp.convert.publishing.run_record import DatasetTokens, RunRecord

CARD, CURVE = "README.md", "training_loss.png"
"""File names of the card and of its picture."""

FIELD = "TO BE FILLED"
"""Start of a field that the author of the card has to fill."""

_MOST_FOLDS = 3
"""Number of fold names in a row of the table of datasets."""

Rows = Iterable[tuple[str, Any]]


@dataclass(frozen=True)
class CardFacts:
    """What a card states.

    Attributes:
        name: name of the model: its repository, or its folder.
        architecture: class of transformers.
        model: the architecture; ``vocab_size`` is the number of rows of the embedding.
        parameters: its parameter counts.
        dtype: type of the weights, by its name in config.json.
        tokenizer: lines about the tokenizer; empty if the export has none that transformers loads.
        run: the record of the run; None if there is none.
    """

    name: str
    architecture: str
    model: ModelConfig
    parameters: ParameterCounts
    dtype: str
    tokenizer: tuple[tuple[str, str], ...] = ()
    run: RunRecord | None = None


def unfilled_fields(card: str) -> list[str]:
    """Return the fields of a card that have to be filled, in order."""
    return re.findall(rf"{FIELD}: ([^\]\n]+)", card)


def render_card(facts: CardFacts) -> str:
    """Return the content of ``README.md``."""
    sections = [
        _front_matter(),
        f"# {facts.name}",
        _field("who developed this model, and what it is for"),
        "Checkpoints format: Hugging Face Transformers",
        _usage(facts),
        _model_details(facts),
        _training(facts.run),
        _tokenizer(facts),
        _datasets(facts.run),
        *(f"## {title}\n\n{_field(what)}" for title, what in _LAST_SECTIONS),
    ]
    return "\n\n".join(sections) + "\n"


_LAST_SECTIONS = (
    ("Evaluation", "benchmarks and results"),
    ("Risks and Limitations", "known risks and limitations"),
    ("Send Questions to", "contact address"),
    ("License", "license, also as license: in the first lines of this file"),
    ("Model Card Authors", "names"),
)


def _field(what: str) -> str:
    return f"**[{FIELD}: {what}]**"


def _front_matter() -> str:
    """Return the metadata. A comment is no value: the Hub refuses unknown licenses."""
    return (
        "---\n"
        f"# license: [{FIELD}: identifier of the license, such as apache-2.0]\n"
        f"# language: [{FIELD}: languages, such as ja]\n"
        "library_name: transformers\n"
        "pipeline_tag: text-generation\n"
        "---"
    )


def _table(heading: tuple[str, ...], rows: Iterable[Sequence[Any]]) -> str:
    lines = [heading, (":---",) * len(heading), *rows]
    return "\n".join(f"|{'|'.join(_cell(value) for value in line)}|" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return re.sub(r"[\r\n]+", " ", text).replace("|", "\\|")


def _specification(rows: Rows) -> str:
    return _table(("Spec name", "Value"), [row for row in rows if row[1] is not None])


def _usage(facts: CardFacts) -> str:
    if not facts.tokenizer:
        return f"## Usage\n\n{_field('usage; this model contains no tokenizer')}"
    return f"""## Usage

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{facts.name}")
model = AutoModelForCausalLM.from_pretrained("{facts.name}", torch_dtype=torch.{facts.dtype})
prompt = "自然言語処理とは何か"
ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
with torch.no_grad():
    output = model.generate(ids, max_new_tokens=100, do_sample=True, top_p=0.95, temperature=0.7)
print(tokenizer.decode(output[0]))
```"""


def _model_details(facts: CardFacts) -> str:
    model, counts = facts.model, facts.parameters
    seen = facts.run.tokens if facts.run is not None else None
    total = _field("number of training tokens") if seen is None else f"{seen:,}"
    heading = ("Params", "Layers", "Hidden size", "Heads", "Context length")
    sizes = _table(
        (*heading, "Embedding parameters", "Non-embedding parameters"),
        [
            (
                *(counts.total, model.num_layers, model.hidden_size, model.num_attention_heads),
                *(model.max_position_embeddings, counts.total - counts.non_embedding),
                counts.non_embedding,
            )
        ],
    )
    return (
        "## Model Details\n\n"
        "- **Model type:** Transformer-based Language Model\n"
        f"- **Architecture:** {facts.architecture}\n"
        f"- **Total seen tokens:** {total}\n\n"
        f"{sizes}\n\n{_specification(_architecture(facts))}"
    )


def _architecture(facts: CardFacts) -> Iterator[tuple[str, Any]]:
    """Yield the rows of the table of the architecture."""
    model = facts.model
    tied = not model.untie_embeddings_and_output_weights
    biases = "all linear layers" if model.add_bias_linear else "none"
    yield "Number of key/value heads", model.query_groups
    yield "Head size", model.head_dim
    if model.has_experts:
        yield "Active parameters per token", f"{facts.parameters.active:,}"
        chosen = model.moe_router_topk
        yield (
            "Experts",
            f"{model.num_moe_experts} in {sum(model.expert_layers)} layers, top {chosen}",
        )
        yield "Number of hidden units of an expert", model.expert_ffn_size
        yield "Hidden units of shared experts", model.moe_shared_expert_intermediate_size
    if not all(model.expert_layers):
        yield "Number of FFN hidden units", model.ffn_size
    yield "Vocabulary size (rows of the embedding)", model.vocab_size
    yield "Activation", model.activation_function
    yield "Normalization", f"{model.normalization}, epsilon {model.norm_epsilon:g}"
    yield "Positional embedding", _positions(model)
    yield "Biases", "QKV projection" if model.add_qkv_bias else biases
    yield "Normalized queries and keys", "yes" if model.qk_layernorm else None
    yield "Parallel residual", "yes" if model.use_parallel_residual else None
    yield "Tied embeddings", "yes" if tied else "no"
    yield "Type of the weights", facts.dtype


def _positions(model: ModelConfig) -> str:
    if not model.is_rotary:
        return "learned"
    parts = [f"RoPE, base {model.rotary_base:,}"]
    if model.rotary_percent != 1.0:
        parts.append(f"{model.rotary_percent:.0%} of each head")
    if model.use_rope_scaling:
        parts.append(f"LLaMA 3 scaling by {model.rope_scaling_factor:g}")
    if model.position_embedding_type == "yarn":
        parts.append(f"YaRN by {model.yarn_rotary_scaling_factor:g}")
    if model.rotary_seq_len_interpolation_factor is not None:
        parts.append(f"linear scaling by {model.rotary_seq_len_interpolation_factor}")
    return ", ".join(parts)


def _training(run: RunRecord | None) -> str:
    lines = ["## Training\n\n### Pre-training\n"]
    hardware = "; ".join(run.hardware) if run is not None else ""
    lines.append(f"- **Hardware:** {hardware or _field('accelerators and nodes')}")
    lines.append(f"- **Software:** {_software(run)}")
    if run is None:
        return "\n".join([*lines, f"- **Hyperparameters:** {_field('training settings')}"])
    if run.config.checkpoint.finetune:
        what = "name of that model; its training data are not included below"
        lines.append(f"- **Initial weights:** those of another model, {_field(what)}")
    lines.append(f"\n{_specification(_hyperparameters(run))}\n")
    if run.loss is not None:
        lines.append(f"- **Training loss:** {run.loss:.4f} at iteration {run.manifest.iteration:,}")
    for name, loss in run.validation.items():
        lines.append(f"- **Validation loss ({name}):** {loss:.4f}")
    picture = f"![Loss curve]({CURVE})" if run.curve else _field("picture of the loss curve")
    return "\n".join([*lines, "", picture])


def _software(run: RunRecord | None) -> str:
    if run is None:
        return _field("training program and versions")
    return ", ".join(f"{name} {version}" for name, version in run.manifest.versions.items())


def _hyperparameters(run: RunRecord) -> Iterator[tuple[str, Any]]:
    """Yield the rows of the table of hyperparameters, in the order of LLM-jp's cards."""
    config, optimizer, training = run.config, run.config.optimizer, run.config.training
    is_adam = optimizer.optimizer == "adam"
    yield "Optimizer", "AdamW" if is_adam else "SGD"
    yield "Peak learning rate", f"{optimizer.lr:g}"
    yield "Minimum learning rate", f"{optimizer.min_lr:g}"
    yield "Beta1", f"{optimizer.adam_beta1:g}" if is_adam else None
    yield "Beta2", f"{optimizer.adam_beta2:g}" if is_adam else None
    yield "Epsilon", f"{optimizer.adam_eps:g}" if is_adam else None
    yield "Weight decay factor", f"{optimizer.weight_decay:g}"
    yield "Gradient clipping", f"{optimizer.clip_grad:g}"
    yield "Warmup", _first_given(optimizer, "lr_warmup")
    yield "Learning rate scheduling strategy", optimizer.lr_decay_style
    yield "Learning rate decay", _first_given(optimizer, "lr_decay")
    yield "Folds with their own learning rates", ", ".join(run.folds_with_rates) or None
    yield "Training steps", run.manifest.iteration
    yield "Global batch size", training.global_batch_size
    yield "Sequence length", config.data.seq_length
    yield "Dropout rate", f"{config.model.hidden_dropout:g}"
    yield "Floating point precision", _precision(config)
    yield "Z loss", f"{training.z_loss_strength:g}" if training.z_loss_strength else None
    yield "Tensor parallel size", config.parallel.tensor_model_parallel_size
    yield "Pipeline parallel size", config.parallel.pipeline_model_parallel_size
    yield "Data parallel size", run.manifest.data_parallel_size


def _first_given(settings: Any, prefix: str) -> str | None:
    """Return the first setting of ``PREFIX_iters``, ``_samples``, ``_tokens``, ``_fraction``."""
    units = {"iters": "iterations", "samples": "samples", "tokens": "tokens"}
    for unit, word in units.items():
        if value := getattr(settings, f"{prefix}_{unit}"):
            return f"{value:,} {word}"
    fraction = getattr(settings, f"{prefix}_fraction")
    return f"{fraction:.1%} of the training" if fraction else None


def _precision(config: Config) -> str:
    if config.training.bf16:
        return "BF16 for parameters, FP32 for optimizer"
    return "FP16 for parameters, FP32 for optimizer" if config.training.fp16 else "FP32"


def _tokenizer(facts: CardFacts) -> str:
    lines = [f"- **{label}:** {value}" for label, value in facts.tokenizer]
    if not lines:
        return f"## Tokenizer\n\n{_field('tokenizer; this model contains none')}"
    return "\n".join(["## Tokenizer\n", *lines, f"- **Training:** {_field('tokenizer training')}"])


def _datasets(run: RunRecord | None) -> str:
    title = "## Datasets\n\n### Pre-training\n\n"
    if run is None or not run.datasets:
        return f"{title}{_field('datasets and their tokens')}"
    rows = [(dataset.name, _folds(dataset), _tokens(dataset)) for dataset in run.datasets]
    table = _table(("Dataset", "Folds", "Tokens"), [*rows, ("**Total**", "", run.tokens)])
    return f"{title}{table}\n\n{_field('languages and sources of these datasets')}"


def _folds(dataset: DatasetTokens) -> str:
    names = dataset.folds
    if len(names) <= _MOST_FOLDS:
        return ", ".join(names)
    return f"{names[0]} to {names[-1]} ({len(names)} folds)"


def _tokens(dataset: DatasetTokens) -> str:
    return f"{dataset.tokens:,}" if dataset.is_exact else f"about {dataset.tokens:,}"
