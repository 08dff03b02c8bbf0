"""The state of the product in one database: checkpoints, leases, runs, layouts, pauses, open alerts, pulls, summaries.

Invariant: nothing is connected or migrated before the first use, so the daemon starts while PostgreSQL is away.
"""

from dataclasses import dataclass
from pathlib import Path

from app.stores.alerts import SqlAlerts
from app.stores.checkpoints import SqlCheckpoints
from app.stores.clocks import SqlClocks, StateClock
from app.stores.layouts import SqlLayouts
from app.stores.leases import SqlLeases
from app.stores.migrations import Migrated
from app.stores.pauses import SqlPauses
from app.stores.pulls import SqlPulls
from app.stores.run_records import SqlRuns
from app.stores.sql import load_queries, open_database, sql_directory
from app.stores.sqlite import SqliteDatabase
from app.stores.state_file import StateFile
from app.stores.state_tables import StateTables
from app.stores.summaries import SqlSummaries

FILE = "state.db"
VARIABLES = "CHECKPOINT_DATABASE_URL or CHECKPOINT_DB_HOST, _PORT, _NAME, _USER, _PASSWORD"


@dataclass(frozen=True, slots=True)
class State:
    """Everything that the product remembers, on one database."""

    database: Migrated
    file: StateFile | None
    checkpoints: SqlCheckpoints
    leases: SqlLeases
    runs: SqlRuns
    layouts: SqlLayouts
    summaries: SqlSummaries
    pauses: SqlPauses
    pulls: SqlPulls
    alerts: SqlAlerts
    clocks: SqlClocks
    clock: StateClock

    def ping(self) -> None:
        """One round trip. Raises Transient or Permanent when the database cannot be used."""
        with self.database.transaction(read_only=True) as session:
            session.rows("SELECT 1 AS found")

    def check(self) -> None:
        """As `ping`, and look at all that is stored. Transient when that was damaged: it was replaced."""
        with self.database.transaction(read_only=True) as session:
            session.check()

    def note(self) -> str:
        """What a person should know of the state though it can be used; "" for nothing."""
        notes = [self.file.note if self.file else "", self.clocks.note()]
        return "; ".join(filter(None, notes))

    def close(self) -> None:
        """Close all connections. Idempotent."""
        self.database.close()


def open_state(url: str, data_dir: Path) -> State:
    """The state at a database URL, or in SQLite under `data_dir` when it is empty. Raises Permanent for a bad URL."""
    folder = sql_directory() / "state"
    plain = open_database(url, variables=VARIABLES) if url else SqliteDatabase(data_dir / FILE)
    file = StateFile(plain) if isinstance(plain, SqliteDatabase) else None
    database = Migrated(plain, folder, file or StateTables(plain, folder))
    queries = load_queries(folder, database.dialect)
    clock = StateClock()
    return State(
        database=database,
        file=file,
        checkpoints=SqlCheckpoints(database, queries),
        leases=SqlLeases(database, queries, clock),
        runs=SqlRuns(database, queries),
        layouts=SqlLayouts(database, queries),
        summaries=SqlSummaries(database, queries),
        pauses=SqlPauses(database, queries),
        pulls=SqlPulls(database, queries),
        alerts=SqlAlerts(database, queries),
        clocks=SqlClocks(database, queries),
        clock=clock,
    )
