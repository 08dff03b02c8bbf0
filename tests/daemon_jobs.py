"""Jobs for the daemon under test: `python daemon_jobs.py NAME` serves the wiring of that name.

Each job appends to `trace.log` in DATA_DIR when it begins and ends, so that a test sees overlaps across processes.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from app import cli, main
from app.core.errors import Permanent
from app.core.ledger import KeptFile, SetAside, Tally, ledger_of
from app.core.pipeline import Commit, Record
from app.core.runs import Context, Failure, Job, Report, Run, Stop
from app.core.verify import CellState, MapCell, PartitionWindow, WindowContent
from app.core.windows import Window, windows_between
from app.main import ServiceParts
from app.object_store.row_digest import content_of
from app.ops.service import Pipelines

Work = Callable[[Context], Report]


def traced(parts: ServiceParts, name: str, work: Work) -> Work:
    def run(context: Context) -> Report:
        path = parts.settings.service.data_dir / "trace.log"
        note(path, f"begin {name} {os.getpid()}")
        try:
            return work(context)
        finally:
            note(path, f"end {name} {os.getpid()}")

    return run


def note(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def pausing(seconds: float) -> Work:
    def work(context: Context) -> Report:
        context.progress.advance(total=4)
        for _ in range(4):
            context.stop.pause(seconds / 4)
            context.progress.advance(done=1, rows=10)
        return Report(rows=40, bytes=400, windows=4)

    return work


def deaf(_: Context) -> Report:
    time.sleep(60)
    return Report()


def computing(context: Context) -> Report:
    until = time.monotonic() + 20
    while time.monotonic() < until and not context.stop.asked:
        sum(i * i for i in range(200_000))
    return Report()


def failing(_: Context) -> Report:
    raise Permanent("bucket 'b' does not exist", "create it, or set S3_BUCKET")


def breaking(_: Context) -> Report:
    raise RuntimeError("unforeseen <b>markup</b>")


def partial(_: Context) -> Report:
    return Report(rows=3, failures=(Failure("dev-1", "cut stream", "look at the source"),))


def counting(_: Context) -> Report:
    """Two values are set aside, whose sample holds markup, a line end and an escape of a terminal."""
    tally = Tally(counted=18, read=18, new=12, already_there=4)
    sample = "m <b>voltage</b>=1\n\x1b[31m5 password=hunter2 \ud800"
    return Report(rows=12, ledger=ledger_of(tally, SetAside("no device tag", 2, 2, sample), unit="values"))


def more_thrice() -> Work:
    runs = 0

    def work(_: Context) -> Report:
        nonlocal runs
        runs += 1
        return Report(rows=1, more=runs < 3)

    return work


def filling(context: Context, span: Window) -> Report:
    context.progress.advance(total=1)
    context.stop.pause(0.3)
    return Report(rows=span.seconds, windows=1)


def long_job(parts: ServiceParts) -> Pipelines:
    return Pipelines((Job("long", 60, traced(parts, "long", pausing(40))),))


def stuck_job(parts: ServiceParts) -> Pipelines:
    return Pipelines((Job("stuck", 60, traced(parts, "stuck", deaf)),))


def busy_job(parts: ServiceParts) -> Pipelines:
    return Pipelines((Job("busy", 60, traced(parts, "busy", computing)),))


def quick_jobs(parts: ServiceParts) -> Pipelines:
    jobs = (
        Job("quick", 1, traced(parts, "quick", pausing(0.2))),
        Job("failing", 60, failing),
        Job("breaking", 60, breaking),
        Job("partial", 60, partial),
        Job("counting", 60, counting),
        Job("more", 60, traced(parts, "more", more_thrice())),
        Job("sleeping", 60, failing, off="set INFLUXDB_URL"),
    )
    file = parts.settings.service.data_dir / "m v.lp"

    def kept(_: Run) -> Sequence[KeptFile]:
        file.write_bytes(b"m v=1\n")
        return [KeptFile(file.name, 6, path=file), KeptFile("D1/x.txt", 9, key="telemetry/_set_aside/D1/x.txt")]

    return Pipelines(jobs, {"quick": filling}, kept={"counting": kept}, routers=main.wire(parts).routers)


def daily_job(parts: ServiceParts) -> Pipelines:
    return Pipelines((Job("daily", 86_400, traced(parts, "daily", pausing(0.1))),))


def idle_jobs(parts: ServiceParts) -> Pipelines:
    """The product's own routes, whose jobs do not run by themselves."""
    return replace(main.wire(parts), jobs=())


def lagging_job(parts: ServiceParts) -> Pipelines:
    def work(context: Context) -> Report:
        at = parts.clock().replace(microsecond=0)
        for name in ("dev-1", "<img src=x onerror=alert(1)>"):
            parts.state.checkpoints.commit("lagging", name, Commit(cursor_at=at), context.lease)
        return Report(rows=2)

    long = Job("long", 60, pausing(40))
    return Pipelines((Job("lagging", 60, work), long), {"lagging": filling})


class Shelf:
    """A pipeline whose source has ten rows in each of the last hours, and whose destination is a file an hour."""

    def __init__(self, parts: ServiceParts) -> None:
        self.root = parts.settings.service.data_dir / "shelf"
        self.clock = parts.clock

    def open(self, _: Stop) -> "Shelf":
        return self

    def path(self, slot: PartitionWindow) -> Path:
        return self.root / f"{slot.window.start:%H}.txt"

    def hours(self, span: Window) -> list[Window]:
        return [hour for hour in windows_between(span.start, span.end, 3600) if hour.end <= self.clock()]

    def slots(self, span: Window, partition: str | None) -> Iterator[PartitionWindow]:
        yield from (
            PartitionWindow(name, hour)
            for name in self.partitions()
            for hour in self.hours(span)
            if partition in (None, name)
        )

    def source(self, slot: PartitionWindow) -> WindowContent:
        return content_of({"row": f"{slot.window.start:%H}{row}"} for row in range(10))

    def destination(self, slot: PartitionWindow) -> WindowContent:
        while self.root.with_name("hold").exists():  # a test looks at the progress
            time.sleep(0.02)
        path = self.path(slot)
        return content_of({"row": line} for line in (path.read_text().split() if path.exists() else ()))

    def heal(self, context: Context, slot: PartitionWindow) -> Report:
        self.root.mkdir(exist_ok=True)
        self.path(slot).write_text("\n".join(f"{slot.window.start:%H}{row}" for row in range(10)))
        return Report(rows=10, windows=1)

    def partitions(self, _: Window | None = None) -> list[str]:
        return ["shelf <b>one</b>"]

    def cells(self, partition: str, span: Window) -> list[MapCell]:
        held = [(hour, self.path(PartitionWindow(partition, hour)).exists()) for hour in self.hours(span)]
        return [MapCell(hour, CellState.EQUAL if there else CellState.MISSING, 10, int(there)) for hour, there in held]

    def work(self, context: Context) -> Report:
        context.progress.advance(total=2, done=1)
        context.stop.pause(0.2)
        now = self.clock()
        if not self.root.exists():  # only the first run writes: what is missing later is for the test to heal
            for slot in self.slots(Window(now - timedelta(hours=24), now), None):
                self.heal(context, slot)
        return Report(rows=10, windows=1)


def shelf(parts: ServiceParts) -> Pipelines:
    one = Shelf(parts)
    jobs = (
        Job("shelf", 60, one.work),
        Job("failing", 60, failing),
        Job("sleeping", 60, failing, off="set INFLUXDB_URL"),
    )
    return Pipelines(jobs, {"shelf": filling}, verifications={"shelf": one.open}, charts={"shelf": one})


class Fleet(Shelf):
    """As many partitions that the records tell of them, in groups and on pages."""

    def partitions(self, _: Window | None = None) -> list[str]:
        return [f"D{number:03}" for number in range(520)]


def unclosing(_: Context, runs: list[int]) -> Report:
    """Each row is accounted for in the first run, all but two in those that follow."""
    runs.append(len(runs))
    tally = Tally(counted=18, read=18, new=12, already_there=4 if runs[-1] else 6)
    return Report(rows=12, windows=1, ledger=ledger_of(tally, unit="rows"))


def delivered(parts: ServiceParts) -> Pipelines:
    """All is well, until somebody runs `unclosing` again."""
    one, many = Shelf(parts), Fleet(parts)

    def commit(context: Context) -> Report:
        end = parts.clock().replace(minute=0, second=0, microsecond=0)
        start = end - timedelta(hours=1)
        last = Record(Window(start, end), 0, "key", "v", "d", 1, 100, 1, start, start, closed=True)
        parts.state.checkpoints.commit_all(
            "fleet", [(name, Commit((last,), end)) for name in many.partitions()], context.lease
        )
        return Report(rows=520)

    jobs = (
        Job("shelf", 3600, one.work),
        Job("shelf_late", 3600, lambda _: Report(), helper_of="shelf"),
        Job("fleet", 3600, commit),
        Job("unclosing", 3600, functools.partial(unclosing, runs=[])),
        Job("sleeping", 60, failing, off="set INFLUXDB_URL"),
    )
    backfills = {"shelf": filling, "fleet": filling}
    return Pipelines(jobs, backfills, verifications={"shelf": one.open}, charts={"shelf": one, "fleet": many})


if __name__ == "__main__":
    wiring = globals()[sys.argv[1]]
    build = main.build
    main.build = functools.partial(build, wiring=wiring)  # the one seam of serve
    sys.exit(cli.main(sys.argv[2:]))
