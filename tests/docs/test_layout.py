"""Rules of the layout that import-linter does not check."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "src" / "app"
LONGEST_MODULE_LINES = 600


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."


def test_core_imports_the_standard_library_and_itself_only() -> None:
    outside = {
        f"{path.name}: {name}"
        for path in (APP / "core").glob("*.py")
        for name in imported(path)
        if name.split(".")[0] not in sys.stdlib_module_names and not f"{name}.".startswith("app.core.")
    }
    assert not outside


def test_no_module_is_longer_than_one_sitting() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in APP.rglob("*.py")}
    assert {name for name, lines in lengths.items() if lines > LONGEST_MODULE_LINES} == set()
