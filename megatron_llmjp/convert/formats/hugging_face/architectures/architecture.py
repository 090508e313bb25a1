"""Definition of a Hugging Face architecture: configuration keys, tensor names and limits."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.tensors import EXPERT, LAYER, Layout, tensor_shapes


class TensorRule(NamedTuple):
    """The stored form of a canonical tensor.

    Attributes:
        name: canonical name; ``{i}`` is the layer, ``{e}`` the expert.
        keys: names of the stored parts, in the same way.
        layout: splits the canonical tensor into the parts.
    """

    name: str
    keys: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True)
class HuggingFaceArchitecture:
    """A causal language model of transformers.

    Attributes:
        model_type: its value in config.json.
        class_name: the class, stored as ``architectures`` in config.json.
        models: published models of this architecture, for the table in docs/convert.md.
        requirements: conditions on a model that the architecture must meet to represent it, and
            whether it does; the text of a condition names the unsupported feature.
        rules: the tensors of a model; one rule with ``{i}`` for all layers, with ``{e}``
            for all experts.
        to_config: keys of config.json that describe a model.
        from_config: the inverse. Arguments: the content of config.json; the file, for messages.
            Raises UserError if the model cannot be represented.
        ignored_keys: stored keys that hold no parameters, such as masks of older versions.
        base_prefix: the prefix that the keys lack if the base model was saved without its head.
        sorted_as: keys of transformers 5 that differ from the stored ones, by stored key; it sorts
            by them when it divides a model into files.
        transposed_linears: whether linear layers are Conv1D, stored as ``[in, out]``.
    """

    model_type: str
    class_name: str
    models: str
    requirements: Callable[[ModelConfig], dict[str, bool]]
    rules: Callable[[ModelConfig], list[TensorRule]]
    to_config: Callable[[ModelConfig], dict[str, Any]]
    from_config: Callable[[dict[str, Any], str], ModelConfig]
    ignored_keys: re.Pattern[str]
    base_prefix: str = ""
    sorted_as: Mapping[str, str] = field(default_factory=dict)
    transposed_linears: bool = False

    def refusals(self, model: ModelConfig) -> list[str]:
        """Return the features of a model that the architecture does not support."""
        found = self.requirements(model).items()
        return [f"does not support {feature}" for feature, is_met in found if not is_met]

    def expanded_rules(self, model: ModelConfig) -> list[TensorRule]:
        """Return one rule per tensor of the model, in canonical order."""
        layer_prefix = LAYER.format(i="{i}")
        pattern = re.escape(layer_prefix).replace(r"\{i\}", r"(\d+)") + "(.*)"
        table = {rule.name: rule for rule in self.rules(model)}
        found = []
        for name in tensor_shapes(model, 1):
            layer = re.fullmatch(pattern, name)
            rest, expert = _without_expert(layer[2]) if layer else ("", "")
            rule = table[layer_prefix + rest if layer else name]
            i = layer[1] if layer else ""
            keys = tuple(key.format(i=i, e=expert) for key in rule.keys)
            found.append(TensorRule(name, keys, rule.layout))
        return found


def _without_expert(rest: str) -> tuple[str, str]:
    """Replace the number of an expert in a name relative to its layer by ``{e}``; return both."""
    before, after = EXPERT.split("{e}")
    match = re.fullmatch(re.escape(before) + r"(\d+)" + re.escape(after) + "(.*)", rest)
    return (EXPERT + match[2], match[1]) if match else (rest, "")
