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
