"""How the rows of a file and those of the master come to have the same columns: a pure decision.

Invariant: the master's columns keep their order and new ones follow, so a row of the master changes only by fields that
are put behind it; a row of the file is taken as it stands where its columns are already those.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from app.core.errors import Permanent
from app.csv_inbox.dialect import Dialect
from app.csv_inbox.header import Header

ABSENT = -1


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of the result, before any is found to be obsolete.

    `order` gives for each column its place in the file (ABSENT: empty there), None when rows fit as they are.
    `doubtful` are places of columns that the file has not: obsolete if no row of the result has anything there.
    """

    names: tuple[str, ...]
    fields: tuple[bytes, ...]
    bom: bytes
    eol: bytes
    order: tuple[int, ...] | None
    doubtful: tuple[int, ...]
    added: tuple[str, ...]
    key: int

    def header(self, dialect: Dialect, dropped: Sequence[int] = ()) -> bytes:
        """The header line without the columns `dropped`."""
        fields = [field for place, field in enumerate(self.fields) if place not in dropped]
        return self.bom + dialect.delimiter.encode().join(fields) + self.eol

    def rendered(self, fields: Sequence[bytes]) -> list[bytes]:
        """The fields of one row of the file, as raw as they came, in the order of the result."""
        if self.order is None:
            return list(fields)
        return [b"" if place == ABSENT else fields[place] for place in self.order]


def united(master: Header | None, incoming: Header, key: str, required: Sequence[str], dialect: Dialect) -> Layout:
    """The layout of `incoming`, which has the key, merged into `master` (None: there is none yet)."""
    held = incoming if master is None else master
    if key not in held.names:
        raise Permanent(
            f"the master has no column {key!r}: {', '.join(held.names)[:200]}",
            "correct key_column, or restore the master; it was not changed",
        )
    there = frozenset(held.names)
    added = () if master is None else tuple(name for name in incoming.names if name not in there)
    fields = dict(zip(incoming.names, incoming.fields, strict=True))
    names = (*held.names, *added)
    places = {name: place for place, name in enumerate(incoming.names)}
    order = tuple(places.get(name, ABSENT) for name in names)
    kept = {key, *required, *incoming.names}
    return Layout(
        names=names,
        fields=(*held.fields, *(fields[name] for name in added)),
        bom=dialect.bom if master is None else master.bom,
        eol=held.eol or incoming.eol or b"\n",
        order=None if order == tuple(range(len(incoming.names))) else order,
        doubtful=tuple(place for place, name in enumerate(held.names) if name not in kept),
        added=incoming.names if master is None else added,
        key=names.index(key),
    )
