"""Construction of a :class:`Config` from its layers: preset, YAML file, command line.

The origin of each value is recorded, for messages such as "run.yaml, line 12" or "flag --lr". All
errors of a layer are reported together.
"""

from __future__ import annotations

import difflib
import reprlib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_llmjp.config.schema import SECTION_OF, SECTIONS, Config, DataConfig, ModelConfig
from megatron_llmjp.errors import ErrorCollector, UserError, did_you_mean
from megatron_llmjp.yaml_text import YamlDocument, parse_yaml, read_yaml

EQUIVALENT_UNITS: tuple[tuple[str, ...], ...] = (
    ("train_iters", "train_samples"),
    ("lr_decay_iters", "lr_decay_samples", "lr_decay_tokens", "lr_decay_fraction"),
    ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_tokens", "lr_warmup_fraction"),
    (
        "lr_wsd_decay_iters",
        "lr_wsd_decay_samples",
        "lr_wsd_decay_tokens",
        "lr_wsd_decay_fraction",
    ),
)
"""Fields of one length in different units: a later layer's unit replaces an earlier one's."""

FLAG_ONLY = ("alert_command",)
"""Fields that are refused in files: nothing that comes from a file is executed."""


@dataclass
class ConfigLayers:
    """Values collected from the layers, by section and field, and the origin of each field."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

    def set(self, name: str, value: Any, origin: str) -> None:
        """Set a field, overriding earlier layers, also those that give it in another unit."""
        for other in (unit for units in EQUIVALENT_UNITS if name in units for unit in units):
            if value is None or other not in self.origin:
                continue
            if _source(self.origin[other]) != _source(origin):
                del self.values[SECTION_OF[other]][other], self.origin[other]
        self.values.setdefault(SECTION_OF[name], {})[name] = value
        self.origin[name] = origin


def _source(origin: str) -> str:
    """Return the layer of an origin: a preset, a file or ``flag``."""
    return "flag" if origin.startswith("flag ") else origin.rsplit(", line ", 1)[0]


PRESETS = resources.files("megatron_llmjp.config") / "presets"
"""Folder of the presets, one YAML file each."""


def preset_names() -> list[str]:
    """Return the names of all presets."""
    return sorted(p.name.removesuffix(".yaml") for p in PRESETS.iterdir() if p.name[-5:] == ".yaml")


def read_preset(layers: ConfigLayers, name: str, origin: str) -> None:
    """Add the values of a preset.

    Raises:
        UserError: no preset has this name.
    """
    names = preset_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names
        raise UserError(f"{origin}: no preset or file '{name}'; possible: {', '.join(near)}")
    text = (PRESETS / f"{name}.yaml").read_text()
    _add_yaml(layers, parse_yaml(text, f"preset {name}"))


def read_file(layers: ConfigLayers, path: Path) -> None:
    """Add the values of a YAML file; the preset named by its key ``preset`` comes first.

    Raises:
        UserError: the file cannot be read, is not YAML, or has an unknown key.
    """
    _add_yaml(layers, read_yaml(path, "configuration"))


def read_config(name_or_path: str, layers: ConfigLayers) -> None:
    """Add ``--config``: a preset's name or a YAML file."""
    if Path(name_or_path).suffix in {".yaml", ".yml"} or Path(name_or_path).exists():
        read_file(layers, Path(name_or_path))
    else:
        read_preset(layers, name_or_path, "--config")


def build_config(layers: ConfigLayers, may_be_missing: bool = False) -> Config:
    """Validate the collected values into a :class:`Config`.

    Args:
        layers: the values.
        may_be_missing: do not report missing values, since another error explains them.

    Raises:
        UserError: every invalid value, with its origin and the possible values.
    """
    missing_model = [n for n in ("num_layers", "hidden_size") if n not in layers.origin]
    if missing_model and not may_be_missing:
        raise UserError(
            "no model is given: pass --config with a preset or a YAML file, or --num-layers, "
            "--hidden-size and --num-attention-heads.\n"
            f"  presets: {', '.join(preset_names())}"
        )
    try:
        return Config.model_validate(layers.values)
    except ValidationError as error:
        found = [e for e in error.errors() if not (may_be_missing and e["type"] == "missing")]
        raise UserError("\n".join(_describe(e, layers) for e in found)) from None


def dump_config(config: Config) -> str:
    """Return a configuration as YAML; reading it back gives an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: Path) -> Config:
    """Read a configuration that :func:`dump_config` wrote.

    Raises:
        UserError: the file is missing or was not written by this program.
    """
    layers = ConfigLayers()
    read_file(layers, path)
    if not layers.origin.keys() >= {"num_layers", "hidden_size", "num_attention_heads"}:
        raise UserError(f"{path}: not a complete configuration: the size of the model is missing")
    return build_config(layers)


def replace_fields(config: Config, **fields: Any) -> Config:
    """Return a copy of ``config`` with the given fields replaced, in whichever section."""
    update: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        update.setdefault(SECTION_OF[name], {})[name] = value
    sections = {name: getattr(config, name).model_copy(update=new) for name, new in update.items()}
    return config.model_copy(update=sections)


def config_differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return differing fields as ``{field: (old, new)}``; an omitted size means its default."""
    found = {}
    sizes_before, sizes_after = _sizes(old), _sizes(new)
    for name, section in SECTION_OF.items():
        before, after = getattr(getattr(old, section), name), getattr(getattr(new, section), name)
        if before != after and sizes_before.get(name, 0) != sizes_after.get(name, 1):
            found[name] = (before, after)
    return found


def _sizes(config: Config) -> dict[str, int]:
    """Return the model sizes that have computed defaults."""
    return {
        **config.model.resolved_sizes(),
        "max_position_embeddings": config.max_positions,
    }


FROZEN_AT_RESUME: tuple[str, ...] = (
    *(name for name in ModelConfig.model_fields if not name.endswith("dropout")),
    *(name for name in DataConfig.model_fields if name.startswith("tiktoken_")),
    "seq_length",
    "tokenizer_type",
    "global_batch_size",
    "rampup_batch_size",
)
"""Fields that must not change on resume, since they would silently change the run."""


def _add_yaml(layers: ConfigLayers, written: YamlDocument) -> None:
    """Add the sections of a YAML text, on top of the preset that its key ``preset`` names."""
    sections = dict(written.data)
    problems = ErrorCollector()
    if "preset" in sections:
        where, name = written.where(("preset",)), sections.pop("preset")
        if not isinstance(name, str):
            raise UserError(f"{where}: preset: expected a name, found {reprlib.repr(name)}")
        read_preset(layers, name, where)
    for name, fields in sections.items():
        with problems.collect():
            _add_section(layers, name, fields, written)
    problems.report()


def _add_section(layers: ConfigLayers, section: str, fields: Any, written: YamlDocument) -> None:
    where = written.where((section,))
    if section not in SECTIONS:
        possible = [*SECTIONS, "preset"]
        raise UserError(
            f"{where}: unknown section '{section}'{did_you_mean(section, possible)}; "
            f"possible: {', '.join(possible)}"
        )
    if not isinstance(fields, dict):
        raise UserError(f"{where}: section '{section}' must contain fields, as `name: value` lines")
    problems = ErrorCollector()
    for name, value in fields.items():
        where = written.where((section, name))
        if name in FLAG_ONLY and section == SECTION_OF[name]:
            flag = f"--{name.replace('_', '-')}"
            problems.lines.append(f"{where}: {name} is executed: pass it as {flag}, not in a file")
            continue
        if name in SECTIONS[section].model_fields:
            layers.set(name, value, where)
            continue
        home = SECTION_OF.get(name)
        hint = f"; it belongs to section '{home}'" if home else did_you_mean(name, SECTION_OF)
        problems.lines.append(f"{where}: unknown key '{name}' in section '{section}'{hint}")
    problems.report()


def _describe(error: Any, layers: ConfigLayers) -> str:
    """Return one line for a pydantic error: origin, value found, values possible."""
    name = str(error["loc"][1]) if len(error["loc"]) > 1 else str(error["loc"][0])
    if error["type"] == "missing":
        return f"{name} is missing: pass --{name.replace('_', '-')} or a preset that has it"
    origin = layers.origin.get(name, "configuration")
    message = error["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
    return f"{origin}: {name} = {reprlib.repr(error['input'])}: {message}"
