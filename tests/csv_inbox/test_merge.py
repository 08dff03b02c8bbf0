"""The merge against a small model, and byte by byte."""

import csv
import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.core.errors import Permanent
from app.csv_inbox import csv_tokenizer
from app.csv_inbox.csv_tokenizer import CsvDialect, blocks
from effort import EFFORT
from inbox_world import Table, World, model, parsed, world

VALUES = st.sampled_from(
    ["", "a", "007", "1", "NA", 'say "hi"', "x,y", "two\nlines", "cr\r\nlf", "é", " ", 'size 5"', "None"]
)
KEYS = st.sampled_from([f"k{n}" for n in range(8)] + ['k"q', "k\n1", "ké"])
NAMES = ["k", "a", "b", "c", "d"]


@st.composite
def tables(draw: st.DrawFn) -> Table:
    others = draw(st.permutations(NAMES[1:]))[: draw(st.integers(0, 4))]
    place = draw(st.integers(0, len(others)))
    names = [*others[:place], "k", *others[place:]]
    count = draw(st.integers(1, 8))
    return names, [[draw(KEYS if name == "k" else VALUES) for name in names] for _ in range(count)]


def written(table: Table, eol: str, *, quote_all: bool, last_eol: bool) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=eol, quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL)
    writer.writerow(table[0])
    writer.writerows(table[1])
    text = out.getvalue()
    return (text if last_eol else text.removesuffix(eol)).encode()


def counts(master: Table | None, incoming: Table) -> tuple[int, ...]:
    """Inserted, replaced or unchanged, duplicates, rows before and after."""
    there = [row[master[0].index("k")] for row in master[1]] if master else []
    keys = [row[incoming[0].index("k")] for row in incoming[1]]
    new = set(keys) - set(there)
    return len(new), len(set(keys) - new), len(keys) - len(set(keys)), len(there), len(set(there)) + len(new)


def shown_counts(here: World) -> tuple[int, ...]:
    load = here.loads[0]
    return load.inserted, load.replaced, load.unchanged, load.duplicates, load.rows_before, load.rows_after


@pytest.mark.slow
@settings(max_examples=25 * EFFORT, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(tables(), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans()), min_size=1, max_size=4)
)
def test_any_sequence_of_files_gives_what_the_model_gives_and_can_be_taken_back(
    drops: list[tuple[Table, str, bool, bool]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        here = world(Path(folder) / "indexed")
        plain = world(Path(folder) / "plain", index_from_mb=1000)
        expected: Table | None = None
        history: list[bytes | None] = [None]
        for number, (table, eol, quote_all, last_eol) in enumerate(drops):
            content = written(table, eol, quote_all=quote_all, last_eol=last_eol)
            assert not here.take(f"{number}.csv", content).failures
            plain.take(f"{number}.csv", content)
            assert here.master == plain.master
            assert shown_counts(here) == shown_counts(plain)
            load = here.loads[0]
            found = (load.inserted, load.replaced + load.unchanged, load.duplicates, load.rows_before, load.rows_after)
            assert found == counts(expected, table)
            expected = model(expected, table, "k")
            assert parsed(here.master) == expected
            assert here.metadata["row_count"] == len(expected[1])
            assert here.metadata["columns"] == expected[0]
            history.append(here.master)
        for before, load in zip(history[-2::-1], here.loads, strict=True):
            here.undo(load.run_id)
            assert (here.config.merged_file.read_bytes() if here.config.merged_file.exists() else None) == before


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.text(alphabet='ab",\n\r', max_size=4), min_size=2, max_size=2), min_size=1, max_size=6),
    st.booleans(),
    st.integers(1, 40),
)
def test_blocks_of_any_size_hold_the_same_records(rows: list[list[str]], quote_all: bool, size: int) -> None:  # noqa: FBT001
    returns = any("\r" in value for row in rows for value in row)  # the writer leaves a lone one unquoted
    content = written((rows[0], rows[1:]), "\n", quote_all=quote_all or returns, last_eol=True)
    dialect = CsvDialect(",", "utf-8")
    whole = list(blocks(io.BytesIO(content).read, dialect, 1, size=1 << 20))
    found = [
        next(csv.reader(io.StringIO(block.record(at).decode(), newline="")))
        for block in blocks(io.BytesIO(content).read, dialect, 1, size)
        for at in block.rows
    ]
    assert found == [row for row in rows if row != [""]]
    assert b"".join(block.data for block in blocks(io.BytesIO(content).read, dialect, 1, size)) == content
    assert len(whole) == 1


def test_values_are_text_and_stay_as_they_are(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("1.csv", 'k,a,b\nx,007,1\ny,NA,\nz,"",1e5\n')
    here.take("2.csv", "k,a,b\nw,null,0.10\n")
    assert here.master == b'k,a,b\nx,007,1\ny,NA,\nz,"",1e5\nw,null,0.10\n'


def test_untouched_rows_are_copied_to_the_byte_whatever_their_quoting(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("1.csv", b'k,a\n"x","un""usual"\ny,5" disk\r\nz,"a\nb\r\nc"\n"""q""", spaced \n')
    here.take("2.csv", "k,a\ny,new\n")
    assert here.master == b'k,a\n"x","un""usual"\nz,"a\nb\r\nc"\n"""q""", spaced \ny,new\n'


def test_a_quoted_key_is_the_same_key(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("1.csv", 'k,a\n"x",1\n"a ""b""",2\n')
    here.take("2.csv", 'k,a\nx,3\n"a ""b""",4\n')
    assert parsed(here.master)[1] == [["x", "3"], ['a "b"', "4"]]
    assert (here.loads[0].replaced, here.loads[0].inserted) == (2, 0)


def test_the_line_ends_of_the_master_are_kept_for_new_rows(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("1.csv", b"k,a\r\nx,1\r\n")
    here.take("2.csv", b'k,a\ny,"in\nside"\n')
    assert here.master == b'k,a\r\nx,1\r\ny,"in\nside"\r\n'


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("1.csv", b"\xef\xbb\xbfk,a\nx,1\n")
    here.take("2.csv", b"k,a\nx,2\n")
    assert here.master == b"k,a\nx,2\n"
    signed = world(tmp_path / "signed", csv_encoding="utf-8-sig")
    signed.take("1.csv", b"k,a\nx,1\n")
    signed.take("2.csv", b"\xef\xbb\xbfk,b\ny,2\n")
    assert signed.master == b"\xef\xbb\xbfk,a,b\nx,1,\ny,,2\n"


def test_a_semicolon_and_latin_1_by_configuration(tmp_path: Path) -> None:
    here = world(tmp_path, csv_delimiter=";", csv_encoding="latin-1", key_column="Stadt")
    here.take("1.csv", "Stadt;Höhe\nKöln;1,5\n".encode("latin-1"))
    here.take("2.csv", "Stadt;Größe\nKöln;2,5\nUlm;ß\n".encode("latin-1"))
    assert here.master == "Stadt;Größe\nKöln;2,5\nUlm;ß\n".encode("latin-1")
    assert here.metadata["columns"] == ["Stadt", "Größe"]


def test_new_columns_go_behind_and_missing_ones_are_empty(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("1.csv", 'a,k\n1,x\n2,"y"\n')
    here.take("2.csv", "b,k\n3,z\n")
    assert here.master == b'a,k,b\n1,x,\n2,"y",\n,z,3\n'
    assert here.loads[0].columns_added == ("b",)


def test_a_column_goes_only_when_it_is_absent_and_empty_everywhere(tmp_path: Path) -> None:
    here = world(tmp_path, required_columns=["r"])
    here.take("1.csv", "k,old,kept,r\nx,1,1,\ny,,2,\n")
    here.take("2.csv", "k,r,new\nx,,5\n")
    assert here.master == b"k,kept,r,new\ny,2,,\nx,,,5\n"
    assert here.loads[0].columns_removed == ("old",)
    here.take("3.csv", "k,r\nz,\n")
    assert here.metadata["columns"] == ["k", "kept", "r", "new"]


def test_the_last_of_several_rows_with_one_key_wins_and_is_counted(tmp_path: Path) -> None:
    here = world(tmp_path)
    report = here.take("1.csv", "k,a\nx,1\ny,2\nx,3\nx,4\n")
    assert here.master == b"k,a\ny,2\nx,4\n"
    assert here.loads[0].duplicates == 2
    assert "2 rows whose key comes again" in report.notes[0]


def test_rows_that_come_again_to_the_byte_are_counted_as_unchanged(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("1.csv", "k,a\nx,1\ny,2\nz,3\n")
    here.take("2.csv", "k,a\nz,3\nx,9\nw,4\n")
    load = here.loads[0]
    assert (load.rows, load.inserted, load.replaced, load.unchanged, load.rows_after) == (3, 1, 1, 1, 4)


def test_ten_thousand_columns(tmp_path: Path) -> None:
    here = world(tmp_path)
    names = ["k", *(f"c{n}" for n in range(9_999))]
    for number in range(3):
        rows = [",".join([f"{number % 2}-{row}", *["7"] * 9_999]) for row in range(20)]
        here.take(f"{number}.csv", "\n".join([",".join(names), *rows]) + "\n")
    assert here.metadata["column_count"] == 10_000
    assert here.metadata["row_count"] == 40


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("1.csv", "k,a\nx,1\n\ny,2\n\n\n")
    here.take("2.csv", "k,b\r\n\r\nz,3")
    assert parsed(here.master) == (["k", "a", "b"], [["x", "1", ""], ["y", "2", ""], ["z", "", "3"]])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"k,a\nx,1,2\n",
        b"k,a\nx\n",
        b'k,a\nx,"1\n',
        b"k,a\n\xff,1\n",
        b"other\n1\n",
        b"k,k\n1,2\n",
        b"k,a\nx,1\ry,2\n",
    ],
)
def test_a_master_that_cannot_be_read_stops_everything_and_is_never_overwritten(tmp_path: Path, content: bytes) -> None:
    here = world(tmp_path)
    here.config.merged_file.write_bytes(content)
    here.drop("1.csv", "k,a\nx,1\n")
    with pytest.raises(Permanent, match="master") as told:
        here.run()
    assert "not changed" in told.value.hint
    assert here.master == content
    assert here.waiting == ["1.csv"]
    assert not [name for name in here.names(tmp_path) if ".tmp" in name]


@pytest.mark.parametrize("index_from_mb", [0, 1000], ids=["indexed", "scanned"])
def test_a_master_far_larger_than_a_block_is_merged_and_taken_back_in_pieces(
    tmp_path: Path, index_from_mb: float
) -> None:
    here = world(tmp_path, index_from_mb=index_from_mb)
    rows = [f'key-{n:06d},"{n}","text\n{n}",{"x" * 40}' for n in range(80_000)]
    here.take("1.csv", "\n".join(["k,a,b,c", *rows]) + "\n")
    assert len(here.master) > 5 * csv_tokenizer.BLOCK_BYTES
    first = here.master
    gone = dict.fromkeys(n for n in range(80_000) if n % 7 == 0 or 30_000 < n < 30_400)
    here.take("2.csv", "\n".join(["k,a,b,c", *(f"key-{n:06d},,," for n in gone)]) + "\n")
    left = [row for n, row in enumerate(rows) if n not in gone]
    assert here.master.decode() == "\n".join(["k,a,b,c", *left, *(f"key-{n:06d},,," for n in gone)]) + "\n"
    few = {0, 1, 33_333, 69_999}
    here.take("3.csv", "\n".join(["k,a,b,c", *(f"key-{n:06d},3,," for n in few)]) + "\n")
    left = [row for n, row in enumerate(rows) if n not in gone and n not in few]
    left += [f"key-{n:06d},,," for n in gone if n not in few]
    assert here.master.decode() == "\n".join(["k,a,b,c", *left, *(f"key-{n:06d},3,," for n in few)]) + "\n"
    here.undo(here.loads[1].run_id)
    assert here.master == first


def test_rows_that_come_again_far_apart_in_the_file_are_counted_as_unchanged(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("1.csv", "k,a\nx,1\ny,2\nz,3\n")
    between = "".join(f"key-{n:06d},{'x' * 40}\n" for n in range(csv_tokenizer.BLOCK_BYTES // 50))
    here.take("2.csv", f"k,a\nx,1\n{between}y,2\nz,4\n")
    load = here.loads[0]
    assert (load.replaced, load.unchanged, load.rows_after) == (1, 2, between.count("\n") + 3)


def test_a_file_without_a_header_line_end_or_rows_is_told_apart(tmp_path: Path) -> None:
    here: World = world(tmp_path)
    here.config.merged_file.write_bytes(b"k,a")
    here.take("1.csv", "k,a\nx,1")
    assert here.master == b"k,a\nx,1\n"
