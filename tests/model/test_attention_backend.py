"""Attention kernels that the environment allows, against megatron-core's own check of them."""

from __future__ import annotations

import os
from itertools import product
from types import SimpleNamespace

import pytest
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import AttnBackend

from megatron_llmjp.errors import UserError
from megatron_llmjp.model.attention_backend import attention_backend

NAMES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
OFFERED = (AttnBackend.auto, AttnBackend.flash, AttnBackend.fused, AttnBackend.unfused)


def core_accepts(backend: AttnBackend, env: dict[str, str], monkeypatch) -> bool:
    monkeypatch.setattr(os, "environ", dict(env))
    model = SimpleNamespace(config=SimpleNamespace(attention_backend=backend))
    try:
        LanguageModule._set_attention_backend(model)
    except AssertionError:
        return False
    return True


def test_megatron_core_accepts_the_choice_for_every_environment(monkeypatch):
    refused = 0
    for values in product((None, "0", "1"), repeat=3):
        env = {name: value for name, value in zip(NAMES, values, strict=True) if value}
        accepted = [backend for backend in OFFERED if core_accepts(backend, env, monkeypatch)]
        if accepted:
            assert attention_backend(env) == accepted[0], env
        else:
            refused += 1
            with pytest.raises(UserError, match="supports one kernel or all of them"):
                attention_backend(env)
    assert refused == 4  # two kernels of three, or none


def test_published_settings():
    assert attention_backend({}) == AttnBackend.auto
    assert attention_backend({"NVTE_FUSED_ATTN": "0"}) == AttnBackend.flash
    assert attention_backend({"NVTE_FLASH_ATTN": "0"}) == AttnBackend.fused
