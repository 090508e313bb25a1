"""What an architecture of Hugging Face must say of itself to be read and written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_llmjp.config.schema import ModelConfig
from megatron_llmjp.convert.tensors import LAYER, Layout, shapes


class Rule(NamedTuple):
    """A canonical tensor, the keys of its parts, and how it is cut into them."""

    name: str
    keys: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True)
class Style:
    """One architecture of Hugging Face.

    Attributes:
        refusals: why a model cannot be held, one line each; none when it can.
        rules: the table of names; ``{i}`` is the layer.
        to_config: the architecture's keys of config.json; model to dictionary.
        from_config: the inverse; raises UserError for what cannot be represented.
        ignored: keys of older files that hold no parameters.
    """

    model_type: str
    architecture: str
    refusals: Callable[[ModelConfig], list[str]]
    rules: Callable[[ModelConfig], list[Rule]]
    to_config: Callable[[ModelConfig], dict[str, Any]]
    from_config: Callable[[dict[str, Any], str], ModelConfig]
    ignored: re.Pattern[str]

    def expanded(self, model: ModelConfig) -> list[Rule]:
        """The rules of every layer, in canonical order, without those the model lacks."""
        names = shapes(model, 1)
        mark = LAYER.format(i="{i}")
        table = {rule.name: rule for rule in self.rules(model)}
        found = []
        for name in names:
            layer = re.fullmatch(re.escape(mark).replace(r"\{i\}", r"(\d+)") + "(.*)", name)
            rule = table[mark + layer[2] if layer else name]
            i = layer[1] if layer else ""
            found.append(Rule(name, tuple(key.format(i=i) for key in rule.keys), rule.layout))
        return found
