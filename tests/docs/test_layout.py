"""Rules of the layout that import-linter does not check."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src"
APP = SOURCES / "app"
LONGEST_MODULE_LINES = 600
IMPORT_ALL_OF_APP = """
import pkgutil, sys
sys.modules["simulators"] = None  # from here on an import of it fails
import app
for module in pkgutil.walk_packages(app.__path__, "app."):
    __import__(module.name)
"""


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


@pytest.mark.slow
def test_all_of_app_can_be_imported_where_there_are_no_simulators() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL_OF_APP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_module_is_longer_than_one_sitting() -> None:
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES.rglob("*.py")}
    assert {name for name, lines in lengths.items() if lines > LONGEST_MODULE_LINES} == set()
