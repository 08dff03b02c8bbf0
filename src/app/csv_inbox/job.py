"""The pipeline: merges the files in the inbox, oldest first, archives or rejects them, and logs it.

Invariants: everything that writes holds the lock and runs after recovery; one file is one transaction, so a run may
stop anywhere; each file ends up in the archive or in quarantine, or stays in the inbox and the run says why; a faulty
file does not block the others.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from app.core.errors import Transient
from app.core.files import LogFile
from app.core.ledger import KeptFile, SetAside, Tally, ledger_of
from app.core.runs import Context, ExitCodes, Failure, Job, Report, ReportSum, Run
from app.csv_inbox.config import (
    FileStillChanging,
    InboxConfig,
    StuckFile,
    UnmergeableFile,
    load_config,
)
from app.csv_inbox.discovery import (
    MEBIBYTE,
    REFUSED,
    UNIT,
    Candidate,
    InboxPaths,
    InboxRun,
    candidates,
    check_can_be_taken,
    ignored_files_note,
    is_too_large,
    md5_of,
    open_regular,
    translate_os_errors,
)
from app.csv_inbox.quarantine import reject, rejected_by
from app.csv_inbox.transaction import (
    changed_archive_files,
    changed_master,
    check_master,
    history_row,
    loads,
    preview,
    recover,
    to_undo,
)

if TYPE_CHECKING:
    from app.config.settings import Settings

NAME = "csv_inbox"
FILE_BYTES, FILES_KEPT = 1_000_000, 5
LINE = "%(asctime)s.%(msecs)03dZ - %(levelname)s - %(message)s"
TIME = "%Y-%m-%dT%H:%M:%S"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inbox:
    """What `main` wires: the job, its destination, the load history, a run's rejected files, and undo.

    A dry run of undo is the preview.
    """

    job: Job
    destination: str
    history: Callable[[int], Sequence[Mapping[str, Any]]]
    rejected: Callable[[Run], Sequence[KeptFile]]
    undo: Callable[[Context, str], Report]


def build(settings: "Settings", clock: Callable[[], datetime]) -> Inbox:
    """Build the inbox from the settings. Raises BadSettings."""
    config = load_config(settings.inbox.config_file, settings.service.data_dir)
    paths = InboxPaths(config)
    job = Job(
        NAME,
        settings.inbox.interval_seconds,
        lambda context: run(InboxRun(paths, context, clock)),
        exits=ExitCodes(partial=1, failed=2, busy=2),
        unit="MiB",
        busy_seconds=config.lock_timeout_seconds,
        here=True,
    )

    def rejected(run: Run) -> Sequence[KeptFile]:
        with translate_os_errors(str(config.rejected_dir)):
            return rejected_by(paths, run.run_id)

    return Inbox(
        job,
        f"{config.watch_dir}/*.csv into {config.merged_file}",
        lambda limit: [history_row(load) for load in loads(paths.loads, limit)],
        rejected,
        lambda context, run_id: undo(InboxRun(paths, context, clock), run_id),
    )


def run(inbox: InboxRun) -> Report:
    """Merge the waiting files. Raises Transient (locked, disk full), Permanent (master unreadable) and Stopped."""
    paths = inbox.paths
    with translate_os_errors(str(paths.folder)):
        if not inbox.context.dry_run:
            paths.make()
            # Check without the lock and before importing the merge: nearly every run finds nothing.
            waiting = candidates(paths) or paths.journal.exists() or paths.leftovers() or changed_archive_files(paths)
            if not waiting:
                return Report(notes=_notes(inbox, changed_master(paths)))
        from app.csv_inbox.file_steps import merge_file, rehearsal  # numpy: a run that finds nothing does not load it

        if inbox.context.dry_run:
            with rehearsal(inbox) as rehearse:
                return _all(inbox, rehearse)
        with _started(inbox):
            return _all(inbox, lambda candidate: merge_file(inbox, candidate))


def _notes(inbox: InboxRun, *said: str) -> Sequence[str]:
    """The given notes, plus the note on ignored files; empty ones are left out."""
    return tuple(note for note in (*said, ignored_files_note(inbox.paths)) if note)


def undo(inbox: InboxRun, run_id: str) -> Report:
    """Undo the merges of a run and all later ones; a dry run only lists them. Raises Rejected, otherwise as `run`."""
    paths = inbox.paths
    with translate_os_errors(f"undo of {run_id[:40]}"):
        if inbox.context.dry_run:
            found = to_undo(paths, run_id)
            check_master(inbox.config, found[0])
            return Report(rows=sum(load.rows for load in found), notes=tuple(preview(load) for load in found))
        from app.csv_inbox.file_steps import undo_merge

        with _started(inbox):
            for load in to_undo(paths, run_id):
                inbox.context.stop.check()
                inbox.context.progress.advance(total=max(load.size_bytes // MEBIBYTE, 1))
                undo_merge(paths, load, inbox.clock(), inbox.beat(0))
                inbox.tell(f"taken back: {preview(load)}")
            return Report(notes=tuple(inbox.told))


@contextmanager
def _started(inbox: InboxRun) -> Iterator[None]:
    """Open the log file, take the lock between processes, and complete a transaction committed before.

    Waits up to `lock_timeout_seconds` for the lock. Raises as `run`.
    """
    from filelock import FileLock, Timeout

    lock, seconds, stop = inbox.paths.lock, inbox.config.lock_timeout_seconds, inbox.context.stop
    try:
        with _logged(inbox.config), FileLock(lock).acquire(timeout=seconds, cancel_check=lambda: stop.asked):
            done = recover(inbox.paths)
            if done is not None:
                log.warning("a step that was committed before the process ended is complete now: %s", done.summary())
            yield
    except Timeout as error:
        stop.check()
        told = f"{lock} is held by another process for more than {seconds:g} s"
        raise Transient(told, "let the other run end, or raise lock_timeout_seconds") from error


class _ServiceLog(logging.Handler):
    """Forwards records to the service's log: all of them, or from WARNING on."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger().handle(record)


@contextmanager
def _logged(config: InboxConfig) -> Iterator[None]:
    """Send log records to the inbox's own file within the block."""
    log = logging.getLogger("app.csv_inbox")
    with suppress(OSError):  # writing the first record reports what is wrong with the path
        config.log_file.parent.mkdir(parents=True, exist_ok=True)
    file = LogFile(config.log_file, maxBytes=FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8", delay=True)
    lines = logging.Formatter(LINE, TIME)
    lines.converter = time.gmtime  # UTC, like the names in the archive
    file.setFormatter(lines)
    service = _ServiceLog(logging.NOTSET if config.log_to_console else logging.WARNING)
    held = log.level, log.propagate
    log.setLevel(config.log_level)
    log.propagate = False
    log.addHandler(file)
    log.addHandler(service)
    try:
        yield
    finally:
        log.setLevel(held[0])
        log.propagate = held[1]
        for handler in (file, service):
            log.removeHandler(handler)
            handler.close()


def _all(inbox: InboxRun, one: Callable[[Candidate], Report]) -> Report:
    report = ReportSum(inbox.context.done)
    if said := changed_master(inbox.paths):
        log.warning("%s", said)
    inbox.told.extend(_notes(inbox, said))
    for candidate in _steady(inbox):
        inbox.context.stop.check()
        report(_guarded(inbox, candidate, one))
    return replace(report.total, notes=tuple(inbox.told))


def _steady(inbox: InboxRun) -> Sequence[Candidate]:
    """The files that did not change during the wait, oldest first; each with its MD5 from before it.

    Includes new files made from rows that were appended to files after their merge.
    """
    from app.csv_inbox.file_steps import ingest_appended_rows

    waits = inbox.config.checksum_wait_seconds
    late = changed_archive_files(inbox.paths)
    found = [_marked(inbox, each) if waits else each for each in candidates(inbox.paths)]
    # One pause for all files.
    if waits and (late or any(not each.refused for each in found)):
        inbox.context.stop.pause(min(waits, threading.TIMEOUT_MAX))
    steady = []
    for each in found:
        is_steady = each.is_unchanged()
        state = "unchanged" if is_steady else "changed"
        log.debug("%s: %d bytes, size and time %s after %g s", each.name, each.identity.size, state, waits)
        if is_steady:
            steady.append(each)
        else:
            inbox.tell(f"{each.name}: still being written, left for the next run")
    for load, grown in late:
        if not grown.is_unchanged():
            continue
        if inbox.context.dry_run:
            inbox.told.append(f"{grown.name}: was written to after it was merged; that would be looked at")
        elif (taken := ingest_appended_rows(inbox, load, grown)) is not None:
            steady.append(taken)
    return sorted(steady, key=lambda each: (each.identity.mtime_ns, each.path.name))


def _marked(inbox: InboxRun, each: Candidate) -> Candidate:
    if each.refused or is_too_large(each.identity.size, inbox.config):
        return each  # hashing it would delay the others
    try:
        with open_regular(each.path) as file:
            return replace(each, md5=md5_of(file, each.identity.size) or "shorter by now")  # never equals an MD5
    except (UnmergeableFile, FileStillChanging, StuckFile):
        return each  # reported when it is merged


def _guarded(inbox: InboxRun, each: Candidate, one: Callable[[Candidate], Report]) -> Report:
    """Process one file: merge it, reject it, or leave it if it changed or cannot be read or moved."""
    inbox.context.progress.advance(total=max(2 * each.identity.size // MEBIBYTE, 1))  # read once, appended once
    try:
        try:
            check_can_be_taken(each)
            return one(each)
        except UnmergeableFile as error:
            return _set_aside(inbox, each, error)
    except FileStillChanging as error:
        inbox.tell(f"{each.name}: left for the next run: {error.message}")
        return Report()
    except StuckFile as error:
        # It stays in the inbox, and each run reports it.
        inbox.tell(f"{each.name}: stays in the inbox: {error}", logging.ERROR)
        ledger = ledger_of(Tally(counted=1, waiting=1), unit=UNIT).of_partition(each.name)
        return Report(failures=(Failure(each.name, error.message, error.hint),), ledger=ledger)


def _set_aside(inbox: InboxRun, each: Candidate, error: UnmergeableFile) -> Report:
    """Move the file to quarantine; a dry run only reports it.

    Raises FileStillChanging if it is gone or was changed, StuckFile if it may not be moved, and OSError.
    """
    where = "would be rejected"
    if not inbox.context.dry_run:
        folder = inbox.config.rejected_dir
        with translate_os_errors(str(folder)):
            try:
                target = reject(inbox.paths, each, error, inbox.context.run_id, inbox.clock())
            except OSError as refused:
                if refused.errno not in REFUSED:
                    raise
                told = f"{error.message}; and it cannot be moved to {folder}: {refused.strerror}"
                raise StuckFile(told, "let this user write there, or remove the file") from refused
        where = f"rejected, moved to {target.parent}"
        log.error("%r: %s: %s", each.name, where, error)
    inbox.told.append(f"{each.name}: {where}: {error}")
    rows = max(error.rows, 1)
    ledger = ledger_of(Tally(counted=rows, read=rows), SetAside(error.kind.value, rows, rows, each.name), unit=UNIT)
    return Report(failures=(Failure(each.name, error.message, error.hint),), ledger=ledger.of_partition(each.name))
