"""The pipeline put together: what waits in the inbox is merged, oldest first, archived or quarantined, and logged."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from logging.handlers import RotatingFileHandler
from typing import TYPE_CHECKING, Any

from app.core.errors import Transient
from app.core.ledger import SetAside, Tally, ledger_of
from app.core.runs import Context, Exits, Failure, Job, Report
from app.csv_inbox.config import InboxConfig, Stuck, Unmergeable, Unsteady, load_config
from app.csv_inbox.discovery import (
    MEBIBYTE,
    REFUSED,
    UNIT,
    Candidate,
    Places,
    Work,
    candidates,
    fingerprint,
    in_order,
    is_too_large,
    printable,
    refusal,
    translated,
    unchanged,
)
from app.csv_inbox.quarantine import REJECTED, Load, loads, shown

if TYPE_CHECKING:
    from app.config.settings import Settings

# The inbox's own log file, as documented: rotating at 1 MB, five kept, at its own level, on the console if wanted.
#
# Invariant: the file is open only while a run goes on; warnings always reach the log of the service as well.

LOG_NAME = "app.csv_inbox"
FILE_BYTES, FILES_KEPT = 1_000_000, 5
LINE = "%(asctime)s.%(msecs)03dZ - %(levelname)s - %(message)s"
TIME = "%Y-%m-%dT%H:%M:%S"


class _Onward(logging.Handler):
    """Hands records on to the log of the service: all of them, or what is unexpected."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger().handle(record)


@contextmanager
def logged(config: InboxConfig) -> Iterator[None]:
    """Records of the inbox go to its file until the end of the block. Raises OSError when the file cannot be opened."""
    log = logging.getLogger(LOG_NAME)
    config.log_file.parent.mkdir(parents=True, exist_ok=True)
    file = RotatingFileHandler(
        config.log_file, maxBytes=FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8", delay=True
    )
    lines = logging.Formatter(LINE, TIME)
    lines.converter = time.gmtime  # names in the archive are UTC as well
    file.setFormatter(lines)
    onward = _Onward(logging.NOTSET if config.log_to_console else logging.WARNING)
    held = log.level, log.propagate
    log.setLevel(config.log_level)
    log.propagate = False
    log.addHandler(file)
    log.addHandler(onward)
    try:
        yield
    finally:
        log.setLevel(held[0])
        log.propagate = held[1]
        for handler in (file, onward):
            log.removeHandler(handler)
            handler.close()


# The pipeline put together: what waits in the inbox is merged, oldest first, archived or set aside.
#
# Invariants: all that writes happens under the lock and after recovery; one file is one committed step, so a run may
# end anywhere; each file ends in the archive or in quarantine, or it is still in the inbox and the run says why; what
# is wrong with one file keeps no other waiting.

NAME = "csv_inbox"
EXITS = Exits(partial=1, failed=2, busy=2)
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inbox:
    """What `main` wires: the job, its load history, and undo. Of undo, a dry run is the preview."""

    job: Job
    history: Callable[[int], Sequence[Mapping[str, Any]]]
    undo: Callable[[Context, str], Report]


def build(settings: "Settings", clock: Callable[[], datetime]) -> Inbox:
    """The inbox as it is configured. Raises BadSettings."""
    config = load_config(settings.inbox.config_file, settings.service.data_dir)
    places = Places(config)

    def history(limit: int) -> Sequence[Mapping[str, Any]]:
        return [shown(load) for load in loads(places.loads, limit)]

    job = Job(
        NAME,
        settings.inbox.interval_seconds,
        lambda context: run(Work(places, context, clock)),
        exits=EXITS,
        unit="MiB",
        busy_seconds=config.lock_timeout_seconds,
    )
    return Inbox(job, history, lambda context, run_id: undo(Work(places, context, clock), run_id))


def run(work: Work) -> Report:
    """Merge what waits. Raises Transient (locked, disk full), Permanent (master unreadable) and Stopped."""
    with translated(str(work.places.folder)):
        if work.context.dry_run:
            return _rehearse(work)
        work.places.make()
        if not _has_work(work):
            return Report()
        with logged(work.config), _locked(work):
            _recover(work)
            return _merge_all(work)


def _has_work(work: Work) -> bool:
    from app.csv_inbox.late_rows import grown

    places = work.places
    return bool(candidates(work.config) or places.journal.exists() or places.leftovers() or grown(places))


@contextmanager
def _locked(work: Work) -> Iterator[None]:
    """The lock that other processes respect; it waits `lock_timeout_seconds`. Raises Transient, Stopped."""
    from filelock import FileLock, Timeout

    places, stop = work.places, work.context.stop
    seconds = places.config.lock_timeout_seconds
    try:
        with FileLock(places.lock).acquire(timeout=seconds, cancel_check=lambda: stop.asked):
            yield
    except Timeout as error:
        stop.check()
        told = f"{places.lock} is held by another process for more than {seconds:g} s"
        raise Transient(told, "let the other run end, or raise lock_timeout_seconds") from error


def _recover(work: Work) -> None:
    from app.csv_inbox.transaction import recover

    done = recover(work.places)
    if done is not None:
        log.warning("a step that was committed before the process ended is complete now: %s", done.told())


def _merge_all(work: Work) -> Report:
    from app.csv_inbox.transaction import take

    return _all(work, lambda candidate: take(work, candidate))


def _rehearse(work: Work) -> Report:
    from app.csv_inbox.transaction import rehearsal

    with rehearsal(work) as dry:
        return _all(work, dry.take)


def _all(work: Work, one: Callable[[Candidate], Report]) -> Report:
    report = Report()
    for candidate in _steady(work):
        work.context.stop.check()
        report += _guarded(work, candidate, one)
    return replace(report, notes=tuple(work.told))


def _steady(work: Work) -> Sequence[Candidate]:
    """Candidates that did not change while all of them were waited for, with their MD5 from before the wait.

    Rows that were written to files after these were merged have become files of their own by then.
    """
    from app.csv_inbox.late_rows import grown, take_in

    waits = work.config.checksum_wait_seconds
    late = grown(work.places)
    found = [_marked(work, each) if waits else each for each in candidates(work.config)]
    if waits and (late or any(not each.refused for each in found)):
        work.context.stop.pause(waits)
    steady = []
    for each in found:
        name, same = printable(each.path.name), unchanged(each)
        state = "unchanged" if same else "changed"
        log.debug("%s: %d bytes, size and time %s after %g s", name, each.identity.size, state, waits)
        if same:
            steady.append(each)
        else:
            work.tell(f"{name}: still being written, left for the next run")
    for old in (old for old in late if old.is_steady()):
        if work.context.dry_run:
            work.told.append(f"{printable(old.path.name)}: was written to after it was merged; that would be looked at")
        elif (taken := take_in(work, old)) is not None:
            steady.append(taken)
    return in_order(steady)


def _marked(work: Work, candidate: Candidate) -> Candidate:
    if candidate.refused or is_too_large(candidate.identity.size, work.config):
        return candidate  # reading it to the end would keep the others waiting
    try:
        return replace(candidate, md5=fingerprint(candidate))
    except (Unmergeable, Unsteady, Stuck):
        return candidate  # said when its turn comes


def _guarded(work: Work, candidate: Candidate, one: Callable[[Candidate], Report]) -> Report:
    """One file: merged, set aside, or left because it changed meanwhile or can be neither read nor moved."""
    name = printable(candidate.path.name)
    work.context.progress.advance(total=max(2 * candidate.identity.size // MEBIBYTE, 1))  # it is read, and put behind
    try:
        if candidate.refused:
            raise refusal(candidate)
        return one(candidate)
    except Unsteady as error:
        work.tell(f"{name}: left for the next run: {error.message}")
        return Report()
    except Stuck as error:
        return _left(work, name, error)
    except Unmergeable as error:
        try:
            where = "would be rejected" if work.context.dry_run else _set_aside(work, candidate, error)
        except Stuck as stuck:
            return _left(work, name, stuck)
        except Unsteady as gone:
            work.tell(f"{name}: {gone.message}")
            return Report()
        work.told.append(f"{name}: {where}: {error}")
        rows = max(error.rows, 1)
        ledger = ledger_of(Tally(counted=rows, read=rows), SetAside(error.kind, rows, rows, name), unit=UNIT)
        return Report(failures=(Failure(name, error.message, error.hint),), ledger=ledger.of_partition(name))


def _left(work: Work, name: str, error: Stuck) -> Report:
    """This file stays where it is, and each run says so."""
    work.told.append(f"{name}: stays in the inbox: {error}")
    log.error("%r: stays in the inbox: %s", name, error)
    ledger = ledger_of(Tally(counted=1, waiting=1), unit=UNIT).of_partition(name)
    return Report(failures=(Failure(name, error.message, error.hint),), ledger=ledger)


def _set_aside(work: Work, candidate: Candidate, error: Unmergeable) -> str:
    """Where it went. Raises Stuck when it may not be moved there, Unsteady when it is gone, and OSError."""
    from app.csv_inbox.quarantine import reject
    from app.csv_inbox.transaction import load_id_of, text_of

    at = work.clock()
    load = Load(load_id_of(at), work.context.run_id, printable(candidate.path.name), text_of(at), REJECTED)
    try:
        target = reject(work.places, candidate, error, load, at)
    except OSError as refused:
        if refused.errno not in REFUSED:
            raise
        told = f"{error.message}; and it cannot be moved to {work.config.rejected_dir}: {refused.strerror}"
        raise Stuck(told, "let this user write there, or remove the file") from refused
    where = f"rejected, moved to {target.parent}"
    log.error("%r: %s: %s", candidate.path.name, where, error)
    return where


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
        with logged(work.config), _locked(work):
            _recover(work)
            for load in to_undo(places, run_id):
                work.context.stop.check()
                work.context.progress.advance(total=max(load.size_bytes // MEBIBYTE, 1))
                take_back(Undoing(places, work.clock(), work.beat(None)), load)
                work.tell(f"taken back: {preview(load)}")
            return Report(notes=tuple(work.told))
