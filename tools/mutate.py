"""Mutation testing: change one module a little, run its tests, list the changes that no test detects.

    python tools/mutate.py src/app/core/runs.py --sample 20 --tests tests/ops tests/core

Each change is made in a copy of the tree, so the tree itself can be edited meanwhile. A surviving change is a missing
test or an equivalent change; only a reader can tell. Exit code 1 when anything survives.
"""

import argparse
import ast
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# The replacement of each operator.
OPPOSITES: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq,
    ast.Lt: ast.LtE,
    ast.Gt: ast.GtE,
    ast.Is: ast.IsNot,
    ast.In: ast.NotIn,
    ast.And: ast.Or,
    ast.Add: ast.Sub,
    ast.Mult: ast.FloorDiv,
}
OPPOSITES |= {there: here for here, there in OPPOSITES.items()}
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__")
SECONDS_MORE = 20


class Change(NamedTuple):
    """The source of a module with one change."""

    line: int
    what: str
    source: str


def changes_of(source: str) -> Iterator[Change]:
    """Every change inside function bodies. Columns of the syntax tree count bytes."""
    lines = source.encode().splitlines(keepends=True)
    for node in _inside_functions(ast.parse(source), inside=False):
        for place, new in _of_expression(node) if isinstance(node, ast.expr) else _of_statement(node):
            first, last = place.lineno - 1, (place.end_lineno or place.lineno) - 1
            before = b"".join(lines[:first]) + lines[first][: place.col_offset]
            after = lines[last][place.end_col_offset :] + b"".join(lines[last + 1 :])
            was = " ".join(ast.unparse(place).split())
            yield Change(place.lineno, f"{was[:90]}  ->  {new[:90]}", (before + new.encode() + after).decode())


def _inside_functions(node: ast.AST, *, inside: bool) -> Iterator[ast.expr | ast.stmt]:
    """Nodes inside functions, except annotations, logging, error texts, and f-strings, whose parts have no position
    before Python 3.12.
    """
    if inside and isinstance(node, ast.expr | ast.stmt):
        yield node
    if isinstance(node, ast.Raise | ast.JoinedStr) or (isinstance(node, ast.Expr) and _says_something(node.value)):
        return
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        inside, children = True, node.body
    elif isinstance(node, ast.Lambda):
        inside, children = True, [node.body]
    elif isinstance(node, ast.AnnAssign):
        children = [node.value] if node.value else []
    for child in children:
        yield from _inside_functions(child, inside=inside)


def _says_something(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) or ast.unparse(node).startswith("log.")


def _of_expression(node: ast.expr) -> Iterator[tuple[ast.expr, str]]:
    """Replacements for an expression, in parentheses so that each stays one expression."""
    others: list[ast.expr] = []
    match node:
        case ast.Compare(left, operators, right):
            for at, operator in enumerate(operators):
                changed = [*operators[:at], _opposite(operator), *operators[at + 1 :]]
                others.append(ast.Compare(left, changed, right))
        case ast.BoolOp(operator, values):
            others.append(ast.BoolOp(_opposite(operator), values))
            fewer = [values[:at] + values[at + 1 :] for at in range(len(values))]
            others += [ast.BoolOp(operator, rest) if len(rest) > 1 else rest[0] for rest in fewer]
        case ast.BinOp(left, operator, right) if type(operator) in OPPOSITES:
            others.append(ast.BinOp(left, _opposite(operator), right))
        case ast.UnaryOp(ast.Not(), operand):
            others.append(operand)
        case ast.IfExp(test, body, orelse):
            others.append(ast.IfExp(test, orelse, body))
        case ast.Constant(bool(value)):
            others.append(ast.Constant(not value))
        case ast.Constant(int(value)):
            others.append(ast.Constant(value + 1))
    for other in others:
        yield node, f"({ast.unparse(other)})"


def _of_statement(node: ast.stmt) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    match node:
        case ast.Return(ast.expr() as value) if ast.unparse(value) != "None":
            yield node, "return None"
        case ast.Expr(ast.Call() as call) if not _says_something(call):
            yield node, "pass"
        case ast.Assign([ast.Attribute() | ast.Subscript(), *_]):
            yield node, "pass"
        case ast.Raise() | ast.Break() | ast.Continue() | ast.AugAssign():
            yield node, "pass"
        case ast.If(test) | ast.While(test) if not isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp):
            yield test, f"(not ({ast.unparse(test)}))"


def _opposite(operator: ast.AST) -> Any:
    return OPPOSITES[type(operator)]()


def tests_of(root: Path, module: Path) -> list[str]:
    """The test directory of the module's package, and every test elsewhere that imports the module."""
    parts = module.relative_to(root / "src").with_suffix("").parts
    folder, line = root / "tests" / parts[1], f"from {'.'.join(parts)} import"
    elsewhere = (each for each in sorted((root / "tests").rglob("test_*.py")) if folder not in each.parents)
    importing = [each for each in elsewhere if line in each.read_text(encoding="utf-8")]
    return [str(each.relative_to(root)) for each in ([folder] if folder.is_dir() else []) + importing]


def failure(tree: Path, tests: Sequence[str], marks: str, limit_seconds: float = math.inf) -> str:
    """The first failing test of a tree; "" when all pass.

    Tests run in a forked process, with pytest and its plugins already loaded: loading them takes longer than most
    tests.
    """
    options = ["-x", "-q", "-n0", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-m", marks]
    options += ["-W", "ignore:Module already imported"]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as told:
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(told.fileno(), 1)
            os.dup2(told.fileno(), 2)
            os.chdir(tree)
            sys.path.insert(0, str(tree / "src"))
            os.environ["PYTHONPATH"] = sys.path[0]  # for processes that tests start
            for name in [each for each in sys.modules if each.partition(".")[0] == "app"]:
                del sys.modules[name]  # loaded from this environment's own tree at start-up
            os._exit(pytest.main([*options, *tests]))
        until = time.monotonic() + limit_seconds
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > until:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "the tests took too long"
            time.sleep(0.02)
        if ended[1] == 0:
            return ""
        told.seek(0)
        lines = told.read().splitlines()
    return next((line for line in lines if line.startswith(("FAILED", "ERROR"))), "\n".join(lines[-5:]))


def survivors(root: Path, module: Path, changes: Sequence[Change], tests: Sequence[str], marks: str) -> int:
    """Print each change and its result; returns how many no test detected."""
    with tempfile.TemporaryDirectory(prefix="headwater-mutate-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(root, tree, ignore=NOT_COPIED, symlinks=True)
        began = time.monotonic()
        if fault := failure(tree, tests, marks):
            raise SystemExit(f"the tests do not pass without a change: {fault}")
        limit_seconds = 3 * (time.monotonic() - began) + SECONDS_MORE
        (tree / module.relative_to(root)).write_text("1 / 0\n", encoding="utf-8")
        if not failure(tree, tests, marks, limit_seconds):
            raise SystemExit(f"these tests do not read {module.name}")
        alive = 0
        for change in changes:
            (tree / module.relative_to(root)).write_text(change.source, encoding="utf-8")
            fault = failure(tree, tests, marks, limit_seconds)
            alive += not fault
            print(f"{'killed  ' if fault else 'SURVIVED'} {change.line}: {change.what}", flush=True)
    return alive


def main() -> int:
    """Exit code 1 when a change survived."""
    parser = argparse.ArgumentParser(description="Change one module a little and see whether the tests notice.")
    parser.add_argument("module", type=Path, help="for example src/app/core/runs.py")
    parser.add_argument("--tests", nargs="*", help="else those of the module's part, and all that import it")
    parser.add_argument("--sample", type=int, default=20, help="how many changes; 0 = all")
    parser.add_argument("--seed", type=int, default=1, help="another number takes other changes")
    parser.add_argument("--marks", default="not slow", help="which tests of those, as pytest's -m takes it")
    given = parser.parse_args()
    for plugin in entry_points(group="pytest11"):
        plugin.load()
    sys.dont_write_bytecode = True
    root, module = Path(__file__).resolve().parent.parent, given.module.resolve()
    changes = list(changes_of(module.read_text(encoding="utf-8")))
    if 0 < given.sample < len(changes):
        changes = sorted(random.Random(given.seed).sample(changes, given.sample))
    alive = survivors(root, module, changes, given.tests or tests_of(root, module), given.marks)
    print(f"{len(changes) - alive} of {len(changes)} changes were noticed")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main())
