"""Names and arguments of Transformer Engine's release 2.20.2, which tests have no copy of.

The stand-in has the names and arguments of that release (``transformer_engine_names.json``, read
from its sources), and megatron-core passes no argument that the release does not have.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import run_ranks
from tests.support.read_transformer_engine_names import TABLE

COMPILED = {"multi_tensor_l2norm", "multi_tensor_scale"}
"""Functions of the compiled extension, whose arguments no Python source has."""
MODULE = "transformer_engine.pytorch."
WRAPPED = {
    "TELinear": "module.linear.Linear",
    "TELayerNormColumnParallelLinear": "module.linear.LayerNormLinear",
    "TEDotProductAttention": "attention.dot_product_attention.DotProductAttention",
}
"""megatron-core's classes and their base classes in Transformer Engine."""


@pytest.fixture(scope="module")
def table():
    return json.loads(TABLE.read_text(encoding="utf-8"))


def describe_stand_in():
    """Return the signatures of the stand-in, and the imports of megatron-core that it has."""
    from tests.support.read_transformer_engine_names import megatron_imports, stand_in_signatures

    found = {}
    for name, wanted in megatron_imports().items():
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        found[name] = [wish for wish in wanted if hasattr(module, wish)]
    version = importlib.import_module("transformer_engine").__version__
    return {"release": version, "imports": found, "signatures": dict(stand_in_signatures())}


def test_the_stand_in_has_the_published_names(table):
    (found,) = run_ranks(describe_stand_in, 1, stand_ins=True)
    assert found["release"] == table["release"] == "2.20.2"
    signatures = {k: v for k, v in found["signatures"].items() if k.split(".")[-1] not in COMPILED}
    for name, arguments in signatures.items():
        if arguments != ["*args"]:  # functions that are imported and not called
            assert arguments == table["signatures"].get(name), name
    assert len(signatures) > 30
    for module, names in found["imports"].items():
        assert set(names) <= set(table["imports"][module]), module
    assert sum(map(len, found["imports"].values())) > 20


def megatron_source() -> ast.Module:
    found = importlib.util.find_spec("megatron")
    assert found is not None and found.submodule_search_locations is not None
    root = Path(next(iter(found.submodule_search_locations)))
    return ast.parse((root / "core/extensions/transformer_engine.py").read_text(encoding="utf-8"))


def current_code(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below one, without branches for earlier releases."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_release_test(child.test):
            for inner in child.body:
                yield inner
                yield from current_code(inner)
            continue
        yield child
        yield from current_code(child)


def is_release_test(test: ast.expr) -> bool:
    return isinstance(test, ast.Call) and ast.unparse(test.func) == "is_te_min_version"


def keywords(method: ast.FunctionDef, calls: tuple[str, ...]) -> set[str]:
    """Return the keyword arguments of some calls, and those that a method collects for them."""
    found = set()
    for node in current_code(method):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
            found |= {keyword.arg for keyword in node.keywords if keyword.arg}
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            target = node.targets[0]
            if "kwargs" in ast.unparse(target.value) and isinstance(target.slice, ast.Constant):
                found.add(str(target.slice.value))
    return found


def test_megatron_core_passes_arguments_that_exist(table):
    checked = 0
    for node in ast.walk(megatron_source()):
        if not isinstance(node, ast.ClassDef) or node.name not in WRAPPED:
            continue
        for method in node.body:
            if not isinstance(method, ast.FunctionDef) or method.name not in (
                "__init__",
                "forward",
            ):
                continue
            passed = keywords(method, (f"super().{method.name}", "dict"))
            accepted = table["signatures"][f"{MODULE}{WRAPPED[node.name]}.{method.name}"]
            assert passed <= set(accepted), (node.name, method.name)
            checked += len(passed)
    assert checked > 50
    (norm,) = (n for n in megatron_source().body if getattr(n, "name", "") == "TENorm")
    for kind in ("LayerNorm", "RMSNorm"):
        passed = keywords(norm, (f"te.pytorch.{kind}",))
        own, op = (
            table["signatures"][f"{MODULE}{m}.{kind}.__init__"] for m in ("module.norms", "ops")
        )
        assert len(passed) == 4 and passed | {"params_dtype", "device"} <= {*own, *op}


def test_megatron_core_passes_sequence_lengths_that_exist(table):
    """Fields of its packed sequences are passed to the attention as they are."""
    from megatron.core.packed_seq_params import PackedSeqParams

    accepted = table["signatures"][f"{MODULE}{WRAPPED['TEDotProductAttention']}.forward"]
    assert set(PackedSeqParams.__dataclass_fields__) - set(accepted) == {
        "cp_group",
        "local_cp_size",
    }
