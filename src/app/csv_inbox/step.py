"""One file merged as one committed step, or, in a dry run, merged into a temporary folder only.

Invariant: until the commit nothing has changed but temporary files, and those go when the commit does not come.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from uuid import uuid4

from app.core.errors import Transient
from app.core.ledger import Tally, ledger_of
from app.core.runs import Report
from app.csv_inbox.faults import Unsteady
from app.csv_inbox.history import MERGED, Load, revert_file
from app.csv_inbox.identity import identity_of
from app.csv_inbox.inbox import MEGABYTE, Candidate, check_steady, unchanged
from app.csv_inbox.incoming import Incoming, read_incoming
from app.csv_inbox.index import settle
from app.csv_inbox.journal import Archiving, Renaming, Step, carry_out, commit, renaming
from app.csv_inbox.merge import Merged, Plan, master_header, merge
from app.csv_inbox.metadata import write_metadata
from app.csv_inbox.places import Places, link_or_copy, placed, printable, stamp, unused
from app.csv_inbox.work import UNIT, Work

log = logging.getLogger(__name__)
Temporary = Callable[[str], Path]
KEPT_BYTES = 1 << 23


def load_id_of(at: datetime) -> str:
    """A new name for the record of a file; names sort by time."""
    return f"{stamp(at)}-{uuid4().hex[:8]}"


def text_of(at: datetime) -> str:
    """An instant as the history shows it."""
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A file read and merged into temporary files."""

    incoming: Incoming
    merged: Merged


def take(work: Work, candidate: Candidate) -> Report:
    """Merge one file. Raises Unmergeable, Unsteady, Transient, Permanent, OSError."""
    at, began = work.clock(), time.monotonic()
    load_id = load_id_of(at)

    def temporary(what: str) -> Path:
        return work.places.temporary(load_id, what)

    with _cleared(work.places):
        read = _read_and_merge(work, candidate, Source(work.config.merged_file, work.places.index), temporary)
        load = replace(_load(work, candidate, read), load_id=load_id, at=text_of(at))
        step = _step(work, candidate, read, replace(load, seconds=time.monotonic() - began))
        commit(work.places, step)
    carry_out(work.places, step)
    settle(temporary("index"), work.places.index)
    work.tell(step.load.told())
    master, merged = work.config.merged_file, read.merged
    log.info(
        "%s: written, %d rows, %d columns, %d bytes", master.name, merged.rows, len(merged.columns), load.size_bytes
    )
    return _report(candidate, read)


def _report(candidate: Candidate, read: Outcome) -> Report:
    """What one file did. A row that a later row of the same file replaces counts as corrected."""
    incoming, merged = read.incoming, read.merged
    tally = Tally(
        counted=incoming.counted,
        read=incoming.rows,
        new=merged.inserted,
        already_there=merged.unchanged,
        corrected=merged.replaced + incoming.duplicates,
    )
    ledger = ledger_of(tally, unit=UNIT).of_partition(printable(candidate.path.name))
    return Report(rows=incoming.rows, bytes=incoming.identity.size, ledger=ledger)


@contextmanager
def _cleared(places: Places) -> Iterator[None]:
    """Takes the temporary files of the block away, unless it ended in a commit: then the journal needs them."""
    try:
        yield
    finally:
        if not places.journal.exists():
            for path in places.leftovers():
                path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Source:
    """A master, which need not exist, and where its index would be."""

    master: Path
    index: Path


def _read_and_merge(work: Work, candidate: Candidate, source: Source, temporary: Temporary) -> Outcome:
    """Check, spool and merge one file; everything is written to temporary files."""
    _keep_freed()
    config = work.config
    header = master_header(source.master, config)
    master = source.master if header else None
    beat = work.beat(master)
    incoming = read_incoming(candidate.path, header, config, temporary("rows"), beat)
    check_steady(candidate, incoming.md5)
    log.debug(
        "%s: MD5 %s, %d rows in %d bytes, %d distinct keys; master %s",
        *(
            printable(candidate.path.name),
            "unchanged" if candidate.md5 else "read once",
            incoming.counted,
            incoming.identity.size,
            incoming.keys.count,
        ),
        f"with {len(header.names)} columns" if header else "not there yet",
    )
    size = incoming.offsets[-1] + (master.stat().st_size if master else 0)
    plan = Plan(
        out=temporary("master"),
        removed=temporary("removed") if config.undo_keep and not work.context.dry_run else None,
        index=source.index,
        new_index=temporary("index") if size >= config.index_from_mb * MEGABYTE else None,
        beat=beat,
    )
    return Outcome(incoming, merge(master, incoming, config, plan))


def _keep_freed() -> None:
    """Have the C library keep the memory of one block for the next.

    glibc hands memory back once twice the largest block ever freed lies idle, and the kernel has to clear each page of
    it again: a hundred pages for every megabyte merged. The daemon sets its own limits. What is freed here was never
    touched.
    """
    bytearray(KEPT_BYTES)


def _load(work: Work, candidate: Candidate, read: Outcome) -> Load:
    incoming, merged = read.incoming, read.merged
    removal, before = merged.removal, merged.before
    revert = "first" if before is None else "rows" if removal else "whole"
    return Load(
        load_id="",
        run_id=work.context.run_id,
        file=printable(candidate.path.name),
        at="",
        outcome=MERGED,
        rows=incoming.rows,
        inserted=merged.inserted,
        replaced=merged.replaced,
        unchanged=merged.unchanged,
        duplicates=incoming.duplicates,
        columns_added=merged.columns_added,
        columns_removed=merged.columns_removed,
        rows_before=merged.rows_before,
        rows_after=merged.rows,
        revert=revert if work.config.undo_keep else "",
        kept_bytes=removal.kept_bytes if removal else 0,
        ranges=removal.ranges if removal else 0,
        size_bytes=merged.after.st_size,
        mtime_ns=merged.after.st_mtime_ns,
        mtime_before_ns=before.st_mtime_ns if before else 0,
    )


def _step(work: Work, candidate: Candidate, read: Outcome, load: Load) -> Step:
    """Everything durable under temporary names, the archive's hold on the input taken: ready to be committed."""
    places, config, at = work.places, work.config, work.clock()
    metadata = places.temporary_metadata(load.load_id)
    with placed(config.metadata_file.parent):
        write_metadata(metadata, read.merged.columns, read.merged.rows, at)
    renamings = [
        renaming(places.temporary(load.load_id, "master"), config.merged_file),
        renaming(metadata, config.metadata_file),
        *_kept(places, load),
    ]
    with placed(config.archive_dir):
        archiving = _archiving(work, candidate, read.incoming, load.load_id, at)
    _check_master(work, read.merged)
    load = _watched(load, archiving, read.incoming)
    return Step(renamings, [places.temporary(load.load_id, "rows")], archiving, load)


def _watched(load: Load, archiving: Archiving, incoming: Incoming) -> Load:
    """The record, with what it takes to find rows that are written to the file later."""
    found = incoming.identity
    return replace(
        load,
        archived_as=printable(archiving.target.name),
        archive_name=archiving.target.name,
        source=(found.device, found.inode, found.size, found.mtime_ns),
        source_md5=incoming.md5,
        rows_at=incoming.header.size_bytes,
        unended_bytes=incoming.unended_bytes,
    )


def _archiving(work: Work, candidate: Candidate, incoming: Incoming, load_id: str, at: datetime) -> Archiving:
    """The archive's hold on the very file that was read. Raises Unsteady."""
    pending = work.places.pending(load_id)
    try:
        link_or_copy(candidate.path, pending)
    except FileNotFoundError as error:
        if candidate.path.exists():  # the archive is what is missing
            raise
        raise Unsteady(f"{candidate.path.name} is gone", "no action needed; somebody took it away") from error
    if not unchanged(replace(candidate, identity=incoming.identity)):
        raise Unsteady(
            f"{candidate.path.name} was replaced while it was read", "no action needed; the next run merges it"
        )
    target = unused(work.config.archive_dir, candidate.path.name, at)
    return Archiving(pending, target, candidate.path, incoming.identity, incoming.md5)


def _kept(places: Places, load: Load) -> Iterator[Renaming]:
    """What it takes to undo, complete and durable under a temporary name."""
    if not places.config.undo_keep:
        return
    removed = places.temporary(load.load_id, "removed")
    if load.revert == "whole":
        removed.unlink(missing_ok=True)
        link_or_copy(places.config.merged_file, removed)
    elif load.revert == "first":
        removed.touch()
    yield renaming(removed, revert_file(places.loads, load.load_id))


def _check_master(work: Work, merged: Merged) -> None:
    """Raises Transient when something that takes no lock put another master there meanwhile."""
    path = work.config.merged_file
    found = identity_of(path.stat()) if path.exists() else None
    if found != (identity_of(merged.before) if merged.before else None):
        raise Transient(
            f"the master {path.name} was replaced while it was read",
            "no action needed; the next run merges into what it is then",
        )


@dataclass(slots=True)
class Rehearsal:
    """The same in a temporary folder, file upon file; nothing of the inbox changes."""

    work: Work
    folder: Path
    source: Source | None = field(default=None)

    def take(self, candidate: Candidate) -> Report:
        """What merging this file after those before would do. Raises as `take`."""
        work, unique, before = self.work, uuid4().hex, self.source
        source = before or Source(work.config.merged_file, work.places.index)
        with placed(self.folder):
            read = _read_and_merge(work, candidate, source, lambda what: self.folder / f"{unique}.{what}")
        read.incoming.spool.unlink()
        if before:
            before.master.unlink()
        self.source = Source(self.folder / f"{unique}.master", self.folder / f"{unique}.index")
        load = replace(_load(work, candidate, read), outcome="valid")
        work.told.append(load.told())
        return _report(candidate, read)


@contextmanager
def rehearsal(work: Work) -> Iterator[Rehearsal]:
    """A dry run."""
    with tempfile.TemporaryDirectory(prefix="headwater-csv-inbox-") as folder:
        yield Rehearsal(work, Path(folder))
