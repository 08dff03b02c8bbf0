"""The layout beside the data: what holds from when on, days that are sealed once, and writers that come at once."""

import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.errors import Conflict, Permanent, Transient
from app.core.windows import EPOCH
from app.db.checkpoints import Layout
from app.influx_to_s3.layout import (
    DOUBLE,
    EVER,
    INTEGER,
    KINDS,
    TEXT,
    TYPES,
    Column,
    LayoutDocument,
    LayoutFile,
    add_columns,
    from_json,
    new_layout,
    to_json,
    with_ignored_tags,
    with_layout,
    with_types,
)
from app.object_store.local import LocalDirectory
from app.object_store.port import ObjectInfo, ObjectStore, PutRequest
from influx_points import IGNORED, LAYOUT, NOON, columns_of
from memory_objects import MemoryObjects
from object_stores import bucket, get, outside, put, s3_store, shared_bucket, target_of

if TYPE_CHECKING:
    from seaweed import Seaweed

__all__ = ["bucket", "outside", "shared_bucket"]

DAY = timedelta(days=1)
TODAY = NOON.date()
KEY = "telemetry/_headwater/layout.json"
HOURLY, QUARTERS = LAYOUT, replace(LAYOUT, window_seconds=900)
COUNT = Column("count", "field", "count", ((EVER, INTEGER),))


class Clocked(MemoryObjects):
    """A store whose own clock says what the test says; `spoil` is called before each write."""

    def __init__(self, now: datetime = NOON) -> None:
        super().__init__()
        self.now = now
        self.writes = 0
        self.written_at: dict[str, datetime] = {}
        self.spoil: Callable[[], None] | None = None

    def put(self, key: str, body: BinaryIO, put: PutRequest) -> str:
        if self.spoil:
            self.spoil()
        etag = super().put(key, body, put)
        self.writes += 1
        self.written_at[key] = self.now
        return etag

    def head(self, key: str) -> ObjectInfo | None:
        info = super().head(key)
        return info and replace(info, modified_at=self.written_at.get(key, self.now))


@pytest.fixture
def store() -> Clocked:
    return Clocked()


def file_in(store: ObjectStore, wanted: Layout = HOURLY) -> LayoutFile:
    return LayoutFile(store, "telemetry", lambda now: new_layout(wanted, now - DAY))


def begin(
    store: ObjectStore,
    now: datetime = NOON,
    wanted: Layout = HOURLY,
    types: Mapping[str, str] | None = None,
    *,
    dry_run: bool = False,
) -> tuple[LayoutDocument, datetime]:
    """A run begins."""
    return file_in(store, wanted).begin(
        now, wanted=lambda _: wanted, types=types or {}, ignored=IGNORED, dry_run=dry_run
    )


def text_of(store: ObjectStore) -> str:
    found = get(store, KEY)
    assert found is not None
    return found.decode()


def day_before(tree: LayoutDocument, day: date) -> list[tuple[int, str, str]]:
    """Length, format and unit of the layout at the last instant before a day and at its first."""
    midnight = datetime(day.year, day.month, day.day, tzinfo=UTC)
    layouts = [tree.layout_at(at) for at in (midnight - datetime.resolution, midnight)]
    return [(each.window_seconds, each.format, each.timestamp_unit) for each in layouts]


def test_the_first_run_writes_a_tree_that_begins_on_the_grid_and_seals_today(store: Clocked) -> None:
    tree, now = begin(store, NOON + timedelta(minutes=17))
    layouts, ignored_tags = (replace(HOURLY, effective_at=EPOCH),), ((EVER, tuple(sorted(IGNORED))),)
    assert tree == LayoutDocument(NOON - DAY, TODAY, layouts, ignored_tags=ignored_tags)
    assert now == NOON + timedelta(minutes=17)
    assert from_json(json.loads(text_of(store))) == tree


def test_a_run_of_the_same_day_with_the_same_settings_writes_nothing(store: Clocked) -> None:
    first = begin(store)
    writes = store.writes
    for minutes in (1, 5, 600):
        assert begin(store, NOON + timedelta(minutes=minutes))[0] == first[0]
    assert store.writes == writes


def test_the_first_start_stays_whatever_the_clock_and_the_settings_say_later(store: Clocked) -> None:
    first = begin(store)[0].first_start_at
    for days in (-3, 1, 40):
        store.now = NOON + days * DAY
        assert begin(store, NOON + days * DAY, QUARTERS)[0].first_start_at == first


@pytest.mark.parametrize(
    "change",
    [{"window_seconds": 900}, {"format": "csv"}, {"date_format": "%Y-%m-%d"}, {"timestamp_unit": "ns"}],
)
def test_a_change_takes_effect_the_day_after_and_not_before(store: Clocked, change: dict[str, Any]) -> None:
    begin(store)
    wanted = replace(HOURLY, **change)
    tree, _ = begin(store, NOON + timedelta(hours=1), wanted)
    midnight = datetime(2026, 2, 8, tzinfo=UTC)
    assert tree.layouts == (replace(HOURLY, effective_at=EPOCH), replace(wanted, effective_at=midnight))
    assert tree.layout_at(midnight - datetime.resolution) == tree.layouts[0]
    assert tree.layout_at(midnight) == tree.layouts[1]
    assert begin(store, NOON + timedelta(hours=2), wanted)[0] == tree


def test_windows_change_their_length_at_a_midnight_only(store: Clocked) -> None:
    begin(store)
    tree, _ = begin(store, NOON, QUARTERS)
    windows = list(tree.windows(datetime(2026, 2, 7, 22, 30, tzinfo=UTC), datetime(2026, 2, 8, 0, 20, tzinfo=UTC)))
    assert [window.seconds for window in windows] == [3600, 3600, 900, 900]
    assert [window.start for window in windows[1:]] == [window.end for window in windows[:-1]]


def test_a_change_comes_after_the_sealed_day_also_where_that_is_later_than_today() -> None:
    tree = replace(new_layout(HOURLY, NOON), sealed_day=TODAY + 5 * DAY, columns=(COUNT,))
    assert with_layout(tree, QUARTERS, TODAY).layouts[-1].effective_at.date() == TODAY + 6 * DAY
    assert with_types(tree, {"count": DOUBLE}, TODAY).columns[0].types == ((EVER, INTEGER), (TODAY + 6 * DAY, DOUBLE))


def test_a_change_that_was_still_to_come_is_taken_back(store: Clocked) -> None:
    before, _ = begin(store)
    begin(store, NOON, QUARTERS)
    assert begin(store, NOON, HOURLY)[0] == before
    assert from_json(json.loads(text_of(store))) == before


def test_a_change_that_was_still_to_come_is_replaced_by_another(store: Clocked) -> None:
    begin(store)
    begin(store, NOON, QUARTERS)
    tree, _ = begin(store, NOON, replace(HOURLY, format="csv"))
    assert [(each.window_seconds, each.format) for each in tree.layouts] == [(3600, "parquet"), (3600, "csv")]


def test_a_change_that_holds_already_is_changed_back_from_the_next_day_on(store: Clocked) -> None:
    begin(store)
    begin(store, NOON, QUARTERS)
    store.now = NOON + 2 * DAY
    begin(store, NOON + 2 * DAY, QUARTERS)
    tree, _ = begin(store, NOON + 2 * DAY, HOURLY)
    assert [(each.window_seconds, each.effective_at.date()) for each in tree.layouts] == [
        (3600, EVER),
        (900, TODAY + DAY),
        (3600, TODAY + 3 * DAY),
    ]
    assert day_before(tree, TODAY + DAY) == [(3600, "parquet", "us"), (900, "parquet", "us")]


def test_a_type_changes_from_the_day_after_and_can_be_taken_back_until_then(store: Clocked) -> None:
    begin(store)
    file_in(store).change(lambda tree: add_columns(tree, [COUNT]))
    tree, _ = begin(store, types={"count": DOUBLE, "unknown": TEXT})
    column = tree.columns[0]
    assert [column.type_on(TODAY + days * DAY) for days in (-9999, 0, 1, 2)] == [INTEGER, INTEGER, DOUBLE, DOUBLE]
    assert begin(store, types={"count": DOUBLE})[0] == tree
    assert begin(store, types={"count": INTEGER})[0].columns == (COUNT,)
    assert begin(store, types={"count": TEXT})[0].columns[0].types == ((EVER, INTEGER), (TODAY + DAY, TEXT))


def test_a_type_that_is_no_longer_set_stays_as_it_was_set(store: Clocked) -> None:
    begin(store)
    file_in(store).change(lambda tree: add_columns(tree, [COUNT]))
    changed, _ = begin(store, types={"count": DOUBLE})
    assert begin(store)[0] == changed


def test_ignored_tags_change_from_the_day_after_and_an_older_tree_has_those_that_are_set() -> None:
    tree = with_ignored_tags(new_layout(HOURLY, NOON), ["b", "a"], TODAY)
    assert tree.ignored_tags == ((EVER, ("a", "b")),)
    assert with_ignored_tags(tree, ["a", "b"], TODAY) is tree
    changed = with_ignored_tags(replace(tree, sealed_day=TODAY + DAY), ["c"], TODAY)
    assert [changed.ignored_on(TODAY + n * DAY) for n in range(3)] == [{"a", "b"}, {"a", "b"}, {"c"}]
    assert with_ignored_tags(changed, ["a", "b"], TODAY).ignored_tags == tree.ignored_tags
    assert from_json(to_json(changed)) == changed
    assert (
        from_json({name: value for name, value in to_json(tree).items() if name != "ignored_tags"}).ignored_tags == ()
    )


def test_a_type_can_be_set_for_a_field_only() -> None:
    columns = (Column("phase", "tag", "phase", ((EVER, TEXT),)), Column("a_text", "text of", "a", ((EVER, TEXT),)))
    tree = replace(new_layout(HOURLY, NOON), columns=columns)
    assert with_types(tree, {"phase": DOUBLE, "a_text": DOUBLE}, TODAY) == tree


def test_each_day_is_sealed_once(store: Clocked) -> None:
    sealed = []
    for hours in range(0, 72, 3):
        store.now = NOON + timedelta(hours=hours)
        writes = store.writes
        tree, now = begin(store, store.now)
        assert now == store.now
        sealed.append((tree.sealed_day, store.writes > writes))
    assert [day for day, _ in sealed] == [(NOON + timedelta(hours=hours)).date() for hours in range(0, 72, 3)]
    assert sum(wrote for _, wrote in sealed) == 4


def test_a_host_whose_clock_is_ahead_seals_no_further_than_the_clock_of_the_store(store: Clocked) -> None:
    begin(store)
    tree, now = begin(store, NOON + 400 * DAY)
    assert tree.sealed_day == TODAY
    assert now == datetime(2026, 2, 8, tzinfo=UTC)  # this run writes nothing of a later day
    store.now = NOON + DAY
    assert begin(store, NOON + 400 * DAY)[0].sealed_day == TODAY + DAY
    assert begin(store, NOON + DAY)[1] == NOON + DAY


def test_a_host_whose_clock_is_ahead_at_the_very_first_start_seals_no_further_either(store: Clocked) -> None:
    tree, now = begin(store, NOON + 400 * DAY)
    assert tree.sealed_day == TODAY
    assert now == datetime(2026, 2, 8, tzinfo=UTC)
    assert tree.first_start_at == now - DAY  # and not in a year
    assert from_json(json.loads(text_of(store))) == tree
    assert begin(store, NOON)[0] == tree


def test_a_host_whose_clock_is_ahead_changes_the_layout_from_the_day_after_the_stores_today(store: Clocked) -> None:
    begin(store)
    tree, _ = begin(store, NOON + 400 * DAY, QUARTERS)
    assert tree.layouts[-1].effective_at.date() == TODAY + DAY


def test_a_host_whose_clock_is_behind_changes_nothing_that_is_sealed(store: Clocked) -> None:
    store.now = NOON + 5 * DAY
    begin(store, NOON + 5 * DAY)
    tree, now = begin(store, NOON, QUARTERS)
    assert (tree.sealed_day, now) == (TODAY + 5 * DAY, NOON)
    assert tree.layouts[-1].effective_at.date() == TODAY + 6 * DAY


def test_a_dry_run_shows_what_would_hold_and_writes_nothing(store: Clocked) -> None:
    tree, _ = begin(store, dry_run=True)
    assert (tree.layouts[0].window_seconds, store.writes) == (3600, 0)
    begin(store)
    writes = store.writes
    tree, _ = begin(store, NOON + DAY, QUARTERS, dry_run=True)
    assert (tree.sealed_day, tree.layouts[-1].window_seconds) == (TODAY + DAY, 900)
    assert store.writes == writes


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"{}",
        b"[" * 100_000,
        b'{"version": 2}',
        b'{"version": 1, "layouts": [], "columns": [], "sealed_day": "2026-02-07", "first_start": "2026-02-07T00:00Z"}',
    ],
)
def test_a_file_that_cannot_be_read_ends_the_run_and_is_left_as_it_is(store: Clocked, body: bytes) -> None:
    put(store, KEY, body)
    for how in (False, True):
        with pytest.raises(Permanent, match=KEY) as caught:
            begin(store, NOON + DAY, QUARTERS, dry_run=how)
        assert "restore" in caught.value.hint
    with pytest.raises(Permanent):
        file_in(store).change(lambda tree: add_columns(tree, [COUNT]))
    assert get(store, KEY) == body


LATER = {**to_json(new_layout(HOURLY, NOON))["layouts"][0], "from": "2027-01-01T00:00:00Z"}
ALWAYS_TEXT = [{"from": "1970-01-01", "type": "text"}]


def broken(**change: Any) -> bytes:
    """The file of a good tree with some of it spoilt."""
    document = dict(to_json(replace(new_layout(HOURLY, NOON), columns=(COUNT,))))
    document["columns"] = [{**document["columns"][0], **change.pop("column", {})}]
    document["layouts"] = [{**document["layouts"][0], **change.pop("layout", {})}]
    return json.dumps({**document, **change}).encode()


@pytest.mark.parametrize(
    "change",
    [
        {"column": {"types": []}},
        {"column": {"types": [{"from": "2026-02-07", "type": "integer"}]}},
        {"column": {"types": [{"from": "1970-01-01", "type": "decimal"}]}},
        {"column": {"kind": "tags"}},
        {"sealed_day": "soon"},
        {"first_start": 7},
        {"first_start": "2026-02-07T12:00:00"},
        {"first_start": "9999-12-31T00:00:00Z"},
        {"sealed_day": "9999-12-31"},
        {"layouts": [{"from": "1970-01-01T00:00:00Z"}]},
        {"layout": {"window_seconds": 0}},
        {"layout": {"window_seconds": -3600}},
        {"layout": {"window_seconds": 7}},
        {"layout": {"window_seconds": None}},
        {"layout": {"window_seconds": float("inf")}},
        {"layout": {"format": "orc"}},
        {"layout": {"timestamp_unit": "ms"}},
        {"layout": {"date_format": "%d"}},
        {"layout": {"date_format": ""}},
        {"layouts": [LATER, to_json(new_layout(HOURLY, NOON))["layouts"][0]]},
        {"columns": [{"name": "n", "kind": kind, "source": "n", "types": ALWAYS_TEXT} for kind in ("tag", "field")]},
        {"columns": {"count": "integer"}},
        {"ignored_tags": [{"from": "2026-02-07", "tags": []}]},
    ],
)
def test_a_file_with_a_value_that_is_not_known_is_not_guessed_at(store: Clocked, change: dict[str, Any]) -> None:
    put(store, KEY, broken(**change))
    with pytest.raises(Permanent, match=KEY):
        begin(store)


NAMES = st.text(st.characters(exclude_categories=()), max_size=12)
DAYS = st.dates(date(1970, 1, 2), date(2200, 1, 1))
COLUMNS = st.builds(
    Column,
    NAMES,
    st.sampled_from(KINDS),
    NAMES,
    st.lists(st.tuples(DAYS, st.sampled_from(TYPES)), max_size=3).map(lambda some: ((EVER, TEXT), *sorted(some))),
)


@given(st.lists(COLUMNS, max_size=4, unique_by=lambda column: column.name), DAYS, st.sampled_from(["us", "ns"]))
@settings(max_examples=60, deadline=None)
def test_the_file_gives_back_every_tree_also_with_lone_surrogates(columns: list[Column], day: date, unit: str) -> None:
    later = Layout(datetime(day.year, day.month, day.day, tzinfo=UTC), 900, "csv", "%Y/%j", unit)
    layouts = (replace(HOURLY, effective_at=EPOCH), later)
    tree = LayoutDocument(NOON, day, layouts, tuple(columns), ((EVER, ()), (day, ("a", "b"))))
    file = LayoutFile(Clocked(), "telemetry", lambda _: tree)
    file.begin(NOON, wanted=lambda _: later, types={}, ignored=["b", "a"], dry_run=False)
    found, _ = file.begin(NOON, wanted=lambda _: later, types={}, ignored=["b", "a"], dry_run=True)
    assert replace(found, sealed_day=day) == tree


def test_a_write_that_loses_the_race_is_made_again_on_top_of_what_the_other_wrote(store: Clocked) -> None:
    begin(store)
    other = Column("other", "field", "other", ((EVER, DOUBLE),))

    def spoil() -> None:
        store.spoil = None
        file_in(store).change(lambda tree: add_columns(tree, [other]))

    store.spoil = spoil
    tree = file_in(store).change(lambda tree: add_columns(tree, [COUNT]))
    assert tree.columns == (other, COUNT)


def test_a_write_whose_answer_was_lost_is_seen_as_done(store: Clocked) -> None:
    begin(store)

    class Lossy(Clocked):
        def put(self, key: str, body: BinaryIO, put: PutRequest) -> str:
            store.put(key, body, put)
            raise Conflict("the answer was lost")

        def head(self, key: str) -> ObjectInfo | None:
            return store.head(key)

        @contextmanager
        def open(self, key: str, etag: str | None = None) -> Iterator[BinaryIO | None]:
            with store.open(key, etag) as body:
                yield body

    writes = store.writes
    assert file_in(Lossy()).change(lambda tree: add_columns(tree, [COUNT])).columns == (COUNT,)
    assert store.writes == writes + 1


def test_a_file_that_never_stops_changing_is_for_the_next_run(store: Clocked) -> None:
    begin(store)

    def spoil() -> None:
        raise Conflict("another one was quicker")

    store.spoil = spoil
    with pytest.raises(Transient, match="changed 20 times"):
        file_in(store).change(lambda tree: add_columns(tree, [COUNT]))


def test_a_file_that_is_deleted_while_a_run_goes_on_is_for_the_next_run(store: Clocked) -> None:
    begin(store)
    store.delete(KEY)
    with pytest.raises(Transient, match="is gone"):
        file_in(store).change(lambda tree: add_columns(tree, [COUNT]))
    assert store.head(KEY) is None


@contextmanager
def two_processes(request: pytest.FixtureRequest, kind: str, folder: Path) -> Iterator[list[ObjectStore]]:
    """Two stores of their own over the same objects."""
    if kind == "local directory":
        stores: list[ObjectStore] = [LocalDirectory(folder / "objects") for _ in range(2)]
        for one in stores:
            one.probe()
        yield stores
        return
    seaweed: Seaweed = request.getfixturevalue("seaweed")
    target = target_of(seaweed, request.getfixturevalue("bucket"))
    with s3_store(target) as one, s3_store(target) as other:
        one.probe()
        other.probe()
        yield [one, other]


@pytest.mark.parametrize("kind", ["local directory", "s3"])
def test_what_two_processes_add_and_change_at_once_is_all_there(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    now = datetime.now(UTC)
    with two_processes(request, kind, tmp_path) as stores:
        errors: list[BaseException] = []
        start = threading.Barrier(2)
        wanted = [replace(HOURLY, format="csv"), HOURLY]

        def work(number: int) -> None:
            try:
                start.wait(10)
                file = file_in(stores[number])
                tree, _ = file.begin(now, wanted=lambda _: wanted[number], types={}, ignored=IGNORED, dry_run=False)
                columns = columns_of(tree=tree, file=file)
                for step in range(8):
                    columns.see([f"tag{number}.{step}", "shared"], {f"Field{step}": (DOUBLE, TEXT)[number]})
                    columns.see([], {f"field{step}" if number else f"f{step}": INTEGER})
            except BaseException as error:
                errors.append(error)
                raise

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        tree = from_json(json.loads(text_of(stores[0])))
    sources = [(each.kind, each.source) for each in tree.columns]
    expected = {("tag", "shared"), *(("tag", f"tag{number}.{step}") for number in range(2) for step in range(8))}
    expected |= {("field", f"{name}{step}") for name in ("Field", "field", "f") for step in range(8)}
    assert set(sources) == expected
    assert len(sources) == len(set(sources))
    assert len({each.name.casefold() for each in tree.columns}) == len(tree.columns)
    assert {each.types[0][1] for each in tree.columns if each.source.startswith("Field")} <= {DOUBLE, TEXT}
    assert all(len(each.types) == 1 for each in tree.columns)
    assert tree.sealed_day == now.date()
    assert len(tree.layouts) <= 2


def test_one_of_two_first_runs_makes_the_file_and_the_other_takes_it(store: Clocked) -> None:
    made: list[LayoutDocument] = []

    def spoil() -> None:
        store.spoil = None
        made.append(begin(store, NOON + timedelta(hours=3))[0])

    store.spoil = spoil
    tree, _ = begin(store)
    assert tree.first_start_at == made[0].first_start_at == NOON + timedelta(hours=3) - DAY


def test_a_tree_of_an_empty_prefix_is_beside_its_data() -> None:
    assert LayoutFile(MemoryObjects(), "", lambda _: new_layout(HOURLY, NOON)).key == "_headwater/layout.json"


def test_the_file_can_be_read_by_a_person(store: Clocked) -> None:
    begin(store)
    file_in(store).change(lambda tree: add_columns(tree, [Column("größe", "field", "größe", ((EVER, TEXT),))]))
    assert '"größe"' in text_of(store)
    assert len(io.StringIO(text_of(store)).readlines()) > 20


def test_a_file_that_an_editor_saved_with_a_byte_order_mark_is_read(store: Clocked) -> None:
    tree, _ = begin(store)
    put(store, KEY, b"\xef\xbb\xbf" + text_of(store).encode())
    assert begin(store)[0] == tree
