"""The table of closed days as reports read it: which of its files stand for which objects.

Invariant: what a report reads through it are the rows of the objects, each once, and those whose objects are gone. So a
day that changed since it was taken is read from its objects, but for the rows that only the table has.
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
    """What a report is limited to; None = not limited. Instants are UTC without a zone."""

    device: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class TableFile:
    """A file, which never changes. `without`: device, first and last microsecond of rows that are read elsewhere."""

    key: str
    size_bytes: int
    without: Sequence[tuple[str, int, int]] = ()


@dataclass(frozen=True, slots=True)
class TableState:
    """One state of the table: Iceberg's number of it, and since when it holds; `location`: where programs find it."""

    snapshot_id: int
    committed_at: datetime
    location: str


@dataclass(frozen=True, slots=True)
class TableRows:
    """What a report reads: `files` of a state of the table, and the objects that are `beside` them. `state`: None when
    there is no table.
    """

    state: TableState | None
    files: Sequence[TableFile]
    beside: Callable[[ListedVersion], bool]


EVERYTHING = ReportSpan()
NO_TABLE = TableRows(None, (), beside=lambda _: True)


class ClosedDays(Protocol):
    """The table. All methods may be called from any thread, and raise Transient while it cannot be read."""

    def rows(
        self,
        span: ReportSpan,
        changes: Mapping[int, int],
        objects: Callable[[int, int], Sequence[ListedVersion]],
    ) -> TableRows:
        """The newest state beside the objects. `changes`: day -> a number that grows when an object of it comes or
        goes; `objects(first_day, last_day)`: all of them. Days are counted from 1970-01-01.
        """

    def rows_at(self, instant: datetime, span: ReportSpan) -> TableRows:
        """The state that was valid then, alone. Raises Rejected for an instant of which there is none."""

    def day_counts(self) -> Mapping[int, int]:
        """Day -> rows of the newest state."""

    def look_again(self) -> None:
        """Forget what is remembered: a file is gone."""
