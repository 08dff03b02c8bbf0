"""Rows of the source united by identity with those that an object has."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.ledger import Tally
from app.influx_to_s3.layout import TreeColumns
from app.influx_to_s3.row_batch import BLOCK_ROWS
from app.influx_to_s3.rows import RowComparison, canonical_table, identities_of, union_by_identity, whole_instants
from influx_points import (
    COLUMNS,
    UNKNOWN,
    columns_of,
    in_order,
    listed,
    points,
    rows,
    rows_in,
    source,
    source_of,
    spooled,
)

CELL = st.none() | st.integers(-3, 3)


MODEL = st.dictionaries(st.integers(0, 30), CELL)


def tabled(model: Mapping[int, int | None], sizes: Sequence[int]) -> list[pa.Table]:
    """The model as ordered tables of these sizes, then one with the rest."""
    instants = sorted(model)
    tables, at = [], 0
    for size in (*sizes, len(instants)):
        part = instants[at : at + size]
        tags = {tag: pa.array(["unknown"] * len(part), pa.string()) for tag in UNKNOWN}
        tables.append(rows(*part, **tags, v=pa.array([model[n] for n in part], pa.int64())))
        at += size
    return tables


@given(MODEL, MODEL, st.lists(st.integers(0, 5), max_size=6), st.lists(st.integers(0, 5), max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_union_is_that_of_dictionaries_and_tells_what_is_new_and_what_was_corrected(
    tmp_path_factory: pytest.TempPathFactory,
    new: dict[int, int | None],
    held: dict[int, int | None],
    new_sizes: list[int],
    held_sizes: list[int],
) -> None:
    folder = tmp_path_factory.getbasetemp()
    influx = source(folder)
    batch = spooled([table for table in tabled(new, new_sizes) if table.num_rows], folder)
    read = sum(value is not None for value in new.values())
    batch.accounts = {"v": Tally(counted=read, read=read, new=read)}
    union = influx.union(batch, [tabled(held, held_sizes)])
    assert {row["timestamp"]: row.get("v") for row in listed(union)} == {**held, **new}
    assert (union.rows, union.new_rows) == (len({*held, *new}), len({*new} - {*held}))
    before = {at: held.get(at) for at, value in new.items() if value is not None}
    assert union.accounts["v"] == Tally(
        counted=read,
        read=read,
        new=sum(value is None for value in before.values()),
        already_there=sum(value == new[at] for at, value in before.items()),
        corrected=sum(value not in (None, new[at]) for at, value in before.items()),
    )
    assert union.digest == spooled(tabled({**held, **new}, []), folder).digest


def test_a_union_of_nothing_is_nothing() -> None:
    assert list(union_by_identity([], [], COLUMNS, RowComparison(COLUMNS))) == []


def test_a_union_tells_rows_apart_by_all_tags_also_where_one_side_lacks_a_column() -> None:
    columns = columns_of()
    new = [in_order([points(0, 5, tags={"phase": "L1"}, voltage=[1.0, 1.0]), points(0, voltage=[2.0])], columns)[0]]
    held = [in_order([points(0, 3, voltage=[3.0, 3.0])], columns)[0]]
    comparison = RowComparison(columns)
    found = [
        (row["timestamp"], row.get("phase"), row["voltage"])
        for row in rows_in(union_by_identity(new, held, columns, comparison))
    ]
    assert found == [(0, None, 2.0), (0, "L1", 1.0), (3, None, 3.0), (5, "L1", 1.0)]
    assert (comparison.new_rows, comparison.new, comparison.corrected) == (2, {"voltage": 2}, {"voltage": 1})


def test_a_row_that_lost_its_further_tags_stands_for_all_with_its_instant_and_documented_tags() -> None:
    columns = columns_of()
    phases = [points(0, 5, tags={"phase": phase}, voltage=[1.0, 1.0]) for phase in ("L1", "L2")]
    elsewhere = points(0, tags={"location": "x", "phase": "L1"}, voltage=[1.0])
    new = [in_order([*phases, elsewhere], columns)[0]]
    held = [in_order([points(0, 3, voltage=[3.0, 3.0]), points(0, tags={"phase": "L3"}, voltage=[4.0])], columns)[0]]
    comparison = RowComparison(columns)
    comparison.lost_tags = True
    found = rows_in(union_by_identity(new, held, columns, comparison))
    told = [(row["timestamp"], row["location"], row.get("phase"), row["voltage"]) for row in found]
    assert told == [
        (0, "unknown", "L1", 1.0), (0, "unknown", "L2", 1.0), (0, "unknown", "L3", 4.0), (0, "x", "L1", 1.0),
        (3, "unknown", None, 3.0), (5, "unknown", "L1", 1.0), (5, "unknown", "L2", 1.0),
    ]  # fmt: skip
    assert (comparison.new_rows, comparison.new, comparison.corrected) == (3, {"voltage": 3}, {"voltage": 2})


@given(st.lists(st.integers(0, 6), max_size=25), st.lists(st.integers(0, 5), max_size=12))
@settings(max_examples=60, deadline=None)
def test_no_instant_is_in_two_tables_however_the_rows_were_cut(instants: list[int], sizes: list[int]) -> None:
    table = rows(*sorted(instants), n=pa.array(range(len(instants)), pa.int64()))
    pieces, at = [], 0
    for size in sizes:
        pieces.append(table.slice(at, size))
        at += size
    whole = list(whole_instants([*pieces, table.slice(at)]))
    seen = [{row["timestamp"] for row in rows_in([one])} for one in whole]
    assert all(one for one in seen)
    assert len(set().union(*seen)) == sum(map(len, seen))
    assert rows_in(whole) == rows_in([table])


def phases(first: int, last: int, columns: TreeColumns, *, value: float = 1.0, names: str = "123") -> list[pa.Table]:
    """Three rows for each instant, so that blocks of the spool end between rows of one instant."""
    instants = range(first, last)
    blocks = [points(*instants, tags={"phase": f"L{name}"}, voltage=[value] * len(instants)) for name in names]
    return [in_order(blocks, columns)[0]]


def test_rows_of_one_instant_that_stand_in_two_blocks_are_united_like_others(tmp_path: Path) -> None:
    columns = columns_of()
    number = BLOCK_ROWS // 2
    influx = source_of(None, tmp_path, columns=columns)  # type: ignore[arg-type]
    batch = influx.spooled("D1", phases(0, number, columns))
    blocks = list(batch.tables())
    assert blocks[0].column("timestamp")[-1] == blocks[1].column("timestamp")[0]
    # The other side lacks one phase, and its tables end elsewhere between rows of one instant.
    held = phases(0, number + 5, columns, value=2.0, names="23")[0]
    cut = [held.slice(0, 4001), held.slice(4001, 9000), held.slice(13_001)]
    read = Tally(counted=3 * number, read=3 * number, new=3 * number)
    batch.accounts = {"voltage": read}
    with closing(batch), closing(influx.union(batch, [cut])) as union:
        assert union.accounts == {"voltage": replace(read, new=number, corrected=2 * number)}
        assert union.new_rows == number
        found = rows_in(union.tables())
        with closing(influx.spooled("D1", blocks)) as again:
            assert (again.rows, again.digest) == (batch.rows, batch.digest)
    assert len(found) == 3 * number + 2 * 5
    assert {(row["timestamp"], row["phase"]) for row in found} == {
        *((at, f"L{name}") for at in range(number) for name in "123"),
        *((at, f"L{name}") for at in range(number, number + 5) for name in "23"),
    }
    assert {row["voltage"] for row in found if row["timestamp"] < number} == {1.0}


def test_no_two_tag_sets_share_an_identity() -> None:
    columns = columns_of()
    sets: list[dict[str, str | None]] = [
        {}, {"a": "x"}, {"b": "x"}, {"a": "x", "b": "x"}, {"a": "b"}, {"b": "a"}, {"a": "xb"}, {"a": ""},
        {"location": "x"}, {"device_type": "x"},
    ]  # fmt: skip
    tables = [canonical_table(points(0, 1, tags=tags, v=[1, 1]), columns) for tags in sets]
    found = [identity for table in tables for identity in identities_of(table, columns.tags).tolist()]
    assert len(set(found)) == len(found) == 2 * len(sets)
