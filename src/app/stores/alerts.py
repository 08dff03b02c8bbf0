"""What people were told and is not over yet, in the state database: known to every process, and after every restart.

Invariant: beginning and ending an alert is each one statement that only one caller gets a True for, so of several
processes one tells.
"""

from collections.abc import Mapping
from datetime import datetime

from app.stores.sql import Database


class SqlAlerts:
    """See `app.ops.alerts.Told`. Raises what `Session` raises."""

    def __init__(self, database: Database, queries: Mapping[str, str]) -> None:
        self._database = database
        self._queries = queries

    def told(self) -> Mapping[tuple[str, str], datetime]:
        """See `Told.told`."""
        with self._database.transaction(read_only=True) as session:
            return {(row["job"], row["event"]): row["told_at"] for row in session.rows(self._queries["open_alerts"])}

    def begin(self, job: str, event: str, at: datetime) -> bool:
        """See `Told.begin`."""
        return self._changed("begin_alert", job=job, event=event, at=at)

    def end(self, job: str, before: datetime, event: str | None = None) -> bool:
        """See `Told.end`."""
        if event is None:
            return self._changed("end_alerts", job=job, before=before)
        return self._changed("end_alert", job=job, event=event, before=before)

    def _changed(self, query: str, **params: object) -> bool:
        with self._database.transaction() as session:
            return bool(list(session.rows(self._queries[query], **params)))
