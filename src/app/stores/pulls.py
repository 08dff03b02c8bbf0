"""What pulls remember in the state database: the questions put to export services, and the calls that a day has had.

Invariants: a question keeps its number and its text, since the text is the name of the file upstream; a call is counted
before it is made, so a day never has more of them than it allows, whatever happens to their answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from app.core.errors import Transient
from app.core.window import DAY_SECONDS, floor_to, next_midnight
from app.stores.sql import Database, Row

ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Export:
    """One question. `asked_at` None: the service was never seen to have heard it. `done`: its file was taken in."""

    export_id: int
    request: str
    parts_count: int
    asked_at: datetime | None
    created_at: datetime
    done: bool = False


class SqlPulls:
    """Questions by service and owner, calls by service and day UTC. Raises what `Session` raises."""

    def __init__(self, database: Database, queries: Mapping[str, str]) -> None:
        self._database = database
        self._queries = queries

    def add(self, service: str, owner: str, request: str, now: datetime) -> Export:
        """The export of this question, new or known. Idempotent."""
        named = {"service": service, "owner": owner, "request": request}
        for _ in range(ATTEMPTS):  # another process may take the same number at the same time
            with self._database.transaction() as session:
                session.run(self._queries["add_export"], **named, parts_count=1, created_at=now)
                if rows := session.rows(self._queries["export_of"], **named):
                    return _export(rows[0])
        raise Transient("others number their exports at the same time", "send the same request again")

    def find(self, service: str, export_id: int) -> Export | None:
        """The export of that number; None for one that was never given."""
        found = self._rows("export_by_id", service=service, export_id=export_id)
        return _export(found[0]) if found else None

    def open(self, service: str, owner: str) -> Sequence[Export]:
        """Exports of an owner that are not done, oldest first."""
        return [_export(row) for row in self._rows("open_exports", service=service, owner=owner)]

    def save(self, export: Export) -> None:
        """Store how far it is. Idempotent."""
        with self._database.transaction() as session:
            session.run(
                self._queries["save_export"],
                export_id=export.export_id,
                parts_count=export.parts_count,
                status="done" if export.done else "open",
                asked_at=export.asked_at,
            )

    def forget(self, service: str, owner: str, before: datetime) -> None:
        """Drop exports of an owner that are done and older."""
        with self._database.transaction() as session:
            session.run(self._queries["forget_exports"], service=service, owner=owner, before_at=before)

    def count_call(self, service: str, limit: int, now: datetime) -> None:
        """Count a call that is about to be made. Raises Transient when the day has had `limit` of them."""
        day = floor_to(now, DAY_SECONDS)
        with self._database.transaction() as session:
            if session.run(self._queries["count_call"], service=service, day_at=day, limit_calls=limit):
                return
        raise Transient(
            f"{service}: all {limit} calls of this day are used",
            "nothing to do: it goes on at 00:00 UTC; fewer other programs on the same account leave more",
            retry_after_seconds=(next_midnight(now) - now).total_seconds(),
        )

    def calls(self, service: str, now: datetime) -> int:
        """How many calls this day has had."""
        return self.calls_ever(service, now)[0]

    def calls_ever(self, service: str, now: datetime) -> tuple[int, int]:
        """How many calls this day has had, and all days together, which is never less than it was."""
        (found,) = self._rows("calls_of", service=service, day_at=floor_to(now, DAY_SECONDS))
        return int(found["calls"]), int(found["calls_ever"])

    def _rows(self, query: str, **params: object) -> list[Row]:
        with self._database.transaction(read_only=True) as session:
            return session.rows(self._queries[query], **params)


def _export(row: Row) -> Export:
    return Export(
        export_id=row["export_id"],
        request=row["request"],
        parts_count=row["parts_count"],
        asked_at=row["asked_at"],
        created_at=row["created_at"],
        done=row["status"] == "done",
    )
