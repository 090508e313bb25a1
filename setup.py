"""Packages, dependencies and command line programs of megatron_llmjp."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "megatron_llmjp/__init__.py").read_text())

REQUIRES = [
    "torch>=2.6",
    "megatron-core>=0.16.1,<0.17",
    "transformers>=4.48",
    "huggingface_hub>=0.27",  # transformers requires it, too
    "safetensors>=0.4.3",
    "tokenizers>=0.20",
    "sentencepiece>=0.2.0",
    "protobuf>=4",  # to read SentencePiece models
    "tiktoken>=0.7",  # 4 MB; to read TikTokenizer's vocabularies
    "pydantic>=2.7",
    "PyYAML>=6.0",
    "numpy>=1.26",
    "tqdm>=4.66",
    "tensorboard>=2.16",
    "matplotlib>=3.8",
    "zstandard>=0.22",
    "orjson>=3.10",
    "pyarrow>=15",  # Parquet
    "psutil>=5.9",
]

EXTRAS = {
    # Compiled against the installed PyTorch, without build isolation: see tools/install.sh.
    "gpu": ["transformer-engine[pytorch]>=2.0,<2.21"],
    "lz4": ["lz4>=4"],
    "remote": ["fsspec>=2024.2", "s3fs>=2024.2", "aiohttp>=3.9"],  # s3:// and https:// input
    "wandb": ["wandb>=0.17"],
    "pandas": ["pandas>=2.0"],
    "dev": [
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "pytest-cov>=7",
        "coverage>=7.10",  # for forked processes
        "pytest-randomly>=3.15",
        "hypothesis>=6.100",
        "ruff>=0.6",
        "mypy>=1.11",
        "types-PyYAML",
        "types-tqdm",
        "deepspeed>=0.16",  # to read checkpoints of convert_checkpoint in tests
        "lz4>=4",
        "s3fs>=2024.2",
        "aiohttp>=3.9",
        "pandas>=2.0",
        "nbclient>=0.10",  # to execute notebooks in tests
        "ipykernel>=6",
    ],
}

PROGRAMS = {
    "pretrain_gpt": "megatron_llmjp.cli:console",
    "convert_checkpoint": "megatron_llmjp.convert.cli:main",
    "preprocess_data": "data_tools.preprocess_data:main",
    "train_tokenizer": "data_tools.train_tokenizer:main",
    "inspect_dataset": "data_tools.inspect_dataset:main",
    "report_run": "data_tools.report_run:main",
    "run_status": "data_tools.run_status:main",
    "merge_datasets": "data_tools.merge_datasets:main",
    "split_folds": "data_tools.split_folds:main",
    "plan_folds": "data_tools.plan_folds:main",
    "build_indices": "data_tools.build_indices:main",
    "generate": "data_tools.generate:main",
}

setup(
    name="megatron_llmjp",
    version=VERSION[1] if VERSION else "0",
    description="3D-parallel pretraining on megatron-core, from raw text to a published model",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["megatron_llmjp*", "data_tools*"]),
    package_data={
        "megatron_llmjp": ["py.typed", "__init__.pyi"],
        "megatron_llmjp.config": ["presets/*.yaml"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [f"{name} = {function}" for name, function in PROGRAMS.items()]
    },
)
