"""The part of Drive's search language that is spoken here: names, parents, trash and application properties, by `and`.

Invariant: a term that is not understood is refused, never passed over.
"""

import re
from collections.abc import Callable

from simulators.drive_files import StoredFile

TEXT = r"'((?:[^'\\]|\\.)*)'"
TERMS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], StoredFile], bool]], ...] = (
    (re.compile(rf"name\s*=\s*{TEXT}"), lambda found, file: file.name == _plain(found[1])),
    # of names, `contains` looks at the beginning of words only; the beginning of the name is what is asked here
    (re.compile(rf"name\s+contains\s+{TEXT}"), lambda found, file: file.name.startswith(_plain(found[1]))),
    (re.compile(rf"{TEXT}\s+in\s+parents"), lambda found, file: file.parent == _plain(found[1])),
    (re.compile(r"trashed\s*=\s*(true|false)"), lambda found, file: file.trashed == (found[1] == "true")),
    (
        re.compile(rf"appProperties\s+has\s+{{\s*key\s*=\s*{TEXT}\s+and\s+value\s*=\s*{TEXT}\s*}}"),
        lambda found, file: file.properties.get(_plain(found[1])) == _plain(found[2]),
    ),
)
AND = re.compile(r"\s*and\s+|\s*$")
Holds = Callable[[StoredFile], bool]


def holds(query: str) -> Holds:
    """What the query asks of a file. Raises ValueError for anything else than terms joined by `and`."""
    asked: list[Holds] = []
    position = len(query) - len(query.lstrip())
    while position < len(query):
        term, position = _term(query, position)
        asked.append(term)
        joint = AND.match(query, position)
        if joint is None:
            raise ValueError(query[position:])
        position = joint.end()
    return lambda file: all(term(file) for term in asked)


def _term(query: str, position: int) -> tuple[Holds, int]:
    for pattern, test in TERMS:
        found = pattern.match(query, position)
        if found is not None:
            return _bound(test, found), found.end()
    raise ValueError(query[position:])


def _bound(test: Callable[[re.Match[str], StoredFile], bool], found: re.Match[str]) -> Holds:
    return lambda file: test(found, file)


def _plain(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)
