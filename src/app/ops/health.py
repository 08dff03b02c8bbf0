"""The responses of /health and /ready, and the background checks of outside systems behind /ready."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from app.core.errors import AppError
from app.core.windows import whole_second

# Whether outside systems are reachable, checked in the background, so that an answer costs nothing.
#
# Invariant: a check that hangs delays only its own result, and a result that is too old counts as a failure.

EVERY_SECONDS = 10.0
LIMIT_SECONDS = 10.0
NOT_YET = "not checked yet"
log = logging.getLogger(__name__)

Check = Callable[[], str]
"""One attempt: a short note for a person, or "". Raises AppError."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of a check. On success `note` is the check's own message, and `error` and `hint` are empty."""

    ok: bool
    note: str = ""
    error: str = ""
    hint: str = ""


def check_once(check: Check) -> CheckResult:
    """The result of one attempt."""
    try:
        return CheckResult(ok=True, note=check())
    except AppError as error:
        return CheckResult(ok=False, error=error.message, hint=error.hint)


class Readiness:
    """One thread per check, each running every ten seconds."""

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self._checks = checks
        self._found: dict[str, tuple[CheckResult, float]] = {}
        self._closed = threading.Event()

    def start(self) -> None:
        """Start checking; until its first result a check counts as failed."""
        for name in self._checks:
            threading.Thread(target=self._watch, args=(name,), name=f"check-{name}", daemon=True).start()

    def close(self) -> None:
        """Stop checking; a hanging check is abandoned."""
        self._closed.set()

    def findings(self) -> Mapping[str, CheckResult]:
        """The latest result of each check. No I/O."""
        now, found = time.monotonic(), {}
        for name in self._checks:
            found[name], at = self._found.get(name, (CheckResult(ok=False, error=NOT_YET, hint="ask again soon"), now))
            if now - at > EVERY_SECONDS + LIMIT_SECONDS:
                error, hint = f"no answer for {now - at:.0f} s", "check whether that system hangs"
                found[name] = CheckResult(ok=False, error=error, hint=hint)
        return found

    def _watch(self, name: str) -> None:
        """Logs an error once, and again when it changes."""
        told = ""
        while not self._closed.is_set():
            finding = check_once(self._checks[name])
            self._found[name] = (finding, time.monotonic())
            if finding.error and finding.error != told:
                log.error("%s: %s (%s)", name, finding.error, finding.hint)
            elif told and finding.ok:
                log.info("%s: reached again", name)
            told = finding.error
            self._closed.wait(EVERY_SECONDS)


# Liveness and readiness as values: the answers of /health and /ready, without I/O.
#
# Invariant: neither contacts an outside system, so both answer within milliseconds whatever state those are in.

PATHS = ("/health", "/ready")
SYSTEMS = {
    "checkpoint_store_connected": "the state database",
    "s3_accessible": "the object store",
    "dwh_connected": "the warehouse",
}
OK = 200
UNAVAILABLE = 503


@dataclass(frozen=True, slots=True)
class ProbeAnswer:
    """A status code and a JSON body."""

    status: int
    body: Mapping[str, Any]


class WorkLoop(Protocol):
    """The scheduler as the probes see it. No I/O."""

    @property
    def turning(self) -> bool:
        """False when only a restart helps."""

    @property
    def running(self) -> bool:
        """True from the start until a stop is requested."""


@dataclass(frozen=True, slots=True)
class Probes:
    """What the two probes report on."""

    version: str
    scheduler: WorkLoop
    readiness: Readiness
    clock: Callable[[], datetime]

    def health(self) -> ProbeAnswer:
        """Liveness: 503 once the scheduler has stalled, which only a restart cures."""
        turning = self.scheduler.turning
        body = {
            "status": "healthy" if turning else "unhealthy",
            "version": self.version,
            "timestamp": whole_second(self.clock()),
        }
        return ProbeAnswer(OK if turning else UNAVAILABLE, body)

    def unreachable(self) -> Mapping[str, tuple[str, str]]:
        """Error and hint of each outside system that cannot be reached; systems without a result yet are left out."""
        findings = self.readiness.findings().items()
        return {SYSTEMS.get(name, name): (f.error, f.hint) for name, f in findings if not f.ok and f.error != NOT_YET}

    def ready(self) -> ProbeAnswer:
        """Readiness: 503 while an outside system cannot be reached, and from the stop signal on."""
        findings = self.readiness.findings()
        checks = {"worker_running": self.scheduler.running and self.scheduler.turning}
        checks |= {name: finding.ok for name, finding in findings.items()}
        ready = all(checks.values())
        body: dict[str, Any] = {"ready": ready, "checks": checks}
        if notes := {name: finding.note for name, finding in findings.items() if finding.note}:
            body["notes"] = notes
        return ProbeAnswer(OK if ready else UNAVAILABLE, body)
