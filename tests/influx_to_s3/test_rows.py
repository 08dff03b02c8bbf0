"""Rows in canonical form and the spool that digests them: identity and spilling."""

import random
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from itertools import permutations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.errors import Permanent
from app.core.ledger import Tally
from app.core.pipeline import Sums
from app.influx_to_s3.layout import EVER, INTEGER, MEASURED, Column
from app.influx_to_s3.reader import PointColumns
from app.influx_to_s3.row_batch import BLOCK_ROWS, RowBatch
from app.influx_to_s3.rows import ConflictingValue, canonical_table, merge_ordered, of_object
from app.object_store.table_sink import CSV_ROWS, LOST_TAGS
from influx_points import (
    COLUMNS,
    NOON,
    NOON_NS,
    UNKNOWN,
    columns_of,
    in_order,
    listed,
    points,
    rows,
    rows_in,
    spooled,
)


def digest_of(tables: Sequence[pa.Table], folder: Path, memory_rows: int = 0) -> str:
    with closing(spooled(tables, folder, memory_rows)) as batch:
        return batch.digest


def read(tables: Sequence[pa.Table], folder: Path, memory_rows: int = 0) -> list[dict[str, Any]]:
    with closing(spooled(tables, folder, memory_rows)) as batch:
        return listed(batch)


def test_measured_fields_are_floats_and_what_is_no_number_stands_beside_them_as_text() -> None:
    given = points(0, 1, 2, voltage=[1, 2, None], current=[True, False, None], power=["7.5", "broken", "+5"])
    table = canonical_table(given, columns_of())
    assert table.column("voltage").to_pylist() == [1.0, 2.0, None]
    assert table.schema.field("voltage").type == pa.float64()
    assert {"current", "power"}.isdisjoint(table.column_names)
    assert table.column("current_text").to_pylist() == ["true", "false", None]
    assert table.column("power_text").to_pylist() == ["7.5", "broken", "+5"]


@pytest.mark.parametrize(
    "text", ["", " 1", "1 ", "0x10", "1e", "--1", "NaN", "inf", "1,5", "1\n", "٣", ".", "1", "1e3"]
)
def test_text_in_a_measured_field_is_kept_as_it_is(text: str) -> None:
    table = canonical_table(points(0, voltage=[text]), columns_of())
    assert rows_in([table]) == [{"timestamp": 0, **UNKNOWN, "voltage_text": text}]


def test_fields_named_like_documented_columns_get_a_name_of_their_own() -> None:
    names = ("hour", "day_of_week", "is_weekend", "power_factor", "device_type", "location")
    fields: dict[str, Any] = {name: [1.5] for name in names}
    table = canonical_table(points(0, **fields), columns_of())
    expected = ["timestamp", "device_type", "location", *(f"{name}_field" for name in names)]
    assert sorted(table.column_names) == sorted(expected)
    assert rows_in([table]) == [{"timestamp": 0, **UNKNOWN, **{f"{name}_field": 1.5 for name in names}}]


def test_every_tag_is_a_column_unless_it_is_ignored() -> None:
    tags = {"location": "A", "firmware": "1.2", "voltage": "tag", "schema_version": "2"}
    table, others, twice = in_order([points(0, tags=tags, other=[1])], columns_of())
    assert rows_in([table]) == [
        {"timestamp": 0, **UNKNOWN, "location": "A", "firmware": "1.2", "voltage_tag": "tag", "other": 1}
    ]
    assert (list(others), dict(twice)) == ([], {})


def test_rows_that_differ_in_any_tag_are_rows_of_their_own_whatever_order_they_come_in() -> None:
    blocks = [
        points(5, 9, tags={"device_type": "b"}, voltage=[1.0, 2.0]),
        points(5, tags={"device_type": "a"}, power=[7.0], on=[True]),
        points(5, tags={"location": "L"}, voltage=[3.0], on=[False]),
        *(points(5, tags={"phase": phase}, voltage=[4.0]) for phase in ("L1", "L2", "L3")),
    ]
    expected = [
        {"timestamp": 5, "device_type": "a", "location": "unknown", "power": 7.0, "on": True},
        {"timestamp": 5, "device_type": "b", "location": "unknown", "voltage": 1.0},
        {"timestamp": 5, "device_type": "unknown", "location": "L", "voltage": 3.0, "on": False},
        *({"timestamp": 5, **UNKNOWN, "phase": phase, "voltage": 4.0} for phase in ("L1", "L2", "L3")),
        {"timestamp": 9, "device_type": "b", "location": "unknown", "voltage": 2.0},
    ]
    for order in list(permutations(blocks))[::13]:
        table, others, twice = in_order(order, columns_of())
        assert rows_in([table]) == expected
        assert (list(others), dict(twice)) == ([], {})


def versions(*numbers: str, **fields: Sequence[Any]) -> list[PointColumns]:
    """One point for each version of the schema, which is an ignored tag; the values of each field in that order."""
    columns = {name: pa.array(values) for name, values in fields.items()}
    return [
        points(0, tags={"schema_version": number}, **{name: column.slice(at, 1) for name, column in columns.items()})
        for at, number in enumerate(numbers)
    ]


def test_points_that_differ_in_ignored_tags_only_are_merged_field_by_field() -> None:
    blocks = versions("1", "2", "3", voltage=[1.5, None, None], power=[None, 7.0, None], note=[None, "x", "x"])
    for order in permutations(blocks):
        table, others, twice = in_order(order, columns_of())
        assert rows_in([table]) == [{"timestamp": 0, **UNKNOWN, "voltage": 1.5, "power": 7.0, "note": "x"}]
        assert (list(others), dict(twice)) == ([], {"note": 1})


def test_of_values_that_disagree_that_of_the_first_tag_set_stands_and_the_others_are_set_aside() -> None:
    blocks = versions("10", "2", "9", voltage=[2.5, 3.5, 2.5], note=[None, "b", "a"], on=[True, False, None])
    blocks.append(points(0, tags={"enrichment_status": "done", "schema_version": "99"}, voltage=[9.5]))
    for order in permutations(blocks):
        table, others, twice = in_order(order, columns_of())
        # enrichment_status=done,schema_version=99 comes before schema_version=10, which comes before =2 and =9
        assert rows_in([table]) == [{"timestamp": 0, **UNKNOWN, "voltage": 9.5, "note": "b", "on": True}]
        assert dict(twice) == {}
        assert {(each.field, each.value, each.tags["schema_version"]) for each in others} == {
            ("voltage", 2.5, "10"),
            ("voltage", 3.5, "2"),
            ("voltage", 2.5, "9"),
            ("note", "a", "9"),
            ("on", False, "2"),
        }
        assert len(others) == 5


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(["", "1", "10", "2"]),
            st.sampled_from(["", "a", "b"]),
            st.none() | st.sampled_from([1.5, 2.5]),
            st.none() | st.sampled_from(["x", "y", ""]),
        ),
        max_size=14,
        unique_by=lambda each: each[:3],
    ),
    st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_what_stands_and_what_is_set_aside_does_not_depend_on_the_order_of_blocks(
    given_points: list[tuple[int, str, str, float | None, str | None]], shuffler: random.Random
) -> None:
    def block(at: int, version: str, phase: str, voltage: float | None, note: str | None) -> PointColumns:
        tags = {name: text for name, text in (("schema_version", version), ("phase", phase)) if text}
        return points(at, tags=tags, voltage=pa.array([voltage], pa.float64()), note=pa.array([note], pa.string()))

    def result(order: list[tuple[int, str, str, float | None, str | None]]) -> Any:
        table, others, twice = in_order([block(*each) for each in order], columns_of())
        aside = sorted(
            (each.instant_ns, each.field, str(each.value), tuple(sorted(each.tags.items()))) for each in others
        )
        return rows_in([table]), aside, dict(twice)

    if not given_points:
        return
    shuffled = list(given_points)
    shuffler.shuffle(shuffled)
    found, aside, twice = result(given_points)
    assert result(shuffled) == (found, aside, twice)
    values = sum((each[3] is not None) + (each[4] is not None) for each in given_points)
    landed = sum(("voltage" in row) + ("note" in row) for row in found)
    assert values == landed + len(aside) + sum(twice.values())
    assert len(found) == len({(at, phase) for at, _, phase, _, _ in given_points})


def test_a_merged_batch_accounts_for_every_value_and_is_not_built_upon(tmp_path: Path) -> None:
    columns = columns_of()
    blocks = versions("1", "2", "3", voltage=[1.5, 2.5, 1.5], power=[None, 7.0, None])
    table, others, twice = in_order(blocks, columns)
    spool = RowBatch("D1", tmp_path, 0, columns)
    spool.append(table, {"voltage": Sums(3), "power": Sums(1)}, twice, others)
    with closing(spool.finish({}, {"voltage": 3, "power": 1})) as batch:
        assert batch.accounts == {
            "voltage": Tally(counted=3, read=3, new=1, already_there=1, set_aside=1),
            "power": Tally(counted=1, read=1, new=1),
        }
        assert list(batch.disagreements) == [ConflictingValue({"schema_version": "2"}, "voltage", 2.5, NOON_NS)]
        assert (batch.rows, batch.reusable) == (1, False)


def test_a_row_that_no_longer_reaches_the_spool_leaves_a_gap(tmp_path: Path) -> None:
    spool = RowBatch("D1", tmp_path, 0, COLUMNS)
    spool.append(rows(0, 1, voltage=[1.5, 2.5]), {"voltage": Sums(3)})
    with closing(spool.finish({}, {"voltage": 3})) as batch:
        assert batch.accounts["voltage"].gap == 1


def test_rows_that_come_between_counting_and_reading_are_counted_by_the_reading(tmp_path: Path) -> None:
    spool = RowBatch("D1", tmp_path, 0, COLUMNS)
    spool.append(rows(0, 1, voltage=[1.5, 2.5]), {"voltage": Sums(2)})
    with closing(spool.finish({}, {"voltage": 1})) as batch:
        assert batch.accounts == {"voltage": Tally(counted=2, read=2, new=2)}


def test_a_missing_tag_is_unknown(tmp_path: Path) -> None:
    blocks = [points(0, voltage=[1.0]), points(0, tags={"location": "L"}, power=[2.0])]
    batch = spooled([in_order(blocks, COLUMNS)[0]], tmp_path)
    assert listed(batch) == [
        {"timestamp": 0, "device_type": "unknown", "location": "L", "power": 2.0, "voltage": None},
        {"timestamp": 0, "device_type": "unknown", "location": "unknown", "power": None, "voltage": 1.0},
    ]


def test_a_field_that_ends_in_first_keeps_its_name_when_rows_are_merged() -> None:
    table, _, _ = in_order(versions("1", "2", x=[None, 2], x_first=[1, None]), columns_of())
    assert rows_in([table]) == [{"timestamp": 0, **UNKNOWN, "x": 2, "x_first": 1}]


def test_a_type_is_decided_once_and_other_values_stand_beside_it(tmp_path: Path) -> None:
    columns = columns_of()
    blocks = [points(at, extra=[value]) for at, value in enumerate([1, 2.5, "x", 3, True, 4.0])]
    tables = [canonical_table(block, columns) for block in blocks]
    with closing(spooled(tables, tmp_path, columns=columns)) as batch:
        assert [column.type for column in batch.schema][-3:] == [pa.int64(), pa.float64(), pa.string()]
        found = [{k: v for k, v in row.items() if k.startswith("extra") and v is not None} for row in listed(batch)]
    assert found == [
        {"extra": 1},
        {"extra_double": 2.5},
        {"extra_text": "x"},
        {"extra": 3},
        {"extra_text": "true"},
        {"extra": 4},  # the same number, so nothing is lost
    ]


def test_types_that_drift_from_block_to_block_change_no_column(tmp_path: Path) -> None:
    many = range(BLOCK_ROWS)
    columns = columns_of()
    tables = [
        canonical_table(block, columns)
        for block in (
            points(*many, extra=list(many)),
            points(*(BLOCK_ROWS + n for n in many), extra=[n / 2 for n in many]),
            points(2 * BLOCK_ROWS, extra=["x"]),
        )
    ]
    for memory_rows in (0, 10**6):
        found = read(tables, tmp_path, memory_rows)
        assert (found[7]["extra"], found[BLOCK_ROWS + 1]["extra_double"], found[-1]["extra_text"]) == (7, 0.5, "x")
        assert found[BLOCK_ROWS + 4]["extra"] == 2


def test_the_digest_of_drifting_types_does_not_depend_on_the_cutting(tmp_path: Path) -> None:
    columns = columns_of()
    ints = canonical_table(points(*range(20_000), extra=list(range(20_000))), columns)
    floats = canonical_table(points(*range(20_000, 40_000), extra=[n / 2 for n in range(20_000)]), columns)
    texts = canonical_table(points(40_000, extra=["x"]), columns)
    together = merge_ordered([ints, floats], columns)[0]
    pieces = [
        [ints, floats],
        [together],
        [ints.slice(0, 7), ints.slice(7), floats.slice(0, 13_000), floats.slice(13_000)],
    ]
    assert len({digest_of(tables, tmp_path) for tables in pieces}) == 1
    whole = merge_ordered([ints, floats, texts], columns)[0]
    assert len({digest_of(tables, tmp_path) for tables in ([ints, floats, texts], [whole])}) == 1


def test_a_boolean_or_text_that_is_sometimes_missing_is_digested(tmp_path: Path) -> None:
    digests = {
        spooled([rows(0, 1, on=pa.array(on, pa.bool_()), note=pa.array(note, pa.string()))], tmp_path).digest
        for on, note in (
            ([True, None], ["a", None]),
            ([True, False], ["a", None]),
            ([True, None], ["a", ""]),
            ([None, True], ["a", None]),
            ([True, None], [None, "a"]),
        )
    }
    assert len(digests) == 5


def test_every_change_of_a_value_a_name_or_a_time_changes_the_digest(tmp_path: Path) -> None:
    base: dict[str, Any] = {"a": [1, 2], "b": ["x", "yz"], "c": [0.5, None]}
    variants = [
        rows(0, 1, **base),
        rows(0, 2, **base),
        rows(0, 1, **{**base, "a": [1, 3]}),
        rows(0, 1, **{**base, "a": [1.0, 2.0]}),
        rows(0, 1, **{**base, "b": ["xy", "z"]}),
        rows(0, 1, **{**base, "c": [None, 0.5]}),
        rows(0, 1, A=base["a"], b=base["b"], c=base["c"]),
        rows(0, 1, **base, location=["L", "L"]),
        rows(0, **{name: column[:1] for name, column in base.items()}),
    ]
    assert len({spooled([table], tmp_path).digest for table in variants}) == len(variants)


def test_a_column_without_any_value_does_not_count(tmp_path: Path) -> None:
    nothing = pa.nulls(2, pa.float64())
    with_empty = spooled([rows(0, 1, a=[1, 2], gone=nothing)], tmp_path)
    without = spooled([rows(0, 1, a=[1, 2])], tmp_path)
    assert with_empty.digest == without.digest
    assert with_empty.schema == without.schema


def test_no_rows_make_a_batch_too(tmp_path: Path) -> None:
    batch = spooled([], tmp_path)
    assert (batch.rows, batch.min_at, batch.max_at, batch.reusable, list(batch.output())) == (0, None, None, False, [])
    assert batch.has_all_tags
    assert len(batch.identities) == 0


def test_values_are_accounted_for_by_the_names_that_fields_have_at_the_source(tmp_path: Path) -> None:
    columns = columns_of()
    with closing(spooled([canonical_table(points(0, hour=[7]), columns)], tmp_path, columns=columns)) as batch:
        assert batch.accounts == {"hour": Tally(new=1)}


def test_rows_that_are_not_later_are_refused(tmp_path: Path) -> None:
    spool = RowBatch("D1", tmp_path, 0, COLUMNS)
    spool.append(rows(5, a=[1]))
    with pytest.raises(ValueError, match="out of order"):
        spool.append(rows(5, a=[1]))


def many_rows(number: int) -> pa.Table:
    draw = random.Random(7)  # noqa: S311 - rows are no secret
    return rows(
        *range(number),
        voltage=[draw.random() for _ in range(number)],
        count=[None if n % 7 == 0 else n for n in range(number)],
        note=[None if n % 5 else f"é{n}" for n in range(number)],
        on=[None if n % 3 == 0 else n % 2 == 0 for n in range(number)],
        location=["L" if n % 2 else None for n in range(number)],
    )


def test_spilling_changes_neither_rows_nor_digest_and_leaves_no_file(tmp_path: Path) -> None:
    table = many_rows(3 * BLOCK_ROWS + 17)
    in_memory = spooled([table], tmp_path / "a", memory_rows=10**6)
    spilled = spooled([table.slice(0, 10), table.slice(10)], tmp_path / "b", memory_rows=0)
    assert (in_memory.reusable, spilled.reusable) == (False, True)
    assert spilled.digest == in_memory.digest
    assert listed(spilled) == listed(in_memory)
    assert listed(spilled) == listed(in_memory)  # and once more: a batch can be read again
    assert spilled.blocks == []
    assert list((tmp_path / "b").iterdir()) == []
    spilled.close()
    spilled.close()
    assert list((tmp_path / "b").iterdir()) == []


@given(st.lists(st.integers(1, 9000), max_size=12), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_the_digest_does_not_depend_on_the_cutting(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    pieces, at = [], 0
    for size in sizes:
        pieces.append(TABLE.slice(at, size))
        at += size
    pieces.append(TABLE.slice(at))
    shuffled = list(TABLE.column_names)[1:]
    random.Random(seed).shuffle(shuffled)  # noqa: S311 - an order is no secret
    batch = spooled([piece.select(["timestamp", *shuffled]) for piece in pieces], folder)
    assert batch.digest == digest_of([TABLE], folder, 10**6)
    batch.close()


TABLE = many_rows(BLOCK_ROWS + 5000)


def test_rows_read_back_from_an_object_lose_what_was_computed_and_keep_renamed_fields(tmp_path: Path) -> None:
    columns = columns_of()
    given = points(0, tags={"location": "L", "phase": "L1", "hour": "late"}, hour=[9], voltage=[1.5], count=["x"])
    batch = spooled([canonical_table(given, columns)], tmp_path, columns=columns)
    [written] = list(batch.output())
    back = of_object(written, columns)
    assert rows_in([back]) == [
        {
            "timestamp": 0,
            "device_type": "unknown",
            "location": "L",
            "phase": "L1",
            "hour_tag": "late",
            "hour_field": 9,
            "voltage": 1.5,
            "count": "x",
        }
    ]
    bare = back.drop_columns([n for n in MEASURED if n != "voltage"])
    assert spooled([bare], tmp_path, columns=columns).digest == batch.digest


def test_values_of_an_object_of_another_type_stand_beside_the_column_of_today() -> None:
    """A tree in which files of an older version have `count` as integer, as double and as text."""
    columns = columns_of()
    columns.see((), {"count": "integer"})
    for values, expected in (
        (pa.array([1.0, 2.5]), [{"count": 1}, {"count_double": 2.5}]),
        (pa.array(["1", "x"]), [{"count_text": "1"}, {"count_text": "x"}]),
        (pa.array([True, None]), [{"count_text": "true"}, {}]),
        (pa.array([7, -8]), [{"count": 7}, {"count": -8}]),
    ):
        back = of_object(rows(0, 1, device_type=["p", "p"], location=["L", "L"], count=values), columns)
        assert [{k: v for k, v in row.items() if k.startswith("count")} for row in rows_in([back])] == expected


def test_a_column_that_only_objects_of_an_older_version_have_keeps_its_name() -> None:
    columns = columns_of()
    back = of_object(rows(0, old=[1.5], hour_field=[3]), columns)
    assert rows_in([back]) == [{"timestamp": 0, **UNKNOWN, "old": 1.5, "hour_field": 3}]
    assert rows_in([canonical_table(points(0, old=[2.5]), columns)]) == [{"timestamp": 0, **UNKNOWN, "old": 2.5}]


def test_what_a_csv_object_of_an_older_version_holds_is_guessed_and_never_refused() -> None:
    columns = columns_of(Column("count", "field", "count", ((EVER, INTEGER),)))
    texts = ["5", "-0.5", "007", "broken", "true", None]
    older = rows(*range(6), count=texts).replace_schema_metadata({**CSV_ROWS, **LOST_TAGS})
    found = rows_in([of_object(older, columns)])
    names = ("count", "count_double", "count_text")
    assert [[row.get(name) for name in names if row.get(name) is not None] for row in found] == [
        [5], [-0.5], ["007"], ["broken"], ["true"], [],
    ]  # fmt: skip
    with pytest.raises(Permanent, match="holds text where integer is expected"):
        of_object(older.replace_schema_metadata(CSV_ROWS), columns)


def test_an_object_of_an_older_version_is_read_in_the_types_that_its_columns_have_now() -> None:
    columns = columns_of(Column("count", "field", "count", ((EVER, INTEGER),)))
    older = rows(0, 1, count=[5.0, 0.5], hour=[12, 12]).replace_schema_metadata(LOST_TAGS)
    assert rows_in([of_object(older, columns)]) == [
        {"timestamp": 0, **UNKNOWN, "count": 5},
        {"timestamp": 1, **UNKNOWN, "count_double": 0.5},
    ]


def test_an_instant_with_nanoseconds_is_cut_to_microseconds_for_the_record(tmp_path: Path) -> None:
    batch = spooled([rows(1_999, 5_000_001, a=[1, 2])], tmp_path)
    assert batch.min_at == NOON + timedelta(microseconds=1)
    assert batch.max_at == datetime(2026, 2, 7, 12, 0, 0, 5000, tzinfo=UTC)


def test_rows_that_are_few_but_fat_are_spilled_and_come_back_as_they_were(tmp_path: Path) -> None:
    tables = [
        rows(*range(number * BLOCK_ROWS, (number + 1) * BLOCK_ROWS), note=[text] * BLOCK_ROWS)
        for number, text in enumerate(["x" * 2100, "x" * 2100, "y"])
    ]
    with closing(spooled(tables, tmp_path, memory_rows=10**9)) as batch:
        assert batch.reusable
        assert [table.num_rows for table in batch.tables()] == [BLOCK_ROWS] * 3
        assert [table.column("note")[0].as_py()[0] for table in batch.tables()] == ["x", "x", "y"]
