"""The pipeline put together: what waits in the inbox is merged, oldest first, archived or set aside.

Invariants: all that writes happens under the lock and after recovery; one file is one committed step, so a run may end
anywhere; each file ends in the archive or in quarantine, or it is still in the inbox and the run says why.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from app.core.errors import Transient
from app.core.runs import Context, Exits, Failure, Job, Report
from app.csv_inbox.config import load_config
from app.csv_inbox.faults import Unmergeable, Unsteady
from app.csv_inbox.history import REJECTED, Load, loads, shown
from app.csv_inbox.inbox import Candidate, candidates, fingerprint, refusal, unchanged
from app.csv_inbox.log import logged
from app.csv_inbox.places import Places, printable, translated
from app.csv_inbox.work import MEBIBYTE, Work

if TYPE_CHECKING:
    from app.settings import Settings

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
    )
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
            return _merge_all(work)


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


def _merge_all(work: Work) -> Report:
    from app.csv_inbox.step import take

    return _all(work, lambda candidate: take(work, candidate))


def _rehearse(work: Work) -> Report:
    from app.csv_inbox.step import rehearsal

    with rehearsal(work) as dry:
        return _all(work, dry.take)


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
            work.tell(f"{printable(each.path.name)}: still being written, left for the next run")
    return [each for each in found if unchanged(each)]


def _marked(candidate: Candidate) -> Candidate:
    try:
        return replace(candidate, md5=fingerprint(candidate))
    except (Unmergeable, Unsteady):
        return candidate  # said when its turn comes


def _guarded(work: Work, candidate: Candidate, one: Callable[[Candidate], Report]) -> Report:
    """One file: merged, set aside, or left because it changed meanwhile."""
    name = printable(candidate.path.name)
    work.context.progress.advance(total=max(2 * candidate.identity.size // MEBIBYTE, 1))  # it is read, and put behind
    try:
        if candidate.refused:
            raise refusal(candidate)
        return one(candidate)
    except Unsteady as error:
        work.tell(f"{name}: left for the next run: {error.message}")
        return Report()
    except Unmergeable as error:
        where = "would be rejected" if work.context.dry_run else _set_aside(work, candidate, error)
        work.told.append(f"{name}: {where}: {error}")
        return Report(failures=(Failure(name, error.message, error.hint),))


def _set_aside(work: Work, candidate: Candidate, error: Unmergeable) -> str:
    from app.csv_inbox.quarantine import reject
    from app.csv_inbox.step import load_id_of, text_of

    at = work.clock()
    load = Load(load_id_of(at), work.context.run_id, printable(candidate.path.name), text_of(at), REJECTED)
    target = reject(work.places, candidate, error, load, at)
    where = f"rejected, moved to {target.parent.name}"
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
        with logged(work.config), _locked(places):
            _recover(work)
            for load in to_undo(places, run_id):
                work.context.stop.check()
                work.context.progress.advance(total=max(load.size_bytes // MEBIBYTE, 1))
                take_back(Undoing(places, work.clock(), work.beat(None)), load)
                work.tell(f"taken back: {preview(load)}")
            return Report(notes=tuple(work.told))
