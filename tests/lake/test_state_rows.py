"""Of a device and a closed day the state keeps one row of its windows and one of what /analytics sums of them, and
everything goes on from it.
"""

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.analytics import service
from app.config.environment import load_settings
from app.core.runs import Outcome, Stop
from app.core.verify import Verdict, verify
from app.core.windows import Window
from app.db.state import open_state
from app.lake import job as lake_job
from app.object_store.local import LocalDirectory
from exporter import HOUR, NOON, Exporter, exporter_on
from lake_reports import REPORTS, Asked
from lake_tree import Tree

pytestmark = pytest.mark.slow  # pyiceberg takes a second to import

DAY = timedelta(days=1)
LATER = NOON + 16 * DAY
TABLES = {
    "export_windows": "device_id = 'D1' AND window_start < :day_at",
    "export_days": "device_id = 'D1' AND day_at < :day_at",
    "analytics_objects": "object_key LIKE '%device_id=D1/date=2026/02/07/%'",
    "analytics_parts": "device = '\"D1\"' AND day = 20491",
    "analytics_days": "device = '\"D1\"' AND day = 20491",
}


@pytest.fixture
def exporter(tmp_path: Path) -> Iterator[Exporter]:
    """Three hours of a day, closed long ago, that were verified; reports are asked for."""
    for made in exporter_on(LocalDirectory(tmp_path / "data" / "objects"), tmp_path):
        made.state.summaries.note_asked()
        made.write_each(NOON, NOON + 3 * HOUR, every_seconds=600)
        made.at(hours=1, minutes=30)
        made.well()
        made.write(LATER)
        made.at(hours=24 * 16 + 1)
        for _ in range(2):
            made.well()
        run_lake_day(made)
        yield made


def run_lake_day(exporter: Exporter) -> None:
    settings = load_settings({"DATA_DIR": str(exporter.folder / "data"), "CATALOG": "iceberg"}, None)
    run = exporter.execute(lake_job.build(settings, exporter.store).work, lake_job.NAME)
    assert run.outcome is Outcome.OK, run.error


def rows(exporter: Exporter) -> dict[str, int]:
    """How many the state has of D1 and its first day, by table."""
    with exporter.state.database.transaction(read_only=True) as session:
        return {
            table: session.rows(f"SELECT count(*) AS n FROM {table} WHERE {where}", day_at=NOON + 12 * HOUR)[0]["n"]  # noqa: S608 - own names
            for table, where in TABLES.items()
        }


ONE_ROW = {"export_windows": 0, "export_days": 1, "analytics_objects": 0, "analytics_parts": 0, "analytics_days": 1}


@contextmanager
def reports(exporter: Exporter, *, catalog: str = "iceberg") -> Iterator[Asked]:
    """As a daemon that starts now builds them."""
    tree = Tree(exporter.folder / "data", CATALOG=catalog)
    table = lake_job.table_for_reports(tree.settings, tree.store, exporter.clock)
    analytics = service.build(
        tree.settings, tree.store, exporter.state.summaries, lambda: ("", "", ""), exporter.clock, table=table
    )
    analytics.workplace.enter()
    analytics.summaries.refresh()
    yield Asked(tree, analytics)
    analytics.queries.close()
    analytics.workplace.leave()


def everything(exporter: Exporter) -> dict[str, Any]:
    """All reports over the table, which are those over the objects, and what the summaries say."""
    with reports(exporter, catalog="none") as asked:
        found = {path: asked.rows(path, **{**own, "device_id": "D1"}) for path, own in REPORTS.items()}
    with reports(exporter) as asked:
        assert found == {path: asked.rows(path, **{**own, "device_id": "D1"}) for path, own in REPORTS.items()}
        view = asked.analytics.summaries.view
        assert view is not None
        assert [part.rows for (device, _), part in sorted(view.days.items()) if device == '"D1"'][-1] == 1
        found["summaries"] = sorted((day, part) for (_, day), part in view.days.items())
        found["objects"] = view.objects, view.columns
    return found


def settle(exporter: Exporter) -> None:
    """The reconcile, a daemon that after an hour forgets what was replaced, and one that starts then and packs."""
    exporter.reconcile()
    for _ in range(2):
        with reports(exporter, catalog="none") as asked:
            exporter.now += timedelta(hours=2)
            asked.analytics.summaries.refresh()


def is_verified(exporter: Exporter) -> bool:
    ends = exporter.export().verification(Stop())
    found = [each.sign for each in verify(ends, Window(NOON, NOON + 3 * HOUR), Stop(), "D1")]
    return found == [Verdict.EQUAL] * 3


def test_after_the_reconcile_one_row_is_left_and_late_rows_a_restore_and_reports_go_on(exporter: Exporter) -> None:
    before = everything(exporter)
    assert rows(exporter)["export_windows"] == 3
    assert is_verified(exporter)
    shutil.copytree(exporter.folder / "data", exporter.folder / "backup", ignore=shutil.ignore_patterns("objects"))
    settle(exporter)
    assert rows(exporter) == ONE_ROW
    assert everything(exporter) == before
    assert is_verified(exporter)

    exporter.write(NOON + timedelta(seconds=30))
    exporter.backfill(NOON, NOON + 3 * HOUR)
    exporter.check()
    late = everything(exporter)
    assert late["overview"][0]["total_rows"] == before["overview"][0]["total_rows"] + 1
    run_lake_day(exporter)
    settle(exporter)
    assert rows(exporter) == ONE_ROW
    assert everything(exporter) == late

    exporter.write(NOON + timedelta(seconds=40))
    exporter.reconcile(RECONCILE_DAYS="20")  # a late row that the reconcile finds
    exporter.check()
    assert is_verified(exporter)
    last = everything(exporter)
    settle(exporter)
    assert rows(exporter) == ONE_ROW

    exporter.state = open_state("", exporter.folder / "backup")
    with closing(exporter.state):
        assert rows(exporter)["export_windows"] == 3
        assert everything(exporter) == last
        exporter.well()
        settle(exporter)
        assert rows(exporter) == ONE_ROW
        assert everything(exporter) == last
        assert is_verified(exporter)
        exporter.check()


def test_an_empty_state_comes_to_one_row_a_day_again(exporter: Exporter) -> None:
    before = everything(exporter)
    exporter.state = open_state("", exporter.folder / "empty")
    with closing(exporter.state):
        assert everything(exporter) == before
        exporter.well()
        settle(exporter)
        assert rows(exporter) == ONE_ROW
        assert everything(exporter) == before


def test_days_whose_objects_a_lifecycle_rule_deleted_leave_no_sums(exporter: Exporter) -> None:
    exporter.reconcile()
    with reports(exporter, catalog="none") as asked:
        for key in exporter.keys[:-1]:
            exporter.store.inner.delete(key)
        assert asked.analytics.summaries.refresh().rows == 1
        exporter.now += timedelta(hours=2)
        asked.analytics.summaries.refresh()
        exporter.reconcile()
        assert [len(list(exporter.state.summaries.versions())), rows(exporter)["export_days"]] == [1, 1]
