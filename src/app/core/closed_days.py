"""The table of closed days as reports read it: which of its files replace which objects.

Invariant: a report reads each row of the objects once, and the rows whose objects are gone. So a day that changed after
it was copied to the table is read from its objects, plus the rows that only the table has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol


class ListedVersion(Protocol):
    """A version of an object in the tree of the export."""

    @property
    def key(self) -> str:
        """Its key."""

    @property
    def etag(self) -> str:
        """Its ETag."""

    @property
    def size_bytes(self) -> int:
        """Its size."""


@dataclass(frozen=True, slots=True)
class ReportSpan:
    """The filters of a report; None = no filter. Timestamps are UTC without a zone."""

    device: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class TableFile:
    """An immutable file. `without`: device, first and last microsecond of rows that are read elsewhere."""

    key: str
    size_bytes: int
    without: Sequence[tuple[str, int, int]] = ()


@dataclass(frozen=True, slots=True)
class TableState:
    """One state of the table: its Iceberg snapshot id and when it became valid; `location`: where programs find it."""

    snapshot_id: int
    committed_at: datetime
    location: str


@dataclass(frozen=True, slots=True)
class TableRows:
    """What a report reads: `files` of one state of the table, and the objects `beside` them. `state`: None when there
    is no table.
    """

    state: TableState | None
    files: Sequence[TableFile]
    beside: Callable[[ListedVersion], bool]


EVERYTHING = ReportSpan()
NO_TABLE = TableRows(None, (), beside=lambda _: True)


class ClosedDays(Protocol):
    """The table. Methods are thread-safe and raise Transient while it cannot be read."""

    def rows(
        self,
        span: ReportSpan,
        changes: Mapping[int, int],
        objects: Callable[[int, int], Sequence[ListedVersion]],
    ) -> TableRows:
        """The newest state, and the objects to read with it. `changes`: day -> a number that grows when an object of
        that day is added or removed; `objects(first_day, last_day)`: all of them. Days are counted from 1970-01-01.
        """

    def rows_at(self, instant: datetime, span: ReportSpan) -> TableRows:
        """Only the state that was valid at `instant`. Raises Rejected when there was none."""

    def day_counts(self) -> Mapping[int, int]:
        """Day -> rows in the newest state."""

    def look_again(self) -> None:
        """Clear the cache: a file is gone."""
