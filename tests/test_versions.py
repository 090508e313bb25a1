"""``--version`` of all programs."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import torch

import megatron_llmjp
from tests.support.processes import ROOT
from tests.test_packages import declared_programs

CODE = """\
import importlib, sys
for target in sys.argv[1:]:
    module, _, function = target.partition(":")
    main = getattr(importlib.import_module(module), function)
    sys.argv = ["program", "--version"]
    try:
        sys.exit(main())
    except SystemExit as end:
        assert not end.code, target
    print("=" * 8)
assert "torch" not in sys.modules
"""


def test_every_program_prints_the_versions():
    programs = declared_programs()
    command = [sys.executable, "-c", CODE, *programs.values()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = done.stdout.split("=" * 8 + "\n")[:-1]
    assert len(texts) == len(programs)
    names = [text.partition(" ")[0].removesuffix(".py") for text in texts]
    assert names == list(programs)
    core = importlib.metadata.version("megatron-core")
    for text in texts:
        assert f"(megatron_llmjp) {megatron_llmjp.__version__}\n" in text
        assert f"\ntorch {torch.__version__}\n" in text and f"\nmegatron-core {core}\n" in text
        assert f"\nCUDA {torch.version.cuda or 'none: PyTorch is a CPU build'}\n" in text
