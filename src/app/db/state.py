"""The state of the product in one database: runs, pauses, alerts and exports, together with checkpoints and leases."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from app.core.errors import Transient
from app.core.ledger import to_json
from app.core.runs import VALUES, LedgerTotal, Outcome, Report, Run, RunTotal
from app.core.windows import DAY_SECONDS, HOUR_SECONDS, floor_to, next_midnight
from app.db.checkpoints import SqlCheckpoints
from app.db.database import Database, NamedQueries, Repository, sql_directory, storable
from app.db.leases import AHEAD, SqlClocks, SqlLeases, StateClock
from app.db.migrations import MigratedDatabase, StateFile, check_state_tables, open_database
from app.db.object_summaries import SqlSummaries
from app.db.page_queries import NUMBERS, SqlPages, numbers_of, run_of
from app.db.sqlite import SqliteDatabase
from app.db.workers import SqlWorkers


class SqlPauses(Repository):
    """Which jobs are paused: shared by all processes, survives restarts. Raises what `Session` raises."""

    def paused(self) -> Mapping[str, datetime]:
        """Job -> when it was paused."""
        return {row["job"]: row["paused_at"] for row in self._queries.rows("paused")}

    def pause(self, job: str, at: datetime, by: str) -> None:
        """Pause a job. Idempotent; the first caller is kept."""
        self._queries.run("pause", job=job, at=at, by=by)

    def resume(self, job: str) -> None:
        """Resume a job. Idempotent."""
        self._queries.run("resume", job=job)


@dataclass(frozen=True, slots=True)
class DashboardSession:
    """A sign-in with a key, identified by its name and SHA-256 (hex)."""

    key_name: str
    key_hash: str
    ends_at: datetime


class SqlSessions(Repository):
    """Sign-in sessions, by the SHA-256 of a token. Raises what `Session` raises."""

    def find(self, token_hash: str) -> DashboardSession | None:
        """The session, even if it has expired; None when there is none."""
        return next((DashboardSession(**row) for row in self._queries.rows("session", token_hash=token_hash)), None)

    def begin(self, token_hash: str, begun: DashboardSession, now: datetime) -> None:
        """Store a session; delete those that expired before `now`."""
        self._queries.run("forget_sessions", now=now)
        self._queries.run("begin_session", token_hash=token_hash, **asdict(begun))

    def end(self, token_hash: str) -> None:
        """Delete a session. Idempotent."""
        self._queries.run("end_session", token_hash=token_hash)


class SqlAlerts(Repository):
    """Active alerts of jobs, shared by all processes. Raises what `Session` raises.

    Beginning and ending an alert is each one statement that returns True to only one caller, so only one of several
    processes sends it.
    """

    def told(self) -> Mapping[tuple[str, str], datetime]:
        """Job and event -> when the alert began."""
        return {(row["job"], row["event"]): row["told_at"] for row in self._queries.rows("open_alerts")}

    def begin(self, job: str, event: str, at: datetime) -> bool:
        """True for the one caller that begins the alert and has to send it; False while it is active already."""
        return self._changed("begin_alert", job=job, event=event, at=at)

    def end(self, job: str, before: datetime, event: str | None = None) -> bool:
        """End the alerts of its runs begun before that time, or only `event`. True for the caller that ended them."""
        if event is None:
            return self._changed("end_alerts", job=job, before=before)
        return self._changed("end_alert", job=job, event=event, before=before)

    def _changed(self, query: str, **params: object) -> bool:
        with self._queries.database.transaction() as session:
            return bool(session.rows(self._queries[query], **params))


# State of exports: the requests sent to export services, and how many calls each day has had.
#
# Invariants: a request keeps its number and its text, since the text identifies the export on the server; a call is
# counted before it is made, so a day never exceeds its limit, whatever happens to the responses.

ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class PendingExport:
    """One request. `asked_at` None: the service may not have received it. `done`: its file was ingested."""

    export_id: int
    request: str
    parts_count: int
    asked_at: datetime | None
    created_at: datetime
    done: bool = False


class SqlPulls(Repository):
    """Exports by service and owner, calls by service and UTC day. Raises what `Session` raises."""

    def add(self, service: str, owner: str, request: str, now: datetime) -> PendingExport:
        """The export of this request, new or existing. Idempotent."""
        named = {"service": service, "owner": owner, "request": request}
        for _ in range(ATTEMPTS):  # another process may take the same number at the same time
            with self._queries.database.transaction() as session:
                session.run(self._queries["add_export"], **named, parts_count=1, created_at=now)
                session.run(self._queries["date_export"], **named, created_at=now)
                if rows := session.rows(self._queries["export_of"], **named):
                    return PendingExport(**rows[0])
        raise Transient("other processes are creating exports at the same time", "send the same request again")

    def find(self, service: str, export_id: int) -> PendingExport | None:
        """The export with that number; None when it was never assigned."""
        found = self._queries.rows("export_by_id", service=service, export_id=export_id)
        return PendingExport(**found[0]) if found else None

    def open(self, service: str, owner: str) -> Sequence[PendingExport]:
        """Unfinished exports of an owner, oldest first."""
        return [PendingExport(**row) for row in self._queries.rows("open_exports", service=service, owner=owner)]

    def save(self, export: PendingExport) -> None:
        """Store the progress of an export. Idempotent."""
        self._queries.run(
            "save_export",
            export_id=export.export_id,
            parts_count=export.parts_count,
            status="done" if export.done else "open",
            asked_at=export.asked_at,
        )

    def forget(self, service: str, owner: str, before: datetime) -> None:
        """Delete finished exports of an owner that are older than `before`."""
        self._queries.run("forget_exports", service=service, owner=owner, before_at=before)

    def count_call(self, service: str, limit: int, now: datetime) -> None:
        """Count a call before it is made. Raises Transient when the day has reached `limit`."""
        day = floor_to(now, DAY_SECONDS)
        if not self._queries.run("count_call", service=service, day_at=day, limit_calls=limit):
            raise Transient(
                f"{service}: all {limit} calls of today are used",
                "no action needed; it continues at 00:00 UTC; other programs on the same account share this limit",
                retry_after_seconds=(next_midnight(now) - now).total_seconds(),
            )

    def calls(self, service: str, now: datetime) -> int:
        """The number of calls on this day."""
        return self.calls_ever(service, now)[0]

    def calls_ever(self, service: str, now: datetime) -> tuple[int, int]:
        """The number of calls on this day, and over all days, which never falls."""
        (found,) = self._queries.rows("calls_of", service=service, day_at=floor_to(now, DAY_SECONDS))
        return int(found["calls"]), int(found["calls_ever"])


# The record of runs.
#
# Invariants: a job's latest runs are kept and older ones deleted when a run is saved, so the table stays bounded; each
# run that ends is added to the totals once, in the transaction that records its end.

KEPT_RUNS = 1000
KEPT_SLOTS = timedelta(days=35)
SLOT_SECONDS = 900  # in every time zone the day begins on a quarter of an hour


class SqlRuns(Repository):
    """See `app.core.runs.Runs`."""

    def __init__(self, queries: NamedQueries, *, kept: int = KEPT_RUNS) -> None:
        super().__init__(queries)
        self._kept = kept

    def save(self, run: Run) -> None:
        """See `Runs.save`; deletes the job's oldest runs beyond the number to keep."""
        columns = _columns(run)
        with self._queries.database.transaction() as session:
            ends = run.ended_at is not None and not session.rows(self._queries["is_counted"], run_id=run.run_id)
            session.run(self._queries["save_run"], **columns)
            if ends and run.ended_at is not None:
                session.run(self._queries["correct_totals"], job=run.job, ended_at=run.ended_at)
                sums = {name: columns[name] for name in ("job", "outcome", *NUMBERS, "new_rows", "ended_at")}
                session.run(self._queries["add_total"], **sums)
                session.run_many(self._queries["add_ledger_total"], list(_ledger_sums(run)))
                ledger = run.report.ledger
                corrected = 0 if ledger.unit == VALUES else ledger.total.corrected
                session.run(
                    self._queries["add_new_rows"],
                    job=run.job,
                    slot_at=floor_to(run.ended_at, SLOT_SECONDS),
                    new_rows=run.report.new_rows,
                    updated_rows=run.report.corrected_rows or corrected,
                    # Rows set aside are reported as such; the run has not failed.
                    failed_runs=int(
                        run.outcome is Outcome.FAILED or bool(run.report.failures and not ledger.newly_set_aside)
                    ),
                )
                if run.report.new_rows:
                    session.run(self._queries["prune_new_rows"], job=run.job, before_at=run.ended_at - KEPT_SLOTS)
            prune = {"job": run.job, "until_at": run.started_at, "kept_before": self._kept - 1}
            session.run(self._queries["prune_runs"], **prune)

    def recent(self, job: str | None, limit: int) -> Sequence[Run]:
        """See `Runs.recent`."""
        if job is None:
            return self._runs("recent_runs", limit=limit)
        return self._runs("recent_runs_of_job", job=job, limit=limit)

    def last_ended(self, job: str) -> Run | None:
        """The latest ended run, whatever its outcome; None when there is none."""
        return next(iter(self._runs("last_ended", job=job, limit=1)), None)

    def since_done_seconds(self, job: str) -> float | None:
        """See `Runs.since_done_seconds`."""
        with self._reading() as (session, now):
            rows = session.rows(self._queries["last_done"], job=job, until_at=now + AHEAD)
        return max((now - rows[0]["started_at"]).total_seconds(), 0.0) if rows else None

    def totals(self) -> Sequence[RunTotal]:
        """The sums over all runs that ever ended, by job and outcome. They never fall."""
        return [
            RunTotal(row["job"], Outcome(row["outcome"]), row["runs"], Report(**numbers_of(row)), row["ended_at"])
            for row in self._queries.rows("totals")
        ]

    def ledger_totals(self) -> Sequence[LedgerTotal]:
        """The sums of the ledgers of all runs that ever ended, by job, entry and reason. They never fall."""
        return [LedgerTotal(**row) for row in self._queries.rows("ledger_totals")]

    def _runs(self, query: str, **params: Any) -> Sequence[Run]:
        with self._reading() as (session, now):
            return [run_of(row) for row in session.rows(self._queries[query], **params, until_at=now + AHEAD)]


def _ledger_sums(run: Run) -> Iterator[dict[str, Any]]:
    """What a run adds to the sums. A job whose run kept a ledger has its entries even while they are 0."""
    ledger = run.report.ledger
    if ledger:
        of = {"job": run.job, "reason": ""}
        yield {**of, "entry": "new", "number": ledger.total.new}
        yield {**of, "entry": "corrected", "number": ledger.total.corrected}
    for one in ledger.set_aside:
        yield {"job": run.job, "entry": "set_aside", "reason": storable(one.reason), "number": one.new}


def _columns(run: Run) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "job": run.job,
        "started_at": run.started_at,
        "ended_at": run.ended_at,
        "outcome": run.outcome.value,
        **{name: getattr(run.report, name) for name in (*NUMBERS, "new_rows")},
        "failures": json.dumps([asdict(failure) for failure in run.report.failures]),
        "more": run.report.more,
        "error": storable(run.error),
        "hint": storable(run.hint),
        "ledger": json.dumps(_ledger_document(run), separators=(",", ":")),
    }


def _ledger_document(run: Run) -> dict[str, Any]:
    """The ledger and, in the same column, what else is known of the run. Most runs have nothing to say: then nothing is
    stored, since it would be half of the table; nor are zeros, except in the totals. An earlier version reads the
    ledger's own keys, all of them or none.
    """
    document = dict(to_json(run.report.ledger)) if run.report.ledger else {}
    for part in ("fields", "partitions") if document else ():
        tallies = document[part].items()
        document[part] = {name: {entry: n for entry, n in tally.items() if n} for name, tally in tallies}
    more = {"started_by": storable(run.started_by), "requests": run.requests}
    document |= {name: value for name, value in more.items() if value}
    return document | {"is_kept": bool(run.report.ledger)} if document else {}


# Requests that an outside system charges for, summed by hour: every process adds what it sent.

ESTIMATED_FROM = timedelta(days=7)
KEPT = timedelta(days=31)


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """Sums by kind, and the seconds from the first to the last moment they cover."""

    by_kind: Mapping[str, float]
    span_seconds: float


class SqlRequestCounts(Repository):
    """Raises what `Session` raises."""

    def add(self, by_kind: Mapping[str, float], first_at: datetime, last_at: datetime) -> None:
        """Add what was sent between two moments, and delete hours that are no longer needed."""
        hour_at = floor_to(last_at, HOUR_SECONDS)
        of = {"hour_at": hour_at, "first_at": first_at, "last_at": last_at}
        with self._queries.database.transaction() as session:
            counted = [{**of, "kind": kind, "requests": number} for kind, number in sorted(by_kind.items())]
            session.run_many(self._queries["add_requests"], counted)
            session.run(self._queries["forget_requests_counted"], before_at=hour_at - KEPT)

    def recent(self, now: datetime) -> RequestCounts:
        """The last seven days."""
        rows = self._queries.rows("requests_between", since_at=now - ESTIMATED_FROM, until_at=now)
        by_kind: dict[str, float] = {}
        for row in rows:
            by_kind[row["kind"]] = by_kind.get(row["kind"], 0.0) + row["requests"]
        if not rows:
            return RequestCounts({}, 0.0)
        first_at, last_at = min(row["first_at"] for row in rows), max(row["last_at"] for row in rows)
        return RequestCounts(by_kind, (last_at - first_at).total_seconds())


# All of it on one database.
#
# Invariant: no connection or migration before the first use, so the daemon starts while PostgreSQL is unavailable.

FILE = "state.db"
VARIABLES = "CHECKPOINT_DATABASE_URL or CHECKPOINT_DB_HOST, _PORT, _NAME, _USER, _PASSWORD"
CONNECTIONS = 4  # per process: commits are batched, and a server has about a hundred for all


class State:
    """All persistent state of the product, on one database. `run_records`: the runs to keep for each job. `file` is
    None on PostgreSQL.
    """

    def __init__(self, plain: Database, *, run_records: int) -> None:
        folder = sql_directory() / "state"
        self.file = StateFile(plain) if isinstance(plain, SqliteDatabase) else None
        self.database = MigratedDatabase(plain, folder, self.file, check=partial(check_state_tables, plain, folder))
        self.clock = StateClock()
        queries = NamedQueries(self.database, folder)
        self.checkpoints = SqlCheckpoints(queries)
        self.leases = SqlLeases(queries, self.clock)
        self.runs = SqlRuns(queries, kept=run_records)
        self.summaries = SqlSummaries(queries)
        self.pauses = SqlPauses(queries)
        self.sessions = SqlSessions(queries)
        self.pulls = SqlPulls(queries)
        self.alerts = SqlAlerts(queries)
        self.requests = SqlRequestCounts(queries)
        self.clocks = SqlClocks(queries)
        self.pages = SqlPages(queries)
        self.workers = SqlWorkers(queries)

    def ping(self) -> None:
        """One round trip. Raises Transient or Permanent when the database cannot be used."""
        self.database.ping()

    def check(self) -> None:
        """As `ping`, and check all stored data. Transient when it was damaged: it was replaced."""
        with self.database.transaction(read_only=True) as session:
            session.check()

    def note(self) -> str:
        """What an operator should know about the state although it works; "" for nothing."""
        notes = [self.file.note if self.file else "", self.clocks.note()]
        return "; ".join(filter(None, notes))

    def close(self) -> None:
        """Close all connections. Idempotent."""
        self.database.close()


def open_state(url: str, data_dir: Path, *, run_records: int = KEPT_RUNS) -> State:
    """The state at a database URL, or in SQLite under `data_dir` when it is "". Raises Permanent for an invalid URL."""
    database = open_database(url, variables=VARIABLES, default=data_dir / FILE, connections=CONNECTIONS)
    return State(database, run_records=run_records)
