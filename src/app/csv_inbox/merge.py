"""The upsert: master and file in, the new master out."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from app.core.errors import Permanent, Transient
from app.core.files import keep_mode, sync_file
from app.csv_inbox.config import InboxConfig
from app.csv_inbox.csv_tokenizer import Dialect, Malformed, blocks
from app.csv_inbox.discovery import identity_of
from app.csv_inbox.header import Header, read_header
from app.csv_inbox.incoming import Incoming, Layout
from app.csv_inbox.key_index import Index, Indexing, Subject, Unfit, entries_of, fitting
from app.csv_inbox.master_output import COPY_BYTES, Beat, Output
from app.csv_inbox.merge_passes import Tally, scan, settled, skip

# A master written anew without columns that have become obsolete.
#
# Invariant: every other field, and every line end, is as it was to the byte.


def narrowed(path: Path, layout: Layout, dropped: Sequence[int], dialect: Dialect, beat: Beat) -> os.stat_result:
    """Replace the file, durably, by itself without the columns `dropped`. Raises OSError."""
    second = path.with_name(f"{path.name}.2.tmp")
    d, keep = dialect.delimiter.encode(), [at for at in range(len(layout.names)) if at not in frozenset(dropped)]
    with path.open("rb", buffering=0) as file, second.open("xb", buffering=0) as narrow:
        keep_mode(path, narrow.fileno())
        out = Output(narrow, None, None, beat)
        out.write(layout.header(dialect, dropped))
        header = read_header(file.read, dialect)
        file.seek(header.size_bytes)
        for block in blocks(file.read, dialect, 1):
            beat(0)
            lines = []
            for position in block.rows.tolist():
                fields = dialect.fields(block.record(position))
                stop, end = int(block.stops[position]), int(block.ends[position])
                lines.append(d.join([fields[at] for at in keep]) + block.data[stop:end])
            out.write(b"".join(lines))
        sync_file(narrow.fileno())
        after = os.fstat(narrow.fileno())
    second.replace(path)
    return after


# The upsert: master and file in, the new master out, in one pass over the master or along its index.
#
# Invariants: a row of the master whose key is not in the file is copied as bytes, in its place; both ways give the
# same bytes; memory is bounded by one block and the file's keys. The master is read, never written; one that cannot
# be read stops everything.


@dataclass(frozen=True, slots=True)
class Removal:
    """How to come back from a merge: the ranges that were taken out of the old master, and how much of it was kept.

    None of this exists where the columns changed: then the old master itself is kept.
    """

    kept_bytes: int
    ranges: int


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did, and how many rows there were. `removal` None: the old master has to be kept whole."""

    inserted: int
    replaced: int
    unchanged: int
    rows_before: int
    rows: int
    columns: tuple[str, ...]
    columns_added: tuple[str, ...]
    columns_removed: tuple[str, ...]
    before: os.stat_result | None
    after: os.stat_result
    removal: Removal | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a merge writes. `removed` None: how to come back is not kept. `beat` is told of bytes and may stop it.

    `index` is that of the master, if there is one, and `new_index` None where none is wanted.
    """

    out: Path
    removed: Path | None
    index: Path
    new_index: Path | None
    beat: Beat


def master_header(path: Path, config: InboxConfig) -> Header | None:
    """The master's header; None when there is no master. Raises Permanent when it cannot be read."""
    try:
        with path.open("rb", buffering=0) as file:
            return read_header(file.read, _dialect(config))
    except FileNotFoundError:
        return None
    except Malformed as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Malformed) -> Permanent:
    """The master cannot be read; nothing is done with it."""
    where = f", line {error.line}" if error.line else ""
    return Permanent(
        f"the master {path.name} cannot be read{where}: {error.message}",
        "restore it from a backup or correct it; it was not changed, and files wait in the inbox until it can be read",
    )


def _dialect(config: InboxConfig) -> Dialect:
    return Dialect(config.csv_delimiter, config.csv_encoding)


def _subject(config: InboxConfig) -> Subject:
    return Subject(config.key_column, config.csv_delimiter, config.csv_encoding)


def merge(master: Path | None, incoming: Incoming, config: InboxConfig, plan: Plan) -> Merged:
    """Write the result to `plan.out` and, durably, what it takes to come back.

    Raises Permanent, OSError, and Transient when the master changed meanwhile.
    """
    with ExitStack() as files:
        out = _output(master, incoming, plan, files)
        tally = Tally(incoming, _dialect(config), files.enter_context(incoming.spool.open("rb", buffering=0)))
        before = None
        try:
            if master is None:
                out.write(tally.layout.header(tally.dialect))
            else:
                before = _pass(files.enter_context(master.open("rb", buffering=0)), tally, out, config, plan)
        except Malformed as error:
            raise unreadable(config.merged_file, error) from error
        appended = _append(tally, out)
        out.finish()
        after = _finished(tally, out, config, plan)
    return _told(tally, out, appended, before, after)


def _output(master: Path | None, incoming: Incoming, plan: Plan, files: ExitStack) -> Output:
    """The files that are written; removed rows go nowhere when the old master is to be kept whole."""
    file = files.enter_context(plan.out.open("xb", buffering=0))
    removed = indexing = None
    if plan.removed is not None and not incoming.layout.added:
        removed = files.enter_context(plan.removed.open("xb"))
    if plan.new_index is not None:
        index = files.enter_context(plan.new_index.open("xb"))
        indexing = Indexing(index)
    for each in (file, removed, indexing and index):
        if each and master is not None:
            keep_mode(master, each.fileno())
    return Output(file, removed, indexing, plan.beat)


def _pass(master: IO[bytes], tally: Tally, out: Output, config: InboxConfig, plan: Plan) -> os.stat_result:
    """Write what stays of the master, along its index where that fits."""
    before = os.fstat(master.fileno())
    header = read_header(master.read, tally.dialect)
    with _index(plan.index, before, config) as index:
        skipped = (
            index is not None
            and not tally.padding
            and bool(header.eol)
            and settled(master, header, tally)
            and _skipped(master, header, index, tally, out)
        )
    if not skipped:
        scan(master, header, tally, out)
    if identity_of(os.fstat(master.fileno())) != identity_of(before):
        told = f"the master {config.merged_file.name} was written to while it was read"
        raise Transient(told, "no action needed; the next run merges into what it is then")
    return before


@contextmanager
def _index(path: Path, master: os.stat_result, config: InboxConfig) -> Iterator[Index | None]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        yield None
        return
    with file:
        yield fitting(file, master, _subject(config))


def _skipped(master: IO[bytes], header: Header, index: Index, tally: Tally, out: Output) -> bool:
    """Whether the index led through the whole master; if not, nothing was written."""
    try:
        skip(master, header, index, tally, out)
    except Unfit:
        out.restart()
        tally.restart()
        return False
    return True


def _append(tally: Tally, out: Output) -> int:
    """Write the file's rows; of rows with one key, the last. How many were written."""
    incoming, keys = tally.incoming, tally.incoming.keys
    rows = keys.kept_rows()
    for start, end in incoming.runs(rows):
        for at in range(start, end, COPY_BYTES):
            piece = os.pread(tally.spool.fileno(), min(end - at, COPY_BYTES), at)
            out.beat(len(piece))
            out.write(piece)
    if out.indexing is not None:
        out.indexing.add(entries_of(keys.by_row[rows], tally.offsets[rows + 1] - tally.offsets[rows]))
    return len(rows)


def _finished(tally: Tally, out: Output, config: InboxConfig, plan: Plan) -> os.stat_result:
    """The new master, complete and on the disk. A column that goes takes the index with it: lengths are others then."""
    if tally.doubtful:
        if plan.new_index is not None:
            plan.new_index.unlink()
        return narrowed(plan.out, tally.layout, tally.doubtful, tally.dialect, out.beat)
    sync_file(out.file.fileno())
    after = os.fstat(out.file.fileno())
    if out.indexing is not None:
        out.indexing.seal(after, _subject(config))
    return after


def _told(tally: Tally, out: Output, appended: int, before: os.stat_result | None, after: os.stat_result) -> Merged:
    layout, dropped = tally.layout, tally.doubtful
    whole = bool(layout.added or dropped)
    return Merged(
        inserted=appended - tally.met,
        replaced=tally.met - tally.unchanged,
        unchanged=tally.unchanged,
        rows_before=tally.kept + tally.taken,
        rows=tally.kept + appended,
        columns=tuple(name for place, name in enumerate(layout.names) if place not in dropped),
        columns_added=layout.added,
        columns_removed=tuple(layout.names[place] for place in dropped),
        before=before,
        after=after,
        removal=None if whole or before is None else Removal(out.kept_bytes, len(out.ranges) // 2),
    )
