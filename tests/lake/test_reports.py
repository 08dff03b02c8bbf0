"""Reports over the table of closed days say what they say over the objects."""

import io
import shutil
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from app.analytics.reports import BadParameter
from app.core.closed_days import ReportSpan, TableRows
from app.lake.reader import TableReader
from app.object_store.port import PutRequest
from app.object_store.s3 import S3Store
from lake_reports import REPORTS, SPANS, filled, odd, only_objects, reports
from lake_tree import Tree, parquet, rows
from seaweed import Seaweed, target

pytestmark = pytest.mark.slow  # pyiceberg takes a second to import


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return filled(Tree(tmp_path))


def test_every_report_says_the_same_over_the_table_as_over_the_objects(tree: Tree) -> None:
    objects = only_objects(tree, SPANS)
    tree.max_bytes = 1  # a slice for each device
    tree.run()
    with reports(tree) as asked:
        view = asked.analytics.summaries.view
        assert view is not None
        assert not asked.analytics.queries.has_older_rows(view)
        wanted = asked.analytics.queries.to_read(ReportSpan())
        assert {source.key.split("/date=")[1][:10] for source in wanted.sources} == {"2026/02/08"}
        assert {file.key.split("=")[1][:10] for file in wanted.table.files} == {"2026-02-06", "2026-02-07"}
        assert asked.everything(SPANS) == objects
        # a device that was behind, a corrected row, and a day that the table does not hold yet
        tree.put("c", 7, rows("c", 7, **odd()))
        tree.put("b", 1, rows("b", 1, count=3, **odd(3)))
        tree.put("b", 1, rows("b", 1, day=date(2026, 2, 5), **odd()), day=date(2026, 2, 5))
        asked.analytics.queries.look_again()
        assert asked.everything() == only_objects(tree)
        tree.run()
        asked.analytics.queries.look_again()
        assert not any("02/07" in source.key for source in asked.analytics.queries.to_read(ReportSpan()).sources)
        assert asked.everything() == only_objects(tree)


def test_what_the_table_could_not_take_is_read_from_its_objects(tree: Tree) -> None:
    tree.put("b", 7, rows("b", 7, tags=pa.array([["x"]] * 4), **odd()))
    tree.put("b", 8, rows("another", 8, **odd()))
    assert sum(one.number for one in tree.run().ledger.set_aside) == 2
    with reports(tree) as asked:
        beside = {source.key for source in asked.analytics.queries.to_read(ReportSpan()).sources}
        assert {tree.key("b", 7), tree.key("b", 8)} <= beside
        assert asked.everything() == only_objects(tree)


def test_rows_whose_objects_are_gone_stay_in_every_report(tree: Tree) -> None:
    tree.run()
    before = only_objects(tree)
    for info in list(tree.store.list("telemetry/device_id=a/date=2026/02/07/")):
        tree.store.delete(info.key)
    tree.store.delete(tree.key("b", 1))
    with reports(tree) as asked:
        view = asked.analytics.summaries.view
        assert view is not None
        assert asked.analytics.queries.has_older_rows(view)
        assert asked.everything() == before  # though the table is not yet as the objects are
        tree.run()
        asked.analytics.queries.look_again()
        assert asked.everything() == before


def test_a_table_that_is_away_or_has_lost_files_leaves_the_objects(tree: Tree) -> None:
    objects = only_objects(tree)
    tree.run()
    with reports(tree) as asked:
        asked.rows("overview")
        for file in (tree.folder / "objects" / "lake").rglob("*.parquet"):
            file.unlink()
        assert asked.everything() == objects
        shutil.rmtree(tree.folder / "objects" / "lake")
        asked.analytics.queries.look_again()
        assert asked.everything() == objects


def test_as_of_answers_from_the_state_that_was_valid_then(tree: Tree) -> None:
    began_at = datetime.now(UTC)
    tree.run()
    first_at = datetime.now(UTC)
    tree.put("a", 1, rows("a", 1, count=3, **odd(3)))
    tree.run()
    with reports(tree) as asked:
        assert asked.rows("overview", first_at)[0]["total_rows"] == 44
        assert asked.rows("overview", datetime.now(UTC))[0]["total_rows"] == 43
        assert len(asked.rows("rows", first_at, device_id="a")) == 20
        for at, said in (
            (began_at, "no snapshot of the table of closed days is that old"),
            (first_at + timedelta(days=1), "is in the future"),
        ):
            with pytest.raises(BadParameter, match=said):
                asked.rows("overview", at)
    with reports(tree, with_table=False) as asked, pytest.raises(BadParameter, match="needs the table") as raised:
        asked.rows("overview", first_at)
    assert "CATALOG=iceberg" in raised.value.hint


def test_a_state_that_expires_while_it_is_read_is_told_as_any_that_is_gone(tree: Tree) -> None:
    tree.run()
    first_at = datetime.now(UTC)
    tree.put("a", 1, rows("a", 1, count=3, **odd(3)))
    tree.run()

    class Expiring(TableReader):
        def rows_at(self, instant: datetime, span: ReportSpan) -> TableRows:
            found = super().rows_at(instant, span)
            tree.now = datetime.now(UTC) + timedelta(days=9)
            tree.run()
            return found

    with reports(tree, reader=Expiring) as asked:
        with pytest.raises(BadParameter, match="no snapshot of the table of closed days is that old"):
            asked.rows("overview", first_at)
        assert asked.rows("overview", datetime.now(UTC))[0]["total_rows"] >= 43


def test_the_same_in_a_bucket_where_other_programs_files_lie_too(tmp_path: Path, seaweed: Seaweed) -> None:
    bucket = seaweed.new_bucket()
    given = {
        "S3_BUCKET": bucket,
        "S3_ENDPOINT_URL": f"http://{seaweed.host}:{seaweed.port}",
        "S3_ACCESS_KEY_ID": seaweed.access_key,
        "S3_SECRET_ACCESS_KEY": seaweed.secret_key,
    }
    tree = filled(Tree(tmp_path, store=S3Store(target(seaweed, bucket), "probe/key"), **given))
    tree.store.put("telemetry/day_001.parquet", io.BytesIO(parquet(rows("x", 3, **odd()))), PutRequest("x"))
    keys = (seaweed.access_key, seaweed.secret_key, "")
    with reports(tree, keys, with_table=False) as asked:
        objects = {path: asked.rows(path, **own) for path, own in REPORTS.items()}
    tree.run()
    with reports(tree, keys) as asked:
        assert {path: asked.rows(path, **own) for path, own in REPORTS.items()} == objects
        beside = [source.key for source in asked.analytics.queries.to_read(ReportSpan()).sources]
        assert [key for key in beside if "02/08" not in key] == ["telemetry/day_001.parquet"]
