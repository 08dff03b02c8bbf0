"""From the inbox to the archive or into quarantine: what is taken, in which order, and what is told of it."""

import os
import re
import time
from pathlib import Path

import pytest

from inbox_world import world

WAIT_SECONDS = 1.5
BAD = [
    ("latin.csv", "k,a\nx,é\n".encode("latin-1"), 2, "0xE9"),
    ("empty.csv", b"", 1, "empty"),
    ("header.csv", b"k,a\n", None, "no rows"),
    ("column.csv", b"id,a\n1,2\n", 1, "'k' is missing"),
    ("ragged.csv", b"k,a\nx,1\ny\nz,1,2\n", 3, "1 fields where the header has 2"),
    ("cut.csv", b'k,a\nx,1\ny,"no end\n', 3, "not closed"),
    ("twice.csv", b"k,a,a\nx,1,2\n", 1, "twice"),
    ("nul.csv", b"k,a\nx,1\ny,\0\n", 3, "0x00"),
    ("mac.csv", b"k,a\nx,1\ry,2\n", 2, "carriage return"),
    ("nokey.csv", b"k,a\n,1\n", 2, "key 'k' is empty"),
]


@pytest.mark.parametrize(("name", "content", "line", "reason"), BAD, ids=[case[0] for case in BAD])
def test_what_cannot_be_merged_is_set_aside_once_with_its_reason(
    tmp_path: Path, name: str, content: bytes, line: int | None, reason: str
) -> None:
    here = world(tmp_path)
    here.take("0.csv", "k,a\nq,1\n")
    before = here.master
    report = here.take(name, content)
    assert [failure.partition for failure in report.failures] == [name]
    assert here.master == before
    assert here.waiting == []
    assert (here.config.rejected_dir / name).read_bytes() == content
    told = here.reason(name)
    assert (told["file"], told["line"]) == (name, line)
    assert reason in told["reason"]
    assert told["hint"]
    assert here.loads[0].outcome == "rejected"
    assert here.run() == type(report)()
    log = here.config.log_file.read_text(encoding="utf-8")
    assert len(re.findall(rf"ERROR - '{name}'", log)) == 1


def test_bad_rows_stand_in_a_file_of_their_own_as_they_came(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("r.csv", 'k,a\nx,1\n"y\n2"\nz,1,"2"\n')
    assert (here.config.rejected_dir / "r.csv.bad_rows.csv").read_bytes() == b'k,a\n"y\n2"\nz,1,"2"\n'
    assert [fault["line"] for fault in here.reason("r.csv")["faults"]] == [3, 5]


def test_missing_required_columns_are_all_named(tmp_path: Path) -> None:
    here = world(tmp_path, required_columns=["id", "name"])
    here.take("r.csv", "k,a\nx,1\n")
    assert [fault["column"] for fault in here.reason("r.csv")["faults"]] == ["id", "name"]


def test_a_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    here = world(tmp_path, max_file_size_mb=0.001)
    here.take("big.csv", "k,a\n" + "x,1\n" * 1000)
    assert "max_file_size_mb" in here.reason("big.csv")["reason"]


def test_a_second_rejected_file_of_one_name_overwrites_nothing(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("b.csv", "first\n")
    here.take("b.csv", "second\n")
    kept = [name for name in here.rejected if not name.endswith(".json")]
    assert len(kept) == 2
    assert re.fullmatch(r"b\.csv\.\d{8}T\d{6}\.\d{3}", kept[1])


def test_links_pipes_and_folders_are_never_followed_or_opened(tmp_path: Path) -> None:
    here = world(tmp_path)
    secret = tmp_path / "secret.csv"
    secret.write_text("k,a\nsecret,1\n")
    here.config.watch_dir.mkdir()
    (here.config.watch_dir / "link.csv").symlink_to(secret)
    os.mkfifo(here.config.watch_dir / "pipe.csv")
    (here.config.watch_dir / "folder.csv").mkdir()
    report = here.run()
    assert {failure.partition for failure in report.failures} == {"link.csv", "pipe.csv"}
    assert secret.read_text() == "k,a\nsecret,1\n"
    assert not here.config.merged_file.exists()
    assert here.waiting == ["folder.csv"]


def test_names_that_are_odd_stay_one_clean_line_each(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.drop("a\nb.csv", "k,a\nx,1\n")
    (here.config.watch_dir / os.fsdecode(b"\xff.csv")).write_text("nothing\n")
    report = here.run()
    assert all(line.isprintable() for line in report.notes)
    assert {load.file for load in here.loads} == {"a\\nb.csv", "\\xff.csv"}
    assert here.waiting == []


def test_oldest_first_then_by_name_and_the_extension_in_any_case(tmp_path: Path) -> None:
    here = world(tmp_path)
    for name, at, value in (("b.csv", 300, "b"), ("z.CSV", 100, "z"), ("a.Csv", 200, "a"), ("c.csv", 300, "c")):
        os.utime(here.drop(name, f"k,a\nx,{value}\n"), (at, at))
    here.drop(".hidden.csv", "k,a\nx,hidden\n")
    here.drop("other.txt", "k,a\nx,other\n")
    here.run()
    assert [load.file for load in reversed(here.loads)] == ["z.CSV", "a.Csv", "b.csv", "c.csv"]
    assert here.master == b"k,a\nx,c\n"
    assert here.waiting == [".hidden.csv", "other.txt"]


def test_the_archive_has_the_documented_names_and_the_very_bytes(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("data_batch1.csv", "k,a\nx,1\n")
    here.take("data_batch1.csv", "k,a\nx,2\n")
    assert all(re.fullmatch(r"data_batch1\.csv\.\d{8}T\d{6}\.\d{3}", name) for name in here.archived)
    contents = sorted((here.config.archive_dir / name).read_bytes() for name in here.archived)
    assert contents == [b"k,a\nx,1\n", b"k,a\nx,2\n"]


def test_the_metadata_is_as_documented(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("1.csv", "k,a\nx,1\ny,2\n")
    told = here.metadata
    assert list(told) == ["last_updated", "row_count", "column_count", "columns"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}", told["last_updated"])
    assert (told["row_count"], told["column_count"], told["columns"]) == (2, 2, ["k", "a"])


def test_a_run_with_nothing_new_does_not_wait_and_one_wait_serves_all(tmp_path: Path) -> None:
    here = world(tmp_path, checksum_wait_seconds=WAIT_SECONDS)
    began = time.monotonic()
    here.run()
    assert time.monotonic() - began < WAIT_SECONDS
    for number in range(5):
        here.drop(f"{number}.csv", f"k,a\n{number},1\n")
    began = time.monotonic()
    here.run()
    assert time.monotonic() - began < 5 * WAIT_SECONDS
    assert here.metadata["row_count"] == 5
