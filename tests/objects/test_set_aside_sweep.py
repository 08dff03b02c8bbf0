"""The daily job that deletes what was set aside long ago."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.config.environment import load_settings
from app.core.errors import Permanent
from app.core.runs import Context, Lease, NoProgress, Report, Stop
from app.main import set_aside_starts
from app.object_store.port import ObjectInfo
from app.object_store.set_aside import LINES, SetAsideStore, folder_of
from app.objects.sweeps import build_set_aside
from memory_objects import MemoryObjects
from object_stores import keys, put

NOW = datetime.now(UTC)


def run(folders: dict[str, SetAsideStore], days: int, now: datetime, *, dry_run: bool = False) -> Report:
    lease = Lease("set_aside_sweep", "test", 1, now)
    context = Context("run", lease, Stop(), NoProgress(), dry_run=dry_run)
    return build_set_aside(folders, days, lambda: now).work(context)


def filled(store: MemoryObjects, start: str) -> SetAsideStore:
    aside = SetAsideStore(store, folder_of(start))
    aside.keep("w", b"x\n", content_type=LINES, reason="no device tag", number=1)
    return aside


def test_only_what_is_older_than_the_days_is_deleted() -> None:
    store = MemoryObjects()
    folders = {name: filled(store, name) for name in ("telemetry", "amplitude")}
    put(store, "telemetry/device_id=D1/x.parquet", b"rows")
    assert run(folders, 90, NOW + timedelta(days=89)).notes == ("0 objects deleted",)
    assert run(folders, 90, NOW + timedelta(days=91), dry_run=True).notes[0].startswith("would delete")
    assert len(keys(store)) == 3
    assert run(folders, 90, NOW + timedelta(days=91)).notes == ("2 objects deleted",)
    assert keys(store) == ["telemetry/device_id=D1/x.parquet"]


class Denied(MemoryObjects):
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        raise Permanent(f"listing of {prefix!r}: AccessDenied")


def test_a_folder_that_cannot_be_swept_is_named_and_the_others_are_swept() -> None:
    store = MemoryObjects()
    folders = {"amplitude": SetAsideStore(Denied(), "amplitude/_set_aside"), "influx_to_s3": filled(store, "telemetry")}
    report = run(folders, 90, NOW + timedelta(days=91))
    assert keys(store) == []
    assert [failure.partition for failure in report.failures] == ["amplitude"]
    assert "SET_ASIDE_DAYS=0" in report.failures[0].hint


@pytest.mark.parametrize(("days", "why"), [(0, "set SET_ASIDE_DAYS"), (90, "")])
def test_zero_days_switch_it_off(days: int, why: str) -> None:
    folders = {"influx_to_s3": SetAsideStore(MemoryObjects(), "telemetry/_set_aside")}
    assert build_set_aside(folders, days, lambda: NOW).off == why
    assert "no pipeline" in build_set_aside({}, 90, lambda: NOW).off


def test_the_folders_are_those_of_the_pipelines_that_are_on(tmp_path: Path) -> None:
    settings = load_settings({"DATA_DIR": str(tmp_path)}, None)
    assert not dict(set_aside_starts(settings))
    influx = settings.influx.model_copy(update={"url": "http://localhost:8086"})
    dynamo = settings.dynamo.model_copy(update={"table_name": "t"})
    on = settings.model_copy(update={"influx": influx, "dynamo": dynamo})
    assert dict(set_aside_starts(on)) == {"influx_to_s3": "telemetry", "dynamo_to_drive": "dynamo_to_drive"}
