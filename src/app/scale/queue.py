"""The queue, whose only home this is: Procrastinate's, in the PostgreSQL that holds the state.

Invariants: only what waits is unique (`queueing_lock`); what runs is not locked here but by our leases, so a worker
that died blocks nothing. The queue's tables are made and changed under the same lock as ours, and recorded with ours.
Any error of the queue is one of ours when it leaves this module.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from procrastinate import App, PsycopgConnector, SyncPsycopgConnector
from procrastinate.exceptions import AlreadyEnqueued, ConnectorException
from procrastinate.schema import SchemaManager

from app.config.settings import Settings
from app.core.errors import AppError, Transient
from app.core.runs import Stop
from app.db.database import Database
from app.db.migrations import RECORD, Migration, apply, lock, recorded
from app.db.postgres import conninfo_of, errors_of
from app.db.state import VARIABLES, State
from app.ops.scheduler import Workload
from app.scale.shards import Shards

EXPORT = "influx_to_s3"  # the one pipeline whose plans are shared out
JOBS, STEPS = "jobs", "steps"
FOLDER = "procrastinate"
JOBS_AT_ONCE = 32  # more than there are jobs: each may run beside all others, as in one process
POLL_SECONDS = 1.0
LOOK_AGAIN_SECONDS = 1.0
STOP_LOOK_SECONDS = 0.25
DEAD_TTLS = 10  # what a dead worker had blocks nothing and is in no hurry; one that is only slow should not lose it
NEVER_SECONDS = 86_400.0
AWAY_HINT = "no action needed if it passes; otherwise look at the server's log and load"
# What workers had that died. Their leases say when others may go on, and a plan sends anew what is due.
CLEAR = """
DELETE FROM procrastinate_jobs
WHERE status = 'doing' AND (
    worker_id IS NULL
    OR worker_id IN (
        SELECT id FROM procrastinate_workers WHERE last_heartbeat < now() - %(seconds)s * INTERVAL '1 second'
    )
)
"""
log = logging.getLogger(__name__)


def install(database: Database) -> None:
    """Make the queue's tables, or bring them to this version. Idempotent; of several processes one does it.

    Raises Permanent when a newer version of Headwater has changed them.
    """
    files = sorted(Path(SchemaManager.get_migrations_path()).glob("*.sql"))
    wanted = [Migration(f"{FOLDER}/{path.stem}", path.read_text(encoding="utf-8")) for path in files]
    with database.transaction() as session:
        lock(session, "postgres")
        if not any(name.startswith(f"{FOLDER}/") for name in recorded(session, "postgres")):
            session.script(SchemaManager.get_schema())  # what all of them together make
            session.run_many(RECORD, [{"name": each.name, "checksum": each.checksum} for each in wanted])
            return
    apply(database, wanted)


class Queue:
    """Sends work to workers and counts what waits. From any thread. Nothing is connected before the first use.

    Raises Transient or Permanent when the database cannot be used.
    """

    def __init__(self, database: Database, url: str) -> None:
        self._database = database
        _quieten()
        self._errors = errors_of(url, VARIABLES)
        self._app = App(
            connector=SyncPsycopgConnector(conninfo=conninfo_of(url, VARIABLES), min_size=0, max_size=2, timeout=10.0)
        )
        self._lock = threading.Lock()
        self._is_installed = self._is_open = False

    def prepare(self, *, again: bool = False) -> None:
        """Make the tables and open the connections. Idempotent; after it succeeded once it costs nothing.

        `again`: look at the tables once more, since the database may have been made anew.
        """
        with self._lock:
            if again or not self._is_installed:
                install(self._database)
                self._is_installed = True
            if not self._is_open:
                with _translated(self._errors.translated):
                    self._app.open()
                self._is_open = True

    def send_job(self, name: str, by: str, after_seconds: float = 0.0) -> None:
        """Have a worker run a job. Nothing is added while the same waits already. `by`: see `Run.started_by`."""
        task = self._app.configure_task(
            "job",
            queue=JOBS,
            queueing_lock=f"{JOBS}/{name}/{'now' if after_seconds == 0 else 'more'}",
            schedule_in={"seconds": after_seconds},
        )
        self._send(task.defer, name=name, more=after_seconds > 0, by=by)

    def send_step(self, step: str, plan_id: str, plan: Mapping[str, Any]) -> bool:
        """Have a worker make a step of a plan; False when an older one of this name waits still."""
        task = self._app.configure_task("step", queue=STEPS, queueing_lock=f"{STEPS}/{step}")
        return self._send(task.defer, step=step, plan_id=plan_id, plan=dict(plan))

    def _send(self, defer: Callable[..., int], **given: Any) -> bool:
        self.prepare()
        try:
            with _translated(self._errors.translated):
                defer(**given)
        except AlreadyEnqueued:
            return False
        except AppError:
            self._is_installed = False
            raise
        return True

    def waiting(self) -> Mapping[str, int]:
        """By queue, how much waits for a worker."""
        self.prepare()
        with _translated(self._errors.translated):
            found = {row["name"]: int(row["todo"]) for row in self._app.job_manager.list_queues()}
        return {JOBS: found.get(JOBS, 0), STEPS: found.get(STEPS, 0)}

    def close(self) -> None:
        """Close all connections. Idempotent."""
        with self._lock:
            if self._is_open:
                self._app.close()
                self._is_open = False


class Workers:
    """See `WorkerPool`. `steps` shares a plan out among them: see `PassOptions`. `requested`: see `Shards`."""

    def __init__(self, settings: Settings, state: State, requested: Callable[[Mapping[str, float]], None]) -> None:
        self.queue = Queue(state.database, settings.checkpoint.url.get_secret_value())
        self._state = state
        self._ttl_seconds = settings.lease.ttl_seconds
        self._shards = settings.export.shards
        self.steps = Shards(
            self.queue, state.workers, requested, shards=self._shards, patience_seconds=self._ttl_seconds
        )

    def send(self, job: str, by: str) -> None:
        """See `WorkerPool.send`."""
        self.queue.send_job(job, by)

    def look(self) -> Workload:
        """See `WorkerPool.look`."""
        known = self._state.workers
        return Workload(known.alive(self._ttl_seconds), self.queue.waiting(), self._shards, known.parts_held(EXPORT))

    def close(self) -> None:
        """See `WorkerPool.close`."""
        self.queue.close()


def _quieten() -> None:
    """The library writes what it sends into the log, which may be megabytes, and tells of a lost connection with a
    traceback; here that is one line.
    """
    for name, level in (
        ("procrastinate", logging.CRITICAL),
        ("procrastinate.worker", logging.ERROR),
        ("procrastinate.worker.worker", logging.CRITICAL),
        ("psycopg.pool", logging.CRITICAL),
    ):
        logging.getLogger(name).setLevel(level)
    logging.getLogger("procrastinate.worker").addFilter(_short)


def _short(record: logging.LogRecord) -> bool:
    """A task that failed for what its program did not expect, without its arguments."""
    record.msg, record.args = record.getMessage().partition("(")[0], None
    for name in ("job", "worker"):
        record.__dict__.pop(name, None)
    return True


@contextmanager
def _translated(ours: Callable[[], Any]) -> Iterator[None]:
    """The library wraps most errors of the driver, and not all."""
    try:
        with ours():
            yield
    except AlreadyEnqueued:
        raise
    except ConnectorException as error:
        if error.__cause__ is None:
            raise Transient(f"the queue cannot be used: {error}", AWAY_HINT) from error
        with ours():
            raise error.__cause__ from error


def consume(
    url: str,
    stop: Stop,
    *,
    prepare: Callable[[], None],
    job: Callable[[str, bool, str], None],
    step: Callable[[str, str, Mapping[str, Any]], None],
    heartbeat_seconds: float,
    ttl_seconds: float,
) -> None:
    """Call `job` and `step` for what is sent, in threads, until a stop is asked for. Steps are made one at a time.

    A database that restarts or is away is waited for; what runs meanwhile goes on under its lease. `prepare` is called
    before each connection.
    """
    errors = errors_of(url, VARIABLES)
    threads = ThreadPoolExecutor(JOBS_AT_ONCE + 16, thread_name_prefix="task")
    while not stop.asked:
        try:
            prepare()
            with _translated(errors.translated):
                asyncio.run(_work(_app(url, threads, job, step), stop, heartbeat_seconds, DEAD_TTLS * ttl_seconds))
        except AppError as error:
            log.warning("the queue is away, it is tried again: %s", error)
        if not stop.asked:
            time.sleep(LOOK_AGAIN_SECONDS)
    threads.shutdown(wait=False)


def _app(
    url: str,
    threads: ThreadPoolExecutor,
    job: Callable[[str, bool, str], None],
    step: Callable[[str, str, Mapping[str, Any]], None],
) -> App:
    """The queue with its two tasks. A task that is given up, since its connection is lost, leaves its thread to come to
    its end.
    """
    app = App(connector=PsycopgConnector(conninfo=conninfo_of(url, VARIABLES), min_size=1, max_size=4, timeout=10.0))

    @app.task(name="job")
    async def _job(name: str, more: bool, by: str) -> None:  # noqa: FBT001 - by name, from the queue
        await asyncio.get_running_loop().run_in_executor(threads, job, name, more, by)

    @app.task(name="step")
    async def _step(step: str, plan_id: str, plan: dict[str, Any]) -> None:
        await asyncio.get_running_loop().run_in_executor(threads, made, step, plan_id, plan)

    made = step
    return app


async def _work(app: App, stop: Stop, heartbeat_seconds: float, dead_seconds: float) -> None:
    """Until a stop is asked for, or the connection is lost. Each queue has a worker of its own, so that a plan that
    waits for its steps never takes their place.
    """
    asyncio.get_running_loop().set_exception_handler(_told)
    async with app.open_async():
        workers = [
            asyncio.create_task(
                app.run_worker_async(
                    queues=[queue],
                    concurrency=concurrency,
                    install_signal_handlers=False,
                    fetch_job_polling_interval=POLL_SECONDS,
                    abort_job_polling_interval=NEVER_SECONDS,  # nothing asks for that
                    shutdown_graceful_timeout=0.1,
                    delete_jobs="always",
                    update_heartbeat_interval=heartbeat_seconds,
                    stalled_worker_timeout=dead_seconds,
                )
            )
            for queue, concurrency in ((STEPS, 1), (JOBS, JOBS_AT_ONCE))
        ]
        try:
            await _watched(app, workers, stop, heartbeat_seconds, dead_seconds)
        finally:
            for each in workers:
                each.cancel()
            ended = await asyncio.gather(*workers, return_exceptions=True)
        for found in ended:
            if isinstance(found, Exception):
                raise found


async def _watched(
    app: App, workers: "Sequence[asyncio.Task[None]]", stop: Stop, heartbeat_seconds: float, dead_seconds: float
) -> None:
    """Until one of the workers ends; what dead ones of other processes had is dropped meanwhile."""
    cleared_at = 0.0
    while not stop.asked and not any(each.done() for each in workers):
        if time.monotonic() - cleared_at > heartbeat_seconds:
            await app.connector.execute_query_async(CLEAR, seconds=dead_seconds)
            cleared_at = time.monotonic()
        await asyncio.wait(workers, timeout=STOP_LOOK_SECONDS, return_when="FIRST_COMPLETED")


def _told(_: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    """The end of a task could not be noted: its connection is lost, or it was taken for dead and dropped."""
    log.info("%s: %s", context["message"], context.get("exception"))
