"""The clock that the state goes by, and what in it lies ahead of that clock.

A clock that was ahead leaves runs and cursors in the future. Invariant: nothing waits until the clock has come to
them; they are told of until a run has set them right.
"""

import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from app.stores.sql import Database, Session

AHEAD = timedelta(seconds=60)  # clocks of machines that are in order differ by less


class StateClock:
    """The clock that jobs go by: this machine's, or the database's as the last lease told it, carried on from then by
    a clock that nobody sets. From any thread, without I/O.
    """

    def __init__(self) -> None:
        self._known: tuple[datetime, float] | None = None

    def __call__(self) -> datetime:
        """Now."""
        if self._known is None:
            return datetime.now(UTC)
        at, since = self._known
        return at + timedelta(seconds=time.monotonic() - since)

    def follow(self, at: datetime) -> None:
        """The database says that it is `at` now."""
        self._known = (at, time.monotonic())


class SqlClocks:
    """Raises what `Session` raises."""

    def __init__(self, database: Database, queries: Mapping[str, str]) -> None:
        self._database = database
        self._queries = queries

    def now(self) -> datetime:
        """The database's clock; of SQLite, this machine's."""
        with self._database.transaction(read_only=True) as session:
            return now_of(session, self._queries)

    def ahead_seconds(self) -> Mapping[str, float]:
        """Job -> how far its last run or one of its cursors lies ahead of now, for those where it is over a minute."""
        with self._database.transaction(read_only=True) as session:
            now = now_of(session, self._queries)
            rows = session.rows(self._queries["ahead"], until_at=now + AHEAD)
        ahead: dict[str, float] = {}
        for row in rows:
            ahead[row["job"]] = max((row["latest_at"] - now).total_seconds(), ahead.get(row["job"], 0.0))
        return ahead

    def note(self) -> str:
        """What is wrong with clocks, for a person; "" for nothing."""
        skew = (datetime.now(UTC) - self.now()).total_seconds()
        notes = [f"{job} stands {spoken(seconds)} ahead of now" for job, seconds in self.ahead_seconds().items()]
        if abs(skew) > AHEAD.total_seconds():
            way = "ahead of" if skew > 0 else "behind"
            notes.insert(0, f"this machine's clock is {spoken(abs(skew))} {way} the database's")
        return f"check the clock: {', '.join(notes)}" if notes else ""


def spoken(seconds: float) -> str:
    """A length of time in the largest unit that it has two of."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def now_of(session: Session, queries: Mapping[str, str]) -> datetime:
    """The clock of the session's database."""
    now: datetime = session.rows(queries["now"])[0]["now_at"]
    return now
