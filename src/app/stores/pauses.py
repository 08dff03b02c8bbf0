"""Paused jobs in the state database: known to every process, and after every restart.

Invariant: pausing and resuming are each one statement, so the last word of whoever speaks last holds.
"""

from collections.abc import Mapping
from datetime import datetime

from app.stores.sql import Database


class SqlPauses:
    """Which jobs are paused. Raises what `Session` raises."""

    def __init__(self, database: Database, queries: Mapping[str, str]) -> None:
        self._database = database
        self._queries = queries

    def paused(self) -> Mapping[str, datetime]:
        """Job -> since when."""
        with self._database.transaction(read_only=True) as session:
            return {row["job"]: row["paused_at"] for row in session.rows(self._queries["paused"])}

    def pause(self, job: str, at: datetime, by: str) -> None:
        """Pause a job. Idempotent; the first who did is kept."""
        with self._database.transaction() as session:
            session.run(self._queries["pause"], job=job, at=at, by=by)

    def resume(self, job: str) -> None:
        """End the pause. Idempotent."""
        with self._database.transaction() as session:
            session.run(self._queries["resume"], job=job)
