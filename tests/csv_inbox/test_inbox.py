"""From the inbox to the archive or into quarantine: what is taken, in which order, and what is told of it."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock

from app.core.errors import Permanent, Rejected, Stopped, Transient
from app.core.runs import Stop
from app.csv_inbox.places import Places
from inbox_world import World, world

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


def test_a_file_that_still_grows_is_left_and_the_others_go_on(tmp_path: Path) -> None:
    here = world(tmp_path, checksum_wait_seconds=0.6)
    here.drop("whole.csv", "k,a\nx,1\n")
    path = here.drop("growing.csv", "k,a\ny,1\n")
    grown = threading.Timer(0.2, lambda: path.write_text("k,a\ny,1\nz,2\n"))
    grown.start()
    report = here.run()
    grown.join()
    assert here.master == b"k,a\nx,1\n"
    assert here.waiting == ["growing.csv"]
    assert any("still being written" in note for note in report.notes)
    assert not report.failures
    here.run()
    assert here.master == b"k,a\nx,1\ny,1\nz,2\n"


def test_a_rewrite_of_the_same_size_and_time_is_seen_by_its_md5(tmp_path: Path) -> None:
    here = world(tmp_path, checksum_wait_seconds=0.6)
    path = here.drop("sly.csv", "k,a\ny,1\n")
    os.utime(path, (100, 100))

    def rewrite() -> None:
        with path.open("r+") as file:
            file.write("k,a\ny,2\n")
        os.utime(path, (100, 100))

    sly = threading.Timer(0.2, rewrite)
    sly.start()
    here.run()
    sly.join()
    assert here.waiting == ["sly.csv"]
    assert not here.config.merged_file.exists()


def test_a_run_with_nothing_new_does_not_wait_and_one_wait_serves_all(tmp_path: Path) -> None:
    here = world(tmp_path, checksum_wait_seconds=0.5)
    began = time.monotonic()
    here.run()
    assert time.monotonic() - began < 0.2
    for number in range(5):
        here.drop(f"{number}.csv", f"k,a\n{number},1\n")
    began = time.monotonic()
    here.run()
    assert time.monotonic() - began < 2
    assert here.metadata["row_count"] == 5


def test_a_dry_run_changes_nothing_and_tells_each_file(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("0.csv", "k,a,gone\nx,1,\ny,2,\n")
    os.utime(here.drop("1.csv", "k,a,new\nx,8,\nz,3,5\n"), (100, 100))
    os.utime(here.drop("2.csv", "k,a\nz,4\n"), (200, 200))
    os.utime(here.drop("3.csv", "nothing\n"), (300, 300))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    report = here.run(dry_run=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    first, second, third = report.notes
    assert first == (
        "1.csv: valid, 2 rows: 1 inserted, 1 replaced, 0 unchanged; "
        "columns added: new; columns removed: gone; 3 rows in all"
    )
    assert second.startswith("2.csv: valid, 1 rows: 0 inserted, 1 replaced")
    assert third.startswith("3.csv: would be rejected: line 1: the column 'k' is missing")
    assert len(report.failures) == 1


def test_two_processes_at_once_take_turns_and_the_one_that_waits_too_long_says_so(tmp_path: Path) -> None:
    here = world(tmp_path, lock_timeout_seconds=0.3)
    here.drop("1.csv", "k,a\nx,1\n")
    with (
        FileLock(f"{here.config.merged_file}.lock"),
        pytest.raises(Transient, match=r"final_clusters_data\.csv\.lock") as told,
    ):
        here.run()
    assert "lock_timeout_seconds" in told.value.hint
    assert here.waiting == ["1.csv"]
    here.run()
    assert here.waiting == []


def test_a_stop_in_mid_merge_leaves_everything_as_it_was(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("0.csv", "k,a\nx,1\n")
    before = here.master
    here.drop("1.csv", "k,a\nx,2\n")
    stop = Stop()
    stop.ask("test")
    with pytest.raises(Stopped):
        here.run(stop=stop)
    assert here.master == before
    assert here.waiting == ["1.csv"]


def test_a_merge_can_be_taken_back_with_all_later_ones_to_the_byte(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("0.csv", 'k,a\nx,1\n"y",2\nz,3')
    one = here.master
    here.take("1.csv", "k,a\ny,9\nw,4\n")
    two = here.master
    here.take("2.csv", "k,a,b\nx,8,8\n")
    run_id = here.loads[1].run_id
    seen = here.undo(run_id[:12], dry_run=True)
    assert [note.split(",")[0] for note in seen.notes] == ["2.csv", "1.csv"]
    assert here.metadata["row_count"] == 4
    here.undo(here.loads[0].run_id)
    assert here.master == two
    here.undo(run_id)
    assert here.master == one
    assert here.metadata["columns"] == ["k", "a"]
    assert [load.outcome for load in here.loads] == ["undone", "undone", "merged"]
    here.take("3.csv", "k,a\ny,7\n")
    assert here.metadata["row_count"] == 3


def test_undo_refuses_a_master_that_something_else_changed(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("0.csv", "k,a\nx,1\n")
    here.take("1.csv", "k,a\nx,2\n")
    edited = here.master + b"hand,made\n"
    here.config.merged_file.write_bytes(edited)
    with pytest.raises(Rejected, match="changed by something else"):
        here.undo(here.loads[0].run_id)
    assert here.master == edited


def test_only_the_last_merges_can_be_taken_back(tmp_path: Path) -> None:
    here = world(tmp_path, undo_keep=2)
    for number in range(4):
        here.take(f"{number}.csv", f"k,a\nx,{number}\n")
    with pytest.raises(Rejected, match="cannot be undone"):
        here.undo(here.loads[2].run_id)
    with pytest.raises(Rejected, match="no merge of a run"):
        here.undo("nonsense")
    here.undo(here.loads[1].run_id)
    assert here.master == b"k,a\nx,1\n"
    assert not [name for name in here.names(Places(here.config).loads) if name.endswith(".undo")]


def small_disk(folder: Path, kilobytes: int) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("a small file system needs root to be mounted")


def test_a_full_disk_leaves_the_master_and_the_file_and_the_next_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    small_disk(folder, 1700)
    try:
        here = world(folder)
        here.take("0.csv", "k,a\n" + "".join(f"{n},{'x' * 50}\n" for n in range(6000)))
        before = here.master
        here.drop("1.csv", "k,a\n" + "".join(f"{n},new\n" for n in range(0, 6000, 2)))
        filler = folder / "filler"
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        for left in range(0, free, 24 * 1024):
            filler.write_bytes(b"\0" * (free - left))
            with suppress(Transient):
                here.run()
                break
            assert here.master == before
            assert here.waiting == ["1.csv"]
            assert not [name for name in here.names(folder) if ".tmp" in name]
        filler.unlink()
        here.run()
        assert here.waiting == []
        assert here.metadata["row_count"] == 6000
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_may_not_be_written_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    here = world(tmp_path / "fixed")
    here.take("0.csv", "k,a\nx,1\n")
    here.drop("1.csv", "k,a\nx,2\n")
    bound = ["mount", "--bind", str(tmp_path / "fixed"), str(tmp_path / "fixed")]
    if subprocess.run(bound, check=False).returncode:
        pytest.skip("a read-only file system needs root to be mounted")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path / "fixed")], check=True)
        with pytest.raises(Permanent, match="Read-only"):
            here.run()
        assert here.master == b"k,a\nx,1\n"
    finally:
        subprocess.run(["umount", str(tmp_path / "fixed")], check=True)
    here.run()
    assert here.master == b"k,a\nx,2\n"


def test_an_archive_on_another_file_system_works_the_same(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    small_disk(other, 1000)
    try:
        here = world(tmp_path, archive_dir="other/archive", rejected_dir="other/rejected")
        here.take("0.csv", "k,a\nx,1\n")
        here.take("bad.csv", "nothing\n")
        assert here.waiting == []
        assert len(here.archived) == 1
        assert "bad.csv" in here.rejected
    finally:
        subprocess.run(["umount", str(other)], check=True)


def test_a_file_replaced_while_it_is_read_is_merged_as_it_is_then(tmp_path: Path) -> None:
    here: World = world(tmp_path, checksum_wait_seconds=0.2)
    here.take("0.csv", "k,a\nx,1\n")
    stopping = threading.Event()

    def replace_often() -> None:
        number = 0
        while not stopping.is_set():
            fresh = tmp_path / "fresh"
            fresh.write_text("k,a\n" + "".join(f"{n},{number}\n" for n in range(500)))
            fresh.replace(here.config.watch_dir / "moving.csv")
            number += 1
            time.sleep(0.01)

    writer = threading.Thread(target=replace_often)
    writer.start()
    for _ in range(4):
        here.run()
    stopping.set()
    writer.join()
    last = (here.config.watch_dir / "moving.csv").read_text()
    here.run()
    values = {line.split(",")[1] for line in last.splitlines()[1:]}
    assert here.master.decode() == "k,a\nx,1\n" + last.partition("\n")[2]
    assert len(values) == 1


def test_a_full_log_moves_aside_and_five_older_ones_are_kept(tmp_path: Path) -> None:
    here = world(tmp_path)
    log = here.config.log_file
    for number in range(8):
        if log.exists():
            with log.open("a") as file:
                file.write("x" * 1_000_000 + "\n")
        here.take(f"{number}.csv", f"k,a\n{number},1\n")
        assert f"{number}.csv: merged" in log.read_text()
    kept = sorted(path.name for path in tmp_path.glob("csv_watchdog.log*"))
    assert kept == ["csv_watchdog.log", *(f"csv_watchdog.log.{older}" for older in range(1, 6))]
    assert "6.csv: merged" in (tmp_path / "csv_watchdog.log.1").read_text()


def command(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environ = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments], cwd=folder, env=environ, capture_output=True, text=True, check=False
    )


def test_the_documented_example_works_from_the_command_line_with_its_exit_codes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "watch_dir": "csv_inbox",
                "archive_dir": "csv_archive",
                "merged_file": "final_clusters_data.csv",
                "metadata_file": "merged_metadata.json",
                "key_column": "cluster_name",
                "required_columns": ["id", "name"],
                "checksum_wait_seconds": 0.1,
                "max_file_size_mb": 500,
                "csv_delimiter": ",",
                "csv_encoding": "utf-8",
                "log_level": "INFO",
                "log_to_console": True,
            }
        )
    )
    (tmp_path / "csv_inbox").mkdir()
    (tmp_path / "csv_inbox" / "data_batch1.csv").write_text("cluster_name,id,name\nc1,001,one\n")
    dry = command(tmp_path, "run", "csv_inbox", "--dry-run")
    assert (dry.returncode, "valid, 1 rows" in dry.stdout) == (0, True)
    assert not (tmp_path / "final_clusters_data.csv").exists()
    fine = command(tmp_path, "run", "csv_inbox")
    assert (fine.returncode, "1 inserted" in fine.stdout) == (0, True)
    assert (tmp_path / "final_clusters_data.csv").read_text() == "cluster_name,id,name\nc1,001,one\n"
    for name in ("csv_archive", "merged_metadata.json", "csv_watchdog.log"):
        assert (tmp_path / name).exists()
    (tmp_path / "csv_inbox" / "bad.csv").write_text("cluster_name,id\nc2,2\n")
    assert command(tmp_path, "run", "csv_inbox").returncode == 1
    shown = command(tmp_path, "runs", "csv_inbox").stdout
    run = next(line.split() for line in shown.splitlines() if "data_batch1.csv" in line)
    assert "rejected" in shown
    seen = command(tmp_path, "undo", "csv_inbox", next(word for word in run if re.fullmatch(r"[0-9a-f]{12}", word)))
    assert (seen.returncode, "1 rows become 0" in seen.stdout, "--yes" in seen.stdout) == (0, True, True)
    (tmp_path / "csv_inbox" / "more.csv").write_text("cluster_name,id,name\nc2,2,two\n")
    (tmp_path / "final_clusters_data.csv").write_text("broken")
    done = command(tmp_path, "run", "csv_inbox")
    assert (done.returncode, "never" in done.stderr or "not changed" in done.stderr) == (2, True)


def test_an_unknown_key_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "my.json").write_text('{"watchdir": "in", "csv_delimiter": "::", "undo_keep": -1}')
    environ = {"PATH": os.environ["PATH"], "CSV_MONITOR_CONFIG": str(tmp_path / "my.json")}
    done = subprocess.run(
        [sys.executable, "-m", "app", "run", "csv_inbox"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    assert len(done.stderr.splitlines()) == 3
    assert "did you mean 'watch_dir'?" in done.stderr
