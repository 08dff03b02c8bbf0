"""The /analytics service: parsed requests, shared and cached answers, the engines, and the thread that refreshes the
summaries.
"""

import asyncio
import logging
import math
import os
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from app.analytics.engine import Engine, EngineLimits, RemoteBucket
from app.analytics.formats import MEDIA, ReportAnswer
from app.analytics.queries import BucketObjects, LocalObjects, Queries, ReportObjects
from app.analytics.reports import ReportDefinition, load_reports
from app.analytics.spark import SparkRemote, SparkReports, spark_texts
from app.analytics.sql_sandbox import SqlSandbox
from app.analytics.summaries import ListingView, Summaries
from app.config.settings import Settings
from app.core.closed_days import ClosedDays
from app.core.errors import AppError, BadSettings, Transient
from app.core.windows import instant_text
from app.db.database import sql_directory
from app.db.object_summaries import SqlSummaries
from app.object_store.local import LocalDirectory
from app.object_store.port import ObjectStore

# Invariants: an answer is cached for one state of the objects only, and only briefly if it may depend on the clock; an
# expired answer is dropped by the next request at the latest; large answers, which are on disk, are not cached; few
# reports run at once, and a bounded number of others wait their turn.

PLACES = 2
KEPT_ANSWERS = 64
KEPT_BYTES = 16 << 20
WAIT_SECONDS = 30.0
WAITING = 200


class SingleFlightCache:
    """Concurrent requests for the same answer share one run; the answer is cached until it expires. Event-loop thread
    only.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, tuple[ReportAnswer, float]] = OrderedDict()  # expiry, monotonic
        self._soonest = math.inf  # no cached answer expires earlier
        self._running: dict[Hashable, asyncio.Task[ReportAnswer]] = {}
        self._places = asyncio.Semaphore(PLACES)

    def held(self, key: Hashable) -> ReportAnswer | None:
        """The unexpired answer cached under `key`, if any."""
        self._drop_expired()
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    async def answer(
        self, key: Hashable, make: Callable[[], ReportAnswer], keep_seconds: Callable[[ReportAnswer], float]
    ) -> ReportAnswer:
        """The result of `make`, run in a thread, once for all callers waiting for `key`; cached for `keep_seconds` of
        it. Raises what `make` raises, and Transient when too many reports are waiting.
        """
        running = self._running.get(key)
        if running is None:
            if len(self._running) >= WAITING:
                raise busy_error()
            running = asyncio.create_task(self._run(make))
            self._running[key] = running
            running.add_done_callback(lambda task: self._keep(key, task, keep_seconds))
        return await asyncio.shield(running)

    async def _run(self, make: Callable[[], ReportAnswer]) -> ReportAnswer:
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await self._places.acquire()
        except TimeoutError:
            raise busy_error() from None
        try:
            return await asyncio.to_thread(make)
        finally:
            self._places.release()

    def _keep(
        self, key: Hashable, task: "asyncio.Task[ReportAnswer]", keep_seconds: Callable[[ReportAnswer], float]
    ) -> None:
        self._running.pop(key, None)
        self._drop_expired()
        if task.cancelled() or task.exception() is not None or task.result().size_bytes > KEPT_BYTES:
            return
        until = time.monotonic() + keep_seconds(task.result())
        self._kept[key] = task.result(), until
        self._kept.move_to_end(key)
        self._soonest = min(self._soonest, until)
        while len(self._kept) > KEPT_ANSWERS:
            self._kept.popitem(last=False)

    def _drop_expired(self) -> None:
        now = time.monotonic()
        if now >= self._soonest:
            for key in [key for key, (_, until) in self._kept.items() if until <= now]:
                del self._kept[key]
            self._soonest = min((until for _, until in self._kept.values()), default=math.inf)


def busy_error() -> Transient:
    """The error for too many concurrent reports."""
    return Transient("too many reports are waiting", "send the same request again later", retry_after_seconds=5)


# Invariant: an answer's cache key has everything that the answer depends on: report, parameters, format, state of the
# objects, and warnings.

REMEMBERED = 256
UNCHANGED = 304
WARNINGS = 20
Warnings = tuple[tuple[tuple[str, str], ...], ...]
Scope = MutableMapping[str, Any]


@dataclass(frozen=True, slots=True)
class ReportRequest:
    """A parsed request for a report. `scan`: run the query even if there is a summary; `formula_safe`: see `formats`;
    `as_of`: read the table of closed days as of this time.
    """

    report: ReportDefinition
    values: Mapping[str, Any]
    format: str
    scan: bool = False
    formula_safe: bool = False
    as_of: datetime | None = None

    @property
    def from_memory(self) -> bool:
        """Whether the summaries, which are sums of whole days, can give the answer."""
        span = self.report.span(self.values)
        is_whole_days = all(at is None or at.time() == datetime.min.time() for at in (span.since, span.until))
        return bool(self.report.summary) and not self.scan and self.as_of is None and is_whole_days


def key_of(asked: ReportRequest, view: ListingView, warnings: Warnings) -> Hashable:
    """The cache key: everything the answer depends on."""
    how = asked.format, asked.scan, asked.formula_safe, asked.as_of
    return asked.report.path, *how, tuple(asked.values.items()), view.number, warnings


def response_head(
    asked: ReportRequest, view: ListingView, answer: ReportAnswer, *, if_none_match: str, began: float
) -> tuple[int, dict[str, str]]:
    """Status and headers; 304 when the caller already has this answer. `began`: a `time.perf_counter` reading."""
    headers = {
        "ETag": answer.etag,
        "X-Data-As-Of": view.as_of,
        "Server-Timing": f"{answer.engine};dur={(time.perf_counter() - began) * 1000:.2f}",
        "Cache-Control": "private, no-cache",
        "Content-Length": str(answer.size_bytes),
    }
    if asked.as_of and answer.state:
        headers["X-Data-As-Of"] = str(instant_text(answer.state.committed_at))
    if warnings := len(view.faults) + answer.left_out:
        headers["X-Warnings"] = str(warnings)
    if asked.format != "json":
        headers["Content-Disposition"] = f'attachment; filename="{asked.report.name}.{asked.format}"'
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    if answer.etag in tags or "*" in tags:
        del headers["Content-Length"]
        return UNCHANGED, headers
    return 200, {**headers, "Content-Type": MEDIA[asked.format]}


def warnings_of(view: ListingView, trouble: AppError | None) -> Warnings:
    """Objects that are left out or only partly readable, and why the answer may be stale."""
    found = list(view.faults[:WARNINGS])
    if len(view.faults) > WARNINGS:
        found.append(("", f"{len(view.faults) - WARNINGS} more objects are left out or not wholly understood"))
    if trouble is not None:
        found.append(("", f"not up to date: {trouble}"))
    return tuple((("object", key), ("message", fault)) for key, fault in found)


# Invariants: construction has no side effects; before the first request ever, nothing is listed and DuckDB is not
# imported; after it, also across restarts, summaries are kept fresh; a failed refresh is retried at the next interval.

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
    """Refreshes the summaries while the process serves, starting with the first `hurry`, or at once if `is_asked`
    reports one from an earlier process. `trouble`: why the last attempt failed, if it did.
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
        """Start the thread; the first refresh comes shortly after startup."""
        self._thread.start()

    def hurry(self) -> None:
        """Refresh now, since a request is waiting."""
        self._awake.set()

    def close(self, seconds: float) -> None:
        """Stop; wait at most `seconds` for a running refresh."""
        self._ended = True
        self._awake.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _turn(self) -> None:
        """The refresh loop. Each refresh runs in a separate thread, which contains whatever it raises; it is logged."""
        pause_seconds = FIRST_SECONDS
        with ThreadPoolExecutor(1, thread_name_prefix="analytics") as one:
            asked = one.submit(self._is_asked)
            if asked.exception() is None and not asked.result():  # if this raises, so does the refresh, which is logged
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
            log.warning(
                "analytics: refresh failed; serving stale results: %s", trouble, exc_info=None if known else error
            )
        self.trouble = trouble


def pause_after(taken_seconds: float, used_seconds: float, interval_seconds: float) -> float:
    """How long to wait after a refresh that took `taken_seconds` of wall time and `used_seconds` of process CPU time.

    An object that arrives just after its folder was listed is seen by the next listing, so both must fit into the
    interval; but listing very many objects must not use more than a fifth of one core. Network waits use no CPU.
    """
    busy_seconds = min(taken_seconds, used_seconds)
    return max(interval_seconds - 2 * taken_seconds, SHARE * busy_seconds, min(LEAST_SECONDS, interval_seconds))


@dataclass(frozen=True, slots=True)
class ProcessFolder:
    """A private folder of this process below `root`; folders left by ended processes are removed."""

    root: Path
    name: str = field(default_factory=lambda: uuid4().hex)
    locks: list[int] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The folder."""
        return self.root / self.name

    def enter(self) -> None:
        """Create the folder and lock it; the kernel releases the lock when the process ends."""
        from filelock import lock_descriptor

        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / LOCK).open("ab") as turn:
            lock_descriptor(turn.fileno())
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
    """A descriptor that holds the lock; -1 when another process holds it, or the folder does not exist."""
    from filelock import lock_descriptor

    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return -1
    with suppress(OSError):
        if lock_descriptor(descriptor, blocking=False):
            return descriptor
    os.close(descriptor)
    return -1


@dataclass(frozen=True, slots=True)
class Analytics:
    """Services for the routes. `parsed`: requests by path and query, newest last; `described`: the reports by
    path, with their columns.
    """

    reports: Mapping[str, ReportDefinition]
    summaries: Summaries
    queries: Queries
    refresher: Refresher
    workplace: ProcessFolder
    refresh_seconds: float
    sandbox: SqlSandbox
    cache: SingleFlightCache = field(default_factory=SingleFlightCache)
    parsed: dict[tuple[str, bytes], ReportRequest] = field(default_factory=dict)
    described: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def start(self) -> None:
        """Start refreshing."""
        self.workplace.enter()
        self.refresher.start()

    def close(self, seconds: float) -> None:
        """Stop within `seconds`."""
        self.sandbox.close()
        self.refresher.close(seconds)
        self.queries.close()
        self.workplace.leave()

    def remember(self, scope: Scope, asked: ReportRequest) -> None:
        """Cache a parsed request for later ones with the same path and query."""
        if len(self.parsed) >= REMEMBERED:
            del self.parsed[next(iter(self.parsed))]
        self.parsed[scope["path"], scope["query_string"]] = asked


def build(
    settings: Settings,
    store: ObjectStore,
    facts: SqlSummaries,
    keys: Callable[[], Keys],
    clock: Callable[[], datetime],
    *,
    table: ClosedDays | None,
) -> Analytics:
    """Build the /analytics service over `store`. `keys` gives the bucket's access keys; `table`: the table of closed
    days. Raises Permanent for an invalid report, and BadSettings when the Spark client is not installed.
    """
    analytics = settings.analytics
    workplace = ProcessFolder(settings.service.data_dir.resolve() / FOLDER)

    def engine(remote: RemoteBucket | None) -> Engine:
        threads = LOCAL_THREADS if remote is None else REMOTE_THREADS
        limits = EngineLimits(analytics.memory_mb, threads, analytics.timeout_seconds)
        return Engine(workplace.folder, limits, remote)

    local = engine(None)
    summaries = Summaries(store, facts, local, settings.s3.prefix, clock)

    def objects(over: Engine) -> ReportObjects:
        if isinstance(store, LocalDirectory):
            return LocalObjects(over, store.pin)
        return BucketObjects(lambda whole: _remote(settings, keys(), whole=whole), engine)

    folders = [folder for folder in (sql_directory() / "analytics", analytics.reports_dir) if folder]
    spark = None
    if analytics.engine == "spark" and analytics.spark_remote is not None:
        if find_spec("pyspark") is None:
            missing = "ANALYTICS_ENGINE='spark': the package pyspark is not installed"
            raise BadSettings([f"{missing}; install headwater with its extra: pip install 'headwater[spark]'"])
        remote = SparkRemote(analytics.spark_remote.get_secret_value(), analytics.spark_table)
        spark = SparkReports(remote, spark_texts(folders), analytics.timeout_seconds, workplace.folder)
    queries = Queries(summaries, objects(local), local, table, spark)
    return Analytics(
        reports=load_reports(folders),
        summaries=summaries,
        queries=queries,
        sandbox=SqlSandbox(queries, workplace.folder, local.limits, objects),
        refresher=Refresher(summaries, facts.is_asked, analytics.refresh_seconds),
        workplace=workplace,
        refresh_seconds=analytics.refresh_seconds,
    )


def _remote(settings: Settings, keys: Keys, *, whole: bool) -> RemoteBucket:
    s3 = settings.s3
    address = urlsplit(s3.endpoint_url)
    return RemoteBucket(
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
        table=settings.lake.prefix if settings.lake.catalog == "iceberg" else "",
    )
