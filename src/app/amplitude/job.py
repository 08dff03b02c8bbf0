"""The pipeline put together: one job that pulls every configured source, each on its own."""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING

from app.amplitude.client import Project, project
from app.amplitude.hours import DUE_AFTER, SourceRun
from app.amplitude.load_hour import NAME, UNIT
from app.amplitude.verify import AmplitudeChart, AmplitudeEnds
from app.config.settings import Settings
from app.core.pipeline import Checkpoints
from app.core.runs import Context, Job, Report
from app.object_store.port import ObjectStore
from app.product_events.mapping import Events
from app.product_events.pull import PartitionRun, PullContext, PullPipeline, overdue_after, set_aside_of, spool_of

if TYPE_CHECKING:
    from pydantic import SecretStr

LARGE_LINE_BYTES = 1 << 24
OFF = "set AMPLITUDE_WEB_CLIENT_ID or AMPLITUDE_MOBILE_CLIENT_ID, with its secret key"


def build(
    settings: Settings, checkpoints: Checkpoints, store: ObjectStore, warehouse: Events, clock: Callable[[], datetime]
) -> PullPipeline[Mapping[str, Project]]:
    """The pipeline as it is configured; its job is `off` while no source has its keys."""
    given, spool = settings.amplitude, spool_of(settings)
    pairs: Mapping[str, tuple[SecretStr | None, SecretStr | None]] = {
        "web": (given.web_client_id, given.web_secret_key),
        "mobile": (given.mobile_client_id, given.mobile_secret_key),
    }
    known = {
        source: project(given.base_url, client_id.get_secret_value(), secret_key.get_secret_value(), spool)
        for source, (client_id, secret_key) in pairs.items()
        if client_id is not None and secret_key is not None
    }
    pull = PullContext(
        name=NAME,
        unit=UNIT,
        due_after=DUE_AFTER,
        overdue_after=overdue_after(settings, NAME, given.interval_seconds),
        lookback_days=given.lookback_days,
        checkpoints=checkpoints,
        store=store,
        warehouse=warehouse,
        spool=spool,
        clock=clock,
        set_aside=set_aside_of(settings, NAME, store, 2 * LARGE_LINE_BYTES),
    )

    def run(context: Context) -> Report:
        return every_source(pull, known, context, SourceRun.pull_due)

    return PullPipeline(
        name=NAME,
        jobs=(Job(NAME, given.interval_seconds, run, "" if known else OFF),),
        backfill=lambda context, span: every_source(pull, known, context, lambda source: source.fill(span)),
        verification=lambda stop: AmplitudeEnds(pull, known, stop),
        chart=AmplitudeChart(pull),
        service=known,
    )


def every_source(
    pull: PullContext, known: Mapping[str, Project], context: Context, work: Callable[[SourceRun], Report]
) -> Report:
    """`work` for each source."""
    runs = {source: SourceRun(PartitionRun(pull, context, source), of) for source, of in known.items()}
    return pull.run_each(context, runs, work)
