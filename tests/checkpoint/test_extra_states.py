"""Empty extra states are accepted by name; everything else that differs is refused."""

from __future__ import annotations

import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_llmjp.checkpoint import safe_unpickling
from megatron_llmjp.checkpoint.extra_states import (
    is_extra_state,
    load_weights,
    remove_extra_states,
)
from megatron_llmjp.errors import UserError

FINAL = "decoder.final_layernorm._extra_state"
STORED = "decoder.layers.self_attention.linear_qkv._extra_state/shard_0.3_2.4"


@pytest.mark.parametrize("key", [FINAL, STORED, f"{FINAL}/shard_0_1", "_extra_state"])
def test_names_of_extra_states(key):
    assert is_extra_state(key)


@pytest.mark.parametrize(
    "key", ["my_extra_state", f"{FINAL}.weight", f"{FINAL}_1", "rng_state/shard_0_1", "weight"]
)
def test_other_names(key):
    assert not is_extra_state(key)


def test_empty_ones_are_removed_and_others_refused():
    empty = [None, torch.empty(0, dtype=torch.uint8)]
    for value in empty:
        sharded = {FINAL: SimpleNamespace(data=value), "weight": 1}
        remove_extra_states(sharded)
        assert sharded == {"weight": 1}
    for value in (torch.ones(3, dtype=torch.uint8), {"scale_fwd": 1}):
        with pytest.raises(UserError, match=rf"{FINAL} is not empty: .*fp8 training"):
            remove_extra_states({FINAL: SimpleNamespace(data=value)})


@pytest.mark.parametrize(
    ("value", "is_refused"),
    [(None, False), (torch.empty(0, dtype=torch.uint8), False), (torch.ones(2), True)],
)
def test_a_checkpoint_with_scales_of_fp8_is_refused(tmp_path, value, is_refused):
    saved = io.BytesIO()
    torch.save(value, saved)
    (tmp_path / "__0_0.distcp").write_bytes(saved.getvalue())
    torch.save({}, tmp_path / "common.pt")
    place = {MetadataIndex(STORED): _StorageInfo("__0_0.distcp", 0, len(saved.getvalue()))}
    index = Metadata({STORED: BytesStorageMetadata()}, storage_data=place)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    if is_refused:
        with pytest.raises(UserError, match=r"linear_qkv\._extra_state.* is not empty"):
            safe_unpickling.check_pickles(tmp_path)
    else:
        safe_unpickling.check_pickles(tmp_path)


class Stateful(torch.nn.Linear):
    def get_extra_state(self):
        return None

    def set_extra_state(self, state):
        raise AssertionError("not in the checkpoint")


def test_only_extra_states_may_be_missing():
    layer = Stateful(2, 2)
    weights = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    load_weights(layer, weights)
    assert torch.equal(layer.bias, weights["bias"])
    with pytest.raises(RuntimeError, match=r"missing \['bias'\], unexpected \[\]"):
        load_weights(layer, {"weight": torch.ones(2, 2)})
    with pytest.raises(RuntimeError, match=r"unexpected \['other'\]"):
        load_weights(layer, {**weights, "other": torch.ones(2)})
