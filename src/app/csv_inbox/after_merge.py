"""What may follow a merge: rows that are appended to its file later, and undo. Each is one transaction.

Invariants: appended rows return to the inbox exactly once; an archived file that was edited in any other way is left to
its user. Undo restores the master byte for byte, newest merge first, and never overwrites a master that changed since.
"""

import logging
import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import IO

from app.core.errors import Rejected
from app.core.files import keep_mode, sync_file
from app.csv_inbox.config import FileStillChanging, InboxConfig, StuckFile, UnmergeableFile, printable
from app.csv_inbox.csv_tokenizer import CsvDialect, blocks
from app.csv_inbox.discovery import (
    MEBIBYTE,
    SUFFIX,
    Candidate,
    InboxPaths,
    InboxRun,
    free_paths,
    identity_at,
    link_or_copy,
    md5_of,
    open_regular,
    read_some,
    translate_os_errors,
)
from app.csv_inbox.incoming import read_header
from app.csv_inbox.transaction import (
    MERGED,
    UNDONE,
    LoadRecord,
    commit,
    is_as_left,
    loads,
    revert_file,
    save_load,
    written_metadata,
)

LEAST_CHARACTERS = 4

# Rows appended to a file after it was merged, by a writer that paused for longer than `checksum_wait_seconds`. Such a
# writer holds the file open, so its rows end up in the archived file. They become a new file in the inbox, below the
# same header; that file and the record of how far the old one was ingested are one transaction.


def ingest_appended_rows(inbox: InboxRun, load: LoadRecord, grown: Candidate) -> Candidate | None:
    """Put rows appended to a merged file into the inbox as a new file; None if there are none. Raises OSError."""
    merged, found = load.source, grown.identity
    try:
        with open_regular(grown.path) as file, translate_os_errors(str(inbox.config.watch_dir)):
            dealt_with = replace(load, source=found, source_md5=md5_of(file, found.size), unended_bytes=0)
            if found.size < merged.size or md5_of(file, merged.size) != load.source_md5:
                told = "was changed after it was merged, and not by rows at its end; copy it into the inbox to merge it"
                inbox.tell(f"{grown.name} {told}", logging.WARNING)
            elif found.size > merged.size:
                return _moved_back(inbox, load, dealt_with, grown, file)
            save_load(inbox.paths.loads, dealt_with)
    except (UnmergeableFile, FileStillChanging, StuckFile) as error:
        inbox.tell(f"{grown.name}: rows may have been written to it after it was merged: {error.message}")
    return None


def _moved_back(
    inbox: InboxRun, load: LoadRecord, dealt_with: LoadRecord, grown: Candidate, file: IO[bytes]
) -> Candidate | None:
    paths, found, start = inbox.paths, grown.identity, load.source.size
    told = f"{found.size - start} bytes were written to it after it was merged"
    if load.unended_bytes:  # the last merged row may continue in the appended bytes
        file.seek(start)
        # If a line end comes first, the last row was complete and only lacked its line end.
        if read_some(file, 2).lstrip(b"\r")[:1] != b"\n":
            start -= load.unended_bytes
            told += "; its last row was incomplete then"
    temporary = paths.temporary(load.load_id, "tail", inbox.config.watch_dir)
    with temporary.open("xb") as out:
        file.seek(0)
        _copy(file, out, load.rows_at, lambda _: None)
        file.seek(start)
        _copy(file, out, found.size - start, lambda _: None)
        out.flush()
        os.utime(out.fileno(), ns=(found.mtime_ns, found.mtime_ns))
        sync_file(out.fileno())
    target = next(free_paths(inbox.config.watch_dir, grown.path.name, f".late-{start}", end=SUFFIX))
    dealt_with = replace(dealt_with, unended_bytes=_unended_bytes(inbox.config, temporary, found.size - start))
    if not grown.is_unchanged():
        temporary.unlink()
        raise FileStillChanging("it is still being written")
    commit(paths, dealt_with, [(temporary, target)])
    inbox.tell(f"{grown.name}: {told}; ingested as {printable(target.name)}")
    identity = identity_at(target)
    return Candidate(target, identity) if identity else None


def _unended_bytes(config: InboxConfig, path: Path, tail_bytes: int) -> int:
    """The size of a last row without a line end; `tail_bytes` if the file ends inside quotes."""
    with path.open("rb") as file:
        try:
            header = read_header(file.read, CsvDialect(config.csv_delimiter, config.csv_encoding), ())
            file.seek(header.size_bytes)
            unended = 0
            for block in blocks(file.read, header.dialect, 1):
                unended = 0 if block.data.endswith(b"\n") else len(block.data) - int(block.starts[-1])
        except UnmergeableFile:  # cut inside quotes: the file is rejected, and its rows come again with what follows
            return tail_bytes
    return unended


# Undo: archived files stay in the archive.


def to_undo(paths: InboxPaths, run_id: str) -> Sequence[LoadRecord]:
    """The merges of a run and all later ones, newest first. `run_id` may be a prefix. Raises Rejected."""
    merged = [load for load in loads(paths.loads) if load.outcome == MERGED]
    wanted = [place for place, load in enumerate(merged) if load.run_id.startswith(run_id)]
    if not wanted or len(run_id) < LEAST_CHARACTERS:
        told = f"no merge of a run {run_id[:40]!r} is in the history"
        raise Rejected(told, "take the run from: python -m app runs csv_inbox")
    if len({merged[place].run_id for place in wanted}) > 1:
        raise Rejected(f"several runs begin with {run_id!r}", "give more of the run's id")
    taken = merged[: wanted[-1] + 1]
    gone = next((load for load in taken if not revert_file(paths.loads, load.load_id).exists()), None)
    if gone is not None:
        kept = paths.config.undo_keep
        hint = f"only the last undo_keep={kept} merges can be taken back; drop corrected rows into the inbox instead"
        raise Rejected(f"the merge of {gone.file} at {gone.at} can no longer be undone", hint)
    return taken


def preview(load: LoadRecord) -> str:
    """Describes what undoing this merge does."""
    return (
        f"{load.file}, merged {load.at}: {load.inserted} inserted rows go, {load.replaced + load.unchanged} rows come "
        f"back as they were; {load.rows_after} rows become {load.rows_before}"
    )


def check_master(config: InboxConfig, load: LoadRecord) -> None:
    """Raises Rejected unless the master is as this merge left it, by size and modification time."""
    if not is_as_left(config, load):
        raise Rejected(
            f"{config.merged_file.name} was changed by something else since {load.file} was merged",
            "put back the file as the merge left it; undoing would destroy what was done since",
        )


def undo_merge(paths: InboxPaths, load: LoadRecord, at: datetime, beat: Callable[[int], None]) -> None:
    """Undo the newest merge; `beat` receives the bytes written and may stop it before the commit.

    Raises Rejected if the master was changed since, and OSError.
    """
    config = paths.config
    check_master(config, load)
    removed = revert_file(paths.loads, load.load_id)
    renamings, removals = [], [removed]
    if load.revert == "first":
        removals = [config.merged_file, config.metadata_file, removed]
    else:
        restored = paths.temporary(load.load_id, "restored")
        if load.revert == "whole":
            link_or_copy(removed, restored)
        else:
            _splice(config, load, removed, restored, beat)
        with restored.open("rb", buffering=0) as file:
            header = read_header(file.read, CsvDialect(config.csv_delimiter, config.csv_encoding))
        metadata = written_metadata(paths, load.load_id, header.names, load.rows_before, at)
        renamings = [(restored, config.merged_file), metadata]
    check_master(config, load)  # again: a program that does not take the lock may have written to it meanwhile
    commit(paths, replace(load, outcome=UNDONE, revert=""), renamings, removals=removals)


def _splice(config: InboxConfig, load: LoadRecord, kept: Path, restored: Path, beat: Callable[[int], None]) -> None:
    """Write the master's kept bytes with the removed rows back in place; in `kept` the ranges follow the rows."""
    with (
        config.merged_file.open("rb", buffering=0) as master,
        kept.open("rb", buffering=0) as removed,
        restored.open("xb") as out,
    ):
        keep_mode(config.merged_file, out.fileno())
        ranges = array("q")
        rows_bytes = os.fstat(removed.fileno()).st_size - 2 * load.ranges * ranges.itemsize
        if rows_bytes >= 0:
            removed.seek(rows_bytes)
            ranges.frombytes(removed.read())
            removed.seek(0)
            for offset, length in zip(ranges[0::2], ranges[1::2], strict=True):
                _copy(master, out, offset - out.tell(), beat)
                _copy(removed, out, length, beat)
            _copy(master, out, load.kept_bytes - master.tell(), beat)
        if (master.tell(), removed.tell()) != (load.kept_bytes, rows_bytes):
            raise Rejected("what was kept of the master is damaged", "restore the master from a backup instead")
        out.flush()
        # Restore the modification time too: the previous merge recognises its master by size and time.
        os.utime(out.fileno(), ns=(load.mtime_before_ns, load.mtime_before_ns))
        sync_file(out.fileno())


def _copy(source: IO[bytes], out: IO[bytes], size: int, beat: Callable[[int], None]) -> None:
    """Copy the next bytes, fewer where the file ends before. Raises StuckFile on a read error."""
    while size > 0 and (piece := read_some(source, min(size, MEBIBYTE))):
        out.write(piece)
        beat(len(piece))
        size -= len(piece)
