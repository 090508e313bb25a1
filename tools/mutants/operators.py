"""Mutations of source text: small changes of the syntax tree, one per mutant.

Each mutant replaces the text of one node; the rest of the file is unchanged. Places where a change
has no effect, or none that a test should notice, are not mutated: annotations, docstrings, messages
of errors and logs, help texts, ``assert`` for type checkers, timeouts and intervals of polling.
"""

from __future__ import annotations

import ast
import hashlib
import re
from dataclasses import dataclass
from typing import Any

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE,),
    ast.LtE: (ast.Lt,),
    ast.Gt: (ast.GtE,),
    ast.GtE: (ast.Gt,),
    ast.Eq: (ast.NotEq, ast.GtE),
    ast.NotEq: (ast.Eq, ast.Lt),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}
FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}
RETURNS = {"bool": "not ({})", "int": "({}) + 1", "float": "2 * ({})", "str": '""'}
"""Another value of the same type, by the annotation of the function."""

SKIPPED_CALLS = re.compile(
    r"(print|warn|_?log|debug|info|sleep|cast|TypeVar|TypeAdapter|ConfigDict|ArgumentTypeError|"
    r"ArgumentParser|add_argument_group|set_description|set_postfix|flush|fsync|fsync_path|beat)"
)
"""Names of functions whose arguments, and whose removal, no test should notice."""
SKIPPED_KEYWORDS = re.compile(
    r"(help|description|desc|epilog|metavar|title|usage|name|encoding|errors|strict|daemon|flush|"
    r"file|indent|maxsize|bar_format|pause|prog|.*timeout.*)"
)
SKIPPED_TARGETS = re.compile(r"(__\w+__|.*(TIMEOUT|SLEEP|PAUSE|PERIOD|SECONDS|RETR|DELAY|WAIT).*)")
TYPING = re.compile(r"(Annotated|Literal|Callable|Union|Optional|type|dict|list|tuple|set|Mapping)")


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    """Of the file, relative to the repository."""
    line: int
    start: int
    end: int
    """Half-open range of bytes in the file."""
    before: str
    after: str
    first_line: int
    last_line: int
    """Lines of the statement, or of the function for the default value of a parameter."""
    name: str | None
    """What it defines, for statements that are executed at import."""

    @property
    def id(self) -> str:
        """Short ID, which does not depend on the other mutants."""
        text = f"{self.path} {self.start} {self.end} {self.after}"
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def source(self, original: bytes) -> bytes:
        """Return the changed text of the file."""
        return original[: self.start] + self.after.encode() + original[self.end :]


def mutants_of(path: str, source: bytes) -> list[Mutant]:
    """Return all mutants of a file that compile, in its order."""
    visitor = _Visitor(path, source)
    visitor.visit(ast.parse(source))
    found = {(m.start, m.end, m.after): m for m in visitor.found if m.before != m.after}
    return sorted(found.values(), key=lambda m: (m.start, m.end, m.after))


class _Visitor(ast.NodeVisitor):
    def __init__(self, path: str, source: bytes) -> None:
        self.found: list[Mutant] = []
        self._path, self._source = path, source
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._statement: ast.AST | None = None
        self._name: str | None = None
        self._returns: list[str | None] = []

    # --- changes -------------------------------------------------------------------------------

    def _replace(self, node: Any, after: str) -> None:
        start = self._starts[node.lineno - 1] + node.col_offset
        end = self._starts[node.end_lineno - 1] + node.end_col_offset
        at: Any = self._statement or node
        self.found.append(
            Mutant(
                path=self._path,
                line=node.lineno,
                start=start,
                end=end,
                before=self._source[start:end].decode(),
                after=after,
                first_line=at.lineno,
                last_line=at.end_lineno,
                name=None if self._returns else self._name,
            )
        )

    def _change(self, node: Any, parenthesize: bool = True, **fields: Any) -> None:
        values = {name: getattr(node, name, None) for name in node._fields} | fields
        text = ast.unparse(type(node)(**values))
        self._replace(node, f"({text})" if parenthesize else text)

    # --- expressions ---------------------------------------------------------------------------

    def visit_Compare(self, node: ast.Compare) -> None:
        for i, operator in enumerate(node.ops):
            for other in COMPARISONS[type(operator)]:
                self._change(node, ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        other = ARITHMETIC.get(type(node.op))
        if other is not None and not _is_text_or_path(node):
            self._change(node, op=other())
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self._change(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._replace(node, f"({ast.unparse(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._replace(node, repr(not value))
        elif isinstance(value, int):
            self._replace(node, repr(value + 1))
        elif isinstance(value, float):
            self._replace(node, repr(2 * value or 1.0))
        elif isinstance(value, str) and re.fullmatch(r"[^\s%{]+", value):  # no message
            self._replace(node, repr(value + "X"))

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound is not None and not isinstance(bound, ast.Constant | ast.UnaryOp):
                self._replace(bound, f"({ast.unparse(bound)}) + 1")
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if not TYPING.fullmatch(_last_name(node.value)):
            self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass  # messages; Python 3.11 has wrong positions for its parts

    def visit_Call(self, node: ast.Call) -> None:
        called = _last_name(node.func)
        if SKIPPED_CALLS.fullmatch(called) or called.endswith(("Error", "Warning")):
            return
        if isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
            self._replace(node.func, FUNCTIONS[node.func.id])
        self.visit(node.func)
        for argument in node.args:
            self.visit(argument)
        for i, keyword in enumerate(node.keywords):
            if keyword.arg is None or not SKIPPED_KEYWORDS.fullmatch(keyword.arg):
                self.visit(keyword.value)
                # Without an argument a class would raise an error: its values are changed instead.
                if keyword.arg is not None and (called == "Field" or called.islower()):
                    rest = [*node.keywords[:i], *node.keywords[i + 1 :]]
                    self._change(node, parenthesize=False, keywords=rest)

    # --- statements ----------------------------------------------------------------------------

    def visit(self, node: ast.AST) -> None:
        if not isinstance(node, ast.stmt) or isinstance(node, ast.FunctionDef | ast.ClassDef):
            super().visit(node)
            return
        outer, self._statement = self._statement, _head(node)
        super().visit(node)
        self._statement = outer

    def visit_Expr(self, node: ast.Expr) -> None:
        value = node.value
        if isinstance(value, ast.Constant):
            return  # docstring
        if not (isinstance(value, ast.Call) and SKIPPED_CALLS.fullmatch(_last_name(value.func))):
            self._replace(node, "pass")
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self._replace(node, "pass")

    def visit_Assert(self, node: ast.Assert) -> None:
        pass

    def visit_Break(self, node: ast.Break) -> None:
        self._replace(node, "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self._replace(node, "break")

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        other = ARITHMETIC.get(type(node.op))
        if other is not None and not isinstance(
            node.value, ast.List | ast.ListComp | ast.JoinedStr
        ):
            self._change(node, parenthesize=False, op=other())
        self.visit(node.value)

    def visit_Return(self, node: ast.Return) -> None:
        value, returns = node.value, self._returns[-1] or "None"
        if value is None or isinstance(value, ast.Constant | ast.JoinedStr):
            after = None
        elif returns in RETURNS:
            after = RETURNS[returns].format(ast.unparse(value))
        elif "None" in returns:
            after = "None"
        else:
            kind = re.match(r"(list|dict)\[", returns)
            after = {"list": "[]", "dict": "{}"}[kind[1]] if kind else None
        if after is not None and value is not None and ast.unparse(value) != after:
            self._replace(value, after)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        pass

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        pass

    def visit_Assign(self, node: ast.Assign) -> None:
        self._define(ast.unparse(node.targets[0]), node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None and "TypeAlias" not in ast.unparse(node.annotation):
            self._define(ast.unparse(node.target), node.value)

    def _define(self, target: str, value: ast.expr) -> None:
        if SKIPPED_TARGETS.fullmatch(target.rpartition(".")[2]):
            return
        outer, self._name = self._name, target
        self.visit(value)
        self._name = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        # Default values are used by the tests that run the function.
        outer, self._statement = self._statement, node
        self._returns.append(ast.unparse(node.returns) if node.returns is not None else None)
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)
        self._returns.pop()
        self._statement = outer

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)


def _head(node: ast.stmt) -> ast.stmt:
    """Return a statement without its block, which has lines of its own."""
    body = getattr(node, "body", None)
    if not body:
        return node
    head = ast.Pass()
    head.lineno, head.end_lineno = node.lineno, max(node.lineno, body[0].lineno - 1)
    return head


def _is_text_or_path(node: ast.BinOp) -> bool:
    """Whether an operator joins strings or paths: another one would be an error at once."""
    parts = list(ast.walk(node))
    if any(isinstance(p, ast.JoinedStr) for p in parts):
        return True
    if any(isinstance(p, ast.Constant) and isinstance(p.value, str) for p in parts):
        return True
    path = r"(folder|path|root|save|cache|temporary|directory|out|inner|here|newest|target)"
    return isinstance(node.op, ast.Div) and bool(re.search(path, ast.unparse(node.left)))


def _last_name(node: ast.expr) -> str:
    """Return ``c`` of ``a.b.c``."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
