"""Both pulls against their simulators, in this process and at any instant: a pause moves the clock, nobody waits."""

import gzip
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from app.amplitude import hours as amplitude_hours
from app.amplitude import job as amplitude_job
from app.amplitude.client import project
from app.amplitude.hours import SourceRun
from app.appmetrica import hours as appmetrica_hours
from app.appmetrica import job as appmetrica_job
from app.appmetrica.client import SERVICE, Exports, resources, service
from app.appmetrica.hours import ResourceRun, hour_key
from app.core.runs import Context, Report, Stop
from app.core.verify import Sign, Verdict, Verification, heal, verify
from app.core.windows import Window
from app.db.state import State, open_state
from app.dwh.tables import TABLES
from app.dwh.warehouse import Warehouse, open_warehouse
from app.object_store.local import LocalDirectory
from app.object_store.port import ObjectStore, Put
from app.object_store.set_aside import SetAsideStore, folder_of
from app.product_events.http_client import Upstream
from app.product_events.pull import PartitionRun, PullContext
from app.product_events.verify import PullChart
from simulators.amplitude import AmplitudeSimulator
from simulators.appmetrica import AppMetricaSimulator

START = datetime(2026, 2, 11, 6, 0, tzinfo=UTC)  # a Wednesday
HOUR = timedelta(hours=1)
OVERDUE_AFTER = timedelta(hours=1, minutes=15)


class Silent:
    def advance(self, *, done: int = 0, total: int = 0, rows: int = 0) -> None:
        """Nobody looks."""


class Clock(Stop):
    """A clock that moves only when somebody pauses; also the stop signal."""

    def __init__(self, now: datetime = START) -> None:
        super().__init__()
        self.now = now
        self.paused: list[float] = []
        self.at_pause: Callable[[float], None] = lambda _seconds: None

    def __call__(self) -> datetime:
        return self.now

    def pause(self, seconds: float) -> None:
        if seconds:
            self.paused.append(seconds)
            self.now += timedelta(seconds=seconds)
            self.at_pause(seconds)
        self.check()


@dataclass
class Landed:
    """Where pulls land: state, warehouse and objects below one folder."""

    folder: Path
    clock: Clock
    state: State = field(init=False)
    warehouse: Warehouse = field(init=False)
    store: ObjectStore = field(init=False)
    warehouse_url: str = ""
    bucket: ObjectStore | None = None
    asked: list[Upstream] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = open_state("", self.folder)
        self.warehouse = open_warehouse(self.warehouse_url, self.folder)
        self.store = self.bucket or LocalDirectory(self.folder / "objects")

    def close(self) -> None:
        for upstream in self.asked:
            upstream.close()
        self.state.close()
        self.warehouse.close()

    def context(self, name: str, *, dry_run: bool = False) -> Context:
        lease = self.state.leases.acquire(name, "test", 3600)
        assert lease is not None
        return Context("run", lease, self.clock, Silent(), dry_run)

    def amplitude(self, simulator: AmplitudeSimulator, *sources: str, lookback_days: int = 0) -> "AmplitudePull":
        spool = self.folder / "spool"
        pull = self.pull_context("amplitude", "lines", amplitude_hours.DUE_AFTER, lookback_days)
        keys = simulator.state.keys
        projects = {source: project(simulator.url, *keys[source], spool) for source in sources or ("web",)}
        self.asked += [each.upstream for each in projects.values()]
        return AmplitudePull(self, pull, projects)

    def appmetrica(
        self, simulator: AppMetricaSimulator, *, lookback_days: int = 1, calls: int = 5000, recount_days: int = 0
    ) -> "MetricaPull":
        spool = self.folder / "spool"

        def count() -> None:
            self.state.pulls.count_call(SERVICE, calls, self.clock())

        asked = service(simulator.url, simulator.state.token, simulator.state.application_id, spool, count)
        self.asked.append(asked.upstream)
        exports = Exports(
            service=asked,
            pulls=self.state.pulls,
            clock=self.clock,
            interval_seconds=5,
            timeout_seconds=300,
            daily_calls=calls,
            zone=appmetrica_job.zone_of(asked, ""),
        )
        pull = self.pull_context("appmetrica", "records", appmetrica_hours.DUE_AFTER, lookback_days)
        return MetricaPull(self, pull, exports, recount_days)

    def pull_context(self, name: str, unit: str, due_after: timedelta, lookback_days: int) -> PullContext:
        return PullContext(
            name=name,
            unit=unit,
            due_after=due_after,
            overdue_after=OVERDUE_AFTER,
            lookback_days=lookback_days,
            checkpoints=self.state.checkpoints,
            store=self.store,
            warehouse=self.warehouse,
            spool=self.folder / "spool",
            clock=self.clock,
            set_aside=SetAsideStore(self.store, folder_of(name), 1 << 26),
        )

    def rows(self, table: str, columns: str = "*") -> list[dict[str, Any]]:
        """All rows, as the warehouse gives them back, without what depends on when they were stored."""
        names = next(each for each in TABLES if each.name == table).names
        wanted = ", ".join(names) if columns == "*" else columns
        with self.warehouse.database.transaction(read_only=True) as session:
            return session.rows(f"SELECT {wanted} FROM {table} ORDER BY {names[0]}")  # noqa: S608 - declared names

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        return {table.name: self.rows(table.name) for table in TABLES}

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        found = {}
        for info in self.store.list(prefix):
            with self.store.open(info.key) as stream:
                assert stream is not None
                found[info.key] = stream.read()
        return found

    def put(self, key: str, body: bytes | None) -> None:
        """Replace an object as another program would, or delete it."""
        if body is None:
            self.store.delete(key)
        else:
            self.store.put(key, io.BytesIO(body), Put("application/octet-stream"))

    def mend(self, job: str, verification: Verification, span: Window) -> tuple[Report, list[Verdict]]:
        """Heal; the verdicts that are not equal."""
        told: list[Verdict] = []
        context = self.context(job)
        report = heal(verification(context.stop), span, context, told.append)
        return report, [each for each in told if each.healed or each.sign is not Sign.EQUAL]

    def signs(self, verification: Verification, span: Window) -> dict[str, str]:
        """The sign of every window that is not equal, by partition and start."""
        found = verify(verification(self.clock), span, self.clock)
        return {name_of(each): each.sign.value for each in found if each.sign is not Sign.EQUAL}

    def lines(self, prefix: str) -> dict[str, list[bytes]]:
        """The lines of gzip objects, sorted: a service gives no order of rows."""
        return {key: sorted(gzip.decompress(body).splitlines()) for key, body in self.objects(prefix).items()}


@dataclass
class AmplitudePull:
    landed: Landed
    pull: PullContext
    projects: Mapping[str, Any]

    def run(self, *, dry_run: bool = False) -> Report:
        return self._each(self.landed.context("amplitude", dry_run=dry_run), SourceRun.pull_due)

    def to_the_end(self) -> Report:
        report = self.run()
        while report.more:
            report = self.run()
        return report

    def fill(self, start: datetime, end: datetime) -> Report:
        return self._each(self.landed.context("amplitude"), lambda run: run.fill(Window(start, end)))

    def _each(self, context: Context, work: Callable[[SourceRun], Report]) -> Report:
        runs = {name: SourceRun(PartitionRun(self.pull, context, name), of) for name, of in self.projects.items()}
        return self.pull.run_each(context, runs, work)

    def verification(self, stop: Stop) -> amplitude_job.AmplitudeEnds:
        return amplitude_job.AmplitudeEnds(self.pull, self.projects, stop)

    @property
    def chart(self) -> amplitude_job.AmplitudeChart:
        return amplitude_job.AmplitudeChart(self.pull)


@dataclass
class MetricaPull:
    landed: Landed
    pull: PullContext
    exports: Exports
    recount_days: int
    resources: Sequence[str] = ("events",)

    def run(self, *, dry_run: bool = False) -> Report:
        return self._each(self.landed.context("appmetrica", dry_run=dry_run), ResourceRun.pull_due)

    def to_the_end(self) -> Report:
        report = self.run()
        while report.more:
            report = self.run()
        return report

    def fill(self, start: datetime, end: datetime) -> Report:
        return self._each(self.landed.context("appmetrica"), lambda run: run.fill(Window(start, end)))

    def _each(self, context: Context, work: Callable[[ResourceRun], Report]) -> Report:
        runs = {}
        for resource in (resources()[name] for name in self.resources):
            run = PartitionRun(self.pull, context, appmetrica_hours.partition_of(self.exports, resource))
            runs[run.name] = ResourceRun(run, self.exports, resource, self.recount_days)
        return self.pull.run_each(context, runs, work)

    def verification(self, stop: Stop) -> appmetrica_job.AppMetricaEnds:
        known = [resources()[name] for name in self.resources]
        return appmetrica_job.AppMetricaEnds(self.pull, self.exports, known, stop)

    @property
    def chart(self) -> PullChart:
        return PullChart(self.pull, hour_key)


def name_of(verdict: Verdict) -> str:
    return f"{verdict.slot.partition} {verdict.slot.window.start:%d %H}"


@contextmanager
def landed(folder: Path, clock: Clock | None = None, warehouse_url: str = "", **given: Any) -> Iterator[Landed]:
    folder.mkdir(parents=True, exist_ok=True)
    with closing(Landed(folder, clock or Clock(), warehouse_url=warehouse_url, **given)) as made:
        yield made


@contextmanager
def pulling(folder: Path, **given: Any) -> Iterator[tuple[Landed, AmplitudeSimulator, AppMetricaSimulator]]:
    """One clock for all of them."""
    with ExitStack() as stack:
        clock = Clock()
        made = stack.enter_context(landed(folder, clock, **given))
        web = stack.enter_context(AmplitudeSimulator(clock=clock))
        yield made, web, stack.enter_context(AppMetricaSimulator(clock=clock))
