"""What happens to an inbox meanwhile: files that change, a second process, a stop, disks that are full or read-only."""

import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from filelock import FileLock

from app.core.errors import Permanent, Rejected, Stopped, Transient
from app.core.runs import Stop
from app.csv_inbox.config import StuckFile
from app.csv_inbox.discovery import open_regular
from app.csv_inbox.job import run, undo
from disk_effects import Disk, Effect
from inbox_world import World, world


class Waiting(Stop):
    """A stop signal that nobody gives; while a run waits, something happens, and no time passes."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self._act = act

    def pause(self, seconds: float) -> None:
        assert seconds == 5
        self._act()


def test_a_file_that_still_grows_is_left_and_the_others_go_on(tmp_path: Path) -> None:
    here = world(tmp_path, checksum_wait_seconds=5)
    here.drop("whole.csv", "k,a\nx,1\n")
    path = here.drop("growing.csv", "k,a\ny,1\n")
    report = here.run(stop=Waiting(lambda: path.write_text("k,a\ny,1\nz,2\n")))
    assert here.master == b"k,a\nx,1\n"
    assert here.waiting == ["growing.csv"]
    assert any("still being written" in note for note in report.notes)
    assert not report.failures
    here.run(stop=Waiting(lambda: None))
    assert here.master == b"k,a\nx,1\ny,1\nz,2\n"


def test_a_rewrite_of_the_same_size_and_time_is_seen_by_its_md5(tmp_path: Path) -> None:
    here = world(tmp_path, checksum_wait_seconds=5)
    path = here.drop("sly.csv", "k,a\ny,1\n")
    os.utime(path, (100, 100))

    def rewrite() -> None:
        with path.open("r+") as file:
            file.write("k,a\ny,2\n")
        os.utime(path, (100, 100))

    here.run(stop=Waiting(rewrite))
    assert here.waiting == ["sly.csv"]
    assert not here.config.merged_file.exists()


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


def test_a_stop_ends_the_wait_for_the_lock(tmp_path: Path) -> None:
    here = world(tmp_path, lock_timeout_seconds=60)
    here.drop("1.csv", "k,a\nx,1\n")
    stop = Stop()
    asked = threading.Timer(0.3, lambda: stop.ask("test"))
    asked.start()
    with FileLock(f"{here.config.merged_file}.lock"), pytest.raises(Stopped):
        here.run(stop=stop)
    asked.join()


@pytest.mark.parametrize("content", ["k,a\nx,1\n", "k,a\nx\n"])
def test_a_file_that_is_taken_away_in_mid_run_stops_no_other(tmp_path: Path, content: str) -> None:
    here = world(tmp_path)
    path = here.drop("1.csv", content)
    os.utime(path, (1, 1))
    here.drop("2.csv", "k,a\ny,1\n")
    work = here.work()
    asked = 0

    def clock() -> datetime:
        """Asked before a file is read, and again before it is archived or set aside."""
        nonlocal asked
        asked += 1
        if asked == 2:
            path.unlink()
        return datetime.now(UTC)

    report = run(replace(work, clock=clock))
    assert any(note.startswith("1.csv: ") and "gone" in note for note in report.notes)
    assert not report.failures
    assert here.master == b"k,a\ny,1\n"
    assert here.waiting == []


@pytest.mark.parametrize("content", ["k,a\nx,1\n", "k,a\nx\n"])
@pytest.mark.parametrize("how", ["replaced", "written to"])
def test_a_file_that_changes_after_it_was_read_is_neither_archived_nor_set_aside_for_what_it_was(
    tmp_path: Path, content: str, how: str
) -> None:
    here = world(tmp_path)
    here.take("0.csv", "k,a\nw,1\n")
    path = here.drop("1.csv", content)
    later = path if how == "written to" else path.with_name(".later")
    asked = 0

    def clock() -> datetime:
        """Asked before a file is read, and again before it is archived or set aside."""
        nonlocal asked
        asked += 1
        if asked == 2:
            later.write_text("k,a\ny,22\n")
            later.replace(path)
        return datetime.now(UTC)

    report = run(replace(here.work(), clock=clock))
    assert not report.failures
    assert any(note.startswith("1.csv: ") and "while it was read" in note for note in report.notes)
    assert (here.master, here.waiting, here.rejected) == (b"k,a\nw,1\n", ["1.csv"], [])
    assert len(here.archived) == 1
    here.run()
    assert here.master == b"k,a\nw,1\ny,22\n"


@pytest.mark.parametrize("content", ["k,a\ny,2\n", "k,a\nx,1\ny,2\n"])
def test_a_file_dropped_under_the_same_name_between_commit_and_archive_is_merged_as_well(
    tmp_path: Path, content: str
) -> None:
    here = world(tmp_path)

    def drop(effect: Effect) -> None:
        if effect.target == here.config.merged_file:
            here.drop(".fresh", content).replace(path)

    path = here.drop("1.csv", "k,a\nx,1\n")
    with Disk(tmp_path, before=drop).recorded():
        here.run()
    assert here.master == b"k,a\nx,1\n"
    assert here.waiting == ["1.csv"]
    here.run()
    assert here.master == b"k,a\nx,1\ny,2\n"
    contents = [(here.config.archive_dir / name).read_text() for name in here.archived]
    assert sorted(contents) == sorted(["k,a\nx,1\n", content])


def test_a_row_written_between_commit_and_archive_goes_with_the_file_and_is_taken_in_from_there(tmp_path: Path) -> None:
    here = world(tmp_path)

    def write(effect: Effect) -> None:
        if effect.target == here.config.merged_file:
            writer.write("y,2\n")

    with here.drop("1.csv", "k,a\nx,1\n").open("a", 1) as writer, Disk(tmp_path, before=write).recorded():
        here.run()
    assert here.waiting == []
    assert [(here.config.archive_dir / name).read_text() for name in here.archived] == ["k,a\nx,1\ny,2\n"]
    here.run()
    assert here.master == b"k,a\nx,1\ny,2\n"


def test_a_file_taken_away_between_commit_and_archive_is_archived_all_the_same(tmp_path: Path) -> None:
    here = world(tmp_path)
    path = here.drop("1.csv", "k,a\nx,1\n")
    disk = Disk(tmp_path, before=lambda each: path.unlink() if each.target == here.config.merged_file else None)
    with disk.recorded():
        here.run()
    assert [(here.config.archive_dir / name).read_text() for name in here.archived] == ["k,a\nx,1\n"]
    assert here.waiting == []


class Meanwhile(Stop):
    """A stop signal that nobody gives: at its first safe point while a temporary file is written, something happens."""

    def __init__(self, here: World, act: Callable[[], object], *files: str) -> None:
        super().__init__()
        self._folder, self._acts, self._files = here.folder, [act], files or ("master", "restored")

    def check(self) -> None:
        if self._acts and any(any(self._folder.glob(f".*.{what}.merge.tmp")) for what in self._files):
            self._acts.pop()()


@pytest.mark.parametrize("index_from_mb", [0, 1000])
@pytest.mark.parametrize("how", ["written to", "replaced"])
def test_a_master_that_changes_while_it_is_read_is_merged_into_as_it_is_then(
    tmp_path: Path, index_from_mb: int, how: str
) -> None:
    here = world(tmp_path, index_from_mb=index_from_mb)
    here.take("0.csv", "k,a\nx,1\ny,1\n")
    theirs = here.master + b"theirs,1\n"

    def change() -> None:
        path = here.config.merged_file if how == "written to" else tmp_path / "theirs"
        path.write_bytes(theirs)
        path.replace(here.config.merged_file)

    here.drop("1.csv", "k,a\nx,2\n")
    with pytest.raises(Transient, match=f"was {how} while it was read"):
        here.run(stop=Meanwhile(here, change))
    assert (here.master, here.waiting) == (theirs, ["1.csv"])
    assert not [name for name in here.names(tmp_path) if ".tmp" in name]
    here.run()
    assert here.master == b"k,a\ny,1\ntheirs,1\nx,2\n"


def test_a_master_that_is_replaced_while_the_file_is_read_gets_no_rows_in_the_order_of_its_old_columns(
    tmp_path: Path,
) -> None:
    here = world(tmp_path)
    here.take("0.csv", "k,a\nx,1\n")

    def replace_master() -> None:
        (tmp_path / "theirs").write_bytes(b"a,k\n1,x\n")
        (tmp_path / "theirs").replace(here.config.merged_file)

    here.drop("1.csv", "k,a\ny,2\n")
    with pytest.raises(Transient, match="was replaced while it was read"):
        here.run(stop=Meanwhile(here, replace_master, "rows"))
    assert (here.master, here.waiting) == (b"a,k\n1,x\n", ["1.csv"])
    here.run()
    assert here.master == b"a,k\n1,x\n2,y\n"


def test_a_master_that_changes_while_a_merge_is_taken_back_keeps_what_was_written_to_it(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.take("0.csv", "k,a\nx,1\ny,1\n")
    here.take("1.csv", "k,a\nx,2\n")
    theirs = here.master + b"theirs,1\n"
    stop = Meanwhile(here, lambda: here.config.merged_file.write_bytes(theirs))
    with pytest.raises(Rejected, match="was changed by something else"):
        undo(here.work(stop=stop), here.loads[0].run_id)
    here.take("2.csv", "k,a\nz,3\n")
    assert here.master == theirs + b"z,3\n"
    assert [load.outcome for load in here.loads] == ["merged"] * 3
    assert not [name for name in here.names(tmp_path) if ".tmp" in name]


def test_a_full_archive_is_the_folder_that_is_named(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    small_disk(other, 100)
    try:
        here = world(tmp_path, archive_dir="other/archive")
        here.drop("1.csv", "k,a\n" + "x,1\n" * 100_000)
        with pytest.raises(Transient, match="No space left") as told:
            here.run()
        assert str(here.config.archive_dir) in told.value.message
        assert str(here.config.watch_dir) not in told.value.message
        assert here.waiting == ["1.csv"]
    finally:
        subprocess.run(["umount", str(other)], check=True)


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


def test_a_run_that_is_stopped_records_the_file_that_it_merged(tmp_path: Path) -> None:
    here, stop = world(tmp_path), Stop()
    for name in ("1.csv", "2.csv"):
        os.utime(here.drop(name, f"k,a\n{name},1\n"), (1, 1))

    def clock() -> datetime:
        if here.archived:
            stop.ask("test")
        return datetime.now(UTC)

    work = replace(here.work(stop=stop), clock=clock)
    with pytest.raises(Stopped):
        run(work)
    assert (len(here.archived), here.waiting) == (1, ["2.csv"])
    done = work.context.done.total
    assert (done.rows, done.ledger.closes) == (1, True)


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


def test_a_file_that_cannot_be_opened_because_too_many_files_are_open_stays_and_is_merged_next(tmp_path: Path) -> None:
    here = world(tmp_path)
    path = here.drop("1.csv", "k,a\nx,1\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(StuckFile, match="Too many open files"):
            open_regular(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not here.run().failures
    assert here.master == b"k,a\nx,1\n"


def test_a_run_that_is_stopped_takes_the_md5_of_no_further_file(tmp_path: Path) -> None:
    here = world(tmp_path, checksum_wait_seconds=5)
    for name in ("1.csv", "2.csv"):
        os.truncate(here.drop(name, ""), 400 << 20)
    stop = Stop()
    stop.ask("the test")
    begun = time.process_time()
    with pytest.raises(Stopped):
        here.run(stop=stop)
    assert time.process_time() - begun < 0.3
    assert here.waiting == ["1.csv", "2.csv"]
