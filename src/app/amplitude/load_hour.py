"""One hour of a source: its events into the warehouse, its NDJSON into an object, and then the record of both.

Order: rows, object, what was set aside, record. A crash before the record repeats the hour; all of it is recognized by
its content, so nothing is doubled. Invariants: memory is bounded, whatever the hour holds; the object holds every line
as it came, also those that are not events; a fault of the hour is told from one of the store or the warehouse.
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, BinaryIO, cast

from app.amplitude.archives import Archive, Member, inflated, joined
from app.core.errors import AppError, Permanent, Rejected, Transient
from app.core.pipeline import Record
from app.core.runs import Ledger, Tally, ledger_of
from app.core.windows import Window
from app.product_events.mapping import Loaded, Tables, events_in, load_in_turns
from app.product_events.pull import GZIP, PartitionRun, record_of_nothing, store_rows
from app.product_events.raw_objects import PutPolicy, RawObject, RefusedLines, keep, was_had

if TYPE_CHECKING:
    from app.amplitude.events import Block, HourStats

NAME = "amplitude"
UNIT = "lines"
GZIP_HEAD = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SourceHour:
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


def set_aside_name(source: str, window: Window) -> tuple[str, ...]:
    """What was set aside of an hour lies below `amplitude/_set_aside/{source}/{date}/{HH}`."""
    return source, f"{window.start:%Y-%m-%d}", f"{window.start:%H}"


class BrokenHour(Exception):
    """What the service gave of an hour cannot be read, as `fault` says. Its rows were not loaded."""

    def __init__(self, fault: AppError) -> None:
        super().__init__(str(fault))
        self.fault = fault


def load_hour(
    run: PartitionRun, archive: Archive | None, hour: SourceHour, *, put: PutPolicy = keep
) -> tuple[Record, int, Ledger]:
    """Load the hour: the record to commit, how many events are new, and the ledger of its lines.

    Raises BrokenHour when it cannot be read, and what store and warehouse raise.
    """
    if archive is None or not hour.members:
        return _empty(hour), 0, Ledger()
    with tempfile.TemporaryFile(dir=run.pull.spool) as file, closing(RefusedLines(run.pull.spool)) as refused:
        lines = _Lines(run, hour, cast("BinaryIO", file), refused)
        with _broken():
            _gather(archive, hour.members, lines.file)
        known = hour.record if was_had(hour.record) and not hour.again else None
        if known and known.digest:
            seen = lines.read()
            if seen.digest == known.digest:
                record = replace(_same(known, final=hour.final), source_cells=known.rows + seen.fault_rows)
                return record, 0, lines.ledger(Loaded(known.rows))
        seen, loaded = lines.load()
        if seen.fault_rows:
            where = "lines are not events; they are in the object and in _set_aside, not in the warehouse"
            log.warning("%s: %d %s: %s", hour.key, seen.fault_rows, where, "; ".join(seen.faults))
        if run.context.dry_run:
            empty = record_of_nothing(hour.window, hour.key, closed=hour.final)
            return replace(empty, rows=seen.rows, size_bytes=lines.file.seek(0, 2)), 0, Ledger()
        what = RawObject(NAME, hour.key, hour.window, GZIP, seen.rows, seen.digest)
        record = store_rows(run.pull.store, put, lines.file, what, refused=seen.fault_rows, closed=hour.final)
        return record, loaded.new, lines.ledger(loaded)


def _empty(hour: SourceHour) -> Record:
    """An hour without events; one that had some keeps them."""
    if hour.record is not None and hour.record.rows:
        log.warning("%s: the service has no events of this hour any more; those that were loaded stay", hour.key)
        return _same(hour.record, final=hour.final)
    return record_of_nothing(hour.window, hour.key, closed=hour.final)


def _same(record: Record, *, final: bool) -> Record:
    return replace(record, closed=record.closed or final)


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


@dataclass(slots=True)
class _Lines:
    """The lines of an hour in a file. Each pass counts them anew, and sets aside anew what is no event."""

    run: PartitionRun
    hour: SourceHour
    file: BinaryIO
    refused: RefusedLines
    counted: int = 0

    def read(self) -> "HourStats":
        """What the hour holds, without loading it."""
        seen = self._begin()
        for _ in self._tables(seen, careful=False):
            pass
        return seen

    def load(self) -> "tuple[HourStats, Loaded]":
        """Load all; where the warehouse refuses a value, each event with sanitised values, at last one by one."""
        if self.run.context.dry_run:
            return self.read(), Loaded()
        for careful in (False, True):
            seen = self._begin()
            try:
                tables = self._tables(seen, careful=careful)
                return seen, load_in_turns(self.run.pull.warehouse.load, tables, past=self.hour.past)
            except Rejected as error:
                log.warning("%s: retrying row by row with sanitised values: %s", self.hour.key, error)
        seen = self._begin()
        return seen, self._load_each(seen)

    def ledger(self, loaded: Loaded) -> Ledger:
        """Lines are counted as they are read, events where the warehouse took them, what is set aside where it lies."""
        counted = self.counted
        tally = Tally(counted=counted, read=counted, new=loaded.new, already_there=loaded.given - loaded.new)
        entries = () if self.run.context.dry_run else self.refused.keep(self.run.pull.set_aside)
        return ledger_of(tally, *entries, unit=UNIT)

    def _begin(self) -> "HourStats":
        from app.amplitude.events import HourStats  # the decoder, which an idle daemon does without

        def refuse(reason: str, line: bytes, place: str) -> None:
            name = set_aside_name(self.hour.source, self.hour.window)
            self.refused.add(name, reason, line, f"{self.hour.key} {place}")

        self.refused.close()
        self.counted = 0
        return HourStats(refuse)

    def _blocks(self) -> "Iterator[Block]":
        """The lines, counted as they come."""
        from app.amplitude.events import blocks, lines_in

        self.file.seek(0)
        found = blocks(inflated(self.file))
        while True:
            self.run.context.stop.check()
            with _broken():
                block = next(found, None)
            if block is None:
                return
            self.counted += lines_in(block)
            yield block

    def _tables(self, seen: "HourStats", *, careful: bool) -> Iterator[Tables]:
        from app.amplitude.events import reader

        for block in self._blocks():
            yield reader().tables(block, seen, careful=careful)

    def _load_each(self, seen: "HourStats") -> Loaded:
        """Load line by line: the warehouse refuses some event even sanitised, and that one alone is set aside."""
        from app.amplitude.events import REFUSED, HourStats, reader

        done, load = Loaded(), self.run.pull.warehouse.load
        for block in self._blocks():
            if not isinstance(block, bytes):
                reader().tables(block, seen)
                continue
            for line in filter(bytes.strip, block.split(b"\n")):
                found = reader().tables(line, alone := HourStats(seen.refuse), careful=True)
                try:
                    done += Loaded(events_in(found), load([found], past=self.hour.past) if found else 0)
                except Rejected as error:
                    seen.refused(REFUSED, line, seen.lines + 1, f"refused by the warehouse: {error.message}")
                else:
                    seen.add(alone)
        return done
