"""Product events as rows of the warehouse, as `product_mapping.toml` says: columns of events in, rows by table out.

Invariants: the rows of one call belong to the same events, and an event's row is in a table only when it has that
table's key; nothing of a service or of a table is known here but what the file says.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from app.stores.product_values import Column, Rule, rule

FILE = Path(__file__).with_name("product_mapping.toml")


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one table. `names` are its columns; those that are not among them stay empty."""

    names: Sequence[str]
    rows: Sequence[Sequence[Any]]


Tables = Mapping[str, Rows]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value comes from and what it becomes. `constant` None = one of `paths`, the first that has something."""

    paths: tuple[str, ...]
    constant: str | None
    word: str


@dataclass(frozen=True)
class ProductMapping:
    """What one service's events become. `places` by table and column, in order."""

    places: Mapping[str, Mapping[str, Place]]

    @cached_property
    def words(self) -> Mapping[str, frozenset[str]]:
        """Every path that is read -> the words of what its values become."""
        found: dict[str, set[str]] = {}
        for place in self._all:
            for path in place.paths:
                found.setdefault(path, set()).add(place.word)
        return {path: frozenset(words) for path, words in found.items()}

    @cached_property
    def _all(self) -> frozenset[Place]:
        return frozenset(place for columns in self.places.values() for place in columns.values())

    @cached_property
    def _rules(self) -> Mapping[str, Rule]:
        return {place.word: rule(place.word) for place in self._all}

    def tables(self, events: Mapping[str, Column], count: int) -> Tables:
        """Rows of `count` events, given as columns by path. Tables without a row are left out."""
        turned = {place: self._rules[place.word](_taken(place, events, count)) for place in self._all}
        found = {}
        for table, places in self.places.items():
            rows = _rows([turned[place] for place in places.values()], alone="uuid" not in places)
            if rows:
                found[table] = Rows(tuple(places), rows)
        return found


def _taken(place: Place, events: Mapping[str, Column], count: int) -> Column:
    if place.constant is not None:
        return [place.constant] * count
    column = events[place.paths[0]]
    for path in place.paths[1:]:
        column = [first if first is not None else second for first, second in zip(column, events[path], strict=True)]
    return column


def _rows(columns: Sequence[Column], *, alone: bool) -> Sequence[Sequence[Any]]:
    """Those that have a key, which may stand `alone`, or else anything besides."""
    keys, *others = columns
    rows = list(zip(*columns, strict=True))
    if None in keys:
        rows = [row for row in rows if row[0] is not None]
    if not alone and all(None in other for other in others):
        rows = [row for row in rows if row.count(None) < len(others)]
    return rows


@lru_cache(maxsize=4)
def mapping(service: str) -> ProductMapping:
    """The mapping of a service: `amplitude` or `appmetrica`."""
    sections = tomllib.loads(FILE.read_text(encoding="utf-8"))[service]
    return ProductMapping(
        {table: {name: _place(text) for name, text in columns.items()} for table, columns in sections.items()}
    )


def _place(text: str) -> Place:
    where, _, word = text.rpartition(" : ")
    if where.startswith("'"):
        return Place((), where.strip("'"), word)
    return Place(tuple(path.strip() for path in where.split("|")), None, word)
