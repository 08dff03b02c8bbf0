"""Generates `.env.example` and README's table of variables from the settings models.

`python -m app.config.reference` rewrites both in the working directory; `--check` changes nothing, prints a diff of
what is stale and exits with 1. Invariant: the text depends only on `settings`, and `.env.example` sets nothing.
"""

import ast
import difflib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from textwrap import wrap

from app.config import settings
from app.config.rules import GROUPS, VARIABLES, Variable
from app.core.files import write_durably

BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"
LINE_CHARACTERS = 118
HEADING = """\
# Every setting of Headwater with its default. Nothing here is required: with no setting at all, everything runs on
# this machine. Copy this file to .env and take the # away from the lines you change. The environment overrides .env.
# Written by `python -m app.config.reference`; change src/app/config/settings.py instead.
"""


def descriptions() -> dict[str, str]:
    """The purpose of each variable, by `group.field`: the string below its field, which is available only in the
    source.
    """
    source = ast.parse(inspect.getsource(settings))
    classes = {each.name: each for each in source.body if isinstance(each, ast.ClassDef)}
    found = {}
    for group, model in GROUPS.items():
        for pair in pairwise(classes[model.__name__].body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=field)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[f"{group}.{field}"] = text
    return found


def env_example() -> str:
    """The whole text of `.env.example`: every name once, each assignment commented out."""
    said, lines, seen = descriptions(), [HEADING], set[str]()
    for title, variables in groupby(VARIABLES, lambda each: each.title):
        lines.append(f"# ---- {title} ----")
        for variable in variables:
            name = variable.names[0]
            if name not in seen:
                default = f'"{variable.default}"' if " " in variable.default else variable.default
                lines.extend((*_comments(variable, said[variable.goes_to]), f"#{name}={default}"))
            seen.add(name)
        lines.append("")
    return "\n".join(lines)


def table() -> str:
    """README's tables, one for each part, without the markers."""
    said = descriptions()
    groups = groupby(VARIABLES, lambda each: each.title)
    return "\n".join(line for title, each in groups for line in (f"**{title}**", "", *_rows(each, said), ""))


def with_table(readme: str) -> str:
    """`readme` with the text between the markers replaced. Raises ValueError when the markers are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN} ... {END}: put both lines where the table belongs")
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


def main(arguments: Sequence[str], root: Path) -> int:
    """Rewrite both files under `root`, or with `--check` report the stale ones. Returns the exit code."""
    readme = root / "README.md"
    wanted = {root / ".env.example": env_example(), readme: with_table(readme.read_text(encoding="utf-8"))}
    stale = 0
    for path, text in wanted.items():
        there = path.read_text(encoding="utf-8") if path.exists() else ""
        if there == text:
            continue
        stale += 1
        if "--check" in arguments:
            old, new = there.splitlines(keepends=True), text.splitlines(keepends=True)
            sys.stdout.writelines(difflib.unified_diff(old, new, path.name, f"{path.name} (from settings.py)"))
        else:
            write_durably(path, [text.encode()])
    return 1 if stale and "--check" in arguments else 0


def _rows(variables: Iterable[Variable], said: Mapping[str, str]) -> Iterator[str]:
    yield "| variable | default | meaning |"
    yield "|---|---|---|"
    for variable in variables:
        names = ", ".join(f"`{name}`" for name in variable.names)
        default = f"`{variable.default}`" if variable.default else variable.unset or "unset"
        allowed = "" if variable.allowed.obvious else f" Allowed: {variable.allowed.words}."
        cells = (names, *(text.replace("|", "\\|") for text in (default, said[variable.goes_to] + allowed)))
        yield f"| {' | '.join(cells)} |"


def _comments(variable: Variable, meaning: str) -> Iterator[str]:
    yield from (f"# {line}" for line in wrap(meaning, LINE_CHARACTERS))
    if not variable.allowed.obvious:
        yield f"#   allowed: {variable.allowed.words}"
    if variable.unset:
        yield f"#   unset: {variable.unset}"
    if variable.names[1:]:
        yield f"#   also: {', '.join(variable.names[1:])}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path.cwd()))
