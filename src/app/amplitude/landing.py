"""One hour of a source: its events into the warehouse, its NDJSON into an object, and then the record of both.

Order: rows, object, record. A crash before the record repeats the hour, and both rows and object are told by their
content, so nothing is doubled. Invariant: memory is bounded, whatever the hour holds.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from app.amplitude.archive import Archive, Member
from app.amplitude.deflate import inflated, joined
from app.core.errors import Rejected
from app.core.ports import Record
from app.core.window import Window
from app.stores.objects import ObjectStore
from app.stores.product_loading import Load, load_in_turns
from app.stores.product_mapping import Tables
from app.stores.raw_objects import Keep, RawObject, keep

if TYPE_CHECKING:
    from app.amplitude.events import Seen

NAME = "amplitude"
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


def land(grounds: Grounds, archive: Archive | None, hour: Hour) -> tuple[Record, int]:
    """Land the hour; the record to commit, and how many events are new. Raises what its parts raise."""
    if archive is None or not hour.members:
        return _empty(hour), 0
    with tempfile.TemporaryFile(dir=grounds.spool) as file:
        _gather(archive, hour.members, cast("BinaryIO", file))
        known = hour.record.digest if hour.record and not hour.again else ""
        if known and _read(grounds, file).digest == known and hour.record:
            return _same(hour.record, final=hour.final), 0
        seen, new = _load(grounds, hour, file)
        _tell(hour, seen)
        record = _record(hour, seen, file.seek(0, 2))
        if not grounds.dry_run:
            what = RawObject(NAME, hour.key, hour.window, GZIP, record.rows, record.digest)
            held = grounds.keep(grounds.store, cast("BinaryIO", file), what)
            rows = seen.rows if held.rows is None else held.rows
            record = replace(record, version=held.version, size_bytes=held.size_bytes, rows=rows, digest=held.digest)
    return record, new


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


def _tables(grounds: Grounds, file: BinaryIO, seen: "Seen", *, careful: bool) -> Iterator[Tables]:
    from app.amplitude.events import blocks, reader  # the decoder, which an idle daemon does without

    file.seek(0)
    for block in blocks(inflated(file)):
        grounds.safe_point()
        yield reader().tables(block, seen, careful=careful)


def _read(grounds: Grounds, file: BinaryIO) -> "Seen":
    """What the hour holds, without loading it."""
    from app.amplitude.events import Seen

    seen = Seen()
    for _ in _tables(grounds, file, seen, careful=False):
        pass
    return seen


def _load(grounds: Grounds, hour: Hour, file: BinaryIO) -> "tuple[Seen, int]":
    if grounds.dry_run:
        return _read(grounds, file), 0
    try:
        return _loaded(grounds, hour, file, careful=False)
    except Rejected as error:
        log.warning("%s: the warehouse refuses a value, each event is mended: %s", hour.key, error)
        return _loaded(grounds, hour, file, careful=True)


def _loaded(grounds: Grounds, hour: Hour, file: BinaryIO, *, careful: bool) -> "tuple[Seen, int]":
    from app.amplitude.events import Seen

    seen = Seen()
    new = load_in_turns(grounds.load, _tables(grounds, file, seen, careful=careful), past=hour.past)
    return seen, new


def _tell(hour: Hour, seen: "Seen") -> None:
    if seen.fault_rows:
        log.warning(
            "%s: %d lines are no events and are only in the object: %s",
            hour.key,
            seen.fault_rows,
            "; ".join(seen.faults),
        )


def _record(hour: Hour, seen: "Seen", size_bytes: int) -> Record:
    """`source_cells` counts lines, so what it has more than `rows` are lines that are no events."""
    return Record(
        window=hour.window,
        part=0,
        key=hour.key,
        version="",
        digest=seen.digest,
        rows=seen.rows,
        size_bytes=size_bytes,
        source_cells=seen.rows + seen.fault_rows,
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
