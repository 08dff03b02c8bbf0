"""The quick ways that only large masters and files take: beside the plain ones, and at their edges."""

import io
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.csv_inbox import merge
from app.csv_inbox.config import UnmergeableFile
from app.csv_inbox.csv_tokenizer import (
    CellSlices,
    CsvDialect,
    FieldBounds,
    blocks,
    find_field_bounds,
    walked,
)
from app.csv_inbox.discovery import InboxPaths
from app.csv_inbox.key_index import (
    ENTRY,
    FEW_PAIRS,
    HEAD_BYTES,
    LONG_VALUE_BYTES,
    PIECE_RECORDS,
    equal_pairs,
    hashed,
)
from app.csv_inbox.merge import READ_BYTES, SCAN_BYTES
from inbox_world import World, world

DIALECT = CsvDialect(",", "latin-1")
ROWS = 150_000
CHUNK_BYTES = 1 << 21
HEAD = "k,a,b\n"


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A master of several chunks need not be as large as with those of 8 MiB."""
    monkeypatch.setattr(merge, "CHUNK_BYTES", CHUNK_BYTES)


def line(number: int, value: str = "old") -> str:
    return f'{number},"{value}, {number:032d}",\n' if number % 50 == 0 else f"{number},{value} {number:034d},\n"


def both(folder: Path) -> tuple[World, World]:
    """The same large master, with an index and without."""
    worlds = world(folder / "indexed"), world(folder / "plain", index_from_mb=1000)
    content = HEAD + "".join(map(line, range(ROWS)))
    assert len(content) > 2.5 * max(CHUNK_BYTES, SCAN_BYTES)
    assert ROWS > 2 * PIECE_RECORDS
    for here in worlds:
        here.take("0.csv", content)
    return worlds


def edges() -> list[int]:
    """Rows at both ends of the file, of pieces of the index, and of chunks of the master, and neighbours of those."""
    found = {0, 1, ROWS - 2, ROWS - 1}
    at, chunks = 0, 0
    for number in range(ROWS):
        at += len(line(number))
        if at // CHUNK_BYTES > chunks:
            chunks += 1
            found |= {number - 1, number, number + 1}
    for piece in range(PIECE_RECORDS, ROWS, PIECE_RECORDS):
        found |= {piece - 1, piece}
    return sorted(found)


def test_rows_at_the_edges_of_all_that_is_read_at_once_are_replaced_with_and_without_an_index(
    tmp_path: Path,
) -> None:
    worlds = both(tmp_path)
    gone = edges()
    again = {number for number in gone if number % 3 == 0}
    new = "".join(line(number, "old" if number in again else "new") for number in reversed(gone)) + "other,,\n"
    expected = HEAD + "".join(line(number) for number in range(ROWS) if number not in set(gone)) + new
    for here in worlds:
        before = here.master
        here.take("1.csv", HEAD + new)
        assert here.master.decode() == expected
        load = here.loads[0]
        counts = (load.inserted, load.replaced, load.unchanged, load.rows_before, load.rows_after)
        assert counts == (1, len(gone) - len(again), len(again), ROWS, ROWS + 1)
        here.undo(load.run_id)
        assert here.master == before


@pytest.mark.slow
def test_a_file_in_any_order_is_compared_row_by_row_where_its_rows_lie_far_apart(tmp_path: Path) -> None:
    numbers = list(range(0, ROWS, 3))
    random.Random(4).shuffle(numbers)  # noqa: S311 - a fixed seed
    new = "".join(line(number, "old" if number % 2 else "new") for number in numbers)
    assert len(new) > 2 * READ_BYTES
    for here in both(tmp_path):
        here.take("1.csv", HEAD + new)
        load = here.loads[0]
        assert (load.inserted, load.replaced, load.unchanged) == (0, ROWS // 6, ROWS // 6)
        assert here.master.decode() == HEAD + "".join(line(n) for n in range(ROWS) if n % 3) + new


def test_pieces_without_a_hit_are_copied_as_they_lie(tmp_path: Path) -> None:
    indexed, plain = both(tmp_path)
    for here in (indexed, plain):
        here.take("1.csv", HEAD + line(ROWS - 1, "new"))
    assert indexed.master == plain.master
    assert indexed.master.decode() == HEAD + "".join(map(line, range(ROWS - 1))) + line(ROWS - 1, "new")


@pytest.mark.slow
def test_a_record_longer_than_a_chunk_is_kept_and_replaced(tmp_path: Path) -> None:
    here = world(tmp_path)
    rows = ["a,1\n", 'long,"' + "x,\n" * CHUNK_BYTES + '"\n', "b,1\n"]
    here.take("0.csv", "k,v\n" + "".join(rows))
    here.take("1.csv", "k,v\nb,2\n")
    assert here.master.decode() == "k,v\n" + rows[0] + rows[1] + "b,2\n"
    here.take("2.csv", "k,v\nlong,2\n")
    assert here.master == b"k,v\na,1\nb,2\nlong,2\n"


def cells_of(values: Sequence[bytes]) -> CellSlices:
    lengths = np.array([len(value) for value in values], np.int64)
    return CellSlices(np.frombuffer(b"-" + b"".join(values), np.uint8), 1 + np.cumsum(lengths) - lengths, lengths)


def test_a_key_that_shares_only_what_the_index_keeps_of_its_hash_is_another_key(tmp_path: Path) -> None:
    numbers = np.arange(300_000)
    values = cells_of([f"{number:06d}".encode() for number in numbers.tolist()])
    halves = hashed(values) >> np.uint64(32)
    order = np.argsort(halves, kind="stable")
    alike = np.flatnonzero(halves[order][1:] == halves[order][:-1])
    assert len(alike)
    pairs = [(f"{order[at]:06d}", f"{order[at + 1]:06d}") for at in alike.tolist()]
    for here in (world(tmp_path / "indexed"), world(tmp_path / "plain", index_from_mb=1000)):
        here.take("0.csv", "k,a\n" + "".join(f"{there},1\n" for there, _ in pairs))
        here.take("1.csv", "k,a\n" + "".join(f"{asked},2\n" for _, asked in pairs))
        assert (here.loads[0].inserted, here.loads[0].replaced) == (len(pairs), 0)
        lines = [f"{there},1\n" for there, _ in pairs] + [f"{asked},2\n" for _, asked in pairs]
        assert here.master.decode() == "k,a\n" + "".join(lines)


LONG = st.sampled_from([7, 8, 9, 63, 64, LONG_VALUE_BYTES - 1, LONG_VALUE_BYTES, LONG_VALUE_BYTES + 9])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(LONG, st.integers(-1, 600)), min_size=1, max_size=3 * FEW_PAIRS))
def test_values_of_any_length_are_the_same_only_when_every_byte_is(pairs: list[tuple[int, int]]) -> None:
    left = [b"x" * size for size, _ in pairs]
    right = [
        value[:at] + b"y" + value[at + 1 :] if 0 <= at < len(value) else value
        for value, (_, at) in zip(left, pairs, strict=True)
    ]
    assert equal_pairs(cells_of(left), cells_of(right)).tolist() == [a == b for a, b in zip(left, right, strict=True)]


def outcome(data: bytes, *, plain: bool) -> tuple[list[int], list[int]] | str:
    """Marks of whole records, or the refusal."""
    quotes = np.flatnonzero(np.frombuffer(data, np.uint8) == ord('"'))
    try:
        found: FieldBounds = walked(data, DIALECT, quotes) if plain else find_field_bounds(data, DIALECT)
    except UnmergeableFile as error:
        return error.faults[0].reason
    return found.at.tolist(), found.lasts.tolist()


FIELDS = st.sampled_from(["a", "", '"q"', '"x,y"', '"two\nlines"', '""""', '"\r\n,"', 'size 5"', "b\r\n", "\n"])


@settings(max_examples=100, deadline=None)
@given(st.lists(FIELDS, max_size=12), st.integers(0, 9))
def test_few_quotes_among_many_fields_are_found_as_walking_finds_them(parts: list[str], odd: int) -> None:
    filler = "plain,fields,here\n" * 20
    data = (filler + "".join(f"{part},{'w' * odd}\n{filler}" for part in parts)).encode()
    assert outcome(data, plain=False) == outcome(data, plain=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(FIELDS.filter(lambda field: field != 'size 5"'), min_size=1, max_size=12), st.integers(1, 80))
def test_every_block_knows_its_line_and_loses_no_byte(parts: list[str], size: int) -> None:
    data = "".join(f"{part},w\n" for part in parts).encode()
    at, line_number = 0, 1
    for block in blocks(io.BytesIO(data).read, DIALECT, 1, size):
        assert block.line == line_number
        assert data[at : at + len(block.data)] == block.data
        at += len(block.data)
        line_number += block.data.count(b"\n")
    assert at == len(data)


def overwritten(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize("place", [0, 250, 499])
@pytest.mark.parametrize("part", [b"\xff\xff\xff\xff", b"\0\0\0\0"])
@pytest.mark.parametrize("half", [0, 4])
def test_a_wrong_length_or_hash_in_the_index_is_never_followed(
    tmp_path: Path, place: int, part: bytes, half: int
) -> None:
    here = world(tmp_path)
    here.take("0.csv", "k,a\n" + "".join(f"{n},old\n" for n in range(500)))
    index = InboxPaths(here.config).index
    assert index.stat().st_size == HEAD_BYTES + 500 * ENTRY.itemsize
    overwritten(index, HEAD_BYTES + place * ENTRY.itemsize + half, part)
    here.take("1.csv", "k,a\n0,new\n250,new\n499,new\n")
    kept = "".join(f"{n},old\n" for n in range(500) if n not in (0, 250, 499))
    assert here.master.decode() == "k,a\n" + kept + "0,new\n250,new\n499,new\n"
    assert (here.loads[0].replaced, here.loads[0].rows_after) == (3, 500)
