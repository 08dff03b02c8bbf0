"""The clock that the state goes by, and what in it lies ahead of that clock.

A clock that was ahead leaves runs and cursors in the future. Invariant: nothing waits until the clock has come to
them; they are told of until a run has set them right.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta

from app.stores.sql import Database, Session

AHEAD = timedelta(seconds=60)  # clocks of machines that are in order differ by less


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


def now_of(session: Session, queries: Mapping[str, str]) -> datetime:
    """The clock of the session's database."""
    now: datetime = session.rows(queries["now"])[0]["now_at"]
    return now
