"""``adapter_config.json`` of a LoRA adapter.

Source of the fields: peft, tuners/lora/config.py and config.py (0.7 to 0.21). A field that is in
none of the lists is refused unless it is unset, since it may change the adapter's function.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_llmjp.convert.formats.hugging_face.config import read_json
from megatron_llmjp.errors import UserError

CONFIG = "adapter_config.json"

_USED = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("fan_in_fan_out", "base_model_name_or_path", "init_lora_weights"),
)
_WITHOUT_EFFECT = (
    *("task_type", "inference_mode", "revision", "auto_mapping", "peft_version", "lora_dropout"),
    # The tensors of the adapter show which modules it changes.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "bias", "ensure_weight_tying"),
    # Settings of training, of initial values, or of options that are refused themselves.
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "runtime_config", "qalora_group_size"),
)
_INITIAL_VALUES = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the weights of the base model unchanged."""


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of a LoRA adapter that determine the merged weights."""

    path: Path
    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks of modules whose name ends in a match of the key, a regular expression."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    """Whether the base model stores weights as ``[in, out]``."""
    base_model: str | None = None

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's matrices."""
        return int(_matching(self.rank_pattern, module, self.rank))

    def scaling(self, module: str) -> float:
        """Return the factor of a module's ``B A``: alpha / r, with rsLoRA alpha / sqrt(r)."""
        alpha, rank = _matching(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _matching(patterns: Mapping[str, float], module: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of a module's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read the configuration of an adapter.

    Raises:
        UserError: the file is missing or damaged, or the adapter is not a LoRA adapter whose
            weights can be merged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(
            f"--adapter {folder}: {CONFIG} is missing; expected a folder written by peft's "
            "save_pretrained"
        )
    content = read_json(path)
    if content.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type {content.get('peft_type')!r} is not supported; expected 'LORA'"
        )
    _refuse_unknown(content, path)
    rank: Any = content.get("r")
    alpha: Any = content.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not _is_number(alpha):
        raise UserError(
            f"{path}: r {rank!r}, lora_alpha {alpha!r}: expected a positive integer and a number"
        )
    return AdapterConfig(
        path,
        rank,
        float(alpha),
        _flag(content, "use_rslora", path),
        _patterns(content, "rank_pattern", path),
        _patterns(content, "alpha_pattern", path),
        _flag(content, "fan_in_fan_out", path),
        content.get("base_model_name_or_path") or None,
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _flag(content: dict[str, Any], name: str, path: Path) -> bool:
    value = content.get(name) or False
    if not isinstance(value, bool):
        raise UserError(f"{path}: {name} {value!r}: expected true or false")
    return value


def _patterns(content: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    found = content.get(name) or {}
    values: list[Any] = list(found.values()) if isinstance(found, dict) else [None]
    if name == "rank_pattern" and any(type(value) is not int for value in values):
        values = [None]
    if not all(_is_number(value) and value > 0 for value in values):
        raise UserError(f"{path}: {name} {found!r}: expected positive numbers by module")
    for pattern in found:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{path}: {name} {pattern!r}: invalid pattern: {error}") from None
    return found


def _refuse_unknown(content: dict[str, Any], path: Path) -> None:
    """Refuse fields that change the adapter's function in ways that are not implemented."""
    initial = content.get("init_lora_weights")
    if not any(initial is known or initial == known for known in _INITIAL_VALUES):
        raise UserError(
            f"{path}: init_lora_weights {initial!r} changes the weights of the base model, and "
            "the adapter fits only the changed ones; save it with peft's "
            "path_initial_model_for_weight_conversion"
        )
    unknown = {k: v for k, v in content.items() if k not in (*_USED, *_WITHOUT_EFFECT) and v}
    if unknown:
        shown = ", ".join(f"{name} {value!r}" for name, value in list(unknown.items())[:4])
        raise UserError(f"{path}: {shown}: not supported; merge the adapter with peft")


def adapter_config(
    rank: int, targets: list[str], saved: list[str], fan_in_fan_out: bool, base_model: str
) -> dict[str, Any]:
    """Return the content of ``adapter_config.json`` of an adapter with scaling 1.

    Args:
        rank: rank of all modules.
        targets: names of the modules with LoRA matrices.
        saved: names of the modules that are stored whole.
        fan_in_fan_out: whether the base model stores weights as ``[in, out]``.
        base_model: name or folder of the base model.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": targets,
        "modules_to_save": saved or None,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "init_lora_weights": True,
    }
