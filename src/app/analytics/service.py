"""/analytics put together: the folder of this process, the engines, and the thread that keeps the summaries fresh.

Invariants: building touches nothing; where nobody ever asked, nothing is listed and DuckDB is not imported; from the
first request on, also after later starts, summaries are kept fresh; nothing that ends a refresh ends the refreshing.
"""

import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

from app.analytics.engine import Engine, Limits, Remote
from app.analytics.queries import BucketObjects, LocalObjects, Objects, Queries
from app.analytics.reports import Report, load_reports
from app.analytics.summaries import Summaries
from app.config.settings import Settings
from app.core.errors import AppError
from app.stores.local_directory import LocalDirectory
from app.stores.objects import ObjectStore
from app.stores.sql import sql_directory
from app.stores.summaries import SqlSummaries

FOLDER = "analytics"
LOCK = "lock"
LOCAL_THREADS, REMOTE_THREADS = 2, 8
FIRST_SECONDS = 1.0
LEAST_SECONDS = 1.0
SHARE = 4
log = logging.getLogger(__name__)

Keys = tuple[str, str, str]
"""Access key, secret key, session token."""


class Refresher:
    """Refreshes the summaries while the process serves, from the first `hurry` on, or at once when `is_asked` says that
    there was one in an earlier process. `trouble` says why the last attempt failed, if it did.
    """

    def __init__(self, summaries: Summaries, is_asked: Callable[[], bool], interval_seconds: float) -> None:
        self._summaries = summaries
        self._is_asked = is_asked
        self._interval_seconds = interval_seconds
        self._awake = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._turn, name="analytics-refresh", daemon=True)
        self.trouble: AppError | None = None

    def start(self) -> None:
        """Begin, a moment after everything else."""
        self._thread.start()

    def hurry(self) -> None:
        """Refresh now: somebody is waiting."""
        self._awake.set()

    def close(self, seconds: float) -> None:
        """End; a refresh that goes on is waited for that long and no longer."""
        self._ended = True
        self._awake.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _turn(self) -> None:
        """Each refresh runs in a thread of its own, so that whatever it raises ends there and is told."""
        pause_seconds = FIRST_SECONDS
        with ThreadPoolExecutor(1, thread_name_prefix="analytics") as one:
            asked = one.submit(self._is_asked)
            if asked.exception() is None and not asked.result():  # a failure is that of the refresh too, which tells it
                self._awake.wait()
            while True:
                self._awake.wait(pause_seconds)
                self._awake.clear()
                if self._ended:
                    return
                began, used = time.monotonic(), time.process_time()
                error = one.submit(self._summaries.refresh).exception()
                self._note(error)
                taken = time.monotonic() - began
                pause_seconds = pause_after(taken, time.process_time() - used, self._interval_seconds)

    def _note(self, error: BaseException | None) -> None:
        if error is None:
            if self.trouble is not None:
                log.info("analytics: the objects can be listed again")
            self.trouble = None
            return
        known = isinstance(error, AppError)
        trouble = error if isinstance(error, AppError) else AppError(f"{type(error).__name__}: {error}", "see the log")
        if self.trouble is None or self.trouble.message != trouble.message:
            log.warning("analytics: answers stay as they are: %s", trouble, exc_info=None if known else error)
        self.trouble = trouble


def pause_after(taken_seconds: float, used_seconds: float, interval_seconds: float) -> float:
    """How long to wait after a refresh that took so long, while the process used so much of the processor.

    What comes just after its folder was listed is seen by the next listing, so that both have to fit into the interval;
    but a listing of very many objects must not take more than a fifth of one core. Waiting for a network takes none.
    """
    busy_seconds = min(taken_seconds, used_seconds)
    return max(interval_seconds - 2 * taken_seconds, SHARE * busy_seconds, min(LEAST_SECONDS, interval_seconds))


@dataclass(frozen=True, slots=True)
class Workplace:
    """A folder below `root` that belongs to this process alone; what ended processes left is removed."""

    root: Path
    name: str = field(default_factory=lambda: uuid4().hex)
    locks: list[int] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The folder."""
        return self.root / self.name

    def enter(self) -> None:
        """Make the folder and hold its lock, which the kernel releases with the process."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / LOCK).open("ab") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            self.folder.mkdir()
            self.locks.append(_locked(self.folder / LOCK))
            for other in self.root.iterdir():
                if other.name != self.name and (descriptor := _locked(other / LOCK)) >= 0:
                    shutil.rmtree(other, ignore_errors=True)
                    os.close(descriptor)

    def leave(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        while self.locks:
            os.close(self.locks.pop())


def _locked(path: Path) -> int:
    """A descriptor that holds the lock; -1 when another process has it, or there is no such folder."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor


@dataclass(frozen=True, slots=True)
class Analytics:
    """What the routes serve."""

    reports: Mapping[str, Report]
    summaries: Summaries
    queries: Queries
    refresher: Refresher
    workplace: Workplace
    refresh_seconds: float

    def start(self) -> None:
        """Begin to refresh."""
        self.workplace.enter()
        self.refresher.start()

    def close(self, seconds: float) -> None:
        """End, within `seconds`."""
        self.refresher.close(seconds)
        self.queries.close()
        self.workplace.leave()


def build(
    settings: Settings, store: ObjectStore, facts: SqlSummaries, keys: Callable[[], Keys], clock: Callable[[], datetime]
) -> Analytics:
    """/analytics over `store`. `keys` gives those of the bucket. Raises Permanent for a report that cannot be
    understood.
    """
    analytics = settings.analytics
    workplace = Workplace(settings.service.data_dir.resolve() / FOLDER)

    def engine(remote: Remote | None) -> Engine:
        threads = LOCAL_THREADS if remote is None else REMOTE_THREADS
        limits = Limits(analytics.memory_mb, threads, analytics.timeout_seconds)
        return Engine(workplace.folder, limits, remote)

    local = engine(None)
    summaries = Summaries(store, facts, local, settings.s3.prefix, clock)
    objects: Objects
    if isinstance(store, LocalDirectory):
        objects = LocalObjects(local, store.pin)
    else:
        objects = BucketObjects(lambda whole: _remote(settings, keys(), whole=whole), engine)
    return Analytics(
        reports=load_reports(_folders(analytics.reports_dir)),
        summaries=summaries,
        queries=Queries(summaries, objects, local),
        refresher=Refresher(summaries, facts.is_asked, analytics.refresh_seconds),
        workplace=workplace,
        refresh_seconds=analytics.refresh_seconds,
    )


def _folders(own: Path | None) -> Sequence[Path]:
    shipped = sql_directory() / "analytics"
    return [shipped, own] if own else [shipped]


def _remote(settings: Settings, keys: Keys, *, whole: bool) -> Remote:
    s3 = settings.s3
    address = urlsplit(s3.endpoint_url)
    return Remote(
        bucket=s3.bucket,
        prefix=s3.prefix,
        endpoint=address.netloc + address.path.rstrip("/"),
        region=s3.region,
        path_style=s3.addressing_style == "path" or (s3.addressing_style == "auto" and bool(s3.endpoint_url)),
        tls=address.scheme != "http",
        access_key_id=keys[0],
        secret_access_key=keys[1],
        session_token=keys[2],
        whole=whole,
    )
