"""A worker: runs the jobs and steps that are sent to the queue, and answers probes.

Invariants: everything here runs under a lease, so a worker that is killed or paused at any moment blocks others no
longer than a lease lives. Within one process no job or step overlaps itself. Only a worker polls the queue for work; a
daemon without SCALE_ENGINE=procrastinate imports none of this.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, cast

from app.core.errors import AppError
from app.core.runs import Failure, Job, NoProgress, Outcome, Report, Run, Stop, execute, named_in_logs
from app.db.workers import StepReport
from app.ops.connection_checks import Probes
from app.ops.logs import log_run
from app.ops.process import share_the_machine
from app.ops.scheduler import logging_progress, seconds_to_next_step
from app.ops.service import BuiltService, refuse_taken_ports, shutdown_budget
from app.scale.queue import Workers, consume
from app.scale.shards import plan_from_json
from app.web.errors import Receive, Refusal, Scope, Send, send_json, send_refusal
from app.web.server import serve

STALLED_SECONDS = 120.0
log = logging.getLogger(__name__)


class Worker:
    """Runs queued work from `start` until a stop is requested. See `app.ops.connection_checks.WorkLoop`."""

    def __init__(self, service: BuiltService) -> None:
        self._service = service
        self._workers = cast("Workers", service.scheduler.elsewhere)
        self._jobs = {job.name: job for job in service.pipelines.jobs if not job.off}
        self._step_services = replace(service.services, ended=log_run)
        self._stop: Stop = service.stop
        self._running: set[str] = set()
        self._lock = threading.Lock()
        self._seen_at = time.monotonic()
        self._thread = threading.Thread(target=self._consume, name="queue", daemon=True)
        self._is_started = False

    def start(self) -> None:
        """Start polling for work."""
        self._is_started = True
        self._thread.start()
        threading.Thread(target=self._be_seen, name="seen", daemon=True).start()

    @property
    def turning(self) -> bool:
        """See `WorkLoop`."""
        is_late = time.monotonic() - self._seen_at > STALLED_SECONDS
        return self._stop.asked or not self._is_started or (self._thread.is_alive() and not is_late)

    @property
    def running(self) -> bool:
        """See `WorkLoop`."""
        return self._is_started and not self._stop.asked

    @property
    def busy(self) -> bool:
        """True while a job or step is running."""
        return bool(self._running)

    def close(self, seconds: float) -> None:
        """Request a stop, and wait up to `seconds` for running work."""
        self._stop.ask("the process ends")
        ends_at = time.monotonic() + seconds
        self._thread.join(seconds)
        while self.busy and time.monotonic() < ends_at:
            time.sleep(0.05)

    def _consume(self) -> None:
        settings = self._service.settings
        consume(
            settings.checkpoint.url.get_secret_value(),
            self._stop,
            prepare=lambda: self._workers.prepare(again=True),
            run_job=self.job,
            run_step=self.step,
            heartbeat_seconds=settings.lease.heartbeat_seconds,
            ttl_seconds=settings.lease.ttl_seconds,
        )

    def _be_seen(self) -> None:
        owner, workers = self._service.services.terms.owner, self._service.state.workers
        while not self._stop.asked:
            try:
                workers.see(owner)
            except AppError as error:
                log.debug("this worker cannot be recorded: %s", error)
            self._seen_at = time.monotonic()
            time.sleep(self._service.services.terms.heartbeat_seconds)

    def job(self, name: str, more: bool, by: str) -> None:  # noqa: FBT001 - from the queue
        """Run a job under its lease, and queue it again if it left work. `more`: this run continues such work."""
        job = self._jobs.get(name)
        if job is None:
            log.warning("no job that is on is named %r here: do all processes have the same settings?", name[:80])
            return
        with self._alone(name) as alone:
            paused: Collection[str] = ()
            with suppress(AppError):  # without the state no lease can be taken either
                paused = self._service.state.pauses.paused() if more else ()
            if not alone or self._stop.asked or name in paused:
                return
            run = execute(job, self._service.services, self._stop, logging_progress(name), started_by=by)
        if run is not None and run.report.more and not self._stop.asked:
            with _told(f"{name} cannot be sent again"):
                self._workers.send(name, by, seconds_to_next_step(run))

    def step(self, step: str, plan_id: str, plan: Mapping[str, Any]) -> None:
        """Run one step of a shard under its own lease; its report is stored for the plan."""
        part = plan_from_json(plan)
        work = self._service.pipelines.steps[part.pipeline]
        with self._alone(step) as alone, named_in_logs(plan_id, part.pipeline):
            run = None
            if alone and not self._stop.asked:
                job = Job(step, 0, lambda context: work(context, part))
                run = execute(job, self._step_services, self._stop, NoProgress(), is_part=True)
        self._service.costs.save()
        with _told(f"what came of {step} cannot be stored: its plan counts it as waiting"):
            done = StepReport(plan_id, step, _of_step(step, run, part.left), run.requests if run else {})
            self._service.state.workers.save_report(part.pipeline, done)

    @contextmanager
    def _alone(self, name: str) -> Iterator[bool]:
        """False while the same task is running in this process, which its lease would not prevent."""
        with self._lock:
            alone = name not in self._running
            self._running.add(name)
        try:
            yield alone
        finally:
            if alone:
                with self._lock:
                    self._running.discard(name)


def _of_step(step: str, run: Run | None, left: Callable[[], Report]) -> Report:
    """The report of a step. All that was counted is waiting if another process has the lease or an error ended it."""
    if run is None or run.outcome is Outcome.STOPPED:
        return left() + Report(more=True)
    if run.outcome is Outcome.FAILED:
        return left() + Report(failures=(Failure(step, run.error, run.hint),))
    return run.report


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except AppError as error:
        log.warning("%s: %s", what, error)


class WorkerApp:
    """The ASGI application of a worker: probes, and nothing else."""

    def __init__(self, worker: Worker, service: BuiltService) -> None:
        self._worker = worker
        self._service = service
        about = service.settings.service
        self._probes = Probes(about.version, worker, service.probes.readiness, service.state.clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI call."""
        if scope["type"] == "lifespan":
            await receive()
            self._open()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await asyncio.to_thread(self._close)
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["path"] == "/health":
            answer = self._probes.health()
            await send_json(send, answer.status, answer.body, {})
        elif scope["path"] == "/ready":
            found = self._probes.ready()  # public, so without names of systems
            await send_json(send, found.status, {"ready": found.body["ready"], "checks": {}}, {})
        else:
            await send_refusal(send, Refusal(404, "a worker answers probes only", "ask the process that serves HTTP"))

    def _open(self) -> None:
        self._service.probes.readiness.start()
        self._service.alerts.start()
        self._worker.start()

    def _close(self) -> None:
        self._worker.close(shutdown_budget(self._service.settings.service.shutdown_grace_seconds).stuck)
        self._service.probes.readiness.close()
        self._service.alerts.close()
        self._service.scheduler.close(0.0)
        with _told("this worker is shown for a while longer"):
            self._service.state.workers.forget(self._service.services.terms.owner)
        self._service.state.close()


def run_worker(service: BuiltService) -> None:
    """Work until a signal arrives, then re-raise it. `service` was built for a queue."""
    settings = service.settings
    refuse_taken_ports(settings.service)
    worker = Worker(service)
    log.info("worker %s, probes on %s:%d", service.services.terms.owner, settings.service.host, settings.service.port)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    share_the_machine()
    serve(
        WorkerApp(worker, service),
        host=settings.service.host,
        port=settings.service.port,
        health_port=settings.service.health_port,
        forwarded_allow_ips=settings.access.forwarded_allow_ips,
        steps=shutdown_budget(settings.service.shutdown_grace_seconds),
        ask_stop=service.stop.ask,
        busy=lambda: worker.busy,
    )
