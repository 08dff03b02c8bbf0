"""Entry point of the export: its jobs and everything else that `main` wires.

The export itself and the heavy packages it needs are loaded on first use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from app.core.network import SharedClient
from app.core.partitions import Step, SyncPlan, run_in_process
from app.core.runs import Context, Job, Report, Stop
from app.core.verify import GapMapSource, MapCell, Verification
from app.core.windows import Window
from app.db.checkpoints import SqlCheckpoints
from app.object_store.deltas import is_nameable
from app.ops.connection_checks import ConnectionCheck

if TYPE_CHECKING:
    import pyarrow as pa

    from app.config.settings import Settings
    from app.db.object_summaries import SqlSummaries
    from app.influx_to_s3.export import Export
    from app.object_store.port import ObjectStore
    from app.object_store.set_aside import SetAsideStore
    from app.object_store.table_sink import TableSummary

NAME = "influx_to_s3"
RECONCILE = "influx_to_s3_reconcile"
RECONCILE_SECONDS = 86_400
OFF = "set INFLUXDB_URL"


@dataclass(frozen=True, slots=True)
class ObjectSums:
    """What is summed for each object while it is written (see `TableSink.summed`), and where that is stored."""

    take: "Callable[[pa.Schema, str], TableSummary]"
    stored: "SqlSummaries"


@dataclass(frozen=True, slots=True)
class InfluxExport:
    """What `main` wires, see `WindowedPipeline`. `step` runs one step of a shard of a plan made by another process."""

    jobs: Sequence[Job]
    step: Step
    backfill: Callable[[Context, Window], Report]
    replace: Callable[[Context, Window, bool], Report]
    rewrite: Callable[[Context, Window], Report]
    verification: Verification
    chart: GapMapSource
    checks: Sequence[ConnectionCheck] = ()


@dataclass(frozen=True, slots=True)
class ExportGapMap:
    """`app.core.verify.GapMapSource` over the export."""

    export: "SharedClient[Export]"
    checkpoints: SqlCheckpoints
    is_exported: Callable[[str], bool]

    def partitions(self) -> Sequence[str]:
        """See `GapMapSource.partitions`."""
        return sorted(filter(self.is_exported, self.checkpoints.cursors(NAME)))

    def cells(self, partition: str, span: Window) -> Sequence[MapCell]:
        """See `GapMapSource.cells`."""
        return self.export().ends(Stop()).cells(self.checkpoints, partition, span)


def listed_devices(settings: "Settings") -> Callable[[str], bool]:
    """Whether a device is exported: DEVICE_IDS lists it, or is empty."""
    listed = frozenset(settings.export.device_ids)
    return lambda device: not listed or device in listed


def exported_devices(settings: "Settings", store: "ObjectStore") -> Callable[[str], bool]:
    """Whether a device has objects: it is exported, and its id can be part of a key."""
    is_listed = listed_devices(settings)
    return lambda device: is_listed(device) and is_nameable(device, store)


def build(
    settings: "Settings",
    checkpoints: SqlCheckpoints,
    store: "ObjectStore",
    *,
    set_aside: "SetAsideStore",
    clock: Callable[[], datetime],
    rewrite_seconds: Callable[[int, float], float] | None = None,
    steps: Callable[[Context, SyncPlan, Step], Report] = run_in_process,
    sums: ObjectSums | None = None,
) -> InfluxExport:
    """The configured pipeline; its jobs are `off` while INFLUXDB_URL is not set. `steps`: see `PassOptions`.

    `rewrite_seconds(devices, window_seconds)`: the minimum interval between writes of an open window's object.
    """

    def make() -> "Export":
        from app.influx_to_s3.export import (
            Export,  # pyarrow and the query languages: an idle daemon does not load them
        )

        return Export(
            settings,
            checkpoints,
            store,
            set_aside=set_aside,
            clock=clock,
            rewrite_seconds=rewrite_seconds,
            steps=steps,
            sums=sums,
        )

    def check() -> str:
        from app.influx_to_s3.diagnosis import check_access  # imports a heavy client library

        return check_access(export().reader.ping, settings.influx)

    export = SharedClient(make)
    off = "" if settings.influx.url else OFF
    return InfluxExport(
        jobs=(
            Job(NAME, settings.export.interval_seconds, lambda context: export().sync(context), off),
            Job(RECONCILE, RECONCILE_SECONDS, lambda context: export().reconcile(context), off, helper_of=NAME),
        ),
        step=lambda context, plan: export().step(context, plan),
        backfill=lambda context, span: export().backfill(context, span),
        replace=lambda context, span, allow_shrink: export().replace(context, span, allow_shrink=allow_shrink),
        rewrite=lambda context, span: export().rewrite(context, span),
        verification=lambda stop: export().ends(stop),
        chart=ExportGapMap(export, checkpoints, exported_devices(settings, store)),
        checks=[ConnectionCheck("influxdb", "InfluxDB", "INFLUXDB_URL", check)] if settings.influx.url else (),
    )
