"""megatron_llmjp: 3D-parallel pretraining on megatron-core, from raw text to a published model."""

import warnings

from megatron_llmjp.transformer_engine_import import check_before_megatron_core

__version__ = "0.1.0"

# Warnings of megatron-core 0.16 that a user cannot act on: optional packages that are absent (the
# start of a run prints which kernels it uses), the default of an option that is not used here, and
# a hint about recomputation.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "absl.logging is not installed",
    "full scope is deprecated",
    "If you are using transformer_engine as the transformer implementation",
):
    warnings.filterwarnings("ignore", _message, UserWarning, r"megatron\.core\.")

check_before_megatron_core()

_PUBLIC = {
    **dict.fromkeys(("Dataset", "load_tokenizer", "open_dataset"), "datasets"),
    **dict.fromkeys(("FoldSchedule", "Sample", "open_schedule"), "schedules"),
    **dict.fromkeys(("Run", "open_run"), "runs"),
    **dict.fromkeys(("Metrics", "read_metrics"), "metrics"),
    **dict.fromkeys(("Model", "load_model"), "models"),
    **dict.fromkeys(("Estimate", "estimate_run", "load_config"), "estimates"),
    **dict.fromkeys(("Converted", "convert_checkpoint"), "conversion"),
    **dict.fromkeys(
        ("DatasetError", "NotInstalledError", "OperationError", "OutOfRangeError", "UserError"),
        "errors",
    ),
}
"""Names of the Python interface, and their modules in ``megatron_llmjp.api``. None is the name of a
subpackage, whose import would replace it."""


def __getattr__(name: str) -> object:
    """Import a name of the Python interface at its first use; types are in ``__init__.pyi``."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.api.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the names of the Python interface."""
    return sorted([*_PUBLIC, "__version__"])
