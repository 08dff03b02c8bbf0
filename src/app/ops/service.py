"""The service as a value: what `main` builds, and what the daemon and the commands use.

Invariant: nothing in it has been started.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from app.config.settings import Settings
from app.core.gaps import Chart
from app.core.runs import Context, Job, Report, RunDesk, Stop
from app.core.verify import Verification
from app.core.window import Window
from app.ops.front import Front
from app.ops.readiness import Check
from app.ops.scheduler import Backfill, Scheduler
from app.ops.shapes import Calls
from app.stores.state import State

if TYPE_CHECKING:
    from fastapi import APIRouter

History = Callable[[int], Sequence[Mapping[str, Any]]]
"""What a job took in lately, newest first, at most so many: lines of a table, all with the same columns."""

Replacement = Callable[[Context, Window, bool], Report]
"""Write a span again from the source; the last argument allows that rows go which the source no longer has."""

Undo = Callable[[Context, str], Report]
"""Take back what a run did, given its id or the beginning of it; a dry run says in `notes` what that would be."""


@dataclass(frozen=True, slots=True)
class Pipelines:
    """What the slices bring: jobs, how to fill or re-encode past windows, and the systems that `check` and /ready try.

    `histories`, `undos`, `verifications`, `charts` and `calls` are by job name, for those jobs that have one. `listed`:
    jobs whose listings tell which objects are gone. `routers` build the routes of slices that have both jobs and
    routes; they are called once, when the API is built.
    """

    jobs: Sequence[Job] = ()
    backfills: Mapping[str, Backfill] = field(default_factory=dict)
    replacements: Mapping[str, Replacement] = field(default_factory=dict)
    rewrites: Mapping[str, Backfill] = field(default_factory=dict)
    checks: Mapping[str, Check] = field(default_factory=dict)
    histories: Mapping[str, History] = field(default_factory=dict)
    undos: Mapping[str, Undo] = field(default_factory=dict)
    verifications: Mapping[str, Verification] = field(default_factory=dict)
    charts: Mapping[str, Chart] = field(default_factory=dict)
    calls: Mapping[str, Callable[[], Calls]] = field(default_factory=dict)
    listed: Sequence[str] = ()
    routers: Sequence[Callable[[], "APIRouter"]] = ()


@dataclass(frozen=True, slots=True)
class Headwater:
    """The service, built and not started. `app` is the ASGI application; its lifespan starts and ends the work.

    `checks` are attempts to reach every system, of which only those of stores decide on readiness; `rights` take the
    place of those of the same name in `python -m app check`, which tries what the credentials may do.
    """

    settings: Settings
    state: State
    pipelines: Pipelines
    checks: Mapping[str, Check]
    rights: Mapping[str, Check]
    desk: RunDesk
    stop: Stop
    scheduler: Scheduler
    app: Front
