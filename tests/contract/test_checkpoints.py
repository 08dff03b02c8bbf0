"""Every sentence of the `Checkpoints` contract, over memory, SQLite and PostgreSQL."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest

from app.core.errors import LeaseLost, Rejected
from app.core.pipeline import FOREIGN, MISSING, Checkpoints, Commit, Record, Sums
from app.core.runs import Lease, Leases
from app.core.windows import Window
from app.db.state import State
from memory import MemoryCheckpoints, MemoryLeases

HOUR = timedelta(hours=1)
START = datetime(2026, 2, 7, tzinfo=UTC)
END = START + timedelta(days=1)
PIPELINE = "influx_to_s3"


@dataclass(frozen=True, slots=True)
class Store:
    checkpoints: Checkpoints
    leases: Leases

    def lease(self, owner: str = "one", ttl_seconds: float = 30.0) -> Lease:
        lease = self.leases.acquire(PIPELINE, owner, ttl_seconds)
        assert lease is not None
        return lease

    def commit(self, commit: Commit, lease: Lease, partition: str = "d1") -> None:
        self.checkpoints.commit(PIPELINE, partition, commit, lease)

    def records(self, partition: str = "d1") -> list[Record]:
        return list(self.checkpoints.records(PIPELINE, partition, START, END))


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def store(request: pytest.FixtureRequest, new_state: Callable[[str], State]) -> Store:
    if request.param == "memory":
        leases = MemoryLeases()
        return Store(MemoryCheckpoints(leases), leases)
    state = new_state(request.param)
    return Store(state.checkpoints, state.leases)


@pytest.fixture(params=["sqlite", "postgres"])
def state(request: pytest.FixtureRequest, new_state: Callable[[str], State]) -> State:
    return new_state(request.param)


def record(hour: int, part: int = 0) -> Record:
    start = START + hour * HOUR
    return Record(
        window=Window(start, start + HOUR),
        part=part,
        key=f"telemetry/device_id=d1/export_{hour:02}000{part}.parquet",
        version=f'"etag-{hour}-{part}"',
        digest="ab" * 32,
        rows=2**33,
        size_bytes=2**34,
        source_cells=2**35,
        min_at=start + timedelta(microseconds=1),
        max_at=start + timedelta(minutes=59, microseconds=999_999),
        closed=False,
    )


def test_nothing_is_known_of_a_new_pipeline(store: Store) -> None:
    assert dict(store.checkpoints.cursors(PIPELINE)) == {}
    assert store.records() == []


def test_a_commit_stores_records_and_cursor_as_they_are(store: Store) -> None:
    store.commit(Commit([record(1), replace(record(2), closed=True)], START + HOUR), store.lease())
    assert store.records() == [record(1), replace(record(2), closed=True)]
    assert dict(store.checkpoints.cursors(PIPELINE)) == {"d1": START + HOUR}


def test_a_record_keeps_how_many_values_of_each_field_the_object_holds(store: Store) -> None:
    fields = {"voltage": 2**40, 'a,b=c "d"': 1, "é\n": 2, "\x01": 3, "": 4}
    store.commit(Commit([replace(record(1), fields=fields), record(2)]), store.lease())
    assert [found.fields for found in store.records()] == [fields, {}]


def test_a_record_that_was_read_can_be_stored_again(store: Store) -> None:
    store.commit(Commit((replace(record(1), fields={"voltage": 2}),)), store.lease())
    [read] = store.records()
    store.commit(Commit((replace(read, source_cells=3),)), store.lease())
    assert store.records() == [replace(read, source_cells=3)]


def test_a_record_keeps_what_the_values_of_the_source_came_to(store: Store) -> None:
    sums = {
        "voltage": Sums(3, -0.1, -5.5, 2**53 + 1, 1e300),
        "note": Sums(7),
        'a,b="\ud800"': Sums(1, 5.0, 5, 5.0, 5.0),
        "huge": Sums(2, math.inf, 1.5e308, 1.5e308, math.inf),
    }
    fields = {name: each.values for name, each in sums.items()}
    written = [replace(record(1), sums=sums), record(2), replace(record(3), sums=sums, fields=fields)]
    store.commit(Commit(written), store.lease())
    assert [(found.sums, found.fields) for found in store.records()] == [(sums, {}), ({}, {}), (sums, fields)]


def test_a_record_does_not_store_the_same_twice(state: State) -> None:
    store = Store(state.checkpoints, state.leases)
    sums = {"voltage": Sums(3, 9.5, 1.0, 5.0, 9.5), "power": Sums(3, -1.0, -5.0, 2.0, 9.0), "note": Sums(7)}
    fields = {name: each.values for name, each in sums.items()}
    one = replace(record(1), fields=fields, sums=sums, source_digest=record(1).digest)
    other = replace(record(2), fields={"voltage": 3}, source_digest="cd" * 32)
    store.commit(Commit([one, other]), store.lease())
    with state.database.transaction() as session:
        rows = session.stream(
            "SELECT source_fields, source_digest, source_sums FROM export_windows ORDER BY window_start"
        )
        assert [tuple(row) for row in rows] == [
            ("=", "=", '{"voltage":[3,9.5,1.0,5.0],"power":[3,-1.0,-5.0,2.0,9.0],"note":[7]}'),
            ('{"voltage":3}', "cd" * 32, ""),
        ]
    assert store.records() == [one, other]


def test_what_the_version_before_stored_is_read_as_it_is(state: State) -> None:
    store = Store(state.checkpoints, state.leases)
    lease = store.lease()
    store.commit(Commit([record(1)]), lease)
    texts = {
        "fields": '{"voltage":3,"note":7}',
        "sums": '{"voltage":[3,9.5,1.0,5.0,9.5],"note":[7]}',
        "digest": "ab" * 32,
    }
    day = {"pipeline": PIPELINE, "day_at": START, "windows": '{"0":5,"7200":2}'}
    with state.database.transaction() as session:
        session.run(
            "UPDATE export_windows SET source_fields = :fields, source_sums = :sums, source_digest = :digest", **texts
        )
        session.run("INSERT INTO export_days VALUES (:pipeline, 'd1', :day_at, :windows)", **day)
    (found,) = store.records()
    assert (found.fields, found.sums, found.source_digest) == (
        {"voltage": 3, "note": 7},
        {"voltage": Sums(3, 9.5, 1.0, 5.0, 9.5), "note": Sums(7)},
        "ab" * 32,
    )
    known = {START: 5, START + 2 * HOUR: 2}
    assert state.checkpoints.retired(PIPELINE, "d1", Window(START, END)) == known
    store.commit(Commit([replace(record(1), closed=True)]), lease)
    assert state.checkpoints.retire(PIPELINE, "d1", END, END, lease) == 1
    assert state.checkpoints.retired(PIPELINE, "d1", Window(START, END)) == {**known, START + HOUR: 2**33}


def test_a_mark_says_what_a_listing_showed_of_that_very_version(store: Store) -> None:
    lease = store.lease()
    store.commit(Commit([record(1), record(2), record(3)]), lease)
    newer = replace(record(3), version="newer")
    store.commit(Commit([newer]), lease)
    marks = [(record(1), MISSING), (record(2), FOREIGN), (record(3), MISSING), (record(4), MISSING)]
    store.checkpoints.mark(PIPELINE, "d1", marks)
    assert [found.trouble for found in store.records()] == [MISSING, FOREIGN, ""]
    store.checkpoints.mark(PIPELINE, "d1", [(record(2), "")])
    store.commit(Commit([replace(record(1), trouble=MISSING)]), lease)
    assert store.records() == [record(1), record(2), newer], "what is stored again is well"


def test_troubles_are_counted_by_pipeline_and_what_they_are(state: State) -> None:
    store = Store(state.checkpoints, state.leases)
    store.commit(Commit([record(1), record(2), record(3)]), store.lease())
    assert state.checkpoints.troubles() == {}
    state.checkpoints.mark(PIPELINE, "d1", [(record(1), MISSING), (record(2), MISSING), (record(3), FOREIGN)])
    assert state.checkpoints.troubles() == {PIPELINE: {MISSING: 2, FOREIGN: 1}}


def test_what_could_not_be_deleted_is_known_until_it_is_gone(state: State) -> None:
    for error in ("AccessDenied", "locked"):
        state.checkpoints.note_undeleted(PIPELINE, "a/1", error)
    state.checkpoints.note_undeleted(PIPELINE, "a/2", "locked")
    state.checkpoints.note_undeleted("another", "a/3", "locked")
    assert state.checkpoints.undeleted(PIPELINE) == {"a/1": "locked", "a/2": "locked"}
    state.checkpoints.note_undeleted(PIPELINE, "a/1", "")
    state.checkpoints.note_undeleted(PIPELINE, "a/9", "")
    assert state.checkpoints.undeleted(PIPELINE) == {"a/2": "locked"}


def test_a_record_of_an_empty_object_has_no_event_times(store: Store) -> None:
    empty = replace(record(1), rows=0, min_at=None, max_at=None)
    store.commit(Commit([empty]), store.lease())
    assert store.records() == [empty]


def test_instants_come_back_aware_and_in_utc(store: Store) -> None:
    store.commit(Commit([record(1)], START), store.lease())
    found = store.records()[0]
    instants = [found.window.start, found.window.end, found.min_at, found.max_at]
    instants.extend(store.checkpoints.cursors(PIPELINE).values())
    assert [instant.utcoffset() for instant in instants if instant] == [timedelta(0)] * 5


def test_committing_the_same_again_changes_nothing(store: Store) -> None:
    lease, commit = store.lease(), Commit([record(1)], START + HOUR)
    store.commit(commit, lease)
    store.commit(commit, lease)
    assert store.records() == [record(1)]
    assert dict(store.checkpoints.cursors(PIPELINE)) == {"d1": START + HOUR}


def test_a_later_record_of_the_same_part_replaces_the_earlier_one(store: Store) -> None:
    lease, newer = store.lease(), replace(record(1), version='"new"', rows=7, closed=True, folded=3)
    store.commit(Commit([record(1)]), lease)
    store.commit(Commit([newer]), lease)
    assert store.records() == [newer]


def test_records_come_by_window_start_then_part(store: Store) -> None:
    shuffled = [record(2, 1), record(1), record(2), record(1, 2), record(1, 1)]
    store.commit(Commit(shuffled), store.lease())
    assert store.records() == [record(1), record(1, 1), record(1, 2), record(2), record(2, 1)]


def test_records_of_an_interval_start_in_it_and_its_end_is_not_part_of_it(store: Store) -> None:
    store.commit(Commit([record(hour) for hour in range(5)]), store.lease())
    found = store.checkpoints.records(PIPELINE, "d1", START + HOUR, START + 3 * HOUR)
    assert list(found) == [record(1), record(2)]


def test_live_records_are_those_of_all_partitions_or_of_some(store: Store) -> None:
    lease, names = store.lease(), ("d1", "a,b=\"c\" 'ü'", "d3")
    records = [record(1), replace(record(2), fields={"é": 2}), record(3)]
    store.checkpoints.commit_all(PIPELINE, [(name, Commit(records)) for name in names], lease)
    since = records[1].window.start
    assert store.checkpoints.live_records(PIPELINE, since) == dict.fromkeys(names, records[1:])
    assert store.checkpoints.live_records(PIPELINE, since, names[1:2]) == {names[1]: records[1:]}
    assert not any(store.checkpoints.live_records(PIPELINE, records[2].window.end, names).values())


def test_pipelines_and_partitions_do_not_touch_each_other(store: Store) -> None:
    lease = store.lease()
    store.commit(Commit([record(1)], START), lease, "d1")
    store.commit(Commit([record(2)], END), lease, "d2")
    store.checkpoints.commit("other", "d1", Commit(cursor_at=END), lease)
    assert store.records("d1") == [record(1)]
    assert store.records("d2") == [record(2)]
    assert dict(store.checkpoints.cursors(PIPELINE)) == {"d1": START, "d2": END}
    assert dict(store.checkpoints.cursors("other")) == {"d1": END}


@pytest.mark.parametrize("partition", ["", "a'b\"c;--", "100%s", ":name", "gerät/日本", "back\\slash", " lead"])
def test_any_text_names_a_partition(store: Store, partition: str) -> None:
    store.commit(Commit([record(1)], START), store.lease(), partition)
    assert dict(store.checkpoints.cursors(PIPELINE)) == {partition: START}
    assert store.records(partition) == [record(1)]


def test_a_cursor_never_moves_back(store: Store) -> None:
    lease = store.lease()
    store.commit(Commit(cursor_at=START + 2 * HOUR), lease)
    store.commit(Commit(cursor_at=START + HOUR), lease)
    assert dict(store.checkpoints.cursors(PIPELINE)) == {"d1": START + 2 * HOUR}


def test_the_start_is_the_first_cursor_and_stays(store: Store) -> None:
    lease = store.lease()
    store.commit(Commit([record(1)]), lease)
    assert dict(store.checkpoints.starts(PIPELINE)) == {}
    for hours in (1, 2):
        store.commit(Commit(cursor_at=START + hours * HOUR), lease)
    assert dict(store.checkpoints.starts(PIPELINE)) == {"d1": START + HOUR}


def test_a_commit_without_a_cursor_leaves_it_where_it_is(store: Store) -> None:
    lease = store.lease()
    store.commit(Commit([record(1)]), lease)
    assert dict(store.checkpoints.cursors(PIPELINE)) == {}
    store.commit(Commit(cursor_at=START), lease)
    store.commit(Commit([record(2)]), lease)
    assert dict(store.checkpoints.cursors(PIPELINE)) == {"d1": START}


def test_a_commit_under_an_expired_lease_is_refused_whole(store: Store) -> None:
    lease = store.lease(ttl_seconds=0.1)
    time.sleep(0.15)
    with pytest.raises(LeaseLost, match=PIPELINE):
        store.commit(Commit([record(1)], START), lease)
    assert store.records() == []
    assert dict(store.checkpoints.cursors(PIPELINE)) == {}


def test_a_commit_under_a_lease_that_was_taken_over_is_refused(store: Store) -> None:
    paused = store.lease("one", ttl_seconds=0.1)
    time.sleep(0.15)
    holder = store.lease("two")
    store.commit(Commit([record(1)], START), holder)
    with pytest.raises(LeaseLost):
        store.commit(Commit([replace(record(1), version='"old"')], END), paused)
    assert store.records() == [record(1)]
    assert dict(store.checkpoints.cursors(PIPELINE)) == {"d1": START}


def test_a_commit_under_an_old_generation_of_the_same_owner_is_refused(store: Store) -> None:
    older, newer = store.lease(), store.lease()
    with pytest.raises(LeaseLost):
        store.commit(Commit([record(1)]), older)
    store.commit(Commit([record(1)]), newer)


def test_a_commit_under_a_lease_that_nobody_ever_acquired_is_refused(store: Store) -> None:
    store.lease()
    foreign = Lease("unknown", "one", 1, END + timedelta(days=9999))
    with pytest.raises(LeaseLost):
        store.commit(Commit([record(1)]), foreign)


def test_a_commit_under_a_renewed_lease_is_taken_whichever_copy_of_it_is_shown(store: Store) -> None:
    lease = store.lease(ttl_seconds=0.6)
    store.leases.renew(lease, 30.0)
    time.sleep(0.65)
    store.commit(Commit([record(1)]), lease)
    assert store.records() == [record(1)]


def test_a_failure_keeps_cursor_and_records(store: Store) -> None:
    lease = store.lease()
    store.commit(Commit([record(1)], START), lease)
    store.checkpoints.fail(PIPELINE, "d1", "the source answered 500", lease)
    assert store.records() == [record(1)]
    assert dict(store.checkpoints.cursors(PIPELINE)) == {"d1": START}


def test_a_failure_gives_no_cursor_to_a_partition_that_has_none(store: Store) -> None:
    store.checkpoints.fail(PIPELINE, "d1", "no", store.lease())
    assert dict(store.checkpoints.cursors(PIPELINE)) == {}


def test_a_failure_under_a_lost_lease_is_refused(store: Store) -> None:
    older = store.lease()
    store.lease()
    with pytest.raises(LeaseLost):
        store.checkpoints.fail(PIPELINE, "d1", "no", older)


def test_a_commit_that_fails_half_way_stores_nothing(state: State) -> None:
    lease = state.leases.acquire(PIPELINE, "one", 30.0)
    assert lease
    with pytest.raises(Rejected):
        state.checkpoints.commit(PIPELINE, "d1", Commit([record(1), replace(record(2), rows=2**70)], START), lease)
    assert list(state.checkpoints.records(PIPELINE, "d1", START, END)) == []
    assert dict(state.checkpoints.cursors(PIPELINE)) == {}


@pytest.mark.parametrize("partition", ["a\x00b", "a\ud800b"])
def test_a_partition_that_no_database_stores_is_rejected_by_name(state: State, partition: str) -> None:
    lease = state.leases.acquire(PIPELINE, "one", 30.0)
    assert lease
    with pytest.raises(Rejected, match="partition"):
        state.checkpoints.commit(PIPELINE, partition, Commit(cursor_at=START), lease)


def test_a_checkpoint_shows_cursor_watermark_last_object_and_error_until_the_next_commit(state: State) -> None:
    lease = state.leases.acquire(PIPELINE, "one", 30.0)
    assert lease
    state.checkpoints.commit(PIPELINE, "", Commit(cursor_at=START), lease)
    state.checkpoints.commit(PIPELINE, "d1", Commit([record(2), record(1)], START), lease)
    state.checkpoints.commit(PIPELINE, "d1", Commit([replace(record(1), rows=5)]), lease)
    state.checkpoints.fail(PIPELINE, "d1", "broken \x00", lease)
    (failed,) = state.checkpoints.of(PIPELINE)
    assert (failed.partition, failed.cursor_at, failed.error) == ("d1", START, r"broken \x00")
    assert failed.high_watermark_at == record(2).max_at
    assert (failed.key, failed.rows) == (record(1).key, 5)
    state.checkpoints.commit(PIPELINE, "d1", Commit(), lease)
    (well,) = state.checkpoints.of(PIPELINE)
    assert (well.cursor_at, well.error) == (START, "")
    assert well.updated_at >= failed.updated_at


def committed(state: State, *commits: Commit) -> None:
    lease = state.leases.acquire(PIPELINE, "one", 30.0)
    assert lease
    for each in commits:
        state.checkpoints.commit(PIPELINE, "d1", each, lease)


def test_a_cursor_of_a_clock_that_was_ahead_is_the_newest_window_with_a_record(state: State) -> None:
    ahead_at = datetime.now(UTC) + timedelta(days=40)
    committed(state, Commit((record(1), record(3)), START), Commit((), ahead_at))
    assert state.checkpoints.cursors(PIPELINE) == {"d1": START + 3 * HOUR}
    assert state.clocks.ahead_seconds().keys() == {PIPELINE}
    committed(state, Commit((), START + 4 * HOUR))
    assert state.checkpoints.cursors(PIPELINE) == {"d1": START + 4 * HOUR}
    assert state.clocks.ahead_seconds() == {}
    committed(state, Commit((), START + 2 * HOUR))
    assert state.checkpoints.cursors(PIPELINE) == {"d1": START + 4 * HOUR}, "one that is in order moves on only"


def test_the_cursor_of_one_partition_is_read_alone(state: State) -> None:
    committed(state, Commit((), START))
    lease = state.leases.acquire("other", "one", 30.0)
    assert lease
    state.checkpoints.commit(PIPELINE, "d2", Commit((), START + HOUR), lease)
    assert state.checkpoints.cursors(PIPELINE, "d2") == {"d2": START + HOUR}
    assert state.checkpoints.cursors(PIPELINE, "d3") == {}
    assert state.checkpoints.cursors(PIPELINE) == {"d1": START, "d2": START + HOUR}


def test_a_cursor_ahead_of_now_without_any_record_is_the_first_start_and_is_none_without_that(state: State) -> None:
    ahead_at = datetime.now(UTC) + timedelta(days=40)
    committed(state, Commit((), START), Commit((), ahead_at))
    assert state.checkpoints.cursors(PIPELINE) == {"d1": START}
    lease = state.leases.acquire("other", "one", 30.0)
    assert lease
    state.checkpoints.commit("other", "d1", Commit((), ahead_at), lease)
    assert state.checkpoints.cursors("other") == state.checkpoints.starts("other") == {}
    state.checkpoints.commit("other", "d1", Commit((), START), lease)
    assert state.checkpoints.cursors("other") == state.checkpoints.starts("other") == {"d1": START}


def test_a_newest_event_that_lies_ahead_of_now_gives_way_to_the_next_one(state: State) -> None:
    ahead_at = datetime.now(UTC) + timedelta(days=40)
    committed(state, Commit((replace(record(1), max_at=ahead_at),)), Commit((record(2),)))
    assert [each.high_watermark_at for each in state.checkpoints.of(PIPELINE)] == [record(2).max_at]


def test_a_window_that_has_not_ended_is_not_closed_whatever_a_clock_said_that_was_ahead(state: State) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    going_on = replace(record(1), window=Window(hour + HOUR, hour + 2 * HOUR), closed=True)
    over = replace(record(1), window=Window(hour - HOUR, hour), closed=True)
    committed(state, Commit((over, going_on)))
    found = state.checkpoints.records(PIPELINE, "d1", hour - HOUR, hour + 2 * HOUR)
    assert [each.closed for each in found] == [True, False]


def test_what_a_clock_recorded_that_was_ahead_is_neither_closed_nor_a_cursor(state: State) -> None:
    ahead_at = datetime.now(UTC) + timedelta(days=40)
    committed(state, Commit([replace(record(hour), closed=True) for hour in (1, 3)], START))
    with state.database.transaction() as session:  # as its commit did then
        session.run(
            "UPDATE export_windows SET updated_at = :ahead_at WHERE window_start > :after_at",
            ahead_at=ahead_at,
            after_at=START + 2 * HOUR,
        )
    committed(state, Commit((), ahead_at))
    assert state.checkpoints.cursors(PIPELINE) == {"d1": START + HOUR}
    found = state.checkpoints.records(PIPELINE, "d1", START, START + 4 * HOUR)
    assert [each.closed for each in found] == [True, False]


def test_closed_windows_of_whole_days_are_forgotten_and_the_days_are_known(state: State) -> None:
    old, young = replace(record(1), closed=True), replace(record(26), closed=True)
    troubled, with_delta = replace(record(2), closed=True), replace(record(3), closed=True)
    committed(state, Commit((old, troubled, with_delta, record(3, part=1), record(4), young), START + 30 * HOUR))
    state.checkpoints.mark(PIPELINE, "d1", [(troubled, MISSING)])
    lease = state.leases.acquire(PIPELINE, "one", 30.0)
    assert lease is not None
    assert state.checkpoints.retire(PIPELINE, "d1", START + 50 * HOUR, START + 27 * HOUR, lease) == 2
    assert state.checkpoints.retire(PIPELINE, "d1", START + 50 * HOUR, START + 27 * HOUR, lease) == 0
    left = state.checkpoints.records(PIPELINE, "d1", START, START + 99 * HOUR)
    assert [(each.window.start - START) // HOUR for each in left] == [2, 3, 3, 4]
    span = Window(START + HOUR, START + 30 * HOUR)
    assert state.checkpoints.retired(PIPELINE, "d1", span) == {START + HOUR: 2**33, START + 26 * HOUR: 2**33}
    assert state.checkpoints.retired(PIPELINE, "d2", span) == {}
    state.checkpoints.commit(PIPELINE, "d1", Commit((replace(record(4), closed=True), replace(old, rows=7))), lease)
    assert state.checkpoints.retire(PIPELINE, "d1", START + 50 * HOUR, START + 27 * HOUR, lease) == 2
    found = state.checkpoints.retired(PIPELINE, "d1", Window(START, START + HOUR))
    assert found == {START + HOUR: 7, START + 4 * HOUR: 2**33}, "windows that were recorded again are among them once"
    with state.pages.look() as look:
        asked = [(25, 26), (26, 27), (47, 48), (48, 60)]
        spans = [(START + first * HOUR, START + last * HOUR) for first, last in asked]
        assert [look.any_rows(PIPELINE, *each) for each in spans] == [True, True, True, False]
        assert [look.any_rows(PIPELINE, *each, ("d1", "d1")) for each in spans] == [True, True, True, False]
        assert not look.any_rows(PIPELINE, *spans[0], ("d2", "d3"))


def test_a_cursor_of_a_clock_that_was_ahead_is_the_newest_day_of_which_windows_were_forgotten(state: State) -> None:
    committed(state, Commit((replace(record(26), closed=True),), START), Commit((), datetime.now(UTC) + 960 * HOUR))
    lease = state.leases.acquire(PIPELINE, "one", 30.0)
    assert lease is not None
    state.checkpoints.retire(PIPELINE, "d1", START + 72 * HOUR, START + 72 * HOUR, lease)
    assert state.checkpoints.cursors(PIPELINE) == {"d1": START + 24 * HOUR}
