"""The pipeline put together: what waits in the inbox is merged, oldest first, archived or set aside.

Invariants: all that writes happens under the lock and after recovery; one file is one committed step, so a run may end
anywhere; each file ends in the archive or in quarantine, or it is still in the inbox and the run says why.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from app.core.errors import Transient
from app.core.runs import Context, Exits, Failure, Job, Report
from app.csv_inbox.config import InboxConfig, load_config
from app.csv_inbox.history import MERGED, REJECTED, Load, loads, revert_file, shown
from app.csv_inbox.inbox import Candidate, candidates, check_steady, unchanged
from app.csv_inbox.log import logged
from app.csv_inbox.places import Places, link_or_copy, printable, stamp, translated, unused
from app.settings import Settings

if TYPE_CHECKING:
    from app.csv_inbox.incoming import Incoming, Unmergeable
    from app.csv_inbox.journal import Step
    from app.csv_inbox.merge import Merged

NAME = "csv_inbox"
EXITS = Exits(partial=1, failed=2, busy=2)
MEBIBYTE = 1 << 20
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inbox:
    """What `main` wires: the job, its load history, and undo. Of undo, a dry run is the preview."""

    job: Job
    history: Callable[[int], Sequence[Mapping[str, Any]]]
    undo: Callable[[Context, str], Report]


@dataclass(frozen=True, slots=True)
class Work:
    """One run. `progress` counts MiB."""

    places: Places
    context: Context
    clock: Callable[[], datetime]
    told: list[str] = field(default_factory=list)

    @property
    def config(self) -> InboxConfig:
        """The configuration."""
        return self.places.config


def build(settings: Settings, clock: Callable[[], datetime]) -> Inbox:
    """The inbox as it is configured. Raises BadSettings."""
    config = load_config(settings.inbox.config_file, settings.service.data_dir)
    places = Places(config)

    def history(limit: int) -> Sequence[Mapping[str, Any]]:
        return [shown(load) for load in loads(places.loads, limit)]

    job = Job(NAME, settings.inbox.interval_seconds, lambda context: run(Work(places, context, clock)), exits=EXITS)
    return Inbox(job, history, lambda context, run_id: undo(Work(places, context, clock), run_id))


def run(work: Work) -> Report:
    """Merge what waits. Raises Transient (locked, disk full), Permanent (master unreadable) and Stopped."""
    with translated(f"the inbox {work.config.watch_dir}"):
        if work.context.dry_run:
            return _rehearse(work)
        work.places.make()
        if not candidates(work.config) and not work.places.journal.exists() and not work.places.leftovers():
            return Report()
        with logged(work.config), _locked(work.places):
            _recover(work)
            return _all(work, lambda candidate: _one(work, candidate))


@contextmanager
def _locked(places: Places) -> Iterator[None]:
    """The lock that other processes respect; it waits `lock_timeout_seconds`. Raises Transient."""
    from filelock import FileLock, Timeout

    seconds = places.config.lock_timeout_seconds
    try:
        with FileLock(places.lock, timeout=seconds):
            yield
    except Timeout as error:
        told = f"{places.lock.name} is held by another process for more than {seconds:g} s"
        raise Transient(told, "let the other run end, or raise lock_timeout_seconds") from error


def _recover(work: Work) -> None:
    from app.csv_inbox.journal import recover

    done = recover(work.places)
    if done is not None:
        log.warning("a step that was committed before the process ended is complete now: %s", done.told())


def _all(work: Work, one: Callable[[Candidate], Report]) -> Report:
    report = Report()
    for candidate in _steady(work):
        work.context.stop.check()
        report += _guarded(work, candidate, one)
    return replace(report, notes=tuple(work.told))


def _steady(work: Work) -> Sequence[Candidate]:
    """Candidates that did not change while all of them were waited for, with their MD5 from before the wait."""
    waits = work.config.checksum_wait_seconds
    found = [_marked(each) if waits and not each.refused else each for each in candidates(work.config)]
    if waits and any(not each.refused for each in found):
        work.context.stop.pause(waits)
    for each in found:
        if not unchanged(each):
            _tell(work, f"{printable(each.path.name)}: still being written, left for the next run")
    return [each for each in found if unchanged(each)]


def _marked(candidate: Candidate) -> Candidate:
    from app.csv_inbox.inbox import fingerprint
    from app.csv_inbox.incoming import Unmergeable, Unsteady

    try:
        return replace(candidate, md5=fingerprint(candidate))
    except (Unmergeable, Unsteady):
        return candidate  # said when its turn comes


def _tell(work: Work, line: str) -> None:
    work.told.append(line)
    log.info("%s", line)


def _guarded(work: Work, candidate: Candidate, one: Callable[[Candidate], Report]) -> Report:
    """One file: merged, set aside, or left because it changed meanwhile."""
    from app.csv_inbox.inbox import refusal
    from app.csv_inbox.incoming import Unmergeable, Unsteady

    name = printable(candidate.path.name)
    work.context.progress.advance(total=max(candidate.identity.size // MEBIBYTE, 1))
    try:
        if candidate.refused:
            raise refusal(candidate)
        return one(candidate)
    except Unsteady as error:
        _tell(work, f"{name}: left for the next run: {error.message}")
        return Report()
    except Unmergeable as error:
        where = "would be rejected" if work.context.dry_run else _set_aside(work, candidate, error)
        work.told.append(f"{name}: {where}: {error}")
        return Report(failures=(Failure(name, error.message, error.hint),))


def _set_aside(work: Work, candidate: Candidate, error: "Unmergeable") -> str:
    from app.csv_inbox.quarantine import reject

    at = work.clock()
    load = Load(_load_id(at), work.context.run_id, printable(candidate.path.name), _text(at), REJECTED)
    target = reject(work.places, candidate, error, load, at)
    where = f"rejected, moved to {target.parent.name}"
    log.error("%r: %s: %s", candidate.path.name, where, error)
    return where


def _load_id(at: datetime) -> str:
    return f"{stamp(at)}-{uuid4().hex[:8]}"


def _text(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _one(work: Work, candidate: Candidate) -> Report:
    """Merge one file as one committed step. Raises Unmergeable, Unsteady, Permanent, OSError."""
    from app.csv_inbox.journal import carry_out, commit

    at, began = work.clock(), time.monotonic()
    load_id = _load_id(at)
    try:
        read = _read_and_merge(
            work, candidate, work.config.merged_file, lambda what: work.places.temporary(load_id, what)
        )
        load = _load(work, candidate, read)
        load = replace(load, load_id=load_id, at=_text(at), seconds=time.monotonic() - began)
        step = _step(work, candidate, read, load)
        commit(work.places, step)
    except BaseException:
        _clear(work.places)
        raise
    carry_out(work.places, step)
    _tell(work, load.told())
    return Report(rows=load.rows, bytes=read.incoming.identity.size)


def _clear(places: Places) -> None:
    """Nothing was committed: take the temporary files away, unless the journal did appear and needs them."""
    if not places.journal.exists():
        for path in places.leftovers():
            path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A file read and merged into temporary files. `first`: there was no master."""

    incoming: "Incoming"
    merged: "Merged"
    first: bool


def _read_and_merge(work: Work, candidate: Candidate, master: Path, temporary: Callable[[str], Path]) -> Outcome:
    """Check, spool and merge one file; everything is written to temporary files."""
    from app.csv_inbox.incoming import read_incoming
    from app.csv_inbox.merge import Plan, master_header, merge

    config = work.config
    header = master_header(master, config)
    beat = _beat(work, master if header else None)
    incoming = read_incoming(candidate.path, header, config, temporary("rows"), beat)
    check_steady(candidate, incoming.md5)
    removed = temporary("removed") if config.undo_keep and not work.context.dry_run else None
    plan = Plan(temporary("master"), removed, beat)
    return Outcome(incoming, merge(master if header else None, incoming, config, plan), header is None)


def _beat(work: Work, master: Path | None) -> Callable[[int], None]:
    """Counts bytes as MiB, and is a safe point: until the commit a merge can be given up."""
    work.context.progress.advance(total=master.stat().st_size // MEBIBYTE if master else 0)
    passed = 0

    def beat(size: int) -> None:
        nonlocal passed
        work.context.stop.check()
        before, passed = passed, passed + size
        work.context.progress.advance(done=passed // MEBIBYTE - before // MEBIBYTE)

    return beat


def _load(work: Work, candidate: Candidate, read: Outcome) -> Load:
    incoming, merged = read.incoming, read.merged
    removal = merged.removal
    revert = "first" if read.first else "rows" if removal else "whole"
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
        size_bytes=merged.content.size_bytes,
        crc32=merged.content.crc32,
    )


def _step(work: Work, candidate: Candidate, read: Outcome, load: Load) -> "Step":
    """Everything durable under temporary names, the archive's hold on the input taken: ready to be committed."""
    from app.csv_inbox.incoming import Unsteady
    from app.csv_inbox.journal import Archiving, Step, renaming
    from app.csv_inbox.metadata import write_metadata

    places, config, at = work.places, work.config, work.clock()
    incoming, merged = read.incoming, read.merged
    metadata = places.temporary_metadata(load.load_id)
    write_metadata(metadata, merged.columns, merged.rows, at)
    pending = places.pending(load.load_id)
    link_or_copy(candidate.path, pending)
    if not unchanged(replace(candidate, identity=incoming.identity)):
        raise Unsteady(f"{candidate.path.name} was replaced while it was read", "nothing to do: the next run merges it")
    master = places.temporary(load.load_id, "master")
    target = unused(config.archive_dir, candidate.path.name, at)
    renamings = [renaming(master, config.merged_file), renaming(metadata, config.metadata_file)]
    if config.undo_keep:
        renamings.append(renaming(_revert(places, load), revert_file(places.loads, load.load_id)))
    load = replace(load, archived_as=printable(target.name))
    archiving = Archiving(pending, target, candidate.path, incoming.identity, incoming.md5)
    return Step(renamings, [places.temporary(load.load_id, "rows")], archiving, load)


def _revert(places: Places, load: Load) -> Path:
    """What it takes to undo, complete and durable under a temporary name."""
    removed = places.temporary(load.load_id, "removed")
    if load.revert == "whole":
        removed.unlink(missing_ok=True)
        link_or_copy(places.config.merged_file, removed)
    elif load.revert == "first":
        removed.touch()
    return removed


def _rehearse(work: Work) -> Report:
    """The same in the system's temporary folder, file upon file; nothing of the inbox changes."""
    with tempfile.TemporaryDirectory(prefix="headwater-csv-inbox-") as folder:
        master = work.config.merged_file

        def one(candidate: Candidate) -> Report:
            nonlocal master
            unique = uuid4().hex
            read = _read_and_merge(work, candidate, master, lambda what: Path(folder) / f"{unique}.{what}")
            read.incoming.spool.unlink()
            if master != work.config.merged_file:
                master.unlink()
            master = Path(folder) / f"{unique}.master"
            load = replace(_load(work, candidate, read), outcome="valid")
            work.told.append(load.told())
            return Report(rows=load.rows, bytes=read.incoming.identity.size)

        return _all(work, one)


def undo(work: Work, run_id: str) -> Report:
    """Take back the merges of a run and all later ones; a dry run only says which. Raises Rejected, else as `run`."""
    from app.csv_inbox.undo import Undoing, check_master, preview, to_undo
    from app.csv_inbox.undo import undo as take_back

    places = work.places
    with translated(f"undo of {run_id[:40]}"):
        if work.context.dry_run:
            found = to_undo(places, run_id)
            check_master(work.config, found[0])
            return Report(rows=sum(load.rows for load in found), notes=tuple(preview(load) for load in found))
        with logged(work.config), _locked(places):
            _recover(work)
            for load in to_undo(places, run_id):
                work.context.stop.check()
                work.context.progress.advance(total=max(load.size_bytes // MEBIBYTE, 1))
                take_back(Undoing(places, work.clock(), _beat(work, None)), load)
                _tell(work, f"taken back: {preview(load)}")
            return Report(notes=tuple(work.told))
