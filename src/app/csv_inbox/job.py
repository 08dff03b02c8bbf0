"""The pipeline: merges the files in the inbox, oldest first, archives or rejects them, and logs it.

Invariants: everything that writes holds the lock and runs after recovery; one file is one transaction, so a run may
stop anywhere; each file ends up in the archive or in quarantine, or stays in the inbox and the run says why; a faulty
file does not block the others.
"""

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from app.core.errors import Transient
from app.core.files import LogFile
from app.core.ledger import KeptFile, SetAside, Tally, ledger_of
from app.core.runs import Context, ExitCodes, Failure, Job, Report, ReportSum, Run
from app.csv_inbox.config import FileStillChanging, InboxConfig, StuckFile, UnmergeableFile, load_config
from app.csv_inbox.discovery import (
    MEBIBYTE,
    REFUSED,
    UNIT,
    Candidate,
    InboxPaths,
    InboxRun,
    check_can_be_taken,
    md5_of,
    open_regular,
    translate_os_errors,
    waiting_files,
)
from app.csv_inbox.quarantine import reject, rejected_by
from app.csv_inbox.transaction import (
    MERGED,
    LoadRecord,
    changed_archive_files,
    changed_master,
    commit_merge,
    history_row,
    load_id_of,
    loads,
    recover,
    text_of,
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

    return Inbox(
        job,
        f"{config.watch_dir}/*.csv into {config.merged_file}",
        lambda limit: [history_row(load) for load in loads(paths.loads, limit)],
        lambda run: rejected_by(paths, run.run_id),
        lambda context, run_id: undo(InboxRun(paths, context, clock), run_id),
    )


def run(inbox: InboxRun) -> Report:
    """Merge the waiting files. Raises Transient (locked, disk full), Permanent (master unreadable) and Stopped."""
    paths = inbox.paths
    with translate_os_errors(str(paths.folder)):
        if inbox.context.dry_run:
            with _rehearsal(inbox) as rehearsed:
                return _all(inbox, partial(_rehearse, rehearsed))
        paths.make()
        # Check without the lock and before importing the merge: nearly every run finds nothing.
        found, ignored = waiting_files(paths)
        if found or paths.journal.exists() or paths.leftovers() or changed_archive_files(paths):
            with _started(inbox):
                return _all(inbox, partial(_merge_file, inbox))
        return Report(notes=tuple(filter(None, (changed_master(paths), ignored))))


def undo(inbox: InboxRun, run_id: str) -> Report:
    """Undo the merges of a run and all later ones; a dry run only lists them. Raises Rejected, otherwise as `run`."""
    from app.csv_inbox.after_merge import check_master, preview, to_undo, undo_merge

    paths = inbox.paths
    with translate_os_errors(f"undo of {run_id[:40]}"):
        if inbox.context.dry_run:
            found = to_undo(paths, run_id)
            check_master(inbox.config, found[0])
            return Report(rows=sum(load.rows for load in found), notes=tuple(preview(load) for load in found))
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
    if changed := changed_master(inbox.paths):
        inbox.tell(changed, logging.WARNING)
    found, ignored = waiting_files(inbox.paths)
    if ignored:
        inbox.told.append(ignored)
    for candidate in _steady(inbox, found):
        inbox.context.stop.check()
        report(_guarded(inbox, candidate, one))
    return replace(report.total, notes=tuple(inbox.told))


def _steady(inbox: InboxRun, waiting: Sequence[Candidate]) -> Sequence[Candidate]:
    """The waiting files that did not change during the wait, oldest first; each with its MD5 from before it.

    Includes new files made from rows that were appended to files after their merge.
    """
    from app.csv_inbox.after_merge import ingest_appended_rows

    waits = inbox.config.checksum_wait_seconds
    late = changed_archive_files(inbox.paths)
    found = [_marked(inbox, each) if waits else each for each in waiting]
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
    inbox.context.stop.check()  # many large files take long
    if each.refused or each.identity.size > inbox.config.max_file_size_mb * MEBIBYTE:
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


# The merge of one file: everything is prepared under temporary names, which are removed if a step fails. Then the
# transaction is committed and completed.


def _merge_file(inbox: InboxRun, each: Candidate) -> Report:
    """Merge one file. Raises UnmergeableFile, FileStillChanging, Transient, Permanent, OSError."""
    from app.csv_inbox.merge import read_and_merge

    at, began, paths = inbox.clock(), time.monotonic(), inbox.paths
    load = LoadRecord(load_id_of(paths.loads, at), inbox.context.run_id, each.name, text_of(at), MERGED)
    is_merged = False
    try:
        merged = read_and_merge(inbox, each, load)
        load = replace(merged.load, seconds=time.monotonic() - began)
        commit_merge(inbox, each, load, columns=merged.columns, master=merged.master)
        is_merged = True
    finally:
        if not is_merged and not paths.journal.exists():  # after a commit the journal needs them
            for path in paths.leftovers():
                path.unlink(missing_ok=True)
    if (new_index := paths.temporary(load.load_id, "index")).exists():  # rename the index only after its master
        new_index.replace(paths.index)
    inbox.tell(load.summary())
    numbers = (load.rows_after, len(merged.columns), load.size_bytes)
    log.info("%s: written, %d rows, %d columns, %d bytes", paths.config.merged_file.name, *numbers)
    return merged.report


@contextmanager
def _rehearsal(inbox: InboxRun) -> Iterator[InboxRun]:
    """What stands in for the inbox in a dry run: its master and index begin as links to the real ones."""
    with tempfile.TemporaryDirectory(prefix="headwater-csv-inbox-") as name:
        real = inbox.config.merged_file
        paths = InboxPaths(inbox.config.model_copy(update={"merged_file": Path(name) / real.name, "undo_keep": 0}))
        paths.config.merged_file.symlink_to(real)
        paths.index.symlink_to(inbox.paths.index)
        yield replace(inbox, paths=paths)


def _rehearse(inbox: InboxRun, each: Candidate) -> Report:
    """What merging a file, after the earlier ones, would do. Raises as `merge_file`."""
    from app.csv_inbox.merge import read_and_merge

    paths = inbox.paths
    load = LoadRecord(uuid4().hex, inbox.context.run_id, each.name, "", "valid")
    with translate_os_errors(str(paths.folder)):
        merged = read_and_merge(inbox, each, load)
    paths.temporary(load.load_id, "rows").unlink()
    paths.temporary(load.load_id, "master").replace(paths.config.merged_file)
    paths.index.unlink(missing_ok=True)
    if (new_index := paths.temporary(load.load_id, "index")).exists():
        new_index.replace(paths.index)
    inbox.told.append(merged.load.summary())
    return merged.report
