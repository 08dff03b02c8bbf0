"""The service as a value: what `main` builds, and what the daemon and the commands use.

Invariant: nothing in it has been started.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from app.core.runs import Job, RunDesk, Stop
from app.ops.front import Front
from app.ops.readiness import Check
from app.ops.scheduler import Backfill, Scheduler
from app.settings import Settings
from app.stores.state import State


@dataclass(frozen=True, slots=True)
class Pipelines:
    """What the slices bring: jobs, how to fill past windows of them, and the systems that `check` and /ready try."""

    jobs: Sequence[Job] = ()
    backfills: Mapping[str, Backfill] = field(default_factory=dict)
    checks: Mapping[str, Check] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Headwater:
    """The service, built and not started. `app` is the ASGI application; its lifespan starts and ends the work.

    `checks` are all attempts that `python -m app check` makes; only those of stores decide on readiness.
    """

    settings: Settings
    state: State
    pipelines: Pipelines
    checks: Mapping[str, Check]
    desk: RunDesk
    stop: Stop
    scheduler: Scheduler
    app: Front
