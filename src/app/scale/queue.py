"""The queue: Procrastinate in the PostgreSQL database that holds the state. Only this module imports it.

Invariants: only waiting tasks are unique (`queueing_lock`). Running tasks are locked by our leases, not here, so a dead
worker blocks nothing. The queue's tables are migrated under the same lock as ours and recorded with ours. Every error
of the queue leaves this module as one of ours.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
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

EXPORT = "influx_to_s3"  # the only pipeline whose plans are sharded
JOBS, STEPS = "jobs", "steps"
FOLDER = "procrastinate"
JOBS_AT_ONCE = 32  # more than there are jobs: any may run at the same time, as in one process
POLL_SECONDS = 1.0
LOOK_AGAIN_SECONDS = 1.0
STOP_LOOK_SECONDS = 0.25
DEAD_TTLS = 10  # a dead worker's tasks block nothing, so clearing them can wait; a slow worker should keep its own
NEVER_SECONDS = 86_400.0
AWAY_HINT = "no action needed if this is temporary; otherwise look at the server's log and load"
# Tasks of dead workers. Their leases decide when others may continue, and a plan sends again what is due.
CLEAR = """
DELETE FROM procrastinate_jobs
WHERE status = 'doing' AND (
    worker_id IS NULL
    OR worker_id IN (
        SELECT id FROM procrastinate_workers WHERE last_heartbeat < now() - %(seconds)s * INTERVAL '1 second'
    )
)
"""
RunJob = Callable[[str, bool, str], None]
RunStep = Callable[[str, str, Mapping[str, Any]], None]
log = logging.getLogger(__name__)


def install(database: Database) -> None:
    """Create the queue's tables or migrate them. Idempotent; of several processes one does it.

    Raises Permanent when a newer version of Headwater has changed them.
    """
    files = sorted(Path(SchemaManager.get_migrations_path()).glob("*.sql"))
    wanted = [Migration(f"{FOLDER}/{path.stem}", path.read_text(encoding="utf-8")) for path in files]
    with database.transaction() as session:
        lock(session, "postgres")
        if not any(name.startswith(f"{FOLDER}/") for name in recorded(session, "postgres")):
            session.script(SchemaManager.get_schema())  # the result of all migrations
            session.run_many(RECORD, [{"name": each.name, "checksum": each.checksum} for each in wanted])
            return
    apply(database, wanted)


class Workers:
    """The worker processes, and the queue by which work is sent to them: see `WorkerPool`. Thread-safe. Connects on
    first use. Methods raise Transient or Permanent when the database cannot be used.

    `steps` distributes a plan among the workers: see `PassOptions`. `requested`: see `Shards`.
    """

    def __init__(self, settings: Settings, state: State, requested: Callable[[Mapping[str, float]], None]) -> None:
        url = settings.checkpoint.url.get_secret_value()
        self._state = state
        self._ttl_seconds = settings.lease.ttl_seconds
        self._shards = settings.export.shards
        take = state.workers.take_reports
        self.steps = Shards(self.send_step, take, requested, shards=self._shards, patience_seconds=self._ttl_seconds)
        _quieten()
        self._errors = errors_of(url, VARIABLES)
        self._app = App(
            connector=SyncPsycopgConnector(conninfo=conninfo_of(url, VARIABLES), min_size=0, max_size=2, timeout=10.0)
        )
        self._lock = threading.Lock()
        self._is_installed = self._is_open = False

    def prepare(self, *, again: bool = False) -> None:
        """Create the tables and open the connections. Idempotent, and free after the first success.

        `again`: check the tables again, since the database may have been re-created.
        """
        with self._lock:
            if again or not self._is_installed:
                install(self._state.database)
                self._is_installed = True
            if not self._is_open:
                with _translated(self._errors.translated):
                    self._app.open()
                self._is_open = True

    def send(self, job: str, by: str, after_seconds: float = 0.0) -> None:
        """See `WorkerPool.send`."""
        task = self._app.configure_task(
            "job",
            queue=JOBS,
            queueing_lock=f"{JOBS}/{job}/{'now' if after_seconds == 0 else 'more'}",
            schedule_in={"seconds": after_seconds},
        )
        self._send(task.defer, name=job, more=after_seconds > 0, by=by)

    def send_step(self, step: str, plan_id: str, plan: Mapping[str, Any]) -> bool:
        """Queue a step of a plan for a worker; False when an older one with this name is still waiting."""
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

    def look(self) -> Workload:
        """See `WorkerPool.look`."""
        self.prepare()
        with _translated(self._errors.translated):
            found = {row["name"]: int(row["todo"]) for row in self._app.job_manager.list_queues()}
        waiting = {name: found.get(name, 0) for name in (JOBS, STEPS)}
        known = self._state.workers
        return Workload(known.alive(self._ttl_seconds), waiting, self._shards, known.parts_held(EXPORT))

    def close(self) -> None:
        """See `WorkerPool.close`."""
        with self._lock:
            if self._is_open:
                self._app.close()
                self._is_open = False


def _quieten() -> None:
    """Reduce the library's logging of task arguments, which may be megabytes.

    It also logs a traceback for a lost connection; here that is one line.
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
    """Log an unexpected task failure without the task's arguments."""
    record.msg, record.args = record.getMessage().partition("(")[0], None
    for name in ("job", "worker"):
        record.__dict__.pop(name, None)
    return True


@contextmanager
def _translated(ours: Callable[[], Any]) -> Iterator[None]:
    """The library wraps most of the driver's errors, but not all."""
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
    run_job: RunJob,
    run_step: RunStep,
    heartbeat_seconds: float,
    ttl_seconds: float,
) -> None:
    """Call `run_job` and `run_step` in threads for queued tasks, until a stop is requested. Steps run one at a time.

    Waits for a database that restarts or is unreachable; running tasks continue under their leases meanwhile. `prepare`
    is called before each connection.
    """
    errors = errors_of(url, VARIABLES)
    threads = ThreadPoolExecutor(JOBS_AT_ONCE + 16, thread_name_prefix="task")
    while not stop.asked:
        try:
            prepare()
            with _translated(errors.translated):
                asyncio.run(
                    _work(_app(url, threads, run_job, run_step), stop, heartbeat_seconds, DEAD_TTLS * ttl_seconds)
                )
        except AppError as error:
            log.warning("the queue is unavailable and tried again: %s", error)
        if not stop.asked:
            time.sleep(LOOK_AGAIN_SECONDS)
    threads.shutdown(wait=False)


def _app(url: str, threads: ThreadPoolExecutor, run_job: RunJob, run_step: RunStep) -> App:
    """The queue with its two tasks. If the connection is lost, a task is abandoned but its thread runs to the end."""
    app = App(connector=PsycopgConnector(conninfo=conninfo_of(url, VARIABLES), min_size=1, max_size=4, timeout=10.0))

    @app.task(name="job")
    async def _job(name: str, more: bool, by: str) -> None:  # noqa: FBT001 - by name, from the queue
        await asyncio.get_running_loop().run_in_executor(threads, run_job, name, more, by)

    @app.task(name="step")
    async def _step(step: str, plan_id: str, plan: dict[str, Any]) -> None:
        await asyncio.get_running_loop().run_in_executor(threads, run_step, step, plan_id, plan)

    return app


async def _work(app: App, stop: Stop, heartbeat_seconds: float, dead_seconds: float) -> None:
    """Run until a stop is requested or the connection is lost; clears tasks of dead workers in other processes.

    Each queue has its own worker, so that a plan waiting for its steps never blocks them.
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
                    abort_job_polling_interval=NEVER_SECONDS,  # nothing aborts jobs
                    shutdown_graceful_timeout=0.1,
                    delete_jobs="always",
                    update_heartbeat_interval=heartbeat_seconds,
                    stalled_worker_timeout=dead_seconds,
                )
            )
            for queue, concurrency in ((STEPS, 1), (JOBS, JOBS_AT_ONCE))
        ]
        cleared_at = 0.0
        try:
            while not stop.asked and not any(each.done() for each in workers):
                if time.monotonic() - cleared_at > heartbeat_seconds:
                    await app.connector.execute_query_async(CLEAR, seconds=dead_seconds)
                    cleared_at = time.monotonic()
                await asyncio.wait(workers, timeout=STOP_LOOK_SECONDS, return_when="FIRST_COMPLETED")
        finally:
            for each in workers:
                each.cancel()
            ended = await asyncio.gather(*workers, return_exceptions=True)
        for found in ended:
            if isinstance(found, Exception):
                raise found


def _told(_: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    """The end of a task could not be recorded: the connection is lost, or it was presumed dead and cleared."""
    log.info("%s: %s", context["message"], context.get("exception"))
