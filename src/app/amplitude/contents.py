"""What archives and objects hold, as sums over their events: the same events give the same content wherever they lie.

Invariants: an event counts by all that it holds, in whatever order its members are written; a line that is no event
counts by its bytes; objects are read to the last byte, and memory is bounded by a block.
"""

import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from shutil import copyfileobj
from typing import TYPE_CHECKING, BinaryIO, cast

from app.amplitude.archive import Archive, read_errors, readable
from app.amplitude.deflate import inflated
from app.core.errors import Permanent, Transient
from app.core.verify import NOTHING, Content, content_of
from app.stores.objects import ObjectInfo, ObjectStore
from app.stores.product_loading import Known, lost

if TYPE_CHECKING:
    from app.amplitude.events import Block

PIECE_BYTES = 1 << 18
DAMAGED = "heal the window: the object is written again from what the service gives"
LOST = "heal the window: its events are loaded again"


def content_of_events(blocks: "Iterable[Block]") -> Content:
    """The content of blocks of whole lines."""
    total = NOTHING
    for block in blocks:
        if isinstance(block, bytes):
            total += content_of({"event": _canonical(line)} for line in block.split(b"\n") if line.strip())
        else:
            total += content_of([{"event": f"{block.size_bytes} bytes, {block.sha256}"}])
    return total


def _canonical(line: bytes) -> str:
    import msgspec  # the decoder, which an idle daemon does without

    try:
        return msgspec.json.encode(msgspec.json.decode(line), order="sorted").decode()
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return line.strip().decode("utf-8", "backslashreplace")


def content_of_hour(archive: Archive | None, hour_at: datetime, safe_point: Callable[[], None]) -> Content:
    """What the service gives for an hour; an archive that is None has no events."""
    total = NOTHING
    for member in archive.hours().get(hour_at, ()) if archive else ():
        with archive.open(member) as packed:  # type: ignore[union-attr]  # there are members
            total += content_of_events(_blocks(inflated(packed), safe_point))
    return total


@dataclass(frozen=True, slots=True)
class Objects:
    """Reads the objects of a pull. Raises Permanent for a damaged one, Conflict when it is no longer that version."""

    store: ObjectStore
    spool: Path
    safe_point: Callable[[], None]

    def hour(self, info: ObjectInfo, known: Known | None = None) -> Content:
        """What the object of an hour holds. Raises Permanent when `known` is given and lacks an event of it."""
        from app.amplitude.events import Seen, reader

        total, seen, lacking = NOTHING, Seen(), 0
        with self._downloaded(info) as file:
            for block in _blocks(inflated(file), self.safe_point):
                total += content_of_events([block])
                if known is not None:
                    lacking += lost(known, reader().tables(block, seen))
        if lacking:
            raise Permanent(f"{lacking} of {seen.rows} events of {info.key} are not in the warehouse", LOST)
        return total

    def week(self, info: ObjectInfo) -> Content:
        """What the object of a week holds."""
        total = NOTHING
        with self._downloaded(info) as file, read_errors(), readable(lambda: zipfile.ZipFile(file)) as archive:
            for name in archive.namelist():
                with readable(lambda name=name: archive.open(name)) as entry:  # type: ignore[misc]  # bound now
                    pieces = iter(lambda entry=entry: entry.read(PIECE_BYTES), b"")  # type: ignore[misc]  # bound now
                    total += content_of_events(_blocks(pieces, self.safe_point))
        return total

    @contextmanager
    def _downloaded(self, info: ObjectInfo) -> Iterator[BinaryIO]:
        """The object in a file, so that what goes wrong inside is the object's own fault."""
        with tempfile.TemporaryFile(dir=self.spool) as file:
            with self.store.open(info.key, info.etag) as stream:
                if stream is None:
                    raise Transient(f"{info.key} went away while it was read", "verify again")
                copyfileobj(stream, file, PIECE_BYTES)
            file.seek(0)
            try:
                yield cast("BinaryIO", file)
            except Transient as error:
                raise Permanent(f"{info.key} is damaged: {error.message}", DAMAGED) from error


def _blocks(pieces: Iterator[bytes], safe_point: Callable[[], None]) -> "Iterator[Block]":
    from app.amplitude.events import blocks

    for block in blocks(pieces):
        safe_point()
        yield block
