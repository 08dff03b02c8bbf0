"""What both pulls share around their hours: partitions one by one, spans filled again, silence, lines set aside."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import pytest

from app.config.environment import load_settings
from app.config.settings import AmplitudeSettings
from app.core.errors import AppError, LeaseLost, Permanent, Rejected
from app.core.ledger import SetAside, Tally
from app.core.pipeline import NEVER_AFTER, QUIET_AFTER, USUAL_HOURS, Commit
from app.core.runs import Context, NoProgress, Report, Stop
from app.core.windows import Window
from app.object_store.local import LocalDirectory
from app.object_store.set_aside import SetAsideStore, folder_of
from app.product_events.hours import HOUR, LARGE_BYTES, PartitionRun, PulledHour, RefusedLines, record_of_nothing
from app.product_events.mapping import EVENTS_TABLE, LOAD_EVENTS, EventRows, Tables, load_hour, uuids_in
from app.product_events.pull import PullPipeline
from memory import MemoryCheckpoints, MemoryLeases

if TYPE_CHECKING:
    from app.object_store.port import ObjectStore
    from app.product_events.mapping import EventWarehouse

NOW = datetime(2026, 2, 11, 6, 30, tzinfo=UTC)
DUE = datetime(2026, 2, 11, 4, 0, tzinfo=UTC)


@dataclass
class Partition(PartitionRun):
    """A partition that does what it is told, and notes which hours were asked for again."""

    due: Report = field(default_factory=Report)
    fault: AppError | None = None
    again: list[Window] = field(default_factory=list)
    filled: Report = field(default_factory=Report)

    def pull_due(self) -> Report:
        if self.fault:
            raise self.fault
        return self.due

    def pull_again(self, hours: Window) -> Report:
        self.again.append(hours)
        return self.filled


@dataclass(frozen=True)
class ToldPull(PullPipeline):
    """A pull of these partitions."""

    name, unit, due_after = "amplitude", "lines", timedelta(hours=2, minutes=30)
    off, checks = "", ()

    told: "list[Partition]"

    @property
    def partitions(self) -> list[str]:
        return [each.name for each in self.told]

    def run(self, context: Context, partition: str) -> "Partition":
        del context
        return next(each for each in self.told if each.name == partition)

    @property
    def given(self) -> AmplitudeSettings:
        return self.settings.amplitude

    def key(self, partition: str, window: Window) -> str:
        return f"{partition}/{window}"

    def place(self, partition: str, window: Window) -> tuple[str, ...]:
        return partition, str(window)

    def opened(self, partition: str, window: Window, file: BinaryIO, stop: Stop) -> PulledHour:
        raise AssertionError(f"nothing here reads the object of {partition} {window}")

    def ask(self, *asked: object) -> Any:
        raise AssertionError(f"nothing here asks for {asked}")


class Probed:
    """A store that does not say that it honours conditions, until it was tried."""

    conditional = False
    probed = 0

    def probe(self) -> None:
        self.probed += 1
        self.conditional = True


@dataclass
class Made:
    """A pull of these partitions over checkpoints in memory."""

    folder: Path
    leases: MemoryLeases = field(default_factory=MemoryLeases)
    partitions: list[Partition] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.checkpoints, self.store = MemoryCheckpoints(self.leases), Probed()
        settings = load_settings({"DATA_DIR": str(self.folder)}, None)
        warehouse = cast("EventWarehouse", None)
        store = cast("ObjectStore", self.store)
        self.pipeline = ToldPull(settings, self.checkpoints, store, warehouse, lambda: NOW, self.partitions)

    def context(self, *, dry_run: bool = False) -> Context:
        lease = self.leases.acquire("amplitude", "test", 3600)
        assert lease is not None
        return Context("run", lease, Stop(), NoProgress(), dry_run)

    def add(self, name: str = "web", *, dry_run: bool = False) -> Partition:
        self.partitions.append(Partition(self.pipeline, self.context(dry_run=dry_run), name))
        return self.partitions[-1]

    def record(self, start: datetime, hours: int, *, rows: int = 0, cursor_at: datetime | None = None) -> None:
        """Hours from `start` on, each with so many rows."""
        windows = [Window(start + number * HOUR, start + (number + 1) * HOUR) for number in range(hours)]
        records = tuple(replace(record_of_nothing(each, "k", closed=True), rows=rows) for each in windows)
        self.checkpoints.commit("amplitude", "web", Commit(records, cursor_at), self.context().lease)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def test_a_run_does_what_is_due_of_each_partition_and_tries_the_store_once(made: Made) -> None:
    made.add("mobile").due, made.add("web").due = Report(rows=2), Report(rows=3, more=True)
    report = made.pipeline.job.work(made.context())
    assert (report.rows, report.more, report.failures) == (5, True, ())
    made.pipeline.job.work(made.context())
    assert made.store.probed == 1
    assert (made.folder / "spool").is_dir()


def test_a_partition_that_fails_is_noted_and_the_others_go_on(made: Made) -> None:
    made.add("mobile").fault, made.add("web").due = Permanent("no", "do this"), Report(rows=3)
    report = made.pipeline.job.work(made.context(dry_run=True))
    assert (report.rows, made.checkpoints.errors) == (3, {})
    report = made.pipeline.job.work(made.context())
    assert [(each.partition, each.message, each.hint) for each in report.failures] == [("mobile", "no", "do this")]
    assert made.checkpoints.errors == {("amplitude", "mobile"): "no (do this)"}


def test_a_lost_lease_ends_the_run(made: Made) -> None:
    made.add("mobile").fault = LeaseLost("gone")
    made.add("web").due = Report(rows=3)
    told = made.context()
    with pytest.raises(LeaseLost):
        made.pipeline.job.work(told)
    assert told.done.total.rows == 0


def test_the_ledger_lists_the_whole_of_a_partition_of_which_a_part_was_set_aside(made: Made) -> None:
    web = made.add("web")
    made.add("mobile").due = web.ledger(Tally(counted=3, new=3))
    web.due = web.ledger(Tally(counted=5, new=5)) + web.ledger(Tally(counted=2), SetAside("not JSON", 2, 2))
    ledger = made.pipeline.job.work(made.context()).ledger
    assert ledger.partitions == {"web": Tally(counted=7, new=5, set_aside=2)}
    assert ledger.total == Tally(counted=10, new=8, set_aside=2)


@pytest.mark.parametrize(
    ("start", "end", "first", "last"),
    [
        (timedelta(hours=1, minutes=20), timedelta(hours=3), 1, 3),
        (timedelta(hours=1), timedelta(hours=2, minutes=1), 1, 3),
        (timedelta(hours=2), timedelta(hours=9), 2, 4),
    ],
)
def test_whole_hours_up_to_the_cursor_are_pulled_again(
    made: Made, start: timedelta, end: timedelta, first: int, last: int
) -> None:
    one, midnight = made.add(), DUE - 4 * HOUR
    made.record(midnight, 4, cursor_at=DUE)
    one.filled = one.ledger(Tally(counted=7, new=2, already_there=5))
    report = made.pipeline.backfill(made.context(), Window(midnight + start, midnight + end))
    assert one.again == [Window(midnight + first * HOUR, midnight + last * HOUR)]
    left = "; the job itself pulls those from 2026-02-11T04:00Z on" if end > timedelta(hours=4) else ""
    told = f"web: {last - first} hours asked for again: 2 lines are new, 5 were there{left}"
    assert list(report.notes) == [told]


def test_a_span_up_to_the_cursor_leaves_nothing_to_the_job(made: Made) -> None:
    made.add()
    made.record(DUE - HOUR, 1, cursor_at=DUE)
    report = made.pipeline.backfill(made.context(), Window(DUE - HOUR, DUE))
    assert list(report.notes) == ["web: 1 hours asked for again: 0 lines are new, 0 were there"]


@pytest.mark.parametrize("cursor_at", [None, DUE - HOUR, DUE + 9 * HOUR])
def test_a_fill_of_nothing_is_an_error_and_no_hour_is_asked_for_before_it_is_due(
    made: Made, cursor_at: datetime | None
) -> None:
    one, until = made.add(), min(cursor_at or DUE, DUE)
    if cursor_at:
        made.record(DUE - 2 * HOUR, 1, cursor_at=cursor_at)
    report = made.pipeline.backfill(made.context(), Window(until, until + HOUR))
    assert [each.message[:19] for each in report.failures] == ["nothing was filled:"]
    assert one.again == []
    made.pipeline.backfill(made.context(), Window(until - HOUR, until + HOUR))
    assert one.again == [Window(until - HOUR, until)]


def test_a_fill_that_waits_for_a_file_says_nothing_yet(made: Made) -> None:
    made.add().filled = Report(rows=4, more=True)
    report = made.pipeline.backfill(made.context(), Window(DUE - HOUR, DUE))
    assert (report.rows, report.more, list(report.notes)) == (4, True, [])


def test_a_disk_that_refuses_temporary_files_is_a_failure_of_the_partition_with_what_to_do(made: Made) -> None:
    made.add()
    (made.folder / "spool").write_bytes(b"")
    (failure,) = made.pipeline.job.work(made.context()).failures
    assert failure.message.startswith(f"{made.folder / 'spool'}: ")
    assert failure.hint == "free space on this disk for temporary files"


def test_a_source_that_never_gave_a_row_is_told_after_a_day(made: Made) -> None:
    first = DUE - NEVER_AFTER
    made.record(first, 1, cursor_at=first)
    assert made.pipeline.silence("web") == ""
    made.record(first, 1, cursor_at=DUE - HOUR)
    assert made.pipeline.silence("web") == ""
    made.record(first, 1, cursor_at=DUE)
    assert made.pipeline.silence("web").startswith("web has returned no row since 2026-02-10: check that")
    assert made.pipeline.silence("other") == ""
    made.add().due = Report(rows=0)
    assert [note[:17] for note in made.pipeline.job.work(made.context()).notes] == ["warning: web has "]
    made.partitions[0].due = Report(more=True)
    assert list(made.pipeline.job.work(made.context()).notes) == []


def test_a_source_that_gave_rows_in_most_hours_is_told_after_three_days(made: Made) -> None:
    first = DUE - QUIET_AFTER - USUAL_HOURS * HOUR
    made.record(first, 1, rows=1, cursor_at=first)
    made.record(first, USUAL_HOURS, rows=1, cursor_at=DUE - HOUR)
    assert made.pipeline.silence("web") == ""
    made.record(first, USUAL_HOURS, rows=1, cursor_at=DUE)
    assert made.pipeline.silence("web").startswith("web has returned no row since 2026-02-08 04:00Z: check that")
    assert made.pipeline.heard(lambda: "may export", "web")() == f"may export; {made.pipeline.silence('web')}"
    assert made.pipeline.heard(lambda: "may export", "mobile")() == "may export"
    made.record(DUE - HOUR, 1, rows=1, cursor_at=DUE)
    assert made.pipeline.silence("web") == ""


def test_a_source_that_gave_rows_in_few_hours_is_not_told(made: Made) -> None:
    first = DUE - 9 * QUIET_AFTER
    made.record(first, 1, rows=1, cursor_at=first)
    made.record(first, USUAL_HOURS - 1, rows=1, cursor_at=DUE)
    assert made.pipeline.silence("web") == ""


def test_refused_lines_are_kept_by_window_and_reason_and_large_ones_alone(tmp_path: Path) -> None:
    store = LocalDirectory(tmp_path / "objects")
    lines, large = RefusedLines(tmp_path), b"x" * (LARGE_BYTES + 1)
    for line in (b"one\r\n", b"two", large):
        lines.add(("web", "h"), "not JSON", line, "sample")
    entries = lines.keep(SetAsideStore(store, folder_of("amplitude"), 1 << 22))
    assert [(each.reason, each.number, each.new) for each in entries] == [("not JSON", 2, 2), ("not JSON", 1, 1)]
    assert lines.not_kept == 0
    kept = {info.key: info.size_bytes for info in store.list("")}
    digest = hashlib.sha256(large).hexdigest()[:16]
    assert kept == {
        "amplitude/_set_aside/web/h.not-json.txt": len(b"one\ntwo\n"),
        f"amplitude/_set_aside/web/h/{digest}.not-json.txt": len(large) + 1,
    }
    lines.close()
    assert lines.keep(SetAsideStore(store, folder_of("amplitude"))) == []


def test_refused_lines_of_many_windows_and_large_ones_need_few_files_and_stay_in_order(tmp_path: Path) -> None:
    store, lines = LocalDirectory(tmp_path / "objects"), RefusedLines(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(300):
        lines.add(("web", f"{number % 100}"), "not JSON", b"line %d" % number, "sample")
    for number in range(3):
        lines.add(("web", "h"), "not JSON", bytes([number]) * (LARGE_BYTES + 1), "sample")
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
    assert len(lines.keep(SetAsideStore(store, folder_of("amplitude"), 1 << 22))) == 103
    lines.close()
    for number in range(100):
        with store.open(f"amplitude/_set_aside/web/{number}.not-json.txt") as stream:
            assert stream is not None
            assert stream.read() == b"line %d\nline %d\nline %d\n" % (number, number + 100, number + 200)


def test_the_log_names_the_first_three_refused_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = RefusedLines(tmp_path)
    for number in range(5):
        lines.add(("web", "h"), "not JSON", b"x", f"line {number}")
    (entry,) = lines.keep(SetAsideStore(LocalDirectory(tmp_path / "objects"), folder_of("amplitude")))
    lines.close()
    assert entry.sample == "line 0"
    assert "5 lines are set aside (not JSON): line 0; line 1; line 2" in caplog.messages


def test_refused_lines_that_cannot_be_kept_are_counted(tmp_path: Path) -> None:
    class Full(LocalDirectory):
        def put(self, *_: Any) -> str:
            raise Rejected("the disk is full")

    lines = RefusedLines(tmp_path)
    lines.add(("web", "h"), "not JSON", b"one", "sample")
    lines.add(("web", "h"), "not JSON", b"two", "sample")
    lines.keep(SetAsideStore(Full(tmp_path / "objects"), folder_of("amplitude")))
    assert lines.not_kept == 2
    lines.close()


class ManyEvents:
    """An hour of two transactions, the second one with an event that the warehouse refuses."""

    window = Window(DUE - HOUR, DUE)
    uuids = tuple(f"{number:08x}-0000-4000-8000-000000000000" for number in range(LOAD_EVENTS + 2))

    def tables(self) -> Iterator[Tables]:
        for uuids in (self.uuids[:LOAD_EVENTS], self.uuids[LOAD_EVENTS:]):
            yield {EVENTS_TABLE: EventRows(("uuid",), [(uuid,) for uuid in uuids])}

    def load_each(self, load: Callable[[Tables], None]) -> None:
        for uuid in self.uuids:
            with suppress(Rejected):
                load({EVENTS_TABLE: EventRows(("uuid",), [(uuid,)])})


class LastRefused:
    """A warehouse that refuses the last one of them."""

    def __init__(self) -> None:
        self.held = set[str]()

    def load(self, chunks: Iterable[Tables], *, past: bool) -> int:
        del past
        uuids = {uuid for chunk in chunks for uuid in uuids_in(chunk)}
        if ManyEvents.uuids[-1] in uuids:
            raise Permanent("a check of the owner's", "change it")
        new = len(uuids - self.held)
        self.held |= uuids
        return new


def test_events_that_were_loaded_before_another_one_was_refused_count_as_new() -> None:
    loaded = load_hour(cast("EventWarehouse", LastRefused()), cast("PulledHour", ManyEvents()), past=False)
    assert loaded == Tally(new=LOAD_EVENTS + 1)
