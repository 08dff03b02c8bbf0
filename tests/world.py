"""A source, a sink and checkpoints that live in memory and can be stopped before or after each of their effects."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache

from app.core.errors import Conflict, Permanent
from app.core.ledger import SetAside, Tally
from app.core.partitions import Backoff, PassOptions, sync_all
from app.core.pipeline import Commit, Count, Grid, Objects, ObjectState, Pipeline, Record, Shrink, Sums, WrittenRows
from app.core.repair import Asked, fill, reconcile
from app.core.runs import Context, Lease, Report, ReportSum, Stop
from app.core.windows import Window, windows_between

START = datetime(2026, 2, 7, 22, 0, tzinfo=UTC)
WINDOW_SECONDS = 600
GRACE_SECONDS = 1200
FIRST_AT = START - timedelta(hours=1)
VALUE = "value"  # the one field of every row
SOMEBODYS = "somebody's"
Row = tuple[datetime, str]


class Killed(BaseException):
    """The process died here."""


def nothing(_point: str) -> None:
    """A hook that lets everything pass."""


def sums_of(rows: Iterable[Row]) -> Mapping[str, Sums]:
    """What the one field comes to; a value that is no number is one more value."""
    some = [Sums(1, int(v), int(v), int(v), int(v)) if v.isdigit() else Sums(1) for _, v in rows]
    return {VALUE: sum(some[1:], some[0])} if some else {}


def windows(start: datetime, end: datetime) -> Iterable[Window]:
    return windows_between(start, end, WINDOW_SECONDS)


@cache
def digest_of(rows: tuple[Row, ...]) -> str:
    return hashlib.sha256(repr(rows).encode()).hexdigest()


@dataclass(slots=True)
class Rows:
    """A batch of rows, and whether its reader closed it."""

    held: tuple[Row, ...]
    reusable: bool = False
    is_closed: bool = False
    new: int | None = None
    corrected_rows: int = 0
    of_source: tuple[Row, ...] | None = None
    accounts: Mapping[str, Tally] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.held)

    @property
    def digest(self) -> str:
        return digest_of(self.held)

    @property
    def min_at(self) -> datetime | None:
        return min((at for at, _ in self.held), default=None)

    @property
    def max_at(self) -> datetime | None:
        return max((at for at, _ in self.held), default=None)

    @property
    def sums(self) -> Mapping[str, Sums]:
        return sums_of(self.of_source if self.of_source is not None else self.held)

    @property
    def new_rows(self) -> int:
        return self.rows if self.new is None else self.new

    @property
    def identities(self) -> frozenset[datetime]:
        return frozenset(at for at, _ in self.held)

    def holds_all(self, identities: frozenset[datetime]) -> bool:
        return identities <= self.identities

    def close(self) -> None:
        self.is_closed = True


@dataclass(slots=True)
class Bytes:
    content: tuple[Row, ...]
    digest: str
    write: str = ""
    folded: int = 0

    @property
    def size_bytes(self) -> int:
        return max(1, len(self.content))

    def close(self) -> None:
        """Nothing to remove."""


@dataclass(slots=True)
class World:
    """What outlives a process: the source's rows, the sink's objects, the checkpoints, and the clock."""

    now: datetime = START
    rows: dict[str, dict[datetime, str]] = field(default_factory=dict)
    objects: dict[str, tuple[str, tuple[Row, ...], str]] = field(default_factory=dict)
    cursors: dict[str, datetime] = field(default_factory=dict)
    starts: dict[str, datetime] = field(default_factory=dict)
    records: dict[tuple[str, datetime, int], Record] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    undeleted: dict[str, str] = field(default_factory=dict)
    versions: int = 0
    shrunk: list[str] = field(default_factory=list)
    reads: list[tuple[str, datetime]] = field(default_factory=list)
    puts: list[str] = field(default_factory=list)
    closing_puts: list[str] = field(default_factory=list)
    notes: dict[str, tuple[str, int]] = field(default_factory=dict)
    refuses_deletes: bool = False

    def write(self, partition: str, at: datetime, value: str = "v") -> None:
        """A point arrives at the source."""
        self.rows.setdefault(partition, {})[at] = value

    def old_delta(self, partition: str, window: Window, part: int, rows: Mapping[datetime, str]) -> None:
        """An older version wrote late rows, which are at the source as well, to an object of their own."""
        self.rows.setdefault(partition, {}).update(rows)
        key = f"{partition}/{window.start:%Y%m%dT%H%M%S}.{part}"
        self.versions += 1
        held = Rows(tuple(sorted(rows.items())))
        self.objects[key] = (str(self.versions), held.held, held.digest)
        base = self.records[partition, window.start, 0]
        delta = replace(base, part=part, key=key, version=str(self.versions), digest=held.digest, rows=held.rows)
        self.records[partition, window.start, part] = delta
        cells = sum(window.start <= at < window.end for at in self.rows[partition])
        self.records[partition, window.start, 0] = replace(base, source_cells=cells)

    def exported(self) -> list[tuple[str, datetime, str]]:
        """Every row of every object, with repetitions."""
        return sorted(
            (key.split("/")[0], at, value) for key, (_, rows, _) in self.objects.items() for at, value in rows
        )

    def shown(self) -> list[tuple[str, datetime, str]]:
        """Every row of every object but of those deltas whose rows the object of their window says that it holds."""
        folded = {key.rpartition(".")[0]: folded for key, (_, folded) in self.notes.items()}
        return sorted(
            (key.split("/")[0], at, value)
            for key, (_, rows, _) in self.objects.items()
            if not 0 < int(key.rpartition(".")[2]) <= folded.get(key.rpartition(".")[0], 0)
            for at, value in rows
        )

    def produced(self, until: datetime) -> list[tuple[str, datetime, str]]:
        """Every row of the source before `until`."""
        return sorted((name, at, value) for name, rows in self.rows.items() for at, value in rows.items() if at < until)


@dataclass(slots=True)
class Process:
    """One process of the product: its ports on a world, its memory, and the hook at each effect.

    `broken`: partitions whose reading fails; `broken_at`: windows by their start. `away`: what a probe of source and
    sink raises. `loses`: a row of this value is read and then lost on its way, which is a bug that the ledger has to
    show. `aside`: what is set aside. `wanted`: the partitions that the settings name, None = all.
    """

    world: World
    hook: Callable[[str], None] = nothing
    keeps: bool = False
    broken: Mapping[str, Exception] = field(default_factory=dict)
    broken_at: Mapping[datetime, Exception] = field(default_factory=dict)
    away: Exception | None = None
    loses: str = ""
    aside: Sequence[SetAside] = ()
    shrink: Callable[[], Shrink] | None = None
    backoff: Backoff = field(default_factory=Backoff)
    retry_seconds: float = 20.0
    rewrite_seconds: Callable[[int], float] | None = None
    wanted: Collection[str] | None = None
    probes: int = 0
    written: WrittenRows[Rows] = field(default_factory=WrittenRows)
    batches: list[Rows] = field(default_factory=list)

    # Source
    def partitions(self, since: datetime) -> Sequence[str]:
        return sorted(filter(self._is_wanted, self.world.rows))

    def _is_wanted(self, partition: str) -> bool:
        return self.wanted is None or partition in self.wanted

    def counts(self, partition: str | None, spans: Sequence[Window]) -> Mapping[tuple[str, datetime], Count]:
        found: dict[tuple[str, datetime], Count] = {}
        for name, rows in self.world.rows.items():
            for window in spans:
                number = sum(window.start <= at < window.end for at in rows)
                if number and partition in (None, name):
                    found[name, window.start] = Count(number, number, {VALUE: number})
        return found

    def read(self, partition: str, window: Window, count: Count, kept: Rows | None) -> Rows:
        if partition in self.broken:
            raise self.broken[partition]
        if window.start in self.broken_at:
            raise self.broken_at[window.start]
        self.hook(f"read {partition}")
        self.world.reads.append((partition, window.start))
        rows = self.world.rows.get(partition, {})
        found = sorted((at, value) for at, value in rows.items() if window.start <= at < window.end)
        landed = tuple(row for row in found if not self.loses or row[1] != self.loses)
        counted = max(count.fields.get(VALUE, 0), len(found))
        return self._batch(landed, Tally(counted=counted, read=len(found), new=len(landed)))

    def read_each(self, counted: Sequence[tuple[str, Window, Count]]) -> Iterator[Rows | None]:
        """All of them as early as the port allows: when the first is taken."""
        yield from [self.read(*each, None) for each in counted]

    def asked(
        self, partition: str, spans: Sequence[Window], numbers: Collection[str]
    ) -> Mapping[datetime, Mapping[str, Sums]]:
        """Sums, as the reconcile asks for them."""
        rows = sorted(self.world.rows.get(partition, {}).items())
        by_start = {w.start: tuple((at, value) for at, value in rows if w.start <= at < w.end) for w in spans}
        return {start: sums_of(some) for start, some in by_start.items() if some}

    def union(self, batch: Rows, held: Sequence[Iterable[Row]], shrink: Shrink | None = None) -> Rows:
        """Of rows with one time the first one stands, the source's before all others."""
        there: dict[datetime, str] = {}
        for rows in held:
            there = {**dict(rows), **there}
        gone = {at: there[at] for at in there if shrink and at >= shrink.since and at not in dict(batch.held)}
        if shrink:
            shrink.note(len(gone), sorted(gone.values()))
            there = {at: value for at, value in there.items() if not (shrink.removes and at in gone)}
        known = {at: value == there[at] for at, value in batch.held if at in there}
        tally = batch.accounts[VALUE]
        united = self._batch(
            tuple(sorted({**there, **dict(batch.held)}.items())),
            replace(
                tally,
                new=tally.new - len(known),
                already_there=tally.already_there + sum(known.values()),
                corrected=len(known) - sum(known.values()),
            ),
        )
        united.new = batch.rows - len(known)
        united.of_source = batch.held
        united.corrected_rows = len(known) - sum(known.values())
        return united

    def _batch(self, rows: tuple[Row, ...], tally: Tally) -> Rows:
        self.batches.append(Rows(rows, reusable=self.keeps, accounts={VALUE: tally}))
        return self.batches[-1]

    # Sink
    def key(self, partition: str, window: Window, part: int) -> str:
        return key_of(partition, window.start, part)

    def head(self, key: str) -> ObjectState | None:
        if key not in self.world.objects:
            return None
        version, rows, digest = self.world.objects[key]
        write, folded = self.world.notes.get(key, ("", 0))
        return ObjectState(version, "" if digest == SOMEBODYS else digest, len(rows), write=write, folded=folded)

    def read_object(self, key: str, version: str) -> tuple[Row, ...]:
        there = self.world.objects.get(key)
        if there is None or there[0] != version:
            raise Conflict(f"{key} changed")
        return there[1]

    def encode(self, partition: str, window: Window, batch: Rows, *, summarises: bool = True) -> Bytes:
        self.world.versions += 1
        return Bytes(batch.held, batch.digest, f"write {self.world.versions}")

    def put(self, key: str, encoded: Bytes, expected: str | None, *, closing: bool = False) -> str:
        self.hook(f"before put {key}")
        there = self.world.objects.get(key)
        if (there[0] if there else None) != expected:
            raise Conflict(f"{key} is not {expected}")
        if there and not set(dict(there[1])) <= set(dict(encoded.content)):
            self.world.shrunk.append(key)
        self.world.versions += 1
        version = str(self.world.versions)
        self.world.objects[key] = (version, encoded.content, encoded.digest)
        self.world.notes[key] = (encoded.write, encoded.folded)
        self.world.puts.append(key)
        if closing:
            self.world.closing_puts.append(key)
        self.hook(f"after put {key}")
        return version

    # What a listing shows, and deltas of older versions
    def objects(self, partition: str, windows: Sequence[Window]) -> Mapping[datetime, Objects]:
        found: dict[datetime, dict[int, tuple[str, str]]] = {}
        for window in windows:
            base = self.key(partition, window, 0).removesuffix("0")
            for key, (version, _, _) in self.world.objects.items():
                if key.startswith(base):
                    found.setdefault(window.start, {})[int(key.removeprefix(base))] = (key, version)
        return found

    def noted(self, encoded: Bytes, folded: int) -> Bytes:
        return replace(encoded, folded=folded)

    def delete(self, key: str) -> None:
        self.hook(f"before delete {key}")
        if self.world.refuses_deletes:
            raise Permanent(f"{key} may not be deleted", "allow s3:DeleteObject")
        self.world.objects.pop(key, None)
        self.hook(f"after delete {key}")

    # Checkpoints
    def cursors(self, pipeline: str) -> Mapping[str, datetime]:
        return dict(self.world.cursors)

    def starts(self, pipeline: str) -> Mapping[str, datetime]:
        return dict(self.world.starts)

    def records(self, pipeline: str, partition: str, since: datetime, until: datetime) -> Sequence[Record]:
        found = [r for (name, at, _), r in self.world.records.items() if name == partition and since <= at < until]
        return sorted(found, key=lambda record: (record.window.start, record.part))

    def live_records(
        self, pipeline: str, since: datetime, partitions: Sequence[str] | None = None
    ) -> Mapping[str, Sequence[Record]]:
        names = {name for name, _, _ in self.world.records if partitions is None or name in partitions}
        return {name: self.records(pipeline, name, since, datetime.max.replace(tzinfo=UTC)) for name in names}

    def commit(self, pipeline: str, partition: str, commit: Commit, lease: Lease) -> None:
        self.commit_all(pipeline, [(partition, commit)], lease)

    def commit_all(self, pipeline: str, commits: Sequence[tuple[str, Commit]], lease: Lease) -> None:
        names = " ".join(partition for partition, _ in commits)
        self.hook(f"before commit {names}")
        for partition, commit in commits:
            self._commit(partition, commit)
        self.hook(f"after commit {names}")

    def _commit(self, partition: str, commit: Commit) -> None:
        for record in commit.records:
            self.world.records[partition, record.window.start, record.part] = replace(
                record, trouble="", written_at=self.world.now
            )
        for window in commit.folded:
            for slot in [slot for slot in self.world.records if slot[:2] == (partition, window.start) and slot[2]]:
                del self.world.records[slot]
        if commit.cursor_at is not None:
            self.world.starts.setdefault(partition, commit.cursor_at)
            known = self.world.cursors.get(partition, commit.cursor_at)
            self.world.cursors[partition] = max(known, commit.cursor_at)

    def fail(self, pipeline: str, partition: str, message: str, lease: Lease) -> None:
        self.world.failures[partition] = message

    def mark(self, pipeline: str, partition: str, troubles: Sequence[tuple[Record, str]]) -> None:
        for record, trouble in troubles:
            slot = (partition, record.window.start, record.part)
            if self.world.records[slot].version == record.version:
                self.world.records[slot] = replace(self.world.records[slot], trouble=trouble)

    def note_undeleted(self, pipeline: str, key: str, error: str) -> None:
        self.world.undeleted.pop(key, None)
        if error:
            self.world.undeleted[key] = error

    def pipeline(self) -> Pipeline[Rows, Bytes]:
        """This process's pipeline."""
        return Pipeline(
            name="test",
            source=self,
            sink=_SinkSide(self),
            checkpoints=self,
            grid=Grid(
                lambda start, end: iter(list(windows(start, end))), GRACE_SECONDS, step_windows=4, count_windows=9
            ),
            shrink=self.shrink,
            deltas=self,
            written=self.written,
            set_aside=(lambda _partition, _window, _batch: self.aside) if self.aside else None,
            rewrite_seconds=self.rewrite_seconds,
            is_wanted=self._is_wanted,
        )

    def run(self, stop: Stop | None = None, *, dry_run: bool = False) -> Report:
        """One run at the world's time, one partition at a time so that effects come in one order."""
        return sync_all(self.pipeline(), context(stop, dry_run=dry_run), self.how())

    def run_until_done(self) -> Report:
        """Runs until nothing is left behind."""
        report = self.run()
        total = report
        while report.more:
            report = self.run()
            total += replace(report, more=False)
        return replace(total, more=False)

    def fill(self, span: Window, *, dry_run: bool = False, by_content: bool = False, again: bool = False) -> Report:
        """A backfill of partition a; `again`: objects that are right are written too."""
        parts = ReportSum()
        fill(
            self.pipeline(),
            context(dry_run=dry_run),
            "a",
            span,
            self.world.now,
            done=parts,
            by_content=by_content,
            always_writes=again,
        )
        return parts.total

    def reconcile(
        self, span: Window, partition: str = "a", *, asked: Asked | None = None, heals: bool = False
    ) -> Report:
        """The reconcile of a partition; `asked` in place of the source's own sums."""
        parts = ReportSum()
        reconcile(
            self.pipeline(),
            context(),
            partition,
            span,
            self.world.now,
            done=parts,
            asked=asked or self.asked,
            by_content=None,
            heals=heals,
        )
        return parts.total

    def how(self) -> PassOptions:
        """One partition at a time; a source without any row is taken as it is."""
        return PassOptions(
            now=self.world.now,
            first_at=FIRST_AT,
            probe=self.probe,
            nothing_found=lambda: None,
            backoff=self.backoff,
            concurrency=1,
            retry_seconds=self.retry_seconds,
        )

    def probe(self) -> None:
        self.probes += 1
        if self.away:
            raise self.away


@dataclass(frozen=True, slots=True)
class _SinkSide:
    """The same process under the sink's names: both ports have a `read`."""

    process: Process

    def key(self, partition: str, window: Window, part: int) -> str:
        return self.process.key(partition, window, part)

    def head(self, key: str) -> ObjectState | None:
        return self.process.head(key)

    def read(self, key: str, version: str) -> tuple[Row, ...]:
        return self.process.read_object(key, version)

    def encode(self, partition: str, window: Window, batch: Rows, *, summarises: bool = True) -> Bytes:
        return self.process.encode(partition, window, batch, summarises=summarises)

    def put(self, key: str, encoded: Bytes, expected: str | None, *, closing: bool = False) -> str:
        return self.process.put(key, encoded, expected, closing=closing)


@cache
def key_of(partition: str, start: datetime, part: int) -> str:
    return f"{partition}/{start:%Y%m%dT%H%M%S}.{part}"


class Silent:
    """Progress that nobody watches."""

    def advance(self, *, done: int = 0, total: int = 0, rows: int = 0) -> None:
        """Nothing to show."""


def context(stop: Stop | None = None, *, dry_run: bool = False) -> Context:
    lease = Lease("test", "me", 1, datetime(2100, 1, 1, tzinfo=UTC))
    return Context("run", lease, stop or Stop(), Silent(), dry_run)


MINUTE = timedelta(minutes=1)


SETTLED = timedelta(seconds=GRACE_SECONDS + 600)


def fill_minutes(world: World, minutes: int, devices: tuple[str, ...] = ("a", "b")) -> None:
    """A point a minute and device from START on."""
    for minute in range(minutes):
        for device in devices:
            world.write(device, START + minute * MINUTE, f"{device}{minute}")


class Tripwire:
    """Kills at the n-th effect, once."""

    def __init__(self, fatal: int) -> None:
        self.seen = 0
        self.fatal = fatal

    def __call__(self, point: str) -> None:
        self.seen += 1
        if self.seen == self.fatal:
            raise Killed(point)


def closed_world() -> World:
    """Ten minutes of one device, whose windows are all closed."""
    world = World()
    fill_minutes(world, 10, ("a",))
    world.now = START + 10 * MINUTE + SETTLED
    Process(world).run_until_done()
    return world
