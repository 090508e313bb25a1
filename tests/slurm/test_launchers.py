"""Job scripts of the presets: uniform, and with the settings of the published runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_llmjp.config.flags import parse
from megatron_llmjp.config.tokenizer_types import find_tokenizer_type
from tests.config.launch_scripts import SCRIPTS
from tests.support.processes import ROOT

LAUNCHERS = sorted((ROOT / "slurm").glob("pretrain_*.sh"))
PUBLISHED = {script.preset: script for script in SCRIPTS}
OTHER_TOKENIZER = {
    # The scripts name JapaneseSentencePiece; the published models end documents by <EOD>.
    "llm-jp-1.3b-v1.0": "SentencePieceTokenizer",
    "llm-jp-13b-v1.0": "SentencePieceTokenizer",
}


def preset_of(launcher: Path) -> str:
    return launcher.stem.removeprefix("pretrain_")


def head_of(launcher: Path) -> str:
    """Return the comment as one line."""
    text = launcher.read_text()
    comment = re.findall(r"^#(?!SBATCH|!)(.*)$", text.partition("\nset -euo")[0], re.MULTILINE)
    return " ".join(" ".join(comment).split())


def directive(launcher: Path, name: str) -> str:
    (value,) = re.findall(rf"^#SBATCH --{name}=(.*)$", launcher.read_text(), re.MULTILINE)
    return value


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=preset_of)
def test_the_head_agrees_with_the_script(launcher: Path):
    head, preset = head_of(launcher), preset_of(launcher)
    assert directive(launcher, "job-name") == preset
    nodes, tasks = int(directive(launcher, "nodes")), int(directive(launcher, "ntasks-per-node"))
    assert head.startswith(f"{nodes} nodes x {tasks} ")
    assert f" = {nodes * tasks} GPUs: " in head
    layout = re.search(r"GPUs: (?:TP (\d+) x )?(?:PP (\d+) x )?DP (\d+)", head)
    assert layout is not None, head
    tensor, pipeline, data = (int(number or 1) for number in layout.groups())
    parallel = parse(["--config", preset, "--vocab-size", "100"]).config.parallel
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (
        tensor,
        pipeline,
    )
    assert tensor * pipeline * data == nodes * tasks
    assert f"sbatch slurm/{launcher.name} " in head
    assert "Differences from the published run: " in head


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=preset_of)
def test_settings_of_the_published_run_are_named(launcher: Path):
    head, preset = head_of(launcher), preset_of(launcher)
    (named,) = re.findall(r"--tokenizer-type (\w+)", head)
    if preset not in PUBLISHED:
        assert find_tokenizer_type(named) == named and preset.startswith("rinna")
        return
    published = parse(PUBLISHED[preset].argv).config.data.tokenizer_type
    assert named == OTHER_TOKENIZER.get(preset, published)
    for setting in PUBLISHED[preset].environment:
        assert setting in head
    if not PUBLISHED[preset].environment:
        assert "NVTE_FUSED_ATTN" not in head


def test_scripts_differ_in_their_preset_only():
    bodies = set()
    for launcher in LAUNCHERS:
        head, _, body = launcher.read_text().partition("\nset -euo pipefail\n")
        body = body.replace(preset_of(launcher), "PRESET")
        body = re.sub(r"^GPU=\$\{GPU:-\S+\} # for --estimate\n", "", body)
        fixed = re.sub(r"^#SBATCH --(job-name|nodes)=.*$|^# .*$|^#$", "", head, flags=re.MULTILINE)
        bodies.add((fixed.strip(), body))
    assert len(bodies) == 1
