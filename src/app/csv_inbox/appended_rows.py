"""Rows appended to a file after it was merged, by a writer that paused for longer than `checksum_wait_seconds`.

Such a writer holds the file open, so its rows end up in the archived file. Each run checks the files in the load
history: appended rows become a new file in the inbox, below the same header.

Invariant: the new file and the record of how far the old one was ingested are one transaction, so every appended row
returns to the inbox exactly once. Only appended rows do: an archived file that was edited is left to its user.
"""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import IO

from app.core.files import sync_file
from app.csv_inbox.config import FileStillChanging, StuckFile, UnmergeableFile
from app.csv_inbox.csv_tokenizer import CsvDialect, MalformedCsv, blocks
from app.csv_inbox.discovery import (
    MEBIBYTE,
    SUFFIX,
    Candidate,
    InboxRun,
    candidate,
    free_paths,
    md5_of,
    name_folder_in_errors,
    numbered_names,
    open_regular,
    printable,
    read_some,
)
from app.csv_inbox.incoming import read_incoming_header
from app.csv_inbox.quarantine import GrownFile, LoadRecord, save_load
from app.csv_inbox.transaction import Transaction, commit, complete, renaming

log = logging.getLogger(__name__)


def ingest_appended_rows(inbox: InboxRun, each: GrownFile) -> Candidate | None:
    """Put appended rows into the inbox as a new file; None if there are none. Raises OSError."""
    name = printable(each.path.name)
    try:
        with open_regular(each.path) as file, name_folder_in_errors(inbox.config.watch_dir):
            if each.found.size < each.merged.size or md5_of(file, each.merged.size) != each.load.source_md5:
                told = "was changed after it was merged, and not by rows at its end; copy it into the inbox to merge it"
                log.warning("%s %s", name, told)
                inbox.told.append(f"{name} {told}")
            elif each.found.size > each.merged.size:
                return _moved_back(inbox, each, file)
            save_load(inbox.paths.loads, _dealt_with(each, file))
    except (UnmergeableFile, FileStillChanging, StuckFile) as error:
        inbox.tell(f"{name}: rows may have been written to it after it was merged: {error.message}")
    return None


def _dealt_with(each: GrownFile, file: IO[bytes], unended_bytes: int = 0) -> LoadRecord:
    """The record of the merge after the whole file, as found, was processed."""
    found = each.found
    return replace(each.load, source=found, source_md5=md5_of(file, found.size), unended_bytes=unended_bytes)


def _moved_back(inbox: InboxRun, each: GrownFile, file: IO[bytes]) -> Candidate | None:
    start = each.merged.size
    if each.load.unended_bytes:  # the last merged row may continue in the appended bytes
        file.seek(start)
        # If a line end comes first, the last row was complete and only lacked its line end.
        if read_some(file, 2).lstrip(b"\r")[:1] != b"\n":
            start -= each.load.unended_bytes
    temporary = inbox.paths.temporary(each.load.load_id, "tail", inbox.config.watch_dir)
    with temporary.open("xb") as out:
        _copy_part(file, out, 0, each.load.rows_at)
        _copy_part(file, out, start, each.found.size)
        out.flush()
        os.utime(out.fileno(), ns=(each.found.mtime_ns, each.found.mtime_ns))
        sync_file(out.fileno())
    suffixes = (f"{late}{SUFFIX}" for late in numbered_names(f".late-{start}", "-"))
    target = next(free_paths(inbox.config.watch_dir, each.path.name, suffixes))
    unended = _unended_bytes(inbox, temporary, each.found.size - start)
    transaction = Transaction([renaming(temporary, target)], [], None, _dealt_with(each, file, unended))
    if not each.is_steady():
        temporary.unlink()
        raise FileStillChanging(
            f"{each.path.name} is still being written", "no action needed; the next run looks again"
        )
    commit(inbox.paths, transaction)
    complete(inbox.paths, transaction)
    again = "; its last row was incomplete then" if start < each.merged.size else ""
    told = f"{each.found.size - each.merged.size} bytes were written to it after it was merged{again}"
    inbox.tell(f"{printable(each.path.name)}: {told}; taken in as {printable(target.name)}")
    return candidate(target)


def _unended_bytes(inbox: InboxRun, path: Path, tail_bytes: int) -> int:
    """The size of a last row without a line end; `tail_bytes` if the file ends inside quotes."""
    dialect = CsvDialect(inbox.config.csv_delimiter, inbox.config.csv_encoding)
    with path.open("rb") as file:
        try:
            header, own = read_incoming_header(file.read, dialect, ())
            file.seek(header.size_bytes)
            unended = 0
            for block in blocks(file.read, own, 1):
                unended = 0 if block.data.endswith(b"\n") else len(block.data) - int(block.starts[-1])
        except MalformedCsv:  # cut inside quotes: the file is rejected, and its rows come again with what follows
            return tail_bytes
    return unended


def _copy_part(file: IO[bytes], out: IO[bytes], start: int, end: int) -> None:
    file.seek(start)
    while start < end and (piece := read_some(file, min(end - start, MEBIBYTE))):
        out.write(piece)
        start += len(piece)
