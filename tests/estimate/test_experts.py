"""Experts in estimates, compared with real steps on a CPU and with closed forms."""

from __future__ import annotations

import json
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_llmjp.config.loading import replace_fields
from megatron_llmjp.config.machine_flags import PlannedMachine
from megatron_llmjp.config.validation import check_config
from megatron_llmjp.errors import UserError
from megatron_llmjp.estimate.communication import communication_volume
from megatron_llmjp.estimate.estimate_numbers import estimate_numbers
from megatron_llmjp.estimate.estimate_report import format_estimate
from megatron_llmjp.estimate.expert_memory import expert_memory
from megatron_llmjp.estimate.experts import expert_load, expert_traffic
from megatron_llmjp.estimate.layout import make_layout
from megatron_llmjp.estimate.run_estimate import estimate_run
from megatron_llmjp.estimate.search import layout_search
from megatron_llmjp.estimate.search.expert_candidates import expert_sizes
from megatron_llmjp.estimate.search.layout_search import search_layouts
from megatron_llmjp.estimate.search.layout_table import format_candidates, layout_flags
from megatron_llmjp.estimate.speed.step_work import Software, layer_work, matrix_product
from tests.estimate.test_communication import count_all
from tests.estimate.test_flops import preset
from tests.estimate.test_memory import FULL, PP, TP, check, compare, make, measure
from tests.support.processes import run_ranks

EP, SP = {"expert_model_parallel_size": 2}, {"sequence_parallel": True}
ZERO, BF16 = {"use_distributed_optimizer": True}, {"bf16": True}
ALL_TO_ALL = {"moe_token_dispatcher_type": "alltoall"}
SMALL = {"num_layers": 4, "vocab_size": 500, "moe_ffn_hidden_size": 96, "moe_router_topk": 2}
BALANCED = {**SMALL, "num_moe_experts": 2, "moe_aux_loss_coeff": 0.01}
"""All tokens are the same: both experts are chosen by all."""
PADDED = {
    **SMALL, **ALL_TO_ALL, "num_moe_experts": 8, "moe_expert_capacity_factor": 1.0,
    "moe_pad_expert_input_to_capacity": True,
}  # fmt: skip
MIXED = {"moe_layer_freq": (0, 1, 1, 0), "moe_shared_expert_intermediate_size": 64}
MODULES = {"recompute_modules": ("moe",)}
ALONE: list[tuple[str, dict[str, Any]]] = [
    ("laptop-llama", {**BALANCED, **BF16, "moe_router_dtype": "fp32", "moe_z_loss_coeff": 1e-3}),
    ("laptop-llama", {**BALANCED, **MIXED, "qk_layernorm": True}),
    ("laptop-llama", {**BALANCED, **ALL_TO_ALL, **FULL}),
    ("laptop-llama", {**BALANCED, "recompute_granularity": "selective", **MODULES}),
    ("laptop-llama", {**PADDED, **BF16, "moe_router_score_function": "sigmoid"}),
]
IN_PAIRS: list[tuple[str, dict[str, Any]]] = [
    ("laptop-llama", {**BALANCED, **EP, **ALL_TO_ALL, **ZERO, **BF16}),
    ("laptop-llama", {**BALANCED, **EP}),
    ("laptop-llama", {**PADDED, **ZERO}),
    ("laptop-llama", {**PADDED, **EP, **MIXED, **FULL}),
    ("laptop-llama", {**BALANCED, **TP, **SP, **ZERO}),
    ("laptop-llama", {**PADDED, **TP, **SP, **EP, "expert_tensor_parallel_size": 1}),
    ("laptop-llama", {**BALANCED, **PP, "moe_layer_freq": (0, 1, 1, 1), "global_batch_size": 32}),
]


def measure_and_count(cases: list[tuple[str, dict[str, Any]]], folder: str) -> list[Any]:
    """Return the memory and the sent bytes of each case."""
    Path(folder, "sent").mkdir(exist_ok=True)
    return [measure(cases, folder), count_all(cases, str(Path(folder, "sent")))]


def test_memory_of_one_process(tmp_path):
    compare(ALONE, 1, tmp_path, 0.05)


def test_memory_and_bytes_of_two_processes(tmp_path):
    """The parameters and optimizer state of experts are divided otherwise than dense ones.

    The numbers of tokens per expert and the sums of the load balancing loss, which are also sent,
    are not estimated.
    """
    found = run_ranks(measure_and_count, 2, IN_PAIRS, str(tmp_path))
    check(IN_PAIRS, [memory for memory, _ in found], 2, 0.1)
    for number, (name, values) in enumerate(IN_PAIRS):
        config = make(name, values)
        layout = make_layout(config, 2)
        for rank in range(2):
            sent = found[rank][1][number]
            expected = communication_volume(config, layout, rank * layout.pp // 2, False)
            message = f"{values} {sent} {expected}"
            assert sum(sent.values()) == pytest.approx(sum(astuple(expected)), rel=0.01), message


def test_published_model():
    """llm-jp-4 32b-a3b on 64 GPUs with EP 4 and micro-batches of 8,192 tokens."""
    config = preset("llm-jp-4-32b-a3b")
    layout = make_layout(config, 64)
    experts = 32 * 128 * 3 * 2560 * 960
    found = expert_memory(config, layout, 0)
    assert (layout.copies, layout.expert_copies) == (64, 16)
    assert found.parameters == experts // 4
    assert (found.weights, found.gradients) == (experts // 2, experts)
    assert found.optimizer == 12 * experts // 4 // 16
    load = expert_load(config, layout)
    assert (load.tokens, load.sent, load.rows, load.local_experts) == (8192, 65536, 65536, 32)
    # Three quarters of the rows leave the rank, with a probability in fp32, and return.
    sent = 65536 * 3 // 4 * (2 * 2560 * 2 + 4)
    traffic = expert_traffic(config, layout)
    assert (traffic.forward, traffic.backward) == (sent, sent)
    volume = communication_volume(config, layout, 0)
    assert volume.experts == 8 * 32 * 2 * sent
    assert volume.expert_gradients == 4 * (experts // 4) * 15 // 16
    assert volume.gradients == 4 * (32_139_028_992 - experts) * 63 // 64
    for recompute in (FULL, {"recompute_granularity": "selective", **MODULES}):
        recomputed = replace_fields(config, **recompute)
        assert communication_volume(recomputed, layout, 0).experts == 8 * 32 * 3 * sent


def test_traffic_of_gathered_tokens():
    """All ranks gather tokens, probabilities and routing map; fp32 sums return."""
    config = preset("llm-jp-4-32b-a3b", moe_token_dispatcher_type="allgather")
    found = expert_traffic(config, make_layout(config, 64))
    backward = 3 * 8192 * (2560 * (2 + 4) + 128 * 4)
    assert (found.forward, found.backward) == (backward + 3 * 8192 * 128, backward)


@pytest.mark.parametrize(("padded", "rows"), [(True, 81920), (False, 65536)])
def test_capacity(padded, rows):
    values = {"moe_expert_capacity_factor": 1.25, "moe_pad_expert_input_to_capacity": padded}
    config = preset("llm-jp-4-32b-a3b", **values)
    assert expert_load(config, make_layout(config, 64)).rows == rows


def test_products_of_experts():
    """Each of 32 experts multiplies 2,048 rows, with matrices of its own."""
    config = preset("llm-jp-4-32b-a3b")
    work = layer_work(config, make_layout(config, 64), Software(), experts=True)
    up, down = matrix_product(2048, 1920, 2560, 2), matrix_product(2048, 2560, 960, 2)
    assert work.expert_products.forward == (up + down) * 32
    assert work.expert_products.backward.flops == 2 * (up + down).flops * 32
    # Attention, and a router over 8,192 tokens; no dense feed-forward layer.
    weights = 2560 * (2 * 5120 + 2 * 512) + 2560 * 128
    assert work.products.forward.flops == 2 * 8192 * weights


def test_step_time_depends_on_the_place_of_the_experts():
    """Within a node the exchange uses its links; 32 ranks exceed one; no error is claimed."""
    times = {}
    for ep in (4, 8, 32):
        config = preset("llm-jp-4-32b-a3b", expert_model_parallel_size=ep)
        found = estimate_run(config, PlannedMachine(64, "H200"))
        assert found.step_time is not None and found.accuracy is None
        assert found.error_range == (1.0, 1.0)
        times[ep] = found.step_time.experts
    assert times[8] / times[4] == pytest.approx((7 / 8) / (3 / 4))
    assert times[32] > 5 * times[8]


def test_report_and_numbers():
    config = preset("llm-jp-4-32b-a3b")
    estimate = estimate_run(config, PlannedMachine(64, "H200"))
    text, numbers = format_estimate(estimate), json.loads(json.dumps(estimate_numbers(estimate)))
    for part in (
        "32,139,028,992 parameters", "3,827,476,992 parameters are active", "EP 4",
        "32 of 128 experts", "experts (within a node)", "its error is unknown",
    ):  # fmt: skip
        assert part in text
    assert "80% of" not in text
    assert numbers["parameters"]["active"] == 3_827_476_992 and numbers["accuracy"] is None
    experts = numbers["experts"]
    assert experts["stages"][0]["parameters"] == 7_549_747_200
    assert experts["sent_per_layer"]["forward"] == 65536 * 3 // 4 * 10244
    dense = replace(estimate, config=preset("llm-jp-3-1.8b"))
    assert estimate_numbers(dense)["experts"] is None


def test_indivisible_ranks():
    config = preset("llm-jp-4-32b-a3b", expert_model_parallel_size=16)
    with pytest.raises(UserError, match="not divisible by expert_model_parallel_size 16"):
        make_layout(config, 8)


def test_searched_layouts(monkeypatch):
    """Sizes of experts follow megatron-core's rules, and the flags select the fastest layout."""
    config = preset("llm-jp-4-32b-a3b")
    assert set(expert_sizes(config, 1, 64)) == {(2**i, 1) for i in range(7)}
    assert set(expert_sizes(config, 4, 8)) == {(2, 1), (4, 1), (8, 1), (1, 4), (2, 4)}
    monkeypatch.setattr(layout_search, "REFINED", 2)
    machine = PlannedMachine(32, "H200")
    found = search_layouts(config, machine)
    layouts = [candidate.estimate.layout for candidate in found]
    assert len({layout.ep for layout in layouts}) > 2 and {1} < {layout.etp for layout in layouts}
    assert any(candidate.given for candidate in found)
    for candidate in found:
        check_config(candidate.estimate.config, 32)
        assert candidate.estimate.memory_fraction <= 1.0
    best = layouts[0]
    flags = layout_flags(found[0].estimate.config, config)
    assert f"--expert-model-parallel-size {best.ep} " in flags
    text = format_candidates(config, machine, found)
    assert "EP comm" in text and "its error is unknown" in text
    assert "EP comm" not in format_candidates(preset("llm-jp-3-1.8b"), machine, found[:1])
