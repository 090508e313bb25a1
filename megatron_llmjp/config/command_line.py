"""The command line of ``pretrain_gpt.py``, made from the schema.

Each field of each section is a flag; ``--help`` shows them by section with their defaults.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, get_args

from pydantic.fields import FieldInfo

from megatron_llmjp.config.load import Layers, build, changed, preset_names, read_config
from megatron_llmjp.config.megatron import explain, set_defaults, settle, with_dashes
from megatron_llmjp.config.megatron_flags import ALIASES, RENAMED, RENAMED_VALUES
from megatron_llmjp.config.rehearsal import REHEARSE
from megatron_llmjp.config.rehearsal import add_flags as add_rehearsal_flags
from megatron_llmjp.config.schema import SECTION_OF, SECTIONS, Config
from megatron_llmjp.errors import UserError

PLAN_DATA = "--plan-data"
"""The flag that prints the plan of the run's data instead of training."""

DRY_RUN = "--dry-run"
"""The flag that checks everything and prints the resolved configuration instead of training."""

DESCRIPTION = "Pretrain a GPT with tensor, pipeline and data parallelism on megatron-core."

EXAMPLES = """\
examples:
  four processes on this machine, TP2 x PP2:
    python pretrain_gpt.py --config laptop-llama --fold-file folds.yaml --nproc-per-node 4 \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --save checkpoints
  the same under torchrun, srun or mpirun, which start the processes themselves:
    torchrun --nproc-per-node 8 pretrain_gpt.py --config llm-jp-3-1.8b --fold-file folds.yaml ...
  go on from the newest checkpoint of a run, in another layout:
    python pretrain_gpt.py --config laptop-llama --fold-file folds.yaml --nproc-per-node 4 \\
        --pipeline-model-parallel-size 2 --save checkpoints
  check everything of a run of 512 processes, and see what its values are and where from:
    python pretrain_gpt.py --config llm-jp-3-172b --fold-file folds.yaml --world-size 512 \\
        --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer.model --dry-run

Values come from the preset, then the YAML file of --config, then the flags (docs/configuration.md).
Launch scripts of Megatron-LM and Megatron-DeepSpeed are understood: without --config, what is not
given has Megatron-LM's default. Exit codes: 0 done, 2 a mistake in the arguments or data, 3 stopped
on request with a checkpoint saved, 1 anything else.
"""


METAVARS = {
    "pipeline_model_parallel_layout": "LAYOUT",
    "split": "TRAIN,VALID,TEST",
    "skip_iterations": "A-B,C",
    "wandb_project": "NAME",
    "wandb_entity": "NAME",
    "wandb_exp_name": "NAME",
}
"""What stands for the value of a text that is no path."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Breaks lines between words only: a preset's name stays whole."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and end with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage, which would bury the message."""
        raise UserError(message)


def parse(
    argv: Sequence[str], layers: Layers | None = None
) -> tuple[Config, int | None, list[str]]:
    """Read the command line.

    Args:
        argv: the words behind the program's name.
        layers: values below those of presets, files and flags, which are added to it.

    Returns:
        The validated configuration; the number of local processes asked for, or None; and one
        line for each flag that was accepted without effect.

    Raises:
        UserError: unknown flag, unknown key or wrong value.
    """
    parser = _make_parser()
    known, unknown = parser.parse_known_args(with_dashes(argv))
    arguments = vars(known)
    explained = explain(unknown, _all_flags(parser))
    layers = layers if layers is not None else Layers()
    if arguments["config"] is not None:
        read_config(arguments["config"], layers)
    else:
        set_defaults(layers)
    for name, (value, origin) in {**_aliases(arguments), **explained.sets}.items():
        layers.set(name, value, origin)
    for name in SECTION_OF:
        if arguments.get(name) is not None:
            value = _renamed(name, arguments[name])
            layers.set(name, value, f"flag --{name.replace('_', '-')}")
    settle(layers, explained, by_flags_alone=arguments["config"] is None)
    config = build(layers)
    notes = explained.notes
    if config.checkpoint.load is not None and config.checkpoint.load == config.checkpoint.save:
        config = changed(config, load=None)  # Megatron's way to say: go on if there is something
    return config, _processes(arguments), notes


def _processes(arguments: dict[str, Any]) -> int | None:
    """Local processes to start; or those of the real run, when none is started."""
    local: int | None = arguments["nproc_per_node"]
    world_size: int | None = arguments["world_size"]
    if world_size is None:
        return local
    if not any(arguments[name] for name in ("dry_run", "rehearse", "suggest_layout")):
        raise UserError(
            f"--world-size goes with {DRY_RUN} and {REHEARSE}; real processes are started with "
            "--nproc-per-node, torchrun, srun or mpirun"
        )
    if world_size < 1:
        raise UserError(f"--world-size {world_size}: at least 1 process is needed")
    return world_size


def _aliases(arguments: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Fields that Megatron-LM's flags without a value set, in the order of the table."""
    found: dict[str, tuple[Any, str]] = {}
    for flag, alias in ALIASES.items():
        if arguments.get(flag):
            found |= {name: (value, f"flag {flag}") for name, value in alias.sets.items()}
    return found


def _renamed(name: str, value: Any) -> Any:
    return RENAMED_VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value


def flag_names() -> set[str]:
    """All flags that the command line knows itself: fields, their other names and aliases."""
    return set(_all_flags(_make_parser()))


def _make_parser() -> Parser:
    parser = Parser(
        prog="pretrain_gpt.py",
        usage="pretrain_gpt.py [--config PRESET|FILE] [--nproc-per-node N] [flags]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="PRESET|FILE",
        help=f"a YAML file or a preset: {', '.join(preset_names())}",
    )
    parser.add_argument(
        "--nproc-per-node",
        type=int,
        metavar="N",
        help="start N processes on this machine (not with torchrun, srun or mpirun)",
    )
    parser.add_argument(
        PLAN_DATA,
        action="store_true",
        help="print what is trained on when (folds, tokens, epochs, learning rate) and end",
    )
    parser.add_argument(
        DRY_RUN,
        action="store_true",
        help="check everything, print the resolved configuration and end",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help=f"with {DRY_RUN} and {REHEARSE}: the processes of the real run",
    )
    add_rehearsal_flags(parser)
    for name, section in SECTIONS.items():
        group = parser.add_argument_group(name, (section.__doc__ or "").strip())
        for field, info in section.model_fields.items():
            _add_field(group, field, info)
    aliases = parser.add_argument_group("other spellings of Megatron-LM")
    for flag, alias in ALIASES.items():
        aliases.add_argument(flag, action="store_true", dest=flag, help=alias.help)
    return parser


def _add_field(group: argparse._ArgumentGroup, name: str, info: FieldInfo) -> None:
    flags = [f"--{name.replace('_', '-')}"]
    flags += [flag for flag, field in RENAMED.items() if field == name]
    text = (info.description or "").replace("%", "%%")
    if info.annotation is bool:
        kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
    elif name == "override_resume":
        kind = {"nargs": "+", "metavar": "FIELD"}
    elif name.endswith("data_path"):
        kind = {"nargs": "+", "metavar": "PATH"}
    elif name == "rampup_batch_size":
        kind = {"nargs": 3, "metavar": ("START", "INCREMENT", "SAMPLES")}
    else:
        kind = {"metavar": _metavar(name, info)}
    if not info.is_required() and info.default not in (None, ()):
        text += f" (default: {info.default})"
    group.add_argument(*flags, dest=name, default=None, help=text, **kind)


def _metavar(name: str, info: FieldInfo) -> str:
    text = str(info.annotation)
    if "Literal" in text:
        literal = next((a for a in get_args(info.annotation) if "Literal" in str(a)), None)
        choices = get_args(literal or info.annotation)
        return "|".join(str(c) for c in choices if c is not None)
    return "N" if "int" in text else "X" if "float" in text else METAVARS.get(name, "PATH")


def _all_flags(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings]


def print_notes(notes: Iterable[str]) -> None:
    """Show the notes of :func:`parse` on standard error."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
