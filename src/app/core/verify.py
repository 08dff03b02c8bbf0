"""Compare both ends of a pipeline window by window, by content; repair on request; the gap map of a destination.

Invariants: both ends are re-read, so cached state cannot hide a fault; a digest is independent of the order of rows and
of how they are spread over objects, but a duplicate row changes it; comparing writes nothing. A cell of the map is
derived from the listing; a record only says what should be there, so a removed or changed object shows even if the
checkpoints disagree.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum
from typing import Protocol

from app.core.errors import AppError, LeaseLost, Rejected, Stopped
from app.core.pipeline import Record
from app.core.runs import Context, Failure, Report, Stop
from app.core.windows import Age, Window, age_of

LANE = 1 << 64
NAMED = 20


@dataclass(frozen=True, slots=True)
class WindowContent:
    """What one end holds of a window: the number of rows, and two sums of 64-bit hashes.

    `set_aside`: source values that no object can hold, by a rule that both ends follow; not part of the rest.
    """

    rows: int = 0
    sums: tuple[int, ...] = (0, 0)
    set_aside: int = field(default=0, compare=False)

    @property
    def digest(self) -> str:
        """The sums as hex."""
        return "".join(f"{each:016x}" for each in self.sums)

    def __add__(self, other: "WindowContent") -> "WindowContent":
        sums = (one + two for one, two in zip(self.sums, other.sums, strict=True))
        return replace(content_from(self.rows + other.rows, *sums), set_aside=self.set_aside + other.set_aside)


NOTHING = WindowContent()


def content_from(rows: int, *sums: int) -> WindowContent:
    """The content with these sums, reduced modulo 2**64."""
    return WindowContent(rows, tuple(each % LANE for each in sums))


@dataclass(frozen=True, slots=True, order=True)
class PartitionWindow:
    """One window of one partition."""

    partition: str
    window: Window

    def __str__(self) -> str:
        return f"{self.partition} {self.window}"


class Verdict(Enum):
    """The result for one window, in the symbols of `rclone check`."""

    EQUAL = "="
    MISSING = "-"
    EXTRA = "+"
    DIFFERS = "*"
    ERROR = "!"


@dataclass(frozen=True, slots=True)
class ComparedWindow:
    """The comparison of one window. An end that could not be read is None; `error` and `hint` say why."""

    slot: PartitionWindow
    sign: Verdict
    source: WindowContent | None = None
    destination: WindowContent | None = None
    error: str = ""
    hint: str = ""
    healed: bool = False


class Ends(Protocol):
    """Both ends of one pipeline, for one verification. Not thread-safe. Methods raise AppError.

    `Stopped` ends the verification; any other error affects only its window.
    """

    def partitions(self, span: Window) -> Sequence[str]:
        """Every partition that may have windows in `span`, sorted."""

    def slots(self, span: Window, partition: str | None) -> Iterator[PartitionWindow]:
        """Every ended window of `span` by partition, oldest first; for one partition, or for all when it is None."""

    def source(self, slot: PartitionWindow) -> WindowContent:
        """What the source returns now for the window and a destination must hold, read by a different path than the
        sync.
        """

    def destination(self, slot: PartitionWindow) -> WindowContent:
        """What the destination actually holds under the window's names, read in full."""

    def heal(self, context: Context, slot: PartitionWindow) -> Report:
        """Make the destination hold what the source returns, and commit it. Runs under the job's lease. Idempotent."""


Verification = Callable[[Stop], Ends]
"""Opens both ends of a pipeline; its pauses end with the stop."""


def verify(ends: Ends, span: Window, stop: Stop, partition: str | None = None) -> Iterator[ComparedWindow]:
    """A verdict per window. A mismatch is compared a second time, since a run may have written in between.

    Raises Rejected for an unknown partition.
    """
    refuse_unknown(ends, span, partition)
    for slot in ends.slots(span, partition):
        stop.check()
        verdict = compare(ends, slot)
        yield verdict if verdict.sign is Verdict.EQUAL else compare(ends, slot)


def refuse_unknown(ends: Ends, span: Window, partition: str | None) -> None:
    """Raises Rejected for an unknown partition: comparing nothing must not look like success."""
    if partition is None or partition in (known := ends.partitions(span)):
        return
    others = f" and {len(known) - NAMED} more" if len(known) > NAMED else ""
    hint = f"partitions: {', '.join(known[:NAMED]) or 'none yet'}{others}"
    raise Rejected(f"no partition is named {partition[:80]!r}", hint)


def compare(ends: Ends, slot: PartitionWindow) -> ComparedWindow:
    """Compare both ends of one window, the destination first: rows that arrive in between count as late, never as
    extra.
    """
    destination = source = None
    try:
        destination = ends.destination(slot)
        source = ends.source(slot)
    except (Stopped, LeaseLost):
        raise
    except AppError as error:
        return ComparedWindow(slot, Verdict.ERROR, source, destination, error.message, error.hint)
    return ComparedWindow(slot, sign_of(source, destination), source, destination)


def sign_of(source: WindowContent, destination: WindowContent) -> Verdict:
    """The verdict for the contents of two ends."""
    if source == destination:
        return Verdict.EQUAL
    if not destination.rows:
        return Verdict.MISSING
    return Verdict.DIFFERS if source.rows else Verdict.EXTRA


def heal(
    ends: Ends, span: Window, context: Context, told: Callable[[ComparedWindow], None], partition: str | None = None
) -> Report:
    """Verify `span` and repair mismatches; a window that still differs afterwards is a failure in the report."""
    report = Report()
    for verdict in verify(ends, span, context.stop, partition):
        context.progress.advance(done=1)
        if verdict.sign is Verdict.EQUAL:
            told(verdict)
            continue
        mended, after = Report(), verdict
        try:
            mended = ends.heal(context, verdict.slot)
        except (Stopped, LeaseLost):
            raise
        except AppError as error:
            after = replace(verdict, error=error.message, hint=error.hint)
        else:
            after = compare(ends, verdict.slot)
            if after.sign is Verdict.EQUAL:
                after = replace(after, sign=verdict.sign, healed=True)
        told(after)
        report += mended
        context.done(mended)
        if not after.healed:
            report += Report(failures=(Failure(str(verdict.slot), *why(after)),))
    return report


def why(verdict: ComparedWindow) -> tuple[str, str]:
    """What is wrong with a window, and the next step."""
    if verdict.error:
        return verdict.error, verdict.hint
    words = {Verdict.MISSING: "missing at the destination", Verdict.EXTRA: "only at the destination"}
    source, destination = verdict.source or NOTHING, verdict.destination or NOTHING
    counts = f"{source.rows} rows at the source, {destination.rows} at the destination"
    if source.set_aside:
        counts += f" ({source.set_aside} values set aside are not compared)"
    hint = "rows that the source no longer returns are kept on purpose; else run verify with --heal"
    return f"{words.get(verdict.sign, 'differs')}: {counts}", hint


class CellState(Enum):
    """EMPTY: no data. STALE: not the confirmed version. PARTIAL: some objects are gone.

    OPEN: not finished yet, so its content may still change. WAITING: due, and a later run writes it. MISSING: gone, or
    overdue and not yet written.
    """

    EMPTY = "empty"
    MISSING = "missing"
    PARTIAL = "partial"
    STALE = "stale"
    EQUAL = "equal"
    OPEN = "open"
    WAITING = "waiting"


@dataclass(frozen=True, slots=True)
class FoundObject:
    """One object in a listing: the start of the window that its name gives, and its version."""

    window_start: datetime
    key: str
    version: str


@dataclass(frozen=True, slots=True)
class MapCell:
    """One window of a partition on the map."""

    window: Window
    state: CellState
    rows: int
    objects: int


class GapMapSource(Protocol):
    """What the gap map reads from a pipeline. Raises AppError. Thread-safe."""

    def partitions(self) -> Sequence[str]:
        """Every partition that has a checkpoint, sorted."""

    def cells(self, partition: str, span: Window) -> Sequence[MapCell]:
        """Every window of `span` up to now, oldest first, from a new listing of the destination."""


@dataclass(frozen=True, slots=True)
class MapContext:
    """The time of the map, how long windows accept late rows, and up to where the partition is finished.

    A window is overdue when it has been due for `overdue_seconds` and nothing of it was written. `retired`: start ->
    rows of windows that are no longer recorded; any object found for them counts as right.
    """

    now: datetime
    grace_seconds: float
    cursor_at: datetime | None = None
    overdue_seconds: float = 0.0
    retired: Mapping[datetime, int] = field(default_factory=dict)


def cells_of(
    windows: Iterable[Window], records: Sequence[Record], found: Iterable[FoundObject], at: MapContext
) -> Sequence[MapCell]:
    """A cell per window. `records` are those of the windows; `found` may include objects of other windows."""
    expected: dict[datetime, list[Record]] = {}
    for record in records:
        expected.setdefault(record.window.start, []).append(record)
    there: dict[datetime, dict[str, str]] = {}
    for each in found:
        there.setdefault(each.window_start, {})[each.key] = each.version
    cells = []
    for window in (window for window in windows if window.start < at.now):
        known, objects = expected.get(window.start, ()), there.get(window.start, {})
        state = _state(window, [record for record in known if record.version], objects, at)
        rows = sum(record.rows for record in known) or at.retired.get(window.start, 0)
        cells.append(MapCell(window, state, rows, len(objects)))
    return cells


def _state(window: Window, records: Sequence[Record], there: Mapping[str, str], at: MapContext) -> CellState:
    # Nothing is promised yet after the cursor.
    if at.cursor_at is None or window.end > at.cursor_at:
        if there or not (records or age_of(window, at.now, at.grace_seconds) is Age.DUE):
            return CellState.OPEN
        is_overdue = age_of(window, at.now, at.grace_seconds + at.overdue_seconds) is Age.DUE
        return CellState.MISSING if records or is_overdue else CellState.WAITING
    if window.start in at.retired and not records:
        return CellState.EQUAL if there else CellState.MISSING
    gone = [record for record in records if record.key not in there]
    if gone:
        return CellState.MISSING if len(gone) == len(records) else CellState.PARTIAL
    known = {record.key: record.version for record in records}
    if any(known.get(key) != version for key, version in there.items()):
        return CellState.STALE
    return CellState.EQUAL if records else CellState.EMPTY
