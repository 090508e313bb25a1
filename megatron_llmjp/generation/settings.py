"""Settings of a generation, checked, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from megatron_llmjp.errors import UserError, did_you_mean

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class GenerationSettings:
    """How tokens are chosen, and how many.

    The names and the order of the operations are those of transformers' ``generate``.

    Attributes:
        max_new_tokens: largest number of generated tokens.
        do_sample: whether tokens are drawn; else the most probable one is taken (greedy).
        temperature: divisor of the logits.
        top_k: number of most probable tokens to draw from; 0 for all.
        top_p: the most probable tokens whose probabilities sum up to this are drawn from.
        repetition_penalty: divisor of positive logits, and factor of negative ones, of tokens that
            the prompt or the text contains.
        seed: of the random numbers. Those of a prompt depend on the seed and its position in the
            input only, not on the batch size.

    Raises:
        UserError: a value is outside its range; the message has its name.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        _check_integer("max_new_tokens", self.max_new_tokens, 1)
        _check_integer("top_k", self.top_k, 0)
        _check_integer("seed", self.seed, 0)
        if self.seed >= 2**63:
            raise UserError(f"seed: expected a number below 2^63, found {self.seed}")
        if not isinstance(self.do_sample, bool):
            raise UserError(f"do_sample: expected true or false, found {self.do_sample!r}")
        _check_positive("temperature", self.temperature, hint="; for greedy search omit it")
        _check_positive("repetition_penalty", self.repetition_penalty)
        _check_positive("top_p", self.top_p)
        if self.top_p > 1.0:
            raise UserError(f"top_p: expected a number above 0 and at most 1, found {self.top_p}")

    @staticmethod
    def from_mapping(values: dict[str, Any]) -> GenerationSettings:
        """Return the settings with these values.

        Raises:
            UserError: a name is unknown, or a value is outside its range.
        """
        names = list(GenerationSettings.__dataclass_fields__)
        for name in values:
            if name not in names:
                raise UserError(
                    f"{name}: unknown parameter{did_you_mean(name, names)} "
                    f"(possible: {', '.join(names)})"
                )
        return replace(GenerationSettings(), **values)

    @staticmethod
    def of_given(values: dict[str, Any]) -> GenerationSettings:
        """Return the settings of given values, which draw tokens if one of them requires that.

        Raises:
            UserError: as :meth:`from_mapping`.
        """
        draws = any(name in values for name in ("temperature", "top_k", "top_p"))
        return GenerationSettings.from_mapping({"do_sample": draws, **values})


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}: expected an integer of at least {least}, found {value!r}")


def _check_positive(name: str, value: Any, hint: str = "") -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0.0:
        raise UserError(f"{name}: expected a number above 0, found {value!r}{hint}")
