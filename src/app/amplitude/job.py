"""Wires the pipeline: one job that pulls every configured source; comparison of both ends; the gap map."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import datetime
from functools import lru_cache, partial

from app.amplitude.archives import opened, read_errors
from app.amplitude.client import Project, project
from app.amplitude.hours import WEEKS as WEEKS_PIPELINE
from app.amplitude.hours import AmplitudePull, SourceRun, hours_of_week, recreate_week, week_key, weeks_between
from app.config.settings import Settings
from app.core.errors import Permanent, Transient
from app.core.pipeline import Checkpoints
from app.core.runs import Context, Report, Stop
from app.core.verify import NOTHING, MapCell, PartitionWindow, WindowContent
from app.core.windows import Window
from app.object_store.port import ObjectInfo, ObjectStore
from app.ops.connection_checks import ConnectionCheck
from app.product_events.hours import PulledHour, has_landed, spool_of
from app.product_events.mapping import EventWarehouse
from app.product_events.pull import PullPipeline, heard
from app.product_events.verify import Given, PullEnds, PullGapMap, pull_cells

OFF = "set AMPLITUDE_WEB_CLIENT_ID or AMPLITUDE_MOBILE_CLIENT_ID, with its secret key"


def build(
    settings: Settings,
    checkpoints: Checkpoints,
    store: ObjectStore,
    warehouse: EventWarehouse,
    clock: Callable[[], datetime],
) -> PullPipeline[Mapping[str, Project]]:
    """The configured pipeline; its job is `off` while no source has keys."""
    given, spool = settings.amplitude, spool_of(settings)
    pairs = {
        "web": (given.web_client_id, given.web_secret_key),
        "mobile": (given.mobile_client_id, given.mobile_secret_key),
    }
    known = {
        source: project(given.base_url, client_id.get_secret_value(), secret_key.get_secret_value(), spool)
        for source, (client_id, secret_key) in pairs.items()
        if client_id is not None and secret_key is not None
    }
    pull = AmplitudePull(settings, checkpoints, store, warehouse, clock)
    return PullPipeline(
        pull=pull,
        off="" if known else OFF,
        runs=lambda context: [SourceRun(pull, context, source, of) for source, of in known.items()],
        verification=lambda stop: AmplitudeEnds(pull, known, stop),
        chart=AmplitudeGapMap(pull),
        service=known,
        checks=[
            ConnectionCheck(
                f"amplitude_{name}",
                f"Amplitude {name}",
                f"AMPLITUDE_{name.upper()}_CLIENT_ID",
                heard(pull, partial(each.ping, clock), name),
            )
            for name, each in known.items()
        ],
    )


# Both ends of the pull: events as the service returns them now, and events in the objects; and the gap map.
#
# Invariants: the object of a week is compared with what the service returns for the hours that it should hold. An event
# is compared by its full content, regardless of the order of its members; a line that is not an event by its bytes.

WEEKS = ":weeks"


class AmplitudeEnds(PullEnds):
    """`app.core.verify.Ends` over the pull. Partitions are sources, with hours as windows, and `{source}:weeks`."""

    pull: AmplitudePull

    def __init__(self, pull: AmplitudePull, projects: Mapping[str, Project], stop: Stop) -> None:
        self.projects = projects
        super().__init__(pull, (each for source in projects for each in (source, source + WEEKS)), stop)

    def slots(self, span: Window, partition: str | None) -> Iterator[PartitionWindow]:
        """See `Ends.slots`: hours that can be requested, and weeks that lie entirely in the span."""
        end = min(span.end, self.pull.due_at)
        for name in self.names if partition is None else [partition]:
            if not name.endswith(WEEKS):
                yield from super().slots(span, name)
                continue
            weeks = (week for week in weeks_between(span.start, end) if span.start <= week.start)
            yield from (PartitionWindow(name, week) for week in weeks if week.end <= end)
            self.let_go()

    def source(self, slot: PartitionWindow) -> WindowContent:
        """See `Ends.source`. A week is the sum of its hours, which are cached."""
        source = slot.partition.removesuffix(WEEKS)
        if source == slot.partition:
            return super().source(slot)
        hours = hours_of_week(self.pull, source, slot.window)
        return sum(
            (
                super(AmplitudeEnds, self).source(PartitionWindow(source, hour.window))
                for hour in hours
                if has_landed(hour)
            ),
            NOTHING,
        )

    def destination(self, slot: PartitionWindow) -> WindowContent:
        """See `Ends.destination`."""
        if not slot.partition.endswith(WEEKS):
            return super().destination(slot)
        week = self.pull.store.head(week_key(slot.partition.removesuffix(WEEKS), slot.window))
        return self._content_of_week(week) if week else NOTHING

    def heal(self, context: Context, slot: PartitionWindow) -> Report:
        """See `Ends.heal`."""
        if not slot.partition.endswith(WEEKS):
            return super().heal(context, slot)
        run = self.run(context, slot.partition.removesuffix(WEEKS))
        week = self.pull.store.head(week_key(run.name, slot.window))
        return recreate_week(run, slot.window, week.etag if week else "") + Report(windows=1)

    def run(self, context: Context, partition: str) -> SourceRun:
        """See `PullEnds.run`."""
        return SourceRun(self.pull, context, partition, self.projects[partition])

    def ask(self, partition: str, span: Window) -> tuple[Window, Given]:
        """See `PullEnds.ask`."""
        fetched = next(self.projects[partition].fetch(span, self.stop))
        self.held.callback(fetched.close)
        archive = self.held.enter_context(opened(fetched.file)) if fetched.file else None
        members = archive.hours(fetched.span, lambda *_: None) if archive else {}

        def hour(window: Window) -> PulledHour:
            names = members.get(window.start)
            streams = archive.streams(names) if archive and names else None
            return self.held.enter_context(closing(self.pull.joined(partition, window, streams, self.stop)))

        return fetched.span, lru_cache(hour)

    def _content_of_week(self, info: ObjectInfo) -> WindowContent:
        from app.amplitude.events import blocks, content_of_block  # the decoder, which an idle daemon does not load

        total = NOTHING
        with self.pull.downloaded(info.key, info.etag) as file:
            if file is None:
                raise Transient(f"{info.key} was deleted while it was being read", "verify again")
            try:
                with opened(file) as archive, read_errors():
                    for entry in archive.streams():
                        for block in blocks(entry):
                            self.stop.check()
                            total += content_of_block(block)
            except Transient as error:
                hint = "heal the window: the object is written again from those of its hours"
                raise Permanent(f"{info.key} is damaged: {error.message}", hint) from error
        return total


class AmplitudeGapMap(PullGapMap):
    """See `PullGapMap`: a row of hours and a row of weeks for each source."""

    def partitions(self) -> Sequence[str]:
        """See `GapMapSource.partitions`."""
        return sorted(each for source in super().partitions() for each in (source, source + WEEKS))

    def cells(self, partition: str, span: Window) -> Sequence[MapCell]:
        """See `GapMapSource.cells`: one listing per day, and one per week."""
        source = partition.removesuffix(WEEKS)
        if source == partition:
            return super().cells(partition, span)
        weeks = weeks_between(span.start, min(span.end, self.pull.clock()))
        return pull_cells(self.pull, source, weeks, key=lambda week: week_key(source, week), pipeline=WEEKS_PIPELINE)
