"""Which rows an object may lose: only those that the source would still have if nobody had deleted them there.

Invariant: a row that the source's retention may have forgotten is never taken out, whatever is allowed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

EARLIEST, LATEST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
UNLIMITED = timedelta.max
EXAMPLES = 20


@dataclass(slots=True)
class Shrink:
    """One union that may leave rows out. `since`: a row from here on that the source lacks was deleted there.

    `removes` false: such rows stay, and are only told. `rows` and `examples` tell what was met.
    """

    since: datetime = EARLIEST
    removes: bool = True
    rows: int = 0
    examples: list[str] = field(default_factory=list)

    def note(self, rows: int, examples: Iterable[str]) -> None:
        """So many rows of the object are not at the source any more; the first of them as text."""
        self.rows += rows
        self.examples += list(examples)[: EXAMPLES - len(self.examples)]

    def told(self, key: str, *, dry_run: bool) -> str:
        """What becomes of these rows, in a line."""
        one = self.rows == 1
        verb = "would be removed" if dry_run else "was removed" if one else "were removed"
        if not self.removes:
            verb = f"{'stays' if one else 'stay'}, since --allow-shrink was not given"
        rows = f"{self.rows} {'row' if one else 'rows'} that the source no longer has"
        more = f" and {self.rows - len(self.examples)} more" if self.rows > len(self.examples) else ""
        return f"{key}: {rows} {verb}: {'; '.join(self.examples)}{more}"


def covered_since(now: datetime, retention: timedelta | None, oldest_at: datetime | None) -> datetime:
    """From when on the source has every row that was not deleted there. `now` must not be before the rows were read.

    `retention` UNLIMITED: it forgets nothing by itself. None: it cannot be asked; then everything from the oldest point
    on that it still holds of the measurement, and nothing at all where it holds none.
    """
    if retention is None:
        return oldest_at or LATEST
    if retention >= now - EARLIEST:
        return EARLIEST
    return now - retention
