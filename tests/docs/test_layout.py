"""The tree is the one that docs/architecture.md declares: a new word for a file needs a decision first."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "src" / "app"
LONGEST_MODULE_LINES = 500
VAGUE = {"utils", "helpers", "common", "manager", "handler", "base", "misc"}


def declared() -> dict[str, set[str]]:
    """Folder -> words, from the table of files."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| ((?:`\w+` ?)+)\|", text, re.MULTILINE)
    return {folder: set(re.findall(r"`(\w+)`", words)) for folder, words in rows}


def undeclared(app: Path) -> list[str]:
    """Files below `app` whose folder or word is not declared."""
    words = declared()
    found = []
    for path in sorted(app.rglob("*.py")):
        folder = path.parent.relative_to(app).as_posix()
        if path.stem != "__init__" and path.stem not in words.get(folder, set()):
            found.append(path.relative_to(app).as_posix())
        if path.stem == "__init__" and folder != "." and folder not in words:
            found.append(path.relative_to(app).as_posix())
    return found


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."


def test_every_file_has_a_declared_word() -> None:
    assert not undeclared(APP), "declare the word in docs/architecture.md, or use one that is there"


def test_a_file_with_a_new_word_is_found(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "window.py").touch()
    (tmp_path / "core" / "helpers.py").touch()
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "__init__.py").touch()
    (tmp_path / "fresh.py").touch()
    assert undeclared(tmp_path) == ["core/helpers.py", "fresh/__init__.py", "fresh.py"]


def test_no_declared_word_is_vague() -> None:
    assert not VAGUE & {word for words in declared().values() for word in words}


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
