"""The pipeline put together: one job that pulls every configured source, each on its own.

Invariant: nothing is connected before the first run; a source that fails is noted beside its cursor, and others go on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from app.amplitude.client import POLICY, Project, project
from app.amplitude.hours import Places, SourceRun
from app.amplitude.load_hour import NAME
from app.amplitude.verify import PullChart, PullEnds
from app.config.settings import Settings
from app.core.errors import LeaseLost, Permanent, Rejected, Transient
from app.core.pipeline import Checkpoints
from app.core.runs import Context, Failure, Job, Report, Stop
from app.core.windows import Window
from app.object_store.port import ObjectStore
from app.object_store.set_aside import SetAsideStore, folder_of
from app.product_events.mapping import Events

if TYPE_CHECKING:
    from pydantic import SecretStr

SPOOL = "spool"
LARGE_LINE_BYTES = 1 << 24
OFF = "off: set AMPLITUDE_WEB_CLIENT_ID or AMPLITUDE_MOBILE_CLIENT_ID, with its secret key"

Work = Callable[[SourceRun], Report]


@dataclass(frozen=True, slots=True)
class Pull:
    """What `main` wires: the job, its backfill and proof, and the projects, which the route asks as well."""

    name: str
    jobs: Sequence[Job]
    backfill: Callable[[Context, Window], Report]
    projects: Mapping[str, Project]
    verification: Callable[[Stop], PullEnds]
    chart: PullChart


def build(
    settings: Settings, checkpoints: Checkpoints, store: ObjectStore, warehouse: Events, clock: Callable[[], datetime]
) -> Pull:
    """The pipeline as it is configured; its job is `off` while no source has its keys."""
    given = settings.amplitude
    spool = settings.service.data_dir / SPOOL
    # A line that is too large to be an event is kept whole, whatever the limit for many small ones.
    aside = SetAsideStore(store, folder_of(NAME), max(settings.set_aside.max_bytes, 2 * LARGE_LINE_BYTES))
    places = Places(checkpoints, store, warehouse.load, spool, clock, POLICY, given.lookback_days, aside)
    known = projects(settings)
    job = Job(
        NAME,
        given.interval_seconds,
        lambda context: every_source(places, known, context, SourceRun.bring),
        "" if known else OFF,
    )
    return Pull(
        name=NAME,
        jobs=(job,),
        backfill=lambda context, span: every_source(places, known, context, lambda run: run.fill(span)),
        projects=known,
        verification=lambda stop: PullEnds(places, known, warehouse.known, stop),
        chart=PullChart(places),
    )


def projects(settings: Settings) -> Mapping[str, Project]:
    """Source -> project, for those whose keys are set."""
    given = settings.amplitude
    pairs: Mapping[str, tuple[SecretStr | None, SecretStr | None]] = {
        "web": (given.web_client_id, given.web_secret_key),
        "mobile": (given.mobile_client_id, given.mobile_secret_key),
    }
    spool = settings.service.data_dir / SPOOL
    return {
        source: project(given.base_url, client_id.get_secret_value(), secret_key.get_secret_value(), spool)
        for source, (client_id, secret_key) in pairs.items()
        if client_id is not None and secret_key is not None
    }


def every_source(places: Places, known: Mapping[str, Project], context: Context, work: Work) -> Report:
    """`work` for each source."""
    places.spool.mkdir(parents=True, exist_ok=True)
    if not places.store.conditional:
        places.store.probe()
    total = Report()
    for source, of in known.items():
        try:
            total += work(SourceRun(places, context, source, of))
        except LeaseLost:
            raise
        except (Transient, Permanent, Rejected) as error:
            if not context.dry_run:
                places.checkpoints.fail(NAME, source, str(error), context.lease)
            total += Report(failures=(Failure(source, error.message, error.hint),))
    return total
