"""Rows that are written to a file after it was merged, by a writer that paused for longer than a file has to be steady.

Such a writer holds the file open, so its rows end up in the archived file. Each run looks at the files that were merged
last: what has grown behind what was merged becomes a file of its own in the inbox, below the same header.

Invariant: the new file and the note of how far the old one was taken in are one committed step, so every row that was
added comes back to the inbox once. Only what was appended does: a file in the archive that was edited is a person's.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from app.core.files import bounded_name, sync_file
from app.csv_inbox.config import Stuck, Unmergeable, Unsteady
from app.csv_inbox.csv_tokenizer import Dialect, Malformed
from app.csv_inbox.discovery import (
    PIECE_BYTES,
    SUFFIX,
    Candidate,
    Identity,
    Places,
    Work,
    candidate,
    identity_of,
    md5_of,
    open_regular,
    placed,
    printable,
    read_some,
)
from app.csv_inbox.quarantine import KEPT_LOADS, MERGED, Load, loads, save_load
from app.csv_inbox.transaction import Step, carry_out, commit, renaming

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Grown:
    """A file of the archive that is not as it was when it was merged. `load` is the record of the merge."""

    load: Load
    path: Path
    found: Identity

    @property
    def merged(self) -> Identity:
        """The file when it was last looked at."""
        return Identity(*self.load.source)

    def is_steady(self) -> bool:
        """True while nothing more is written."""
        return self.path.exists() and identity_of(self.path.lstat()) == self.found


def grown(places: Places) -> Sequence[Grown]:
    """What was written to since, among the files that the load history knows. Raises OSError."""
    merged = [load for load in loads(places.loads, KEPT_LOADS) if load.outcome == MERGED and load.source]
    changed = []
    for load in merged:
        path = places.config.archive_dir / load.archive_name
        try:
            found = identity_of(path.lstat())
        except FileNotFoundError:
            continue
        held = Identity(*load.source)
        if found != held and (found.device, found.inode) == (held.device, held.inode):
            changed.append(Grown(load, path, found))
    return changed


def take_in(work: Work, each: Grown) -> Candidate | None:
    """Put what was added into the inbox as a file of its own; None when nothing was. Raises OSError."""
    name = printable(each.path.name)
    try:
        with open_regular(each.path) as file, placed(work.config.watch_dir):
            if each.found.size < each.merged.size or md5_of(file, each.merged.size) != each.load.source_md5:
                told = "was changed after it was merged, and not by rows at its end; copy it into the inbox to merge it"
                log.warning("%s %s", name, told)
                work.told.append(f"{name} {told}")
            elif each.found.size > each.merged.size:
                return _moved_back(work, each, file)
            save_load(work.places.loads, _dealt_with(each, file))
    except (Unmergeable, Unsteady, Stuck) as error:
        work.tell(f"{name}: rows may have been written to it after it was merged: {error.message}")
    return None


def _dealt_with(each: Grown, file: IO[bytes], unended_bytes: int = 0) -> Load:
    """The record of the merge once all of the file is dealt with."""
    found = each.found
    source = (found.device, found.inode, found.size, found.mtime_ns)
    return replace(each.load, source=source, source_md5=md5_of(file, found.size), unended_bytes=unended_bytes)


def _moved_back(work: Work, each: Grown, file: IO[bytes]) -> Candidate | None:
    start = _first_row_at(file, each)
    temporary = work.places.temporary_tail(each.load.load_id)
    with temporary.open("xb") as out:
        _copy(file, out, 0, each.load.rows_at)
        _copy(file, out, start, each.found.size)
        out.flush()
        os.utime(out.fileno(), ns=(each.found.mtime_ns, each.found.mtime_ns))
        sync_file(out.fileno())
    target = _target(work, each, start)
    unended = _unended_bytes(work, temporary, each.found.size - start)
    step = Step([renaming(temporary, target)], [], None, _dealt_with(each, file, unended))
    if not each.is_steady():
        temporary.unlink()
        raise Unsteady(f"{each.path.name} is still being written", "no action needed; the next run looks again")
    commit(work.places, step)
    carry_out(work.places, step)
    again = "; its last row was incomplete then" if start < each.merged.size else ""
    told = f"{each.found.size - each.merged.size} bytes were written to it after it was merged{again}"
    work.tell(f"{printable(each.path.name)}: {told}; taken in as {printable(target.name)}")
    return candidate(target)


def _target(work: Work, each: Grown, start: int) -> Path:
    number = 0
    while True:
        name = bounded_name(each.path.name, f".late-{start}{f'-{number}' if number else ''}{SUFFIX}")
        if not os.path.lexists(work.config.watch_dir / name):
            return work.config.watch_dir / name
        number += 1


def _unended_bytes(work: Work, path: Path, tail_bytes: int) -> int:
    """The size of a last row without a line end; of the whole tail where that cannot be told."""
    from app.csv_inbox.csv_tokenizer import blocks
    from app.csv_inbox.header import read_incoming_header  # with numpy, which a run that finds nothing does not need

    dialect = Dialect(work.config.csv_delimiter, work.config.csv_encoding)
    with path.open("rb") as file:
        try:
            header, own = read_incoming_header(file.read, dialect, ())
            file.seek(header.size_bytes)
            unended = 0
            for block in blocks(file.read, own, 1):
                unended = 0 if block.data.endswith(b"\n") else len(block.data) - int(block.starts[-1])
        except Malformed:  # cut inside quotes: the file is set aside, and comes again with what follows
            return tail_bytes
    return unended


def _first_row_at(file: IO[bytes], each: Grown) -> int:
    """Where the added rows begin: at the last row that was merged if that goes on in them."""
    size = each.merged.size
    if not each.load.unended_bytes:
        return size
    file.seek(size)
    goes_on = read_some(file, 2).lstrip(b"\r")[:1] != b"\n"
    return size - each.load.unended_bytes if goes_on else size


def _copy(file: IO[bytes], out: IO[bytes], start: int, end: int) -> None:
    file.seek(start)
    while start < end and (piece := read_some(file, min(end - start, PIECE_BYTES))):
        out.write(piece)
        start += len(piece)
