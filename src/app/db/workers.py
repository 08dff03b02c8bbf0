"""Workers in the state database: which are alive, and their reports on steps of plans.

Invariant: only one plan takes a report, so that no row is counted twice.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta

from app.core.ledger import from_json, to_json
from app.core.runs import Failure, Report
from app.db.database import Repository, now_of
from app.db.leases import FREE

KEPT = timedelta(days=1)
NUMBERS = (
    "rows", "bytes", "windows", "late_rows", "more", "corrected_rows", "removed_rows", "written_new_rows"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepReport:
    """The report of one step. `plan_id`: the run that planned it, which may have ended. `requests`: see `Run`."""

    plan_id: str
    step: str
    report: Report
    requests: Mapping[str, float] = field(default_factory=dict)


class SqlWorkers(Repository):
    """Raises what `Session` raises."""

    def see(self, owner: str) -> None:
        """Record that a worker is alive."""
        with self._queries.database.transaction() as session:
            now_at = now_of(session, self._queries)
            session.run(self._queries["see_worker"], owner=owner, now_at=now_at)

    def forget(self, owner: str) -> None:
        """Record that a worker ended; those that did not report it are deleted after a day."""
        with self._queries.database.transaction() as session:
            before_at = now_of(session, self._queries) - KEPT
            session.run(self._queries["forget_workers"], owner=owner, before_at=before_at)

    def alive(self, seconds: float) -> int:
        """The number of workers seen in the last `seconds`."""
        with self._reading() as (session, now):
            since_at = now - timedelta(seconds=seconds)
            return int(session.rows(self._queries["workers_alive"], since_at=since_at)[0]["workers"])

    def parts_held(self, pipeline: str) -> int:
        """How many parts of a pipeline's work are in progress."""
        with self._reading() as (session, now):
            of = {"prefix": f"{pipeline}/", "free": FREE, "now_at": now}
            return int(session.rows(self._queries["parts_held"], **of)[0]["parts"])

    def save_report(self, pipeline: str, done: StepReport) -> None:
        """Store a report until a plan takes it. Idempotent."""
        report = done.report
        document = {name: getattr(report, name) for name in NUMBERS} | {
            "failures": [asdict(each) for each in report.failures],
            "ledger": to_json(report.ledger) if report.ledger else {},
            "requests": dict(done.requests),
        }
        with self._queries.database.transaction() as session:
            session.run(
                self._queries["save_step_report"],
                pipeline=pipeline,
                plan_id=done.plan_id,
                step=done.step,
                report=json.dumps(document),
                now_at=now_of(session, self._queries),
            )

    def take_reports(self, pipeline: str) -> Sequence[StepReport]:
        """Take all reports that no plan has taken."""
        with self._queries.database.transaction() as session:
            rows = session.rows(self._queries["take_step_reports"], pipeline=pipeline)
        reports = []
        for row in rows:
            document = json.loads(row["report"])
            requests = document.pop("requests", {})  # earlier versions did not store requests
            document["failures"] = tuple(Failure(**each) for each in document["failures"])
            document["ledger"] = from_json(document["ledger"])
            reports.append(StepReport(row["plan_id"], row["step"], Report(**document), requests))
        return reports
