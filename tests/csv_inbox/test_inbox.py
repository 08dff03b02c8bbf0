"""From the inbox to the archive or into quarantine: what is taken, in which order, and what is told of it."""

import json
import os
import re
import socket
import subprocess
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from app.csv_inbox import csv_tokenizer
from app.csv_inbox.job import run
from app.csv_inbox.quarantine import rejected_by
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


@pytest.mark.parametrize("log_file", ["/dev/full", "folder", "file/x.log"])
def test_a_log_file_that_cannot_be_written_is_told_once_and_stops_no_merge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], log_file: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    here = world(tmp_path, log_file=log_file)
    assert here.take("a.csv", "k,a\n1,x\n").failures == ()
    assert here.master == b"k,a\n1,x\n"
    told = capsys.readouterr().err
    assert told.count("cannot be written") == told.count("\n") == 1


def test_what_a_run_set_aside_is_found_as_long_as_it_lies_there(tmp_path: Path) -> None:
    here = world(tmp_path)
    for name in ("a.csv", "b.csv"):
        here.take(name, "x\n1\n")
    paths, run_id = here.work().paths, here.loads[0].run_id
    (kept,) = rejected_by(paths, run_id)
    assert (kept.name, kept.size_bytes, kept.path) == ("b.csv", 4, here.config.rejected_dir / "b.csv")
    (here.config.rejected_dir / "b.csv").unlink()
    assert rejected_by(paths, run_id) == []
    (here.config.rejected_dir / "b.csv").symlink_to("/etc/passwd")
    assert rejected_by(paths, run_id) == [], "what a link leads to is not the file"
    assert rejected_by(paths, "another") == []


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


def test_rejected_files_of_one_name_and_one_instant_are_numbered(tmp_path: Path) -> None:
    here = world(tmp_path)
    at = datetime(2026, 2, 7, 12, tzinfo=UTC)
    for number in range(4):
        here.drop("b.csv", f"bad {number}\n")
        run(replace(here.work(), clock=lambda: at))
    kept = {name: (here.config.rejected_dir / name).read_text() for name in here.rejected if ".json" not in name}
    stamped = "b.csv.20260207T120000.000"
    assert kept == {"b.csv": "bad 0\n", stamped: "bad 1\n", f"{stamped}.1": "bad 2\n", f"{stamped}.2": "bad 3\n"}


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


def test_names_and_headers_of_any_bytes_are_one_line_each_in_the_log_at_every_level(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = world(tmp_path, log_level="DEBUG", csv_encoding="latin-1")
    for name in (b"\xff.csv", b"a\nb.csv"):
        here.drop(os.fsdecode(name), b'k,"new\nline \x85"\nx,1\n')
        here.drop("bad-" + os.fsdecode(name), b'"k\n",a\nx\n')
    notes = here.run().notes
    with (here.config.archive_dir / here.archived[-1]).open("a") as writer:
        writer.write("y,2\n")
    notes = (*notes, *here.run().notes)
    assert len(notes) == 6
    assert all(note.isprintable() for note in notes)
    log = here.config.log_file.read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\S+Z - [A-Z]+ - ", line) for line in log)
    assert "archived \\xff.csv as" in "\n".join(log)
    assert "new\\nline" in "\n".join(log)
    assert capsys.readouterr().err == ""


def test_the_inboxs_own_files_may_lie_in_the_inbox(tmp_path: Path) -> None:
    own = {"merged_file": "csv_inbox/m.csv", "metadata_file": "csv_inbox/meta.csv", "log_file": "csv_inbox/log.csv"}
    here = world(tmp_path, **own)
    here.take("1.csv", "k,a\nx,1\n")
    assert here.run().notes == ()
    assert here.rejected == []
    assert here.metadata["row_count"] == 1


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


def test_what_lies_in_the_rejected_folder_is_the_users_and_is_never_overwritten_or_deleted(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("b.csv", "k,a\nfirst\n")
    rejected = here.config.rejected_dir
    (rejected / "b.csv").rename(rejected / "taken.csv")
    (rejected / "b.csv.bad_rows.csv").write_text("k,a\nfirst,corrected\n")
    (rejected / ".mine.reason.json").write_text("mine")
    (rejected / ".mine.json.tmp").write_text("mine")
    (rejected / ".pending-mine.csv").write_text("mine")
    before = {path: path.read_bytes() for path in rejected.iterdir()}
    here.take("b.csv", "k,a\nsecond\n")
    here.take("b.csv", "other\n")
    (rejected / "taken.csv").rename(here.config.watch_dir / "b.csv")  # as it was, its rows being corrected meanwhile
    here.run()
    del before[rejected / "taken.csv"]
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.read_text() for path in rejected.glob("b.csv*") if path.suffix[1:].isdigit()) == [
        "k,a\nfirst\n",
        "k,a\nsecond\n",
        "other\n",
    ]
    assert [load.outcome for load in here.loads] == ["rejected"] * 4


def test_a_rejected_file_counts_as_set_aside_once_with_its_kind(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.drop("1.csv", "k,a\nx,1\ny\nz,3\n")
    here.drop("2.csv", "k,a\nx,1\ny,2\n")
    here.drop("3.csv", "")
    report = here.run()
    total = report.ledger.total
    assert report.ledger.unit == "records"
    assert [(one.reason, one.number, one.new, one.sample) for one in report.ledger.set_aside] == [
        ("no rows", 1, 1, "3.csv"),
        ("wrong number of fields", 3, 3, "1.csv"),
    ]
    assert (total.counted, total.new, total.set_aside) == (6, 2, 4)
    assert report.ledger.closes
    assert not here.run().ledger


def test_the_ledger_tells_new_rows_from_those_that_were_there_and_those_that_were_corrected(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("1.csv", "k,a\nx,1\ny,2\nz,3\n")
    total = here.take("2.csv", "k,a\nz,3\nx,8\nx,9\nw,4\n").ledger.total
    assert (total.counted, total.read, total.new, total.already_there, total.corrected) == (4, 4, 1, 1, 2)


def test_the_log_says_what_was_written_with_the_zone_and_at_debug_each_step_but_no_value(tmp_path: Path) -> None:
    here = world(tmp_path, log_level="DEBUG")
    here.take("good.csv", "k,name\nsecret-key,secret-value\n")
    here.take("bad.csv", "k,name\nsecret-key\n")
    lines = here.config.log_file.read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z - [A-Z]+ - ", line) for line in lines)
    text = "\n".join(lines)
    assert "secret" not in text
    for expected in (
        r"DEBUG - good\.csv: 31 bytes, size and time unchanged after 0 s",
        r"DEBUG - header: 2 columns in line 1 \(k, name\), 2 fields in all; delimiter ',', encoding utf-8, line end",
        r"DEBUG - good\.csv: MD5 read once, 1 rows in 31 bytes, 1 distinct keys",
        r"DEBUG - renamed \S+ to \S+/final_clusters_data\.csv",
        r"DEBUG - archived good\.csv as \S+/csv_archive/good\.csv\.",
        r"INFO - good\.csv: merged, 1 rows",
        r"INFO - final_clusters_data\.csv: written, 1 rows, 2 columns, 31 bytes",
        r"ERROR - 'bad\.csv': rejected, moved to \S+/csv_inbox_rejected: line 2: 1 fields where the header has 2",
        r"DEBUG - moved bad\.csv to \S+/csv_inbox_rejected/bad\.csv",
    ):
        assert re.search(expected, text), expected


def test_links_and_pipes_go_to_a_rejected_folder_on_another_file_system_and_stop_no_other_file(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(other)], check=False).returncode:
        pytest.skip("a file system of its own needs root to be mounted")
    try:
        here = world(tmp_path, rejected_dir="other/rejected")
        here.config.watch_dir.mkdir()
        (here.config.watch_dir / "link.csv").symlink_to("/etc/passwd")
        os.mkfifo(here.config.watch_dir / "pipe.csv")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(here.config.watch_dir / "socket.csv"))
        here.drop("z.csv", "k,a\nx,1\n")
        report = here.run()
        assert {failure.partition for failure in report.failures} == {"link.csv", "pipe.csv", "socket.csv"}
        assert here.waiting == ["socket.csv"]
        assert (here.config.rejected_dir / "link.csv").is_symlink()
        assert (here.config.rejected_dir / "pipe.csv").is_fifo()
        assert here.master == b"k,a\nx,1\n"
        assert report.ledger.closes
    finally:
        subprocess.run(["umount", str(other)], check=True)


def test_a_rejected_folder_that_may_not_be_written_stops_no_other_file_and_is_the_one_that_is_named(
    tmp_path: Path,
) -> None:
    here = world(tmp_path)
    here.take("0.csv", "k,a\nw,1\n")
    bound = ["mount", "--bind", str(here.config.rejected_dir), str(here.config.rejected_dir)]
    if subprocess.run(bound, check=False).returncode:
        pytest.skip("a read-only file system needs root to be mounted")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(here.config.rejected_dir)], check=True)
        os.utime(here.drop("bad.csv", "k,a\nx\n"), (1, 1))
        report = here.take("good.csv", "k,a\nx,1\n")
    finally:
        subprocess.run(["umount", str(here.config.rejected_dir)], check=True)
    assert here.master == b"k,a\nw,1\nx,1\n"
    assert here.waiting == ["bad.csv"]
    assert str(here.config.rejected_dir) in report.failures[0].message
    assert "1 fields where the header has 2" in report.failures[0].message
    assert (report.ledger.total.waiting, report.ledger.closes) == (1, True)
    assert len(here.run().failures) == 1
    assert here.rejected == ["bad.csv", "bad.csv.bad_rows.csv", "bad.csv.reason.json"]
    assert json.loads((here.config.rejected_dir / "bad.csv.reason.json").read_text())["line"] == 2


def test_a_record_of_the_longest_size_can_be_read_back_whatever_happens_to_the_columns(tmp_path: Path) -> None:
    here = world(tmp_path, undo_keep=0, index_from_mb=1000)
    value = "v" * (csv_tokenizer.LONGEST_RECORD_BYTES - len("x,\n"))
    assert not here.take("1.csv", f"k,a\nx,{value}\n").failures
    assert here.take("2.csv", f"k,a\ny,{value}v\n").failures
    assert not here.take("3.csv", "k,a,b,c\nz,1,2,3\n").failures
    assert not here.take("4.csv", "k,a\nz,1\n").failures
    assert here.master == f"k,a\nx,{value}\nz,1\n".encode()
