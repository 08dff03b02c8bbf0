"""Rows in canonical form and the spool that digests them: merging, drifting types, union and missing, spilling."""

import random
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.ports import Count
from app.core.retry import RetryPolicy
from app.core.runs import Stop
from app.core.window import Window
from app.influx_to_s3.rows import MEASURED, canonical, of_object, ordered, united
from app.influx_to_s3.source import InfluxSource, Patience, Reading, before, bucket_seconds, first_change, slices
from app.influx_to_s3.spool import BLOCK_ROWS, RowBatch, Spool
from exporter import NOON, ns

TIMES = pa.timestamp("ns", "UTC")
NO_TAGS: frozenset[str] = frozenset()


def rows(*instants: int, **columns: Sequence[Any]) -> pa.Table:
    """Canonical rows at nanoseconds after noon."""
    times = pa.array([ns(NOON) + at for at in instants], pa.int64()).cast(TIMES)
    return pa.table({"timestamp": times, **columns})


def spooled(tables: Sequence[pa.Table], folder: Path, memory_rows: int = 0) -> RowBatch:
    spool = Spool("D1", folder, memory_rows)
    for table in tables:
        spool.append(table)
    return spool.finish({})


def digest_of(tables: Sequence[pa.Table], folder: Path, memory_rows: int = 0) -> str:
    with closing(spooled(tables, folder, memory_rows)) as batch:
        return batch.digest


def read(tables: Sequence[pa.Table], folder: Path, memory_rows: int = 0) -> list[dict[str, Any]]:
    with closing(spooled(tables, folder, memory_rows)) as batch:
        return listed(batch)


def listed(batch: RowBatch) -> list[dict[str, Any]]:
    """The rows of a batch; `timestamp` in nanoseconds after noon."""
    found: list[dict[str, Any]] = []
    for table in batch.tables():
        plain = table.set_column(0, "timestamp", table.column(0).cast(pa.int64()))
        found += [{**row, "timestamp": row["timestamp"] - ns(NOON)} for row in plain.to_pylist()]
    return found


def source(folder: Path) -> InfluxSource:
    """A source whose reader is never asked."""
    reading = Reading("device_telemetry", (), 1000, folder)
    return InfluxSource(None, reading, Patience(RetryPolicy(), Stop(), lambda: 0.0))  # type: ignore[arg-type]


def test_measured_fields_are_floats_whatever_the_source_calls_them() -> None:
    table = canonical(
        rows(0, 1, 2, voltage=[1, 2, None], current=[True, False, None], power=["7.5", "broken", "+5"]),
        "timestamp",
        NO_TAGS,
    )
    assert [table.schema.field(name).type for name in ("voltage", "current", "power")] == [pa.float64()] * 3
    assert table.column("voltage").to_pylist() == [1.0, 2.0, None]
    assert table.column("current").to_pylist() == [1.0, 0.0, None]
    assert table.column("power").to_pylist() == [7.5, None, 5.0]


@pytest.mark.parametrize("text", ["", " 1", "1 ", "0x10", "1e", "--1", "NaN", "inf", "1,5", "1\n", "٣", "."])
def test_text_that_is_no_number_is_null_in_a_measured_field(text: str) -> None:
    assert canonical(rows(0, voltage=[text]), "timestamp", NO_TAGS).column("voltage").to_pylist() == [None]


def test_fields_named_like_documented_columns_get_a_name_of_their_own() -> None:
    names = ("hour", "day_of_week", "is_weekend", "power_factor", "device_type", "location")
    table = canonical(rows(0, **{name: [1.5] for name in names}), "timestamp", frozenset({"firmware"}))
    assert sorted(table.column_names) == sorted(["timestamp", *(f"{name}_field" for name in names)])


def test_documented_tags_are_kept_and_others_dropped() -> None:
    given = rows(0, device_id=["D1"], location=["A"], firmware=["1.2"], voltage=["tag"], other=[1])
    table = canonical(given, "timestamp", frozenset({"device_id", "location", "firmware", "voltage"}))
    assert table.column_names == ["timestamp", "location", "other"]


def test_tag_sets_of_one_instant_are_merged_field_by_field() -> None:
    tables = [
        rows(5, 9, device_type=["b", "b"], voltage=[1.0, 2.0]),
        rows(5, device_type=["a"], power=[7.0], on=[True]),
        rows(5, location=["L"], voltage=[3.0], on=[False]),
    ]
    for order in (tables, tables[::-1], [tables[1], tables[0], tables[2]]):
        merged = ordered(order)
        assert merged.num_rows == 2
        first = merged.to_pylist()[0]
        assert (first["device_type"], first["location"], first["voltage"], first["power"]) == ("a", "L", 1.0, 7.0)
        assert first["on"] in (True, False)
        assert (
            ordered(order)
            .select(sorted(merged.column_names))
            .equals(ordered(tables).select(sorted(merged.column_names)))
        )


def test_a_known_tag_of_an_instant_wins_over_a_missing_one(tmp_path: Path) -> None:
    batch = spooled([ordered([rows(0, voltage=[1.0]), rows(0, location=["L"], power=[2.0])])], tmp_path)
    assert listed(batch) == [{"timestamp": 0, "device_type": "unknown", "location": "L", "power": 2.0, "voltage": 1.0}]


def test_a_field_that_ends_in_first_keeps_its_name_when_rows_are_merged() -> None:
    merged = ordered([rows(0, x_first=[1]), rows(0, x=[2])])
    assert merged.select(["x", "x_first"]).to_pylist() == [{"x": 2, "x_first": 1}]


def test_numbers_meet_in_float_and_everything_else_in_text(tmp_path: Path) -> None:
    ints, floats, texts = rows(0, extra=[1]), rows(1, extra=[2.5]), rows(2, extra=["x"])
    assert [row["extra"] for row in listed(spooled([ints, floats], tmp_path))] == [1.0, 2.5]
    assert [row["extra"] for row in listed(spooled([ints, floats, texts], tmp_path))] == ["1", "2.5", "x"]
    assert [row["extra"] for row in listed(spooled([rows(0, extra=[True]), rows(1, extra=[3])], tmp_path))] == [
        "true",
        "3",
    ]


def test_types_that_drift_from_block_to_block_meet_too(tmp_path: Path) -> None:
    many = range(BLOCK_ROWS)
    tables = [
        rows(*many, extra=list(many)),
        rows(*(BLOCK_ROWS + n for n in many), extra=[n / 2 for n in many]),
        rows(2 * BLOCK_ROWS, extra=["x"]),
    ]
    for memory_rows in (0, 10**6):
        found = [row["extra"] for row in read(tables, tmp_path, memory_rows)]
        assert (found[7], found[BLOCK_ROWS + 1], found[-1]) == ("7", "0.5", "x")


def test_the_digest_of_drifting_types_does_not_depend_on_the_cutting(tmp_path: Path) -> None:
    ints = rows(*range(20_000), extra=list(range(20_000)))
    floats = rows(*range(20_000, 40_000), extra=[n / 2 for n in range(20_000)])
    texts = rows(40_000, extra=["x"])
    together = ordered([ints, floats])
    pieces = [
        [ints, floats],
        [together],
        [ints.slice(0, 7), ints.slice(7), floats.slice(0, 13_000), floats.slice(13_000)],
    ]
    assert len({digest_of(tables, tmp_path) for tables in pieces}) == 1
    whole = ordered([ints, floats, texts])
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


def test_rows_that_are_not_later_are_refused(tmp_path: Path) -> None:
    spool = Spool("D1", tmp_path, 0)
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
    assert spilled.blocks == ()
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


CELL = st.none() | st.integers(-3, 3)
MODEL = st.dictionaries(st.integers(0, 30), CELL)


def tabled(model: Mapping[int, int | None], sizes: Sequence[int]) -> list[pa.Table]:
    """The model as ordered tables of these sizes, then one with the rest."""
    instants = sorted(model)
    tables, at = [], 0
    for size in (*sizes, len(instants)):
        part = instants[at : at + size]
        tables.append(rows(*part, v=pa.array([model[n] for n in part], pa.int64())))
        at += size
    return tables


@given(MODEL, MODEL, st.lists(st.integers(0, 5), max_size=6), st.lists(st.integers(0, 5), max_size=6))
@settings(max_examples=60, deadline=None)
def test_union_and_missing_are_those_of_dictionaries(
    tmp_path_factory: pytest.TempPathFactory,
    new: dict[int, int | None],
    held: dict[int, int | None],
    new_sizes: list[int],
    held_sizes: list[int],
) -> None:
    folder = tmp_path_factory.getbasetemp()
    influx = source(folder)
    batch = spooled([table for table in tabled(new, new_sizes) if table.num_rows], folder)
    union = influx.union(batch, tabled(held, held_sizes))
    missing = influx.missing(batch, tabled(held, held_sizes))
    assert {row["timestamp"]: row.get("v") for row in listed(union)} == {**held, **new}
    assert {row["timestamp"]: row.get("v") for row in listed(missing)} == {
        at: value for at, value in new.items() if at not in held
    }
    assert (union.rows, missing.rows) == (len({*held, *new}), len({*new} - {*held}))
    assert union.digest == spooled(tabled({**held, **new}, []), folder).digest


def test_rows_read_back_from_an_object_lose_what_was_computed_and_keep_renamed_fields(tmp_path: Path) -> None:
    table = canonical(rows(0, hour=[9], voltage=[1.5], location=["L"]), "timestamp", frozenset({"location"}))
    batch = spooled([table], tmp_path)
    [written] = list(batch.output())
    back = of_object(written)
    assert back.select(["hour_field", "voltage", "location"]).to_pylist() == [
        {"hour_field": 9, "voltage": 1.5, "location": "L"}
    ]
    assert spooled([back.drop_columns([n for n in MEASURED if n != "voltage"])], tmp_path).digest == batch.digest


def test_a_union_of_nothing_is_nothing() -> None:
    assert list(united([], [])) == []


WINDOW = Window(NOON, NOON + timedelta(hours=1))


@pytest.mark.parametrize("seconds", [1, 7 * 60, 900, 3600, 86_400])
def test_buckets_divide_the_window_and_are_few(seconds: int) -> None:
    every = bucket_seconds(Window(NOON, NOON + timedelta(seconds=seconds)))
    assert seconds % every == 0
    assert seconds // every <= 30 or every == 1


def test_reading_begins_one_bucket_before_the_first_that_changed() -> None:
    buckets = [NOON + timedelta(minutes=2 * n) for n in range(30)]
    old = dict.fromkeys(buckets[:20], 5)
    assert first_change(old, {**old, buckets[20]: 3}, WINDOW, 120) == buckets[19]
    assert first_change(old, {**old, buckets[4]: 6, buckets[20]: 3}, WINDOW, 120) == buckets[3]
    assert first_change(old, {**old, buckets[0]: 6}, WINDOW, 120) == NOON
    gone = {at: n for at, n in old.items() if at != buckets[7]}
    assert first_change(old, gone, WINDOW, 120) == buckets[6]
    assert first_change(old, old, WINDOW, 120) == WINDOW.end


@given(st.dictionaries(st.integers(0, 29), st.integers(1, 400)), st.integers(1, 500), st.integers(0, 29))
@settings(max_examples=100, deadline=None)
def test_slices_cover_the_span_without_gaps_and_stay_near_the_batch_size(
    points: dict[int, int], batch_rows: int, first: int
) -> None:
    counts = {NOON + timedelta(minutes=2 * n): Count(2 * many, many) for n, many in points.items()}
    span = Window(NOON + timedelta(minutes=2 * first), WINDOW.end)
    parts = list(slices(span, 120, counts, batch_rows))
    assert [part.start for part, _ in parts] == [span.start, *(part.end for part, _ in parts[:-1])]
    assert parts[-1][0].end == span.end
    assert sum(many for _, many in parts) == sum(many for n, many in points.items() if n >= first)
    biggest = max(points.values(), default=0)
    assert all(many <= max(batch_rows, biggest) for _, many in parts)


def test_before_takes_only_older_rows() -> None:
    table = rows(1, 2, 3, a=[1, 2, 3])
    assert before(table, ns(NOON) + 2).column("a").to_pylist() == [1]


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
