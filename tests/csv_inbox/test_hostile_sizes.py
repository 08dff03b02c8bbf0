"""Files that were made to fill the memory or to keep the inbox busy: each is merged or rejected at a bounded cost."""

import io
import time
import tracemalloc
from pathlib import Path

import pytest

from app.csv_inbox.config import FaultKind, UnmergeableFile
from app.csv_inbox.csv_tokenizer import BLOCK_BYTES, BOM, LONGEST_RECORD_BYTES, CsvDialect, blocks
from app.csv_inbox.incoming import MOST_BLANK_BYTES, MOST_FIELDS, MOST_PARTS
from inbox_world import World, world

DIALECT = CsvDialect(",", "utf-8")


def cpu_seconds(here: World, content: bytes) -> float:
    here.drop("1.csv", content)
    begun = time.process_time()
    here.run()
    return time.process_time() - begun


def peak_bytes(here: World) -> int:
    tracemalloc.start()
    try:
        here.run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_quote_that_is_never_closed_is_read_little_beyond_the_longest_record() -> None:
    file = io.BytesIO(b'x,"' + b"y\n" * (LONGEST_RECORD_BYTES * 2))
    with pytest.raises(UnmergeableFile) as told:
        list(blocks(file.read, DIALECT, 1, longest_bytes=LONGEST_RECORD_BYTES))
    assert told.value.kind == FaultKind.LONG_RECORD
    assert file.tell() <= LONGEST_RECORD_BYTES + 2 * BLOCK_BYTES


def test_bad_rows_are_kept_up_to_the_size_of_the_longest_record_and_then_counted(tmp_path: Path) -> None:
    here = world(tmp_path)
    row = b"x," + b"y" * (LONGEST_RECORD_BYTES // 4) + b",1\n"
    here.take("1.csv", b"k,a\n" + row * 9)
    assert here.reason("1.csv")["more_faults"] == 5
    assert (here.config.rejected_dir / "1.csv.bad_rows.csv").read_bytes() == b"k,a\n" + row * 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"k" + b"," * MOST_FIELDS + b"\nx,1\n", "a header of more than 100000 fields"),
        (b"k" + b"," * (MOST_FIELDS * 20), "a header of more than 100000 fields"),
        (
            b"k," + b",".join(b"%d" % n for n in range(MOST_FIELDS - 2)) + b",7\nx\n",
            "the column '7' occurs twice in the header",
        ),
        (b"\n" * (MOST_BLANK_BYTES + 1) + b"k,a\nx,1\n", "no header in the first 1 MiB"),
        (b" ,\n" * (MOST_BLANK_BYTES // 2) + b"k,a\nx,1\n", "no header in the first 1 MiB"),
        (
            b"k,a\n" + (BOM + b"x,1\n") * (MOST_PARTS + 1),
            "more than 10000 files with a byte order mark are appended to each other",
        ),
    ],
)
def test_a_file_beyond_a_limit_is_rejected_with_the_limit(tmp_path: Path, content: bytes, reason: str) -> None:
    here = world(tmp_path)
    here.take("1.csv", content)
    assert here.rejected == ["1.csv", "1.csv.reason.json"]
    assert here.reason("1.csv")["reason"] == reason


def test_a_file_at_a_limit_is_merged(tmp_path: Path) -> None:
    here = world(tmp_path)
    names = ["k", *(f"c{n}" for n in range(MOST_FIELDS - 1))]
    rows = ["x", *("" for _ in names[1:])]
    assert not here.take("1.csv", "\n" * 1000 + ",".join(names) + "\n" + ",".join(rows) + "\n").failures
    assert here.metadata["column_count"] == MOST_FIELDS


def test_appended_files_with_marks_inside_and_outside_of_quotes_are_told_apart(tmp_path: Path) -> None:
    here = world(tmp_path)
    quoted = b'x,"1\n' + BOM + b'2"\n'
    assert not here.take("1.csv", b"k,a\n" + quoted + BOM + b"k,a\ny,1\n" + BOM + b"z,1\n").failures
    assert here.master == b"k,a\n" + quoted + b"y,1\nz,1\n"


def test_a_thousand_new_columns_for_many_short_rows_fit_into_little_memory(tmp_path: Path) -> None:
    here = world(tmp_path)
    count, columns = 20_000, 1000
    rows = "".join(f"{n}\n" for n in range(count))
    here.take("0.csv", "k\n" + rows)
    wide = "," * columns
    names = ",".join(["k", *(f"c{n}" for n in range(columns))])
    again = "".join(f"{n}{wide}\n" for n in range(0, count, 100))
    here.drop("1.csv", f"{names}\n{again}")
    assert peak_bytes(here) < 20 << 20
    assert (here.loads[0].unchanged, here.loads[0].rows_after) == (count // 100, count)
    assert here.master == f"{names}\n{''.join(f'{n}{wide}' + chr(10) for n in range(count) if n % 100)}{again}".encode()
    here.undo(here.loads[0].run_id)
    assert here.master == f"k\n{rows}".encode()


def test_many_short_rows_for_a_master_of_a_thousand_columns_fit_into_little_memory(tmp_path: Path) -> None:
    here = world(tmp_path)
    count, columns = 20_000, 1000
    head = ",".join(["k", *(f"c{n}" for n in range(columns))]) + "\nx" + ",1" * columns + "\n"
    here.take("0.csv", head)
    here.drop("1.csv", "k\n" + "".join(f"{n}\n" for n in range(count)))
    assert peak_bytes(here) < 20 << 20
    assert here.master == (head + "".join(f"{n}{',' * columns}\n" for n in range(count))).encode()


def test_blank_rows_cost_little_more_than_rows(tmp_path: Path) -> None:
    count = 400_000
    rows = cpu_seconds(world(tmp_path / "rows"), b"k,a\n" + b"".join(b"%d,1\n" % n for n in range(count)))
    blank = world(tmp_path / "blank")
    assert cpu_seconds(blank, b"k,a\nx,1\n" + b" ,\n" * count) < 2 * rows
    assert blank.master == b"k,a\nx,1\n"
