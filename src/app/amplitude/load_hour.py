"""One hour of a source: its events into the warehouse, its NDJSON into an object, and then the record of both.

Order: rows, object, what was set aside, record. A crash before the record repeats the hour, and all of them are told
by their content, so nothing is doubled. Invariants: memory is bounded, whatever the hour holds; the object holds every
line as it came, also those that are not events; a fault of the hour is told from one of where it lands.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from app.amplitude.archives import Archive, Member, inflated, joined
from app.core.errors import AppError, Permanent, Rejected, Transient
from app.core.ledger import Ledger, Tally, ledger_of
from app.core.pipeline import Record
from app.core.windows import Window
from app.object_store.port import ObjectStore
from app.object_store.set_aside import SetAsideStore
from app.product_events.mapping import Load, Loaded, Tables, events_in, load_in_turns
from app.product_events.raw_objects import Keep, RawObject, RefusedLines, keep, was_had

if TYPE_CHECKING:
    from app.amplitude.events import Block, Seen

NAME = "amplitude"
UNIT = "lines"
HOUR = timedelta(hours=1)
GZIP = "application/gzip"
GZIP_HEAD = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Grounds:
    """Where hours land. `safe_point` raises Stopped when a stop was asked for; `keep` is how objects are stored."""

    store: ObjectStore
    load: Load
    spool: Path
    safe_point: Callable[[], None]
    set_aside: SetAsideStore
    dry_run: bool = False
    keep: Keep = keep


@dataclass(frozen=True, slots=True)
class Hour:
    """One hour of an archive, and what is known of it from before. `past`: it is not the newest one.

    `again`: load its rows whatever the record says; `final`: this is the last look.
    """

    source: str
    window: Window
    members: Sequence[Member]
    record: Record | None
    past: bool = False
    again: bool = False
    final: bool = False

    @property
    def key(self) -> str:
        """The name of its object."""
        return hour_key(self.source, self.window)


def hour_key(source: str, window: Window) -> str:
    """`amplitude/{source}/hours/{date}/{HH}.ndjson.gz`."""
    return f"{NAME}/{source}/hours/{window.start:%Y-%m-%d}/{window.start:%H}.ndjson.gz"


class BrokenHour(Exception):
    """What the service gave of an hour cannot be read, as `fault` says. Its rows were not loaded."""

    def __init__(self, fault: AppError) -> None:
        super().__init__(str(fault))
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Landed:
    """What became of an hour: the record to commit, how many events are new, and the ledger of its lines."""

    record: Record
    new: int = 0
    ledger: Ledger = field(default_factory=Ledger)


@dataclass(slots=True)
class _Reading:
    """The lines of an hour while they are read: `lines` as they came, and what the decoder made of them."""

    seen: "Seen"
    lines: int = 0


def land(grounds: Grounds, archive: Archive | None, hour: Hour) -> Landed:
    """Land the hour. Raises BrokenHour when it cannot be read, and what its other parts raise."""
    if archive is None or not hour.members:
        return Landed(_empty(hour))
    with tempfile.TemporaryFile(dir=grounds.spool) as spooled, closing(RefusedLines(grounds.spool)) as refused:
        file = cast("BinaryIO", spooled)
        with _broken():
            _gather(archive, hour.members, file)
        if was_had(hour.record) and hour.record and hour.record.digest and not hour.again:
            reading = _read(grounds, file, _refusing(hour, refused))
            if reading.seen.digest == hour.record.digest:
                record = _same(hour.record, final=hour.final)
                record = replace(record, source_cells=record.rows + reading.seen.fault_rows)
                return Landed(record, 0, _ledger(grounds, reading, Loaded(hour.record.rows), refused))
            refused.close()
        reading, loaded = _load(grounds, hour, file, refused)
        _tell(hour, reading.seen)
        record = _record(hour, reading.seen, file.seek(0, 2))
        if grounds.dry_run:
            return Landed(record)
        what = RawObject(NAME, hour.key, hour.window, GZIP, record.rows, record.digest)
        held = grounds.keep(grounds.store, file, what)
        rows = reading.seen.rows if held.rows is None else held.rows
        record = replace(
            record,
            version=held.version,
            size_bytes=held.size_bytes,
            rows=rows,
            digest=held.digest,
            source_cells=rows + reading.seen.fault_rows,
        )
        return Landed(record, loaded.new, _ledger(grounds, reading, loaded, refused))


@contextmanager
def _broken() -> Iterator[None]:
    try:
        yield
    except (Transient, Permanent) as error:
        raise BrokenHour(error) from error


def _gather(archive: Archive, members: Sequence[Member], file: BinaryIO) -> None:
    """The members as one gzip file, every event on a line of its own, the same bytes for the same members."""
    stream = joined()
    file.write(GZIP_HEAD)
    for member in members:
        with archive.open(member) as packed:
            file.writelines(stream.add(packed))
        if stream.last not in (b"", b"\n"):
            file.write(stream.newline())
    file.write(stream.finish())
    file.write(stream.crc.to_bytes(4, "little") + (stream.size_bytes & 0xFFFFFFFF).to_bytes(4, "little"))


def _blocks(grounds: Grounds, file: BinaryIO, reading: _Reading) -> "Iterator[Block]":
    """The hour's lines, counted as they come."""
    from app.amplitude.events import blocks, lines_in  # the decoder, which an idle daemon does without

    file.seek(0)
    with _broken():
        found = blocks(inflated(file))
    while True:
        grounds.safe_point()
        with _broken():
            block = next(found, None)
        if block is None:
            return
        reading.lines += lines_in(block)
        yield block


def _tables(grounds: Grounds, file: BinaryIO, reading: _Reading, *, careful: bool) -> Iterator[Tables]:
    from app.amplitude.events import reader

    for block in _blocks(grounds, file, reading):
        yield reader().tables(block, reading.seen, careful=careful)


def _read(grounds: Grounds, file: BinaryIO, reading: _Reading) -> _Reading:
    """What the hour holds, without loading it."""
    for _ in _tables(grounds, file, reading, careful=False):
        pass
    return reading


def _refusing(hour: Hour, refused: RefusedLines) -> _Reading:
    """Lines that are no events go to `refused`, under the hour."""
    from app.amplitude.events import Seen

    def refuse(reason: str, line: bytes, place: str) -> None:
        refused.add(set_aside_name(hour.source, hour.window), reason, line, f"{hour.key} {place}")

    return _Reading(Seen(refuse))


def _load(grounds: Grounds, hour: Hour, file: BinaryIO, refused: RefusedLines) -> tuple[_Reading, Loaded]:
    reading = _refusing(hour, refused)
    if grounds.dry_run:
        return _read(grounds, file, reading), Loaded()
    for careful in (False, True):
        try:
            tables = _tables(grounds, file, reading, careful=careful)
            return reading, load_in_turns(grounds.load, tables, past=hour.past)
        except Rejected as error:
            log.warning("%s: the warehouse refuses a value, each event is mended: %s", hour.key, error)
            refused.close()
            reading = _refusing(hour, refused)
    return reading, _load_each(grounds, hour, file, reading)


def _load_each(grounds: Grounds, hour: Hour, file: BinaryIO, reading: _Reading) -> Loaded:
    """Load line by line: the warehouse refuses some event even when it is mended, and that one alone is refused."""
    from app.amplitude.events import REFUSED, Seen, reader

    done, seen = Loaded(), reading.seen
    for block in _blocks(grounds, file, reading):
        if not isinstance(block, bytes):
            reader().tables(block, seen)
            continue
        for line in filter(bytes.strip, block.split(b"\n")):
            found = reader().tables(line, alone := Seen(seen.refuse), careful=True)
            try:
                done += Loaded(events_in(found), grounds.load([found], past=hour.past) if found else 0)
            except Rejected as error:
                seen.refused(REFUSED, line, seen.lines + 1, f"refused by the warehouse: {error.message}")
            else:
                seen.add(alone)
    return done


def _ledger(grounds: Grounds, reading: _Reading, loaded: Loaded, refused: RefusedLines) -> Ledger:
    """Lines are counted as they are read, events where the warehouse took them, and what is set aside where it lies."""
    tally = Tally(counted=reading.lines, read=reading.lines, new=loaded.new, already_there=loaded.given - loaded.new)
    entries = () if grounds.dry_run else refused.keep(grounds.set_aside)
    return ledger_of(tally, *entries, unit=UNIT)


def _tell(hour: Hour, seen: "Seen") -> None:
    if seen.fault_rows:
        log.warning(
            "%s: %d lines are not events; they are in the object and in _set_aside, not in the warehouse: %s",
            hour.key,
            seen.fault_rows,
            "; ".join(seen.faults),
        )


def _record(hour: Hour, seen: "Seen", size_bytes: int) -> Record:
    """`source_cells` counts lines, so what it has more than `rows` are lines that are not events."""
    return Record(
        window=hour.window,
        part=0,
        key=hour.key,
        version="",
        digest=seen.digest,
        rows=seen.rows,
        size_bytes=size_bytes,
        source_cells=seen.lines,
        min_at=hour.window.start,
        max_at=hour.window.end,
        closed=hour.final,
    )


def _empty(hour: Hour) -> Record:
    """An hour without events; one that had some keeps them."""
    if hour.record is not None and hour.record.rows:
        log.warning("%s: the service has no events of this hour any more; those that were landed stay", hour.key)
        return _same(hour.record, final=hour.final)
    return Record(hour.window, 0, hour.key, "", "", 0, 0, 0, None, None, closed=hour.final)


def _same(record: Record, *, final: bool) -> Record:
    return replace(record, closed=record.closed or final)


def set_aside_name(source: str, window: Window) -> tuple[str, ...]:
    """What was set aside of an hour lies below `amplitude/_set_aside/{source}/{date}/{HH}`."""
    return source, f"{window.start:%Y-%m-%d}", f"{window.start:%H}"
