"""Tables of other programs' flags: other spellings, without effect, refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_llmjp.config.megatron_flags import (
    CHOICES,
    DEPENDENT_FLAGS,
    MEGATRON_DEFAULTS,
    RENAMED_FLAGS,
    RENAMED_VALUES,
    SWITCH_ALIASES,
)
from megatron_llmjp.config.refused_flags import FOREIGN, NEWER, REFUSED, REFUSED_FAMILIES
from megatron_llmjp.config.unused_flags import (
    NOT_NEEDED,
    NOT_NEEDED_FAMILIES,
    NOT_OFFERED,
    NOT_OFFERED_FAMILIES,
)
from tools.docs.reference.markdown import code, grouped, prose, table


def megatron_blocks() -> Iterator[str]:
    """Yield headings, paragraphs and tables."""
    yield from _spellings()
    yield from _choices()
    yield "## Megatron-LM's defaults"
    yield (
        "A command line that defines its model by flags, without `--config`, starts from these "
        "defaults of Megatron-LM. Others are the same."
    )
    yield table(
        ("key", "default"),
        ([code(key), code(_value(value))] for key, value in MEGATRON_DEFAULTS.items()),
    )
    yield "## Flags without effect"
    yield (
        "These flags of Megatron-LM and Megatron-DeepSpeed are accepted with a note at the start, "
        "because they are not needed."
    )
    yield _by_reason("reason", NOT_NEEDED, NOT_NEEDED_FAMILIES)
    yield "These are accepted with a note, too; what they offer is not available."
    yield _by_reason("instead", NOT_OFFERED, NOT_OFFERED_FAMILIES)
    yield "## Refused flags"
    yield "These flags of Megatron-LM and Megatron-DeepSpeed are errors, since they change the run."
    yield _by_reason("reason or remedy", REFUSED, REFUSED_FAMILIES)
    yield "Flags of newer releases of Megatron-LM are refused, with the release of megatron-core."
    yield _by_reason("megatron-core", NEWER, {})
    yield "## Flags of other programs"
    yield "These flags of Hugging Face Trainer, DeepSpeed, torchrun and others are refused."
    remedies = {flag: _without_question(text) for flag, text in FOREIGN.items()}
    yield _by_reason("instead", remedies, {})


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _without_question(text: str) -> str:
    return text.removeprefix("did you mean '").removesuffix("'?")


def _settings(sets: Mapping[str, Any]) -> str:
    return ", ".join(code(f"{key}: {_value(value)}") for key, value in sets.items())


def _spellings() -> Iterator[str]:
    """Yield Megatron-LM's names of flags and values."""
    yield "## Other spellings"
    yield "Flags of Megatron-LM and Megatron-DeepSpeed that set fields of another name."
    rows = [(code(flag), code(name)) for flag, name in RENAMED_FLAGS.items()]
    rows += [(code(flag), _settings(alias.sets)) for flag, alias in SWITCH_ALIASES.items()]
    rows += [(code(flag), prose(effect)) for flag, effect in DEPENDENT_FLAGS.items()]
    yield table(("flag", "sets"), rows)
    yield "Values in other programs' spelling."
    yield table(
        ("key", "value", "means"),
        (
            (code(key), code(other), code(ours))
            for key, values in RENAMED_VALUES.items()
            for other, ours in values.items()
        ),
    )


def _choices() -> Iterator[str]:
    """Yield the flags that accept some values only."""
    yield "## Flags with restricted values"
    yield "Other values of these flags are refused."
    rows = []
    for flag, choice in CHOICES.items():
        for value, effect in choice.values.items():
            shown = _settings(effect) if isinstance(effect, dict) else f"no effect: {prose(effect)}"
            rows.append((code(f"{flag} {value}"), shown, prose(choice.otherwise)))
    yield table(("flag", "sets", "instead of other values"), rows)


def _by_reason(title: str, flags: Mapping[str, str], families: Mapping[str, str]) -> str:
    """Return a table with one row per reason; ``*`` stands for any end of a flag's name."""
    every = {**flags, **{f"{start}*": why for start, why in families.items()}}
    return table(
        (title, "flags"),
        ([prose(why), " ".join(map(code, names))] for why, names in grouped(every).items()),
    )
