"""The export job as the product builds it, with a source, a store, a state and a clock that belong to the test."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.analytics.object_facts import TableSums
from app.config.environment import load_settings
from app.core.partitions import Step, SyncPlan, run_in_process
from app.core.pipeline import NOTHING, Commit
from app.core.runs import Context, Job, LeaseTerms, Outcome, Report, Run, RunServices, Stop, execute
from app.core.windows import Window
from app.db.state import State, open_state
from app.influx_to_s3.job import NAME, RECONCILE, InfluxExport, ObjectSums, build
from app.influx_to_s3.verify import ExportEnds
from app.object_store.local import LocalDirectory
from app.object_store.port import ObjectStore
from app.object_store.set_aside import SetAsideStore, folder_of
from exports import CountingStore, content, exported, objects, stored
from simulators.influx import InfluxSimulator

NOON = datetime(2026, 2, 7, 12, tzinfo=UTC)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)


def ns(instant: datetime) -> int:
    return (instant - EPOCH) // timedelta(microseconds=1) * 1000


class Silent:
    def advance(self, *, done: int = 0, total: int = 0, rows: int = 0) -> None:
        """Nobody looks."""


@dataclass
class Exporter:
    """It is noon of a Saturday until the test moves `now`. Each run is that of a fresh process, unless after `keep`."""

    folder: Path
    influx: InfluxSimulator
    url: str
    store: CountingStore
    state: State
    now: datetime = NOON
    environ: dict[str, str] = field(default_factory=dict)
    built: InfluxExport | None = None
    prefix: str = "telemetry"
    steps: Callable[[Context, SyncPlan, Step], Report] | None = None

    def clock(self) -> datetime:
        return self.now

    def at(self, hours: float = 0, minutes: float = 0) -> datetime:
        """The clock says so many hours and minutes after noon from now on."""
        self.now = NOON + timedelta(hours=hours, minutes=minutes)
        return self.now

    def write(
        self, at: datetime, device: str = "D1", fields: str = "voltage=230.5,current=2,power=450", **tags: str
    ) -> None:
        """A point arrives at the source."""
        given = {"device_type": "pump", "location": "Plant-A", **tags}
        series = ",".join(("device_telemetry", f"device_id={device}", *(f"{k}={v}" for k, v in given.items() if v)))
        self.influx.write(f"{series} {fields} {ns(at)}")

    def write_each(self, start: datetime, end: datetime, every_seconds: float = 60, device: str = "D1") -> int:
        """Points over a time, each with another value; how many."""
        number = 0
        while (at := start + timedelta(seconds=number * every_seconds)) < end:
            self.write(at, device, f"voltage={200 + number % 50}.25,current=1.5,power={number}")
            number += 1
        return number

    def export(self, **environ: str) -> InfluxExport:
        """The pipeline as a process that starts now would build it."""
        given = {
            "DATA_DIR": str(self.folder / "data"),
            "INFLUXDB_URL": self.url,
            "INFLUXDB_TOKEN": self.influx.token,
            "INFLUXDB_ORG": self.influx.org,
            "INFLUXDB_BUCKET": self.influx.bucket,
            "INFLUXDB_TIMEOUT_SECONDS": "10",
            "S3_PREFIX": self.prefix,
            **self.environ,
            **environ,
        }
        settings = load_settings(given, None)
        aside = SetAsideStore(self.store, folder_of(self.prefix), settings.set_aside.max_bytes)
        return build(
            settings,
            self.state.checkpoints,
            self.store,
            set_aside=aside,
            clock=self.clock,
            steps=self.steps or run_in_process,
            sums=ObjectSums(TableSums, self.state.summaries),
        )

    def keep(self, **environ: str) -> None:
        """From now on all runs are those of one process."""
        self.built = self.export(**environ)

    def run(self, name: str = NAME, *, dry_run: bool = False, **environ: str) -> Run:
        export = self.built or self.export(**environ)
        job = next(job for job in export.jobs if job.name == name)
        return self.execute(job.work, name, dry_run=dry_run)

    def execute(self, work: Callable[[Context], Report], name: str = NAME, *, dry_run: bool = False) -> Run:
        run = execute(Job(name, 60, work), self._services(), Stop(), Silent(), dry_run=dry_run)
        assert run is not None
        return run

    def well(self, name: str = NAME, **environ: str) -> Run:
        """A run that has to end well, with all its follow-ups."""
        run = self.run(name, dry_run=False, **environ)
        assert run.outcome is Outcome.OK, f"{run.error} ({run.hint})"
        while run.report.more:
            run = self.run(name, dry_run=False, **environ)
            assert run.outcome is Outcome.OK, f"{run.error} ({run.hint})"
        return run

    def reconcile(self, **environ: str) -> Run:
        return self.well(RECONCILE, **environ)

    def backfill(self, start: datetime, end: datetime, **environ: str) -> Run:
        return self._past("backfill", start, end, dry_run=False, **environ)

    def replace(
        self, start: datetime, end: datetime, *, allow_shrink: bool = False, dry_run: bool = False, **environ: str
    ) -> Run:
        export = self.built or self.export(**environ)
        job = Job(NAME, 60, lambda context: export.replace(context, Window(start, end), allow_shrink))
        run = execute(job, self._services(), Stop(), Silent(), dry_run=dry_run)
        assert run is not None
        assert run.outcome is Outcome.OK, f"{run.error} ({run.hint})"
        return run

    def rewrite(self, start: datetime, end: datetime, *, dry_run: bool = False, **environ: str) -> Run:
        return self._past("rewrite", start, end, dry_run=dry_run, **environ)

    def _past(self, command: str, start: datetime, end: datetime, *, dry_run: bool, **environ: str) -> Run:
        export = self.built or self.export(**environ)
        job = Job(NAME, 60, lambda context: getattr(export, command)(context, Window(start, end)))
        run = execute(job, self._services(), Stop(), Silent(), dry_run=dry_run)
        assert run is not None
        assert run.outcome is Outcome.OK, f"{run.error} ({run.hint})"
        return run

    def old_delta(self, device: str, window: Window, part: int, late: Window) -> str:
        """The points of `late` came after `window` had closed, and an older version wrote them to an object of their
        own, confirmed beside the window's object; its key.
        """
        keys: list[str] = []

        def write(context: Context) -> Report:
            ends = self.export().verification(context.stop)
            assert isinstance(ends, ExportEnds)
            source, checkpoints = ends.opened.pipeline.source, ends.opened.pipeline.checkpoints
            keys.append(ends.opened.sink.key(device, window, part))
            with (
                closing(source.read(device, late, NOTHING, None)) as batch,
                closing(ends.opened.sink.encode(device, window, batch)) as encoded,
            ):
                metadata = {name: text for name, text in encoded.metadata.items() if name not in ("write", "cursor")}
                version = ends.opened.sink.put(keys[0], replace(encoded, metadata=metadata), None)
                [base, *_] = checkpoints.records(NAME, device, window.start, window.end)
                counted = replace(base, source_cells=source.counts(device, [window])[device, window.start].cells)
                delta = replace(
                    counted,
                    part=part,
                    key=keys[0],
                    version=version,
                    digest=batch.digest,
                    rows=batch.rows,
                    size_bytes=encoded.size_bytes,
                    min_at=batch.min_at,
                    max_at=batch.max_at,
                    fields={},
                    source_digest="",
                )
            checkpoints.commit(NAME, device, Commit((counted, delta)), context.lease)
            return Report()

        run = execute(Job(NAME, 60, write), self._services(), Stop(), Silent())
        assert run is not None
        assert run.outcome is Outcome.OK, run.error
        return keys[0]

    def _services(self) -> RunServices:
        return RunServices(
            lambda: datetime.now(UTC), self.state.leases, self.state.runs, LeaseTerms("test"), lambda _run, _error: None
        )

    @property
    def keys(self) -> list[str]:
        return objects(self.store, f"{self.prefix}/")

    @property
    def layout(self) -> Any:
        """What stands in the layout file beside the data."""
        return json.loads(content(self.store, f"{self.prefix}/_headwater/layout.json"))

    @property
    def cursor(self) -> Any:
        return self.state.checkpoints.cursors(NAME).get("D1")

    def check(self, **scope: Any) -> None:
        """The objects hold the source's rows, each once."""
        assert exported(self.store, f"{self.prefix}/") == stored(self.influx.points, **scope)


@pytest.fixture
def exporter(tmp_path: Path) -> Iterator[Exporter]:
    yield from exporter_on(LocalDirectory(tmp_path / "objects"), tmp_path)


def exporter_on(
    store: ObjectStore, folder: Path, prefix: str = "telemetry", shard: timedelta = timedelta(days=7)
) -> Iterator[Exporter]:
    """An exporter with state and spool in `folder` and objects below `prefix`. `shard`: the source's duration."""
    clock: list[Exporter] = []
    with ExitStack() as stack:
        influx = stack.enter_context(InfluxSimulator(now_ns=lambda: ns(clock[0].now), shard_ns=ns(EPOCH + shard)))
        state = open_state("", folder / "data")
        stack.callback(state.close)
        clock.append(Exporter(folder, influx, influx.url, CountingStore(store), state))
        clock[0].prefix = prefix
        yield clock[0]
