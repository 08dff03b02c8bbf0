"""The lake day: the table has the rows of the objects, whatever happens between."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pytest

from app.core.closed_days import ReportSpan
from app.core.errors import Permanent, Rejected, Transient
from app.core.runs import Report
from app.lake.day import GROUP_ROWS
from app.lake.job import NAME
from app.object_store.local import LocalDirectory
from app.object_store.port import PutRequest
from app.object_store.s3 import S3Store
from fake_clock import FakeClock
from lake_tree import NOW, Tree, parquet, rows
from postgres import PostgresServer
from seaweed import Seaweed, target

pytestmark = pytest.mark.slow  # pyiceberg takes a second to import


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    made = Tree(tmp_path)
    for device in ("a", "b", "ü #?%"):
        for hour in range(3):
            made.put(device, hour)
    return made


def snapshots(tree: Tree) -> list[int]:
    with tree.table() as table:
        return [snapshot.snapshot_id for snapshot in table.snapshots()]


def test_a_closed_day_is_in_the_table_and_a_second_run_does_nothing(tree: Tree) -> None:
    tree.put("a", 0, day=NOW.date())  # today is open
    first = tree.run()
    assert (first.rows, first.ledger.total.new) == (36, 9)
    assert sum(tree.in_table().values()) == 36
    assert not tree.in_table() - tree.in_objects()
    again = tree.run()
    assert (again.rows, again.ledger.total.already_there) == (0, 9)
    assert len(snapshots(tree)) == 1


def test_a_day_waits_for_its_grace_and_six_hours(tree: Tree) -> None:
    tree.now = datetime(2026, 2, 8, 6, 59, 59, tzinfo=UTC)
    assert tree.run().ledger.total.counted == 0
    tree.now += timedelta(seconds=1)
    assert tree.run().ledger.total.new == 9


def test_a_late_row_swaps_one_file_in_one_snapshot_and_the_old_snapshot_still_reads(tree: Tree) -> None:
    tree.max_bytes = 1  # a slice for each device
    tree.run()
    before, old, files = tree.in_table(), snapshots(tree)[-1], set(tree.files())
    assert len(files) == 3
    tree.put("b", 1, rows("b", 1, count=6))
    report = tree.run()
    assert (report.ledger.total.corrected, report.windows) == (3, 1)
    assert tree.in_table() == tree.in_objects()
    assert len(files - set(tree.files())) == 1
    assert tree.in_table(old) == before
    assert len(snapshots(tree)) == 2


def test_new_fields_and_other_types_and_nanoseconds_arrive_as_they_are(tree: Tree) -> None:
    tree.run()
    start_ns = round(datetime(2026, 2, 7, 9, tzinfo=UTC).timestamp()) * 10**9
    instants = pa.array([start_ns + number for number in (0, 1, 1001, 999)], pa.timestamp("ns", "UTC"))
    tree.put("a", 9, rows("a", 9, timestamp=instants, phase=pa.array(["x", None, "y", "z"])))
    tree.put("b", 9, rows("b", 9, count=2, mode=pa.array([1, 2], pa.int32())))
    tree.put("b", 10, rows("b", 10, count=2, mode=pa.array([2**40, 3], pa.int64())))
    tree.put("b", 11, rows("b", 11, count=2, mode=pa.array([0.5, 1.0])))
    tree.put("b", 12, rows("b", 12, count=2, big=pa.array([2**64 - 1, 3], pa.uint64())))
    tree.run()
    with tree.table() as table:
        assert {each.name: str(each.field_type) for each in table.schema().fields}.items() >= {
            "mode": "long", "mode_as_double": "double", "big": "decimal(20, 0)", "phase": "string",
            "timestamp": "timestamptz", "timestamp_nanos": "int",
        }.items()  # fmt: skip
        found = table.scan().to_arrow()
    assert found["mode_as_double"].drop_null().to_pylist() == [0.5, 1.0]
    assert sorted(found["mode"].drop_null().to_pylist()) == [1, 2, 3, 2**40]
    assert [int(each) for each in found["big"].drop_null().to_pylist()] == [2**64 - 1, 3]
    table_rows, object_rows = tree.in_table(), tree.in_objects()
    renamed = {key: count for key, count in table_rows.items() if "mode_as_double" not in str(key)}
    assert not {key: count for key, count in renamed.items() if object_rows[key] != count}
    assert sum(table_rows.values()) == sum(object_rows.values())


def test_names_with_a_dot_and_names_that_look_like_ours_keep_their_values(tree: Tree) -> None:
    tree.run()
    tree.put(
        "a", 9, rows("a", 9, **{"cpu.load": pa.array([1, 2, 3, 4], pa.int32()), "n_as_double": pa.array([*"wxyz"])})
    )
    tree.put("a", 10, rows("a", 10, **{"cpu.load": pa.array([2**40] * 4), "n": pa.array([1, 2, 3, 4])}))
    tree.run()
    tree.put("a", 11, rows("a", 11, n=pa.array([0.5] * 4)))
    tree.put("a", 12, rows("a", 12, n=pa.array([1.5] * 4), n_as_double=pa.array([2.5] * 4)))
    tree.run()
    with tree.table() as table:
        found = table.scan().to_arrow()
        kinds = {each.name: str(each.field_type) for each in table.schema().fields}
    assert kinds["cpu.load"] == "long"
    assert sorted(found["cpu.load"].drop_null().to_pylist()) == [1, 2, 3, 4, *[2**40] * 4]
    assert sorted(found["n_as_double"].drop_null().to_pylist()) == [*"wxyz"]
    assert sorted(found["n"].drop_null().to_pylist()) == [1, 2, 3, 4]
    assert sorted(found["n_as_double_2"].drop_null().to_pylist()) == [0.5] * 4 + [1.5] * 4
    assert found["n_as_double_as_double"].drop_null().to_pylist() == [2.5] * 4


def wrong_columns(count: int, kind: str) -> pa.Table:
    """Rows of device `b` that no table can take."""
    table = rows("b", 9, count)
    if kind == "a type that it does not have":
        return table.append_column("tags", pa.array([["x"]] * count))
    if kind == "two columns of a name":
        return table.append_column("voltage", pa.array([1.0] * count))
    if kind == "another device at the end":
        return table.set_column(1, "device_id", pa.array(["b"] * (count - 1) + ["a"]))
    times = table["timestamp"].to_pylist()
    return table.set_column(0, "timestamp", pa.array([*times[:-1], NOW], table.schema.field(0).type))


@pytest.mark.parametrize("count", [4, 3 * GROUP_ROWS // 2], ids=["small", "large"])
@pytest.mark.parametrize(
    "kind",
    ["a type that it does not have", "two columns of a name", "another device at the end", "another day at the end"],
)
def test_an_object_of_any_size_that_cannot_be_taken_is_set_aside_alone(tree: Tree, count: int, kind: str) -> None:
    tree.put("b", 9, rows("b", 9, 3))
    tree.run()
    before = tree.in_table()
    tree.put("b", 9, wrong_columns(count, kind))
    tree.put("c", 9)
    report = tree.run()
    assert not report.failures
    assert [(one.number, one.new) for one in report.ledger.set_aside] == [(1, 1)]
    after = tree.in_table()
    assert not before - after  # also what was taken of the object's earlier version
    assert sum(after.values()) == sum(before.values()) + 4


def test_rows_stay_whose_objects_are_gone_and_the_rest_follows_its_objects(tree: Tree) -> None:
    tree.run()
    before = tree.in_table()
    tree.store.delete(tree.key("a", 1))  # as a lifecycle rule does
    for hour in range(3):
        tree.store.delete(tree.key("ü #?%", hour))
    report = tree.run()
    assert tree.in_table() == before
    assert report.notes == ("16 rows are kept whose objects are gone",)
    assert tree.run().notes == ()
    tree.put("a", 2, rows("a", 2, count=8))
    tree.run()
    assert sum(tree.in_table().values()) == 36 + 4
    for info in list(tree.store.list("telemetry/")):
        tree.store.delete(info.key)
    assert tree.run().ledger.total.counted == 0
    assert sum(tree.in_table().values()) == 36 + 4


def test_what_cannot_be_taken_is_set_aside_once_and_hinders_nothing(tree: Tree) -> None:
    good = tree.in_objects()
    put = PutRequest("application/vnd.apache.parquet")
    tree.store.put(tree.key("a", 5), io.BytesIO(b"no parquet"), put)
    tree.put("b", 5, rows("other", 5))
    tree.put("b", 6, rows("b", 6, day=date(2026, 2, 1)))
    tree.put("b", 7, rows("b", 7, tags=pa.array([["x"]] * 4)))
    tree.store.put(tree.key("b", 8).replace(".parquet", ".csv"), io.BytesIO(b"timestamp\n"), PutRequest("text/csv"))
    first = tree.run()
    assert {one.reason: (one.number, one.new) for one in first.ledger.set_aside} == {
        "object that the table cannot take": (4, 4), "CSV object: the table takes Parquet": (1, 0)}  # fmt: skip
    assert tree.in_table() == good
    assert [one.new for one in tree.run().ledger.set_aside] == [0, 0]


def lose_catalog(tree: Tree) -> None:
    (tree.folder / "lake.db").unlink()


def restore_old_catalog(tree: Tree) -> None:
    shutil.copy(tree.folder / "backup.db", tree.folder / "lake.db")
    tree.now = datetime.now(UTC) + timedelta(hours=1)  # what was committed since is not in the making


def empty_the_lake(tree: Tree) -> None:
    shutil.rmtree(tree.folder / "objects" / "lake")


def lose_a_file(tree: Tree) -> None:
    Path(tree.files()[0].removeprefix("file://")).unlink()


def cut_a_file(tree: Tree) -> None:
    path = Path(tree.files()[0].removeprefix("file://"))
    path.write_bytes(path.read_bytes()[:-9])


def lose_metadata(tree: Tree) -> None:
    for path in (tree.folder / "objects" / "lake").rglob("*.metadata.json"):
        path.unlink()


def lose_the_newest_metadata(tree: Tree) -> None:
    max((tree.folder / "objects" / "lake").rglob("*.metadata.json")).unlink()


def restore_a_catalog_without_the_table(tree: Tree) -> None:
    shutil.copy(tree.folder / "empty.db", tree.folder / "lake.db")


def move_the_directory(tree: Tree) -> None:
    tree.folder = tree.folder.rename(tree.folder.with_name("moved"))
    vars(tree).update(vars(Tree(tree.folder)))


def lose_manifests(tree: Tree) -> None:
    for path in (tree.folder / "objects" / "lake").rglob("*.avro"):
        path.unlink()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lose_catalog, "the catalog was behind the table"),
        (restore_old_catalog, "the catalog was behind the table"),
        (empty_the_lake, "1 snapshots of the table cannot be read, since their files are gone"),
        (lose_a_file, "1 files of the table are gone"),
        (cut_a_file, "1 files of the table are gone or damaged"),
        (lose_metadata, "the table is re-created from the objects"),
        (lose_the_newest_metadata, "1 snapshots of the table cannot be read"),
        (restore_a_catalog_without_the_table, "the catalog was behind the table"),
        (move_the_directory, "the table is re-created from the objects"),
        (lose_manifests, "2 snapshots of the table cannot be read"),
    ],
)
def test_what_was_lost_is_made_again_from_what_is_there_and_said(
    tree: Tree, harm: Callable[[Tree], None], said: str
) -> None:
    tree.run(dry_run=True)
    shutil.copy(tree.folder / "lake.db", tree.folder / "empty.db")
    tree.run()
    shutil.copy(tree.folder / "lake.db", tree.folder / "backup.db")
    tree.put("b", 9)
    tree.run()
    harm(tree)
    report = tree.run()
    assert said in " ".join(report.notes)
    assert tree.in_table() == tree.in_objects()
    assert tree.run().notes == ()


def test_a_damaged_file_of_the_table_costs_no_row_of_an_object_and_is_said(tree: Tree) -> None:
    tree.run()
    path = Path(tree.files()[0].removeprefix("file://"))
    path.write_bytes(bytes(path.stat().st_size))
    tree.put("b", 9)
    assert tree.run().notes == ("1 files of the table cannot be read: their days are re-created from the objects",)
    assert tree.in_table() == tree.in_objects()


def damage(path: Path) -> None:
    """Other bytes in the middle, as a disk may give them."""
    content = path.read_bytes()
    middle = len(content) // 3
    path.write_bytes(
        content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 9]) + content[middle + 9 :]
    )


def test_damage_that_leaves_the_size_as_it_was_is_found_within_a_week(tree: Tree) -> None:
    tree.run()
    damage(Path(tree.files()[0].removeprefix("file://")))
    notes: list[str] = []
    for _ in range(7 * 24):
        tree.now += timedelta(hours=1)
        notes += tree.run().notes
    assert notes.count("1 files of the table are gone or damaged") == 1
    assert tree.in_table() == tree.in_objects()


@pytest.mark.parametrize("pattern", ["*.metadata.json", "snap-*.avro", "*-m0.avro"])
@pytest.mark.parametrize("size", [0, 100, -1], ids=["empty", "cut", "other bytes"])
def test_a_damaged_description_of_the_table_is_passed_over(tree: Tree, pattern: str, size: int) -> None:
    tree.run()
    tree.put("b", 9)
    tree.run()
    newest = max((tree.folder / "objects" / "lake").rglob(pattern), key=lambda path: path.stat().st_mtime_ns)
    if size < 0:
        damage(newest)
    else:
        newest.write_bytes(newest.read_bytes()[:size])
    (note,) = tree.run().notes
    assert note == "1 snapshots of the table cannot be read, since their files are gone or damaged"
    assert tree.in_table() == tree.in_objects()
    assert tree.run().notes == ()


def test_a_description_that_is_not_understood_is_left_alone(tree: Tree) -> None:
    tree.run()
    newest = max((tree.folder / "objects" / "lake").rglob("*.metadata.json"))
    newest.write_text(newest.read_text().replace('"format-version":2', '"format-version":9'))
    with pytest.raises(Permanent, match="cannot be understood") as raised:
        tree.run()
    assert "install a newer Headwater" in raised.value.hint
    assert newest.exists()
    assert tree.reader().day_counts() == {}


@pytest.mark.parametrize("pattern", ["snap-*.avro", "*-m0.avro"])
@pytest.mark.parametrize("harm", [Path.unlink, damage], ids=["gone", "damaged"])
def test_an_earlier_state_that_cannot_be_read_hinders_nothing(
    tree: Tree, pattern: str, harm: Callable[[Path], None]
) -> None:
    tree.run()
    first_at = datetime.now(UTC)
    tree.put("b", 9)
    tree.run()
    lake = tree.folder / "objects" / "lake"
    harm(min(lake.rglob(pattern), key=lambda path: path.stat().st_mtime_ns))
    tree.now = datetime.now(UTC)
    with pytest.raises(Rejected, match="cannot be read") as raised:
        tree.reader().rows_at(first_at, ReportSpan())
    assert raised.value.hint == "send a later timestamp"
    for path in lake.rglob("*.*"):
        os.utime(path, (0, 0))  # old enough to be removed, if nothing named them
    tree.put("b", 10)
    tree.run()
    assert tree.in_table() == tree.in_objects()


def test_the_table_of_another_tree_or_program_is_left_alone(tree: Tree) -> None:
    other = Tree(tree.folder, S3_PREFIX="elsewhere")
    other.store.put(
        "elsewhere/device_id=x/date=2026/02/07/export_000000.parquet",
        io.BytesIO(parquet(rows("x", 0))),
        PutRequest("x"),
    )
    other.run()
    with other.table() as table:
        before = table.metadata_location
    kept = (tree.folder / "lake.db").read_bytes()
    for is_known in (True, False):  # the catalog points there, or knows nothing
        if not is_known:
            (tree.folder / "lake.db").unlink()
        with pytest.raises(
            Permanent, match="is the table of the objects below elsewhere, not of those below telemetry"
        ):
            tree.run()
        assert tree.reader().day_counts() == {}
    (tree.folder / "lake.db").write_bytes(kept)
    with other.table() as table:
        assert table.metadata_location == before
        with table.update_spec() as spec:
            spec.add_identity("device_id")
    with pytest.raises(Permanent, match="is another program's table"):
        other.run()


def test_a_day_that_a_clock_closed_too_early_is_what_its_objects_become(tree: Tree) -> None:
    clock = FakeClock(tree.folder.with_name("clock"))
    clock.set(timedelta(days=200))
    given = {"CATALOG": "iceberg", "DATA_DIR": str(tree.folder), "LOG_FILE": "off", **clock.environ}
    today = datetime.now(UTC).date()
    tree.put("a", 0, day=today)
    command = [sys.executable, "-m", "app", "run", "lake_day"]
    subprocess.run(command, env={**os.environ, **given}, check=True, capture_output=True)
    assert sum(tree.in_table().values()) == 40
    tree.put("a", 1, day=today)
    tree.put("b", 1, rows("b", 1, count=5))
    tree.now = datetime.now(UTC)
    tree.run()
    assert not tree.in_table() - tree.in_objects()
    assert sum((tree.in_objects() - tree.in_table()).values()) == 4, "the day is open"
    tree.now += timedelta(days=2)
    tree.run()
    assert tree.in_table() == tree.in_objects()
    tree.now += timedelta(days=300)
    found = tree.reader().rows_at(tree.now, ReportSpan())
    assert found.state is not None
    assert found.state.snapshot_id == snapshots(tree)[-1], "not that of the clock that was ahead"


class Killed(BaseException):
    """The process is gone."""


class DyingStore(LocalDirectory):
    """A directory whose process dies after so many steps that change it; `act` runs before the first."""

    def __init__(self, root: Path, step: int = 1000, act: Callable[[], object] | None = None) -> None:
        super().__init__(root)
        self.steps, self.step, self.act = 0, step, act

    def _step(self) -> None:
        self.steps += 1
        if self.steps >= self.step:
            raise Killed

    def put(self, key: str, body: BinaryIO, put: PutRequest) -> str:
        if self.act is not None and key.startswith("lake/"):
            act, self.act = self.act, None
            act()
        etag = super().put(key, body, put)
        self._step()
        return etag

    def delete(self, key: str) -> None:
        super().delete(key)
        self._step()


def deaths(tree: Tree) -> Iterator[tuple[int, Report | None]]:
    """Runs that die at the first step, then at the second, until one comes to its end."""
    good = tree.store
    for number in range(1, 100):
        tree.put("b", 1, rows("b", 1, count=4 + number % 7))
        tree.store = DyingStore(tree.folder / "objects", number)
        report: Report | None
        try:
            report = tree.run()
        except Killed:
            report = None
        tree.store = good
        yield number, report
        if report is not None:
            return


def test_killed_at_any_step_the_next_run_has_the_rows_of_the_objects(tree: Tree) -> None:
    steps = 0
    for steps, _ in deaths(tree):
        tree.run()
        assert tree.in_table() == tree.in_objects(), steps
    assert steps >= 4


def test_of_two_writers_the_slower_one_plans_anew(tree: Tree) -> None:
    tree.run()
    tree.put("b", 1, rows("b", 1, count=5))

    def other() -> None:
        tree.put("a", 1, rows("a", 1, count=6))
        Tree(tree.folder).run()

    tree.store = DyingStore(tree.folder / "objects", act=other)
    tree.run()
    assert tree.in_table() == tree.in_objects()
    assert len(snapshots(tree)) == 2


def test_writers_that_are_overtaken_each_time_give_up_and_say_so(tree: Tree) -> None:
    tree.run()
    numbers = iter(range(5, 50))
    good = tree.store

    class Busy(DyingStore):
        def put(self, key: str, body: BinaryIO, put: PutRequest) -> str:
            if key.endswith(".parquet"):
                other = Tree(tree.folder)
                other.put("a", 1, rows("a", 1, count=next(numbers)))
                other.run()
                other.put("a", 2, rows("a", 2, count=next(numbers)))
            return super().put(key, body, put)

    tree.put("b", 1, rows("b", 1, count=5))
    tree.store = Busy(tree.folder / "objects")
    with pytest.raises(Transient, match="other processes changed the table"):
        tree.run()
    tree.store = good
    tree.run()
    assert tree.in_table() == tree.in_objects()


def test_old_snapshots_and_files_that_nothing_names_are_removed_by_age(tree: Tree) -> None:
    for count in (4, 5, 6):
        tree.put("b", 1, rows("b", 1, count=count))
        tree.run()
    tree.store.put("lake/telemetry/data/date=2026-02-07/orphan.parquet", io.BytesIO(b"x"), PutRequest("x"))
    lake = tree.folder / "objects" / "lake"
    assert len(list(lake.rglob("*.parquet"))) == 4
    tree.now = datetime.now(UTC)
    assert tree.run().notes == ()
    assert len(snapshots(tree)) == 3
    tree.now += timedelta(days=8)
    assert "files removed" in tree.run().notes[0]
    assert len(snapshots(tree)) == 1
    assert len(list(lake.rglob("*.parquet"))) == 1
    assert tree.in_table() == tree.in_objects()


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tree: Tree) -> None:
    report = tree.run(dry_run=True)
    assert (report.notes, report.ledger.total.waiting) == (("would write 1 slices",), 9)
    assert not (tree.folder / "objects" / "lake").exists()


def test_a_run_that_takes_too_long_commits_what_it_has_and_goes_on(tree: Tree) -> None:
    from app.lake.job import LakeDay

    for day in range(1, 4):
        tree.put("a", 1, day=date(2026, 2, day))
    report = tree.run(job=LakeDay(tree.settings, tree.store, run_seconds=0))
    assert (report.more, report.ledger.total.waiting) == (True, 11)
    assert not tree.run().more
    assert tree.in_table() == tree.in_objects()


def test_the_same_in_a_bucket_with_the_catalog_in_postgresql(
    tmp_path: Path, seaweed: Seaweed, postgres_server: PostgresServer
) -> None:
    bucket = seaweed.new_bucket()
    url = postgres_server.new_database()
    store = S3Store(target(seaweed, bucket), "probe/key")
    tree = Tree(tmp_path, store=store, S3_BUCKET=bucket, CHECKPOINT_DATABASE_URL=url)
    for hour in range(3):
        tree.put("a", hour)
    tree.run()
    tree.put("a", 1, rows("a", 1, count=9))
    tree.run()
    assert tree.in_table() == tree.in_objects()
    assert all(file.startswith(f"s3://{bucket}/lake/telemetry/data/date=2026-02-07/") for file in tree.files())


def test_the_job_is_off_until_the_catalog_is_named(tmp_path: Path) -> None:
    from app.lake.job import build
    from given_settings import loaded

    off = build(loaded({"DATA_DIR": str(tmp_path)}), LocalDirectory(tmp_path))
    assert (off.name, off.off) == (NAME, "set CATALOG=iceberg")
    assert not build(loaded({"DATA_DIR": str(tmp_path), "CATALOG": "iceberg"}), LocalDirectory(tmp_path)).off


def test_a_parquet_object_of_many_row_groups_is_taken_whole(tree: Tree) -> None:
    start_us = round(datetime(2026, 2, 7, 20, tzinfo=UTC).timestamp()) * 10**6
    number = 150_000
    big: dict[str, Any] = {
        "timestamp": pa.array(range(start_us, start_us + number), pa.timestamp("us", "UTC")),
        "device_id": pa.array(["big"] * number).dictionary_encode(),
        "voltage": pa.array([float(each) for each in range(number)]),
    }
    tree.store.put(tree.key("big", 20), io.BytesIO(parquet(pa.table(big))), PutRequest("x"))
    tree.run()
    with tree.table() as table:
        found = table.scan("device_id == 'big'").to_arrow()
    assert sum(found["voltage"].to_pylist()) == number * (number - 1) / 2
