"""Tokens of each expert in the report, from a file that may be damaged."""

from __future__ import annotations

import json
import re

import pytest

from megatron_llmjp.report.charts.expert_tokens import expert_tables, read_expert_tokens

COUNTS = {"2": [0, 10, 20, 50], "4": [20, 20, 20, 20]}


def write(folder, content):
    (folder / "expert_tokens.json").write_text(content)
    return folder


def test_section(tmp_path):
    file = {"iteration": 1200, "consumed samples": 4800, "tokens": COUNTS}
    [section] = expert_tables(write(tmp_path, json.dumps(file)))
    cells = re.findall(r'<rect x="(\d)" y="(\d+)" .*?fill-opacity="([\d.]+)"', section)
    shades = {(int(x), int(y)): float(opacity) for x, y, opacity in cells}
    # Half of the colour is the mean of a layer; more than twice the mean is not darker.
    assert shades == {
        (0, 0): 0.0, (1, 0): 0.25, (2, 0): 0.5, (3, 0): 1.0,
        (0, 12): 0.5, (1, 12): 0.5, (2, 12): 0.5, (3, 12): 0.5,
    }  # fmt: skip
    rows = re.findall(r"<td>(.*?)</td>", section)
    assert rows == ["layer 2", "80", "20", "0.00", "2.50", "1",
                    "layer 4", "80", "20", "1.00", "1.00", "0"]  # fmt: skip
    assert "to iteration 1,200" in section


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"iteration": 3, "tokens": {"1": [1, 2',
        '{"iteration": 3, "tokens": {}}',
        '{"iteration": 3, "tokens": {"1": []}}',
        '{"iteration": 3, "tokens": {"1": [1, -2]}}',
        '{"iteration": 3, "tokens": {"<script>": [1]}}',
        '{"iteration": "3", "tokens": {"1": [1]}}',
        '{"iteration": 3, "tokens": {"1": [true]}}',
        "[1]",
    ],
)
def test_damaged_files_have_no_section(tmp_path, content):
    assert read_expert_tokens(write(tmp_path, content)) is None
    assert list(expert_tables(tmp_path)) == []


def test_a_run_without_experts_has_no_section(tmp_path):
    assert list(expert_tables(tmp_path)) == []
