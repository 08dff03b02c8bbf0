"""Liveness and readiness as values: what /health and /ready answer, without I/O.

Invariant: neither looks outside the process, so both answer within milliseconds whatever the outside systems do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from app.ops.readiness import Readiness
from app.ops.scheduler import Scheduler

PATHS = ("/health", "/ready")
OK = 200
UNAVAILABLE = 503


@dataclass(frozen=True, slots=True)
class Answer:
    """A status code and a JSON body."""

    status: int
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Probes:
    """What the two probes look at."""

    version: str
    scheduler: Scheduler
    readiness: Readiness
    clock: Callable[[], datetime]

    def health(self) -> Answer:
        """Liveness: 503 once the scheduler stopped turning, which only a restart cures."""
        turning = self.scheduler.turning
        body = {
            "status": "healthy" if turning else "unhealthy",
            "version": self.version,
            "timestamp": f"{self.clock():%Y-%m-%dT%H:%M:%SZ}",
        }
        return Answer(OK if turning else UNAVAILABLE, body)

    def ready(self) -> Answer:
        """Readiness: 503 while a system outside cannot be reached, and from the stop signal on."""
        findings = self.readiness.findings()
        checks = {"worker_running": self.scheduler.running and self.scheduler.turning}
        checks |= {name: finding.ok for name, finding in findings.items()}
        ready = all(checks.values())
        body: dict[str, Any] = {"ready": ready, "checks": checks}
        if notes := {name: finding.note for name, finding in findings.items() if finding.note}:
            body["notes"] = notes
        return Answer(OK if ready else UNAVAILABLE, body)
