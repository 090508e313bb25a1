"""Allow-list of the keys of ``config.json``.

Source: ``PretrainedConfig`` of transformers 4.35 to 5 (configuration_utils.py), which stores the
settings of text generation too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megatron_llmjp.errors import UserError

_COMMON = """
_attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation auto_map
bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward decoder_start_token_id
diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
initializer_range is_decoder label2id length_penalty max_length min_length model_type name_or_path
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads
remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
suppress_tokens task_specific_params temperature tf_legacy_loss tie_word_embeddings
tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16
use_cache vocab_size
"""

COMMON_KEYS = frozenset(_COMMON.split())
"""Keys of any architecture that are read, or do not change the outputs of the model."""


def refuse_unknown_keys(config: dict[str, Any], known: Collection[str], where: str) -> None:
    """Refuse keys that may change the network in a way that the converter does not know.

    Args:
        config: the content of config.json.
        known: the keys of the architecture, in addition to :data:`COMMON_KEYS`.
        where: the file, for messages.

    Raises:
        UserError: a key is not known, and is neither null, false, 0 nor empty.
    """
    unknown = sorted(key for key in config.keys() - COMMON_KEYS - set(known) if config[key])
    if unknown:
        shown = ", ".join(f"{key} = {config[key]!r:.60}" for key in unknown)
        raise UserError(
            f"{where}: unknown: {shown}; if a key does not change the outputs of the model, remove "
            "it from the file"
        )
