"""One merge or one undo as one committed step: the journal is its commit, and recovery carries it through."""

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from app.core.errors import Permanent, Transient
from app.core.files import bounded_name, sync_directory, write_durably
from app.core.ledger import Tally, ledger_of
from app.core.runs import Report
from app.csv_inbox.config import Stuck, Unmergeable, Unsteady
from app.csv_inbox.discovery import (
    MEGABYTE,
    UNIT,
    Candidate,
    Identity,
    Places,
    Work,
    check_steady,
    identity_of,
    link_or_copy,
    md5_of,
    open_regular,
    placed,
    printable,
    stamp,
    unchanged,
    unused,
)
from app.csv_inbox.incoming import Incoming, read_incoming
from app.csv_inbox.key_index import settle
from app.csv_inbox.master_output import write_metadata
from app.csv_inbox.merge import Merged, Plan, master_header, merge
from app.csv_inbox.quarantine import KEPT_LOADS, MERGED, Load, load_of, loads, prune, revert_file, save_load

# One merge, or one undo, is one step: the journal is its commit, and recovery carries out what was committed.
#
# Order: everything new is on the disk under temporary names, and the archive holds the input by a pending link,
# before the journal appears by an atomic rename. From then on the step has happened; what is left to do are renames
# that can be repeated. Without a journal nothing has happened, and every temporary file goes. fsync is never retried.
#
# Journal, metadata and history may be lost or restored from a backup at any time; master, archive and inbox say what
# is left to do then. Only a file that lies nowhere but in the archive's pending link stops recovery.

VERSION = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Renaming:
    """A temporary file that takes its final name. `inode` tells whether that was done already."""

    temporary: Path
    target: Path
    inode: int


@dataclass(frozen=True, slots=True)
class Archiving:
    """The input's way from the inbox to the archive. `digest` is the MD5 of what was merged."""

    pending: Path
    target: Path
    source: Path
    identity: Identity
    digest: str


@dataclass(frozen=True, slots=True)
class Step:
    """Everything that is left to do once it is committed. The first renaming is what it is for: without it, nothing."""

    renamings: Sequence[Renaming]
    removals: Sequence[Path]
    archiving: Archiving | None
    load: Load


def renaming(temporary: Path, target: Path) -> Renaming:
    """The renaming of a file that is complete now."""
    return Renaming(temporary, target, temporary.stat().st_ino)


def commit(places: Places, step: Step) -> None:
    """Make the step happen: once this returns, it has. Raises OSError; then it has not."""
    folders = {each.temporary.parent for each in step.renamings}
    if step.archiving:
        folders.add(step.archiving.pending.parent)
    for folder in folders:
        sync_directory(folder)
    write_durably(places.journal, [json.dumps(_plain(step, places.folder), indent=1).encode("ascii")])


def carry_out(places: Places, step: Step) -> bool:
    """Do what the step says; what is done already is skipped, so it can be repeated after any crash.

    False when it was given up. Raises Permanent when neither can be done.
    """
    if _removes_a_later_master(places, step) or not all(map(_rename, step.renamings[:1])):
        _give_up(places, step)
        return False
    for each in step.renamings[1:]:
        if not _rename(each):
            log.warning("%s is gone: %s stays as it is", each.temporary.name, each.target.name)
    for path in step.removals:
        path.unlink(missing_ok=True)
    _sync({path.parent for path in (*(each.target for each in step.renamings), *step.removals)})
    if step.archiving:
        _archive(step.archiving)
    save_load(places.loads, step.load)
    prune(places.loads, places.config.undo_keep)
    places.journal.unlink()
    sync_directory(places.folder)
    return True


def _rename(each: Renaming) -> bool:
    """True once the target is the file of the step; False when that is gone, or was replaced since."""
    if each.temporary.exists():
        each.temporary.replace(each.target)
        log.debug("renamed %s to %s", each.temporary.name, each.target)
        return True
    return each.target.exists() and each.target.stat().st_ino == each.inode


def _give_up(places: Places, step: Step) -> None:
    """End a step whose first file is gone: the journal is an old one, or somebody put another file there.

    An input that is in the archive was merged, one that is still in the inbox is merged again. Raises Permanent for one
    that is in neither.
    """
    archiving = step.archiving
    if archiving and archiving.pending.exists() and not _is_merged(archiving):
        new, old = step.renamings[0].temporary.name, step.renamings[0].target.name
        raise Permanent(
            f"a committed step cannot be completed: {new} is gone, {old} is another file",
            "put both back as they were, or remove the merge journal beside the master if the master is right as it is",
        )
    log.warning("%s: the journal does not fit what is there; the master stays as it is", step.load.file)
    if archiving and os.path.lexists(archiving.target) and not _is_recorded(places, step.load):
        save_load(places.loads, step.load)
    places.journal.unlink()
    sync_directory(places.folder)


def _removes_a_later_master(places: Places, step: Step) -> bool:
    """True when an undo would take away a master that is not as the merge left it that is taken back."""
    master = places.config.merged_file
    if master not in step.removals or not master.exists():
        return False
    found = master.stat()
    return (found.st_size, found.st_mtime_ns) != (step.load.size_bytes, step.load.mtime_ns)


def _is_recorded(places: Places, load: Load) -> bool:
    return any(each.load_id == load.load_id for each in loads(places.loads, KEPT_LOADS))


def _archive(each: Archiving) -> None:
    """The link gets its archive name; the inbox's name goes unless it leads to anything else by now.

    Rows that were appended since the file was read go with it: they are found in the archive and taken in as a file of
    their own. A file that was rewritten stays in the inbox, and is merged and archived as it is then.
    """
    merged = _is_merged(each)
    if each.pending.exists() and (merged or _inode(each.pending) != _inode(each.source)):
        each.pending.rename(each.target)
        log.debug("archived %s as %s", each.source.name, each.target)
    if os.path.lexists(each.target) and merged:
        each.source.unlink(missing_ok=True)
    each.pending.unlink(missing_ok=True)
    _sync({each.target.parent, each.source.parent})


def _is_merged(each: Archiving) -> bool:
    """True while the inbox's name leads to the file that was merged, or to that file with more behind it."""
    try:
        found = identity_of(each.source.lstat())
    except FileNotFoundError:
        return False
    if found == each.identity:
        return True
    held = each.identity
    linked = found.inode == held.inode and found.inode in (_inode(each.pending), _inode(each.target))
    if not linked or found.size <= held.size:
        return False
    try:
        with open_regular(each.source) as file:
            return md5_of(file, held.size) == each.digest
    except (Unmergeable, Unsteady, Stuck) as error:
        log.warning("%s stays in the inbox: %s", each.source.name, error.message)
        return False


def _inode(path: Path) -> int:
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return -1


def _sync(folders: Iterable[Path]) -> None:
    for folder in folders:
        sync_directory(folder)


def recover(places: Places) -> Load | None:
    """Complete what was committed, remove what was not; the load that was completed. Raises Permanent, OSError."""
    step, done = pending_step(places), False
    if step is not None:
        places.loads.mkdir(exist_ok=True)
        done = carry_out(places, step)
    for path in places.leftovers():
        path.unlink(missing_ok=True)
    return step.load if step and done else None


def pending_step(places: Places) -> Step | None:
    """What was committed and not completed. Raises Permanent when the journal cannot be read."""
    try:
        content = json.loads(places.journal.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise Permanent(
            f"the merge journal {places.journal.name} is damaged: {error}",
            "compare master and metadata with a backup, then remove the journal; nothing was changed",
        ) from error
    return _step_of(content, places.folder)


def _plain(step: Step, folder: Path) -> Mapping[str, Any]:
    """As JSON; paths relative to the master's folder, so that the whole tree may have moved before the restart."""

    def near(path: Path) -> str:
        return os.path.relpath(path, folder)

    archiving = step.archiving
    return {
        "version": VERSION,
        "renamings": [[near(each.temporary), near(each.target), each.inode] for each in step.renamings],
        "removals": [near(path) for path in step.removals],
        "archiving": archiving
        and {
            "pending": near(archiving.pending),
            "target": near(archiving.target),
            "source": near(archiving.source),
            "identity": asdict(archiving.identity),
            "digest": archiving.digest,
        },
        "load": asdict(step.load),
    }


def _step_of(content: Mapping[str, Any], folder: Path) -> Step:
    archiving = content["archiving"]
    return Step(
        [Renaming(folder / temporary, folder / target, inode) for temporary, target, inode in content["renamings"]],
        [folder / path for path in content["removals"]],
        archiving
        and Archiving(
            folder / archiving["pending"],
            _bounded(folder / archiving["target"]),
            folder / archiving["source"],
            Identity(**archiving["identity"]),
            archiving["digest"],
        ),
        load_of(content["load"]),
    )


def _bounded(target: Path) -> Path:
    """The archive name. Earlier versions committed names too long for a directory."""
    return target.with_name(bounded_name(target.name))


# One file merged as one committed step, or, in a dry run, merged into a temporary folder only.
#
# Invariant: until the commit nothing has changed but temporary files, and those go when the commit does not come.

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
