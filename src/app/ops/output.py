"""What commands print: tables for people, or one JSON document for programs.

Invariants: with `--json` stdout holds exactly one document and nothing else; a cell is one line, whatever characters
data brought. The documents are described in docs/cli-json.md.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def show(document: Mapping[str, Any], told: Callable[[], None], *, as_json: bool) -> None:
    """The document as JSON, or what `told` prints."""
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")
    else:
        told()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as their widest cell."""
    lines = [head, *([cell(each) for each in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1)]
    for line in lines:
        cells = [each.ljust(width) for each, width in zip(line[:-1], widths, strict=True)]
        sys.stdout.write("  ".join([*cells, line[-1]]).rstrip() + "\n")
    sys.stdout.write("\n")


def line(text: str) -> None:
    """One line."""
    sys.stdout.write(f"{text}\n")


def cell(value: object) -> str:
    """A value on one line."""
    return "".join(c if c.isprintable() else " " for c in str(value))
