"""Command line of ``pretrain_gpt.py``, generated from the configuration schema.

Each field of each section is a flag; ``--help`` lists them by section with their defaults.
:func:`parse` returns the typed result, a :class:`Command`.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args

from pydantic.fields import FieldInfo

from megatron_llmjp.arguments import normalize_dashes
from megatron_llmjp.completion import add_completion_flag
from megatron_llmjp.config.loading import (
    ConfigLayers,
    build_config,
    preset_names,
    read_config,
    replace_fields,
)
from megatron_llmjp.config.machine_flags import (
    PlannedMachine,
    add_machine_flags,
    machine_flags,
    planned_machine,
    planned_processes,
)
from megatron_llmjp.config.megatron_flags import (
    RENAMED_FLAGS,
    RENAMED_VALUE_NOTES,
    RENAMED_VALUES,
    SWITCH_ALIASES,
    apply_dependent_flags,
    interpret_flags,
    set_megatron_defaults,
)
from megatron_llmjp.config.schema import SECTION_OF, SECTIONS, Config
from megatron_llmjp.errors import ErrorCollector, UserError
from megatron_llmjp.versions import add_version_flag

DESCRIPTION = "Pretrain a GPT model with tensor, pipeline and data parallelism on megatron-core."
EXAMPLES = """\
examples:
  four processes on this machine, TP2 x PP2:
    python pretrain_gpt.py --config laptop-llama --fold-file folds.yaml --nproc-per-node 4 \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --save checkpoints
  under torchrun, srun or mpirun, which start the processes:
    torchrun --nproc-per-node 8 pretrain_gpt.py --config llm-jp-3-1.8b --fold-file folds.yaml ...
  resume from the newest checkpoint of a run, in another layout:
    python pretrain_gpt.py --config laptop-llama --fold-file folds.yaml --nproc-per-node 4 \\
        --pipeline-model-parallel-size 2 --save checkpoints
  check a run of 512 processes, and print its configuration with the origin of each value:
    python pretrain_gpt.py --config llm-jp-3-172b --fold-file folds.yaml --world-size 512 \\
        --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer.model --dry-run

Flags override the YAML file of --config, which overrides its preset (docs/configuration.md).
Arguments of Megatron-LM and Megatron-DeepSpeed are accepted; without --config, Megatron-LM's
defaults apply. Exit codes: 0 finished, 2 error in the arguments or data, 3 stopped on request with
a checkpoint saved, 1 any other failure.
"""
METAVARS = {
    "pipeline_model_parallel_layout": "LAYOUT",
    "split": "TRAIN,VALID,TEST",
    "skip_iterations": "A-B,C",
    "wandb_project": "NAME",
    "wandb_entity": "NAME",
    "wandb_exp_name": "NAME",
    "alert_webhook": "URL",
    "alert_command": "COMMAND",
}
"""Placeholders in ``--help`` for the values of text fields that are not paths."""

LIST_METAVARS = {
    "override_resume": "FIELD",
    "tiktoken_special_tokens": "TOKEN",
    "profile_ranks": "RANK",
    "recompute_modules": "MODULE",
}
"""Placeholders of fields with any number of values, other than paths."""


class Mode(Enum):
    """Modes of ``pretrain_gpt.py``; the value is the flag that selects the mode."""

    TRAIN = ""
    DRY_RUN = "--dry-run"
    PLAN_DATA = "--plan-data"
    ESTIMATE = "--estimate"
    SUGGEST_LAYOUT = "--suggest-layout"


MODE_HELP: dict[Mode, str] = {
    Mode.DRY_RUN: "run all checks, print the resolved configuration and exit",
    Mode.PLAN_DATA: "print the data plan (folds, tokens, epochs, learning rates) and exit",
    Mode.ESTIMATE: "print the layout, memory, communication, time and warnings of a run on "
    "--world-size GPUs and exit; exit code 2 if it cannot run or does not fit",
    Mode.SUGGEST_LAYOUT: "print the best layouts of the model on --world-size GPUs and exit; "
    "global batch size and sequence length are not changed",
}
"""Help texts of the modes that do not train."""

MODE_ALIASES = {Mode.ESTIMATE: ("--rehearse",)}
"""Former names of flags, accepted for one more release."""


class Command(NamedTuple):
    """A parsed command line; the only place where the arguments are parsed."""

    config: Config
    """Validated; not yet resolved against data, tokenizer and checkpoint."""
    mode: Mode
    processes: int | None
    """Number of processes to start on this machine, or of the planned run in a mode that does not
    train. None if not given."""
    machine: PlannedMachine | None
    """The machine of the run; only with :attr:`Mode.ESTIMATE` and :attr:`Mode.SUGGEST_LAYOUT`."""
    config_name: str | None
    """The preset or file of ``--config``."""
    notes: tuple[str, ...]
    """One line for each flag that is accepted without effect."""
    origin: Mapping[str, str]
    """Origin of each value by field: a preset, file or flag."""
    as_json: bool = False
    """Whether an estimate is printed as JSON."""


def add_mode_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the modes that do not train."""
    group = parser.add_argument_group("modes that do not train")
    for mode, text in MODE_HELP.items():
        names = (mode.value, *MODE_ALIASES.get(mode, ()))
        group.add_argument(*names, action="store_true", dest=mode.value, help=text)
    group.add_argument(
        "--json",
        action="store_true",
        help=f"with {Mode.ESTIMATE.value} or {Mode.SUGGEST_LAYOUT.value}: print every number as "
        "one JSON object",
    )


def mode_of(arguments: Mapping[str, Any]) -> Mode:
    """Return the mode that the arguments select.

    Raises:
        UserError: they select more than one.
    """
    given = [mode for mode in MODE_HELP if arguments[mode.value]]
    if len(given) > 1:
        flags = " and ".join(mode.value for mode in given)
        raise UserError(f"{flags} are mutually exclusive: pass one of them")
    return given[0] if given else Mode.TRAIN


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help formatter that does not break lines at hyphens, as in names of presets."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def parse(
    argv: Sequence[str],
    layers: ConfigLayers | None = None,
    add_stored_config: Callable[[Path, ConfigLayers, str | None], bool] | None = None,
) -> Command:
    """Parse the command line.

    Args:
        argv: the arguments without the program's name; ``--some_flag`` equals ``--some-flag``.
        layers: values with a lower priority than presets, files and flags, which are added to it.
        add_stored_config: adds the configuration that the checkpoint of a folder stores, for the
            given type of tokenizer, and returns whether there is one; called if neither
            ``--config`` nor a flag gives a model.

    Raises:
        UserError: every unknown flag or key, invalid value and contradiction, one per line.
    """
    parser = _make_parser()
    problems = ErrorCollector()
    known, unknown = _parse_known(parser, normalize_dashes(argv), problems)
    arguments = vars(known)
    foreign = interpret_flags(unknown, flag_names())
    problems.lines += foreign.problems
    mode, machine, processes = Mode.TRAIN, None, None
    with problems.collect():
        mode = mode_of(arguments)
        processes = _processes(arguments, mode)
        machine = _target_machine(arguments, mode, processes)
    if arguments["json"] and mode not in (Mode.ESTIMATE, Mode.SUGGEST_LAYOUT):
        problems.lines.append(
            f"--json requires {Mode.ESTIMATE.value} or {Mode.SUGGEST_LAYOUT.value}"
        )
    if arguments["scaling"] and mode is Mode.ESTIMATE:
        problems.lines.append(f"--scaling requires {Mode.SUGGEST_LAYOUT.value}")
    layers = layers if layers is not None else ConfigLayers()
    by_flags_alone = False
    folder = _folder(arguments)
    tokenizer_type = _renamed("tokenizer_type", arguments["tokenizer_type"])
    if arguments["num_layers"] is not None or not folder.parts:
        add_stored_config = None
    with problems.collect():
        if arguments["config"] is not None:
            read_config(arguments["config"], layers)
        elif not (add_stored_config and add_stored_config(folder, layers, tokenizer_type)):
            set_megatron_defaults(layers)
            by_flags_alone = True
        for name, (value, origin) in {**_aliases(arguments), **foreign.sets}.items():
            layers.set(name, value, origin)
        for name in SECTION_OF:
            if arguments.get(name) is not None:
                value = None if _unsets(name, arguments[name]) else _renamed(name, arguments[name])
                layers.set(name, value, f"flag --{name.replace('_', '-')}")
        _shorten_default_warmup(layers)
        apply_dependent_flags(layers, foreign, by_flags_alone)
        config = build_config(layers, may_be_missing=bool(problems.lines))
    problems.report()
    if config.checkpoint.load is not None and config.checkpoint.load == config.checkpoint.save:
        # In Megatron-LM's scripts: resume if there is a checkpoint.
        config = replace_fields(config, load=None)
    notes = (*foreign.notes, *_replaced(arguments), *_unused(arguments, mode))
    name, as_json = arguments["config"], arguments["json"]
    return Command(config, mode, processes, machine, name, notes, layers.origin, as_json)


def _folder(arguments: dict[str, Any]) -> Path:
    """Return the checkpoint folder that the arguments name; an empty path if none."""
    return Path(arguments["load"] or arguments["save"] or "")


def _shorten_default_warmup(layers: ConfigLayers) -> None:
    """Allow the warm-up of a preset or file to be shortened to the length of the run."""
    names = ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_tokens")
    origins = [layers.origin[name] for name in names if name in layers.origin]
    is_flag = any(origin.startswith("flag ") for origin in origins)
    if origins and not is_flag and "lr_warmup_shorten" not in layers.origin:
        layers.set("lr_warmup_shorten", True, origins[0])


def _parse_known(
    parser: argparse.ArgumentParser, words: Sequence[str], problems: ErrorCollector
) -> tuple[argparse.Namespace, list[str]]:
    """Parse the known flags; those with an invalid value are recorded and removed."""
    words = list(words)
    while True:
        try:
            return parser.parse_known_args(words)
        except argparse.ArgumentError as error:
            problems.lines.append(str(error))
            flags = (error.argument_name or "").split("/")
            first = next(n for n, word in enumerate(words) if word.partition("=")[0] in flags)
            rest = (n for n, word in enumerate(words) if n > first and word.startswith("--"))
            del words[first : next(rest, len(words))]


def _processes(arguments: dict[str, Any], mode: Mode) -> int | None:
    """Return the number of local processes to start, or of the planned run."""
    local: int | None = arguments["nproc_per_node"]
    planned = planned_processes(arguments)
    if local is not None and local < 1:
        raise UserError(f"--nproc-per-node {local}: at least 1 process is needed")
    flags = machine_flags(arguments)
    if mode is Mode.TRAIN and planned is not None:
        raise UserError(
            f"--world-size requires {Mode.DRY_RUN.value} or {Mode.ESTIMATE.value}; processes "
            "are started with --nproc-per-node, torchrun, srun or mpirun"
        )
    if mode is Mode.TRAIN and flags:
        raise UserError(
            f"{', '.join(flags)} describe the machine of a planned run: add "
            f"{Mode.ESTIMATE.value} or {Mode.SUGGEST_LAYOUT.value}, or remove them"
        )
    return local if planned is None else planned


def _target_machine(
    arguments: dict[str, Any], mode: Mode, processes: int | None
) -> PlannedMachine | None:
    if mode not in (Mode.ESTIMATE, Mode.SUGGEST_LAYOUT):
        return None
    return planned_machine(arguments, mode.value, processes)


def _unused(arguments: dict[str, Any], mode: Mode) -> list[str]:
    """Return notes on machine flags in a mode that does not use them."""
    flags = machine_flags(arguments) if mode in (Mode.DRY_RUN, Mode.PLAN_DATA) else []
    return [f"{flag} has no effect with {mode.value}" for flag in flags]


def _replaced(arguments: dict[str, Any]) -> list[str]:
    """Return notes on values that are replaced by others with the same result."""
    return [
        f"--{name.replace('_', '-')} {value}: {note}"
        for name, values in RENAMED_VALUE_NOTES.items()
        for value, note in values.items()
        if arguments[name] == value
    ]


def _aliases(arguments: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Return the fields that Megatron-LM's switches set, in the order of the table."""
    found: dict[str, tuple[Any, str]] = {}
    for flag, alias in SWITCH_ALIASES.items():
        if arguments.get(flag):
            found |= {name: (value, f"flag {flag}") for name, value in alias.sets.items()}
    return found


def _renamed(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return RENAMED_VALUES.get(name, {}).get(value.lower(), value)


def _unsets(name: str, value: Any) -> bool:
    """Return whether a value is ``none``, which unsets an optional number, choice or layout."""
    if value != "none":
        return False
    section = SECTION_OF[name]
    types = get_args(SECTIONS[section].model_fields[name].annotation)
    return NoneType in types and (section == "parallel" or str not in types)


@cache
def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pretrain_gpt.py",
        usage="pretrain_gpt.py [--config PRESET|FILE] [--nproc-per-node N] [flags]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    add_version_flag(parser)
    add_completion_flag(parser)
    parser.add_argument(
        "--config",
        metavar="PRESET|FILE",
        help=f"YAML file or preset: {', '.join(preset_names())}",
    )
    parser.add_argument(
        "--nproc-per-node",
        type=int,
        metavar="N",
        help="start N processes on this machine (not with torchrun, srun or mpirun)",
    )
    add_mode_flags(parser)
    add_machine_flags(parser)
    for name, section in SECTIONS.items():
        group = parser.add_argument_group(name, (section.__doc__ or "").strip())
        for field, info in section.model_fields.items():
            _add_field(group, field, info)
    aliases = parser.add_argument_group("further flags of Megatron-LM")
    for flag, alias in SWITCH_ALIASES.items():
        aliases.add_argument(flag, action="store_true", dest=flag, help=alias.help)
    return parser


def _add_field(group: argparse._ArgumentGroup, name: str, info: FieldInfo) -> None:
    flags = [f"--{name.replace('_', '-')}"]
    flags += [flag for flag, field in RENAMED_FLAGS.items() if field == name]
    text = (info.description or "").replace("%", "%%")
    if info.annotation is bool:
        kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    elif name in LIST_METAVARS:
        kind = {"nargs": "+", "metavar": LIST_METAVARS[name]}
    elif name.endswith("data_path"):
        kind = {"nargs": "+", "metavar": "PATH"}
    elif name == "rampup_batch_size":
        kind = {"nargs": 3, "metavar": ("START", "INCREMENT", "SAMPLES")}
    else:
        kind = {"metavar": _metavar(name, info)}
    if not info.is_required() and info.default not in (None, ()):
        default = info.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text += f" (default: {shown})"
    group.add_argument(*flags, dest=name, default=None, help=text, **kind)


def _metavar(name: str, info: FieldInfo) -> str:
    text = str(info.annotation)
    if "Literal" in text:
        literal = next((a for a in get_args(info.annotation) if "Literal" in str(a)), None)
        choices = get_args(literal or info.annotation)
        return "|".join(str(c) for c in choices if c is not None)
    return "N" if "int" in text else "X" if "float" in text else METAVARS.get(name, "PATH")


def flag_names() -> list[str]:
    """Return all flags of the parser: fields, their other names and aliases."""
    return [flag for action in _make_parser()._actions for flag in action.option_strings]


def print_notes(notes: Iterable[str]) -> None:
    """Print the notes of a :class:`Command` on standard error."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
