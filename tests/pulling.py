"""Both pulls against their simulators, in this process and at any instant: a pause moves the clock, nobody waits."""

import gzip
import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from app.amplitude.job import AmplitudePull
from app.appmetrica.client import Exports
from app.appmetrica.job import AppMetricaPull
from app.config.environment import load_settings
from app.core.runs import Context, Report, Stop
from app.core.verify import ComparedWindow, GapMapSource, Verdict, Verification, heal, verify
from app.core.windows import Window
from app.db.state import State, open_state
from app.dwh.tables import TABLES
from app.dwh.warehouse import Warehouse, open_warehouse
from app.object_store.local import LocalDirectory
from app.object_store.port import ObjectStore, PutRequest
from app.product_events.http_client import Upstream
from app.product_events.pull import PullPipeline
from simulators.amplitude import AmplitudeSimulator
from simulators.appmetrica import AppMetricaSimulator

START = datetime(2026, 2, 11, 6, 0, tzinfo=UTC)  # a Wednesday
HOUR = timedelta(hours=1)


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

    def amplitude(self, simulator: AmplitudeSimulator, *sources: str, lookback_days: int = 0) -> "Pull":
        environ = {**simulator.environment(*sources or ("web",)), "AMPLITUDE_LOOKBACK_DAYS": str(lookback_days)}
        settings = load_settings(self.environ | environ, None)
        made = AmplitudePull(settings, self.state.checkpoints, self.store, self.warehouse, self.clock)
        self.asked += [each.upstream for each in made.projects.values()]
        return Pull(self, made)

    def appmetrica(self, simulator: AppMetricaSimulator, **given: object) -> "Pull":
        """`given`: variables without their prefix; two attempts at a file are five seconds apart."""
        chosen = {"lookback_days": 1, "recount_days": 0, "poll_interval_seconds": 5, **given}
        environ = {f"APPMETRICA_{name.upper()}": str(value) for name, value in chosen.items()}
        settings = load_settings(self.environ | simulator.environment() | environ, None)
        made = AppMetricaPull(
            settings, self.state.checkpoints, self.store, self.warehouse, self.clock, self.state.pulls
        )
        self.asked.append(made.application.upstream)
        return Pull(self, made)

    @property
    def environ(self) -> dict[str, str]:
        return {"DATA_DIR": str(self.folder), "ALERT_GRACE_SECONDS": "900"}

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
            self.store.put(key, io.BytesIO(body), PutRequest("application/octet-stream"))

    def mend(self, job: str, verification: Verification, span: Window) -> tuple[Report, list[ComparedWindow]]:
        """Heal; the verdicts that are not equal."""
        told: list[ComparedWindow] = []
        context = self.context(job)
        report = heal(verification(context.stop), span, context, told.append)
        return report, [each for each in told if each.healed or each.sign is not Verdict.EQUAL]

    def signs(self, verification: Verification, span: Window) -> dict[str, str]:
        """The sign of every window that is not equal, by partition and start."""
        found = verify(verification(self.clock), span, self.clock)
        return {name_of(each): each.sign.value for each in found if each.sign is not Verdict.EQUAL}

    def lines(self, prefix: str) -> dict[str, list[bytes]]:
        """The lines of gzip objects, sorted: a service gives no order of rows."""
        return {key: sorted(gzip.decompress(body).splitlines()) for key, body in self.objects(prefix).items()}


@dataclass
class Pull:
    """A pipeline whose runs are made here, one after the other."""

    landed: Landed
    pipeline: PullPipeline

    @property
    def exports(self) -> Exports:
        assert isinstance(self.pipeline, AppMetricaPull)
        return self.pipeline.application

    @property
    def chart(self) -> GapMapSource:
        return self.pipeline.chart

    @property
    def verification(self) -> Verification:
        return self.pipeline.verification

    def run(self, *, dry_run: bool = False) -> Report:
        return self.pipeline.job.work(self.landed.context(self.pipeline.name, dry_run=dry_run))

    def to_the_end(self) -> Report:
        report = self.run()
        while report.more:
            report = self.run()
        return report

    def fill(self, start: datetime, end: datetime) -> Report:
        return self.pipeline.backfill(self.landed.context(self.pipeline.name), Window(start, end))


def name_of(verdict: ComparedWindow) -> str:
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
