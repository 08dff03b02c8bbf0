"""The delivery map: one letter per cell of a time span, from destination listings or from the records.

With few partitions the destination is listed, once for all viewers. With many the map shows the confirmed windows from
the records, in which the reconcile's listings have marked missing and changed ones; `source` tells which.

Invariants: the map has every cell of the span, and the worst state in a cell wins; a job's destination is listed for
one request at a time; caches are bounded; a partition that cannot be listed shows as not known, and hides no other.
"""

import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from math import inf
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

from app.core.errors import AppError, Rejected, Transient
from app.core.pipeline import MISSING
from app.core.verify import CellState, GapMapSource, MapCell
from app.core.windows import Window
from app.db.page_queries import NameFilter, PageQuerySession, SqlPages

KEPT_SECONDS = 20.0
KEPT_MAPS = 64
WAIT_SECONDS = 20.0
AT_ONCE = 8
LISTED_PARTITIONS = 200
LISTED_PARTITION_DAYS = 400
LISTED_DAYS = 31
GROUPED_FROM = 200  # more partitions than this are grouped
GROUP, BIG_GROUP, BIG_FROM = 25, 500, 10_000
GROUPS_A_PAGE = 20
LATE_AFTER = timedelta(hours=6)
LATE_PARTITIONS = 20_000
HOUR, DAY, WEEK = 3600, 86_400, 604_800
SPANS: Mapping[str, Mapping[int, int]] = {
    "24h": {24: HOUR},
    "7d": {42: 4 * HOUR, 14: 12 * HOUR},
    "30d": {30: DAY},
    "365d": {53: WEEK, 13: 4 * WEEK},
}
FINER = {4 * WEEK: WEEK, WEEK: DAY, DAY: 4 * HOUR, 12 * HOUR: 4 * HOUR, 4 * HOUR: HOUR}
MOST_DAYS = 366
LETTERS = "mpclsuokn"  # worst first
PROBLEMS = frozenset("mpcsl")
RANK = {letter: place for place, letter in enumerate(LETTERS)}
WORDS = {
    "m": "missing",
    "p": "partly missing",
    "c": "changed at the destination",
    "l": "late",
    "s": "rows set aside",
    "u": "not known",
    "o": "still filling",
    "k": "OK",
    "n": "no data",
}
OF_STATE = {
    CellState.EQUAL: "k",
    CellState.EMPTY: "n",
    CellState.OPEN: "o",
    CellState.WAITING: "o",
    CellState.PARTIAL: "p",
    CellState.STALE: "c",
}


def letter_of(cell: MapCell) -> str:
    """The letter of a window. An overdue window that was never written is late, not missing."""
    return OF_STATE.get(cell.state) or ("m" if cell.rows else "l")


def worst_state(letters: Iterable[str]) -> str:
    """The worst of the given letters; "no data" if there are none."""
    return min(letters, key=RANK.__getitem__, default="n")


# ---- the cells of a span


@dataclass(frozen=True, slots=True)
class MapCells:
    """The edges of the cells of a span (one more than cells), and the nominal cell length in `seconds`: days and weeks
    start at local midnight, so a day has 23 to 25 hours.
    """

    edges: Sequence[datetime]
    seconds: int

    @property
    def window(self) -> Window:
        """From the first edge to the last."""
        return Window(self.edges[0], self.edges[-1])

    def paint(self, windows: Iterable[tuple[datetime, datetime, str]], now: datetime) -> str:
        """One letter per cell, from the start, end and letter of windows `[start, end)`; cells after
        now are "no data".
        """
        found: list[str] = ["n"] * (len(self.edges) - 1)
        for start, end, letter in windows:
            place = max(bisect_right(self.edges, start) - 1, 0)
            while place < len(found) and self.edges[place] < min(end, now):
                if RANK[letter] < RANK[found[place]]:
                    found[place] = letter
                place += 1
        return "".join(found)

    def paint_cells(self, windows: Iterable[MapCell], now: datetime) -> str:
        """As `paint`, for the windows of a listing."""
        return self.paint(((each.window.start, each.window.end, letter_of(each)) for each in windows), now)


def cells_of_span(span: str, cells: int | None, zone: tzinfo, now: datetime) -> MapCells:
    """The cells of a selected span up to now. Raises Rejected for an unknown span or number of cells."""
    if span not in SPANS:
        raise Rejected(f"span={span[:20]!r} is not known", f"spans: {', '.join(SPANS)}")
    number = cells or next(iter(SPANS[span]))
    if number not in SPANS[span]:
        raise Rejected(f"cells={number} does not go with span={span}", f"cells: {', '.join(map(str, SPANS[span]))}")
    seconds = SPANS[span][number]
    if seconds >= DAY:
        days, today = seconds // DAY, now.astimezone(zone).date()
        last = today + timedelta(days=1) if days == 1 else today + timedelta(days=7 - today.weekday())
        return MapCells(
            [_midnight(last - timedelta(days=days * back), zone) for back in range(number, -1, -1)], seconds
        )
    edges = _within_days(now - timedelta(seconds=seconds * (number + 2)), now, seconds, zone)
    return MapCells(edges[-number - 1 :], seconds)


def cells_between(start: datetime, end: datetime, zone: tzinfo) -> MapCells:
    """Finer cells for `[start, end)`, which is one cell or a few of a map."""
    length = (end - start).total_seconds()
    # a day of 23 or 25 hours counts as a day
    coarse = next((seconds for seconds in sorted(FINER) if length <= seconds + 2 * HOUR), 4 * WEEK)
    seconds = FINER[coarse]
    if seconds < DAY:
        inner = [edge for edge in _within_days(start, end, seconds, zone) if start < edge < end]
    else:
        first, days = start.astimezone(zone).date(), seconds // DAY
        count = round(length / seconds)
        inner = [_midnight(first + timedelta(days=days * place), zone) for place in range(1, count)]
    return MapCells([start, *inner, end], seconds)


def _midnight(day: date, zone: tzinfo) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC)


def _within_days(start: datetime, end: datetime, seconds: int, zone: tzinfo) -> list[datetime]:
    """Edges from before `start` to the first after `end`, counted from each local midnight."""
    edges: list[datetime] = []
    day = start.astimezone(zone).date()
    while not edges or edges[-1] <= end:
        midnight, next_midnight = _midnight(day, zone), _midnight(day + timedelta(days=1), zone)
        steps = max(round((next_midnight - midnight).total_seconds() / seconds), 1)
        edges += [midnight + timedelta(seconds=seconds * step) for step in range(steps)]
        day += timedelta(days=1)
    edges.append(_midnight(day, zone))
    first = next(place for place, edge in enumerate(edges) if edge > end)
    return edges[: first + 1]


# ---- maps


@dataclass(frozen=True, slots=True)
class MapRow:
    """One partition, or a group of `count` of them from `name` to `last`. `error`: why it could not be listed."""

    name: str
    cells: str
    last: str = ""
    count: int = 1
    problems: int = 0
    newest_at: datetime | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class DeliveryMap:
    """Rows by name. `total`: partitions requested; `grouped`: a row is a group of `size` of them; `pages_of`: rows on
    all pages. `listed`: from listings made now, not from the records.
    """

    total: int
    rows: Sequence[MapRow]
    listed: bool
    problems: int = 0
    grouped: bool = False
    pages_of: int = 0


class MapLine(NamedTuple):
    """One partition with its windows as cells, oldest first. `error` is empty when it could be listed."""

    partition: str
    cells: Sequence[MapCell]
    error: str = ""


@dataclass(frozen=True, slots=True)
class MapFault:
    """A window that a listing showed as missing, partly missing or changed; `seen_at`: when it was first seen."""

    partition: str
    window: Window
    letter: str
    seen_at: datetime


Made = TypeVar("Made")
Key = tuple[Any, ...]
"""What was requested: the job, the kind of listing, and its arguments."""


class DeliveryMaps:
    """Maps by job and span. Thread-safe.

    Of two requests for the same job the second waits for the listing of the first. A listing that began before a change
    at the destination is not searched for faults, and later requests see it in strips only.
    """

    def __init__(self, charts: Mapping[str, GapMapSource], pages: SqlPages, clock: Callable[[], datetime]) -> None:
        self._charts = charts
        self._pages = pages
        self._clock = clock
        self._turns = {job: threading.Lock() for job in charts}
        self._lock = threading.Lock()  # for all below
        self._changes = Counter[str]()
        self._kept: OrderedDict[Key, tuple[Any, float]] = OrderedDict()  # when made
        self._faults: dict[str, Mapping[tuple[str, Window], MapFault]] = {}
        self._refreshing: dict[str, threading.Thread] = {}

    @property
    def jobs(self) -> Sequence[str]:
        """Jobs that have a map."""
        return sorted(self._charts)

    def faults(self, job: str) -> Collection[MapFault]:
        """The faults in the latest listings of a job."""
        return self._faults.get(job, {}).values()

    def gone_since(self, job: str) -> Mapping[tuple[str, datetime], datetime]:
        """When a listing first showed each faulty window, by partition and start."""
        return {(each.partition, each.window.start): each.seen_at for each in self.faults(job)}

    def forget(self, job: str) -> None:
        """List the destination of `job` again on the next request: it has changed."""
        with self._lock:
            self._changes[job] += 1
            for key in [each for each in self._kept if each[0] == job]:
                del self._kept[key]

    def healed(self, job: str, partition: str, window: Window) -> None:
        """Remove the fault of a window that was healed."""
        with self._lock:
            faults = dict(self._faults.get(job, {}))
            known = faults.pop((partition, window), None)
            self._faults[job] = faults
        if known:
            self.forget(job)

    def windows(self, job: str, span: Window, offset: int, limit: int) -> tuple[int, Sequence[MapLine]]:
        """The number of partitions of a job, and the windows of some of them, from a listing made now.

        Raises Rejected for a job without a map, Transient when the destination is too slow.
        """

        def listed() -> tuple[int, Sequence[MapLine]]:
            partitions = self._charts[job].partitions()
            return len(partitions), self._list(job, partitions[offset : offset + limit], span)

        return self._once((job, "windows", span, offset, limit), listed)

    def partition(self, job: str, partition: str, span: Window) -> Sequence[MapCell]:
        """The windows of one partition, from a listing made now. Raises Rejected for an unknown one."""
        chart = self._chart(job)
        with self._pages.look() as look:
            is_known = look.partitions(job, NameFilter(partition, partition))
        if not is_known and partition not in chart.partitions():
            raise Rejected(f"{job} has no partition {partition[:80]!r}", "see /ops/partitions for their names")

        def listed() -> Sequence[MapCell]:
            changes, cells = self._changes[job], chart.cells(partition, span)
            self._note(job, [MapLine(partition, cells)], span, changes)
            return cells

        return self._once((job, "partition", partition, span), listed)

    def whole(
        self,
        job: str,
        cells: MapCells,
        names: NameFilter = NameFilter(),  # noqa: B008 - it is frozen
        *,
        offset: int = 0,
        limit: int = LISTED_PARTITIONS,
        only_problems: bool = False,
    ) -> DeliveryMap:
        """A page of the map: from listings of the destination when there are few partitions, otherwise from the
        records, grouped when there are many.
        """
        self._chart(job)
        if names.first and names.first == names.last and cells.window.seconds <= LISTED_DAYS * DAY:
            rows = [_row(names.first, cells.paint_cells(self.partition(job, names.first, cells.window), self._clock()))]
        elif self._is_listable(job, cells, names):
            listed = self._once((job, "map", *cells.edges), lambda: self._listed(job, cells))
            rows = [row for row in listed if _matches(names, row.name)]
        else:
            return self.recorded(job, cells, names, offset=offset, limit=limit, only_problems=only_problems)
        chosen = [row for row in rows if row.problems or not only_problems]
        problems = sum(row.problems for row in rows)
        page = chosen[offset : offset + limit]
        return DeliveryMap(len(rows), page, listed=True, problems=problems, pages_of=len(chosen))

    def recorded(
        self, job: str, cells: MapCells, names: NameFilter, *, offset: int, limit: int, only_problems: bool
    ) -> DeliveryMap:
        """A page of the map from the records, grouped when there are many partitions."""
        with self._pages.look() as look:
            return _Recorded(look, job, cells, self._clock()).map(names, offset, limit, only_problems=only_problems)

    def strip(self, job: str, cells: MapCells, wait_seconds: float) -> str | None:
        """One row for the whole job, as last known; None before the first listing. A stale one is refreshed."""
        if not self._is_listable(job, cells, NameFilter()):
            with self._pages.look() as look:
                return _Recorded(look, job, cells, self._clock()).strip()
        key = (job, "map", *cells.edges)
        if self._held(key, KEPT_SECONDS) is None:
            thread = self._refreshing.get(job)
            if thread is None or not thread.is_alive():
                thread = threading.Thread(target=self._refresh, args=(job, cells), name=f"map-{job}", daemon=True)
                self._refreshing[job] = thread
                thread.start()
            thread.join(wait_seconds if self._held(key) is None else 0.0)
        found = self._held(key)
        if found is None:
            return None
        return "".join(worst_state(row.cells[place] for row in found) for place in range(len(cells.edges) - 1))

    def _refresh(self, job: str, cells: MapCells) -> None:
        with suppress(AppError):  # the map itself shows the error; the strip stays as it is
            self.whole(job, cells)

    def _is_listable(self, job: str, cells: MapCells, names: NameFilter) -> bool:
        """Whether the partitions are few enough to list, or the records are empty."""
        if names.first:
            return False
        with self._pages.look() as look:
            number = look.partitions(job, NameFilter())
        days = max(cells.window.seconds / DAY, 1)
        few = number <= LISTED_PARTITIONS and number * days <= LISTED_PARTITION_DAYS
        return number == 0 or (few and days <= LISTED_DAYS)

    def _chart(self, job: str) -> GapMapSource:
        if job not in self._charts:
            raise Rejected(f"job {job[:80]!r} has no delivery map", f"jobs that have one: {', '.join(self.jobs)}")
        return self._charts[job]

    def _held(self, key: Key, seconds: float = inf) -> Any:
        found, at = self._kept.get(key, (None, 0.0))
        return found if time.monotonic() - at <= seconds else None

    def _once(self, key: Key, make: Callable[[], Made]) -> Made:
        """The cached value, or one made now, while no other request lists the same job. When the cache is full, its
        oldest entries are evicted.
        """
        job = key[0]
        self._chart(job)
        if not self._turns[job].acquire(timeout=WAIT_SECONDS):
            raise Transient(f"{job}: its destination is slow to list", "look at /ready, and ask again")
        try:
            found: Made | None = self._held(key, KEPT_SECONDS)
            if found is None:
                changes, found = self._changes[job], make()
                with self._lock:
                    self._kept[key] = (found, time.monotonic() if changes == self._changes[job] else -inf)
                    while len(self._kept) > KEPT_MAPS:
                        self._kept.popitem(last=False)
            return found
        finally:
            self._turns[job].release()

    def _list(self, job: str, partitions: Sequence[str], span: Window) -> Sequence[MapLine]:
        chart, changes = self._charts[job], self._changes[job]

        def line(partition: str) -> MapLine:
            try:
                return MapLine(partition, chart.cells(partition, span))
            except AppError as error:
                return MapLine(partition, (), str(error))

        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="map") as pool:
            lines = list(pool.map(line, partitions))
        self._note(job, [each for each in lines if not each.error], span, changes)
        return lines

    def _note(self, job: str, lines: Sequence[MapLine], span: Window, changes: int) -> None:
        """Replace the faults of some partitions within `span` by those in their listing, unless the destination was
        changed since there were this many `changes`.
        """
        with self._lock:
            if changes != self._changes[job]:
                return
            before, listed = self._faults.get(job, {}), {line.partition for line in lines}
            seen = {
                key: fault
                for key, fault in before.items()
                if key[0] not in listed or not span.start <= key[1].start < span.end
            }
            for key, letter in (
                ((line.partition, cell.window), letter_of(cell)) for line in lines for cell in line.cells
            ):
                if letter in "mpc":
                    seen[key] = MapFault(*key, letter, before[key].seen_at if key in before else self._clock())
            self._faults[job] = seen

    def _listed(self, job: str, cells: MapCells) -> Sequence[MapRow]:
        now, everything = self._clock(), "u" * (len(cells.edges) - 1)
        lines = self._list(job, self._charts[job].partitions()[:LISTED_PARTITIONS], cells.window)
        painted = {each.partition: everything if each.error else cells.paint_cells(each.cells, now) for each in lines}
        with self._pages.look() as look:
            known = look.groups(job, NameFilter(), size=1, limit=LISTED_PARTITIONS)
        newest = {row["first_name"]: row["oldest_at"] for row in known}
        errors = {line.partition: line.error for line in lines}
        return [
            _row(name, text, newest_at=newest.get(name), error=errors[name])
            for name, text in _one_row_a_source(painted, newest).items()
        ]


def _matches(names: NameFilter, name: str) -> bool:
    return names.first <= name <= (names.last or name) and names.find.lower() in name.lower()


def _row(name: str, text: str, **more: Any) -> MapRow:
    return MapRow(name, text, problems=int(bool(PROBLEMS & set(text))), **more)


def _one_row_a_source(painted: Mapping[str, str], known: Collection[str]) -> Mapping[str, str]:
    """Merge rows of longer windows of a source (`web:weeks`) into the source's row where they show a fault. They have
    no checkpoint of their own; a device whose name is another's with a colon does, and is among those `known`.
    """
    found = dict(painted)
    for name, text in painted.items():
        base = name.rpartition(":")[0]
        if base in painted and name not in known:
            wrong = (each if each in PROBLEMS | {"u"} else "n" for each in text)
            found[base] = "".join(map(worst_state, zip(found[base], wrong, strict=True)))
            del found[name]
    return found


class _Recorded:
    """A map from the records: cells before the cursor are done, except for marked windows."""

    def __init__(self, look: PageQuerySession, job: str, cells: MapCells, now: datetime) -> None:
        self._look, self._job, self._cells, self._now = look, job, cells, now
        totals = {row["pipeline"]: row for row in look.rows("partition_totals")}
        self._totals = totals.get(job, {"partitions": 0, "slowest_at": None, "furthest_at": None})
        slack = LATE_AFTER if cells.seconds < DAY else timedelta(days=2)
        furthest_at = self._totals["furthest_at"] or now
        self._late_before = max(furthest_at - timedelta(hours=1), now - slack)
        self._faults = sorted(
            (row["device_id"], row["starts_at"], row["ends_at"], "m" if row["trouble"] == MISSING else "c")
            for row in look.faulty_windows(job, cells.edges[0], cells.edges[-1])
        )
        self._spans = list(zip(cells.edges, cells.edges[1:], strict=False))
        self._any = [start < now and look.any_rows(job, start, end) for start, end in self._spans]

    def strip(self) -> str:
        """One row for all partitions."""
        if not self._totals["partitions"]:
            return "n" * len(self._spans)
        return self._painted(None, self._totals["slowest_at"])

    def map(self, names: NameFilter, offset: int, limit: int, *, only_problems: bool) -> DeliveryMap:
        """One page of rows or groups."""
        total = self._look.partitions(self._job, names)
        faulty = sorted({name for name, *_ in self._faults if _matches(names, name)} | self._late(names))
        if only_problems:
            rows = [
                self._row(row, faulty)
                for name in faulty[offset : offset + limit]
                for row in self._look.groups(self._job, NameFilter(name, name), size=1, limit=1)
            ]
            return DeliveryMap(total, rows, listed=False, problems=len(faulty), pages_of=len(faulty))
        size = 1
        if total > GROUPED_FROM and not names.first:
            size, limit = (BIG_GROUP if total > BIG_FROM else GROUP), min(limit, GROUPS_A_PAGE)
        found = self._look.groups(self._job, names, size=size, limit=limit, offset=offset)
        rows, pages_of = [self._row(row, faulty) for row in found], -(-total // size)
        return DeliveryMap(total, rows, listed=False, problems=len(faulty), grouped=size > 1, pages_of=pages_of)

    def _late(self, names: NameFilter) -> set[str]:
        """Partitions with a cell that is late: one that has ended long enough ago, and not before the cursor."""
        ends = [end for end in self._cells.edges[1:] if end <= self._late_before]
        if not ends:
            return set()
        of = {"pipeline": self._job, **names.params, "before_at": ends[-1], "limit": LATE_PARTITIONS}
        return {row["device_id"] for row in self._look.rows("late_partitions", **of)}

    def _row(self, row: Mapping[str, Any], faulty: Sequence[str]) -> MapRow:
        first, last = row["first_name"], row["last_name"]
        text = self._painted((first, last), row["slowest_at"])
        problems = bisect_right(faulty, last) - bisect_left(faulty, first)
        return MapRow(
            first, text, last, row["partitions"], problems, newest_at=row["oldest_at"], error=row["error"] or ""
        )

    def _painted(self, between: tuple[str, str] | None, cursor_at: datetime) -> str:
        faults = self._faults
        if between is not None:
            first, last = between
            faults = faults[bisect_left(faults, (first,)) : bisect_right(faults, last, key=itemgetter(0))]
        marked = self._cells.paint((fault[1:] for fault in faults), self._now)
        letters = []
        for (start, end), is_any, mark in zip(self._spans, self._any, marked, strict=True):
            letter = "n"
            if start < self._now and end > cursor_at:
                letter = "l" if end <= self._late_before else "o"
            elif is_any and (between is None or self._look.any_rows(self._job, start, end, between)):
                letter = "k"
            letters.append(worst_state((mark, letter)))
        return "".join(letters)
