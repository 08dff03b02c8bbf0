"""The fast ways to find fields, values and keys beside the plain ones."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.csv_inbox.config import UnmergeableFile
from app.csv_inbox.csv_tokenizer import (
    NONE,
    CellSlices,
    CsvDialect,
    FieldBounds,
    RecordBlock,
    find_field_bounds,
    walked,
)
from app.csv_inbox.key_index import LONG_KEY_BYTES, FileKeys, equal_pairs, hashed
from inbox_world import colliding

DIALECT = CsvDialect(",", "latin-1")
RAW = st.lists(st.sampled_from(["a", ",", '"', '""', '","', "\n", '"\n', ',"', "\r\n", "\r", "5"]), max_size=30)


def outcome(data: bytes, *, plain: bool) -> tuple[list[int], list[int]] | str:
    """Marks up to the last whole record, or the refusal."""
    try:
        quotes = np.flatnonzero(np.frombuffer(data, np.uint8) == ord('"'))
        found: FieldBounds = walked(data, DIALECT, quotes) if plain else find_field_bounds(data, DIALECT)
    except UnmergeableFile as error:
        return error.faults[0].reason
    whole = int(found.lasts[-1]) + 1 if len(found.lasts) else 0
    return found.at[:whole].tolist(), found.lasts.tolist()


@settings(max_examples=200, deadline=None)
@given(RAW)
def test_counting_quotes_finds_the_fields_that_walking_finds(parts: list[str]) -> None:
    data = "".join([*parts, "\n"]).encode()
    fast, plain = outcome(data, plain=False), outcome(data, plain=True)
    # What comes after the last whole record is looked at again with what follows it: a refusal may come earlier there.
    if isinstance(fast, str) and not isinstance(plain, str):
        assert b"\r" in data[plain[0][-1] + 1 if plain[0] else 0 :]
    else:
        assert fast == plain


@settings(max_examples=150, deadline=None)
@given(RAW)
def test_values_of_columns_are_those_of_single_fields(parts: list[str]) -> None:
    data = "".join([*parts, "\n"]).encode()
    try:
        marks = find_field_bounds(data, DIALECT)
    except UnmergeableFile:
        return
    if not len(marks.lasts):
        return
    block = RecordBlock(data[: int(marks.at[marks.lasts[-1]]) + 1], marks, 1)
    records = [block.record(position) for position in block.rows.tolist()]
    fields = [[DIALECT.unquoted(field) for field in DIALECT.fields(record)] for record in records]
    width = len(fields[0]) if fields else 0
    assert block.widths.tolist() == [len(row) for row in fields]
    for place in range(width if set(block.widths.tolist()) == {width} else 0):
        cells = block.cells(place, DIALECT)
        assert [cells.value(at) for at in range(len(fields))] == [row[place] for row in fields]


def cells_of(values: Sequence[bytes]) -> CellSlices:
    lengths = np.array([len(value) for value in values], np.int64)
    return CellSlices(np.frombuffer(b"-" + b"".join(values), np.uint8), 1 + np.cumsum(lengths) - lengths, lengths)


KEYS = st.binary(max_size=20) | st.sampled_from([b"x" * (LONG_KEY_BYTES + n) for n in range(3)])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(KEYS, KEYS), min_size=1, max_size=20))
def test_the_same_bytes_have_the_same_hash_and_only_they_are_the_same(pairs: list[tuple[bytes, bytes]]) -> None:
    left, right = cells_of([pair[0] for pair in pairs]), cells_of([pair[1] for pair in pairs])
    expected = [first == second for first, second in pairs]
    assert equal_pairs(left, right).tolist() == expected
    assert (hashed(left) == hashed(right)).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(KEYS, min_size=1, max_size=30), st.lists(KEYS, min_size=1, max_size=30))
def test_the_last_row_of_a_key_is_found_and_of_no_other(held: list[bytes], asked: list[bytes]) -> None:
    keys = FileKeys()
    keys.add(cells_of(held[:5]))
    keys.add(cells_of(held[5:]))
    keys.sort()
    last = {key: row for row, key in enumerate(held)}
    assert keys.count == len(last)
    assert keys.kept_rows.tolist() == sorted(last.values())
    cells = cells_of(asked)
    places, rows = keys.find(cells, hashed(cells))
    assert set(places.tolist()) <= set(keys.candidates(hashed(cells)).tolist())
    assert dict(zip(places.tolist(), rows.tolist(), strict=True)) == {
        place: last[key] for place, key in enumerate(asked) if key in last
    }


def test_keys_that_share_a_hash_stay_apart() -> None:
    first, second, third = colliding(3)
    assert len(set(hashed(cells_of([first, second, third])).tolist())) == 1
    keys = FileKeys()
    keys.add(cells_of([first, b"other", second, first]))
    keys.sort()
    assert (keys.count, keys.kept_rows.tolist()) == (3, [1, 2, 3])
    cells = cells_of([second, first, third, b"none"])
    assert keys.seed
    places, rows = keys.find(cells, hashed(cells, keys.seed))
    assert places.tolist() == [0, 1]
    assert rows.tolist() == [2, 3]


def test_keys_made_to_share_a_hash_under_hundreds_of_seeds_stay_apart() -> None:
    made = [b"x" * (LONG_KEY_BYTES + 1), *(key for seed in range(300) for key in colliding(2, seed))]
    keys = FileKeys()
    keys.add(cells_of(made))
    keys.sort()
    assert keys.count == len(set(made))


def test_keys_that_share_a_hash_stay_apart_also_where_there_are_no_others() -> None:
    first, second = colliding(2)
    keys = FileKeys()
    keys.add(cells_of([first, second, first]))
    keys.sort()
    assert (keys.count, keys.kept_rows.tolist()) == (2, [1, 2])


@pytest.mark.parametrize("rows", [1, 17, 5000])
def test_of_a_key_that_stands_in_every_row_the_last_one_is_kept(rows: int) -> None:
    keys = FileKeys()
    keys.add(cells_of([b"the same"] * rows))
    keys.sort()
    assert (keys.count, keys.kept_rows.tolist()) == (1, [rows - 1])


@pytest.mark.parametrize("size", range(0, LONG_KEY_BYTES + 9, 4))
def test_the_hash_of_a_key_does_not_depend_on_its_neighbours(size: int) -> None:
    key = b"k" * size
    alone = hashed(cells_of([key])).tolist()
    neighbours = (b"", b"n", b"k" * (size + 1), b"n" * (size + 8), b"n" * (size + LONG_KEY_BYTES))
    assert [hashed(cells_of([key, each])).tolist()[:1] for each in neighbours] == [alone] * len(neighbours)


def test_no_cells_have_no_hashes() -> None:
    assert len(hashed(CellSlices(np.zeros(0, np.uint8), NONE, NONE))) == 0
